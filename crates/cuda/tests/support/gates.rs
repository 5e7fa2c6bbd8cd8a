//! Gates in a graph, and a model of what they do.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use tierstream_cuda::{At, Block, Device, Error, GATE_WIDTH, Gates, Graph, Stream};

use super::read;

/// Longer than any test waits for an answer.
pub(crate) const LONG: Duration = Duration::from_secs(60);
/// For gates that are not to ask: they give up at once.
pub(crate) const NEVER: Duration = Duration::ZERO;

const ROW: u64 = 4 * GATE_WIDTH as u64;

/// Gates with a graph of all of them, whose slots are copied to `out` behind each.
pub(crate) struct Rig {
    pub(crate) gates: Gates,
    pub(crate) graph: Graph,
    pub(crate) stream: Arc<Stream>,
    pub(crate) out: Block,
    device: Device,
    counts: Vec<usize>,
}

impl Rig {
    /// Gates with so many numbers each, which are given, and tables of so many entries.
    pub(crate) fn new(
        device: &Device,
        counts: &[usize],
        tables: &[u32],
        longest: Duration,
    ) -> Self {
        let (gates, stream) = (device.gates(tables).unwrap(), Arc::new(device.stream().unwrap()));
        let out = device.allocate(counts.len() as u64 * ROW).unwrap();
        let graph = stream.capture::<Error>(|| Ok(())).unwrap();
        let (device, counts) = (device.clone(), counts.to_vec());
        let mut rig = Self { gates, graph, stream, out, device, counts };
        rig.graph = rig.capture(longest, |_| {});
        rig
    }

    /// One more graph; `behind` is called when each gate has been captured.
    pub(crate) fn capture(&self, longest: Duration, mut behind: impl FnMut(usize)) -> Graph {
        let Self { gates, stream, out, device, counts, .. } = self;
        let graph = stream.capture::<Error>(|| {
            for (gate, count) in counts.iter().enumerate() {
                // SAFETY: the graph keeps the gates' memory, which is that of the numbers.
                unsafe { gates.put(stream, gate, gates.given(gate), *count, longest) }?;
                // SAFETY: the graph keeps the gates' memory.
                let slots = unsafe { device.borrow(gates.slots(gate), ROW) };
                stream.copy_within(slots.span(0, ROW)?, out.span(gate as u64 * ROW, ROW)?)?;
                behind(gate);
            }
            Ok(())
        });
        graph.unwrap()
    }

    /// A pass with these numbers; what each gate has come to when it was reached, and its slots in
    /// the end. `answer` is called for those that ask: until it has answered it must not ask the
    /// driver for anything that may wait for the whole device.
    pub(crate) fn pass(
        &mut self,
        numbers: &[Vec<i32>],
        mut answer: impl FnMut(&mut Gates, usize, &[i32]),
    ) -> (Vec<At>, Vec<Vec<i32>>) {
        for (gate, numbers) in numbers.iter().enumerate() {
            self.gates.give(gate, numbers);
        }
        self.gates.begin();
        self.stream.launch(&self.graph).unwrap();
        let mut came = Vec::new();
        for (gate, given) in numbers.iter().enumerate() {
            let (at, numbers) = reach(&self.gates, gate);
            assert_eq!(numbers, *given);
            if at == At::Asks {
                answer(&mut self.gates, gate, &numbers);
            }
            came.push(at);
        }
        (came, self.slots())
    }

    /// The slots that came out, when the stream has done everything.
    pub(crate) fn slots(&self) -> Vec<Vec<i32>> {
        self.stream.synchronize().unwrap();
        let bytes = read(&self.device, self.out.span(0, self.out.bytes()).unwrap());
        let word = |word: &[u8]| i32::from_le_bytes(word.try_into().unwrap());
        let row =
            |(row, count): (&[u8], &usize)| row.chunks_exact(4).take(*count).map(word).collect();
        bytes.chunks_exact(ROW as usize).zip(&self.counts).map(row).collect()
    }
}

/// What a gate has come to, when it is reached.
pub(crate) fn reach(gates: &Gates, gate: usize) -> (At, Vec<i32>) {
    let mut numbers = Vec::new();
    loop {
        if let Some(at) = gates.poll(gate, &mut numbers) {
            return (at, numbers);
        }
        thread::yield_now();
    }
}

/// Numbers that look random.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, end: usize) -> usize {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % end as u64) as usize
    }
}

/// What a gate that asked was told.
struct Answer {
    slots: Vec<i32>,
    changes: Vec<(u32, i32)>,
}

/// Gates of random shapes, with what a model says of their tables.
pub(crate) struct Passes {
    pub(crate) rig: Rig,
    /// A second graph, which is taken for every other pass or so.
    pub(crate) other: Graph,
    random: Random,
    counts: Vec<usize>,
    tables: Vec<u32>,
    model: Vec<i32>,
    /// About one entry in so many has no slot.
    rare: usize,
    /// Gates that have asked, and passes that were given up.
    pub(crate) asked: usize,
    pub(crate) given_up: usize,
}

impl Passes {
    /// Gates that wait LONG in the one graph, and `short` in the other.
    pub(crate) fn new(device: &Device, seed: u64, short: Duration) -> Self {
        println!("seed {seed}");
        let mut random = Random(seed);
        let gates = 1 + random.below(12);
        let counts: Vec<usize> = (0..gates).map(|_| random.below(GATE_WIDTH + 1)).collect();
        let tables: Vec<u32> = (0..gates).map(|_| random.below(200) as u32).collect();
        let rig = Rig::new(device, &counts, &tables, LONG);
        let other = rig.capture(short, |_| {});
        let (model, rare) = (vec![-1; tables.iter().sum::<u32>() as usize], 1 + random.below(100));
        Self { rig, other, random, counts, tables, model, rare, asked: 0, given_up: 0 }
    }

    fn entry(random: &mut Random, rare: usize) -> i32 {
        match random.below(rare) {
            0 => -1 - random.below(3) as i32,
            _ => random.below(1000) as i32,
        }
    }

    /// One pass with random numbers and answers; before each answer, `delay` is called.
    pub(crate) fn pass(&mut self, mut delay: impl FnMut(&mut Random)) {
        let Self { rig, other, random, counts, tables, model, rare, .. } = self;
        if random.below(8) == 0 {
            model.iter_mut().for_each(|value| *value = Self::entry(random, *rare));
            rig.gates.set_tables(&rig.stream, model).unwrap();
        }
        if random.below(2) == 0 {
            std::mem::swap(&mut rig.graph, other);
        }
        let number = |random: &mut Random, entries: u32| match random.below(50 * GATE_WIDTH) {
            0 => random.below(3) as i32 + if random.below(2) == 0 { -3 } else { entries as i32 },
            _ => random.below(entries.max(1) as usize) as i32,
        };
        let mut row = |(count, entries): (&usize, &u32)| -> Vec<i32> {
            (0..*count).map(|_| number(random, *entries)).collect()
        };
        let numbers: Vec<Vec<i32>> = counts.iter().zip(&*tables).map(&mut row).collect();
        let mut answers: Vec<Option<Answer>> = counts.iter().map(|_| None).collect();
        let (_, slots) = rig.pass(&numbers, |gates, gate, _| {
            let slots: Vec<i32> = (0..counts[gate]).map(|_| random.below(1000) as i32).collect();
            let changes = random.below(if model.is_empty() { 1 } else { 2 * GATE_WIDTH + 1 });
            let changes: Vec<(u32, i32)> = (0..changes)
                .map(|_| (random.below(model.len()) as u32, Self::entry(random, *rare)))
                .collect();
            delay(random);
            gates.answer(gate, &slots, &changes);
            answers[gate] = Some(Answer { slots, changes });
        });
        let mut void = false;
        for (gate, answer) in answers.into_iter().enumerate() {
            self.asked += usize::from(answer.is_some());
            let at = reach(&self.rig.gates, gate);
            assert_eq!(at.1, numbers[gate]);
            if at.0 == At::GaveUp {
                self.given_up += usize::from(!void);
                void = true;
                assert!(slots[gate].iter().all(|slot| *slot == 0));
                continue;
            }
            assert_eq!((at.0, void), (At::Passed, false), "gate {gate}");
            let there = self.look_up(gate, &numbers[gate]);
            let Some(answer) = answer else {
                assert_eq!(slots[gate], there, "gate {gate}");
                assert!(there.iter().all(|slot| *slot >= 0), "gate {gate} has not asked");
                continue;
            };
            assert!(there.iter().any(|slot| *slot < 0), "gate {gate} need not have asked");
            assert_eq!(slots[gate], answer.slots, "gate {gate}");
            answer.changes.iter().for_each(|(at, value)| self.model[*at as usize] = *value);
        }
    }

    fn look_up(&self, gate: usize, numbers: &[i32]) -> Vec<i32> {
        let start = self.tables[..gate].iter().sum::<u32>() as usize;
        let table = &self.model[start..][..self.tables[gate] as usize];
        let slot = |number: &i32| usize::try_from(*number).ok().and_then(|at| table.get(at));
        numbers.iter().map(|number| slot(number).copied().unwrap_or(-1)).collect()
    }
}

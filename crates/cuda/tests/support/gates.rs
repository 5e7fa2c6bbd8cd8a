//! Gates in a graph, and a model of what they do.

use std::thread;
use std::time::Duration;

use tierstream_cuda::{At, Block, Device, Error, GATE_WIDTH, Gates, Graph, Stream};

use super::read;

/// Longer than any test waits for an answer.
pub(crate) const LONG: Duration = Duration::from_secs(60);
/// For gates that are not to ask: they give up at once.
pub(crate) const NEVER: Duration = Duration::ZERO;

/// Gates with a graph of all of them, whose slots are copied to `out` behind each.
pub(crate) struct Rig {
    pub(crate) gates: Gates,
    pub(crate) graph: Graph,
    pub(crate) stream: Stream,
    pub(crate) out: Block,
    device: Device,
    counts: Vec<usize>,
}

const ROW: u64 = 4 * GATE_WIDTH as u64;

impl Rig {
    /// Gates with so many numbers each, which are given, and tables of so many entries.
    pub(crate) fn new(
        device: &Device,
        counts: &[usize],
        tables: &[u32],
        longest: Duration,
    ) -> Self {
        let (gates, stream) = (device.gates(tables).unwrap(), device.stream().unwrap());
        let out = device.allocate(counts.len() as u64 * ROW).unwrap();
        let graph = stream.capture::<Error>(|| {
            for (gate, count) in counts.iter().enumerate() {
                // SAFETY: the graph keeps the gates' memory, which is that of the numbers.
                unsafe { gates.put(&stream, gate, gates.given(gate), *count, longest) }?;
                // SAFETY: the graph keeps the gates' memory.
                let slots = unsafe { device.borrow(gates.slots(gate), ROW) };
                stream.copy_within(slots.span(0, ROW)?, out.span(gate as u64 * ROW, ROW)?)?;
            }
            Ok::<(), Error>(())
        });
        let (graph, device, counts) = (graph.unwrap(), device.clone(), counts.to_vec());
        Self { gates, graph, stream, out, device, counts }
    }

    /// A pass with these numbers; what each gate has come to when it was reached, and its slots in
    /// the end. `answer` is called for those that ask.
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

/// Passes over random tables, with random answers, against a model.
pub(crate) fn random_passes(device: &Device, seed: u64, passes: usize) {
    let mut random = Random(seed);
    let shapes: Vec<(usize, u32)> = (0..1 + random.below(12))
        .map(|_| (random.below(GATE_WIDTH + 1), random.below(200) as u32))
        .collect();
    let (counts, tables): (Vec<usize>, Vec<u32>) = shapes.into_iter().unzip();
    let starts: Vec<usize> = (0..tables.len())
        .map(|gate| tables[..gate].iter().map(|entries| *entries as usize).sum())
        .collect();
    let mut rig = Rig::new(device, &counts, &tables, LONG);
    let entries: usize = tables.iter().map(|entries| *entries as usize).sum();
    // -1 in new tables; then about one in `rare` has no slot.
    let mut model = vec![-1; entries];
    let rare = 1 + random.below(100);
    let entry = |random: &mut Random| match random.below(rare) {
        0 => -1 - random.below(3) as i32,
        _ => random.below(1000) as i32,
    };
    for pass in 0..passes {
        if random.below(8) == 0 {
            model.iter_mut().for_each(|value| *value = entry(&mut random));
            rig.gates.set_tables(&rig.stream, &model).unwrap();
        }
        let numbers: Vec<Vec<i32>> = counts
            .iter()
            .zip(&tables)
            .map(|(count, entries)| {
                let one = |_| match random.below(50 * GATE_WIDTH) {
                    0 => -1,
                    _ => random.below((*entries).max(1) as usize) as i32,
                };
                (0..*count).map(one).collect()
            })
            .collect();
        let mut expected: Vec<Option<Vec<i32>>> = vec![None; counts.len()];
        let look_up = |model: &[i32], gate: usize| -> Vec<i32> {
            let slot = |number: &i32| match u32::try_from(*number) {
                Ok(number) if number < tables[gate] => model[starts[gate] + number as usize],
                _ => -1,
            };
            numbers[gate].iter().map(slot).collect()
        };
        // Answers come in order, and a gate behind sees what was changed before.
        let mut next = 0;
        let mut settle = |model: &[i32], expected: &mut Vec<Option<Vec<i32>>>, until: usize| {
            for (gate, slots) in expected.iter_mut().enumerate().take(until).skip(next) {
                slots.get_or_insert_with(|| look_up(model, gate));
            }
            next = until;
        };
        let (came, slots) = rig.pass(&numbers, |gates, gate, _| {
            settle(&model, &mut expected, gate);
            assert!(look_up(&model, gate).iter().any(|slot| *slot < 0), "gate {gate} need not ask");
            let slots: Vec<i32> = (0..counts[gate]).map(|_| random.below(1000) as i32).collect();
            let changes: Vec<(u32, i32)> = (0..random.below(2 * GATE_WIDTH + 1))
                .map(|_| (random.below(entries.max(1)) as u32, entry(&mut random)))
                .filter(|_| entries > 0)
                .collect();
            changes.iter().for_each(|(at, value)| model[*at as usize] = *value);
            gates.answer(gate, &slots, &changes);
            expected[gate] = Some(slots);
        });
        settle(&model, &mut expected, counts.len());
        for (gate, expected) in expected.into_iter().enumerate() {
            let expected = expected.unwrap();
            let at = came[gate];
            assert!(
                at == At::Asks || expected.iter().all(|slot| *slot >= 0),
                "{seed} {pass} {gate}"
            );
            assert_eq!(slots[gate], expected, "seed {seed}, pass {pass}, gate {gate}");
        }
    }
}

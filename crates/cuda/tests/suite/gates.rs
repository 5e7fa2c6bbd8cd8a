//! Marks, captured graphs, and gates in them.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use crate::support::gates::{LONG, NEVER, Passes, Rig, reach};
use crate::support::{Counted, MIB, everywhere, everywhere_alone, pattern, read};
use tierstream_cuda::{At, Device, Error, GATE_WIDTH, Pinned, Span};

fn is_config<T>(result: Result<T, Error>) {
    match result {
        Err(Error::Config(_)) => {}
        Err(other) => panic!("{other:?}"),
        Ok(_) => panic!("not refused"),
    }
}

fn is_driver<T>(result: Result<T, Error>) {
    match result {
        Err(Error::Driver { .. }) => {}
        Err(other) => panic!("{other:?}"),
        Ok(_) => panic!("not refused"),
    }
}

/// Pinned bytes of one value, which count their drops.
fn counted(device: &Device, value: u8, len: usize, drops: &Arc<AtomicUsize>) -> Counted<Pinned> {
    let mut pinned = device.pin(len).unwrap();
    pinned.fill(value);
    Counted::new(pinned, drops)
}

#[test]
fn a_mark_is_set_and_waited_for_again_and_again() {
    everywhere(|device| {
        let (a, b) = (device.stream().unwrap(), device.stream().unwrap());
        let block = device.allocate(2 * MIB).unwrap();
        let part = |i: u64| block.span(i * MIB, MIB).unwrap();
        let (there, back) = (device.mark().unwrap(), device.mark().unwrap());
        assert!(there.is_done().unwrap(), "never set");
        b.wait_for_mark(&there).unwrap();
        assert_ne!(there.raw(), back.raw());
        for value in 1..20 {
            a.wait_for_mark(&back).unwrap();
            a.fill(part(0), value).unwrap();
            a.set(&there).unwrap();
            b.wait_for_mark(&there).unwrap();
            b.copy_within(part(0), part(1)).unwrap();
            b.set(&back).unwrap();
        }
        back.wait().unwrap();
        assert!(back.is_done().unwrap() && there.is_done().unwrap());
        assert!(read(device, part(1)).iter().all(|byte| *byte == 19));
    });
}

#[test]
fn captured_work_runs_with_each_launch_and_not_before() {
    everywhere(|device| {
        let stream = device.stream().unwrap();
        let block = device.allocate(3).unwrap();
        let cell = |i: u64| block.span(i, 1).unwrap();
        let all = || read(device, block.span(0, 3).unwrap());
        stream.fill(block.span(0, 3).unwrap(), 0).unwrap();
        let drops = Arc::new(AtomicUsize::new(0));
        let graph = stream.capture(|| {
            stream.copy_within(cell(1), cell(2))?;
            stream.copy_within(cell(0), cell(1))?;
            stream.upload(counted(device, 7, 1, &drops), cell(0))
        });
        let graph = graph.unwrap();
        stream.synchronize().unwrap();
        assert_eq!((all(), stream.pending()), (vec![0, 0, 0], 0));
        let seen = [[7, 0, 0], [7, 7, 0], [7, 7, 7]].map(|expected| {
            stream.launch(&graph).unwrap();
            stream.synchronize().unwrap();
            all() == expected
        });
        assert_eq!(seen, [true; 3]);
        assert_eq!(drops.load(Ordering::SeqCst), 0, "there may be more launches");
        stream.fill(block.span(0, 3).unwrap(), 1).unwrap();
        stream.launch(&graph).unwrap();
        drop(graph);
        assert_eq!(drops.load(Ordering::SeqCst), 1, "the graph has waited for its launch");
        assert_eq!(all(), [7, 1, 1]);
    });
}

#[test]
fn launches_of_a_graph_come_one_after_the_other_on_other_streams_too() {
    everywhere(|device| {
        const CELLS: u64 = 40;
        let streams = [(); 3].map(|()| device.stream().unwrap());
        let block = device.allocate(CELLS).unwrap();
        let cell = |i: u64| block.span(i, 1).unwrap();
        streams[0].fill(block.span(0, CELLS).unwrap(), 0).unwrap();
        streams[0].fill(cell(0), 1).unwrap();
        streams[0].synchronize().unwrap();
        // Each launch fills one cell more; two at once would fill the same.
        let graph = streams[0].capture(|| {
            (1..CELLS).rev().try_for_each(|i| streams[0].copy_within(cell(i - 1), cell(i)))
        });
        let graph = graph.unwrap();
        for launch in 0..CELLS - 1 {
            streams[launch as usize % 3].launch(&graph).unwrap();
        }
        drop(graph);
        assert_eq!(read(device, block.span(0, CELLS).unwrap()), [1; CELLS as usize]);
    });
}

#[test]
fn a_capture_that_fails_is_ended_and_the_stream_goes_on() {
    everywhere(|device| {
        let stream = device.stream().unwrap();
        let block = device.allocate(4).unwrap();
        let span = || block.span(0, 4).unwrap();
        let drops = Arc::new(AtomicUsize::new(0));
        let begin = || stream.upload(counted(device, 1, 4, &drops), span());
        let why = || Error::Config("no more".to_owned());
        let failed = stream.capture(|| begin().and_then(|()| Err(why())));
        assert_eq!(failed.unwrap_err(), why());
        let panics = std::panic::AssertUnwindSafe(|| {
            stream.capture::<Error>(|| {
                begin()?;
                panic!("in the midst of a capture");
            })
        });
        std::panic::catch_unwind(panics).unwrap_err();
        assert_eq!(drops.load(Ordering::SeqCst), 2, "nobody will copy that");
        stream.upload(vec![2; 4], span()).unwrap();
        stream.synchronize().unwrap();
        let graph = stream.capture::<Error>(|| stream.fill(span(), 3)).unwrap();
        assert_eq!(read(device, span()), [2; 4]);
        stream.launch(&graph).unwrap();
        stream.synchronize().unwrap();
        assert_eq!(read(device, span()), [3; 4]);
    });
}

#[test]
fn what_cannot_be_captured_is_refused_and_the_capture_goes_on() {
    everywhere(|device| {
        let stream = device.stream().unwrap();
        let block = device.allocate(4).unwrap();
        let span = || block.span(0, 4).unwrap();
        let nothing = stream.capture::<Error>(|| Ok(())).unwrap();
        let mut gates = device.gates(&[1]).unwrap();
        let graph = stream.capture::<Error>(|| {
            is_config(stream.record());
            is_config(stream.download(span(), vec![0; 4]));
            is_config(stream.synchronize());
            is_config(stream.launch(&nothing));
            is_config(stream.capture::<Error>(|| Ok(())));
            is_config(gates.set_tables(&stream, &[0]));
            stream.fill(span(), 8)
        });
        stream.launch(&graph.unwrap()).unwrap();
        stream.launch(&nothing).unwrap();
        stream.synchronize().unwrap();
        assert_eq!(read(device, span()), [8; 4]);
        gates.set_tables(&stream, &[0]).unwrap();
    });
}

#[test]
fn graphs_and_marks_of_other_devices_are_refused() {
    everywhere(|device| {
        let other = tierstream_cuda::standin::StandIn::new(Default::default()).unwrap().device();
        let (stream, elsewhere) = (device.stream().unwrap(), other.stream().unwrap());
        let graph = elsewhere.capture::<Error>(|| Ok(())).unwrap();
        is_config(stream.launch(&graph));
        is_config(stream.set(&other.mark().unwrap()));
        is_config(stream.wait_for_mark(&other.mark().unwrap()));
        let mut gates = other.gates(&[1]).unwrap();
        is_config(gates.set_tables(&stream, &[0]));
        // SAFETY: refused.
        is_config(unsafe { gates.put(&stream, 0, gates.given(0), 1, LONG) });
    });
}

#[test]
fn another_stream_becomes_part_of_a_capture() {
    everywhere(|device| {
        let (stream, other) = (device.stream().unwrap(), device.stream().unwrap());
        let block = device.allocate(8).unwrap();
        let part = |i: u64| block.span(4 * i, 4).unwrap();
        let (fork, joined) = (device.mark().unwrap(), device.mark().unwrap());
        let drops = Arc::new(AtomicUsize::new(0));
        stream.fill(block.span(0, 8).unwrap(), 0).unwrap();
        let graph = stream.capture(|| {
            stream.set(&fork)?;
            other.wait_for_mark(&fork)?;
            other.upload(counted(device, 5, 4, &drops), part(0))?;
            is_config(other.record());
            other.set(&joined)?;
            stream.wait_for_mark(&joined)?;
            stream.copy_within(part(0), part(1))
        });
        let graph = graph.unwrap();
        // No longer part of it.
        other.synchronize().unwrap();
        assert_eq!((drops.load(Ordering::SeqCst), other.pending()), (0, 0));
        for _ in 0..2 {
            stream.fill(block.span(0, 8).unwrap(), 0).unwrap();
            stream.launch(&graph).unwrap();
            stream.synchronize().unwrap();
            assert_eq!(read(device, block.span(0, 8).unwrap()), [5; 8]);
        }
        drop(graph);
        assert_eq!(drops.load(Ordering::SeqCst), 1);
        other.set(&joined).unwrap();
        joined.wait().unwrap();
    });
}

#[test]
fn a_capture_with_loose_ends_fails_and_all_streams_go_on() {
    everywhere(|device| {
        let (stream, other) = (device.stream().unwrap(), device.stream().unwrap());
        let block = device.allocate(4).unwrap();
        let span = || block.span(0, 4).unwrap();
        let (fork, outside) = (device.mark().unwrap(), device.mark().unwrap());
        let unjoined = stream.capture::<Error>(|| {
            stream.set(&fork)?;
            other.wait_for_mark(&fork)?;
            other.fill(span(), 5)
        });
        is_driver(unjoined);
        other.set(&outside).unwrap();
        outside.wait().unwrap();
        is_driver(stream.capture::<Error>(|| stream.wait_for_mark(&outside)));
        for (stream, value) in [(&stream, 1), (&other, 2)] {
            stream.fill(span(), value).unwrap();
            stream.synchronize().unwrap();
            assert_eq!(read(device, span()), [value; 4]);
        }
    });
}

#[test]
fn gates_map_what_is_in_their_tables() {
    everywhere_alone(|device| {
        let mut rig = Rig::new(device, &[1, 8, 64, 0], &[4, 64, 100, 0], NEVER);
        let tables: Vec<i32> = (0..4).map(|i| 10 + i).chain((0..164).rev()).collect();
        rig.gates.set_tables(&rig.stream, &tables).unwrap();
        let numbers: [Vec<i32>; 4] = [
            vec![3],
            vec![0, 63, 7, 7, 5, 1, 2, 8],
            (0..64).map(|i| i * 37 % 100).collect(),
            vec![],
        ];
        for _ in 0..3 {
            let (came, slots) = rig.pass(&numbers, |_, gate, _| panic!("gate {gate} asks"));
            assert_eq!(came, [At::Passed; 4]);
            assert_eq!(slots[0], [13]);
            assert_eq!(slots[1], numbers[1].iter().map(|i| 163 - i).collect::<Vec<_>>());
            assert_eq!(slots[2], numbers[2].iter().map(|i| 99 - i).collect::<Vec<_>>());
            assert_eq!(slots[3], []);
        }
    });
}

#[test]
fn new_tables_have_no_slots() {
    everywhere_alone(|device| {
        let mut rig = Rig::new(device, &[2], &[2], LONG);
        let (came, slots) = rig.pass(&[vec![0, 1]], |gates, _, _| gates.answer(0, &[8, 9], &[]));
        assert_eq!((came, slots), (vec![At::Asks], vec![vec![8, 9]]));
    });
}

#[test]
fn a_gate_that_misses_asks_and_its_answer_changes_tables() {
    everywhere_alone(|device| {
        let mut rig = Rig::new(device, &[2, 2, 2], &[4, 4, 4], LONG);
        rig.gates.set_tables(&rig.stream, &[0, 1, -1, -1, 0, 1, 2, -5, -1, 5, -1, -1]).unwrap();
        let numbers = [vec![1, 2], vec![2, 0], vec![3, 1]];
        let mut asked = Vec::new();
        let (came, slots) = rig.pass(&numbers, |gates, gate, numbers| {
            asked.push((gate, numbers.to_vec()));
            assert_eq!(gates.poll(gate, &mut Vec::new()), Some(At::Asks));
            match gate {
                // For later gates: one slot more, and one less; of two values the last.
                0 => gates.answer(0, &[1, 3], &[(2, 3), (1, -1), (11, 9), (11, 7), (4, -1)]),
                1 => gates.answer(1, &[2, 6], &[(4, 6)]),
                _ => panic!("{gate} asks"),
            }
        });
        assert_eq!(asked, [(0, vec![1, 2]), (1, vec![2, 0])]);
        assert_eq!(came, [At::Asks, At::Asks, At::Passed]);
        assert_eq!(slots, [[1, 3], [2, 6], [7, 5]]);
        // What the pass before has changed.
        let (came, slots) = rig.pass(&numbers, |gates, gate, _| gates.answer(gate, &[4, 5], &[]));
        assert_eq!(came, [At::Asks, At::Passed, At::Passed]);
        assert_eq!(slots, [[4, 5], [2, 6], [7, 5]]);
        for gate in 0..3 {
            assert_eq!(rig.gates.poll(gate, &mut Vec::new()), Some(At::Passed), "gone on");
        }
        // And what is uploaded counts again.
        rig.gates.set_tables(&rig.stream, &[1; 12]).unwrap();
        rig.gates.set_tables(&rig.stream, &[2; 12]).unwrap();
        let (came, slots) = rig.pass(&numbers, |_, gate, _| panic!("gate {gate} asks"));
        assert_eq!((came, slots), (vec![At::Passed; 3], vec![vec![2; 2]; 3]));
    });
}

#[test]
fn an_answer_may_change_a_lot() {
    everywhere_alone(|device| {
        let all = GATE_WIDTH as i32;
        let mut rig = Rig::new(device, &[GATE_WIDTH, GATE_WIDTH], &[64, 128], LONG);
        let numbers = [(0..all).collect::<Vec<_>>(), (0..all).map(|i| 2 * i + 1).collect()];
        let slots: Vec<i32> = (0..all).map(|i| 1000 + i).collect();
        let changes: Vec<(u32, i32)> = (0..2 * all).map(|i| (64 + i as u32, 3 * i)).collect();
        let answer = |gates: &mut tierstream_cuda::Gates, gate, _: &[i32]| {
            gates.answer(gate, &slots, &changes);
        };
        let (came, out) = rig.pass(&numbers, answer);
        assert_eq!(came, [At::Asks, At::Passed]);
        assert_eq!(out, [slots.clone(), (0..all).map(|i| 6 * i + 3).collect()]);
    });
}

#[test]
fn numbers_beyond_a_table_are_misses() {
    everywhere_alone(|device| {
        let mut rig = Rig::new(device, &[1, 1], &[5, 5], LONG);
        rig.gates.set_tables(&rig.stream, &[4; 10]).unwrap();
        for beyond in [-1, 5, 9, i32::MAX, i32::MIN, 1 << 30] {
            let numbers = [vec![beyond], vec![0]];
            let (came, slots) = rig.pass(&numbers, |gates, _, _| gates.answer(0, &[77], &[]));
            assert_eq!((came, slots), (vec![At::Asks, At::Passed], vec![vec![77], vec![4]]));
        }
    });
}

#[test]
fn numbers_come_from_the_device_as_well() {
    everywhere_alone(|device| {
        let (mut gates, stream) = (device.gates(&[8]).unwrap(), device.stream().unwrap());
        let block = device.allocate(64).unwrap();
        let out = device.allocate(256).unwrap();
        // SAFETY: the slots of `gates`, which outlive the graph.
        let slots = unsafe { device.borrow(gates.slots(0), 256) };
        let graph = stream.capture(|| {
            stream.fill(block.span(4, 8).unwrap(), 0)?;
            stream.fill(block.span(8, 1).unwrap(), 6)?;
            // SAFETY: `block` outlives the graph.
            unsafe { gates.put(&stream, 0, block.address() + 4, 2, NEVER) }?;
            stream.copy_within(slots.span(0, 256).unwrap(), out.span(0, 256).unwrap())
        });
        let graph = graph.unwrap();
        gates.set_tables(&stream, &[50, 51, 52, 53, 54, 55, 56, 57]).unwrap();
        gates.begin();
        stream.launch(&graph).unwrap();
        assert_eq!(reach(&gates, 0), (At::Passed, vec![0, 6]));
        stream.synchronize().unwrap();
        assert_eq!(read(device, out.span(0, 8).unwrap()), [50, 0, 0, 0, 56, 0, 0, 0]);
    });
}

#[test]
fn a_pass_that_nobody_answers_is_given_up_and_the_next_works() {
    everywhere_alone(|device| {
        let mut rig = Rig::new(device, &[1, 2, 1, 1], &[2; 4], Duration::from_millis(20));
        let tables = [5, 5, 5, -1, 5, 5, -1, -1];
        rig.gates.set_tables(&rig.stream, &tables).unwrap();
        let numbers = [vec![0], vec![1, 0], vec![1], vec![0]];
        for _ in 0..2 {
            let (mut came, slots) = rig.pass(&numbers, |_, gate, _| assert_eq!(gate, 1));
            assert!(matches!(came.remove(1), At::Asks | At::GaveUp));
            assert_eq!(came, [At::Passed, At::GaveUp, At::GaveUp]);
            assert_eq!(slots, [vec![5], vec![0, 0], vec![0], vec![0]]);
            assert_eq!(reach(&rig.gates, 1), (At::GaveUp, vec![1, 0]));
            // Too late.
            rig.gates.answer(1, &[3, 3], &[(3, 3)]);
            assert_eq!(reach(&rig.gates, 1), (At::GaveUp, vec![1, 0]));
        }
        rig.gates.set_tables(&rig.stream, &[6; 8]).unwrap();
        let (came, slots) = rig.pass(&numbers, |_, gate, _| panic!("gate {gate} asks"));
        assert_eq!(came, [At::Passed; 4]);
        assert_eq!(slots, [vec![6], vec![6, 6], vec![6], vec![6]]);
    });
}

#[test]
fn a_launch_needs_a_pass_and_a_pass_no_launch() {
    everywhere_alone(|device| {
        let mut rig = Rig::new(device, &[1, 1], &[1, 1], NEVER);
        rig.gates.set_tables(&rig.stream, &[3, 4]).unwrap();
        let none = |rig: &Rig| (0..2).all(|gate| rig.gates.poll(gate, &mut Vec::new()).is_none());
        assert!(none(&rig), "nothing has begun");
        let numbers = [vec![0], vec![0]];
        for _ in 0..2 {
            rig.gates.begin();
            rig.gates.begin();
            assert!(none(&rig), "nothing was launched");
            let (came, slots) = rig.pass(&numbers, |_, gate, _| panic!("gate {gate} asks"));
            assert_eq!((came, slots), (vec![At::Passed; 2], vec![vec![3], vec![4]]));
            rig.stream.launch(&rig.graph).unwrap();
            assert_eq!(rig.slots(), [[0], [0]]);
            assert_eq!(
                (0..2).map(|gate| reach(&rig.gates, gate).0).collect::<Vec<_>>(),
                [At::GaveUp; 2]
            );
        }
    });
}

#[test]
fn gates_on_two_streams_wait_beside_each_other() {
    everywhere_alone(|device| {
        let mut rigs = [(); 2].map(|()| Rig::new(device, &[1], &[1], LONG));
        for round in 0..20 {
            for rig in &mut rigs {
                rig.gates.give(0, &[0]);
                rig.gates.begin();
                rig.stream.launch(&rig.graph).unwrap();
            }
            // Both at once, and the one goes on while the other waits.
            rigs.iter().for_each(|rig| assert_eq!(reach(&rig.gates, 0).0, At::Asks));
            let [first, last] = if round % 2 == 0 { [0, 1] } else { [1, 0] };
            rigs[first].gates.answer(0, &[round], &[]);
            rigs[first].stream.synchronize().unwrap();
            assert_eq!(reach(&rigs[first].gates, 0).0, At::Passed);
            assert_eq!(reach(&rigs[last].gates, 0).0, At::Asks);
            rigs[last].gates.answer(0, &[-round], &[]);
            assert_eq!([rigs[first].slots(), rigs[last].slots()], [[[round]], [[-round]]]);
        }
    });
}

#[test]
fn copies_run_beside_a_gate_that_waits() {
    everywhere_alone(|device| {
        let mut rig = Rig::new(device, &[1], &[1], LONG);
        let copies = device.stream().unwrap();
        let block = device.allocate(MIB).unwrap();
        let mut pinned = device.pin(MIB as usize).unwrap();
        pinned.copy_from_slice(&pattern(1, MIB as usize));
        // Held until after the pass: the driver frees pinned memory when the device is idle.
        let pinned = pinned.share();
        let (_, slots) = rig.pass(&[vec![0]], |gates, _, _| {
            copies.upload(pinned.clone(), block.span(0, MIB).unwrap()).unwrap();
            copies.synchronize().unwrap();
            gates.answer(0, &[1], &[(0, 1)]);
        });
        assert_eq!(slots, [[1]]);
        assert!(read(device, block.span(0, MIB).unwrap()) == pattern(1, MIB as usize));
    });
}

#[test]
fn dropping_a_graph_waits_for_its_launch() {
    everywhere_alone(|device| {
        let Rig { mut gates, graph, stream, out, .. } = Rig::new(device, &[1], &[1], LONG);
        gates.give(0, &[0]);
        gates.begin();
        stream.launch(&graph).unwrap();
        assert_eq!(reach(&gates, 0).0, At::Asks);
        thread::scope(|scope| {
            let dropping = scope.spawn(move || drop(graph));
            gates.answer(0, &[258], &[]);
            dropping.join().unwrap();
        });
        assert_eq!(gates.poll(0, &mut Vec::new()), Some(At::Passed));
        assert_eq!(read(device, out.span(0, 4).unwrap()), [2, 1, 0, 0]);
    });
}

#[test]
fn graphs_keep_their_gates() {
    everywhere_alone(|device| {
        let Rig { mut gates, graph, stream, out, .. } = Rig::new(device, &[1], &[1], NEVER);
        gates.set_tables(&stream, &[258]).unwrap();
        stream.synchronize().unwrap();
        gates.give(0, &[0]);
        gates.begin();
        drop(gates);
        stream.launch(&graph).unwrap();
        stream.synchronize().unwrap();
        assert_eq!(read(device, out.span(0, 4).unwrap()), [2, 1, 0, 0]);
    });
}

#[test]
fn gates_that_cannot_be_meant_are_refused() {
    everywhere_alone(|device| {
        is_config(device.gates(&[]));
        is_config(device.gates(&[u32::MAX, 1]));
        let mut gates = device.gates(&[2, 3]).unwrap();
        let stream = device.stream().unwrap();
        assert_eq!(gates.len(), 2);
        is_config(gates.set_tables(&stream, &[0; 4]));
        let given = gates.given(0);
        // SAFETY: refused.
        unsafe {
            is_config(gates.put(&stream, 0, given, GATE_WIDTH + 1, LONG));
            is_config(gates.put(&stream, 0, given + 2, 1, LONG));
        }
    });
}

/// The bytes of slots in device memory, without a copy of the graph's own.
#[test]
fn slots_lie_where_they_are_said_to() {
    everywhere_alone(|device| {
        let mut rig = Rig::new(device, &[1, 1], &[1, 1], NEVER);
        rig.gates.set_tables(&rig.stream, &[3, 4]).unwrap();
        rig.pass(&[vec![0], vec![0]], |_, gate, _| panic!("gate {gate} asks"));
        let slots = |gate: usize| -> Span {
            // SAFETY: of gates that live until the span is read.
            unsafe { device.borrow(rig.gates.slots(gate), 256) }.span(0, 4).unwrap()
        };
        assert_eq!([read(device, slots(0)), read(device, slots(1))], [[3, 0, 0, 0], [4, 0, 0, 0]]);
    });
}

/// Random numbers over tables that each answer changes, against a model of them.
#[test]
fn random_passes_do_what_a_model_says() {
    everywhere_alone(|device| {
        for seed in 0..8 {
            let mut passes = Passes::new(device, seed, LONG);
            (0..50).for_each(|_| passes.pass(|_| ()));
            assert_eq!(passes.given_up, 0);
        }
    });
}

/// The same with a host that is too late now and then.
#[test]
fn random_passes_that_are_given_up_do_no_harm() {
    everywhere_alone(|device| {
        let mut given_up = 0;
        for seed in 100..104 {
            let mut passes = Passes::new(device, seed, Duration::from_micros(200));
            for _ in 0..50 {
                passes.pass(|random| {
                    if random.below(4) == 0 {
                        thread::sleep(Duration::from_millis(1));
                    }
                });
            }
            given_up += passes.given_up;
        }
        assert!(given_up > 0);
    });
}

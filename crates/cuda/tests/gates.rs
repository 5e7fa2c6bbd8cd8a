//! Captures and gates on the stand-in: what goes wrong when it is told to, and what others compute in
//! a capture.

mod support;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use support::gates::{LONG, NEVER, Passes, Random, Rig, reach};
use support::{Counted, read, write};
use tierstream_cuda::standin::{Config, Fault, StandIn};
use tierstream_cuda::{At, Device, Error};

fn standin() -> (StandIn, Device) {
    let standin = StandIn::new(Config::default()).unwrap();
    let device = standin.device();
    (standin, device)
}

fn is_driver<T>(result: Result<T, Error>) -> bool {
    matches!(result, Err(Error::Driver { .. }))
}

fn is_lost<T>(result: Result<T, Error>) -> bool {
    matches!(result, Err(Error::Lost { .. }))
}

#[test]
fn captures_and_launches_are_refused_when_told_to() {
    let (standin, device) = standin();
    let mut rig = Rig::new(&device, &[1], &[1], NEVER);
    rig.gates.set_tables(&rig.stream, &[4]).unwrap();
    standin.inject(Fault::CaptureRefused, 0);
    let never = || -> Result<(), Error> { panic!("nothing is captured") };
    assert!(is_driver(rig.stream.capture(never)));
    drop(rig.stream.record().unwrap());
    rig.graph = rig.capture(NEVER, |_| {});

    standin.inject(Fault::LaunchRefused, 1);
    rig.pass(&[vec![0]], |_, _, _| ());
    rig.gates.begin();
    assert!(is_driver(rig.stream.launch(&rig.graph)));
    rig.stream.synchronize().unwrap();
    assert_eq!(rig.gates.poll(0, &mut Vec::new()), None);
    let (came, slots) = rig.pass(&[vec![0]], |_, _, _| ());
    assert_eq!((came, slots), (vec![At::Passed], vec![vec![4]]));
}

#[test]
fn without_memory_there_are_no_gates_and_nothing_is_kept() {
    let (standin, device) = standin();
    let (free, pinned) = (device.memory().unwrap().free_bytes, standin.pinned_bytes());
    for fault in [Fault::OutOfMemory, Fault::PinRefused] {
        standin.inject(fault, 0);
        assert!(matches!(device.gates(&[1, 2]), Err(Error::OutOfMemory { .. })));
        assert_eq!((device.memory().unwrap().free_bytes, standin.pinned_bytes()), (free, pinned));
    }
    let rig = Rig::new(&device, &[1], &[1], NEVER);
    assert!(device.memory().unwrap().free_bytes < free && standin.pinned_bytes() > pinned);
    drop(rig);
    assert_eq!((device.memory().unwrap().free_bytes, standin.pinned_bytes()), (free, pinned));
}

#[test]
fn a_gate_is_reached_late() {
    let (standin, device) = standin();
    let mut rig = Rig::new(&device, &[1], &[1], LONG);
    rig.gates.give(0, &[0]);
    let held = standin.hold(&rig.stream);
    rig.gates.begin();
    rig.stream.launch(&rig.graph).unwrap();
    let mut numbers = vec![77];
    assert_eq!(rig.gates.poll(0, &mut numbers), None);
    // Not asked, so not answered.
    rig.gates.answer(0, &[1], &[]);
    assert_eq!(numbers, [77]);
    drop(held);
    assert_eq!(reach(&rig.gates, 0), (At::Asks, vec![0]));
    let held = standin.hold(&rig.stream);
    rig.gates.answer(0, &[6], &[]);
    // Of a second answer nothing is taken.
    rig.gates.answer(0, &[7], &[]);
    assert_eq!(reach(&rig.gates, 0).0, At::Passed);
    drop(held);
    assert_eq!(rig.slots(), [[6]]);
}

#[test]
fn a_gate_without_its_numbers_loses_the_device() {
    let (_, device) = standin();
    let (gates, stream) = (device.gates(&[1]).unwrap(), device.stream().unwrap());
    let region = device.reserve(1 << 21, 1 << 21).unwrap();
    // SAFETY: the stand-in looks first whether there is memory.
    unsafe { gates.put(&stream, 0, region.address(), 1, NEVER) }.unwrap();
    assert!(is_lost(stream.synchronize()));
    assert!(is_lost(device.gates(&[1])));
    assert!(is_lost(stream.capture::<Error>(|| Ok(()))));
}

#[test]
fn a_gate_of_a_lost_device_waits_no_longer() {
    let (standin, device) = standin();
    let mut rig = Rig::new(&device, &[1], &[1], Duration::MAX);
    let (block, other) = (device.allocate(4).unwrap(), device.stream().unwrap());
    rig.gates.give(0, &[0]);
    rig.gates.begin();
    rig.stream.launch(&rig.graph).unwrap();
    assert_eq!(reach(&rig.gates, 0).0, At::Asks);
    standin.inject(Fault::CopyLost, 0);
    other.upload(vec![0; 4], block.span(0, 4).unwrap()).unwrap();
    assert!(is_lost(other.synchronize()));
    assert!(is_lost(rig.stream.synchronize()));
    // Which would wait for ever.
    drop(rig);
}

#[test]
fn a_graph_that_a_lost_device_may_run_frees_nothing() {
    let (standin, device) = standin();
    let stream = device.stream().unwrap();
    let block = device.allocate(4).unwrap();
    let drops = Arc::new(AtomicUsize::new(0));
    let graph = || {
        let bytes = Counted::new(vec![1; 4], &drops);
        stream.capture(|| stream.upload(bytes, block.span(0, 4).unwrap())).unwrap()
    };
    let (launched, other) = (graph(), graph());
    standin.inject(Fault::CopyLost, 0);
    stream.launch(&launched).unwrap();
    assert!(is_lost(stream.synchronize()));
    assert!(is_lost(stream.launch(&other)));
    drop(launched);
    assert_eq!(drops.load(Ordering::SeqCst), 0);
    drop(other);
    assert_eq!(drops.load(Ordering::SeqCst), 1);
}

#[test]
fn nobody_outside_waits_for_what_is_captured() {
    let (_, device) = standin();
    let (a, b) = (device.stream().unwrap(), device.stream().unwrap());
    let [mark, other] = [(); 2].map(|()| device.mark().unwrap());
    let graph = a.capture::<Error>(|| {
        a.set(&mark)?;
        assert!(is_driver(mark.is_done()) && is_driver(mark.wait()));
        // Nor do two captures wait for each other.
        assert!(is_driver(b.capture::<Error>(|| b.wait_for_mark(&mark))));
        Ok(())
    });
    a.launch(&graph.unwrap()).unwrap();
    a.synchronize().unwrap();
    assert!(is_driver(mark.wait()) && is_driver(b.wait_for_mark(&mark)));
    a.set(&mark).unwrap();
    b.wait_for_mark(&mark).unwrap();
    mark.wait().unwrap();
    // What made a capture invalid, and is made good with the next.
    assert!(is_driver(a.capture::<Error>(|| a.wait_for_mark(&other).or(Ok(())))));
    a.capture::<Error>(|| Ok(())).unwrap();
}

#[test]
fn a_foreign_stream_sets_marks_and_waits_for_them() {
    let (standin, device) = standin();
    let (foreign, stream) = (standin.foreign(), device.stream().unwrap());
    let [ours, theirs] = [(); 2].map(|()| device.mark().unwrap());
    let block = device.allocate(1).unwrap();
    foreign.set(theirs.raw());
    stream.wait_for_mark(&theirs).unwrap();
    stream.fill(block.span(0, 1).unwrap(), 5).unwrap();
    stream.set(&ours).unwrap();
    assert!(foreign.capture_of(ours.raw()).is_none());
    foreign.wait_for(ours.raw()).unwrap();
    assert!(ours.is_done().unwrap());
    assert_eq!(read(&device, block.span(0, 1).unwrap()), [5]);
    // One that is held is waited for.
    let held = standin.hold(&stream);
    stream.set(&ours).unwrap();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| foreign.wait_for(ours.raw()));
        drop(held);
        waiting.join().unwrap().unwrap();
    });
    assert!(ours.is_done().unwrap());
}

#[test]
fn foreign_calls_become_part_of_a_capture() {
    let (standin, device) = standin();
    let (foreign, stream) = (standin.foreign(), device.stream().unwrap());
    let [fork, joined] = [(); 2].map(|()| device.mark().unwrap());
    let block = device.allocate(1).unwrap();
    let cell = || block.span(0, 1).unwrap();
    let address = block.address();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let call = || -> Box<dyn Fn() + Send + Sync> {
        let seen = Arc::clone(&seen);
        Box::new(move || {
            let at = address as *mut u8;
            // SAFETY: memory of `block`, in turn with what the stream does.
            let value = unsafe { at.read() };
            seen.lock().unwrap().push(value);
            // SAFETY: as above.
            unsafe { at.write(value * 2) };
        })
    };
    write(&stream, cell(), vec![0]);
    let mut ended = None;
    let graph = stream.capture::<Error>(|| {
        stream.fill(cell(), 5)?;
        stream.set(&fork)?;
        let capture = foreign.capture_of(fork.raw()).unwrap();
        capture.call(call());
        capture.call(call());
        capture.set(joined.raw());
        assert!(capture.goes_on() && foreign.capture_of(joined.raw()).is_some());
        stream.wait_for_mark(&joined)?;
        ended = Some(capture);
        Ok(())
    });
    let (graph, ended) = (graph.unwrap(), ended.unwrap());
    assert!(!ended.goes_on() && foreign.capture_of(joined.raw()).is_none());
    ended.call(call());
    assert!(is_driver(foreign.wait_for(joined.raw())));
    stream.synchronize().unwrap();
    assert_eq!(*seen.lock().unwrap(), []);
    for _ in 0..2 {
        stream.launch(&graph).unwrap();
    }
    stream.synchronize().unwrap();
    assert_eq!(*seen.lock().unwrap(), [5, 10, 5, 10]);
    assert_eq!(read(&device, cell()), [20]);
    assert_eq!(Arc::strong_count(&seen), 3, "two calls, once each");
    drop(graph);
    assert_eq!(Arc::strong_count(&seen), 1);
    // A foreign stream that nobody waits for.
    let unjoined = stream.capture::<Error>(|| {
        stream.set(&fork)?;
        foreign.capture_of(fork.raw()).unwrap().call(call());
        Ok(())
    });
    assert!(is_driver(unjoined));
    assert_eq!(Arc::strong_count(&seen), 1);
}

/// Captures go on behind each other through streams that join.
#[test]
fn what_waits_for_the_captured_stream_s_followers_is_captured_too() {
    let (_, device) = standin();
    let [a, b, c] = [(); 3].map(|()| device.stream().unwrap());
    let [first, second, third] = [(); 3].map(|()| device.mark().unwrap());
    let block = device.allocate(3).unwrap();
    let cell = |i: u64| block.span(i, 1).unwrap();
    write(&a, block.span(0, 3).unwrap(), vec![0; 3]);
    let graph = a.capture::<Error>(|| {
        a.fill(cell(0), 1)?;
        a.set(&first)?;
        b.wait_for_mark(&first)?;
        b.copy_within(cell(0), cell(1))?;
        b.set(&second)?;
        c.wait_for_mark(&second)?;
        c.copy_within(cell(1), cell(2))?;
        c.set(&third)?;
        a.wait_for_mark(&third)
    });
    assert_eq!(read(&device, block.span(0, 3).unwrap()), [0; 3]);
    a.launch(&graph.unwrap()).unwrap();
    a.synchronize().unwrap();
    assert_eq!(read(&device, block.span(0, 3).unwrap()), [1; 3]);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Gates and tables of any shapes, and any answers, against a model.
    #[test]
    fn passes_do_what_a_model_says(seed in any::<u64>(), passes in 1..20) {
        let mut all = Passes::new(&standin().1, seed, LONG);
        (0..passes).for_each(|_| all.pass(|_| ()));
        prop_assert_eq!(all.given_up, 0);
    }
}

/// Gates on several streams, hosts that are late, streams that are held, and foreign calls between
/// gates which see the slots of those before.
#[test]
fn random_passes_go_right_whatever_is_late() {
    const THREADS: u64 = 3;
    let (standin, device) = standin();
    let foreign = standin.foreign();
    let end = Instant::now() + Duration::from_secs(3);
    let (asked, given_up) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let ended = AtomicBool::new(false);
    let setups = (0..THREADS).map(|seed| {
        let mut passes = Passes::new(&device, 1000 + seed, Duration::from_micros(500));
        let seen = Arc::new(Mutex::new(Vec::new()));
        for longest in [LONG, Duration::from_micros(500)] {
            let [fork, joined] = [(); 2].map(|()| device.mark().unwrap());
            let Passes { rig, .. } = &passes;
            let graph = rig.capture(longest, |gate| {
                rig.stream.set(&fork).unwrap();
                let capture = foreign.capture_of(fork.raw()).unwrap();
                let (seen, slots) = (Arc::clone(&seen), rig.gates.slots(gate));
                let random = Mutex::new(Random(gate as u64));
                capture.call(Box::new(move || {
                    // SAFETY: of gates that the graph keeps, in turn with them.
                    seen.lock().unwrap().push(unsafe { (slots as *const i32).read() });
                    nap(&mut random.lock().unwrap(), 50);
                }));
                capture.set(joined.raw());
                rig.stream.wait_for_mark(&joined).unwrap();
            });
            passes.other = std::mem::replace(&mut passes.rig.graph, graph);
        }
        (passes, seen)
    });
    let setups: Vec<_> = setups.collect();
    let streams: Vec<_> = setups.iter().map(|(passes, _)| Arc::clone(&passes.rig.stream)).collect();
    thread::scope(|scope| {
        let workers: Vec<_> = setups
            .into_iter()
            .map(|(mut passes, seen)| {
                let (asked, given_up) = (&asked, &given_up);
                scope.spawn(move || {
                    while Instant::now() < end {
                        passes.pass(|random| nap(random, 1000));
                        let slots = passes.rig.slots();
                        let seen = std::mem::take(&mut *seen.lock().unwrap());
                        assert_eq!(seen.len(), slots.len());
                        for (seen, slots) in seen.into_iter().zip(slots) {
                            assert!(slots.first().is_none_or(|slot| *slot == seen));
                        }
                    }
                    asked.fetch_add(passes.asked, Ordering::Relaxed);
                    given_up.fetch_add(passes.given_up, Ordering::Relaxed);
                })
            })
            .collect();
        scope.spawn(|| {
            let mut random = Random(7);
            while !ended.load(Ordering::Relaxed) {
                let held = standin.hold(&streams[random.below(streams.len())]);
                nap(&mut random, 300);
                drop(held);
                nap(&mut random, 1000);
            }
        });
        let results: Vec<_> = workers.into_iter().map(|worker| worker.join()).collect();
        ended.store(true, Ordering::Relaxed);
        results.into_iter().for_each(|result| result.unwrap());
    });
    println!("{asked:?} gates asked, {given_up:?} passes were given up");
    assert!(asked.into_inner() > 0 && given_up.into_inner() > 0);
}

/// Some time up to so many microseconds, or none at all.
fn nap(random: &mut Random, longest_us: usize) {
    match random.below(4) {
        0 => thread::sleep(Duration::from_micros(random.below(longest_us) as u64)),
        1 => thread::yield_now(),
        _ => (),
    }
}

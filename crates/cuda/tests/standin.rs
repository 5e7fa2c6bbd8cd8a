//! What can go wrong on a device, on the stand-in.

mod support;

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use support::{Counted, MIB, pattern, read, write};
use tierstream_cuda::standin::{Config, Fault, GARBAGE, StandIn};
use tierstream_cuda::{Device, Error};

const GRANULE: u64 = 64 << 10;

fn standin() -> (StandIn, Device) {
    let config = Config { memory_bytes: 16 * GRANULE, granularity: GRANULE };
    let standin = StandIn::new(config).unwrap();
    let device = standin.device();
    (standin, device)
}

#[test]
fn odd_granularities_are_refused() {
    for granularity in [0, 4095, 6144] {
        let config = Config { granularity, ..Config::default() };
        assert!(matches!(StandIn::new(config), Err(Error::Config(_))));
    }
}

#[test]
fn memory_is_counted() {
    let (standin, device) = standin();
    let free = || device.memory().unwrap().free_bytes;
    assert_eq!(free(), 16 * GRANULE);
    let block = device.allocate(GRANULE).unwrap();
    let region = device.reserve(1 << 40, 2 * GRANULE).unwrap();
    region.resize(3).unwrap();
    assert_eq!(free(), 9 * GRANULE);
    region.unmap(1).unwrap();
    assert_eq!(free(), 11 * GRANULE);
    let span = block.span(0, 1).unwrap();
    drop((region, block));
    assert_eq!(free(), 15 * GRANULE, "a span keeps its block");
    drop(span);
    assert_eq!(free(), 16 * GRANULE);
    let pinned = device.pin(100).unwrap();
    assert_eq!(standin.pinned_bytes(), 100);
    drop(pinned);
    assert_eq!(standin.pinned_bytes(), 0);
}

#[test]
fn new_memory_is_garbage() {
    let (_, device) = standin();
    let region = device.reserve(GRANULE, GRANULE).unwrap();
    region.map(0).unwrap();
    let all = || region.span(0, GRANULE).unwrap();
    write(&device.stream().unwrap(), all(), vec![1; GRANULE as usize]);
    region.unmap(0).unwrap();
    region.map(0).unwrap();
    assert!(read(&device, all()).iter().all(|b| *b == GARBAGE));
    let block = device.allocate(10).unwrap();
    assert_eq!(read(&device, block.span(0, 10).unwrap()), [GARBAGE; 10]);
}

/// How the host's memory at `address` may be used: `rw-p`.
fn access(address: u64) -> String {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let here = maps.lines().find(|line| {
        let (start, end) = line.split_whitespace().next().unwrap().split_once('-').unwrap();
        let number = |text| u64::from_str_radix(text, 16).unwrap();
        (number(start)..number(end)).contains(&address)
    });
    here.map_or_else(String::new, |line| line.split_whitespace().nth(1).unwrap().to_owned())
}

#[test]
fn code_that_reads_what_is_not_mapped_dies() {
    let (_, device) = standin();
    let region = device.reserve(3 * GRANULE, GRANULE).unwrap();
    region.resize(2).unwrap();
    region.unmap(0).unwrap();
    let of = |granule: u64| access(region.address() + granule * GRANULE);
    assert_eq!([of(0), of(1), of(2)], ["---p", "rw-p", "---p"]);
    region.map(0).unwrap();
    assert_eq!(of(0), "rw-p");
}

#[test]
fn memory_runs_out_when_told_to() {
    let (standin, device) = standin();
    let region = device.reserve(8 * GRANULE, GRANULE).unwrap();
    region.map(6).unwrap();
    for fault in [Fault::OutOfMemory, Fault::MapRefused] {
        for after in [0, 1, 3] {
            standin.inject(fault, after);
            let error = region.resize(4).unwrap_err();
            match fault {
                Fault::OutOfMemory => assert!(matches!(error, Error::OutOfMemory { .. })),
                _ => assert!(matches!(error, Error::Driver { .. })),
            }
            assert!(error.to_string().contains("65536 bytes"), "{error}");
            let mapped: Vec<_> = (0..8).filter(|i| region.is_mapped(*i)).collect();
            assert_eq!(mapped, [6]);
            assert_eq!(device.memory().unwrap().free_bytes, 15 * GRANULE);
        }
    }
    region.resize(4).unwrap();
    standin.inject(Fault::OutOfMemory, 0);
    assert!(matches!(device.allocate(1), Err(Error::OutOfMemory { .. })));
    device.allocate(1).unwrap();
}

#[test]
fn pinning_is_refused_when_told_to() {
    let (standin, device) = standin();
    standin.inject(Fault::PinRefused, 1);
    let first = device.pin(10).unwrap();
    assert!(matches!(device.pin(10), Err(Error::OutOfMemory { .. })));
    device.pin(10).unwrap();
    drop(first);
    assert_eq!(standin.pinned_bytes(), 0);
}

#[test]
fn a_refused_copy_changes_nothing_and_the_next_works() {
    let (standin, device) = standin();
    let stream = device.stream().unwrap();
    let block = device.allocate(4).unwrap();
    let span = || block.span(0, 4).unwrap();
    write(&stream, span(), vec![1; 4]);
    standin.inject(Fault::CopyRefused, 0);
    let drops = Arc::new(AtomicUsize::new(0));
    let error = stream.upload(Counted::new(vec![2; 4], &drops), span()).unwrap_err();
    assert!(matches!(error, Error::Driver { .. }));
    assert!(error.to_string().starts_with("cannot copy 4 bytes to the GPU: STANDIN_ERROR_"));
    assert_eq!((drops.load(Ordering::SeqCst), stream.pending()), (1, 0));
    assert_eq!(read(&device, span()), [1; 4]);
    write(&stream, span(), vec![3; 4]);
    assert_eq!(read(&device, span()), [3; 4]);
}

#[test]
fn a_lost_copy_loses_the_device_and_frees_nothing() {
    let (standin, device) = standin();
    let (stream, other) = (device.stream().unwrap(), device.stream().unwrap());
    let block = device.allocate(4).unwrap();
    let drops = Arc::new(AtomicUsize::new(0));
    let upload = || {
        let bytes = Counted::new(vec![0; 4], &drops);
        stream.upload(bytes, block.span(0, 4).unwrap())
    };
    standin.inject(Fault::CopyLost, 1);
    let held = standin.hold(&stream);
    upload().unwrap();
    let good = stream.record().unwrap();
    upload().unwrap();
    let bad = stream.record().unwrap();
    let later = other.record().unwrap();
    later.wait().unwrap();
    drop(held);
    let error = bad.wait().unwrap_err();
    assert!(matches!(error, Error::Lost { .. }), "{error}");
    assert!(error.to_string().contains("ILLEGAL_ADDRESS"), "{error}");
    let lost = |result: Result<(), Error>| assert!(matches!(result, Err(Error::Lost { .. })));
    lost(good.wait());
    lost(upload());
    lost(device.memory().map(drop));
    lost(device.stream().map(drop));
    lost(other.synchronize());
    later.wait().unwrap();
    drop((good, bad, stream, block));
    assert_eq!(drops.load(Ordering::SeqCst), 1, "only what was not queued is freed");
}

#[test]
fn those_who_wait_learn_that_the_device_is_lost() {
    let (standin, device) = standin();
    let (stream, other) = (device.stream().unwrap(), device.stream().unwrap());
    let block = device.allocate(4).unwrap();
    let held = standin.hold(&stream);
    standin.inject(Fault::CopyLost, 0);
    stream.upload(vec![0; 4], block.span(0, 4).unwrap()).unwrap();
    other.wait_for(&stream.record().unwrap()).unwrap();
    let back = other.download(block.span(0, 4).unwrap(), vec![0; 4]).unwrap();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| other.synchronize());
        drop(held);
        assert!(matches!(waiting.join().unwrap(), Err(Error::Lost { .. })));
    });
    assert!(matches!(back.wait(), Err(Error::Lost { .. })));
}

#[test]
fn a_late_event_is_seen_late() {
    let (standin, device) = standin();
    let stream = device.stream().unwrap();
    let block = device.allocate(4).unwrap();
    standin.inject(Fault::LateEvent { queries: 3 }, 1);
    let first = stream.record().unwrap();
    stream.upload(vec![1; 4], block.span(0, 4).unwrap()).unwrap();
    let late = stream.record().unwrap();
    let last = stream.record().unwrap();
    last.wait().unwrap();
    assert!(first.is_done().unwrap());
    let seen: Vec<_> = (0..5).map(|_| late.is_done().unwrap()).collect();
    assert_eq!(seen, [false, false, false, true, true]);
}

#[test]
fn a_held_stream_holds_those_who_wait_for_it_and_no_other() {
    let (standin, device) = standin();
    let [a, b, c] = std::array::from_fn(|_| device.stream().unwrap());
    let block = device.allocate(12).unwrap();
    let part = |i: u64| block.span(i * 4, 4).unwrap();
    write(&c, block.span(0, 12).unwrap(), vec![0; 12]);
    let held = standin.hold(&a);
    a.upload(vec![7; 4], part(0)).unwrap();
    let first = a.record().unwrap();
    b.wait_for(&first).unwrap();
    drop(first);
    b.copy_within(part(0), part(1)).unwrap();
    let copied = b.record().unwrap();
    c.copy_within(part(0), part(2)).unwrap();
    c.synchronize().unwrap();
    assert!(!copied.is_done().unwrap());
    assert_eq!(read(&device, block.span(0, 12).unwrap()), [0; 12]);
    drop(held);
    copied.wait().unwrap();
    let expected = [7, 7, 7, 7, 7, 7, 7, 7, 0, 0, 0, 0];
    assert_eq!(read(&device, block.span(0, 12).unwrap()), expected);
}

#[test]
fn waiting_for_an_event_that_has_come_costs_nothing() {
    let (_, device) = standin();
    let (a, b) = (device.stream().unwrap(), device.stream().unwrap());
    let event = a.record().unwrap();
    event.wait().unwrap();
    b.wait_for(&event).unwrap();
    b.synchronize().unwrap();
}

#[test]
fn large_copies_run_beside_the_program() {
    let config = Config { memory_bytes: 64 * MIB, ..Config::default() };
    let standin = StandIn::new(config).unwrap();
    let device = standin.device();
    let stream = device.stream().unwrap();
    let block = device.allocate(32 * MIB).unwrap();
    let held = standin.hold(&stream);
    let bytes = pattern(5, 32 << 20);
    stream.upload(bytes.clone(), block.span(0, 32 * MIB).unwrap()).unwrap();
    let back = stream.download(block.span(0, 32 * MIB).unwrap(), vec![0; 32 << 20]).unwrap();
    assert!(!back.is_done().unwrap());
    drop(held);
    assert!(back.wait().unwrap() == bytes);
}

//! One suite for every engine, under every wrapper, with several buffer sizes.

mod support;

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::fs::OFlags;
use support::{Collect, Fixture, Gate, Places, Random, skip, start};
use tierstream_io::wrap::{Action, Drive, Fault, Monitor, Rule, Throttle};
use tierstream_io::{
    Chunk, Config, EngineKind, Error, Extent, File, FileId, Place, Priority, Reader, Sink, Wrap,
};

/// Engines whose bytes are checked. `Noop` is exempt: it reads nothing.
const READING: [EngineKind; 3] = [EngineKind::Uring, EngineKind::Pread, EngineKind::Buffered];

type Wrapper = fn() -> Option<Wrap>;

fn wrappers() -> Vec<(&'static str, Wrapper)> {
    fn fault(rule: Rule) -> Option<Wrap> {
        Some(Box::new(move |inner| Box::new(Fault::new(inner, vec![rule]).unwrap())))
    }
    vec![
        ("bare", || None),
        ("monitor", || Some(Box::new(|inner| Box::new(Monitor::new(inner))))),
        ("throttle", || {
            let drive = Drive { bytes_per_s: 2e9, latency: Duration::from_micros(50) };
            Some(Box::new(move |inner| Box::new(Throttle::new(inner, drive).unwrap())))
        }),
        ("short reads", || fault(Rule::all(Action::Short(4096)))),
        ("late reads", || fault(Rule::all(Action::Delay(Duration::from_micros(100))).nth(0..20))),
    ]
}

/// Calls `test` for every engine that starts here, wrapper and buffer size.
fn everywhere(test: impl Fn(&Reader)) {
    for engine in READING {
        for (name, wrapper) in wrappers() {
            for (buffer_bytes, count, register_buffers) in
                [(4096, 1, false), (12288, 5, true), (1 << 16, 8, false), (1 << 20, 4, true)]
            {
                let config = Config {
                    engine,
                    ring_bytes: buffer_bytes * count,
                    buffer_bytes,
                    depth: 4,
                    register_buffers,
                    wrap: wrapper(),
                };
                let Some(reader) = start(config) else { continue };
                println!("{engine}, {name}, {count} x {buffer_bytes}");
                test(&reader);
                assert_eq!(reader.in_flight(), 0);
            }
        }
    }
}

/// A reader for tests of queues, where the mechanism does not matter.
fn small(buffers: usize, depth: usize, wrap: Option<Wrap>) -> Reader {
    let config = Config {
        engine: EngineKind::Pread,
        ring_bytes: buffers * 4096,
        buffer_bytes: 4096,
        depth,
        register_buffers: false,
        wrap,
    };
    Reader::new(config).unwrap()
}

fn extent(file: FileId, offset: u64, len: u64) -> Extent {
    Extent { file, offset, len }
}

/// Extents too far apart to share a read.
fn apart(file: FileId, count: u64) -> Vec<Extent> {
    (0..count).map(|n| extent(file, n * 65536, 100)).collect()
}

#[test]
fn content_at_the_edges() {
    let size = 1_000_003;
    let fixture = Fixture::new(size as usize);
    everywhere(|reader| {
        let file = reader.open(&fixture.path).unwrap();
        let e = |offset, len| extent(file, offset, len);
        fixture.check(reader, Priority::Demand, vec![]);
        fixture.check(reader, Priority::Demand, vec![e(0, 0), e(size, 0), e(77, 0)]);
        fixture.check(reader, Priority::Demand, vec![e(size - 1, 1)]);
        fixture.check(reader, Priority::Demand, vec![e(0, size)]);
        let head_and_tail = vec![e(1, 4096), e(4095, 2), e(511, 513), e(size - 5000, 5000)];
        fixture.check(reader, Priority::Prefetch, head_and_tail);
        let neighbours = vec![e(5000, 5000), e(0, 5000), e(10000, 1), e(10001, 20000), e(0, 100)];
        fixture.check(reader, Priority::Bulk, neighbours);
        fixture.check(reader, Priority::Bulk, vec![e(9, 9), e(9, 9), e(0, 300_000), e(9, 9000)]);
        let stats = reader.stats();
        assert!(stats.bytes_read > size && stats.bytes_wanted > size, "{stats:?}");
        assert_eq!((stats.errors, stats.in_flight), (0, 0));
    });
}

#[test]
fn files_smaller_than_a_block() {
    let dir = tempfile::tempdir().unwrap();
    everywhere(|reader| {
        for len in [0, 1, 511, 513] {
            let path = dir.path().join(len.to_string());
            std::fs::write(&path, vec![7; len]).unwrap();
            let file = reader.open(&path).unwrap();
            let mut bytes = vec![0; len];
            reader.read(extent(file, 0, len as u64), &mut bytes).unwrap();
            assert_eq!(bytes, vec![7; len]);
        }
    });
}

#[test]
fn random_extents_from_many_threads() {
    let fixture = Fixture::new(777_777);
    everywhere(|reader| {
        let file = reader.open(&fixture.path).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let fixture = &fixture;
                scope.spawn(move || {
                    let mut random = Random(thread + 1);
                    for round in 0..6 {
                        let extents = (0..random.below(8))
                            .map(|_| {
                                let offset = random.below(777_777);
                                let len = random.below(60_000).min(777_777 - offset);
                                extent(file, offset, len)
                            })
                            .collect();
                        let priorities = [Priority::Demand, Priority::Prefetch, Priority::Bulk];
                        fixture.check(reader, priorities[round % 3], extents);
                    }
                });
            }
        });
    });
}

#[test]
fn a_request_outlives_the_thread_that_made_it() {
    let fixture = Fixture::new(3 << 20);
    everywhere(|reader| {
        let file = reader.open(&fixture.path).unwrap();
        let whole = extent(file, 0, 3 << 20);
        let sink = Collect::new([whole.len]);
        let ticket = std::thread::scope(|scope| {
            let sink = sink.clone();
            scope.spawn(move || reader.submit(Priority::Bulk, vec![whole], sink)).join().unwrap()
        });
        ticket.wait().unwrap();
        assert!(ticket.is_finished());
        assert!(sink.take()[0].bytes == fixture.bytes);
    });
}

#[test]
fn truncation_while_open() {
    everywhere(|reader| {
        let fixture = Fixture::new(1 << 20);
        let file = reader.open(&fixture.path).unwrap();
        reader.file(file).unwrap().check_unchanged().unwrap();
        let handle = std::fs::OpenOptions::new().write(true).open(&fixture.path).unwrap();
        handle.set_len(300_000).unwrap();

        let extents = vec![extent(file, 1000, 99_000), extent(file, 500_000, 200_000)];
        let sink = Collect::new(extents.iter().map(|e| e.len));
        let error = reader.submit(Priority::Demand, extents, sink.clone()).wait().unwrap_err();
        assert!(matches!(error, Error::Truncated { .. }), "{error:?}");
        assert_eq!(error.path(), Some(fixture.path.as_path()));
        let pieces = sink.take();
        assert!(pieces[0].bytes == fixture.bytes[1000..100_000]);
        assert!(matches!(pieces[1].result, Some(Err(Error::Truncated { .. }))));

        let error = reader.read(extent(file, 299_990, 20), &mut [0; 20]).unwrap_err();
        assert!(
            matches!(error, Error::Truncated { offset: 299_990, wanted: 20, got: 10, .. }),
            "{error:?}"
        );
        let extents = vec![extent(file, 1000, 99_000), extent(file, 500_000, 200_000)];
        let sink = Places::new(&extents);
        let error = reader.submit(Priority::Demand, extents, sink.clone()).wait().unwrap_err();
        assert!(matches!(error, Error::Truncated { .. }), "{error:?}");
        assert!(sink.piece(0) == &fixture.bytes[1000..100_000]);
        assert!(matches!(sink.results()[1], Some(Err(Error::Truncated { .. }))));
        sink.check_guards();

        let changed = reader.file(file).unwrap().check_unchanged().unwrap_err();
        assert!(matches!(changed, Error::Changed { .. }), "{changed:?}");
    });
}

#[test]
fn bad_extents_fail_and_good_ones_beside_them_do_not() {
    let fixture = Fixture::new(100_000);
    everywhere(|reader| {
        let file = reader.open(&fixture.path).unwrap();
        let extents = vec![
            extent(file, 99_990, 11),
            extent(file, 40_000, 100),
            extent(file, u64::MAX, 2),
            extent(FileId(99), 0, 1),
            extent(file, u64::MAX, 0),
        ];
        let sink = Collect::new([0, 100, 0, 0, 0]);
        reader.submit(Priority::Demand, extents, sink.clone()).wait().unwrap_err();
        let pieces = sink.take();
        let error = |n: usize| pieces[n].result.clone().unwrap().unwrap_err();
        assert!(matches!(error(0), Error::Truncated { wanted: 11, got: 10, .. }));
        assert!(pieces[1].bytes == fixture.bytes[40_000..40_100]);
        assert!(matches!(error(2), Error::Overflow { .. }));
        assert!(matches!(error(3), Error::UnknownFile(FileId(99))));
        assert!(matches!(error(4), Error::Truncated { .. }));
    });
}

#[test]
fn memory_file_systems_are_read_through_the_cache_and_say_so() {
    let shm = Path::new("/dev/shm");
    if !shm.is_dir() {
        return skip("no /dev/shm");
    }
    let fixture = Fixture::within(shm, 100_003);
    everywhere(|reader| {
        let file = reader.open(&fixture.path).unwrap();
        let state = reader.file(file).unwrap().direct_state().clone();
        assert!(!state.direct && state.reason.is_some(), "{state:?}");
        let status = reader.status();
        assert!(!status.direct && status.reason.is_some(), "{status:?}");
        fixture.check(reader, Priority::Demand, vec![extent(file, 1, 100_002)]);
    });
}

#[test]
fn direct_files_say_so() {
    let fixture = Fixture::new(10_000);
    let state = File::open(&fixture.path).unwrap().direct_state().clone();
    println!("direct reads: {state:?}");
    // Which reason it is depends on the file system and the kernel.
    assert_ne!(state.direct, state.reason.is_some(), "{state:?}");
    if let Some(reason) = state.reason {
        skip(format_args!("no direct reads: {reason}"));
    }
    everywhere(|reader| {
        reader.open(&fixture.path).unwrap();
        let status = reader.status();
        assert_eq!(status.engine, status.requested.name());
        // Temporary files may lie in memory here; then there must be a reason.
        assert_ne!(status.direct, status.reason.is_some_and(|r| r.contains("page cache")));
    });
}

#[test]
fn reads_of_an_open_file_may_block() {
    let fixture = Fixture::new(10_000);
    for opened in [File::open(&fixture.path), File::open_buffered(&fixture.path, "as asked")] {
        let file = opened.unwrap();
        let flags = rustix::fs::fcntl_getfl(file.handle()).unwrap();
        assert!(!flags.contains(OFlags::NONBLOCK), "{flags:?}");
        assert_eq!(flags.contains(OFlags::DIRECT), file.direct_state().direct, "{flags:?}");
    }
}

#[test]
fn faults_fail_their_piece_only() {
    let fixture = Fixture::new(1 << 20);
    let cases = [
        (Action::Errno(5), std::io::Error::from_raw_os_error(5).kind()),
        (Action::Errno(11), std::io::ErrorKind::WouldBlock),
        (Action::WrongLength(usize::MAX / 2), std::io::ErrorKind::InvalidData),
    ];
    for engine in READING {
        for (action, expected) in cases {
            let path = fixture.path.clone();
            let rule = Rule::all(action).path(path).bytes(131_072..131_073);
            let other = Rule::all(Action::Errno(5)).path("elsewhere");
            let wrap: Wrap =
                Box::new(|inner| Box::new(Fault::new(inner, vec![other, rule]).unwrap()));
            let config = Config { engine, wrap: Some(wrap), ..Config::default() };
            let Some(reader) = start(config) else { continue };
            let file = reader.open(&fixture.path).unwrap();
            let extents = apart(file, 5);
            let sink = Collect::new(extents.iter().map(|e| e.len));
            let ticket = reader.submit(Priority::Demand, extents.clone(), sink.clone());
            let error = ticket.wait().unwrap_err();
            assert_eq!(io_error(&error).kind(), expected, "{action:?}: {error:?}");
            assert_eq!(error.path(), Some(fixture.path.as_path()));
            for (n, piece) in sink.take().into_iter().enumerate() {
                if n == 2 {
                    assert!(piece.result.unwrap().is_err());
                } else {
                    assert!(piece.bytes == fixture.slice(&extents[n]));
                }
            }
            assert!(reader.stats().errors > 0 || matches!(action, Action::WrongLength(_)));
        }
    }
}

fn io_error(error: &Error) -> &std::io::Error {
    match error {
        Error::Read { source, .. } => source,
        other => panic!("{other:?}"),
    }
}

#[test]
fn passing_errors_are_tried_again() {
    let fixture = Fixture::new(100_000);
    for errno in [4, 11] {
        let rule = Rule::all(Action::Errno(errno)).nth(0..9);
        let wrap: Wrap = Box::new(|inner| Box::new(Fault::new(inner, vec![rule]).unwrap()));
        let reader = small(2, 2, Some(wrap));
        let file = reader.open(&fixture.path).unwrap();
        fixture.check(&reader, Priority::Demand, vec![extent(file, 5, 50_000)]);
    }
}

#[test]
fn a_length_that_is_too_small_is_read_on() {
    let fixture = Fixture::new(100_000);
    let rule = Rule::all(Action::WrongLength(4096)).nth(0..3);
    let wrap: Wrap = Box::new(|inner| Box::new(Fault::new(inner, vec![rule]).unwrap()));
    let config = Config { engine: EngineKind::Pread, wrap: Some(wrap), ..Config::default() };
    let reader = Reader::new(config).unwrap();
    let file = reader.open(&fixture.path).unwrap();
    fixture.check(&reader, Priority::Demand, vec![extent(file, 0, 100_000)]);
}

#[test]
fn demand_overtakes_what_is_queued() {
    let fixture = Fixture::new(1 << 20);
    let (gate, wrap) = Gate::new();
    let reader = small(4, 1, wrap);
    let file = reader.open(&fixture.path).unwrap();
    let submit = |priority, offset, count: u64| {
        let extents: Vec<_> = (0..count).map(|n| extent(file, offset + n * 65536, 4096)).collect();
        let sink = Collect::new(extents.iter().map(|e| e.len));
        reader.submit(priority, extents, sink)
    };
    let bulk = submit(Priority::Bulk, 0, 3);
    assert_eq!(gate.wait_held(1), [0]);
    let later_bulk = submit(Priority::Bulk, 500 * 1024, 1);
    let prefetch = submit(Priority::Prefetch, 600 * 1024, 1);
    let demand = submit(Priority::Demand, 700 * 1024, 2);
    let mut order = Vec::new();
    for _ in 0..7 {
        order.extend(gate.wait_held(1));
        gate.release_one();
    }
    let k = 1024;
    assert_eq!(order, [0, 700 * k, 764 * k, 600 * k, 64 * k, 128 * k, 500 * k]);
    for ticket in [bulk, later_bulk, prefetch, demand] {
        ticket.wait().unwrap();
    }
    assert_eq!(reader.stats().in_flight_max, 1);
}

#[test]
fn a_raised_request_overtakes_what_is_queued() {
    let fixture = Fixture::new(1 << 20);
    let (gate, wrap) = Gate::new();
    let reader = small(4, 1, wrap);
    let file = reader.open(&fixture.path).unwrap();
    let submit = |priority, offset, count: u64| {
        let extents: Vec<_> = (0..count).map(|n| extent(file, offset + n * 65536, 4096)).collect();
        let sink = Collect::new(extents.iter().map(|e| e.len));
        reader.submit(priority, extents, sink)
    };
    let k = 1024;
    let begun = submit(Priority::Bulk, 0, 3);
    assert_eq!(gate.wait_held(1), [0]);
    let prefetch = submit(Priority::Prefetch, 600 * k, 1);
    let waits = submit(Priority::Bulk, 500 * k, 1);
    let demand = submit(Priority::Demand, 700 * k, 1);
    waits.raise(Priority::Prefetch);
    begun.raise(Priority::Demand);
    // Neither of these is a raise.
    begun.raise(Priority::Bulk);
    demand.raise(Priority::Demand);
    let mut order = Vec::new();
    for _ in 0..6 {
        order.extend(gate.wait_held(1));
        gate.release_one();
    }
    assert_eq!(order, [0, 700 * k, 64 * k, 128 * k, 600 * k, 500 * k]);
    for ticket in [begun, prefetch, waits, demand] {
        ticket.wait().unwrap();
        // What has ended cannot be raised, and comes to no harm.
        ticket.raise(Priority::Demand);
        ticket.wait().unwrap();
    }
}

#[test]
fn raised_requests_bring_their_bytes() {
    let fixture = Fixture::new(777_777);
    everywhere(|reader| {
        let file = reader.open(&fixture.path).unwrap();
        let extents: Vec<_> = (0..8).map(|n| extent(file, n * 90_001, 50_000)).collect();
        let requests = [Priority::Bulk, Priority::Prefetch, Priority::Bulk].map(|priority| {
            let sink = Collect::new(extents.iter().map(|e| e.len));
            (reader.submit(priority, extents.clone(), sink.clone()), sink)
        });
        for (ticket, sink) in requests.into_iter().rev() {
            ticket.raise(Priority::Demand);
            ticket.wait().unwrap();
            for (extent, piece) in extents.iter().zip(sink.take()) {
                assert!(piece.bytes == fixture.slice(extent), "{extent:?}");
            }
        }
    });
}

/// Keeps every chunk until told to let go.
#[derive(Default)]
struct Keep {
    chunks: Mutex<Vec<Chunk>>,
    changed: std::sync::Condvar,
}

impl Sink for Keep {
    fn chunk(&self, chunk: Chunk) {
        self.chunks.lock().unwrap().push(chunk);
        self.changed.notify_all();
    }
    fn done(&self, _: usize, result: Result<(), Error>) {
        result.unwrap();
    }
}

#[test]
fn held_chunks_do_not_lock_demand_out() {
    let fixture = Fixture::new(1 << 20);
    for engine in READING {
        let config = Config {
            engine,
            ring_bytes: 8 * 4096,
            buffer_bytes: 4096,
            depth: 8,
            ..Config::default()
        };
        let Some(reader) = start(config) else { continue };
        let file = reader.open(&fixture.path).unwrap();
        let sink = Arc::new(Keep::default());
        let ticket = reader.submit(Priority::Bulk, apart(file, 12), sink.clone());
        let mut held = sink.chunks.lock().unwrap();
        while held.len() < 6 {
            held = sink.changed.wait(held).unwrap();
        }
        assert_eq!(held.len(), 6);
        drop(held);
        assert!(!ticket.is_finished());
        fixture.check(&reader, Priority::Demand, vec![extent(file, 4097, 300_000)]);
        // The buffers that are kept for `Demand` are also there for what becomes it.
        let raised = reader.submit(Priority::Prefetch, apart(file, 3), Collect::new([100; 3]));
        raised.raise(Priority::Demand);
        raised.wait().unwrap();
        assert_eq!(sink.chunks.lock().unwrap().len(), 6);
        // One at a time, from a thread that is not the reader's.
        while !ticket.is_finished() {
            if let Some(chunk) = sink.chunks.lock().unwrap().pop() {
                assert_eq!(&*chunk, fixture.slice(&extent(file, chunk.piece as u64 * 65536, 100)));
            }
            std::thread::yield_now();
        }
        ticket.wait().unwrap();
        // What is still held outlives the reader.
        drop(reader);
        for chunk in sink.chunks.lock().unwrap().drain(..) {
            assert_eq!(&*chunk, fixture.slice(&extent(file, chunk.piece as u64 * 65536, 100)));
        }
    }
}

#[test]
fn cancelled_requests_end_before_the_drive_answers() {
    let fixture = Fixture::new(1 << 20);
    let (gate, wrap) = Gate::new();
    let reader = small(4, 1, wrap);
    let file = reader.open(&fixture.path).unwrap();
    let sink = Collect::new([100; 10]);
    let ticket = reader.submit(Priority::Bulk, apart(file, 10), sink.clone());
    let other = Collect::new([100; 3]);
    let untouched = reader.submit(Priority::Bulk, apart(file, 3), other.clone());
    assert_eq!(gate.wait_held(1), [0]);
    ticket.cancel();
    assert!(matches!(ticket.wait(), Err(Error::Cancelled)));
    let pieces = sink.take();
    assert!(pieces.iter().all(|p| matches!(p.result, Some(Err(Error::Cancelled)))));
    // From here on any call of the sink would panic: it has no pieces.
    gate.open();
    untouched.wait().unwrap();
    assert!(other.take().iter().all(|piece| matches!(piece.result, Some(Ok(())))));
    // One that was in flight and 3 of the other request.
    assert_eq!(reader.stats().reads, 4);
    ticket.cancel();
    assert!(matches!(ticket.wait(), Err(Error::Cancelled)));
}

/// Whoever waits for a request may use its places: no read into them is under way any more.
#[test]
fn cancelled_requests_wait_for_reads_into_their_places() {
    let fixture = Fixture::new(1 << 20);
    for engine in READING {
        let (gate, wrap) = Gate::new();
        let config = Config { engine, depth: 2, wrap, ..Config::default() };
        let Some(reader) = start(config) else { continue };
        let file = reader.open(&fixture.path).unwrap();
        let extents = apart(file, 10);
        let sink = Places::new(&extents);
        let ticket = reader.submit(Priority::Bulk, extents, sink.clone());
        gate.wait_held(2);
        ticket.cancel();
        // The pieces end at once, on the reader's thread, which this one follows.
        let other = reader.submit(Priority::Bulk, vec![extent(file, 0, 0)], Collect::new([0]));
        other.wait().unwrap();
        let cancelled = |r: &Option<Result<(), Error>>| matches!(r, Some(Err(Error::Cancelled)));
        assert!(sink.results().iter().all(cancelled));
        assert!(!ticket.is_finished());
        gate.release_one();
        gate.open();
        assert!(matches!(ticket.wait(), Err(Error::Cancelled)));
        assert_eq!(reader.stats().reads, 2, "the others were not begun");
        sink.check_guards();
        fixture.check(&reader, Priority::Demand, apart(file, 3));
    }
}

/// One read of a piece fails while others of it are under way.
#[test]
fn a_failed_piece_waits_for_reads_into_its_place() {
    let fixture = Fixture::new(1 << 20);
    for engine in READING {
        let (gate, wrap) = Gate::new();
        let gated = wrap.unwrap();
        let rule = Rule::all(Action::Errno(5)).bytes(0..1);
        let wrap: Wrap = Box::new(|inner| Box::new(Fault::new(gated(inner), vec![rule]).unwrap()));
        let config = Config {
            engine,
            buffer_bytes: 1 << 16,
            ring_bytes: 1 << 18,
            depth: 4,
            wrap: Some(wrap),
            ..Config::default()
        };
        let Some(reader) = start(config) else { continue };
        let file = reader.open(&fixture.path).unwrap();
        let whole = vec![extent(file, 0, 1 << 20)];
        let sink = Places::new(&whole);
        let ticket = reader.submit(Priority::Demand, whole, sink.clone());
        assert_eq!(gate.wait_held(4)[0], 0);
        gate.release_one();
        while sink.results()[0].is_none() {
            std::thread::yield_now();
        }
        assert!(matches!(sink.results()[0], Some(Err(Error::Read { .. }))));
        assert!(!ticket.is_finished());
        gate.open();
        assert!(matches!(ticket.wait(), Err(Error::Read { offset: 0, .. })));
        sink.check_guards();
    }
}

#[test]
fn a_dropped_ticket_does_not_cancel() {
    let fixture = Fixture::new(1 << 20);
    let (gate, wrap) = Gate::new();
    let reader = small(4, 1, wrap);
    let file = reader.open(&fixture.path).unwrap();
    let sink = Collect::new([100; 5]);
    drop(reader.submit(Priority::Demand, apart(file, 5), sink.clone()));
    gate.open();
    // Demand goes first and one read at a time: when this has arrived, the sink has been served.
    fixture.check(&reader, Priority::Bulk, apart(file, 1));
    assert!(sink.take().iter().all(|piece| matches!(piece.result, Some(Ok(())))));
}

#[test]
fn drop_with_reads_in_flight() {
    let fixture = Fixture::new(1 << 20);
    for engine in READING {
        let (gate, wrap) = Gate::new();
        let config = Config { engine, depth: 4, wrap, ..Config::default() };
        let Some(reader) = start(config) else { continue };
        let file = reader.open(&fixture.path).unwrap();
        let sink = Collect::new([100; 10]);
        let ticket = reader.submit(Priority::Demand, apart(file, 10), sink.clone());
        gate.wait_held(4);
        std::thread::scope(|scope| {
            scope.spawn(|| drop(reader));
            // Told before the drive answers, and the drop waits for the drive.
            assert!(matches!(ticket.wait(), Err(Error::Closed)));
            gate.open();
        });
        assert!(sink.take().iter().all(|p| matches!(p.result, Some(Err(Error::Closed)))));
        ticket.cancel();
    }
}

#[test]
fn drop_at_any_moment() {
    let fixture = Fixture::new(1 << 20);
    everywhere(|reader| {
        // A reader of its own, dropped while the drive works; `reader` only names the engine.
        let engine = reader.status().requested;
        let config =
            Config { engine, ring_bytes: 1 << 18, buffer_bytes: 1 << 14, ..Config::default() };
        let doomed = Reader::new(config).unwrap();
        let file = doomed.open(&fixture.path).unwrap();
        let sink = Collect::new([1 << 20]);
        let ticket = doomed.submit(Priority::Bulk, vec![extent(file, 0, 1 << 20)], sink);
        drop(doomed);
        assert!(matches!(ticket.wait(), Ok(()) | Err(Error::Closed)));
    });
}

/// Whichever of the two comes first, the request ends.
#[test]
fn cancel_and_drop_at_once() {
    let fixture = Fixture::new(4 << 20);
    for _ in 0..2000 {
        let config = Config {
            engine: EngineKind::Noop,
            ring_bytes: 2 * 4096,
            buffer_bytes: 4096,
            depth: 2,
            ..Config::default()
        };
        let reader = Reader::new(config).unwrap();
        let file = reader.open(&fixture.path).unwrap();
        let sink = Collect::new([100; 60]);
        let ticket = reader.submit(Priority::Bulk, apart(file, 60), sink.clone());
        std::thread::scope(|scope| {
            scope.spawn(|| ticket.cancel());
            drop(reader);
        });
        assert!(matches!(ticket.wait(), Ok(()) | Err(Error::Cancelled | Error::Closed)));
        assert!(sink.take().iter().all(|piece| piece.result.is_some()));
    }
}

/// Panics in `chunk` or `place` for one piece, counts the rest.
struct Moody {
    piece: usize,
    in_place: bool,
    ended: AtomicUsize,
}

impl Sink for Moody {
    fn chunk(&self, chunk: Chunk) {
        assert!(chunk.piece != self.piece, "not this one");
    }
    fn place(&self, piece: usize) -> Option<Place> {
        assert!(!(self.in_place && piece == self.piece), "not this one");
        None
    }
    fn done(&self, piece: usize, result: Result<(), Error>) {
        match result {
            Ok(()) => assert_ne!(piece, self.piece),
            Err(Error::SinkPanicked { message }) => {
                assert!(message.contains("not this one"));
                assert_eq!(piece, self.piece);
            }
            Err(other) => panic!("{other:?}"),
        }
        self.ended.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
fn a_panic_in_a_sink_fails_its_piece_only() {
    let fixture = Fixture::new(1 << 20);
    let reader = small(4, 2, None);
    let file = reader.open(&fixture.path).unwrap();
    for in_place in [false, true] {
        let sink = Arc::new(Moody { piece: 3, in_place, ended: AtomicUsize::new(0) });
        let ticket = reader.submit(Priority::Demand, apart(file, 6), sink.clone());
        let error = ticket.wait().unwrap_err();
        assert!(matches!(error, Error::SinkPanicked { .. }), "{error:?}");
        assert_eq!(sink.ended.load(Ordering::Relaxed), 6);
        fixture.check(&reader, Priority::Demand, apart(file, 6));
    }
}

/// Misuses the reader from its own thread, then drops the last handle to it there.
struct Reentrant(Mutex<Option<Arc<Reader>>>, Extent);

impl Sink for Reentrant {
    fn chunk(&self, _: Chunk) {
        let reader = self.0.lock().unwrap().take().unwrap();
        assert!(matches!(reader.read(self.1, &mut [0; 100]), Err(Error::InsideSink)));
        let ticket = reader.submit(Priority::Demand, vec![self.1], Collect::new([100]));
        assert!(matches!(ticket.wait(), Err(Error::InsideSink)));
    }
    fn done(&self, _: usize, result: Result<(), Error>) {
        result.unwrap();
    }
}

#[test]
fn a_sink_that_waits_for_its_reader_or_drops_it_does_not_hang() {
    let fixture = Fixture::new(1 << 20);
    for engine in READING {
        let Some(reader) = start(Config { engine, ..Config::default() }) else { continue };
        let reader = Arc::new(reader);
        let file = reader.open(&fixture.path).unwrap();
        let extent = apart(file, 1)[0];
        let sink = Arc::new(Reentrant(Mutex::new(None), extent));
        *sink.0.lock().unwrap() = Some(Arc::clone(&reader));
        let ticket = reader.submit(Priority::Demand, vec![extent], sink);
        drop(reader);
        ticket.wait().unwrap();
    }
}

#[test]
fn noop_completes_everything() {
    let fixture = Fixture::new(1 << 20);
    let config = Config { engine: EngineKind::Noop, ..Config::default() };
    let reader = Reader::new(config).unwrap();
    let file = reader.open(&fixture.path).unwrap();
    let sink = Collect::new([1 << 20, 5]);
    let extents = vec![extent(file, 0, 1 << 20), extent(file, 3, 5)];
    reader.submit(Priority::Bulk, extents, sink.clone()).wait().unwrap();
    assert!(sink.take().iter().all(|piece| piece.bytes.iter().all(|byte| *byte == 0)));
    assert_eq!(reader.stats().bytes_wanted, (1 << 20) + 5);
}

#[test]
fn bad_configurations_are_refused() {
    let base = || Config { engine: EngineKind::Pread, ..Config::default() };
    let bad = [
        Config { buffer_bytes: 0, ..base() },
        Config { buffer_bytes: 1000, ..base() },
        Config { buffer_bytes: 8192, ring_bytes: 4096, ..base() },
        Config { depth: 0, ..base() },
    ];
    for config in bad {
        assert!(matches!(Reader::new(config), Err(Error::Config(_))));
    }
    let reader = Reader::new(base()).unwrap();
    let extent = extent(FileId(0), 0, 3);
    assert!(matches!(reader.read(extent, &mut [0; 4]), Err(Error::Config(_))));
    assert!(matches!(reader.read(extent, &mut [0; 3]), Err(Error::UnknownFile(_))));
}

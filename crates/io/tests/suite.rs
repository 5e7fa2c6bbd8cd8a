//! One suite for every engine, under every wrapper, with several buffer sizes.

mod support;

use std::path::Path;
use std::time::Duration;

use rustix::fs::OFlags;
use support::{Collect, Fixture, Places, READING, Random, extent, skip, start};
use tierstream_io::wrap::{Action, Drive, Fault, Monitor, Rule, Throttle};
use tierstream_io::{Config, EngineKind, Error, File, FileId, Priority, Reader, Wrap};

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
                    use_cache: true,
                    wrap: wrapper(),
                    ..Config::default()
                };
                let Some(reader) = start(config) else { continue };
                println!("{engine}, {name}, {count} x {buffer_bytes}");
                test(&reader);
                assert_eq!(reader.in_flight(), 0);
            }
        }
    }
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

/// Files of a device that is named are read through the page cache, and leave it as it was.
#[test]
#[cfg(target_os = "linux")]
fn what_is_read_through_the_page_cache_is_dropped_from_it() {
    use std::os::unix::fs::MetadataExt;

    use tierstream_io::cache::{cached_bytes, cached_in, evict};

    let fixture = Fixture::new(3 << 20);
    let file = std::fs::File::open(&fixture.path).unwrap();
    evict(&file).unwrap();
    let keeps = cached_bytes(&file).unwrap() > 0;
    if keeps {
        skip("the page cache keeps temporary files (tmpfs)");
    }
    let device = file.metadata().unwrap().dev();
    for engine in READING {
        let dropping = [(device, "it is faster".to_owned())].into();
        let Some(reader) = start(Config { engine, dropping, ..Config::default() }) else {
            continue;
        };
        let id = reader.open(&fixture.path).unwrap();
        let why = reader.status().reason.unwrap();
        assert!(!reader.status().direct && why.ends_with("page cache: it is faster"), "{why}");
        // Neighbours, the middle of pages, the end of the file.
        let extents = [(0, 10_000), (10_000, 1_500_000), (2_000_100, 5), (3 << 20, 0)];
        let extents = extents.map(|(offset, len)| extent(id, offset, len));
        let last = extent(id, (3 << 20) - 70_001, 70_001);
        let extents: Vec<_> = extents.into_iter().chain([last]).collect();
        let sink = Collect::new(extents.iter().map(|e| e.len));
        reader.submit(Priority::Demand, extents.clone(), sink.clone()).wait().unwrap();
        for (extent, piece) in extents.iter().zip(sink.take()) {
            assert!(piece.bytes == fixture.slice(extent), "{extent:?}");
        }
        if !keeps {
            // No more than the pages that pieces end in, and one or two that the kernel was busy with.
            assert!(cached_bytes(&file).unwrap() <= 5 * 4096, "{engine}");
            assert!(cached_in(&file, 4096, 1 << 20).unwrap() <= 2 * 4096, "{engine}");
        }
    }
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

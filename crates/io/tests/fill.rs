//! Memory of its own that is filled: what it holds, when it is handed out, and when it is not.

mod support;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use support::{Fixture, Gate, READING, Random, extent, small, start};
use tierstream_io::engine::{RawDone, RawRead};
use tierstream_io::wrap::{Action, Fault, Rule};
use tierstream_io::{
    Config, Engine, Error, FileId, Fill, PAGE, Pages, Placed, Priority, Reader, Told, Wrap,
};

fn placed(file: FileId, offset: u64, len: u64, at: usize) -> Placed {
    Placed { extent: extent(file, offset, len), at }
}

fn nobody() -> Told {
    Box::new(|_, _| {})
}

/// Counts reads by where they go: to a buffer of the ring, or to their place.
struct Count {
    inner: Box<dyn Engine>,
    counts: Arc<[AtomicUsize; 2]>,
}

impl Engine for Count {
    fn name(&self) -> &'static str {
        self.inner.name()
    }
    fn depth(&self) -> usize {
        self.inner.depth()
    }
    fn direct(&self) -> bool {
        self.inner.direct()
    }
    fn submit(&self, reads: &mut dyn Iterator<Item = RawRead>) {
        self.inner.submit(&mut reads.inspect(|read| {
            self.counts[usize::from(read.buffer().is_none())].fetch_add(1, Ordering::Relaxed);
        }));
    }
    fn wait(&self, done: &mut Vec<RawDone>) {
        self.inner.wait(done);
    }
    fn wake(&self) {
        self.inner.wake();
    }
}

/// Calls `test` for every engine that starts here, with counters of its reads.
fn everywhere(test: impl Fn(&Reader, &[AtomicUsize; 2])) {
    for engine in READING {
        for buffer_bytes in [PAGE, 1 << 18] {
            let counts = Arc::new([AtomicUsize::new(0), AtomicUsize::new(0)]);
            let seen = Arc::clone(&counts);
            let wrap: Wrap = Box::new(|inner| Box::new(Count { inner, counts: seen }));
            let config = Config {
                engine,
                buffer_bytes,
                ring_bytes: 4 * buffer_bytes,
                wrap: Some(wrap),
                ..Config::default()
            };
            let Some(reader) = start(config) else { continue };
            println!("{engine}, buffers of {buffer_bytes}");
            test(&reader, &counts);
        }
    }
}

#[test]
fn bytes_land_in_phase_without_a_copy() {
    let fixture = Fixture::new(1_000_003);
    everywhere(|reader, counts| {
        let file = reader.open(&fixture.path).unwrap();
        // The file's odd tail, something before it, and nothing.
        let pieces = vec![
            placed(file, 700_000, 300_003, 98 * PAGE + 700_000 % PAGE),
            placed(file, 5000, 100_000, PAGE + 5000 % PAGE),
            placed(file, 0, 0, 3),
        ];
        let results = Arc::new(Mutex::new(vec![0; pieces.len()]));
        let seen = Arc::clone(&results);
        let told: Told = Box::new(move |piece, result| {
            result.as_ref().unwrap();
            seen.lock().unwrap()[piece] += 1;
        });
        let pages = Pages::new(800_000).unwrap();
        let base = pages.as_ptr();
        let fill = reader.fill(Priority::Bulk, pages, pieces.clone(), told).unwrap();
        let pages = fill.wait().unwrap();
        assert_eq!(pages.as_ptr(), base);
        assert_eq!(*results.lock().unwrap(), [1, 1, 1]);
        for piece in &pieces {
            let bytes = &pages[piece.at..][..piece.extent.len as usize];
            assert!(bytes == fixture.slice(&piece.extent), "{piece:?}");
        }
        // Far from them nothing is written.
        assert!(pages[120_000..399_000].iter().all(|byte| *byte == 0));
        assert!(pages[720_000..].iter().all(|byte| *byte == 0));
        assert_eq!(counts[0].load(Ordering::Relaxed), 0);
        assert!(counts[1].load(Ordering::Relaxed) > 1);
    });
}

#[test]
fn bytes_out_of_phase_or_without_room_are_copied() {
    let fixture = Fixture::new(500_000);
    everywhere(|reader, counts| {
        let file = reader.open(&fixture.path).unwrap();
        let mut random = Random(7);
        for _ in 0..20 {
            let mut pieces = Vec::new();
            let mut end = 0;
            for _ in 0..random.below(9) {
                let len = random.below(20_000);
                let at = end + random.below(3) as usize * 1000;
                pieces.push(placed(file, random.below(480_000), len, at));
                end = at + len as usize;
            }
            let mut pages = Pages::new(end).unwrap();
            pages.fill(0xEE);
            let fill = reader.fill(Priority::Demand, pages, pieces.clone(), nobody()).unwrap();
            let pages = fill.wait().unwrap();
            for piece in &pieces {
                let bytes = &pages[piece.at..][..piece.extent.len as usize];
                assert!(bytes == fixture.slice(&piece.extent), "{piece:?} of {pieces:?}");
            }
        }
        let direct = reader.file(file).unwrap().direct_state().direct;
        assert_eq!(direct, counts[0].load(Ordering::Relaxed) > 0);
    });
}

#[test]
fn pages_are_filled_again() {
    let fixture = Fixture::new(100_000);
    everywhere(|reader, _| {
        let file = reader.open(&fixture.path).unwrap();
        let mut pages = Pages::new(100_000).unwrap();
        for half in [0, 1] {
            let piece = placed(file, half * 50_000, 50_000, half as usize * 50_000);
            pages = reader
                .fill(Priority::Demand, pages, vec![piece], nobody())
                .unwrap()
                .wait()
                .unwrap();
        }
        assert!(pages[..100_000] == fixture.bytes);
    });
}

/// Large enough that a thread gets the memory ahead of the reads.
#[test]
fn a_large_fill_arrives_or_is_dropped() {
    let fixture = Fixture::new(40 << 20);
    everywhere(|reader, _| {
        let file = reader.open(&fixture.path).unwrap();
        let fill = || {
            let half = 20 << 20;
            // The second half in front of the first, and a page between them.
            let pieces =
                vec![placed(file, 0, half, half as usize + PAGE), placed(file, half, half, 0)];
            let pages = Pages::new((40 << 20) + PAGE).unwrap();
            reader.fill(Priority::Bulk, pages, pieces, nobody()).unwrap()
        };
        let pages = fill().wait().unwrap();
        let (second, first) = pages.split_at((20 << 20) + PAGE);
        assert!(second[..20 << 20] == fixture.bytes[20 << 20..]);
        assert!(first == &fixture.bytes[..20 << 20]);
        drop(fill());
        let fill = fill();
        fill.ticket().cancel();
        assert!(matches!(fill.wait(), Err(Error::Cancelled) | Ok(_)));
    });
}

#[test]
fn a_fault_keeps_the_pages() {
    let fixture = Fixture::new(1 << 20);
    for engine in READING {
        let rule = Rule::all(Action::Errno(5)).bytes(500_000..500_001);
        let wrap: Wrap = Box::new(|inner| Box::new(Fault::new(inner, vec![rule]).unwrap()));
        let config = Config { engine, wrap: Some(wrap), ..Config::default() };
        let Some(reader) = start(config) else { continue };
        let file = reader.open(&fixture.path).unwrap();
        let failed = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&failed);
        let told: Told = Box::new(move |piece, result| {
            if result.is_err() {
                seen.lock().unwrap().push(piece);
            }
        });
        let pieces = (0..4).map(|n| placed(file, n << 18, 1 << 18, (n as usize) << 18)).collect();
        let pages = Pages::new(1 << 20).unwrap();
        let error = reader.fill(Priority::Bulk, pages, pieces, told).unwrap().wait().unwrap_err();
        assert!(matches!(error, Error::Read { .. }), "{error:?}");
        assert_eq!(*failed.lock().unwrap(), [1]);
    }
}

fn gated(count: usize, path: &std::path::Path) -> (Arc<Gate>, Reader, Fill) {
    let (gate, wrap) = Gate::new();
    let reader = small(4, 4, wrap);
    let file = reader.open(path).unwrap();
    let pages = Pages::new(1 << 20).unwrap();
    let piece = placed(file, 0, 1 << 20, 0);
    let fill = reader.fill(Priority::Bulk, pages, vec![piece], nobody()).unwrap();
    gate.wait_held(count);
    (gate, reader, fill)
}

#[test]
fn a_cancelled_fill_waits_for_its_reads() {
    let fixture = Fixture::new(1 << 20);
    let (gate, reader, fill) = gated(3, &fixture.path);
    fill.ticket().cancel();
    assert!(!fill.ticket().is_finished());
    gate.open();
    assert!(matches!(fill.wait(), Err(Error::Cancelled)));
    assert_eq!(reader.in_flight(), 0);
}

/// Its memory is still there when the reads come to it.
#[test]
fn a_dropped_fill_is_cancelled_and_its_memory_outlives_its_reads() {
    let fixture = Fixture::new(1 << 20);
    let (gate, reader, fill) = gated(3, &fixture.path);
    drop(fill);
    gate.open();
    while reader.in_flight() > 0 {
        std::thread::yield_now();
    }
    // Far from all of it.
    assert!(reader.stats().bytes_read < 1 << 18, "{:?}", reader.stats());
}

#[test]
fn a_fill_outlives_its_reader() {
    let fixture = Fixture::new(1 << 20);
    let (gate, reader, fill) = gated(3, &fixture.path);
    std::thread::scope(|scope| {
        scope.spawn(move || drop(reader));
        gate.open();
        assert!(matches!(fill.wait(), Err(Error::Closed) | Ok(_)));
    });
}

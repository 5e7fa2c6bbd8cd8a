//! What fails, and what must not fail with it: reads that go wrong, sinks that misbehave.

mod support;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use support::{Collect, Fixture, Gate, Places, READING, apart, extent, small, start};
use tierstream_io::wrap::{Action, Fault, Rule};
use tierstream_io::{
    Chunk, Config, EngineKind, Error, Extent, Place, Priority, Reader, Sink, Wrap,
};

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
        let no_time = std::time::Duration::ZERO;
        assert!(matches!(ticket.wait_timeout(no_time), Err(Error::InsideSink)));
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

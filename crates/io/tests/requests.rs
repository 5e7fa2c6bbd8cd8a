//! Requests that wait and requests in flight: which goes first, and what cancels or ends them.

mod support;

use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use support::{Collect, Fixture, Gate, Places, READING, apart, extent, small, start};
use tierstream_io::{Chunk, Config, EngineKind, Error, Priority, Reader, Sink};

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

/// Keeps every chunk until told to let go.
#[derive(Default)]
struct Keep {
    chunks: Mutex<Vec<Chunk>>,
    changed: Condvar,
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
        assert!(!ticket.wait_timeout(Duration::from_millis(2)).unwrap());
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
        assert!(ticket.wait_timeout(Duration::ZERO).unwrap());
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

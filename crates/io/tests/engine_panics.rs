//! An engine that panics: nobody waits for ever, whichever thread the panic comes up on.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use support::{Collect, Fixture, Places, apart, start};
use tierstream_io::engine::{RawDone, RawRead};
use tierstream_io::{Config, Engine, EngineKind, Error, FileId, Priority, Reader, Ticket};

/// When to panic.
#[derive(Clone, Copy, PartialEq)]
enum When {
    /// Before any read of the batch is taken.
    CallerBefore,
    /// After the engine has taken one read for good: it is lost.
    CallerAfter,
    /// On the reader's own thread, which has arrived reads in its hands.
    Reaper,
    /// In `wait`, with arrived reads.
    Wait,
}

struct Panics {
    inner: Box<dyn Engine>,
    when: When,
    /// Calls to let pass: submits with reads, or waits that bring some.
    left: AtomicUsize,
}

impl Panics {
    fn is_due(&self) -> bool {
        let less = |left: usize| left.checked_sub(1);
        self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_err()
    }
}

impl Engine for Panics {
    fn name(&self) -> &'static str {
        self.inner.name()
    }
    fn depth(&self) -> usize {
        self.inner.depth()
    }
    fn submit(&self, reads: &mut dyn Iterator<Item = RawRead>) {
        let on_reaper = std::thread::current().name() == Some("io-reader");
        let mut reads = reads.peekable();
        let meant = match self.when {
            When::CallerBefore | When::CallerAfter => !on_reaper,
            When::Reaper => on_reaper,
            When::Wait => false,
        };
        if meant && reads.peek().is_some() && self.is_due() {
            if self.when == When::CallerAfter {
                std::mem::forget(reads.next());
            }
            panic!("on purpose");
        }
        self.inner.submit(&mut reads);
    }
    fn wait(&self, done: &mut Vec<RawDone>) {
        self.inner.wait(done);
        if self.when == When::Wait && !done.is_empty() && self.is_due() {
            panic!("on purpose");
        }
    }
    fn wake(&self) {
        self.inner.wake();
    }
}

/// 4 reads in flight; the engine panics once `left` calls have passed.
fn reader(engine: EngineKind, when: When, left: usize) -> Option<Reader> {
    let config = Config {
        engine,
        ring_bytes: 8 * 4096,
        buffer_bytes: 4096,
        depth: 4,
        wrap: Some(Box::new(move |inner| Box::new(Panics { inner, when, left: left.into() }))),
        ..Config::default()
    };
    start(config)
}

fn submit(reader: &Reader, file: FileId, count: u64) -> (Ticket, Arc<Collect>) {
    let sink = Collect::new((0..count).map(|_| 100));
    (reader.submit(Priority::Demand, apart(file, count), sink.clone()), sink)
}

fn check(engine: EngineKind, when: When, left: usize, count: u64) {
    let fixture = Fixture::new(2 << 20);
    let Some(reader) = reader(engine, when, left) else { return };
    let file = reader.open(&fixture.path).unwrap();
    // Several callers, of whom one at most sees the panic. One has places.
    let places = Places::new(&apart(file, count));
    let (sinks, in_place) = std::thread::scope(|scope| {
        let callers: Vec<_> =
            (0..3).map(|_| scope.spawn(|| submit(&reader, file, count))).collect();
        let in_place = reader.submit(Priority::Demand, apart(file, count), places.clone());
        let sinks: Vec<_> = callers.into_iter().map(|caller| caller.join().unwrap()).collect();
        (sinks, in_place)
    });
    let died = |ticket: &Ticket| match ticket.wait() {
        Ok(()) | Err(Error::Closed) => false,
        Err(Error::EnginePanicked { message }) => {
            assert_eq!(&*message, "on purpose");
            true
        }
        Err(other) => panic!("{other:?}"),
    };
    let mut failed = usize::from(died(&in_place));
    for (ticket, sink) in sinks {
        failed += usize::from(died(&ticket));
        // Every piece was ended once, and those that were delivered are whole.
        assert!(sink.take().iter().all(|piece| piece.result.is_some()));
    }
    assert!(places.results().iter().all(Option::is_some));
    assert!(failed > 0);
    let (ticket, _) = submit(&reader, file, 1);
    assert!(ticket.wait().is_err());
    ticket.cancel();
    drop(reader);
}

#[test]
fn in_submit_on_the_callers_thread() {
    for engine in [EngineKind::Uring, EngineKind::Pread, EngineKind::Noop] {
        // The first call: later ones may find that the reader's thread has submitted the reads.
        check(engine, When::CallerBefore, 0, 6);
        check(engine, When::CallerAfter, 0, 6);
    }
}

#[test]
fn in_submit_on_the_readers_thread() {
    for engine in [EngineKind::Uring, EngineKind::Pread, EngineKind::Noop] {
        for left in 0..6 {
            check(engine, When::Reaper, left, 30);
        }
    }
}

#[test]
fn in_wait() {
    for engine in [EngineKind::Uring, EngineKind::Pread, EngineKind::Noop] {
        check(engine, When::Wait, 0, 6);
        check(engine, When::Wait, 1, 30);
    }
}

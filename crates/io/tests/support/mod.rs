//! A sink that checks what it is given, and an engine that holds its reads until told.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, OnceLock};

use tierstream_io::engine::{RawDone, RawRead};
use tierstream_io::{Chunk, Engine, Error, Sink, Wrap};

/// Gathers pieces; panics on a byte that arrives twice and on any call after `done`.
#[derive(Debug, Default)]
pub struct Collect(Mutex<Vec<Piece>>);

#[derive(Debug, Default)]
pub struct Piece {
    pub bytes: Vec<u8>,
    seen: Vec<bool>,
    pub result: Option<Result<(), Error>>,
}

impl Collect {
    pub fn new(lens: impl IntoIterator<Item = u64>) -> Arc<Self> {
        let piece = |len| Piece { bytes: vec![0; len], seen: vec![false; len], result: None };
        Arc::new(Self(Mutex::new(lens.into_iter().map(|len| piece(len as usize)).collect())))
    }

    /// The pieces; those that succeeded must be whole.
    pub fn take(&self) -> Vec<Piece> {
        let pieces = std::mem::take(&mut *self.0.lock().unwrap());
        for (n, piece) in pieces.iter().enumerate() {
            if let Some(Ok(())) = piece.result {
                assert!(piece.seen.iter().all(|seen| *seen), "piece {n} has holes");
            }
        }
        pieces
    }
}

impl Sink for Collect {
    fn chunk(&self, chunk: Chunk) {
        let mut pieces = self.0.lock().unwrap();
        let piece = &mut pieces[chunk.piece];
        assert!(piece.result.is_none(), "chunk after done");
        let range = chunk.offset as usize..chunk.offset as usize + chunk.len();
        assert!(!chunk.is_empty());
        assert!(piece.seen[range.clone()].iter().all(|seen| !seen), "byte given twice");
        piece.seen[range.clone()].fill(true);
        piece.bytes[range].copy_from_slice(&chunk);
    }

    fn done(&self, piece: usize, result: Result<(), Error>) {
        let before = self.0.lock().unwrap()[piece].result.replace(result);
        assert!(before.is_none(), "done called twice");
    }
}

/// Holds submitted reads back until it is told to pass them on.
#[derive(Default)]
pub struct Gate {
    inner: OnceLock<Box<dyn Engine>>,
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Default)]
struct GateState {
    held: VecDeque<RawRead>,
    open: bool,
}

impl Gate {
    pub fn new() -> (Arc<Self>, Option<Wrap>) {
        let gate = Arc::new(Self::default());
        let inside = Arc::clone(&gate);
        let wrap: Wrap = Box::new(move |inner| {
            assert!(inside.inner.set(inner).is_ok());
            Box::new(Handle(inside))
        });
        (gate, Some(wrap))
    }

    fn inner(&self) -> &dyn Engine {
        &**self.inner.get().unwrap()
    }

    /// Waits until `count` reads are held; returns their offsets in order of submission.
    pub fn wait_held(&self, count: usize) -> Vec<u64> {
        let mut state = self.state.lock().unwrap();
        while state.held.len() < count {
            state = self.changed.wait(state).unwrap();
        }
        state.held.iter().map(RawRead::offset).collect()
    }

    pub fn release_one(&self) {
        let read = self.state.lock().unwrap().held.pop_front().expect("no read is held");
        self.inner().submit(&mut std::iter::once(read));
    }

    pub fn open(&self) {
        let held = {
            let mut state = self.state.lock().unwrap();
            state.open = true;
            std::mem::take(&mut state.held)
        };
        self.inner().submit(&mut held.into_iter());
    }
}

struct Handle(Arc<Gate>);

impl Engine for Handle {
    fn name(&self) -> &'static str {
        self.0.inner().name()
    }
    fn depth(&self) -> usize {
        self.0.inner().depth()
    }
    fn direct(&self) -> bool {
        self.0.inner().direct()
    }
    fn submit(&self, reads: &mut dyn Iterator<Item = RawRead>) {
        let mut state = self.0.state.lock().unwrap();
        if state.open {
            drop(state);
            return self.0.inner().submit(reads);
        }
        state.held.extend(reads);
        self.0.changed.notify_all();
        drop(state);
        self.0.inner().submit(&mut std::iter::empty());
    }
    fn wait(&self, done: &mut Vec<RawDone>) {
        self.0.inner().wait(done);
    }
    fn wake(&self) {
        self.0.inner().wake();
    }
}

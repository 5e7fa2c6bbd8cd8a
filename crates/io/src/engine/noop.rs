//! `noop`: completes every read at once and touches no byte. What it delivers is whatever the ring
//! holds, zeros at first.

use super::{Engine, EngineKind, Inbox, RawDone, RawRead};

/// The engine that reads nothing.
#[derive(Debug)]
pub struct Noop {
    depth: usize,
    inbox: Inbox,
}

impl Noop {
    /// Accepts `depth` reads in flight.
    pub fn new(depth: usize) -> Self {
        Self { depth, inbox: Inbox::default() }
    }
}

impl Engine for Noop {
    fn name(&self) -> &'static str {
        EngineKind::Noop.name()
    }

    fn depth(&self) -> usize {
        self.depth
    }

    fn submit(&self, reads: &mut dyn Iterator<Item = RawRead>) {
        let mut reads = reads.peekable();
        if reads.peek().is_some() {
            self.inbox.push(reads.map(|read| RawDone { result: Ok(read.len()), read }));
        }
    }

    fn wait(&self, done: &mut Vec<RawDone>) {
        self.inbox.wait(done);
    }

    fn wake(&self) {
        self.inbox.wake();
    }
}

//! `buffered`: positioned reads through the page cache, for files that are likely in it and file
//! systems where direct I/O is slower.

use super::pool::Pool;
use super::{Engine, EngineKind, RawDone, RawRead};
use crate::error::Result;

/// Positioned reads through the page cache.
#[derive(Debug)]
pub struct Buffered(Pool);

impl Buffered {
    /// Starts `depth` threads, at most 64: each reads one range at a time.
    ///
    /// # Errors
    /// [`Error::Engine`](crate::Error::Engine) when a thread cannot be started.
    pub fn new(depth: usize) -> Result<Self> {
        Pool::new(EngineKind::Buffered.name(), depth).map(Self)
    }
}

impl Engine for Buffered {
    fn name(&self) -> &'static str {
        EngineKind::Buffered.name()
    }

    fn depth(&self) -> usize {
        self.0.depth()
    }

    fn direct(&self) -> bool {
        false
    }

    fn submit(&self, reads: &mut dyn Iterator<Item = RawRead>) {
        self.0.submit(reads);
    }

    fn wait(&self, done: &mut Vec<RawDone>) {
        self.0.inbox().wait(done);
    }

    fn wake(&self) {
        self.0.inbox().wake();
    }
}

//! `pread`: positioned direct reads on a small thread pool, for kernels and sandboxes without
//! io_uring.

use super::pool::Pool;
use super::{Engine, EngineKind, RawDone, RawRead};
use crate::error::Result;

/// Positioned reads past the page cache.
#[derive(Debug)]
pub struct Pread(Pool);

impl Pread {
    /// Starts `depth` threads, at most 64: each reads one range at a time.
    ///
    /// # Errors
    /// [`Error::Engine`](crate::Error::Engine) when a thread cannot be started.
    pub fn new(depth: usize) -> Result<Self> {
        Pool::new(EngineKind::Pread.name(), depth).map(Self)
    }
}

impl Engine for Pread {
    fn name(&self) -> &'static str {
        EngineKind::Pread.name()
    }

    fn depth(&self) -> usize {
        self.0.depth()
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

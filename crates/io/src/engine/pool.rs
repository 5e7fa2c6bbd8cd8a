//! The thread pool under `pread` and `buffered`: one positioned read per thread at a time.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

use super::{Inbox, RawDone, RawRead};
use crate::error::{Error, Result};
use crate::sync::{lock, wait};

/// More threads than this cost more in scheduling than another read in flight brings.
const THREADS_MAX: usize = 64;

#[derive(Debug)]
pub(super) struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
    inbox: Inbox,
}

#[derive(Debug, Default)]
struct Queue {
    reads: VecDeque<RawRead>,
    stop: bool,
}

impl Pool {
    pub(super) fn new(engine: &'static str, depth: usize) -> Result<Self> {
        let mut pool = Self { shared: Arc::default(), threads: Vec::new() };
        for n in 0..depth.clamp(1, THREADS_MAX) {
            let shared = Arc::clone(&pool.shared);
            let thread = std::thread::Builder::new()
                .name(format!("io-{engine}-{n}"))
                .spawn(move || shared.work())
                .map_err(|source| Error::Engine { engine, source: Arc::new(source) })?;
            pool.threads.push(thread);
        }
        Ok(pool)
    }

    pub(super) fn depth(&self) -> usize {
        self.threads.len()
    }

    pub(super) fn submit(&self, reads: &mut dyn Iterator<Item = RawRead>) {
        let mut queue = lock(&self.shared.queue);
        for read in reads {
            queue.reads.push_back(read);
            self.shared.changed.notify_one();
        }
    }

    pub(super) fn inbox(&self) -> &Inbox {
        &self.shared.inbox
    }
}

impl Shared {
    fn next(&self) -> Option<RawRead> {
        let mut queue = lock(&self.queue);
        loop {
            if queue.stop {
                return None;
            }
            if let Some(read) = queue.reads.pop_front() {
                return Some(read);
            }
            queue = wait(&self.changed, queue);
        }
    }

    fn work(&self) {
        while let Some(mut read) = self.next() {
            let (file, offset) = (Arc::clone(read.file()), read.offset());
            let result = rustix::io::preadv(file.handle(), &mut read.targets(), offset);
            let result = result.map_err(io::Error::from);
            self.inbox.push([RawDone { read, result }]);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        lock(&self.shared.queue).stop = true;
        self.shared.changed.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

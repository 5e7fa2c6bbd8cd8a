//! The reader's thread: takes what arrives, keeps the drive busy, then feeds the sinks.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::queue::{Chore, Landed, Queue};
use crate::engine::{Engine, RawDone};
use crate::error::Error;
use crate::file::{File, FileId};
use crate::ring::Ring;
use crate::sync::lock;
use crate::wrap::Monitor;

/// What the reader, its thread and its tickets share.
pub(super) struct Shared {
    pub(super) engine: Monitor<Box<dyn Engine>>,
    pub(super) ring: Arc<Ring>,
    pub(super) files: RwLock<Vec<Arc<File>>>,
    pub(super) queue: Mutex<Queue>,
    pub(super) bytes_wanted: AtomicU64,
}

impl Shared {
    pub(super) fn file(&self, id: FileId) -> Option<Arc<File>> {
        let files = self.files.read().unwrap_or_else(PoisonError::into_inner);
        files.get(id.0 as usize).cloned()
    }

    /// Starts as many reads as buffers and depth allow.
    pub(super) fn pump(&self) {
        let mut batch = Vec::new();
        {
            let mut queue = lock(&self.queue);
            let files = self.files.read().unwrap_or_else(PoisonError::into_inner);
            while let Some(read) = queue.next(&self.ring, |job, read| {
                Arc::clone(&files[job.plan.reads()[read].file.0 as usize])
            }) {
                batch.push(read);
            }
        }
        // Also with none: the engine may hold reads that other threads have handed over.
        self.engine.submit(&mut batch.into_iter());
    }

    pub(super) fn add_chore(&self, chore: Chore) {
        lock(&self.queue).chores.push(chore);
        self.engine.wake();
    }

    /// The thread's life.
    pub(super) fn run(&self) {
        let mut done = Vec::new();
        let mut landed = Vec::new();
        let life = catch_unwind(AssertUnwindSafe(|| while self.turn(&mut done, &mut landed) {}));
        if life.is_err() {
            // An engine panicked. Fail what waits rather than let it wait for ever.
            self.close();
        }
    }

    /// Handles what has arrived; says whether there is more to come.
    fn turn(&self, done: &mut Vec<RawDone>, landed: &mut Vec<Landed>) -> bool {
        self.engine.wait(done);
        let chores = {
            let mut queue = lock(&self.queue);
            landed.extend(done.drain(..).filter_map(|read| queue.land(read)));
            std::mem::take(&mut queue.chores)
        };
        // First the drive, then the sinks: it must not idle while bytes are copied.
        self.pump();
        for chore in chores {
            self.run_chore(chore);
        }
        for read in landed.drain(..) {
            self.deliver(read);
            self.pump();
        }
        let queue = lock(&self.queue);
        !queue.closed || queue.in_flight() > 0
    }

    fn run_chore(&self, chore: Chore) {
        match chore {
            Chore::Settle(job, pieces) => {
                for (piece, result) in pieces {
                    job.settle(piece, result);
                }
            }
            Chore::Cancel(job) => {
                lock(&self.queue).remove(&job);
                job.settle_all(&Error::Cancelled);
            }
            Chore::Close => self.close(),
        }
    }

    /// Fails everything that waits, and lets nothing more in.
    fn close(&self) {
        let jobs = {
            let mut queue = lock(&self.queue);
            queue.closed = true;
            queue.drain()
        };
        for job in jobs {
            job.settle_all(&Error::Closed);
        }
    }

    fn deliver(&self, landed: Landed) {
        let Landed { job, read, file, buffer, result } = landed;
        let read = &job.plan.reads()[read];
        let got = match result {
            Ok(got) => got,
            Err(source) => {
                let error = Error::Read {
                    path: file.shared_path(),
                    offset: read.offset,
                    len: read.len as u64,
                    source: Arc::new(source),
                };
                for slice in job.plan.slices(read) {
                    job.settle(slice.piece, Err(error.clone()));
                }
                return;
            }
        };
        let buffer = Arc::new(buffer);
        for slice in job.plan.slices(read) {
            if slice.start + slice.len > got {
                let error = Error::Truncated {
                    path: file.shared_path(),
                    offset: read.offset + slice.start as u64,
                    wanted: slice.len as u64,
                    got: got.saturating_sub(slice.start) as u64,
                };
                job.settle(slice.piece, Err(error));
            } else {
                job.deliver(slice, &buffer, &self.bytes_wanted);
            }
        }
    }
}

//! The reader's thread: takes what arrives, keeps the drive busy, then feeds the sinks.

use std::any::Any;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};

use super::job::Job;
use super::queue::{Chore, Landed, Priority, Queue};
use crate::engine::{Engine, RawDone};
use crate::error::{Error, panic_message};
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
    /// Why the reader has died, if it has. Its thread then fails everything and ends.
    pub(super) death: OnceLock<Error>,
}

/// What the reader's thread has taken out of the queue. Each entry stays in its list until it is
/// dealt with, so that a panic loses none.
#[derive(Default)]
struct Hands {
    done: Vec<RawDone>,
    chores: VecDeque<Chore>,
    landed: VecDeque<Landed>,
}

impl Shared {
    pub(super) fn file(&self, id: FileId) -> Option<Arc<File>> {
        let files = self.files.read().unwrap_or_else(PoisonError::into_inner);
        files.get(id.0 as usize).cloned()
    }

    /// Starts as many reads as buffers and depth allow.
    ///
    /// A panic of the engine ends the reader, whichever thread it came up on: which reads it has
    /// taken is not known, so neither can their places in flight be used again, nor can anybody
    /// wait for them. The caller goes on; its ticket fails with everybody's.
    pub(super) fn pump(&self) {
        if self.death.get().is_some() {
            return;
        }
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.pump_or_panic())) {
            self.die(&*panic);
            self.wake();
        }
    }

    fn pump_or_panic(&self) {
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
        lock(&self.queue).chores.push_back(chore);
        self.wake();
    }

    /// Drops the reads of a request that has not ended; the reader's thread ends it.
    pub(super) fn cancel(&self, job: &Arc<Job>) {
        {
            let mut queue = lock(&self.queue);
            // Closing ends every request, and the reader's thread may be gone after it.
            if queue.closed {
                return;
            }
            // Under one lock: once its reads are dropped, only the chore leads to the job, and
            // closing must find it.
            job.cancel();
            queue.chores.push_back(Chore::Cancel(Arc::clone(job)));
        }
        self.wake();
    }

    /// Lets the reads of a request that wait with a lower priority wait with this one.
    pub(super) fn raise(&self, job: &Arc<Job>, to: Priority) {
        if lock(&self.queue).raise(job, to) {
            // There may be a buffer or a place in flight that only `Demand` may take.
            self.pump();
        }
    }

    /// Lets the reader's thread look around.
    pub(super) fn wake(&self) {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.engine.wake())) {
            self.die(&*panic);
        }
    }

    fn die(&self, panic: &(dyn Any + Send)) {
        let _ = self.death.set(Error::EnginePanicked { message: panic_message(panic) });
    }

    /// The thread's life.
    pub(super) fn run(&self) {
        let mut hands = Hands::default();
        let life = catch_unwind(AssertUnwindSafe(|| while self.turn(&mut hands) {}));
        if let Err(panic) = life {
            self.die(&*panic);
        }
        let Some(error) = self.death.get() else { return };
        // Fail what waits rather than let it wait for ever.
        let mut jobs = self.close();
        jobs.extend(hands.chores.iter().filter_map(Chore::job).cloned());
        jobs.extend(hands.landed.iter().map(|landed| Arc::clone(&landed.job)));
        for job in jobs {
            job.give_up(error);
        }
    }

    /// Handles what has arrived; says whether there is more to come.
    fn turn(&self, hands: &mut Hands) -> bool {
        self.engine.wait(&mut hands.done);
        {
            let mut queue = lock(&self.queue);
            hands.landed.extend(hands.done.drain(..).filter_map(|read| queue.land(read)));
            hands.chores.append(&mut queue.chores);
        }
        // First the drive, then the sinks: it must not idle while bytes are copied.
        self.pump();
        while let Some(chore) = hands.chores.front() {
            self.run_chore(chore);
            hands.chores.pop_front();
        }
        while let Some(read) = hands.landed.front() {
            self.deliver(read);
            if read.buffer.is_none() {
                read.job.end_in_place();
            }
            hands.landed.pop_front();
            self.pump();
        }
        if self.death.get().is_some() {
            return false;
        }
        let queue = lock(&self.queue);
        !queue.closed || queue.in_flight() > 0
    }

    fn run_chore(&self, chore: &Chore) {
        match chore {
            Chore::Settle(job, pieces) => {
                for (piece, result) in pieces {
                    job.settle(*piece, result.clone());
                }
            }
            Chore::Cancel(job) => {
                lock(&self.queue).remove(job);
                job.settle_all(&Error::Cancelled);
            }
            Chore::Close => {
                for job in self.close() {
                    job.settle_all(&Error::Closed);
                }
            }
        }
    }

    /// Lets nothing more in. Returns everything that waits or is in flight.
    fn close(&self) -> Vec<Arc<Job>> {
        let mut queue = lock(&self.queue);
        queue.closed = true;
        queue.drain()
    }

    fn deliver(&self, landed: &Landed) {
        let Landed { job, read, file, buffer, result } = landed;
        let read = &job.plan.reads()[*read];
        let got = match result {
            Ok(got) => *got,
            Err(source) => {
                let error = Error::Read {
                    path: file.shared_path(),
                    offset: read.offset,
                    len: read.len as u64,
                    source: Arc::clone(source),
                };
                for slice in job.plan.slices(read) {
                    job.settle(slice.piece, Err(error.clone()));
                }
                return;
            }
        };
        file.drop_behind(read.offset, got as u64);
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
                job.deliver(slice, buffer.as_ref(), &self.bytes_wanted);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::engine::Noop;
    use crate::error::Result;
    use crate::reader::Ticket;
    use crate::reader::job::tests::request;
    use crate::ring::PAGE;
    use crate::sink::{Chunk, Sink};

    /// Cancels its own request at one of its chunks, and counts how often each piece ends.
    struct Fickle {
        cancel_at: usize,
        chunks: AtomicUsize,
        ends: Vec<AtomicUsize>,
        ticket: OnceLock<Ticket>,
    }

    impl Sink for Fickle {
        fn chunk(&self, _: Chunk) {
            if self.chunks.fetch_add(1, Ordering::Relaxed) == self.cancel_at {
                self.ticket.get().unwrap().cancel();
            }
        }
        fn done(&self, piece: usize, _: Result<()>) {
            self.ends[piece].fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A reader of two reads in flight that has no thread.
    fn threadless(file: &Arc<File>) -> Arc<Shared> {
        Arc::new(Shared {
            engine: Monitor::new(Box::new(Noop::new(2))),
            ring: Ring::new(PAGE, 2).unwrap(),
            files: RwLock::new(vec![Arc::clone(file)]),
            queue: Mutex::new(Queue::new(2)),
            bytes_wanted: AtomicU64::new(0),
            death: OnceLock::new(),
        })
    }

    /// Queues a request of one read per piece.
    fn queue(shared: &Arc<Shared>, pieces: usize, cancel_at: usize) -> Arc<Fickle> {
        let sink = Arc::new(Fickle {
            cancel_at,
            chunks: AtomicUsize::new(0),
            ends: (0..pieces).map(|_| AtomicUsize::new(0)).collect(),
            ticket: OnceLock::new(),
        });
        let offsets: Vec<_> = (0..pieces).map(|piece| (piece * 16 * PAGE) as u64).collect();
        let job = request(&offsets, Arc::clone(&sink) as Arc<dyn Sink>);
        lock(&shared.queue).push(Priority::Bulk, Arc::clone(&job));
        let ticket = Ticket { job, shared: Arc::downgrade(shared) };
        assert!(sink.ticket.set(ticket).is_ok());
        sink
    }

    #[derive(Debug, Clone, Copy)]
    enum Step {
        /// Some thread starts what it can.
        Pump,
        /// The reader's thread looks around, if it still lives.
        Turn,
        Cancel,
        Drop,
    }

    const STEPS: [Step; 4] = [Step::Pump, Step::Turn, Step::Cancel, Step::Drop];

    /// A request that is cancelled, by its sink or by others, while the reader closes: whatever
    /// comes first, it has ended when the reader's thread has.
    #[test]
    fn a_request_ends_in_every_order_of_cancelling_and_closing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, [0]).unwrap();
        let file = Arc::new(File::open_buffered(&path, "nothing is read").unwrap());
        for (n, pieces, cancel_at) in (0..4usize.pow(5))
            .flat_map(|n| [2, 3].map(|pieces| (n, pieces)))
            .flat_map(|(n, pieces)| [0, 1, 9].map(|at| (n, pieces, at)))
        {
            let mut steps: Vec<_> = (0..5).map(|at| STEPS[n / 4usize.pow(at) % 4]).collect();
            steps.push(Step::Drop);
            let shared = threadless(&file);
            let sink = queue(&shared, pieces, cancel_at);
            let ticket = sink.ticket.get().unwrap();
            let mut hands = Hands::default();
            let mut lives = true;
            let mut turn = || {
                // Else it waits for what this thread has yet to do.
                shared.wake();
                lives = lives && shared.turn(&mut hands);
                lives
            };
            for step in &steps {
                match step {
                    Step::Pump => shared.pump(),
                    Step::Turn => _ = turn(),
                    Step::Cancel => ticket.cancel(),
                    Step::Drop => shared.add_chore(Chore::Close),
                }
            }
            while turn() {}
            let what = format!("{steps:?}, {pieces} pieces, cancelled at chunk {cancel_at}");
            assert!(ticket.is_finished(), "{what}");
            assert!(sink.ends.iter().all(|ends| ends.load(Ordering::Relaxed) == 1), "{what}");
        }
    }
}

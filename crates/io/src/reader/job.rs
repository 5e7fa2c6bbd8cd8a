//! One submitted request: its plan, its pieces, the sink that takes them, and its ticket.

use std::any::Any;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use super::queue::Priority;
use super::reaper::Shared;
use crate::engine::{RawRead, Segment};
use crate::error::{Error, Result, panic_message};
use crate::file::File;
use crate::plan::{Plan, Read, Slice};
use crate::ring::Buffer;
use crate::sink::{Chunk, Held, Place, Sink};
use crate::sync::{lock, wait, wait_timeout};

/// A request on its way. Dropping the ticket does not stop the request; [`Ticket::cancel`] does.
pub struct Ticket {
    pub(super) job: Arc<Job>,
    pub(super) shared: Weak<Shared>,
}

impl Ticket {
    /// Blocks until every piece is done, no call of the sink will follow and no read into its
    /// places is in flight (unless the engine has died, see [`Place::new`]).
    ///
    /// # Errors
    /// The first error of a piece; [`Error::InsideSink`] at once when called from a sink of the
    /// same reader while the request is unfinished.
    pub fn wait(&self) -> Result<()> {
        let mut progress = lock(&self.job.progress);
        if !progress.finished && std::thread::current().id() == self.job.reaper {
            return Err(Error::InsideSink);
        }
        while !progress.finished {
            progress = wait(&self.job.finished, progress);
        }
        progress.first_error.clone().map_or(Ok(()), Err)
    }

    /// The same for so long at most; says whether every piece is done.
    ///
    /// # Errors
    /// As [`Ticket::wait`].
    pub fn wait_timeout(&self, most: Duration) -> Result<bool> {
        let by = Instant::now() + most;
        let mut progress = lock(&self.job.progress);
        while !progress.finished {
            if std::thread::current().id() == self.job.reaper {
                return Err(Error::InsideSink);
            }
            let left = by.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            progress = wait_timeout(&self.job.finished, progress, left);
        }
        progress.first_error.clone().map_or(Ok(true), Err)
    }

    /// Whether every piece is done.
    pub fn is_finished(&self) -> bool {
        lock(&self.job.progress).finished
    }

    /// Drops the reads that are queued and discards those in flight when they arrive. Pieces that
    /// are not done end with [`Error::Cancelled`]. After [`Ticket::wait`] has returned, the sink
    /// is not called any more and no place is written to.
    pub fn cancel(&self) {
        // Without a reader, the request has ended.
        if let Some(shared) = self.shared.upgrade() {
            shared.cancel(&self.job);
        }
    }

    /// Lets the reads that are queued go with those of `priority`, behind the ones that wait there
    /// already: somebody now waits for what was to be read some time. Does nothing to a request
    /// that has this priority or a higher one, nor to reads in flight.
    pub fn raise(&self, priority: Priority) {
        if let Some(shared) = self.shared.upgrade() {
            shared.raise(&self.job, priority);
        }
    }
}

impl fmt::Debug for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ticket").field("finished", &self.is_finished()).finish_non_exhaustive()
    }
}

/// The state of a request. All that calls the sink is called by one thread at a time.
pub(super) struct Job {
    pub(super) plan: Plan,
    /// Of the pieces that are read in place.
    places: Vec<Option<Place>>,
    reaper: ThreadId,
    /// Set together with the chore that ends the request, see [`Shared::cancel`].
    cancelled: AtomicBool,
    /// Some piece has failed, so some reads may not be wanted any more.
    spoiled: AtomicBool,
    progress: Mutex<Progress>,
    finished: Condvar,
}

struct Progress {
    /// Bytes that each piece still misses; `None` once it is settled.
    missing: Vec<Option<u64>>,
    open: usize,
    /// Reads in flight into places.
    in_place: usize,
    finished: bool,
    first_error: Option<Error>,
    sink: Option<Arc<dyn Sink>>,
}

impl Job {
    /// `missing` holds the length of every piece in bytes, `places` those that are read in place.
    pub(super) fn new(
        plan: Plan,
        places: Vec<Option<Place>>,
        missing: impl Iterator<Item = u64>,
        sink: Arc<dyn Sink>,
        reaper: ThreadId,
    ) -> Self {
        let missing: Vec<_> = missing.map(Some).collect();
        let open = missing.len();
        let finished = open == 0;
        let sink = (!finished).then_some(sink);
        Self {
            plan,
            places,
            reaper,
            cancelled: AtomicBool::new(false),
            spoiled: AtomicBool::new(false),
            progress: Mutex::new(Progress {
                missing,
                open,
                in_place: 0,
                finished,
                first_error: None,
                sink,
            }),
            finished: Condvar::new(),
        }
    }

    /// Makes a read of the plan that goes to places, unless its pieces are settled. Whoever gets it
    /// calls [`Job::end_in_place`] when it is over.
    pub(super) fn start_in_place(&self, read: &Read, id: u64, file: Arc<File>) -> Option<RawRead> {
        let slices = self.plan.slices(read);
        let mut progress = lock(&self.progress);
        if slices.iter().all(|slice| progress.missing[slice.piece].is_none()) {
            return None;
        }
        let sink = progress.sink.as_ref()?;
        let mut segments = Vec::with_capacity(slices.len());
        for (index, slice) in slices.iter().enumerate() {
            let held = Held::new(self.places[slice.piece]?, Arc::clone(sink));
            let start = if index == 0 { 0 } else { slice.start };
            let end = slices.get(index + 1).map_or(read.len, |next| next.start);
            let skip = slice.piece_offset as isize - (slice.start - start) as isize;
            segments.push(Segment { held, skip, len: end - start });
        }
        progress.in_place += 1;
        // SAFETY: the blocks of each segment lie within its place and the room around it:
        // `Place::suits` has looked at both ends of the piece, and the planner at what lies between
        // two. The plan reads no block of a piece twice. The job, and so whoever waits for the
        // places, is not finished before the read is over.
        Some(unsafe { RawRead::to_places(id, file, read.offset, segments) })
    }

    /// A read into a place is over; what it brought has been delivered.
    pub(super) fn end_in_place(&self) {
        let mut progress = lock(&self.progress);
        progress.in_place -= 1;
        self.finish_if_over(progress);
    }

    /// From now on its reads are dropped, those that wait and those that arrive.
    pub(super) fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Whether nobody wants any more of it.
    pub(super) fn is_over(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
            || self.spoiled.load(Ordering::Relaxed) && lock(&self.progress).finished
    }

    /// Whether a piece that is not settled wants some of `read`.
    pub(super) fn wants(&self, read: &Read) -> bool {
        if !self.spoiled.load(Ordering::Relaxed) {
            return true;
        }
        let progress = lock(&self.progress);
        self.plan.slices(read).iter().any(|slice| progress.missing[slice.piece].is_some())
    }

    /// Gives the sink a slice of the read in `buffer`, unless it went to its place, and counts its
    /// bytes in `given`.
    pub(super) fn deliver(&self, slice: &Slice, buffer: Option<&Arc<Buffer>>, given: &AtomicU64) {
        if self.cancelled.load(Ordering::Relaxed) {
            return;
        }
        let Slice { piece, piece_offset: offset, start, len } = *slice;
        let sink = {
            let progress = lock(&self.progress);
            match (&progress.sink, progress.missing[piece]) {
                (Some(sink), Some(_)) => Arc::clone(sink),
                _ => return,
            }
        };
        if let Some(buffer) = buffer {
            let chunk = Chunk::new(piece, offset, Arc::clone(buffer), start, len);
            let took = catch_unwind(AssertUnwindSafe(|| sink.chunk(chunk)));
            if let Err(panic) = took {
                drop(sink);
                self.settle(piece, Err(sink_panicked(&*panic)));
                return;
            }
        }
        drop(sink);
        // Before the piece ends: whoever waits for it may look at the counters next.
        given.fetch_add(len as u64, Ordering::Relaxed);
        let left = {
            let mut progress = lock(&self.progress);
            progress.missing[piece].as_mut().map(|missing| {
                *missing = missing.saturating_sub(len as u64);
                *missing
            })
        };
        if left == Some(0) {
            self.settle(piece, Ok(()));
        }
    }

    /// Ends a piece, unless it has ended.
    pub(super) fn settle(&self, piece: usize, result: Result<()>) {
        let sink = {
            let mut progress = lock(&self.progress);
            if progress.missing[piece].take().is_none() {
                return;
            }
            if let Err(error) = &result {
                progress.first_error.get_or_insert_with(|| error.clone());
                self.spoiled.store(true, Ordering::Relaxed);
            }
            progress.sink.clone()
        };
        let told = catch_unwind(AssertUnwindSafe(|| {
            if let Some(sink) = sink {
                sink.done(piece, result);
            }
        }));
        let mut progress = lock(&self.progress);
        if let Err(panic) = told {
            progress.first_error.get_or_insert_with(|| sink_panicked(&*panic));
        }
        progress.open -= 1;
        self.finish_if_over(progress);
    }

    /// Ends the request after its last piece and its last read in place.
    fn finish_if_over(&self, mut progress: MutexGuard<'_, Progress>) {
        if progress.open > 0 || progress.in_place > 0 || progress.finished {
            return;
        }
        let sink = progress.sink.take();
        drop(progress);
        // Before anyone learns of the end: whoever waits may rely on the sink being gone.
        let dropped = catch_unwind(AssertUnwindSafe(|| drop(sink)));
        let mut progress = lock(&self.progress);
        if let Err(panic) = dropped {
            progress.first_error.get_or_insert_with(|| sink_panicked(&*panic));
        }
        progress.finished = true;
        self.finished.notify_all();
    }

    /// Ends every piece that has not ended.
    pub(super) fn settle_all(&self, error: &Error) {
        let pieces = lock(&self.progress).missing.len();
        for piece in 0..pieces {
            self.settle(piece, Err(error.clone()));
        }
    }

    /// Ends the request, reads in flight or not: the engine is dead and hands none back.
    pub(super) fn give_up(&self, error: &Error) {
        self.settle_all(error);
        let mut progress = lock(&self.progress);
        progress.in_place = 0;
        self.finish_if_over(progress);
    }
}

pub(super) fn sink_panicked(panic: &(dyn Any + Send)) -> Error {
    Error::SinkPanicked { message: panic_message(panic) }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::file::FileId;
    use crate::plan::{Layout, Wanted};
    use crate::ring::PAGE;

    /// What [`request`] asks of each of its pieces, in bytes.
    pub(in crate::reader) const PIECE_BYTES: u64 = 100;

    /// A request of one read for each of these offsets of a file, which lie some pages apart.
    pub(in crate::reader) fn request(offsets: &[u64], sink: Arc<dyn Sink>) -> Arc<Job> {
        let wanted = offsets.iter().enumerate().map(|(piece, &offset)| Wanted {
            piece,
            file: FileId(0),
            offset,
            len: PIECE_BYTES,
            in_place: None,
        });
        let layout = |_| Layout { align: 4096, size: 1 << 40 };
        let plan = Plan::new(wanted.collect(), layout, PAGE);
        assert_eq!(plan.reads().len(), offsets.len());
        let lens = offsets.iter().map(|_| PIECE_BYTES);
        let reaper = std::thread::current().id();
        Arc::new(Job::new(plan, vec![None; offsets.len()], lens, sink, reaper))
    }
}

//! What waits, what is in flight, and which read goes next. No I/O happens here.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use super::job::Job;
use crate::engine::{RawDone, RawRead};
use crate::error::Result;
use crate::file::File;
use crate::ring::{Buffer, Ring};

/// Which reads go first: every queued `Demand` read before every queued `Prefetch` read, and those
/// before `Bulk`. First come, first served within one. A lower one may wait for ever, or until
/// [`Ticket::raise`](crate::Ticket::raise).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Priority {
    /// Somebody waits for it.
    Demand,
    /// Somebody is likely to want it soon.
    Prefetch,
    /// Loading and other work without haste.
    Bulk,
}

/// Buffers that only `Demand` may take, of a ring that can spare them: sinks may hold the buffers
/// of other reads for long.
const DEMAND_BUFFERS: usize = 2;
/// A ring spares no more than one in this many buffers.
const RING_SHARE: usize = 4;
/// Engines of this depth or more keep one place in flight for `Demand`.
const DEPTH_SPARING: usize = 4;
/// How often a read is tried again when it fails for a passing reason and makes no progress.
const STALLS_MAX: u8 = 16;

/// Work for the reader's thread besides reads.
pub(super) enum Chore {
    /// Pieces that need no read.
    Settle(Arc<Job>, Vec<(usize, Result<()>)>),
    /// A cancelled request.
    Cancel(Arc<Job>),
    /// The end of the reader.
    Close,
}

impl Chore {
    pub(super) fn job(&self) -> Option<&Arc<Job>> {
        match self {
            Self::Settle(job, _) | Self::Cancel(job) => Some(job),
            Self::Close => None,
        }
    }
}

/// A read that is over, with what it brought.
pub(super) struct Landed {
    pub(super) job: Arc<Job>,
    /// Which read of the job's plan.
    pub(super) read: usize,
    pub(super) file: Arc<File>,
    /// What was filled, unless the read went to a place.
    pub(super) buffer: Option<Arc<Buffer>>,
    /// Bytes from the start of the read that are there.
    pub(super) result: Result<usize, Arc<io::Error>>,
}

struct Waiting {
    job: Arc<Job>,
    next: usize,
}

struct Flight {
    job: Arc<Job>,
    read: usize,
    got: usize,
    stalls: u8,
}

pub(super) struct Queue {
    waiting: [VecDeque<Waiting>; 3],
    /// By the id of the read.
    flights: Vec<Option<Flight>>,
    free: Vec<usize>,
    again: Vec<RawRead>,
    pub(super) depth: usize,
    pub(super) chores: VecDeque<Chore>,
    pub(super) closed: bool,
}

impl Queue {
    pub(super) fn new(depth: usize) -> Self {
        Self {
            waiting: Default::default(),
            flights: (0..depth).map(|_| None).collect(),
            free: (0..depth).collect(),
            again: Vec::new(),
            depth,
            chores: VecDeque::new(),
            closed: false,
        }
    }

    pub(super) fn in_flight(&self) -> usize {
        self.depth - self.free.len()
    }

    pub(super) fn push(&mut self, priority: Priority, job: Arc<Job>) {
        if !job.plan.reads().is_empty() {
            self.waiting[priority as usize].push_back(Waiting { job, next: 0 });
        }
    }

    pub(super) fn remove(&mut self, job: &Arc<Job>) {
        for queue in &mut self.waiting {
            queue.retain(|waiting| !Arc::ptr_eq(&waiting.job, job));
        }
    }

    /// Moves a job that waits with a lower priority to the end of the queue of `to`; says whether
    /// there was one to move.
    pub(super) fn raise(&mut self, job: &Arc<Job>, to: Priority) -> bool {
        let (upto, lower) = self.waiting.split_at_mut(to as usize + 1);
        for queue in lower {
            let at = queue.iter().position(|waiting| Arc::ptr_eq(&waiting.job, job));
            if let Some(waiting) = at.and_then(|at| queue.remove(at)) {
                upto[to as usize].push_back(waiting);
                return true;
            }
        }
        false
    }

    /// Empties the queues; returns every job that is not finished. Reads in flight stay.
    pub(super) fn drain(&mut self) -> Vec<Arc<Job>> {
        let mut jobs: Vec<_> =
            self.waiting.iter_mut().flat_map(|q| q.drain(..)).map(|w| w.job).collect();
        jobs.extend(self.flights.iter().flatten().map(|flight| Arc::clone(&flight.job)));
        jobs.extend(self.chores.drain(..).filter_map(|chore| chore.job().cloned()));
        jobs
    }

    /// The next read to submit, if there is one and a buffer and a place in flight for it.
    pub(super) fn next(
        &mut self,
        ring: &Arc<Ring>,
        file: impl Fn(&Arc<Job>, usize) -> Arc<File>,
    ) -> Option<RawRead> {
        if let Some(read) = self.again.pop() {
            return Some(read);
        }
        if self.closed {
            return None;
        }
        for (level, queue) in self.waiting.iter_mut().enumerate() {
            let demand = level == Priority::Demand as usize;
            while let Some(front) = queue.front_mut() {
                let Some(read) = front.job.plan.reads().get(front.next) else {
                    queue.pop_front();
                    continue;
                };
                if front.job.is_over() {
                    queue.pop_front();
                    continue;
                }
                if !front.job.wants(read) {
                    front.next += 1;
                    continue;
                }
                let sparing = usize::from(!demand && self.depth >= DEPTH_SPARING);
                if self.free.len() <= sparing {
                    return None;
                }
                let id = *self.free.last()?;
                let job = Arc::clone(&front.job);
                let file = file(&job, front.next);
                let raw = if read.in_place {
                    let Some(raw) = job.start_in_place(read, id as u64, file) else {
                        front.next += 1;
                        continue;
                    };
                    raw
                } else {
                    let reserve = (ring.count() / RING_SHARE).min(DEMAND_BUFFERS);
                    let buffer = ring.take(if demand { 0 } else { reserve })?;
                    RawRead::new(id as u64, file, read.offset, buffer, 0, read.len)
                };
                self.free.pop();
                self.flights[id] = Some(Flight { job, read: front.next, got: 0, stalls: 0 });
                front.next += 1;
                return Some(raw);
            }
        }
        None
    }

    /// Takes a read that came back. One that was cut short is queued again for its rest, before
    /// all others: it holds its memory already.
    pub(super) fn land(&mut self, done: RawDone) -> Option<Landed> {
        let RawDone { read: raw, result } = done;
        let id = raw.id() as usize;
        let mut flight = self.flights.get_mut(id)?.take()?;
        let read = &flight.job.plan.reads()[flight.read];
        let needed = flight.job.plan.slices(read).iter().map(|s| s.start + s.len).max();
        let needed = needed.unwrap_or(0);
        let start = (raw.offset() - read.offset) as usize;
        let (retry, result) = match result {
            Ok(n) if n > raw.len() => {
                let text = format!("the engine claims {n} bytes of a read of {}", raw.len());
                (false, Err(io::Error::new(io::ErrorKind::InvalidData, text)))
            }
            Ok(n) => {
                let progress = start + n > flight.got;
                flight.got = flight.got.max(start + n);
                flight.stalls = 0;
                // No progress means the end of the file.
                (progress && flight.got < needed, Ok(flight.got))
            }
            Err(error) if is_passing(&error) && flight.stalls < STALLS_MAX => {
                flight.stalls += 1;
                (true, Err(error))
            }
            Err(error) => (false, Err(error)),
        };
        let file = Arc::clone(raw.file());
        if retry && !self.closed && !flight.job.is_over() {
            let align = file.direct_state().offset_align as usize;
            let from = flight.got & !(align - 1);
            let skip = from - (raw.offset() - read.offset) as usize;
            self.again.push(raw.skip(skip));
            self.flights[id] = Some(flight);
            return None;
        }
        self.free.push(id);
        let Flight { job, read, .. } = flight;
        let (buffer, result) = (raw.into_buffer().map(Arc::new), result.map_err(Arc::new));
        Some(Landed { job, read, file, buffer, result })
    }
}

fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::error::Result;
    use crate::reader::job::tests::request;
    use crate::ring::PAGE;
    use crate::sink::{Chunk, Sink};

    struct Nobody;

    impl Sink for Nobody {
        fn chunk(&self, _: Chunk) {}
        fn done(&self, _: usize, _: Result<()>) {}
    }

    #[derive(Debug, Clone)]
    enum Op {
        /// So many reads.
        Push(Priority, u64),
        /// One of the jobs so far.
        Raise(usize, Priority),
        Next,
    }

    fn ops() -> impl Strategy<Value = Vec<Op>> {
        let priority =
            || prop::sample::select(&[Priority::Demand, Priority::Prefetch, Priority::Bulk][..]);
        let op = prop_oneof![
            (priority(), 1u64..4).prop_map(|(priority, reads)| Op::Push(priority, reads)),
            (any::<usize>(), priority()).prop_map(|(job, to)| Op::Raise(job, to)),
            Just(Op::Next),
            Just(Op::Next),
        ];
        prop::collection::vec(op, 1..60)
    }

    /// A job as the model has it: where it waits, since when, and the offsets it has yet to read.
    struct Waits {
        priority: Priority,
        since: usize,
        offsets: VecDeque<u64>,
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

        /// The next read is the first of the job that has waited longest with the highest
        /// priority; to be raised is to wait anew, to be raised to less is nothing.
        #[test]
        fn reads_go_by_priority_then_by_arrival(ops in ops()) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("f");
            std::fs::write(&path, [0]).unwrap();
            let file = Arc::new(File::open_buffered(&path, "nothing is read").unwrap());
            let ring = Ring::new(PAGE, 2).unwrap();
            let mut queue = Queue::new(1);
            let (mut jobs, mut model) = (Vec::new(), Vec::<Waits>::new());
            for (now, op) in ops.into_iter().chain([(); 200].map(|()| Op::Next)).enumerate() {
                match op {
                    Op::Push(priority, reads) => {
                        let offset = |n| (jobs.len() as u64 * 8 + n) * 16 * PAGE as u64;
                        let offsets: VecDeque<_> = (0..reads).map(offset).collect();
                        let job = request(offsets.as_slices().0, Arc::new(Nobody));
                        queue.push(priority, Arc::clone(&job));
                        jobs.push(job);
                        model.push(Waits { priority, since: now, offsets });
                    }
                    Op::Raise(job, to) if !jobs.is_empty() => {
                        let at = job % jobs.len();
                        queue.raise(&jobs[at], to);
                        if to < model[at].priority {
                            (model[at].priority, model[at].since) = (to, now);
                        }
                    }
                    Op::Raise(..) => {}
                    Op::Next => {
                        let next = queue.next(&ring, |_, _| Arc::clone(&file));
                        let waiting = model.iter_mut().filter(|job| !job.offsets.is_empty());
                        let first = waiting.min_by_key(|job| (job.priority, job.since));
                        let expected = first.and_then(|job| job.offsets.pop_front());
                        prop_assert_eq!(next.as_ref().map(RawRead::offset), expected);
                        if let Some(read) = next {
                            let done = RawDone { result: Ok(read.len()), read };
                            prop_assert!(queue.land(done).is_some());
                        }
                    }
                }
            }
            prop_assert!(model.iter().all(|job| job.offsets.is_empty()));
        }
    }
}

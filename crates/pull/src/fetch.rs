//! Files that are fetched: several connections take pieces of them in their order, and one thread, the
//! caller's, hashes what has come, records it, and tells how far it is.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};
use ureq::http::Uri;

use crate::cache::Lock;
use crate::cancel::Cancel;
use crate::client::Client;
use crate::error::{Error, Result};
use crate::event::{Event, FileState, Observer};
use crate::hub::Remote;
use crate::partial::Partial;
use crate::piece;
use crate::puller::Options;
use crate::ranges::Ranges;

/// How often is told how far it is.
const REPORT_INTERVAL: Duration = Duration::from_millis(100);

/// Time after which what has come is recorded, however little.
const RECORD_INTERVAL: Duration = Duration::from_secs(5);

/// Bytes that are hashed between two looks at the rest.
const HASH_BYTES: u64 = 32 << 20;

/// A file that is to be fetched.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) remote: Remote,
    pub(crate) partial: Partial,
    /// Where its content is.
    address: Mutex<Option<Uri>>,
    _lock: Lock,
}

impl Job {
    pub(crate) fn new(remote: Remote, partial: Partial, lock: Lock) -> Self {
        Self { remote, partial, address: Mutex::default(), _lock: lock }
    }

    pub(crate) fn address(&self) -> Uri {
        let known = self.address.lock().unwrap_or_else(PoisonError::into_inner);
        known.clone().unwrap_or_else(|| self.remote.uri.clone())
    }

    pub(crate) fn remember_address(&self, address: Uri) {
        *self.address.lock().unwrap_or_else(PoisonError::into_inner) = Some(address);
    }

    pub(crate) fn forget_address(&self) {
        *self.address.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// What all threads of a pull share.
pub(crate) struct Fetch<'a> {
    pub(crate) client: &'a Client,
    pub(crate) options: &'a Options,
    pub(crate) cancel: &'a Cancel,
    pub(crate) repo_name: &'a str,
    pub(crate) jobs: Vec<Job>,
    shared: Mutex<Shared>,
    changed: Condvar,
}

#[derive(Default)]
struct Shared {
    files: Vec<Progress>,
    failed: Option<Error>,
    /// Connections that have something to do.
    working: usize,
    /// A failure after which it goes on.
    retrying: Option<(String, Duration)>,
}

#[derive(Default)]
struct Progress {
    done: Ranges,
    /// Pieces that nobody has taken.
    left: VecDeque<Range<u64>>,
    /// Its server sends all or nothing, and one connection brings it.
    is_whole: bool,
}

impl<'a> Fetch<'a> {
    /// `jobs` with what there is of them.
    pub(crate) fn new(
        client: &'a Client,
        options: &'a Options,
        cancel: &'a Cancel,
        repo_name: &'a str,
        jobs: Vec<(Job, Ranges)>,
    ) -> Self {
        let (jobs, files) = jobs
            .into_iter()
            .map(|(job, done)| {
                let left = done.missing(job.remote.bytes, options.piece_bytes.max(1)).into();
                (job, Progress { done, left, is_whole: false })
            })
            .unzip();
        let shared = Mutex::new(Shared { files, ..Default::default() });
        Self { client, options, cancel, repo_name, jobs, shared, changed: Condvar::new() }
    }

    /// Fetches all files. What has come when it fails is recorded.
    pub(crate) fn run(&self, observer: &dyn Observer) -> Result<()> {
        thread::scope(|scope| {
            let connections = self.options.connections.max(1);
            self.shared().working = connections;
            for _ in 0..connections {
                scope.spawn(|| self.work());
            }
            let mut watch = Watch::new(self, observer);
            let watched = watch.run();
            if let Err(error) = watched {
                self.fail(error);
            }
        });
        let Some(failed) = self.shared().failed.take() else { return Ok(()) };
        for (index, job) in self.jobs.iter().enumerate() {
            let done = std::mem::take(&mut self.shared().files[index].done);
            // Nothing is there of files that are whole, or were deleted.
            if done.bytes() > 0 && job.partial.path().exists() {
                // If that fails, it is fetched again: the failure before is the one to tell.
                let _ = job.partial.record(&done);
            }
        }
        Err(if self.cancel.is_cancelled() { Error::Cancelled } else { failed })
    }

    fn work(&self) {
        let _working = Working(self);
        while let Some((index, piece)) = self.take() {
            if let Err(error) = piece::fetch(self, index, piece) {
                return self.fail(error);
            }
            self.changed.notify_all();
        }
    }

    /// The next piece of the first file that has one.
    fn take(&self) -> Option<(usize, Range<u64>)> {
        let mut shared = self.shared();
        if shared.failed.is_some() {
            return None;
        }
        let mut files = shared.files.iter_mut().enumerate();
        files.find_map(|(index, file)| Some((index, file.left.pop_front()?)))
    }

    /// Whether who asks is the first to find that all of the file comes at once, and brings it.
    pub(crate) fn take_whole(&self, index: usize) -> bool {
        let file = &mut self.shared().files[index];
        file.left.clear();
        !std::mem::replace(&mut file.is_whole, true)
    }

    /// These bytes are written.
    pub(crate) fn came(&self, index: usize, range: Range<u64>) {
        self.shared().files[index].done.insert(range);
    }

    /// Waits before another try.
    pub(crate) fn pause(&self, time: Duration, error: &Error) -> Result<()> {
        self.shared().retrying = Some((error.to_string(), time));
        let end = Instant::now() + time;
        while !self.is_stopped() {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            self.cancel.wait(left.min(REPORT_INTERVAL));
        }
        Err(Error::Cancelled)
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.cancel.is_cancelled() || self.shared().failed.is_some()
    }

    /// The first failure is the one that is told; the others follow from it.
    fn fail(&self, error: Error) {
        self.shared().failed.get_or_insert(error);
        self.client.agent.clone().shutdown();
        self.changed.notify_all();
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// That a connection works, until it ends, with a panic too.
struct Working<'a>(&'a Fetch<'a>);

impl Drop for Working<'_> {
    fn drop(&mut self) {
        self.0.shared().working -= 1;
        self.0.changed.notify_all();
    }
}

/// The thread beside the connections.
struct Watch<'a> {
    fetch: &'a Fetch<'a>,
    observer: &'a dyn Observer,
    states: Vec<FileState>,
    /// The file whose bytes are hashed, and how many are.
    current: usize,
    hashed: u64,
    hasher: Sha256,
    buffer: Vec<u8>,
    /// Bytes of each file that are recorded.
    recorded: Vec<u64>,
    last_record: Instant,
    last_report: Option<Instant>,
}

impl<'a> Watch<'a> {
    fn new(fetch: &'a Fetch<'a>, observer: &'a dyn Observer) -> Self {
        let states: Vec<FileState> = {
            let shared = fetch.shared();
            let state = |(job, file): (&Job, &Progress)| FileState {
                path: job.remote.path.clone(),
                sha256: job.remote.sha256.clone(),
                bytes: job.remote.bytes,
                done_bytes: file.done.bytes(),
            };
            fetch.jobs.iter().zip(&shared.files).map(state).collect()
        };
        Self {
            recorded: states.iter().map(|state| state.done_bytes).collect(),
            fetch,
            observer,
            states,
            current: 0,
            hashed: 0,
            hasher: Sha256::new(),
            buffer: vec![0; 1 << 20],
            last_record: Instant::now(),
            last_report: None,
        }
    }

    fn run(&mut self) -> Result<()> {
        while self.current < self.fetch.jobs.len() {
            let prefix = self.look()?;
            self.report();
            self.record()?;
            match prefix > self.hashed {
                true => self.hash(prefix)?,
                false if prefix < self.fetch.jobs[self.current].remote.bytes => self.wait(),
                false => {}
            }
            if self.hashed == self.fetch.jobs[self.current].remote.bytes {
                self.compare()?;
            }
        }
        Ok(())
    }

    /// Takes what has come; how much of the current file there is without a gap.
    fn look(&mut self) -> Result<u64> {
        let mut shared = self.fetch.shared();
        if shared.failed.is_some() || self.fetch.cancel.is_cancelled() {
            return Err(Error::Cancelled);
        }
        for (state, file) in self.states.iter_mut().zip(&shared.files) {
            state.done_bytes = file.done.bytes();
        }
        let prefix = shared.files[self.current].done.prefix();
        if shared.working == 0 && prefix < self.states[self.current].bytes {
            // A connection ended with a panic, which goes on when this thread ends.
            return Err(Error::Cancelled);
        }
        let retrying = shared.retrying.take();
        drop(shared);
        if let Some((why, wait)) = &retrying {
            self.observer.report(Event::Retrying { why, wait: *wait });
        }
        Ok(prefix)
    }

    fn report(&mut self) {
        let is_whole = self.states.iter().all(|state| state.done_bytes == state.bytes);
        if is_whole || self.last_report.is_none_or(|last| last.elapsed() >= REPORT_INTERVAL) {
            self.last_report = Some(Instant::now());
            self.observer.report(Event::Fetching(&self.states));
        }
    }

    /// Waits for bytes.
    fn wait(&self) {
        let shared = self.fetch.shared();
        drop(self.fetch.changed.wait_timeout(shared, REPORT_INTERVAL / 2));
    }

    fn record(&mut self) -> Result<()> {
        let is_time = self.last_record.elapsed() >= RECORD_INTERVAL;
        let due = if is_time { 1 } else { self.fetch.options.record_bytes.max(1) };
        for index in self.current..self.states.len() {
            if self.states[index].done_bytes - self.recorded[index] < due {
                continue;
            }
            let done = self.fetch.shared().files[index].done.clone();
            self.fetch.jobs[index].partial.record(&done)?;
            self.recorded[index] = done.bytes();
        }
        if is_time {
            self.last_record = Instant::now();
        }
        Ok(())
    }

    /// Hashes the current file up to there, or some of it.
    fn hash(&mut self, prefix: u64) -> Result<()> {
        let end = prefix.min(self.hashed + HASH_BYTES);
        while self.hashed < end {
            let len = usize::try_from(end - self.hashed).unwrap_or(usize::MAX);
            let part = len.min(self.buffer.len());
            let bytes = &mut self.buffer[..part];
            self.fetch.jobs[self.current].partial.read(bytes, self.hashed)?;
            self.hasher.update(&*bytes);
            self.hashed += part as u64;
        }
        Ok(())
    }

    /// Compares the current file, and goes on to the next one.
    fn compare(&mut self) -> Result<()> {
        let Job { remote, partial, .. } = &self.fetch.jobs[self.current];
        self.observer.report(Event::Checking(&self.states[self.current]));
        let found = self.hasher.finalize_reset();
        let found: String = found.iter().map(|byte| format!("{byte:02x}")).collect();
        if found != remote.sha256 {
            partial.discard()?;
            let (path, expected) = (remote.path.clone(), remote.sha256.clone());
            return Err(Error::Hash { path, found, expected });
        }
        partial.finish()?;
        (self.current, self.hashed) = (self.current + 1, 0);
        Ok(())
    }
}

//! `fault`: makes chosen reads fail, for tests and drills.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::delay::Delay;
use crate::engine::{Engine, RawDone, RawRead};
use crate::error::Result;
use crate::sync::lock;

/// What happens to a read that a [`Rule`] catches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// It fails with this `errno`.
    Errno(i32),
    /// At most this many bytes arrive; those after them hold rubbish.
    Short(usize),
    /// It arrives this much later.
    Delay(Duration),
    /// The engine claims this many bytes, whatever arrived.
    WrongLength(usize),
    /// This byte of the file arrives with all its bits turned over, and nobody is told.
    Flip(u64),
}

/// Which reads, and what happens to them. Every condition that is set must hold.
#[derive(Debug, Clone)]
pub struct Rule {
    /// Only reads of the file that was opened by this path.
    pub path: Option<PathBuf>,
    /// Only reads that touch one of these bytes of the file.
    pub bytes: Option<Range<u64>>,
    /// Only these of the reads that the other conditions let through, counted from 0 in order of
    /// submission.
    pub nth: Option<Range<u64>>,
    /// Only reads that are submitted while this is set.
    pub switch: Option<Arc<AtomicBool>>,
    /// What happens.
    pub action: Action,
}

impl Rule {
    /// Every read.
    pub fn all(action: Action) -> Self {
        Self { path: None, bytes: None, nth: None, switch: None, action }
    }

    /// Narrows to the reads of one file.
    pub fn path(self, path: impl Into<PathBuf>) -> Self {
        Self { path: Some(path.into()), ..self }
    }

    /// Narrows to reads that touch one of `bytes` of the file.
    pub fn bytes(self, bytes: Range<u64>) -> Self {
        Self { bytes: Some(bytes), ..self }
    }

    /// Narrows to some of the reads that the other conditions let through, counted from 0.
    pub fn nth(self, nth: Range<u64>) -> Self {
        Self { nth: Some(nth), ..self }
    }

    /// Narrows to reads that are submitted while `switch` is set.
    pub fn switch(self, switch: Arc<AtomicBool>) -> Self {
        Self { switch: Some(switch), ..self }
    }

    /// Every read of this byte of a file, which arrives damaged.
    pub fn flip(path: impl Into<PathBuf>, at: u64) -> Self {
        Self::all(Action::Flip(at)).path(path).bytes(at..at + 1)
    }

    fn catches(&self, read: &RawRead, seen: &mut u64) -> bool {
        let path = self.path.as_ref().is_none_or(|path| path == read.file().path());
        let end = read.offset() + read.len() as u64;
        let bytes = self.bytes.as_ref().is_none_or(|b| b.start < end && read.offset() < b.end);
        let on = self.switch.as_ref().is_none_or(|switch| switch.load(Ordering::Relaxed));
        if !(path && bytes && on) {
            return false;
        }
        let nth = *seen;
        *seen += 1;
        self.nth.as_ref().is_none_or(|range| range.contains(&nth))
    }
}

/// An engine some of whose reads fail by rule. The first rule that catches a read decides.
pub struct Fault {
    inner: Arc<dyn Engine>,
    state: Mutex<State>,
    delay: Delay,
}

struct State {
    rules: Vec<(Rule, u64)>,
    caught: HashMap<u64, Action>,
}

impl Fault {
    /// Wraps `inner`.
    ///
    /// # Errors
    /// [`Error::Engine`](crate::Error::Engine) when the clock's thread cannot be started.
    pub fn new(inner: impl Engine + 'static, rules: Vec<Rule>) -> Result<Self> {
        let inner: Arc<dyn Engine> = Arc::new(inner);
        let delay = Delay::new(Arc::clone(&inner))?;
        let rules = rules.into_iter().map(|rule| (rule, 0)).collect();
        Ok(Self { inner, state: Mutex::new(State { rules, caught: HashMap::new() }), delay })
    }

    fn spoil(&self, mut done: RawDone, action: Action) -> Option<RawDone> {
        match action {
            Action::Errno(errno) => done.result = Err(io::Error::from_raw_os_error(errno)),
            Action::Short(bytes) => {
                done.result = done.result.map(|n| n.min(bytes));
                // Else a caller that ignores the count would pass for correct.
                let mut kept = bytes;
                for mut target in done.read.targets() {
                    let keep = kept.min(target.len());
                    target[keep..].fill(0xA5);
                    kept -= keep;
                }
            }
            Action::WrongLength(bytes) => done.result = done.result.map(|_| bytes),
            Action::Flip(at) => {
                let mut offset = done.read.offset();
                for mut target in done.read.targets() {
                    let within = at.checked_sub(offset).and_then(|at| usize::try_from(at).ok());
                    if let Some(byte) = within.and_then(|at| target.get_mut(at)) {
                        *byte = !*byte;
                    }
                    offset += target.len() as u64;
                }
            }
            Action::Delay(by) => {
                self.delay.hold(Instant::now() + by, done);
                return None;
            }
        }
        Some(done)
    }
}

impl Engine for Fault {
    pass_on!();

    fn submit(&self, reads: &mut dyn Iterator<Item = RawRead>) {
        self.inner.submit(&mut reads.inspect(|read| {
            let State { rules, caught } = &mut *lock(&self.state);
            if let Some(rule) =
                rules.iter_mut().find_map(|(rule, n)| rule.catches(read, n).then_some(&*rule))
            {
                caught.insert(read.id(), rule.action);
            }
        }));
    }

    fn wait(&self, done: &mut Vec<RawDone>) {
        let before = done.len();
        self.delay.take_due(done);
        if done.len() > before {
            return;
        }
        let mut arrived = Vec::new();
        self.inner.wait(&mut arrived);
        for read in arrived {
            let action = lock(&self.state).caught.remove(&read.read.id());
            match action {
                Some(action) => done.extend(self.spoil(read, action)),
                None => done.push(read),
            }
        }
        self.delay.take_due(done);
    }
}

//! `throttle`: slows an engine down to a drive of a given bandwidth and latency.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::delay::Delay;
use crate::engine::{Engine, RawDone, RawRead};
use crate::error::{Error, Result};
use crate::sync::lock;

/// A drive in two numbers: it transfers one read after the other, and each takes `latency` on top,
/// during which others may transfer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Drive {
    /// Bytes per second; positive.
    pub bytes_per_s: f64,
    /// Time per read besides its transfer.
    pub latency: Duration,
}

impl Drive {
    fn transfer(&self, bytes: usize) -> Duration {
        Duration::try_from_secs_f64(bytes as f64 / self.bytes_per_s).unwrap_or(Duration::MAX)
    }
}

/// Delivers reads no sooner than a [`Drive`] would. Content and errors are the inner engine's.
pub struct Throttle {
    inner: Arc<dyn Engine>,
    drive: Drive,
    schedule: Mutex<Schedule>,
    delay: Delay,
}

struct Schedule {
    drive_free: Instant,
    due: HashMap<u64, Instant>,
}

impl Throttle {
    /// Wraps `inner`.
    ///
    /// # Errors
    /// [`Error::Config`] for a bandwidth that is not positive, [`Error::Engine`] when the clock's
    /// thread cannot be started.
    pub fn new(inner: impl Engine + 'static, drive: Drive) -> Result<Self> {
        if drive.bytes_per_s.is_nan() || drive.bytes_per_s <= 0.0 {
            return Err(Error::config(format!("a drive of {} bytes/s", drive.bytes_per_s)));
        }
        let inner: Arc<dyn Engine> = Arc::new(inner);
        let delay = Delay::new(Arc::clone(&inner))?;
        let schedule = Schedule { drive_free: Instant::now(), due: HashMap::new() };
        Ok(Self { inner, drive, schedule: Mutex::new(schedule), delay })
    }
}

impl Engine for Throttle {
    pass_on!();

    fn submit(&self, reads: &mut dyn Iterator<Item = RawRead>) {
        let now = Instant::now();
        self.inner.submit(&mut reads.inspect(|read| {
            let mut schedule = lock(&self.schedule);
            let start = schedule.drive_free.max(now);
            // A time beyond the clock's range is as good as an hour.
            let later = |from: Instant, by: Duration| {
                from.checked_add(by).unwrap_or(from + Duration::from_secs(3600))
            };
            schedule.drive_free = later(start, self.drive.transfer(read.len()));
            let due = later(schedule.drive_free, self.drive.latency);
            schedule.due.insert(read.id(), due);
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
            let due = lock(&self.schedule).due.remove(&read.read.id());
            self.delay.hold(due.unwrap_or_else(Instant::now), read);
        }
        self.delay.take_due(done);
    }
}

//! Completed reads held back until their time, and the clock that wakes the waiting thread.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use crate::engine::{Engine, RawDone};
use crate::error::{Error, Result};
use crate::sync::{lock, wait};

/// Holds reads of one engine; wakes that engine's waiter when one falls due.
pub(super) struct Delay {
    shared: Arc<Shared>,
    clock: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    held: Mutex<Held>,
    changed: Condvar,
}

#[derive(Default)]
struct Held {
    /// By due time, then by order of arrival.
    reads: BTreeMap<(Instant, u64), RawDone>,
    arrivals: u64,
    stop: bool,
}

impl Delay {
    pub(super) fn new(engine: Arc<dyn Engine>) -> Result<Self> {
        let shared = Arc::<Shared>::default();
        let of_clock = Arc::clone(&shared);
        let clock = std::thread::Builder::new()
            .name("io-delay".to_owned())
            .spawn(move || of_clock.run(&*engine))
            .map_err(|source| Error::Engine { engine: "delay", source: Arc::new(source) })?;
        Ok(Self { shared, clock: Some(clock) })
    }

    pub(super) fn hold(&self, due: Instant, read: RawDone) {
        let mut held = lock(&self.shared.held);
        held.arrivals += 1;
        let key = (due, held.arrivals);
        held.reads.insert(key, read);
        self.shared.changed.notify_one();
    }

    pub(super) fn take_due(&self, done: &mut Vec<RawDone>) {
        let now = Instant::now();
        let mut held = lock(&self.shared.held);
        let before = done.len();
        while let Some(first) = held.reads.first_entry()
            && first.key().0 <= now
        {
            done.push(first.remove());
        }
        if done.len() > before {
            // The clock may be resting on one of these; the next one needs it.
            self.shared.changed.notify_one();
        }
    }
}

impl Shared {
    fn run(&self, engine: &dyn Engine) {
        let mut held = lock(&self.held);
        let mut rung = None;
        while !held.stop {
            let first = held.reads.first_key_value().map(|(key, _)| *key);
            held = match first {
                // Once rung for, a read is the waiter's business.
                Some(key) if rung == Some(key) => wait(&self.changed, held),
                None => wait(&self.changed, held),
                Some(key) => {
                    let left = key.0.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        rung = Some(key);
                        engine.wake();
                        continue;
                    }
                    let waited = self.changed.wait_timeout(held, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }
}

impl Drop for Delay {
    fn drop(&mut self) {
        lock(&self.shared.held).stop = true;
        self.shared.changed.notify_one();
        if let Some(clock) = self.clock.take() {
            let _ = clock.join();
        }
    }
}

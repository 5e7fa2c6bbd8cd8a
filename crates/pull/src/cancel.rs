//! Stopping a pull from another thread.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ureq::Agent;

/// Stops a pull, at once: connections are closed. Clones stop the same one. For one pull at a time.
#[derive(Debug, Clone, Default)]
pub struct Cancel(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    is_cancelled: bool,
    agent: Option<Agent>,
}

impl Cancel {
    /// One that has stopped nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Stops what runs, and what would begin later.
    pub fn cancel(&self) {
        let mut state = self.state();
        state.is_cancelled = true;
        let agent = state.agent.take();
        drop(state);
        self.0.changed.notify_all();
        agent.into_iter().for_each(Agent::shutdown);
    }

    /// Whether it was asked to stop.
    pub fn is_cancelled(&self) -> bool {
        self.state().is_cancelled
    }

    /// Has [`cancel`](Self::cancel) close the connections of `agent`, until the guard is dropped.
    pub(crate) fn watch(&self, agent: &Agent) -> Watched<'_> {
        let mut state = self.state();
        match state.is_cancelled {
            true => agent.clone().shutdown(),
            false => state.agent = Some(agent.clone()),
        }
        Watched(self)
    }

    /// Waits so long, or until it is cancelled, and tells whether it was.
    pub(crate) fn wait(&self, time: Duration) -> bool {
        let end = Instant::now() + time;
        let mut state = self.state();
        while !state.is_cancelled {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let waited = self.0.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        state.is_cancelled
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(crate) struct Watched<'a>(&'a Cancel);

impl Drop for Watched<'_> {
    fn drop(&mut self) {
        self.0.state().agent = None;
    }
}

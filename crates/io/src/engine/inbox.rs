//! Completed reads on their way to the thread that waits for them.

use std::sync::{Condvar, Mutex};

use super::RawDone;
use crate::sync::{lock, wait};

/// [`Engine::wait`](super::Engine::wait) and [`Engine::wake`](super::Engine::wake) for engines
/// that complete reads on other threads.
#[derive(Debug, Default)]
pub struct Inbox {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    done: Vec<RawDone>,
    woken: bool,
}

impl Inbox {
    /// Delivers completed reads.
    pub fn push(&self, done: impl IntoIterator<Item = RawDone>) {
        lock(&self.state).done.extend(done);
        self.changed.notify_one();
    }

    /// See [`Engine::wait`](super::Engine::wait).
    pub fn wait(&self, done: &mut Vec<RawDone>) {
        let mut state = lock(&self.state);
        while state.done.is_empty() && !state.woken {
            state = wait(&self.changed, state);
        }
        state.woken = false;
        done.append(&mut state.done);
    }

    /// See [`Engine::wake`](super::Engine::wake).
    pub fn wake(&self) {
        lock(&self.state).woken = true;
        self.changed.notify_one();
    }
}

//! Ctrl-C: the first one stops what runs, cleanly; the second one the program, at once.
//!
//! SIGTERM and SIGHUP count as Ctrl-C.

use std::process::ExitCode;
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::Context as _;
use rustix::termios::{self, OptionalActions, Termios};
use tierstream::Cancel;

/// Exit code of an interrupted program: 128 + SIGINT, as shells have it.
const EXIT_CODE: u8 = 130;

struct State {
    /// Something runs that a signal can stop; otherwise a signal ends the program.
    running: bool,
    requested: bool,
    cancel: Option<Cancel>,
    /// The terminal as it was, which an editor of lines changes.
    terminal: Option<Termios>,
}

static STATE: Mutex<State> =
    Mutex::new(State { running: false, requested: false, cancel: None, terminal: None });

fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes over the signals.
pub(crate) fn install() -> anyhow::Result<()> {
    state().terminal = termios::tcgetattr(std::io::stdin()).ok();
    ctrlc::set_handler(on_signal).context("cannot take over Ctrl-C")
}

/// Runs on a thread of ctrlc's, not inside a signal handler.
fn on_signal() {
    let mut state = state();
    if !state.running || state.requested {
        if let Some(terminal) = &state.terminal {
            let _ = termios::tcsetattr(std::io::stdin(), OptionalActions::Now, terminal);
        }
        std::process::exit(i32::from(EXIT_CODE));
    }
    state.requested = true;
    if let Some(cancel) = &state.cancel {
        cancel.cancel();
    }
}

/// From here until it is dropped, the first signal is a request.
pub(crate) struct Running(());

impl Running {
    /// `cancel` is what a request stops; without one, the caller asks [`requested`].
    pub(crate) fn start(cancel: Option<Cancel>) -> Self {
        let mut state = state();
        state.running = true;
        state.requested = false;
        if let Some(cancel) = &cancel {
            cancel.reset();
        }
        state.cancel = cancel;
        Self(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let mut state = state();
        state.running = false;
        state.cancel = None;
    }
}

/// Whether what runs, or ran last, was asked to stop.
pub(crate) fn requested() -> bool {
    state().requested
}

/// What a program says that was asked to stop.
pub(crate) fn exit_code() -> ExitCode {
    ExitCode::from(EXIT_CODE)
}

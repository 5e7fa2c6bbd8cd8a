//! Ctrl-C: the first one stops what runs, cleanly; the second one the program, at once.
//!
//! SIGTERM and SIGHUP count as Ctrl-C, with exit codes of their own.

use std::ffi::c_int;
use std::process::ExitCode;
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::Context as _;
use rustix::termios::{self, OptionalActions, Termios};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use tierstream::Cancel;

type Stop = Box<dyn Fn() + Send>;

struct State {
    /// How many [`Running`] there are: with none, a signal ends the program.
    running: u32,
    /// The signal that asked to stop.
    requested: Option<c_int>,
    cancel: Option<Cancel>,
    /// What else a request stops.
    stop: Option<Stop>,
    /// The terminal as it was, which an editor of lines changes.
    terminal: Option<Termios>,
}

static STATE: Mutex<State> =
    Mutex::new(State { running: 0, requested: None, cancel: None, stop: None, terminal: None });

fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes over the signals.
pub(crate) fn install() -> anyhow::Result<()> {
    state().terminal = termios::tcgetattr(std::io::stdin()).ok();
    let mut signals = Signals::new(wanted()).context("cannot take over Ctrl-C")?;
    let wait = move || signals.forever().for_each(on_signal);
    let thread = std::thread::Builder::new().name("signals".into()).spawn(wait);
    thread.map(drop).context("cannot take over Ctrl-C")
}

/// The signals that ask to stop. One that is ignored is meant to be: `nohup`, and what scripts start in the background.
pub(crate) fn wanted() -> impl Iterator<Item = c_int> {
    let ignored = ignored();
    [SIGINT, SIGTERM, SIGHUP].into_iter().filter(move |signal| ignored >> (signal - 1) & 1 == 0)
}

/// The signals that this process ignores, the first in the lowest bit; none where the kernel does
/// not tell.
fn ignored() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|l| l.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

/// Runs on a thread of its own, not inside a signal handler.
fn on_signal(signal: c_int) {
    let mut state = state();
    if state.running == 0 || state.requested.is_some() {
        if let Some(terminal) = &state.terminal {
            let _ = termios::tcsetattr(std::io::stdin(), OptionalActions::Now, terminal);
        }
        // Not `exit`, which would run destructors while ggml's threads compute.
        signal_hook::low_level::exit(128 + signal);
    }
    state.requested = Some(signal);
    if let Some(cancel) = &state.cancel {
        cancel.cancel();
    }
    if let Some(stop) = &state.stop {
        stop();
    }
}

/// From here until it is dropped, the first signal is a request. One within another knows of a
/// request that came before.
pub(crate) struct Running(());

impl Running {
    /// `cancel` is what a request stops; without one, the caller asks [`requested`].
    pub(crate) fn start(cancel: Option<Cancel>) -> Self {
        let mut state = state();
        if state.running == 0 {
            state.requested = None;
        }
        state.running += 1;
        match &cancel {
            Some(cancel) if state.requested.is_some() => cancel.cancel(),
            Some(cancel) => cancel.reset(),
            None => {}
        }
        state.cancel = cancel;
        Self(())
    }

    /// The same for what is stopped by a function.
    pub(crate) fn stopped_by(stop: impl Fn() + Send + 'static) -> Self {
        let running = Self::start(None);
        let mut state = state();
        if state.requested.is_some() {
            stop();
        }
        state.stop = Some(Box::new(stop));
        running
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let mut state = state();
        state.running -= 1;
        state.cancel = None;
        state.stop = None;
    }
}

/// Whether what runs, or ran last, was asked to stop.
pub(crate) fn requested() -> bool {
    exit_code().is_some()
}

/// What a program says that was asked to stop: 128 and the number of the signal, as shells have
/// it. `None` if it was not asked to.
pub(crate) fn exit_code() -> Option<ExitCode> {
    state().requested.map(code)
}

/// The same for a program that goes on after Ctrl-C, as a chat does: `None` if there was no other
/// signal.
pub(crate) fn exit_code_beside_ctrl_c() -> Option<ExitCode> {
    state().requested.filter(|&signal| signal != SIGINT).map(code)
}

fn code(signal: c_int) -> ExitCode {
    ExitCode::from(u8::try_from(128 + signal).unwrap_or(u8::MAX))
}

//! For a backend of somebody else that computes on the stand-in: what CUDA's events and captures would
//! be to it.

use std::ffi::c_void;
use std::fmt;
use std::sync::Arc;

use super::driver::Shared;
use crate::driver::RawEvent;
use crate::error::Result;

/// The stand-in, for a backend of somebody else with a stream of its own, of which the stand-in knows
/// only the marks that it sets.
#[derive(Clone)]
pub struct Foreign {
    shared: Arc<Shared>,
}

impl Foreign {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// The capture that `mark` was set in last, if that is going on: a stream that waits for the mark
    /// becomes part of it.
    pub fn capture_of(&self, mark: *mut c_void) -> Option<Capture> {
        let id = self.shared.capture_of(event(mark))?;
        Some(Capture { shared: Arc::clone(&self.shared), id })
    }

    /// Says that `mark` has come: everything that the foreign stream had to do is done.
    pub fn set(&self, mark: *mut c_void) {
        self.shared.set(event(mark));
    }

    /// Waits until `mark` has come.
    ///
    /// # Errors
    /// [`Error::Lost`](crate::Error::Lost); [`Error::Driver`](crate::Error::Driver) if it was set in a
    /// capture.
    pub fn wait_for(&self, mark: *mut c_void) -> Result<()> {
        self.shared.wait_for_event(event(mark)).map_err(|f| f.doing("wait for an event"))
    }
}

fn event(mark: *mut c_void) -> RawEvent {
    RawEvent(mark.addr())
}

/// A capture of a stream of the stand-in. Clones are the same capture.
#[derive(Clone)]
pub struct Capture {
    shared: Arc<Shared>,
    id: usize,
}

impl Capture {
    /// Whether it has not ended yet.
    pub fn goes_on(&self) -> bool {
        self.shared.is_going_on(self.id)
    }

    /// Adds a call to the captured work, in order with all the rest of it. It is called on a stream's
    /// thread, with each launch. Not added if the capture has ended.
    pub fn call(&self, work: Box<dyn Fn() + Send + Sync>) {
        self.shared.add_call(self.id, work.into());
    }

    /// Sets `mark` at this point of the capture, for streams in it to wait for.
    pub fn set(&self, mark: *mut c_void) {
        self.shared.set_in(self.id, event(mark));
    }
}

impl fmt::Debug for Foreign {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Foreign").finish_non_exhaustive()
    }
}

impl fmt::Debug for Capture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Capture({})", self.id)
    }
}

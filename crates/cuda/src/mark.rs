//! Points in streams of ours and of others.

use std::ffi::c_void;
use std::fmt;
use std::sync::{Arc, Mutex, Weak};

use crate::device::Device;
use crate::driver::RawEvent;
use crate::error::Result;
use crate::graph::Capturing;
use crate::stream::Stream;
use crate::sync::lock;

/// A point that streams of ours and of others record and wait for, again and again: a `CUevent`
/// without timing. Unlike with an [`Event`](crate::Event), no memory hangs on it.
///
/// Set in a capture it is a point of the captured graph, and nothing else can wait for it.
pub struct Mark {
    device: Device,
    raw: RawEvent,
    /// The capture that a stream of ours has set it in.
    capture: Mutex<Weak<Capturing>>,
}

impl Device {
    /// A new mark, which counts as come until it is set.
    ///
    /// # Errors
    /// What the driver says.
    pub fn mark(&self) -> Result<Mark> {
        let raw = self.driver().event().map_err(|f| f.doing("make an event"))?;
        Ok(Mark { device: self.clone(), raw, capture: Mutex::default() })
    }
}

impl Mark {
    /// The driver's handle, for code that queues on streams of its own: a `CUevent` (in CUDA's runtime,
    /// a `cudaEvent_t`), valid until the mark is dropped. If another stream than the one that is
    /// captured joins a capture through a mark that such code has set, it must not be one of ours.
    pub fn raw(&self) -> *mut c_void {
        std::ptr::with_exposed_provenance_mut(self.raw.0)
    }

    /// Whether it has come where it was set last.
    ///
    /// # Errors
    /// What the driver says: an error of anything that the device did before, or that it was set in a
    /// capture.
    pub fn is_done(&self) -> Result<bool> {
        // SAFETY: the event is alive.
        let done = unsafe { self.device.driver().is_done(self.raw) };
        done.map_err(|f| f.doing("look at an event"))
    }

    /// Waits until it has come.
    ///
    /// # Errors
    /// As [`is_done`](Self::is_done).
    pub fn wait(&self) -> Result<()> {
        // SAFETY: the event is alive.
        let waited = unsafe { self.device.driver().wait_for(self.raw) };
        waited.map_err(|f| f.doing("wait for an event"))
    }
}

impl Stream {
    /// Sets the mark behind everything that was queued so far.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for a mark of another device; what the driver says.
    pub fn set(&self, mark: &Mark) -> Result<()> {
        self.device().check_same(&mark.device)?;
        *lock(&mark.capture) = self.capturing().as_ref().map_or_else(Weak::new, Arc::downgrade);
        // SAFETY: both are alive.
        let set = unsafe { self.device().driver().record(mark.raw, self.raw()) };
        set.map_err(|f| f.doing("record an event"))
    }

    /// Makes everything that is queued from now on wait for the mark, where it was set last. If that
    /// is in a capture, the stream becomes part of it.
    ///
    /// # Errors
    /// As [`set`](Self::set).
    pub fn wait_for_mark(&self, mark: &Mark) -> Result<()> {
        self.device().check_same(&mark.device)?;
        let capture = lock(&mark.capture).upgrade();
        let wait = || {
            // SAFETY: both are alive; the driver keeps what it needs of the event.
            let waits = unsafe { self.device().driver().wait_on(self.raw(), mark.raw) };
            waits.map_err(|f| f.doing("let a stream wait for an event"))
        };
        self.join(capture, wait)
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        // SAFETY: from `mark`; the driver keeps what waiting streams need of it.
        unsafe { self.device.driver().end_event(self.raw) };
    }
}

impl fmt::Debug for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mark({:#x})", self.raw.0)
    }
}

//! Stopping what a context computes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::control::Control;

/// Stops a context's computing from any thread: between two layers, or while it waits for reads. A
/// read that goes straight to a slot is waited for once the drive has it, because the slot cannot be
/// used for anything else before; of those through the ring none is.
#[derive(Debug, Clone, Default)]
pub struct Cancel {
    pub(crate) flag: Arc<AtomicBool>,
    /// Of the proxy's backend, for streamed models.
    pub(crate) control: Option<Arc<Control>>,
}

impl Cancel {
    /// Ends the decode that runs, and every later one until [`Cancel::reset`].
    pub fn cancel(&self) {
        self.set(true);
    }

    /// Lets the context decode again.
    pub fn reset(&self) {
        self.set(false);
    }

    fn set(&self, on: bool) {
        self.flag.store(on, Ordering::Release);
        if let Some(control) = &self.control {
            control.cancel(on);
        }
    }

    /// Whether decodes end.
    pub fn is_cancelled(&self) -> bool {
        self.flag.load(Ordering::Acquire)
    }
}

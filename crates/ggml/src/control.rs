//! What a context and its backend share: cancel, errors, how long reads were waited for.

use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tierstream_io::Ticket;

use crate::abi::*;
use crate::error::{Error, Result};

/// What a context and its backend share.
#[derive(Debug)]
pub(crate) struct Control {
    /// The inner backend, until ggml frees ours.
    inner: AtomicPtr<ggml_backend>,
    cancel: AtomicBool,
    /// The reads that the compute thread waits for.
    awaited: Mutex<Option<Arc<Ticket>>>,
    error: Mutex<Option<Error>>,
    /// Time that the compute thread waited for reads, nanoseconds.
    pub(crate) stall_ns: AtomicU64,
}

impl Control {
    pub(crate) fn new(inner: ggml_backend_t) -> Self {
        Self {
            inner: AtomicPtr::new(inner),
            cancel: AtomicBool::new(false),
            awaited: Mutex::new(None),
            error: Mutex::new(None),
            stall_ns: AtomicU64::new(0),
        }
    }

    /// The inner backend is about to be freed.
    pub(crate) fn detach(&self) {
        self.inner.store(ptr::null_mut(), Ordering::Release);
    }

    /// The wrapped backend, null once it is freed.
    pub(crate) fn inner(&self) -> ggml_backend_t {
        self.inner.load(Ordering::Acquire)
    }

    /// Makes the running and every later graph end with [`Error::Cancelled`] until reset.
    pub(crate) fn cancel(&self, on: bool) {
        self.cancel.store(on, Ordering::Release);
        if on && let Some(ticket) = &*self.awaited() {
            ticket.cancel();
        }
    }

    /// Waits for reads, until somebody cancels.
    pub(crate) fn wait_for(&self, ticket: &Arc<Ticket>) -> Result<()> {
        *self.awaited() = Some(ticket.clone());
        // Whoever cancels from here on finds the ticket; who did so before is seen here.
        let arrived = if self.is_cancelled() { Ok(()) } else { ticket.wait() };
        *self.awaited() = None;
        match arrived {
            _ if self.is_cancelled() => Err(Error::Cancelled),
            // Reset already, but the reads are cancelled.
            Err(tierstream_io::Error::Cancelled) => Err(Error::Cancelled),
            arrived => Ok(arrived?),
        }
    }

    fn awaited(&self) -> MutexGuard<'_, Option<Arc<Ticket>>> {
        self.awaited.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancel.load(Ordering::Acquire)
    }

    /// Why the last graph failed.
    pub(crate) fn take_error(&self) -> Option<Error> {
        self.error.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    pub(crate) fn fail(&self, error: Error) {
        *self.error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
    }
}

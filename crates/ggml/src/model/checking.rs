//! Tensors that are compared with their checksums where they lie in host memory, by threads of their own
//! while others are still read.

use std::num::NonZero;
use std::ops::Range;
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use crate::error::{Error, Result};
use crate::verified::Of;

/// The most threads that hash: memory is no faster for more.
const THREADS_MAX: usize = 4;

/// What is to be compared.
#[derive(Default)]
pub(super) struct Checking {
    /// By address.
    tensors: Vec<Tensor>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Indices of tensors all of whose bytes have arrived.
    ready: Vec<usize>,
    done: usize,
    stopped: bool,
    failed: Option<Error>,
}

struct Tensor {
    memory: Range<usize>,
    of: Of,
    missing_bytes: AtomicUsize,
}

impl Checking {
    /// For tensors in these places of memory.
    ///
    /// # Safety
    /// The memory is readable as long as this lives, and nobody writes to bytes of it that have
    /// [arrived](Checking::arrived).
    pub(super) unsafe fn new(tensors: Vec<(Range<usize>, Of)>) -> Self {
        let tensor = |(memory, of): (Range<usize>, Of)| Tensor {
            missing_bytes: AtomicUsize::new(memory.len()),
            memory,
            of,
        };
        let mut tensors: Vec<Tensor> = tensors.into_iter().map(tensor).collect();
        tensors.sort_unstable_by_key(|tensor| tensor.memory.start);
        Self { tensors, ..Self::default() }
    }

    /// What belongs in these addresses is there. Of each byte, this is said once.
    pub(super) fn arrived(&self, memory: Range<usize>) {
        let first = self.tensors.partition_point(|tensor| tensor.memory.end <= memory.start);
        let touched = self.tensors[first..].iter().enumerate();
        for (index, tensor) in touched.take_while(|(_, t)| t.memory.start < memory.end) {
            let (from, to) =
                (tensor.memory.start.max(memory.start), tensor.memory.end.min(memory.end));
            // The last one sees what all others have brought.
            if tensor.missing_bytes.fetch_sub(to - from, Ordering::AcqRel) == to - from {
                self.state().ready.push(first + index);
                self.changed.notify_all();
            }
        }
    }

    /// Compares what arrives until all is done, or `wait` gives up.
    pub(super) fn while_working<T>(&self, wait: impl FnOnce() -> Result<T>) -> Result<T> {
        let cores = thread::available_parallelism().map_or(1, NonZero::get);
        thread::scope(|scope| {
            for _ in 0..cores.min(THREADS_MAX).min(self.tensors.len()) {
                scope.spawn(|| self.work());
            }
            // Also if it panics.
            let _stop = Stop(self);
            wait()
        })
    }

    /// Whether all is done, waiting for so long at most.
    ///
    /// # Errors
    /// [`Error::Checksum`].
    pub(super) fn wait_timeout(&self, most: Duration) -> Result<bool> {
        let open = |state: &mut State| state.failed.is_none() && state.done < self.tensors.len();
        let state = self.changed.wait_timeout_while(self.state(), most, open);
        let (state, _) = state.unwrap_or_else(PoisonError::into_inner);
        state.failed.clone().map_or(Ok(state.done == self.tensors.len()), Err)
    }

    /// Whether something is not right so far.
    pub(super) fn check(&self) -> Result<()> {
        self.state().failed.clone().map_or(Ok(()), Err)
    }

    fn work(&self) {
        loop {
            let idle = |state: &mut State| state.ready.is_empty() && !state.stopped;
            let state = self.changed.wait_while(self.state(), idle);
            let mut state = state.unwrap_or_else(PoisonError::into_inner);
            let Some(index) = state.ready.pop().filter(|_| !state.stopped) else { return };
            drop(state);
            let checked = self.tensors[index].check();
            let mut state = self.state();
            match checked {
                Ok(()) => state.done += 1,
                Err(error) => _ = state.failed.get_or_insert(error),
            }
            self.changed.notify_all();
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tensor {
    fn check(&self) -> Result<()> {
        let at = ptr::with_exposed_provenance::<u8>(self.memory.start);
        // SAFETY: all of it has arrived; see `Checking::new`.
        let bytes = unsafe { std::slice::from_raw_parts(at, self.memory.len()) };
        let share_bytes = self.of.share_bytes() as usize;
        let mut shares = bytes.chunks_exact(share_bytes).enumerate();
        shares.try_for_each(|(share, bytes)| self.of.check(share, bytes))
    }
}

struct Stop<'a>(&'a Checking);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.state().stopped = true;
        self.0.changed.notify_all();
    }
}

//! What a context and its backend share: cancel, errors, how long reads were waited for, what
//! computing needs.

use std::collections::BTreeMap;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tierstream_io::Ticket;

use crate::abi::*;
use crate::error::{Error, Result};
use crate::gpu::Miss;
use crate::memory::Memory;
use crate::plan::Plan;
use crate::prefetch::Prefetch;
use crate::recorder::Recorder;
use crate::replay::Replay;
use crate::stalls::Stalls;
use crate::weights::WeightTable;
use crate::workspace::{Needs, Workspace, take_work_buffer};

/// How a context computes.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Manner {
    /// Compute threads.
    pub(crate) threads: i32,
    /// Whether it reads ahead.
    pub(crate) prefetch: Prefetch,
    /// What it does with experts that a GPU misses.
    pub(crate) miss: Miss,
    /// Whether it may compute single tokens as a whole on a GPU.
    pub(crate) as_a_whole: bool,
}

/// What a context and its backend share.
#[derive(Debug)]
pub(crate) struct Control {
    /// The inner backend, until ggml frees ours.
    inner: AtomicPtr<ggml_backend>,
    cancel: AtomicBool,
    /// The reads that the compute thread waits for.
    awaited: Mutex<Option<Arc<Ticket>>>,
    error: Mutex<Option<Error>>,
    manner: Manner,
    /// The compute threads, as long as the context lives.
    threadpool: AtomicPtr<ggml_threadpool>,
    /// A layer whose experts only the GPU can compute, and why: the first one.
    only_on_gpu: Mutex<Option<(usize, String)>>,
    /// What the graphs that the context reserves need, until it is made.
    needs: Mutex<Option<Needs>>,
    /// MoE layers that no router can guess for, and why, as those graphs show.
    unguessed: Mutex<BTreeMap<usize, &'static str>>,
    /// Allocated with the context, for the executor to take; and [`Workspace::mappings`].
    scratch: Mutex<Option<(Memory, usize)>>,
    /// Routing in place of the router's.
    replay: Mutex<Option<Arc<Replay>>>,
    /// What routers choose, for who asks.
    pub(crate) recorder: Recorder,
    /// Tokens that were computed as a whole.
    pub(crate) whole_tokens: AtomicU64,
    /// How long the compute thread waited for reads.
    pub(crate) stalls: Arc<Stalls>,
}

impl Control {
    /// Of a context that is being made.
    pub(crate) fn new(inner: ggml_backend_t, manner: Manner) -> Self {
        Self {
            inner: AtomicPtr::new(inner),
            cancel: AtomicBool::new(false),
            awaited: Mutex::new(None),
            error: Mutex::new(None),
            manner,
            threadpool: AtomicPtr::new(ptr::null_mut()),
            only_on_gpu: Mutex::new(None),
            needs: Mutex::new(Some(Needs::default())),
            unguessed: Mutex::default(),
            scratch: Mutex::new(None),
            replay: Mutex::new(None),
            recorder: Recorder::default(),
            whole_tokens: AtomicU64::new(0),
            stalls: Arc::default(),
        }
    }

    /// Whether the executor reads ahead.
    pub(crate) fn prefetch(&self) -> Prefetch {
        self.manner.prefetch
    }

    /// Whether single tokens may be computed as a whole.
    pub(crate) fn may_compute_as_a_whole(&self) -> bool {
        self.manner.as_a_whole
    }

    /// What the executor does with experts that a GPU misses.
    pub(crate) fn miss(&self) -> Miss {
        self.manner.miss
    }

    /// How many compute threads there are, and they themselves, null until they are there.
    pub(crate) fn threads(&self) -> (i32, ggml_threadpool_t) {
        (self.manner.threads, self.threadpool.load(Ordering::Acquire))
    }

    pub(crate) fn set_threadpool(&self, threadpool: ggml_threadpool_t) {
        self.threadpool.store(threadpool, Ordering::Release);
    }

    /// Notes that only the GPU can compute the experts of a layer, and why.
    pub(crate) fn note_only_on_gpu(&self, layer: usize, why: String) {
        let mut known = self.only_on_gpu.lock().unwrap_or_else(PoisonError::into_inner);
        known.get_or_insert((layer, why));
    }

    /// The first layer of which that was noted.
    pub(crate) fn only_on_gpu(&self) -> Option<(usize, String)> {
        self.only_on_gpu.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Routing in place of the router's, if there is one.
    pub(crate) fn replay(&self) -> Option<Arc<Replay>> {
        self.replay.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn set_replay(&self, replay: Option<Arc<Replay>>) {
        *self.replay.lock().unwrap_or_else(PoisonError::into_inner) = replay;
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
        // Whoever cancels from here on finds the ticket; who did so before is seen here, and once
        // seen it counts, whatever is reset meanwhile: the ticket may be cancelled by now.
        let cancelled = || Err(tierstream_io::Error::Cancelled);
        let arrived = if self.is_cancelled() { cancelled() } else { ticket.wait() };
        *self.awaited() = None;
        match arrived {
            _ if self.is_cancelled() => Err(Error::Cancelled),
            // Reset already, but the reads are or may be cancelled.
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

    /// Takes in a graph that the context reserves, until it is made. `is_expert` knows pooled
    /// weights; `slots` is the most that a window of the pool can have.
    pub(crate) fn include(
        &self,
        graph: &ggml_cgraph,
        is_expert: &dyn Fn(*const ggml_tensor) -> bool,
        slots: usize,
    ) {
        if let Some(needs) = &mut *self.needs.lock().unwrap_or_else(PoisonError::into_inner) {
            needs.include(graph, is_expert, slots, self.manner.threads);
        }
    }

    /// Whether the context reserves its graphs.
    pub(crate) fn is_being_made(&self) -> bool {
        self.needs.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Looks for the routers of a graph that the context reserves, where they are to guess.
    pub(crate) fn look_for_routers(&self, graph: &ggml_cgraph, table: &WeightTable) {
        if !self.is_being_made() || !self.manner.prefetch.uses_routers() {
            return;
        }
        // What cannot be planned is told of elsewhere.
        let Ok(plan) = Plan::new(graph, table, true) else { return };
        let mut unguessed = self.unguessed.lock().unwrap_or_else(PoisonError::into_inner);
        unguessed.extend(plan.unguessed());
    }

    /// The MoE layers that no router guesses for, and why.
    pub(crate) fn unguessed(&self) -> Vec<(usize, &'static str)> {
        let unguessed = self.unguessed.lock().unwrap_or_else(PoisonError::into_inner);
        unguessed.iter().map(|(&layer, &why)| (layer, why)).collect()
    }

    /// What the graphs of the context needed while it was made. Later graphs are no larger.
    pub(crate) fn take_needs(&self) -> Needs {
        let needs = self.needs.lock().unwrap_or_else(PoisonError::into_inner).take();
        needs.unwrap_or_default()
    }

    /// Allocates what the host executor and ggml-cpu need beside the graphs' own tensors.
    pub(crate) fn reserve(&self, workspace: &Workspace) -> Result<()> {
        let inner = self.inner();
        take_work_buffer(inner, workspace.work_bytes)?;
        // SAFETY: a live backend, and its buffer type, which lives for ever.
        let buffer_type = unsafe { ggml_backend_get_default_buffer_type(inner.cast()) };
        let memory = Memory::scratch(buffer_type.cast(), workspace.scratch_bytes)?;
        *self.scratch.lock().unwrap_or_else(PoisonError::into_inner) =
            Some((memory, workspace.mappings));
        Ok(())
    }

    /// The executor's memory, once, and how wide its windows may be.
    pub(crate) fn take_scratch(&self) -> Option<(Memory, usize)> {
        self.scratch.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Why the last graph failed.
    pub(crate) fn take_error(&self) -> Option<Error> {
        self.error.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    pub(crate) fn fail(&self, error: Error) {
        *self.error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
    }
}

//! The executor for GPUs: routing is read back to the host before each MoE layer, missing records
//! are brought into the GPU's memory, and the layer's matmuls are pointed at them.
//!
//! A single token is computed over slots, wherever its experts lie: its kernels take one expert
//! after the other. Several tokens are computed over whole layers in expert order
//! ([`crate::residency::Stage`]), because the bits that their kernels give depend on that. Both ways
//! give those of the resident model.
//!
//! The GPU computes on its own time. What a layer uses is held until the next layer's routing has
//! been read, for by then it is done.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use tierstream_io::{Priority, Ticket};

use crate::abi::*;
use crate::control::Control;
use crate::error::{Error, Result};
use crate::executor::Executor;
use crate::memory;
use crate::plan::{Plan, Plans, Routing, Segment, nodes};
use crate::pooled::Pooled;
use crate::residency::{Residency, Stage, Step, Waits};
use crate::routed::{Routed, slot_range};
use crate::segment::{Run, outcome, run_exchanged, run_nodes, run_resident, synchronize};

/// The executor for inner backends with memory of their own.
pub(crate) struct OnGpu {
    inner: ggml_backend_t,
    control: Arc<Control>,
    plans: Plans,
    routed: Routed,
    ids: Option<Ids>,
    /// Single tokens computed with replayed routing.
    replayed: usize,
    /// What the layer uses that is being computed.
    held: Option<Held>,
}

enum Held {
    Step(Box<Step>),
    Stage { _stage: Stage },
}

impl Executor for OnGpu {
    fn compute(&mut self, pooled: &Pooled, graph: *mut ggml_cgraph) -> Result<ggml_status> {
        // SAFETY: ggml passes a graph that stays as it is for the call.
        let graph = unsafe { &*graph };
        let plan = self.plans.take(graph, &pooled.table())?;
        let run = self.run_plan(pooled, graph, &plan);
        self.plans.put(graph, plan);
        // Other contexts may wait for what the last layer uses.
        if self.held.is_some() {
            synchronize(self.inner);
        }
        let released = self.release();
        let status = outcome(run)?;
        released.map(|()| status)
    }
}

impl OnGpu {
    pub(crate) fn new(inner: ggml_backend_t, control: Arc<Control>) -> Self {
        let (plans, routed) = (Plans::new(false), Routed::default());
        Self { inner, control, plans, routed, ids: None, replayed: 0, held: None }
    }

    fn run_plan(&mut self, pooled: &Pooled, graph: &ggml_cgraph, plan: &Plan) -> Run {
        if !plan.has_experts() {
            return run_nodes(self.inner, graph, 0, nodes(graph).len(), graph.uid);
        }
        let no_pool = || Error::SelfCheck("expert weights are used before there is a pool".into());
        let residency = pooled.residency().ok_or_else(no_pool)?.clone();
        residency.look_after_memory()?;
        if let Some(bases) = &*residency.identity() {
            let run = run_resident(self.inner, &residency, graph, plan, bases);
            // Who takes slots away waits for the lock, and not for the GPU.
            synchronize(self.inner);
            return run;
        }
        for segment in &plan.segments {
            if self.control.is_cancelled() {
                return Err(Error::Cancelled.into());
            }
            match &segment.routing {
                None => run_nodes(self.inner, graph, segment.start, segment.end, 0)?,
                Some(routing) => self.run_layer(&residency, graph, segment, routing)?,
            }
        }
        Ok(())
    }

    /// Gives up what the layer used that was computed last. Everything has been waited for.
    fn release(&mut self) -> Result<()> {
        match self.held.take() {
            Some(Held::Step(step)) => step.finish(),
            Some(Held::Stage { .. }) | None => Ok(()),
        }
    }

    /// One MoE layer: everything from its first expert matmul to the next layer's.
    fn run_layer(
        &mut self,
        residency: &Arc<Residency>,
        graph: &ggml_cgraph,
        segment: &Segment,
        routing: &Routing,
    ) -> Run {
        // Until the router has spoken: reading a tensor does not wait for what computes it.
        synchronize(self.inner);
        self.release()?;
        let layer = residency.layer(routing.layer);
        self.routed
            .read(routing, layer.experts)
            .map_err(|reason| Error::Graph { layer: layer.block, reason })?;
        if self.routed.pairs() == 0 {
            return run_nodes(self.inner, graph, segment.start, segment.end, 0);
        }
        if self.routed.n_tokens == 1
            && let Some(replay) = self.control.replay()
        {
            let shape = (self.routed.n_used, layer.experts);
            let experts = replay.experts(self.replayed, routing.layer, shape)?;
            self.routed.replace(experts, layer.experts);
            self.replayed += usize::from(routing.layer + 1 == residency.layers().len());
        }
        if self.routed.n_tokens == 1
            && let Some(step) = self.bring_to_slots(residency, routing)?
        {
            self.run_over_slots(residency, graph, segment, routing, &step)?;
            self.held = Some(Held::Step(Box::new(step)));
            return Ok(());
        }
        let control = self.control.clone();
        let cancelled = || control.is_cancelled();
        let mut wait = |ticket: &Arc<Ticket>| stall(&control, || control.wait_for(ticket));
        let needs = self.routed.needs();
        let mut meanwhile = || Ok(());
        let waits = Waits { cancelled: &cancelled, ticket: &mut wait, meanwhile: &mut meanwhile };
        let stage = residency.stage(routing.layer, needs, waits)?;
        let whole = |part| stage.tensor(part);
        run_exchanged(self.inner, graph, segment, routing, whole, None)?;
        self.held = Some(Held::Stage { _stage: stage });
        Ok(())
    }

    /// Brings what one token needs into slots. None if there are not enough at the moment, because
    /// of other contexts.
    fn bring_to_slots(
        &mut self,
        residency: &Arc<Residency>,
        routing: &Routing,
    ) -> Result<Option<Step>> {
        let cancelled = || self.control.is_cancelled();
        let mut step = residency.acquire(routing.layer, self.routed.needs(), None, &cancelled)?;
        match step.arriving().len() {
            0 => {}
            1 => {
                let parts: Vec<usize> = routing.ops().map(|op| op.part).collect();
                let load = step.load(&parts, 0, Priority::Demand);
                let mut ticket = |ticket: &Arc<Ticket>| self.control.wait_for(ticket);
                let mut meanwhile = || Ok(());
                let waits =
                    Waits { cancelled: &cancelled, ticket: &mut ticket, meanwhile: &mut meanwhile };
                stall(&self.control, || step.wait(load, waits))?;
            }
            _ => return Ok(None),
        }
        Ok(Some(step))
    }

    /// The segment as it is, over slots.
    fn run_over_slots(
        &mut self,
        residency: &Residency,
        graph: &ggml_cgraph,
        segment: &Segment,
        routing: &Routing,
        step: &Step,
    ) -> Run {
        let placed = [step.hits(), step.arriving().first().map_or(&[][..], |group| group)].concat();
        let (low, high) = slot_range(&placed);
        self.routed.map(&placed, low);
        let ids = Ids::take(&mut self.ids, self.inner, self.routed.pairs())?;
        let ids = ids.set(self.inner, &self.routed);
        let window = |part| residency.window(routing.layer, part, low, high);
        run_exchanged(self.inner, graph, segment, routing, window, Some(ids))
    }
}

impl Drop for OnGpu {
    fn drop(&mut self) {
        // A backend that is freed may still compute.
        synchronize(self.inner);
        let _ = self.release();
    }
}

/// Counts the time that `wait` takes as waiting for reads.
fn stall<T>(control: &Control, wait: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let done = wait();
    let waited = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
    control.stall_ns.fetch_add(waited, Ordering::Relaxed);
    done
}

/// Numbers of slots, in the backend's own memory.
struct Ids {
    buffer: ggml_backend_buffer_t,
    room: usize,
}

impl Ids {
    /// With room for `count` of them.
    fn take(this: &mut Option<Ids>, inner: ggml_backend_t, count: usize) -> Result<&Ids> {
        if this.as_ref().is_none_or(|ids| ids.room < count) {
            *this = None;
            let bytes = (count * size_of::<i32>()).next_multiple_of(256);
            // SAFETY: a live backend, whose buffer type lives for ever.
            let buffer = unsafe {
                let buffer_type = ggml_backend_get_default_buffer_type(inner.cast());
                ggml_backend_buft_alloc_buffer(buffer_type, bytes)
            };
            if buffer.is_null() {
                return Err(Error::OutOfMemory { bytes, what: "numbers of slots on the GPU" });
            }
            *this = Some(Ids { buffer: buffer.cast(), room: bytes / size_of::<i32>() });
        }
        Ok(this.as_ref().expect("just made"))
    }

    /// The slots of `routed` as a tensor; set behind what the backend has to compute, which may
    /// still read the ones before.
    fn set(&self, inner: ggml_backend_t, routed: &Routed) -> ggml_tensor {
        let shape = [memory::to_ne(routed.n_used), memory::to_ne(routed.n_tokens), 1];
        // SAFETY: a live buffer, with room for them; the values are taken before the call returns
        // (a copy from pageable memory of less than 64 KiB: CUDA driver API, "API synchronization
        // behavior").
        unsafe {
            let base = ggml_backend_buffer_get_base(self.buffer.cast()).cast();
            let mut tensor = memory::tensor(self.buffer, GGML_TYPE_I32, shape, base);
            let bytes = size_of_val(routed.slots.as_slice());
            let values = routed.slots.as_ptr().cast();
            ggml_backend_tensor_set_async(inner.cast(), &raw mut tensor, values, 0, bytes);
            tensor
        }
    }
}

impl Drop for Ids {
    fn drop(&mut self) {
        // SAFETY: ours, freed once; the executor waits for its backend before.
        unsafe { ggml_backend_buffer_free(self.buffer.cast()) };
    }
}

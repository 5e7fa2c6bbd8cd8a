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

use std::collections::HashMap;
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
use crate::residency::{Looked, Placed, Residency, Stage, Step, Waits};
use crate::routed::Routed;
use crate::segment::{Patch, Run, outcome, run_exchanged, run_nodes, run_resident, synchronize};

use self::compute::Misses;
pub(crate) use self::compute::look_for_chains;
pub use self::miss::Miss;

mod compute;
mod cpu;
mod miss;
mod rates;

/// The executor for inner backends with memory of their own.
pub(crate) struct OnGpu {
    inner: ggml_backend_t,
    control: Arc<Control>,
    plans: Plans,
    routed: Routed,
    over_slots: OverSlots,
    misses: Misses,
    /// Single tokens computed with replayed routing.
    replayed: usize,
    /// What the layer uses that is being computed.
    held: Option<Held>,
    /// The layer after it, if it is there already.
    next: Option<Stage>,
    /// What each layer needed in the last batch of several tokens.
    last: HashMap<usize, Vec<u32>>,
}

enum Held {
    Step(Box<Step>),
    Stage { _stage: Stage },
    Looked { _looked: Looked },
}

impl Executor for OnGpu {
    fn compute(&mut self, pooled: &Pooled, graph: *mut ggml_cgraph) -> Result<ggml_status> {
        // SAFETY: ggml passes a graph that stays as it is for the call.
        let graph = unsafe { &*graph };
        let plan = self.plans.take(graph, &pooled.table())?;
        let run = self.run_plan(pooled, graph, &plan);
        self.plans.put(graph, plan);
        self.next = None;
        // Other contexts may wait for what the last layer uses.
        if self.held.is_some() {
            synchronize(self.inner);
        }
        let released = self.release();
        let settled = self.misses.settle();
        let status = outcome(run)?;
        released.and(settled).map(|()| status)
    }
}

impl OnGpu {
    pub(crate) fn new(inner: ggml_backend_t, control: Arc<Control>) -> Self {
        let (plans, routed) = (Plans::new(false), Routed::default());
        let over_slots = OverSlots::default();
        let misses = Misses::new(control.miss());
        Self {
            inner,
            control,
            plans,
            routed,
            over_slots,
            misses,
            replayed: 0,
            held: None,
            next: None,
            last: HashMap::new(),
        }
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
        for (index, segment) in plan.segments.iter().enumerate() {
            if self.control.is_cancelled() {
                return Err(Error::Cancelled.into());
            }
            match &segment.routing {
                None => run_nodes(self.inner, graph, segment.start, segment.end, 0)?,
                Some(routing) => {
                    self.run_layer(&residency, graph, segment, routing)?;
                    self.stage_next(&residency, plan.segments.get(index + 1))?;
                }
            }
        }
        Ok(())
    }

    /// Gives up what the layer used that was computed last. Everything has been waited for.
    fn release(&mut self) -> Result<()> {
        match self.held.take() {
            Some(Held::Step(step)) => step.finish(),
            Some(Held::Stage { .. } | Held::Looked { .. }) | None => Ok(()),
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
            && self.run_beside_processor(residency, graph, segment, routing)?
        {
            return Ok(());
        }
        if self.routed.n_tokens == 1
            && let Some(step) = self.bring_to_slots(residency, routing)?
        {
            self.run_over_slots(residency, graph, segment, routing, &step)?;
            self.held = Some(Held::Step(Box::new(step)));
            return Ok(());
        }
        let experts: Vec<u32> = self.routed.needs().iter().map(|n| n.expert).collect();
        let ready = self.next.take().filter(|stage| stage.layer() == routing.layer);
        let mut stage = match ready {
            Some(stage) => stage,
            None => residency.stage(routing.layer, &|| self.control.is_cancelled())?,
        };
        staging(&self.control, |waits| stage.bring(&experts, waits))?;
        let whole = |part| stage.tensor(part);
        run_exchanged(self.inner, graph, segment, routing, whole, None)?;
        let kept = stage.keep(self.routed.needs());
        self.held = Some(Held::Stage { _stage: stage });
        self.last.insert(routing.layer, experts);
        Ok(kept?)
    }

    /// While the GPU computes over a whole layer, brings what the next one needed in the batch before.
    fn stage_next(&mut self, residency: &Arc<Residency>, next: Option<&Segment>) -> Result<()> {
        let Some(Held::Stage { .. }) = &self.held else { return Ok(()) };
        let routing = next.and_then(|segment| segment.routing.as_ref());
        let needed = |routing: &Routing| self.last.get(&routing.layer).map(|e| (routing.layer, e));
        let Some((layer, experts)) = routing.and_then(needed) else { return Ok(()) };
        let ahead = |waits: Waits<'_>| residency.stage_ahead(layer, experts, waits);
        self.next = staging(&self.control, ahead)?;
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
                let watched = self.misses.watch(residency, routing.layer, &step.arriving()[0]);
                stall(&self.control, || step.wait(load, waits))?;
                self.misses.copied(watched);
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
        let _patch = self.over_slots(residency, graph, routing, &placed)?;
        run_nodes(self.inner, graph, segment.start, segment.end, 0)
    }

    /// Has the expert matmuls read slots: those of all routed experts, which are in `placed`.
    fn over_slots(
        &mut self,
        residency: &Residency,
        graph: &ggml_cgraph,
        routing: &Routing,
        placed: &[Placed],
    ) -> Result<Patch> {
        self.routed.map(placed, 0);
        let all = nodes(graph);
        let mut patch = Patch::default();
        let ids = self.over_slots.ids(self.inner, &self.routed)?;
        for op in routing.ops() {
            patch.source(all[op.node], 2, ids);
            patch.source(
                all[op.node],
                0,
                self.over_slots.weights(residency, routing.layer, op.part),
            );
        }
        Ok(patch)
    }
}

impl Drop for OnGpu {
    fn drop(&mut self) {
        // A backend that is freed may still compute.
        synchronize(self.inner);
        let _ = self.release();
    }
}

/// Brings a layer to the area, waiting as a context does.
fn staging<T>(control: &Control, stage: impl FnOnce(Waits<'_>) -> Result<T>) -> Result<T> {
    let cancelled = || control.is_cancelled();
    let mut ticket = |ticket: &Arc<Ticket>| stall(control, || control.wait_for(ticket));
    let mut meanwhile = || Ok(());
    stage(Waits { cancelled: &cancelled, ticket: &mut ticket, meanwhile: &mut meanwhile })
}

/// Counts the time that `wait` takes as waiting for reads.
fn stall<T>(control: &Control, wait: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let done = wait();
    let waited = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
    control.stall_ns.fetch_add(waited, Ordering::Relaxed);
    done
}

/// What nodes get instead of the model's weights and the router's ids. The same tensors whenever a
/// layer comes again, over all slots of its class: ggml-cuda captures a part of a graph only if
/// everything that its nodes name stays as it is, and launches kernel by kernel otherwise.
#[derive(Default)]
struct OverSlots {
    ids: Option<Ids>,
    weights: HashMap<(usize, usize), Box<ggml_tensor>>,
}

impl OverSlots {
    /// All slots of a part of a layer's records.
    fn weights(&mut self, residency: &Residency, layer: usize, part: usize) -> *mut ggml_tensor {
        let all = || Box::new(residency.window(layer, part, 0, residency.slots_of(layer) - 1));
        &raw mut **self.weights.entry((layer, part)).or_insert_with(all)
    }

    /// The slots of `routed`; set behind what the backend has to compute, which may still read the
    /// ones before.
    fn ids(&mut self, inner: ggml_backend_t, routed: &Routed) -> Result<*mut ggml_tensor> {
        let shape = [memory::to_ne(routed.n_used), memory::to_ne(routed.n_tokens), 1];
        if self.ids.as_ref().is_none_or(|ids| ids.tensor.ne[..3] != shape) {
            self.ids = None;
            self.ids = Some(Ids::new(inner, shape)?);
        }
        let ids = self.ids.as_mut().expect("just made");
        let bytes = size_of_val(routed.slots.as_slice());
        let values = routed.slots.as_ptr().cast();
        // SAFETY: a tensor of this size in a live buffer; the values are taken before the call
        // returns (a copy from pageable memory of less than 64 KiB: CUDA driver API, "API
        // synchronization behavior").
        unsafe {
            ggml_backend_tensor_set_async(inner.cast(), &raw mut *ids.tensor, values, 0, bytes)
        };
        Ok(&raw mut *ids.tensor)
    }
}

/// Numbers of slots, in the backend's own memory.
struct Ids {
    tensor: Box<ggml_tensor>,
    buffer: ggml_backend_buffer_t,
}

impl Ids {
    fn new(inner: ggml_backend_t, shape: [i64; 3]) -> Result<Self> {
        let count: i64 = shape.iter().product();
        let bytes = usize::try_from(count).unwrap_or(0) * size_of::<i32>();
        // SAFETY: a live backend, whose buffer type lives for ever.
        let buffer: ggml_backend_buffer_t = unsafe {
            let buffer_type = ggml_backend_get_default_buffer_type(inner.cast());
            ggml_backend_buft_alloc_buffer(buffer_type, bytes.next_multiple_of(256))
        }
        .cast();
        if buffer.is_null() {
            return Err(Error::OutOfMemory { bytes, what: "numbers of slots on the GPU" });
        }
        // SAFETY: a live buffer, with room for the tensor.
        let tensor = unsafe {
            let base = ggml_backend_buffer_get_base(buffer.cast()).cast();
            memory::tensor(buffer, GGML_TYPE_I32, shape, base)
        };
        Ok(Self { tensor: Box::new(tensor), buffer })
    }
}

impl Drop for Ids {
    fn drop(&mut self) {
        // SAFETY: ours, freed once; the executor waits for its backend before.
        unsafe { ggml_backend_buffer_free(self.buffer.cast()) };
    }
}

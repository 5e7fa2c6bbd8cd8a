//! The host executor: routing is read back to the host before each MoE layer, faults are served,
//! and the layer's matmuls are pointed at slots.
//!
//! When every routed record is resident, the segment runs as llama.cpp built it, with two sources
//! of each expert matmul exchanged for the call: the weights for a window of the pool, the ids for
//! slots. When some are missing, the expert matmuls are computed in groups of experts, resident
//! ones first, while the reads of the others are in flight (`gather`). A matmul with an expert's
//! rows gives the same bits whatever other experts are in the call, provided that all rows of one
//! expert stay in one call (ggml-cpu chooses its kernel by their number), so both ways are exact
//! on the CPU backend.

use std::ptr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use self::gather::{Op, Scratch};
use self::loads::Loads;
use self::lookahead::Lookahead;
pub use self::lookahead::Prefetch;
use self::routed::Routed;
use crate::abi::*;
use crate::control::Control;
use crate::error::{Error, Result};
use crate::executor::Executor;
use crate::plan::{Plan, Routing, Segment, nodes, view};
use crate::pooled::Pooled;
use crate::residency::{Placed, Residency, Step};

mod gather;
mod loads;
mod lookahead;
mod routed;

/// Graphs whose plans are kept. llama.cpp alternates between a few (prefill, decode).
const PLANS_KEPT: usize = 4;

/// Why a graph was not computed to its end.
enum Halt {
    /// The inner backend said so.
    Status(ggml_status),
    Error(Error),
}

impl From<Error> for Halt {
    fn from(error: Error) -> Self {
        Halt::Error(error)
    }
}

type Run<T = ()> = std::result::Result<T, Halt>;

fn done(status: ggml_status) -> Run {
    if status == GGML_STATUS_SUCCESS { Ok(()) } else { Err(Halt::Status(status)) }
}

/// The executor for inner backends that compute in host memory.
pub(crate) struct Host {
    inner: ggml_backend_t,
    control: Arc<Control>,
    plans: Vec<(u64, Plan)>,
    routed: Routed,
    scratch: Scratch,
    lookahead: Lookahead,
}

impl Executor for Host {
    fn compute(&mut self, pooled: &Pooled, graph: *mut ggml_cgraph) -> Result<ggml_status> {
        // SAFETY: ggml passes a graph that stays as it is for the call.
        let graph = unsafe { &*graph };
        if let Some((memory, mappings)) = self.control.take_scratch() {
            self.scratch.reserve(memory, mappings);
        }
        let plan = self.take_plan(pooled, graph)?;
        let run = self.run_plan(pooled, graph, &plan);
        self.lookahead.forget();
        if graph.uid != 0 {
            self.plans.push((graph.uid, plan));
        }
        match run {
            Ok(()) => Ok(GGML_STATUS_SUCCESS),
            Err(Halt::Status(status)) => Ok(status),
            Err(Halt::Error(error)) => Err(error),
        }
    }
}

impl Host {
    pub(crate) fn new(inner: ggml_backend_t, control: Arc<Control>) -> Self {
        let lookahead = Lookahead::new(inner, control.prefetch());
        Self {
            inner,
            control,
            plans: Vec::new(),
            routed: Routed::default(),
            scratch: Scratch::new(inner),
            lookahead,
        }
    }

    fn run_plan(&mut self, pooled: &Pooled, graph: &ggml_cgraph, plan: &Plan) -> Run {
        if !plan.has_experts() {
            return self.run_nodes(graph, 0, nodes(graph).len(), graph.uid);
        }
        let no_pool = || Error::SelfCheck("expert weights are used before there is a pool".into());
        let residency = pooled.residency().ok_or_else(no_pool)?.clone();
        if let Some(bases) = &*residency.identity() {
            return self.run_resident(&residency, graph, plan, bases);
        }
        for (index, segment) in plan.segments.iter().enumerate() {
            if self.control.is_cancelled() {
                return Err(Error::Cancelled.into());
            }
            let next = plan.segments.get(index + 1).and_then(|s| s.routing.as_ref());
            match &segment.routing {
                None => self.run_nodes(graph, segment.start, segment.end, 0)?,
                Some(routing) => self.run_layer(&residency, graph, segment, routing, next)?,
            }
        }
        Ok(())
    }

    /// Every record sits in expert order: only the weights need exchanging, in one call.
    fn run_resident(
        &mut self,
        residency: &Residency,
        graph: &ggml_cgraph,
        plan: &Plan,
        bases: &[u32],
    ) -> Run {
        let all = nodes(graph);
        let routings = || plan.segments.iter().filter_map(|s| s.routing.as_ref());
        let mut windows = Vec::new();
        for routing in routings() {
            let (base, experts) = (bases[routing.layer], residency.layer(routing.layer).experts);
            for op in routing.ops() {
                let window = residency.window(routing.layer, op.part, base, base + experts - 1);
                windows.push((all[op.node], window));
            }
        }
        let mut patch = Patch::default();
        for (node, window) in &mut windows {
            patch.source(*node, 0, ptr::from_mut(window));
        }
        self.run_nodes(graph, 0, all.len(), graph.uid)?;
        for routing in routings() {
            // SAFETY: a live tensor of the graph.
            let tokens = unsafe { (*routing.ids).ne[1] };
            residency.count_resident(routing.layer, tokens.unsigned_abs());
        }
        Ok(())
    }

    /// One MoE layer: everything from its first expert matmul to the next layer's.
    fn run_layer(
        &mut self,
        residency: &Arc<Residency>,
        graph: &ggml_cgraph,
        segment: &Segment,
        routing: &Routing,
        next: Option<&Routing>,
    ) -> Run {
        synchronize(self.inner);
        let layer = residency.layer(routing.layer);
        self.routed
            .read(routing, layer.experts)
            .map_err(|reason| Error::Graph { layer: layer.block, reason })?;
        if self.routed.pairs() == 0 {
            return self.run_nodes(graph, segment.start, segment.end, 0);
        }
        let cancelled = || self.control.is_cancelled();
        let ahead = self.lookahead.take(routing.layer, self.routed.needs());
        let needs = self.routed.needs();
        let mut step = residency.acquire(routing.layer, needs, ahead, &cancelled)?;
        let window = slot_range(step.hits());
        let fits = || self.scratch.window_fits(window, self.routed.pairs());
        if step.arriving().is_empty() && fits() {
            self.lookahead.look(self.inner, residency, routing, next)?;
            self.run_whole(residency, graph, segment, routing, step.hits())?;
        } else {
            let mut loads = Loads::new(&routing.stages, &mut step);
            self.lookahead.look(self.inner, residency, routing, next)?;
            self.run_in_groups(residency, graph, segment, routing, &mut step, &mut loads)?;
        }
        Ok(step.finish()?)
    }

    /// All routed records are resident: the segment as it is, over slots.
    fn run_whole(
        &mut self,
        residency: &Residency,
        graph: &ggml_cgraph,
        segment: &Segment,
        routing: &Routing,
        placed: &[Placed],
    ) -> Run {
        let (low, high) = slot_range(placed);
        self.routed.map(placed, low);
        let mut ids = self.scratch.ids(&self.routed)?;
        let all = nodes(graph);
        let mut windows: Vec<_> = routing
            .ops()
            .map(|op| (all[op.node], residency.window(routing.layer, op.part, low, high)))
            .collect();
        let mut patch = Patch::default();
        for (node, window) in &mut windows {
            patch.source(*node, 0, ptr::from_mut(window));
            patch.source(*node, 2, &raw mut ids);
        }
        self.run_nodes(graph, segment.start, segment.end, 0)
    }

    /// Some routed records are missing: expert matmuls in groups, all else as it is.
    fn run_in_groups(
        &mut self,
        residency: &Residency,
        graph: &ggml_cgraph,
        segment: &Segment,
        routing: &Routing,
        step: &mut Step,
        loads: &mut Loads,
    ) -> Run {
        let all = nodes(graph);
        let mut at = segment.start;
        for (index, stage) in routing.stages.iter().enumerate() {
            let ops: Vec<Op> =
                stage.ops.iter().map(|op| Op { node: all[op.node], part: op.part }).collect();
            self.run_nodes(graph, at, stage.first(), 0)?;
            self.run_stage(residency, routing.layer, &ops, index, loads, step)?;
            at = stage.last() + 1;
        }
        self.run_nodes(graph, at, segment.end, 0)
    }

    /// The matmuls of a stage: resident records first, then each group as it arrives.
    fn run_stage(
        &mut self,
        residency: &Residency,
        layer: usize,
        ops: &[Op],
        stage: usize,
        loads: &mut Loads,
        step: &mut Step,
    ) -> Run {
        let Self { inner, control, routed, scratch, .. } = self;
        done(scratch.compute(*inner, residency, layer, ops, step.hits(), routed)?)?;
        for group in 0..step.arriving().len() {
            if control.is_cancelled() {
                return Err(Error::Cancelled.into());
            }
            let waiting = Instant::now();
            let load = loads.of(stage, group);
            step.tickets(load).try_for_each(|ticket| control.wait_for(ticket))?;
            let waited = u64::try_from(waiting.elapsed().as_nanos()).unwrap_or(u64::MAX);
            control.stall_ns.fetch_add(waited, Ordering::Relaxed);
            step.arrived(load)?;
            let placed = &step.arriving()[group];
            done(scratch.compute(*inner, residency, layer, ops, placed, routed)?)?;
            loads.computed(step, stage, group);
        }
        Ok(())
    }

    fn run_nodes(&self, graph: &ggml_cgraph, start: usize, end: usize, uid: u64) -> Run {
        if start == end {
            return Ok(());
        }
        let mut view = view(graph, start, end);
        view.uid = uid;
        done(compute_on(self.inner, &mut view))
    }

    /// The plan of `graph`, taken out of the cache or made.
    fn take_plan(&mut self, pooled: &Pooled, graph: &ggml_cgraph) -> Result<Plan> {
        let known = self.plans.iter().position(|(uid, _)| *uid == graph.uid && graph.uid != 0);
        if let Some(index) = known {
            return Ok(self.plans.remove(index).1);
        }
        if self.plans.len() >= PLANS_KEPT {
            self.plans.remove(0);
        }
        Plan::new(graph, &pooled.table(), self.control.prefetch() != Prefetch::Off)
    }
}

fn compute_on(backend: ggml_backend_t, graph: &mut ggml_cgraph) -> ggml_status {
    // SAFETY: a live backend and a graph whose tensors are allocated.
    unsafe { (*backend).iface.graph_compute.expect("every backend computes")(backend, graph) }
}

/// Waits until `backend` has computed what it was given.
fn synchronize(backend: ggml_backend_t) {
    // SAFETY: a live backend; the slot may be empty.
    unsafe {
        if let Some(f) = (*backend).iface.synchronize {
            f(backend);
        }
    }
}

fn slot_range(placed: &[Placed]) -> (u32, u32) {
    let slots = placed.iter().map(|p| p.slot);
    (slots.clone().min().unwrap_or(0), slots.max().unwrap_or(0))
}

/// Sources of nodes, exchanged for the time of a call.
#[derive(Default)]
struct Patch {
    saved: Vec<(*mut ggml_tensor, usize, *mut ggml_tensor)>,
}

impl Patch {
    fn source(&mut self, node: *mut ggml_tensor, index: usize, with: *mut ggml_tensor) {
        // SAFETY: a live node of the graph that is being computed, by this thread alone.
        let slot = unsafe { &mut (*node).src[index] };
        self.saved.push((node, index, *slot));
        *slot = with;
    }
}

impl Drop for Patch {
    fn drop(&mut self) {
        for &(node, index, original) in self.saved.iter().rev() {
            // SAFETY: as in `source`.
            unsafe { (*node).src[index] = original };
        }
    }
}

#[cfg(test)]
mod tests;

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

use std::sync::Arc;
use std::time::Instant;

use self::gather::{Op, Scratch};
use self::loads::Loads;
use self::lookahead::Lookahead;
use crate::abi::*;
use crate::control::Control;
use crate::error::{Error, Result};
use crate::executor::Executor;
use crate::plan::{Plan, Plans, Routing, Segment, nodes};
use crate::pooled::Pooled;
use crate::prefetch::Guesses;
use crate::recorder::read_floats;
use crate::residency::{Placed, Residency, Step};
use crate::routed::{Routed, slot_range};
use crate::segment::{Run, done, outcome, run_exchanged, run_nodes, run_resident, synchronize};

mod gather;
mod loads;
mod lookahead;

/// Tokens of a batch for which is read ahead: larger ones keep the drive busy as they are.
const READ_AHEAD_TOKENS_MAX: i64 = 8;

/// The executor for inner backends that compute in host memory.
pub(crate) struct Host {
    inner: ggml_backend_t,
    control: Arc<Control>,
    plans: Plans,
    routed: Routed,
    scratch: Scratch,
    guesses: Guesses,
    lookahead: Lookahead,
    /// Single tokens computed with replayed routing.
    replayed: usize,
}

impl Executor for Host {
    fn compute(&mut self, pooled: &Pooled, graph: *mut ggml_cgraph) -> Result<ggml_status> {
        // SAFETY: ggml passes a graph that stays as it is for the call.
        let graph = unsafe { &*graph };
        if let Some((memory, mappings)) = self.control.take_scratch() {
            self.scratch.reserve(memory, mappings);
        }
        let plan = self.plans.take(graph, &pooled.table())?;
        let start = Instant::now();
        let run = self.run_plan(pooled, graph, &plan);
        self.guesses.forget();
        if run.is_ok() && plan.tokens() == 1 {
            self.guesses.computed(start.elapsed());
        }
        self.plans.put(graph, plan);
        outcome(run)
    }
}

impl Host {
    pub(crate) fn new(inner: ggml_backend_t, control: Arc<Control>) -> Self {
        let mode = control.prefetch();
        Self {
            inner,
            plans: Plans::new(mode.uses_routers()),
            control,
            routed: Routed::default(),
            scratch: Scratch::new(inner),
            guesses: Guesses::new(mode),
            lookahead: Lookahead::new(inner),
            replayed: 0,
        }
    }

    fn run_plan(&mut self, pooled: &Pooled, graph: &ggml_cgraph, plan: &Plan) -> Run {
        if !plan.has_experts() {
            return run_nodes(self.inner, graph, 0, nodes(graph).len(), graph.uid);
        }
        let no_pool = || Error::SelfCheck("expert weights are used before there is a pool".into());
        let residency = pooled.residency().ok_or_else(no_pool)?.clone();
        let in_order = residency.identity();
        if let Some(bases) = in_order.as_ref().filter(|_| !self.control.recorder.is_on()) {
            return run_resident(self.inner, &residency, graph, plan, bases);
        }
        drop(in_order);
        for (index, segment) in plan.segments.iter().enumerate() {
            if self.control.is_cancelled() {
                return Err(Error::Cancelled.into());
            }
            match &segment.routing {
                None => run_nodes(self.inner, graph, segment.start, segment.end, 0)?,
                Some(routing) => self.run_layer(&residency, graph, plan, index, routing)?,
            }
        }
        Ok(())
    }

    /// One MoE layer: everything from its first expert matmul to the next layer's.
    fn run_layer(
        &mut self,
        residency: &Arc<Residency>,
        graph: &ggml_cgraph,
        plan: &Plan,
        index: usize,
        routing: &Routing,
    ) -> Run {
        let segment = &plan.segments[index];
        let next = plan.segments.get(index + 1).and_then(|s| s.routing.as_ref());
        synchronize(self.inner);
        let layer = residency.layer(routing.layer);
        self.routed
            .read(routing, layer.experts)
            .map_err(|reason| Error::Graph { layer: layer.block, reason })?;
        if let Some(replay) = self.control.replay() {
            let is_last = routing.layer + 1 == residency.layers().len();
            self.routed.replay(&replay, self.replayed, routing.layer, layer.experts)?;
            self.replayed += usize::from(is_last && self.routed.n_tokens == 1);
        }
        if self.control.recorder.is_on() {
            let weights = plan.weights_of(graph, index).map(read_floats);
            self.control.recorder.note(self.routed.noted(routing.layer, weights));
        }
        if self.routed.pairs() == 0 {
            return run_nodes(self.inner, graph, segment.start, segment.end, 0);
        }
        let cancelled = || self.control.is_cancelled();
        let ahead = self.guesses.take(routing.layer, self.routed.needs());
        let needs = self.routed.needs();
        let mut step = residency.acquire(routing.layer, needs, ahead, &cancelled)?;
        let window = slot_range(step.hits());
        let fits = || self.scratch.window_fits(window, self.routed.pairs());
        if step.arriving().is_empty() && fits() {
            self.read_ahead(residency, routing, next)?;
            self.run_whole(residency, graph, segment, routing, step.hits())?;
        } else {
            let mut loads = Loads::new(&routing.stages, &mut step);
            self.read_ahead(residency, routing, next)?;
            self.run_in_groups(residency, graph, segment, routing, &mut step, &mut loads)?;
        }
        Ok(step.finish()?)
    }

    /// Guesses what `next` will need, and has it read.
    fn read_ahead(
        &mut self,
        residency: &Arc<Residency>,
        current: &Routing,
        next: Option<&Routing>,
    ) -> Result<()> {
        let Some(next) = next else { return Ok(()) };
        // SAFETY: a live tensor of the graph.
        if unsafe { (*current.ids).ne[1] } > READ_AHEAD_TOKENS_MAX {
            return Ok(());
        }
        let guessed = if self.guesses.ask_router(next.layer) {
            let experts = residency.layer(next.layer).experts;
            self.lookahead.guess(self.inner, current, next, experts)?
        } else {
            self.guesses.lagging(next.layer)
        };
        if let Some(guessed) = guessed {
            self.guesses.read(residency, next, &guessed);
        }
        Ok(())
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
        let ids = self.scratch.ids(&self.routed)?;
        let window = |part| residency.window(routing.layer, part, low, high);
        run_exchanged(self.inner, graph, segment, routing, window, Some(ids))
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
            run_nodes(self.inner, graph, at, stage.first(), 0)?;
            self.run_stage(residency, routing.layer, &ops, index, loads, step)?;
            at = stage.last() + 1;
        }
        run_nodes(self.inner, graph, at, segment.end, 0)
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
            control.stalls.add(waiting.elapsed());
            step.arrived(load)?;
            let placed = &step.arriving()[group];
            done(scratch.compute(*inner, residency, layer, ops, placed, routed)?)?;
            loads.computed(step, stage, group);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;

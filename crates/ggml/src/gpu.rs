//! The executor for GPUs: routing is read back to the host before each MoE layer, missing records
//! are brought into the GPU's memory, and the layer's matmuls are pointed at them.
//!
//! A single token is computed over slots, wherever its experts lie: its kernels take one expert
//! after the other. Several tokens are computed over whole layers in expert order
//! ([`crate::residency::Stage`]), because the bits that their kernels give depend on that. Both ways
//! give those of the resident model.
//!
//! For a single token, the next layer's router is run on this layer's input too, when reading ahead is
//! asked for: behind what computes this layer's routing, so that both are there when the GPU has been
//! waited for once. What it names is brought to slots while this layer computes.
//!
//! The GPU computes on its own time. What a layer uses is held until the next layer's routing has
//! been read, for by then it is done.

use std::sync::Arc;
use std::time::Instant;

use tierstream_io::{Priority, Ticket};

use self::compute::Misses;
pub(crate) use self::compute::look_for_chains;
use self::exchange::{OverSlots, ReadBack};
pub use self::execution::Execution;
use self::lookahead::Lookahead;
pub use self::miss::Miss;
use self::past::Past;
pub(crate) use self::undisturbed::disturbing;
use self::whole::Whole;
use crate::abi::*;
use crate::control::Control;
use crate::error::{Error, Result};
use crate::executor::Executor;
use crate::plan::{Plan, Plans, Routing, Segment, nodes};
use crate::pooled::Pooled;
use crate::prefetch::{Guessed, Guesses};
use crate::recorder::floats;
use crate::residency::{Ahead, Coming, Kept, Looked, Placed, Residency, Stage, Step, Waits};
use crate::routed::Routed;
use crate::segment::{Patch, Run, outcome, run_exchanged, run_nodes, run_resident, synchronize};

mod compute;
mod cpu;
mod exchange;
mod execution;
mod lookahead;
mod miss;
mod past;
mod rates;
mod undisturbed;
mod whole;

/// The executor for inner backends with memory of their own.
pub(crate) struct OnGpu {
    inner: ggml_backend_t,
    control: Arc<Control>,
    plans: Plans,
    routed: Routed,
    read_back: ReadBack,
    guesses: Guesses,
    lookahead: Lookahead,
    over_slots: OverSlots,
    misses: Misses,
    /// Single tokens computed with replayed routing.
    replayed: usize,
    /// What the layer uses that is being computed.
    held: Option<Held>,
    /// The layer after it, if something of it is on its way.
    next: Option<Coming>,
    past: Past,
    // Graphs name what is above.
    whole: Whole,
}

enum Held {
    Step(Box<Step>),
    Stage { kept: Kept, _stage: Stage },
    Looked(Looked),
}

impl Executor for OnGpu {
    fn compute(&mut self, pooled: &Pooled, graph: *mut ggml_cgraph) -> Result<ggml_status> {
        // SAFETY: ggml passes a graph that stays as it is for the call.
        let graph = unsafe { &*graph };
        let plan = self.plans.take(graph, &pooled.table())?;
        let (start, tokens) = (Instant::now(), plan.tokens());
        let run = self.run_plan(pooled, graph, &plan);
        self.plans.put(graph, plan);
        self.next = None;
        self.guesses.forget();
        // Other contexts may wait for what the last layer uses.
        if self.held.is_some() {
            synchronize(self.inner);
        }
        let released = self.release();
        let settled = self.misses.settle();
        if run.is_ok() && tokens == 1 {
            self.guesses.computed(start.elapsed());
        }
        let status = outcome(run)?;
        released.and(settled).map(|()| status)
    }
}

impl OnGpu {
    pub(crate) fn new(inner: ggml_backend_t, control: Arc<Control>) -> Self {
        let mode = control.prefetch();
        let misses = Misses::new(control.miss());
        Self {
            inner,
            control,
            plans: Plans::new(mode.uses_routers()),
            routed: Routed::default(),
            read_back: ReadBack::default(),
            guesses: Guesses::new(mode),
            lookahead: Lookahead::new(inner),
            over_slots: OverSlots::default(),
            misses,
            replayed: 0,
            held: None,
            next: None,
            past: Past::default(),
            whole: Whole::default(),
        }
    }

    fn run_plan(&mut self, pooled: &Pooled, graph: &ggml_cgraph, plan: &Plan) -> Run {
        if !plan.has_experts() {
            return run_nodes(self.inner, graph, 0, nodes(graph).len(), graph.uid);
        }
        let no_pool = || Error::SelfCheck("expert weights are used before there is a pool".into());
        let residency = pooled.residency().ok_or_else(no_pool)?.clone();
        residency.look_after_memory()?;
        let in_order = residency.identity();
        if let Some(bases) = in_order.as_ref().filter(|_| !self.control.recorder.is_on()) {
            let run = run_resident(self.inner, &residency, graph, plan, bases);
            // Who takes slots away waits for the lock, and not for the GPU.
            synchronize(self.inner);
            return run;
        }
        drop(in_order);
        if self.run_whole(&residency, graph, plan)? {
            return Ok(());
        }
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

    /// Gives up what the layer used that was computed last. Everything has been waited for.
    fn release(&mut self) -> Result<()> {
        match self.held.take() {
            Some(Held::Step(step)) => step.finish(),
            Some(Held::Stage { kept, _stage }) => kept.finish(),
            Some(Held::Looked(_)) | None => Ok(()),
        }
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
        let asked = self.ask_next(graph, routing, next)?;
        let records = self.control.recorder.is_on();
        let weights = if records { plan.weights_of(graph, index) } else { None };
        let told: Vec<_> = std::iter::once(routing.ids).chain(asked).chain(weights).collect();
        self.read_back.ask(self.inner, &told)?;
        // Until the router has spoken, and the layer before is computed.
        synchronize(self.inner);
        self.release()?;
        let coming = self.next.take().filter(|coming| coming.layer() == routing.layer);
        let layer = residency.layer(routing.layer);
        self.routed
            .take(routing, self.read_back.bytes(0), layer.experts)
            .map_err(|reason| Error::Graph { layer: layer.block, reason })?;
        if let Some(replay) = self.control.replay() {
            let is_last = routing.layer + 1 == residency.layers().len();
            self.routed.replay(&replay, self.replayed, routing.layer, layer.experts)?;
            self.replayed += usize::from(is_last && self.routed.n_tokens == 1);
        }
        if records {
            let weights = weights.map(|_| floats(self.read_back.bytes(told.len() - 1)));
            self.control.recorder.note(self.routed.noted(routing.layer, weights));
        }
        if self.routed.pairs() == 0 {
            return run_nodes(self.inner, graph, segment.start, segment.end, 0);
        }
        let mut ahead = self.guesses.take(routing.layer, self.routed.needs());
        if self.routed.n_tokens == 1
            && self.run_beside_processor(
                residency,
                graph,
                segment,
                routing,
                (next, asked),
                &mut ahead,
            )?
        {
            return Ok(());
        }
        // Who waits for slots, or room, has nothing on its way that others may wait for.
        self.misses.settle()?;
        if self.routed.n_tokens == 1
            && let Some(step) = self.bring_to_slots(residency, routing, ahead)?
        {
            self.run_over_slots(residency, graph, segment, routing, &step)?;
            let is_idle = step.is_idle();
            self.held = Some(Held::Step(Box::new(step)));
            self.read_next(residency, next.filter(|_| is_idle), asked);
            return Ok(());
        }
        let stage = self.bring_whole(residency, routing.layer, coming)?;
        // The bus is busy while kernels are launched and run.
        let coming = self.stage_next(residency, next)?;
        let whole = |part| stage.tensor(part);
        run_exchanged(self.inner, graph, segment, routing, whole, None)?;
        match stage.keep(self.routed.needs()) {
            Ok(kept) => self.held = Some(Held::Stage { kept, _stage: stage }),
            Err(error) => {
                synchronize(self.inner);
                return Err(error.into());
            }
        }
        self.next = coming;
        self.next.as_mut().map_or(Ok(()), Coming::copy_hits)?;
        Ok(())
    }

    /// Brings what a batch needs of a layer to the area, of which `coming` is on its way.
    fn bring_whole(
        &mut self,
        residency: &Arc<Residency>,
        layer: usize,
        coming: Option<Coming>,
    ) -> Result<Stage> {
        let (control, needs) = (&self.control, self.routed.needs());
        let experts: Vec<u32> = needs.iter().map(|n| n.expert).collect();
        let stage = match coming {
            Some(coming) => {
                self.past.saw(coming.is_idle(), coming.is_cut());
                staging(control, |waits| coming.complete(&experts, waits))?
            }
            None => {
                let mut stage = residency.stage(layer, &|| control.is_cancelled())?;
                staging(control, |waits| stage.bring(&experts, waits))?;
                stage
            }
        };
        let rows = |expert| self.routed.rows_of(expert).len();
        self.past.note(layer, residency.layer(layer).experts, needs, rows);
        Ok(stage)
    }

    /// Has the GPU tell what the next layer's router thinks of this one's input, behind what it has to
    /// compute; where that is wanted.
    fn ask_next(
        &mut self,
        graph: &ggml_cgraph,
        routing: &Routing,
        next: Option<&Routing>,
    ) -> Result<Option<*mut ggml_tensor>> {
        // Recorded routing is no router's.
        let may = is_one_token(routing) && self.control.replay().is_none();
        let next = next.filter(|next| may && is_one_token(next));
        match next.filter(|next| self.guesses.ask_router(next.layer)) {
            Some(next) => self.lookahead.ask(graph.uid, routing, next),
            None => Ok(None),
        }
    }

    /// Brings what `next` will probably need to slots, where the bus has nothing else to do: it is for
    /// what is needed, and then for one layer's guesses.
    fn read_next(
        &mut self,
        residency: &Arc<Residency>,
        next: Option<&Routing>,
        asked: Option<*mut ggml_tensor>,
    ) {
        if let Some(next) = next
            && let Some(guessed) = self.guessed(residency, next, asked)
        {
            self.guesses.read(residency, next, &guessed);
        }
    }

    /// What `next` will probably need, with what its router has said if it was asked.
    fn guessed(
        &mut self,
        residency: &Residency,
        next: &Routing,
        asked: Option<*mut ggml_tensor>,
    ) -> Option<Vec<Guessed>> {
        match asked {
            Some(ids) => {
                let experts = residency.layer(next.layer).experts;
                self.lookahead.guessed(ids, self.read_back.bytes(1), experts)
            }
            None => self.guesses.lagging(next.layer),
        }
    }

    /// While the GPU computes over a whole layer, what the next one will probably need comes.
    fn stage_next(
        &self,
        residency: &Arc<Residency>,
        next: Option<&Routing>,
    ) -> Result<Option<Coming>> {
        // What comes holds slots. A single token may have to wait for some, so it has none of that.
        let Some(next) = next.filter(|next| !is_one_token(next)) else { return Ok(None) };
        let likely = self.past.likely(next.layer);
        if likely.is_empty() {
            return Ok(None);
        }
        residency.stage_ahead(next.layer, &likely, self.past.bytes())
    }

    /// Brings what one token needs into slots, `ahead` being on its way already. None if there are
    /// not enough at the moment, because of other contexts.
    fn bring_to_slots(
        &mut self,
        residency: &Arc<Residency>,
        routing: &Routing,
        ahead: Option<Ahead>,
    ) -> Result<Option<Step>> {
        let cancelled = || self.control.is_cancelled();
        let mut step = residency.acquire(routing.layer, self.routed.needs(), ahead, &cancelled)?;
        match step.arriving().len() {
            0 => {}
            1 => {
                let parts: Vec<usize> = routing.ops().map(|op| op.part).collect();
                let load = step.load(&parts, 0, Priority::Demand);
                let mut ticket = |ticket: &Arc<Ticket>| self.control.wait_for(ticket);
                let mut meanwhile = || Ok(());
                let waits =
                    Waits { cancelled: &cancelled, ticket: &mut ticket, meanwhile: &mut meanwhile };
                let watched = match step.has_begun() {
                    true => None,
                    false => self.misses.watch(residency, routing.layer, &step.arriving()[0]),
                };
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
        let mut patch = Patch::default();
        let ids = self.over_slots.ids(self.inner, &self.routed)?;
        self.over_slots.exchange(residency, graph, routing, ids, &mut patch);
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

/// Of a graph that is being computed.
fn is_one_token(routing: &Routing) -> bool {
    // SAFETY: a live tensor of the graph.
    unsafe { (*routing.ids).ne[1] == 1 }
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
    control.stalls.add(start.elapsed());
    done
}

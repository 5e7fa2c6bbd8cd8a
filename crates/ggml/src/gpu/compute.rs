//! Experts that a single token needs and the GPU's memory lacks, computed by the processor from the
//! pool in host memory, while the GPU computes the others.
//!
//! The layer's [chain](crate::chain) is computed twice: on the GPU for all ranks of the token, where
//! the missing ones are pointed at slots of others and compute nothing that is wanted, and on the
//! processor for the missing ones. The processor's rows then take the place of the GPU's in the
//! output of the last expert matmul, before what follows reads them. So the graph's shape is the same
//! whatever is missing, and ggml-cuda's captured graphs can be used again.
//!
//! Records that were missing come to slots while the bus is idle: when no copy is under way, the
//! layer that has just been given to the GPU has up to [`PROMOTED_AT_ONCE`] of its missing records
//! copied, and nobody waits for that before the token is done. What is needed often is copied soon.
//! With guesses of what the next layer needs, these are copied first. What of them has not come when
//! that layer is there is not waited for either.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tierstream_io::Priority;

use super::cpu::OnCpu;
use super::miss::Miss;
use super::rates::Rates;
use super::{Held, OnGpu, stall};
use crate::abi::*;
use crate::chain::Chain;
use crate::control::Control;
use crate::error::{Error, Result};
use crate::plan::{Plan, Routing, Segment};
use crate::residency::{Ahead, Need, Placed, Promotion, Residency, Step, Waits};
use crate::routed::Routed;
use crate::segment::{Run, run_nodes};
use crate::weights::WeightTable;

/// Records that are copied to slots at once, on the idle bus. Few, since small copies that a layer
/// waits for may have to wait for these.
const PROMOTED_AT_ONCE: usize = 2;

/// What the executor does with misses.
pub(super) struct Misses {
    miss: Miss,
    rates: Rates,
    cpu: Option<OnCpu>,
    /// On its way to slots.
    promotion: Option<Promotion>,
}

impl Misses {
    pub(super) fn new(miss: Miss) -> Self {
        Self { miss, rates: Rates::default(), cpu: None, promotion: None }
    }

    /// Waits for what is on its way to slots. To be called before slots, or room, are waited for, and
    /// at the end of a graph: others may wait for these.
    pub(super) fn settle(&mut self) -> Result<()> {
        self.promotion.take().map_or(Ok(()), Promotion::finish)
    }

    /// Gives up what is on its way to slots if it has arrived.
    fn tidy(&mut self) -> Result<()> {
        match &self.promotion {
            Some(promotion) if promotion.is_done()? => self.settle(),
            _ => Ok(()),
        }
    }

    /// Copies of `arriving` records, which begin now. None if they are not only copies.
    pub(super) fn watch(
        &self,
        residency: &Residency,
        layer: usize,
        arriving: &[Placed],
    ) -> Option<(u64, Instant)> {
        let below = residency.below_pool().filter(|_| self.miss == Miss::Auto)?;
        let there = below.has_all(layer, arriving.iter().map(|p| p.expert));
        let bytes = below.layer(layer).record_bytes() * arriving.len() as u64;
        there.then(|| (bytes, Instant::now()))
    }

    /// They have come.
    pub(super) fn copied(&mut self, watched: Option<(u64, Instant)>) {
        if let Some((bytes, start)) = watched {
            self.rates.copied(bytes, start.elapsed());
        }
    }
}

/// Notes the first layer of a graph for single tokens whose experts only the GPU can compute.
pub(crate) fn look_for_chains(graph: &ggml_cgraph, table: &WeightTable, control: &Control) {
    let Ok(plan) = Plan::new(graph, table, false) else { return };
    for segment in &plan.segments {
        let Some(routing) = &segment.routing else { continue };
        // SAFETY: a live tensor of the graph.
        let tokens = unsafe { (*routing.ids).ne[1] };
        if tokens == 1
            && let Err(why) = Chain::of(graph, segment, routing)
        {
            control.note_only_on_gpu(routing.layer, why);
        }
    }
}

impl OnGpu {
    /// One MoE layer of a single token whose misses the processor computes, `ahead` being on its way
    /// already. What `next` is guessed to need is read, and then what was missing here, while the bus
    /// is idle. False, and nothing is done, if misses are to be copied.
    pub(super) fn run_beside_processor(
        &mut self,
        residency: &Arc<Residency>,
        graph: &ggml_cgraph,
        segment: &Segment,
        routing: &Routing,
        (next, asked): (Option<&Routing>, Option<*mut ggml_tensor>),
        ahead: &mut Option<Ahead>,
    ) -> Run<bool> {
        if self.misses.miss == Miss::Copy {
            return Ok(false);
        }
        let Some(below) = residency.below_pool() else { return Ok(false) };
        let chain = match routing.chain.get_or_init(|| Chain::of(graph, segment, routing)) {
            Ok(chain) => chain,
            Err(why) if self.misses.miss == Miss::Compute => {
                let layer = residency.layer(routing.layer).block;
                return Err(Error::OnlyOnGpu { layer, reason: why.clone() }.into());
            }
            Err(_) => return Ok(false),
        };
        if self.misses.miss == Miss::Auto && self.misses.rates.choose() == Miss::Copy {
            return Ok(false);
        }
        self.misses.tidy()?;
        let looked = residency.look(routing.layer, self.routed.needs(), ahead.take());
        let (hits, missing) = (looked.hits().to_vec(), looked.missing().to_vec());
        self.held = Some(Held::Looked(looked));
        let fetching = Instant::now();
        if !missing.is_empty() {
            self.processor()?.fetch(chain)?;
        }
        let fetched = fetching.elapsed();
        self.run_chain(residency, graph, segment, routing, (chain, &hits, &missing))?;
        if missing.is_empty() {
            run_nodes(self.inner, graph, chain.last() + 1, segment.end, 0)?;
            let is_idle = self.is_bus_idle()?;
            self.read_next(residency, next.filter(|_| is_idle), asked);
            return Ok(true);
        }
        let mut step = self.step_below(below, routing.layer, &missing)?;
        let computing = Instant::now();
        let waited = self.compute_missing(below, routing, chain, &mut step)?;
        self.put_rows(chain, &missing);
        let computed = fetched + computing.elapsed().saturating_sub(waited);
        run_nodes(self.inner, graph, chain.last() + 1, segment.end, 0)?;
        let bytes = below.layer(routing.layer).record_bytes() * missing.len() as u64;
        self.misses.rates.computed(bytes, computed);
        residency.count_computed(missing.len());
        let is_idle = self.is_bus_idle()?;
        self.read_next(residency, next.filter(|_| is_idle), asked);
        if is_idle && !self.guesses.are_read() {
            self.promote(residency, routing.layer, step)?;
        } else {
            step.finish()?;
        }
        Ok(true)
    }

    /// The chain on the GPU, and what lies between its operations.
    fn run_chain(
        &mut self,
        residency: &Residency,
        graph: &ggml_cgraph,
        segment: &Segment,
        routing: &Routing,
        (chain, hits, missing): (&Chain, &[Placed], &[u32]),
    ) -> Run {
        if hits.is_empty() {
            // There may be no memory behind any slot.
            return self.run_beside_chain(graph, segment, chain);
        }
        let stand_ins = hits.iter().cycle().zip(missing);
        let stand_ins = stand_ins.map(|(hit, &expert)| Placed { expert, slot: hit.slot });
        let placed: Vec<Placed> = hits.iter().copied().chain(stand_ins).collect();
        let _patch = self.over_slots(residency, graph, routing, &placed)?;
        run_nodes(self.inner, graph, segment.start, chain.last() + 1, 0)
    }

    /// What lies between the operations of a chain.
    fn run_beside_chain(&self, graph: &ggml_cgraph, segment: &Segment, chain: &Chain) -> Run {
        let mut at = segment.start;
        let mut links: Vec<usize> =
            chain.links.iter().filter(|link| link.by_expert).map(|link| link.node).collect();
        links.sort_unstable();
        for link in links {
            run_nodes(self.inner, graph, at, link, 0)?;
            at = link + 1;
        }
        Ok(())
    }

    /// The missing records in the pool below, pinned there, or slots for them.
    fn step_below(
        &mut self,
        below: &Arc<Residency>,
        layer: usize,
        missing: &[u32],
    ) -> Result<Step> {
        let need: Vec<Need> = missing.iter().map(|&expert| Need { expert, last_row: 0 }).collect();
        // As if cancelled, it does not wait for others, who may wait for what is on its way.
        match below.acquire(layer, &need, None, &|| true) {
            Err(Error::Cancelled) => {
                self.misses.settle()?;
                let Self { held, control, .. } = self;
                if let Some(Held::Looked(looked)) = held {
                    looked.give_up_guesses(|ticket| stall(control, || control.wait_for(ticket)))?;
                }
                below.acquire(layer, &need, None, &|| self.control.is_cancelled())
            }
            acquired => acquired,
        }
    }

    /// The chain on the processor: records that are there, then the others as they are read. Returns
    /// how long reads were waited for.
    fn compute_missing(
        &mut self,
        below: &Arc<Residency>,
        routing: &Routing,
        chain: &Chain,
        step: &mut Step,
    ) -> Run<Duration> {
        let Self { misses, routed, control, .. } = self;
        let cpu = misses.cpu.as_mut().expect("its inputs were fetched");
        let window = |part, (low, high)| below.window(routing.layer, part, low, high);
        let parts: Vec<usize> = routing.ops().map(|op| op.part).collect();
        let groups = step.arriving().to_vec();
        let mut first = (!groups.is_empty()).then(|| step.load(&parts, 0, Priority::Demand));
        cpu.compute(chain, step.hits(), routed, window)?;
        let mut waited = Duration::ZERO;
        for (index, group) in groups.iter().enumerate() {
            let load = first.take();
            let load = load.unwrap_or_else(|| step.load(&parts, index, Priority::Demand));
            let start = Instant::now();
            stall(control, || wait(control, step, load))?;
            waited += start.elapsed();
            cpu.compute(chain, group, routed, window)?;
        }
        Ok(waited)
    }

    /// Puts the processor's rows in the place of what the GPU computes for the missing experts.
    fn put_rows(&self, chain: &Chain, missing: &[u32]) {
        let Some(cpu) = &self.misses.cpu else { return };
        let mut ranks = ranks(&self.routed, missing);
        ranks.sort_unstable();
        for run in ranks.chunk_by(|a, b| a + 1 == *b) {
            let (first, last) = (run[0], run[run.len() - 1]);
            let rows = cpu.rows(chain, first, last);
            let output = chain.output();
            // SAFETY: rows of a live, allocated tensor that has one for each rank, of these bytes. The
            // values are taken before the call returns, from memory that is not pinned, or stay as
            // they are until the next layer, before which the GPU is waited for.
            unsafe {
                let (offset, bytes) = (first * (*output).nb[1], size_of_val(rows));
                let values = rows.as_ptr().cast();
                ggml_backend_tensor_set_async(self.inner.cast(), output, values, offset, bytes);
            }
        }
    }

    /// Whether nothing is on its way to slots.
    fn is_bus_idle(&mut self) -> Result<bool> {
        self.misses.tidy()?;
        let is_late = matches!(&self.held, Some(Held::Looked(looked)) if !looked.is_idle());
        Ok(self.misses.promotion.is_none() && !is_late)
    }

    /// Has missing records come to slots, the router's first choices first.
    fn promote(&mut self, residency: &Arc<Residency>, layer: usize, step: Step) -> Result<()> {
        // Of records that were read in turns, the first may be gone.
        let mut there = match step.arriving() {
            [] => step.hits().to_vec(),
            [group] => [step.hits(), group].concat(),
            _ => Vec::new(),
        };
        if there.is_empty() {
            return step.finish();
        }
        let rank = |p: &Placed| ranks(&self.routed, &[p.expert]).first().copied();
        there.sort_by_key(rank);
        self.misses.promotion = residency.promote(layer, step, &there, PROMOTED_AT_ONCE)?;
        Ok(())
    }

    fn processor(&mut self) -> Result<&mut OnCpu> {
        if self.misses.cpu.is_none() {
            let (threads, threadpool) = self.control.threads();
            self.misses.cpu = Some(OnCpu::new(threads, threadpool)?);
        }
        Ok(self.misses.cpu.as_mut().expect("just made"))
    }
}

/// The ranks of `experts` in the routing of the only token.
fn ranks(routed: &Routed, experts: &[u32]) -> Vec<usize> {
    let ranks = experts.iter().flat_map(|&expert| routed.rows_of(expert));
    ranks.map(|&rank| rank as usize).collect()
}

/// Waits for records that are read, as a context does.
fn wait(control: &Control, step: &mut Step, load: usize) -> Result<()> {
    step.wait(
        load,
        Waits {
            cancelled: &|| control.is_cancelled(),
            ticket: &mut |ticket| control.wait_for(ticket),
            meanwhile: &mut || Ok(()),
        },
    )
}

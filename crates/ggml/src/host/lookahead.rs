//! Reading ahead: which experts the next layer will want, guessed by its router from this layer's
//! input.
//!
//! The residual stream changes little from one layer to the next, so the guess is mostly right.
//! It costs one small matmul a layer, and it only decides what is read: what is computed waits for
//! the layer's own routing, so output stays the same. What it brings is in BENCHMARKS.md.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::abi::*;
use crate::error::Error;
use crate::memory::Memory;
use crate::plan::Routing;
use crate::residency::{Ahead, Need, Residency};
use crate::routed::read_ids;
use crate::router::{NODES_MAX, RouterCopy};
use crate::segment::{compute_on, synchronize};

/// Tokens of a batch for which is read ahead: larger ones keep the drive busy as they are.
const TOKENS_MAX: usize = 8;

/// Weight of a new observation in an estimate.
const LEARNING: f32 = 1.0 / 32.0;

/// Least share of right guesses at which is read ahead. A wrong one costs the time of its read,
/// a right one saves at most that.
const LEAST_PRECISION: f32 = 0.5;

/// A layer for which looking has led to a read less often than this is only looked at now and then.
const LEAST_USE: f32 = 0.1;

/// How often.
const LOOKS_APART: u32 = 8;

/// Whether records are read before their layer asks for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Prefetch {
    /// What is guessed right often enough to gain by it.
    Auto,
    /// Whatever is guessed.
    Lookahead,
    /// Nothing.
    #[default]
    Off,
}

impl Prefetch {
    const NAMES: [(&str, Prefetch); 3] =
        [("auto", Prefetch::Auto), ("lookahead", Prefetch::Lookahead), ("off", Prefetch::Off)];
}

impl fmt::Display for Prefetch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let named = Self::NAMES.iter().find(|(_, mode)| mode == self);
        f.write_str(named.map_or("", |(name, _)| name))
    }
}

impl FromStr for Prefetch {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let named = Self::NAMES.iter().find(|(name, _)| *name == text);
        named.map(|&(_, mode)| mode).ok_or_else(|| format!("none of auto, lookahead, off: {text}"))
    }
}

/// Guesses the next layer's experts and has them read.
pub(super) struct Lookahead {
    mode: Prefetch,
    buffer_type: ggml_backend_buffer_type_t,
    memory: Option<Memory>,
    copy: RouterCopy,
    /// Headers of its graph.
    context: *mut ggml_context,
    ids: Vec<u32>,
    raw: Vec<u8>,
    guess: Option<Guess>,
    record: Record,
}

/// What was guessed for one layer.
struct Guess {
    layer: usize,
    /// Experts that were absent then, with their rank in the router's order.
    absent: Vec<(u32, usize)>,
    ahead: Option<Ahead>,
}

/// What came of looking, by layer.
#[derive(Default)]
struct Record {
    layers: Vec<LayerRecord>,
}

#[derive(Clone)]
struct LayerRecord {
    /// How often guesses of absent records were right, by rank.
    right: Vec<f32>,
    /// How often there was something worth reading.
    used: f32,
    /// Looks that were left out since the last.
    left_out: u32,
}

impl Record {
    fn of(&mut self, layer: usize) -> &mut LayerRecord {
        if self.layers.len() <= layer {
            let new = LayerRecord { right: Vec::new(), used: 1.0, left_out: 0 };
            self.layers.resize(layer + 1, new);
        }
        &mut self.layers[layer]
    }

    fn precision(&mut self, layer: usize, rank: usize) -> &mut f32 {
        let ranks = &mut self.of(layer).right;
        if ranks.len() <= rank {
            ranks.resize(rank + 1, LEAST_PRECISION);
        }
        &mut ranks[rank]
    }

    /// A guess of an absent record was right or wrong.
    fn guessed(&mut self, layer: usize, rank: usize, right: bool) {
        learn(self.precision(layer, rank), right);
    }

    /// A look at a layer did or did not lead to a read.
    fn looked(&mut self, layer: usize, read: bool) {
        learn(&mut self.of(layer).used, read);
    }

    fn is_worth_a_look(&mut self, layer: usize) -> bool {
        let record = self.of(layer);
        record.left_out += 1;
        let worth = record.used >= LEAST_USE || record.left_out >= LOOKS_APART;
        if worth {
            record.left_out = 0;
        }
        worth
    }
}

fn learn(estimate: &mut f32, seen: bool) {
    *estimate += (f32::from(u8::from(seen)) - *estimate) * LEARNING;
}

/// Headers of the router's graph.
const CONTEXT_BYTES: usize = 64 * 1024;

/// Nodes that the graph has room for.
const GRAPH_NODES: usize = NODES_MAX;

impl Lookahead {
    pub(super) fn new(inner: ggml_backend_t, mode: Prefetch) -> Self {
        let params = ggml_init_params {
            mem_size: CONTEXT_BYTES,
            mem_buffer: std::ptr::null_mut(),
            no_alloc: true,
        };
        // SAFETY: a live backend; ggml_init returns null or a context.
        let (buffer_type, context) = unsafe {
            (ggml_backend_get_default_buffer_type(inner.cast()).cast(), ggml_init(params))
        };
        Self {
            mode,
            buffer_type,
            memory: None,
            copy: RouterCopy::default(),
            context,
            ids: Vec::new(),
            raw: Vec::new(),
            guess: None,
            record: Record::default(),
        }
    }

    /// What was read ahead for `layer`, which turns out to need `needs`.
    pub(super) fn take(&mut self, layer: usize, needs: &[Need]) -> Option<Ahead> {
        let guess = self.guess.take().filter(|guess| guess.layer == layer)?;
        for &(expert, rank) in &guess.absent {
            let right = needs.iter().any(|need| need.expert == expert);
            self.record.guessed(layer, rank, right);
        }
        guess.ahead
    }

    /// Gives up what was guessed: the graph has ended, or will not be computed to its end. Nobody
    /// else could use those slots otherwise.
    pub(super) fn forget(&mut self) {
        self.guess = None;
    }

    /// Guesses what `next` will need, from the input of `current`, and has it read.
    pub(super) fn look(
        &mut self,
        inner: ggml_backend_t,
        residency: &Arc<Residency>,
        current: &Routing,
        next: Option<&Routing>,
    ) -> Result<(), Error> {
        if self.mode == Prefetch::Off {
            return Ok(());
        }
        let Some(next) = next else { return Ok(()) };
        let (Some(here), Some(there)) = (&current.router, &next.router) else { return Ok(()) };
        let input = here.input();
        // SAFETY: a live tensor of the graph.
        let tokens = unsafe { (*input).ne[1] };
        if !there.takes(input) || tokens > TOKENS_MAX as i64 {
            return Ok(());
        }
        let auto = self.mode == Prefetch::Auto;
        if auto && !self.record.is_worth_a_look(next.layer) {
            return Ok(());
        }
        let ids = self.copy.make(there, input, &mut self.memory, self.buffer_type)?;
        // SAFETY: a fresh graph in our own context, with room for as many nodes as a router has, over
        // copies that live until the next call; the input is computed, and kept for the expert
        // matmuls that follow.
        let status = unsafe {
            ggml_reset(self.context);
            let graph: *mut ggml_cgraph =
                ggml_new_graph_custom(self.context, GRAPH_NODES, false).cast();
            for node in self.copy.nodes() {
                (*graph).nodes.add((*graph).n_nodes as usize).write(node);
                (*graph).n_nodes += 1;
            }
            let status = compute_on(inner, &mut *graph);
            synchronize(inner);
            status
        };
        let layer = residency.layer(next.layer);
        if status != GGML_STATUS_SUCCESS {
            return Ok(());
        }
        // SAFETY: just computed, in a copy that nothing changes before the next call.
        let ids = unsafe { &*ids };
        let read = read_ids(ids, layer.experts, &mut self.raw, &mut self.ids);
        let Ok((n_used, n_tokens)) = read else { return Ok(()) };
        let mut experts: Vec<(u32, usize)> = Vec::with_capacity(self.ids.len());
        for rank in 0..n_used {
            for token in 0..n_tokens {
                let expert = self.ids[token * n_used + rank];
                if !experts.iter().any(|&(known, _)| known == expert) {
                    experts.push((expert, rank));
                }
            }
        }
        let stages: Vec<Vec<usize>> =
            next.stages.iter().map(|s| s.ops.iter().map(|op| op.part).collect()).collect();
        let absent = residency.absent(next.layer, &experts);
        let mut wanted = absent.clone();
        wanted.retain(|&(_, rank)| {
            !auto || *self.record.precision(next.layer, rank) >= LEAST_PRECISION
        });
        let wanted: Vec<u32> = wanted.into_iter().map(|(expert, _)| expert).collect();
        self.record.looked(next.layer, !wanted.is_empty());
        let all: Vec<u32> = experts.iter().map(|&(e, _)| e).collect();
        let ahead = residency.read_ahead(next.layer, &all, &wanted, &stages);
        self.guess = Some(Guess { layer: next.layer, absent, ahead });
        Ok(())
    }
}

impl Drop for Lookahead {
    fn drop(&mut self) {
        // SAFETY: ours, freed once.
        unsafe { ggml_free(self.context) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for (name, mode) in Prefetch::NAMES {
            assert_eq!(name.parse(), Ok(mode));
            assert_eq!(mode.to_string(), name);
        }
        assert!("lag".parse::<Prefetch>().unwrap_err().contains("lookahead"));
    }

    #[test]
    fn ranks_that_are_mostly_wrong_fall_below_the_least_precision() {
        let mut record = Record::default();
        for guess in 0..200 {
            record.guessed(3, 0, guess % 4 != 0);
            record.guessed(3, 1, guess % 4 == 0);
        }
        assert!(*record.precision(3, 0) > LEAST_PRECISION);
        assert!(*record.precision(3, 1) < LEAST_PRECISION);
        assert_eq!(*record.precision(3, 2), LEAST_PRECISION, "not known yet: tried");
    }

    #[test]
    fn layers_that_have_nothing_to_read_are_looked_at_now_and_then() {
        let mut record = Record::default();
        for _ in 0..200 {
            record.looked(0, false);
            record.looked(1, true);
        }
        let looks =
            |record: &mut Record, layer| (0..80).filter(|_| record.is_worth_a_look(layer)).count();
        assert_eq!(looks(&mut record, 0), 80 / LOOKS_APART as usize);
        assert_eq!(looks(&mut record, 1), 80);
    }
}

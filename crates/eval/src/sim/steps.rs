//! The steps of a trace: the distinct experts of each batch and layer.

use std::ops::Range;

use super::{Setup, Start};
use crate::trace::{Phase, Trace};

/// The batches that a simulation replays, and which of them it counts.
pub(crate) struct Steps<'a> {
    trace: &'a Trace,
    /// Tokens that are replayed, batch by batch.
    tokens: Vec<u32>,
    batches: Vec<Batch>,
}

#[derive(Debug, Clone)]
pub(crate) struct Batch {
    tokens: Range<usize>,
    /// Tokens of it that count; the batch is counted if there are any.
    pub(crate) counted: u32,
}

impl<'a> Steps<'a> {
    pub(crate) fn of(trace: &'a Trace, setup: &Setup) -> Self {
        Self::new(trace, setup.phase, setup.start)
    }

    pub(crate) fn new(trace: &'a Trace, phase: Phase, start: Start) -> Self {
        let all = trace.tokens().iter().enumerate();
        let replayed = all.filter(|(_, token)| start == Start::Warm || token.phase == phase);
        let tokens: Vec<u32> = replayed.map(|(index, _)| index as u32).collect();
        let of = |index: &u32| &trace.tokens()[*index as usize];
        let mut begin = 0;
        let batches = tokens.chunk_by(|a, b| of(a).batch == of(b).batch).map(|batch| {
            let tokens = begin..begin + batch.len();
            begin = tokens.end;
            let counted = batch.iter().filter(|&token| of(token).phase == phase).count();
            Batch { tokens, counted: counted as u32 }
        });
        let batches = batches.collect();
        Self { trace, tokens, batches }
    }

    pub(crate) fn batches(&self) -> &[Batch] {
        &self.batches
    }

    /// Counted tokens.
    pub(crate) fn counted(&self) -> u64 {
        self.batches.iter().map(|batch| u64::from(batch.counted)).sum()
    }

    /// Writes the distinct experts of a step to `out`, by number.
    pub(crate) fn experts(&self, batch: &Batch, layer: usize, out: &mut Vec<u16>) {
        out.clear();
        for &token in &self.tokens[batch.tokens.clone()] {
            out.extend_from_slice(self.trace.experts(token as usize, layer));
        }
        out.sort_unstable();
        out.dedup();
    }

    /// The distinct experts of a step in the order in which a batch wants them last, then by number: as
    /// the runtime brings them.
    pub(crate) fn by_last_row(&self, batch: &Batch, layer: usize, out: &mut Vec<u16>) {
        let tokens = &self.tokens[batch.tokens.clone()];
        if let [token] = tokens {
            out.clear();
            out.extend_from_slice(self.trace.experts(*token as usize, layer));
            out.sort_unstable();
            return;
        }
        let mut last: Vec<(u32, u16)> = Vec::new();
        for (row, &token) in (0..).zip(tokens) {
            last.extend(self.trace.experts(token as usize, layer).iter().map(|&e| (row, e)));
        }
        last.sort_unstable_by_key(|&(row, expert)| (expert, std::cmp::Reverse(row)));
        last.dedup_by_key(|(_, expert)| *expert);
        last.sort_unstable();
        out.clear();
        out.extend(last.into_iter().map(|(_, expert)| expert));
    }

    /// The most experts of a step, layer by layer.
    pub(crate) fn widest(&self) -> Vec<usize> {
        let layers = 0..self.trace.header().layers.len();
        let mut experts = Vec::new();
        let widest = layers.map(|layer| {
            let of = |batch: &Batch| match batch.tokens.len() {
                1 => self.trace.experts(self.tokens[batch.tokens.start] as usize, layer).len(),
                _ => {
                    self.experts(batch, layer, &mut experts);
                    experts.len()
                }
            };
            self.batches.iter().map(of).max().unwrap_or(0)
        });
        widest.collect()
    }
}

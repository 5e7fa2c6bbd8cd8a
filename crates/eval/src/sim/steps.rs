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

    /// The prompt of a batch's first token.
    pub(crate) fn prompt(&self, batch: &Batch) -> u32 {
        self.trace.tokens()[self.tokens[batch.tokens.start] as usize].prompt
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

    /// The most experts that a step may have, layer by layer.
    pub(crate) fn widest(&self) -> Vec<usize> {
        let several = || self.batches.iter().filter(|batch| batch.tokens.len() > 1);
        let mut experts = Vec::new();
        let layers = self.trace.header().layers.iter().enumerate();
        let widest = layers.map(|(index, layer)| {
            let of = |batch: &Batch| {
                self.experts(batch, index, &mut experts);
                experts.len()
            };
            several().map(of).max().unwrap_or(0).max(layer.used as usize)
        });
        widest.collect()
    }
}

/// The steps of one layer, gathered, so that passes over them do not jump from token to token.
pub(crate) struct LayerSteps {
    experts: Vec<u16>,
    /// Where each step ends in `experts`; the highest bit says that it counts.
    ends: Vec<u64>,
}

impl LayerSteps {
    const COUNTED: u64 = 1 << 63;

    /// Distinct experts by number.
    pub(crate) fn by_number(steps: &Steps<'_>, layer: usize) -> Self {
        Self::gather(steps, |batch, out| steps.experts(batch, layer, out))
    }

    /// The same, the highest first.
    pub(crate) fn by_number_down(steps: &Steps<'_>, layer: usize) -> Self {
        Self::gather(steps, |batch, out| {
            steps.experts(batch, layer, out);
            out.reverse();
        })
    }

    /// In the order in which the runtime brings them.
    pub(crate) fn by_last_row(steps: &Steps<'_>, layer: usize) -> Self {
        Self::gather(steps, |batch, out| steps.by_last_row(batch, layer, out))
    }

    fn gather(steps: &Steps<'_>, of: impl Fn(&Batch, &mut Vec<u16>)) -> Self {
        let mut step = Vec::new();
        let (mut experts, mut ends) = (Vec::new(), Vec::new());
        for batch in steps.batches() {
            of(batch, &mut step);
            experts.extend_from_slice(&step);
            let counted = if batch.counted > 0 { Self::COUNTED } else { 0 };
            ends.push(experts.len() as u64 | counted);
        }
        Self { experts, ends }
    }

    /// Each step, and 1 if it counts, else 0.
    pub(crate) fn iter(
        &self,
    ) -> impl DoubleEndedIterator<Item = (&[u16], u64)> + ExactSizeIterator {
        (0..self.ends.len()).map(|index| {
            let begin = index.checked_sub(1).map_or(0, |before| self.ends[before] & !Self::COUNTED);
            let end = self.ends[index];
            let counted = u64::from(end & Self::COUNTED > 0);
            (&self.experts[begin as usize..(end & !Self::COUNTED) as usize], counted)
        })
    }
}

//! Reading ahead: what the next layer will want, guessed before its own routing is known.
//!
//! The residual stream changes little from one layer to the next, so that the next layer's router,
//! run on this layer's input, is mostly right. That costs one small matmul a layer (each executor has
//! a `lookahead.rs`). Or the next layer wants what it wanted for the last token, which costs nothing. A
//! guess only decides what is read: what is computed waits for the layer's own routing, so output
//! stays the same. What it brings is in BENCHMARKS.md.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use crate::plan::Routing;
use crate::residency::{Ahead, Need, Residency};

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
    /// What the next layer's router guesses right often enough, as long as tokens come faster with it.
    Auto,
    /// Whatever the next layer's router guesses.
    Lookahead,
    /// What the next layer needed for the last token.
    Lag,
    /// Nothing.
    #[default]
    Off,
}

impl Prefetch {
    const NAMES: [(&str, Prefetch); 4] = [
        ("auto", Prefetch::Auto),
        ("lookahead", Prefetch::Lookahead),
        ("lag", Prefetch::Lag),
        ("off", Prefetch::Off),
    ];

    /// Whether guesses are made by routers.
    pub(crate) fn uses_routers(self) -> bool {
        matches!(self, Prefetch::Auto | Prefetch::Lookahead)
    }
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
        named
            .map(|&(_, mode)| mode)
            .ok_or_else(|| format!("none of auto, lookahead, lag, off: {text}"))
    }
}

/// An expert that is guessed, and its rank in the router's order.
pub(crate) type Guessed = (u32, usize);

/// The distinct experts that a router has chosen, `n_used` for each token, the surest ones first.
pub(crate) fn by_rank(experts: &[u32], n_used: usize, n_tokens: usize) -> Vec<Guessed> {
    let mut ranked: Vec<Guessed> = Vec::with_capacity(experts.len());
    for rank in 0..n_used {
        for token in 0..n_tokens {
            let expert = experts[token * n_used + rank];
            if !ranked.iter().any(|&(known, _)| known == expert) {
                ranked.push((expert, rank));
            }
        }
    }
    ranked
}

/// What is guessed in one context, and what has come of it.
pub(crate) struct Guesses {
    mode: Prefetch,
    guess: Option<Guess>,
    record: Record,
    trial: Trial,
    /// By layer, what the last token needed.
    last: Vec<Vec<u32>>,
}

/// What was guessed for one layer.
struct Guess {
    layer: usize,
    /// Experts that were absent then.
    absent: Vec<Guessed>,
    ahead: Option<Ahead>,
}

impl Guesses {
    pub(crate) fn new(mode: Prefetch) -> Self {
        let (record, trial) = (Record::default(), Trial::default());
        Self { mode, guess: None, record, trial, last: Vec::new() }
    }

    /// Whether the next layer's router is to be asked now.
    pub(crate) fn ask_router(&mut self, next: usize) -> bool {
        match self.mode {
            Prefetch::Auto => self.trial.is_on() && self.record.is_worth_a_look(next),
            Prefetch::Lookahead => true,
            Prefetch::Lag | Prefetch::Off => false,
        }
    }

    /// What the next layer is guessed to need without asking anybody.
    pub(crate) fn lagging(&self, next: usize) -> Option<Vec<Guessed>> {
        let last = self.last.get(next).filter(|_| self.mode == Prefetch::Lag)?;
        Some(last.iter().map(|&expert| (expert, 0)).collect())
    }

    /// Has those of `experts` read that `next` is guessed to need, as far as that is worth it.
    pub(crate) fn read(&mut self, residency: &Arc<Residency>, next: &Routing, experts: &[Guessed]) {
        let layer = next.layer;
        let absent = residency.absent(layer, experts);
        let mut wanted = absent.clone();
        if self.mode == Prefetch::Auto {
            wanted.retain(|&(_, rank)| *self.record.precision(layer, rank) >= LEAST_PRECISION);
        }
        self.record.looked(layer, !wanted.is_empty());
        let experts_of = |guessed: &[Guessed]| guessed.iter().map(|&(e, _)| e).collect::<Vec<_>>();
        let stages: Vec<Vec<usize>> =
            next.stages.iter().map(|s| s.ops.iter().map(|op| op.part).collect()).collect();
        let (all, wanted) = (experts_of(experts), experts_of(&wanted));
        let ahead = residency.read_ahead(layer, &all, &wanted, &stages);
        self.guess = Some(Guess { layer, absent, ahead });
    }

    /// What was read ahead for `layer`, which turns out to need `needs`.
    pub(crate) fn take(&mut self, layer: usize, needs: &[Need]) -> Option<Ahead> {
        if self.mode == Prefetch::Lag {
            self.last.resize(self.last.len().max(layer + 1), Vec::new());
            let last_row = needs.iter().map(|need| need.last_row).max().unwrap_or(0);
            let of_last = needs.iter().filter(|need| need.last_row == last_row);
            self.last[layer] = of_last.map(|need| need.expert).collect();
        }
        let guess = self.guess.take().filter(|guess| guess.layer == layer)?;
        for &(expert, rank) in &guess.absent {
            let right = needs.iter().any(|need| need.expert == expert);
            self.record.guessed(layer, rank, right);
        }
        guess.ahead
    }

    /// Whether something is read ahead.
    pub(crate) fn are_read(&self) -> bool {
        self.guess.as_ref().is_some_and(|guess| guess.ahead.is_some())
    }

    /// Gives up what was guessed: the graph has ended, or will not be computed to its end. Nobody
    /// else could use those slots otherwise.
    pub(crate) fn forget(&mut self) {
        self.guess = None;
    }

    /// One token has been computed, in so much time.
    pub(crate) fn computed(&mut self, took: Duration) {
        if self.mode == Prefetch::Auto {
            self.trial.token(took);
        }
    }
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

/// Tokens in a row that are computed with or without reading ahead while it is tried. The first is
/// not counted: it pays for what the ones before have left in the pool.
const BLOCK: usize = 8;

/// The blocks of a trial, with and without: what changes steadily, as while a pool fills, counts for
/// both alike.
const BLOCKS: [bool; 8] = [true, false, false, true, true, false, false, true];

/// From one trial to the next, tokens.
const TRIALS_APART: usize = 1024;

/// Whether tokens come faster with reading ahead: it is tried now and then, and the rest of the tokens
/// is computed as was faster.
#[derive(Debug, Default)]
struct Trial {
    /// Tokens since the trial began.
    tokens: usize,
    /// Time of the counted tokens, without and with.
    took: [Duration; 2],
    pays: bool,
}

impl Trial {
    fn is_on(&self) -> bool {
        BLOCKS.get(self.tokens / BLOCK).copied().unwrap_or(self.pays)
    }

    fn token(&mut self, took: Duration) {
        if !self.tokens.is_multiple_of(BLOCK) && self.tokens < BLOCK * BLOCKS.len() {
            self.took[usize::from(self.is_on())] += took;
        }
        self.tokens += 1;
        if self.tokens == BLOCK * BLOCKS.len() {
            self.pays = self.took[1] < self.took[0];
        }
        if self.tokens == TRIALS_APART {
            *self = Self { pays: self.pays, ..Self::default() };
        }
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
        assert!("on".parse::<Prefetch>().unwrap_err().contains("lookahead"));
    }

    #[test]
    fn experts_of_several_tokens_are_ranked_once() {
        assert_eq!(by_rank(&[7, 3, 3, 9], 2, 2), [(7, 0), (3, 0), (9, 1)]);
        assert_eq!(by_rank(&[], 2, 0), []);
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

    #[test]
    fn the_last_tokens_experts_are_what_comes_next() {
        let need = |expert, last_row| Need { expert, last_row };
        let mut guesses = Guesses::new(Prefetch::Lag);
        assert!(guesses.lagging(1).is_none());
        assert!(guesses.take(1, &[need(2, 0), need(5, 1), need(9, 1)]).is_none());
        assert_eq!(guesses.lagging(1), Some(vec![(5, 0), (9, 0)]));
        assert!(!guesses.ask_router(1));
        let mut others = Guesses::new(Prefetch::Lookahead);
        others.take(1, &[need(2, 0)]);
        assert!(others.lagging(1).is_none() && others.ask_router(1));
    }

    /// Tokens that take so many microseconds without and with reading ahead; and `drift` more with
    /// each. Returns how many of so many were computed with it.
    fn tokens(trial: &mut Trial, count: u64, [without, with]: [u64; 2], drift: u64) -> usize {
        let mut on = 0;
        for token in 0..count {
            on += usize::from(trial.is_on());
            let micros = if trial.is_on() { with } else { without } + drift * (count - token);
            trial.token(Duration::from_micros(micros));
        }
        on
    }

    #[test]
    fn reading_ahead_stays_on_as_long_as_tokens_come_faster_with_it() {
        let (apart, tried) = (TRIALS_APART as u64, BLOCK * BLOCKS.len());
        for drift in [0, 50] {
            let mut trial = Trial::default();
            assert_eq!(tokens(&mut trial, apart, [1000, 900], drift), TRIALS_APART - tried / 2);
            assert_eq!(tokens(&mut trial, apart, [1000, 1010], drift), tried / 2);
            assert_eq!(tokens(&mut trial, apart, [1000, 990], drift), TRIALS_APART - tried / 2);
        }
    }
}

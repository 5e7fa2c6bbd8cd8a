//! What could be read ahead: how well the last token, and the layer before, tell what a layer needs.

use serde::Serialize;

use super::sequences::{Sequence, half};
use super::tally::Tally;
use crate::sim::predict::Following;
use crate::trace::Trace;

/// Tokens of a half that the next layer's experts are learned from, and tried on.
const LEARN_MAX: usize = 1 << 15;
const TRY_MAX: usize = 1 << 12;

/// Both predictors.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Prediction {
    /// What the layer used for the last token.
    pub previous_token: PreviousToken,
    /// What follows most often on the experts of the layer before; learned on one half, tried on the other.
    pub next_layer: NextLayer,
}

/// The experts of the last token as a guess for this one.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PreviousToken {
    /// Share of a token's experts that were guessed: [`reuse_next`](super::Locality::reuse_next).
    pub recall: Option<f64>,
    /// Of the experts at each place of the last token's ranking, the share that is used again; none
    /// where the trace has no ranking.
    pub precision_by_rank: Option<Vec<f64>>,
    /// Guesses that were wrong for each that was right.
    pub wasted_per_useful: Option<f64>,
}

/// The likeliest experts by what the layer before has used.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct NextLayer {
    /// Share of a token's experts among the first `used` guesses.
    pub recall: Option<f64>,
    /// The same with twice as many guesses.
    pub recall_twice: Option<f64>,
    /// Of the guesses at each place, the share that is used.
    pub precision_by_rank: Vec<f64>,
    /// Of the first `used` guesses, wrong ones for each that was right.
    pub wasted_per_useful: Option<f64>,
}

fn ratio(a: u64, b: u64) -> Option<f64> {
    (b > 0).then(|| a as f64 / b as f64)
}

pub(super) fn previous_token(all: &Tally, ranked: bool) -> PreviousToken {
    let guesses: u64 = all.ranks.iter().map(|rank| rank.0).sum();
    let right: u64 = all.ranks.iter().map(|rank| rank.1).sum();
    let by_rank = || all.ranks.iter().map(|&(all, right)| right as f64 / all as f64).collect();
    PreviousToken {
        recall: all.reuse_next(),
        precision_by_rank: (ranked && guesses > 0).then(by_rank),
        wasted_per_useful: ratio(guesses - right, right),
    }
}

/// Guesses and right ones by place, and experts that were to be guessed.
#[derive(Debug, Clone, Default)]
struct Score {
    ranks: Vec<(u64, u64)>,
    wanted: u64,
}

pub(super) fn next_layer(trace: &Trace, sequences: &[Sequence]) -> NextLayer {
    let layers = trace.header().layers.len();
    let used = trace.header().layers.iter().map(|layer| layer.used as usize).max().unwrap_or(0);
    let scores = crate::sim::in_parallel(layers.saturating_sub(1), |before| {
        let mut score = Score { ranks: vec![(0, 0); 2 * used], wanted: 0 };
        for learned in 0..2 {
            let mut following = Following::new(
                trace.header().layers[before].experts,
                trace.header().layers[before + 1].experts,
            );
            for token in tokens(sequences, learned, LEARN_MAX) {
                following.note(trace.experts(token, before), trace.experts(token, before + 1));
            }
            let mut guesses = Vec::new();
            for token in tokens(sequences, 1 - learned, TRY_MAX) {
                let wanted = trace.experts(token, before + 1);
                following.guess(trace.experts(token, before), 2 * used, &mut guesses);
                score.wanted += wanted.len() as u64;
                for (rank, guess) in score.ranks.iter_mut().zip(&guesses) {
                    rank.0 += 1;
                    rank.1 += u64::from(wanted.contains(guess));
                }
            }
        }
        score
    });
    let mut all = Score { ranks: vec![(0, 0); 2 * used], wanted: 0 };
    for score in scores {
        all.wanted += score.wanted;
        for (to, from) in all.ranks.iter_mut().zip(score.ranks) {
            *to = (to.0 + from.0, to.1 + from.1);
        }
    }
    let sum = |count: usize| {
        all.ranks[..count].iter().fold((0, 0), |sum, rank| (sum.0 + rank.0, sum.1 + rank.1))
    };
    let (guesses, right) = sum(used);
    let by_rank = all.ranks.iter().take_while(|rank| rank.0 > 0);
    NextLayer {
        recall: ratio(right, all.wanted),
        recall_twice: ratio(sum(2 * used).1, all.wanted),
        precision_by_rank: by_rank.map(|&(all, right)| right as f64 / all as f64).collect(),
        wasted_per_useful: ratio(guesses - right, right),
    }
}

/// Tokens of one half, evenly spread if there are more than `most`.
fn tokens(sequences: &[Sequence], wanted: usize, most: usize) -> Vec<usize> {
    let mut all = Vec::new();
    for (number, sequence) in sequences.iter().enumerate() {
        let of_half = sequence.tokens.iter().enumerate();
        let of_half = of_half.filter(|(index, _)| half(sequences, number, *index) == wanted);
        all.extend(of_half.map(|(_, &token)| token as usize));
    }
    let stride = all.len().div_ceil(most).max(1);
    all.into_iter().step_by(stride).collect()
}

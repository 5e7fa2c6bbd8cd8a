//! Traces that show what is nobody's locality: the same tokens in any order, and any experts.

use super::sequences::Sequence;
use crate::error::Result;
use crate::random::Random;
use crate::trace::{Phase, Token, Trace};

/// Tokens of the uniform control at most: more tell nothing more.
const UNIFORM_MAX: usize = 1 << 15;

/// The tokens of each sequence in any order. All layers of a token move together.
pub(super) fn shuffled(trace: &Trace, sequences: &[Sequence], seed: u64) -> Result<Trace> {
    let mut random = Random::new(seed);
    let mut out = Trace::new(trace.header().clone())?;
    for sequence in sequences {
        let mut order = sequence.tokens.clone();
        random.shuffle(&mut order);
        for (place, &token) in (0..).zip(&order) {
            add(&mut out, sequence.prompt, place, trace.row(token as usize))?;
        }
    }
    Ok(out)
}

/// Sequences of the same lengths, in which every layer uses any of its experts.
pub(super) fn uniform(trace: &Trace, sequences: &[Sequence], seed: u64) -> Result<Trace> {
    let mut random = Random::new(seed);
    let mut out = Trace::new(trace.header().clone())?;
    let mut decks: Vec<Vec<u16>> =
        trace.header().layers.iter().map(|layer| (0..layer.experts as u16).collect()).collect();
    let used: Vec<u32> = trace.header().layers.iter().map(|layer| layer.used).collect();
    let mut row = Vec::new();
    for sequence in sequences {
        for place in 0..sequence.tokens.len() as u32 {
            if out.len() == UNIFORM_MAX {
                return Ok(out);
            }
            row.clear();
            for (deck, &used) in decks.iter_mut().zip(&used) {
                // The first cards of a deck that is shuffled no further.
                for card in 0..used as usize {
                    let other = card + random.below(deck.len() - card);
                    deck.swap(card, other);
                }
                row.extend_from_slice(&deck[..used as usize]);
            }
            add(&mut out, sequence.prompt, place, &row)?;
        }
    }
    Ok(out)
}

fn add(out: &mut Trace, prompt: u32, position: u32, row: &[u16]) -> Result<()> {
    let batch = out.len() as u32;
    let token = Token { prompt, position, batch, id: None, phase: Phase::Decode, domain: 0 };
    out.push(token, row, &[])
}

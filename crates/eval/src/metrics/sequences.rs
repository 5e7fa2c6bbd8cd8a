//! The tokens of each prompt, which follow each other.

use crate::trace::{Phase, Trace};

/// The tokens of a phase of one prompt, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Sequence {
    pub(super) prompt: u32,
    pub(super) domain: u16,
    pub(super) tokens: Vec<u32>,
}

/// One for each prompt that has such tokens, in the order of their first ones.
pub(super) fn sequences(trace: &Trace, phase: Phase) -> Vec<Sequence> {
    let mut place = std::collections::HashMap::new();
    let mut all: Vec<Sequence> = Vec::new();
    for (index, token) in (0u32..).zip(trace.tokens()) {
        if token.phase != phase {
            continue;
        }
        let at = *place.entry(token.prompt).or_insert_with(|| {
            let (prompt, domain) = (token.prompt, token.domain);
            all.push(Sequence { prompt, domain, tokens: Vec::new() });
            all.len() - 1
        });
        all[at].tokens.push(index);
    }
    all
}

/// Which half of a trace each sequence's tokens are of, for what is learned on one and tried on the
/// other: every second prompt, or if there is one alone its first and second half.
pub(super) fn half(sequences: &[Sequence], sequence: usize, index: usize) -> usize {
    match sequences {
        [only] => usize::from(2 * index >= only.tokens.len()),
        _ => sequence % 2,
    }
}

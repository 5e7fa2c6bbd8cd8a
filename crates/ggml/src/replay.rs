//! Recorded routing in place of the router's choice, so that a model with random weights moves the
//! records that a real one would. What it computes then means nothing.

use crate::error::{Error, Result};

/// The experts of each MoE layer, token by token.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Replay {
    tokens: Vec<Vec<Vec<u32>>>,
}

impl Replay {
    /// Of tokens, of each of which there are the experts of every MoE layer.
    pub fn new(tokens: Vec<Vec<Vec<u32>>>) -> Self {
        Self { tokens }
    }

    /// How many tokens there are; after the last the first comes again.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// What is recorded of a layer, which has so many `experts`, of which a token uses `used`.
    pub(crate) fn experts(
        &self,
        token: usize,
        layer: usize,
        (used, experts): (usize, u32),
    ) -> Result<&[u32]> {
        let recorded = self.tokens.get(token % self.tokens.len().max(1));
        let found = recorded.and_then(|layers| layers.get(layer)).map_or(&[][..], Vec::as_slice);
        if found.len() != used || found.iter().any(|&e| e >= experts) {
            return Err(Error::Replay { layer, found: found.to_vec(), used, experts });
        }
        Ok(found)
    }
}

//! What batches of several tokens have needed of each layer, for the next one: what to bring before
//! its routing is known, and how much of it.

use std::collections::HashMap;

use crate::residency::Need;

/// What is brought ahead at first, in bytes. At the rate of a bus, about the time that a layer takes.
const BYTES_AT_FIRST: u64 = 32 << 20;

/// The least that is tried, in bytes.
const LEAST_BYTES: u64 = 4 << 20;

/// What an expert counts whose rows were few and long ago. Below, it is no better guess than others.
const LEAST_WEIGHT: f32 = 0.25;

/// Experts by how much they were needed lately, and how many bytes come in the time that the GPU
/// takes for a layer.
///
/// What comes before routing is known may come in vain. As long as the layer before is computed,
/// that costs nothing, as the bus has nothing else to do; from then on it delays what is needed.
#[derive(Debug)]
pub(super) struct Past {
    /// By layer and expert: rows of the last batch, and of those before by half as much each.
    layers: HashMap<usize, Vec<f32>>,
    bytes: u64,
}

impl Default for Past {
    fn default() -> Self {
        Self { layers: HashMap::new(), bytes: BYTES_AT_FIRST }
    }
}

impl Past {
    /// A batch needs `needs` of a layer of so many experts, each for `rows` rows.
    pub(super) fn note(
        &mut self,
        layer: usize,
        experts: u32,
        needs: &[Need],
        rows: impl Fn(u32) -> usize,
    ) {
        let weights = self.layers.entry(layer).or_default();
        weights.resize(experts as usize, 0.0);
        weights.iter_mut().for_each(|weight| *weight /= 2.0);
        for need in needs {
            weights[need.expert as usize] += rows(need.expert) as f32;
        }
    }

    /// Experts that a layer probably needs, the likeliest first.
    pub(super) fn likely(&self, layer: usize) -> Vec<u32> {
        let Some(weights) = self.layers.get(&layer) else { return Vec::new() };
        let mut experts: Vec<(u32, f32)> = (0..).zip(weights.iter().copied()).collect();
        experts.retain(|&(_, weight)| weight >= LEAST_WEIGHT);
        experts.sort_by(|(a, x), (b, y)| y.total_cmp(x).then(a.cmp(b)));
        experts.into_iter().map(|(expert, _)| expert).collect()
    }

    /// How many bytes are brought ahead.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Routing has become known. What was brought ahead was there before (`in_time`) or not, and was
    /// all that could be guessed, or (`is_cut`) not.
    pub(super) fn saw(&mut self, in_time: bool, is_cut: bool) {
        // The bus is to be busy until then, so a little too much is right.
        self.bytes = match (in_time, is_cut) {
            (true, true) => self.bytes.saturating_add(self.bytes / 8),
            (true, false) => self.bytes,
            (false, _) => (self.bytes - self.bytes / 32).max(LEAST_BYTES),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn needs(experts: &[u32]) -> Vec<Need> {
        experts.iter().map(|&expert| Need { expert, last_row: 0 }).collect()
    }

    #[test]
    fn what_was_needed_lately_by_many_rows_comes_first() {
        let mut past = Past::default();
        assert!(past.likely(3).is_empty());
        past.note(3, 8, &needs(&[0, 5, 7]), |expert| expert as usize + 1);
        assert_eq!(past.likely(3), [7, 5, 0]);
        past.note(3, 8, &needs(&[1, 7]), |_| 4);
        assert_eq!(past.likely(3), [7, 1, 5, 0]);
        for _ in 0..5 {
            past.note(3, 8, &needs(&[1]), |_| 1);
        }
        assert_eq!(past.likely(3), [1, 7]);
        assert!(past.likely(2).is_empty());
    }

    #[test]
    fn as_much_is_brought_as_comes_while_a_layer_is_computed() {
        // A bus that brings 10 MB meanwhile, and one that brings all there is.
        for (meanwhile, all, settles) in [(10e6, 1e9, 9e6..11.5e6), (2e9, 70e6, 60e6..80e6)] {
            let mut past = Past::default();
            for _ in 0..200 {
                let bytes = (past.bytes() as f64).min(all);
                past.saw(bytes < meanwhile, (past.bytes() as f64) < all);
            }
            assert!(settles.contains(&(past.bytes() as f64)), "{past:?}");
        }
        let mut past = Past::default();
        (0..1000).for_each(|_| past.saw(false, true));
        assert_eq!(past.bytes(), LEAST_BYTES);
    }
}

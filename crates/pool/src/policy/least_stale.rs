//! Least-Stale: layers come in turn, and what was not chosen in its turn is stale.

use std::cmp::Reverse;

use super::list::Lists;
use super::{Candidates, Evict, Shape};

/// Evicts what cannot be needed for the longest time, after what is told of Least-Stale of SpecMD (Hoang et al., arXiv
/// 2602.03921), which knows that the layers of a model come one after the other. In a *pass*, from the
/// first layer to the last, it evicts
///
/// 1. stale records: of layers that had their turn in this pass, and not used in it;
/// 2. then those that were used in this pass;
/// 3. last those of layers that are still to come.
///
/// Of these, records of the layer whose next turn is the farthest go first, and of one layer the
/// least recently used. Where a layer can only evict its own records, this is LRU; in one pool for
/// all layers it never evicts what LRU does below a token cycle, the records of the layer that comes
/// next. The paper's algorithm was not at hand as code: this is what its text says of it.
#[derive(Clone, Debug)]
pub(crate) struct LeastStale {
    by_use: Lists,
    /// The last layer that had a use, and the step in which its pass began.
    layer: u32,
    pass: u64,
}

impl LeastStale {
    pub(super) fn new(shape: &Shape<'_>) -> Self {
        Self { by_use: Lists::new(shape), layer: 0, pass: 0 }
    }

    fn note(&mut self, layer: u32, now: u64) {
        if layer < self.layer {
            self.pass = now;
        }
        self.layer = layer;
    }
}

impl Evict for LeastStale {
    fn on_insert(&mut self, slot: u32, layer: u32, record: u32, now: u64) {
        self.note(layer, now);
        self.by_use.push(slot, layer, record, now);
    }

    fn on_hit(&mut self, slot: u32, now: u64) {
        let (layer, record) = self.by_use.remove(slot);
        self.note(layer, now);
        self.by_use.push(slot, layer, record, now);
    }

    fn on_remove(&mut self, slot: u32) {
        self.by_use.remove(slot);
    }

    fn victim(&mut self, from: &Candidates<'_>) -> Option<u32> {
        let layers = from.layers.len() as u32;
        // Its first request is a fault: the pass begins with it, though nothing has been used yet.
        let pass = if from.requester < self.layer { from.now } else { self.pass };
        let best = from.layers().filter_map(|layer| {
            let slot = self.by_use.oldest_of(layer, from)?;
            let passed = layer <= from.requester;
            let turn =
                if passed { layers - from.requester + layer } else { layer - from.requester };
            let group = match passed {
                false => 2,
                true => u32::from(self.by_use.step(slot) >= pass),
            };
            Some((group, Reverse(turn), slot))
        });
        best.min().map(|(.., slot)| slot)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Bench, SHAPE};
    use super::*;

    #[test]
    fn the_stale_go_first_and_the_next_layer_last() {
        let mut stale = LeastStale::new(&SHAPE);
        let mut bench = Bench::filled(&mut stale);
        // A pass begins: layer 0 uses 0 and 1.
        stale.on_hit(0, 5);
        stale.on_hit(1, 5);
        assert_eq!(stale.victim(&bench.candidates(0)), Some(2));
        bench.slots[2].pins = 1;
        bench.slots[3].pins = 1;
        // None of layer 1's, whose turn comes next, though layer 0 used its own in this pass.
        assert_eq!(stale.victim(&bench.candidates(0)), Some(0));
        stale.on_hit(4, 6);
        // Layer 1's own ones have the longer way.
        bench.slots[2].pins = 0;
        assert_eq!(stale.victim(&bench.candidates(1)), Some(5));
        for slot in 5..8 {
            bench.slots[slot].pins = 1;
        }
        assert_eq!(stale.victim(&bench.candidates(1)), Some(2));
    }
}

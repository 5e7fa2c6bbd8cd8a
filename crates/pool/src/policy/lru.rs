//! Least recently used.

use super::list::Lists;
use super::{Candidates, Evict, Shape};

/// Evicts the record whose last use is the longest ago. Of records last used in the same step, the
/// one with the highest number goes first: what was a hit and what a fault makes no difference, so
/// that a larger pool holds all that a smaller one does.
#[derive(Clone, Debug)]
pub(crate) struct Lru {
    by_use: Lists,
}

impl Lru {
    pub(super) fn new(shape: &Shape<'_>) -> Self {
        Self { by_use: Lists::new(shape) }
    }
}

impl Evict for Lru {
    fn on_insert(&mut self, slot: u32, layer: u32, record: u32, now: u64) {
        self.by_use.push(slot, layer, record, now);
    }

    fn on_hit(&mut self, slot: u32, now: u64) {
        self.by_use.renew(slot, now);
    }

    fn on_remove(&mut self, slot: u32) {
        self.by_use.remove(slot);
    }

    fn victim(&mut self, from: &Candidates<'_>) -> Option<u32> {
        self.by_use.oldest(from)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Bench, SHAPE};
    use super::*;

    #[test]
    fn the_longest_unused_goes_across_layers() {
        let mut lru = Lru::new(&SHAPE);
        let mut bench = Bench::filled(&mut lru);
        assert_eq!(lru.victim(&bench.candidates(1)), Some(0));
        for slot in [0, 1, 2, 4] {
            lru.on_hit(slot, 1);
        }
        assert_eq!(lru.victim(&bench.candidates(1)), Some(3));
        bench.layers[0].held = 2;
        assert_eq!(lru.victim(&bench.candidates(1)), Some(5));
        assert_eq!(lru.victim(&bench.candidates(0)), Some(3));
    }
}

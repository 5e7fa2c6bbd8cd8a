//! Segmented LRU.

use super::list::Lists;
use super::{Candidates, Evict, Shape};

/// Two segments (Karedla, Love and Wherry, "Caching strategies to improve disk system performance",
/// IEEE Computer 27(3), 1994): what comes is on *probation*, what is used again there becomes
/// *protected*. Of a layer's records at most half are protected; the least recently used one beyond
/// that is on probation again, as the newest there. Evicts the least recently used record on
/// probation, and a protected one only if there is no other.
#[derive(Clone, Debug)]
pub(crate) struct Slru {
    probation: Lists,
    protected: Lists,
    is_protected: Vec<bool>,
    layers: Vec<Counts>,
}

#[derive(Clone, Debug, Default)]
struct Counts {
    held: u32,
    protected: u32,
}

impl Slru {
    pub(super) fn new(shape: &Shape<'_>) -> Self {
        Self {
            probation: Lists::new(shape),
            protected: Lists::new(shape),
            is_protected: vec![false; shape.slots as usize],
            layers: vec![Counts::default(); shape.experts.len()],
        }
    }
}

impl Evict for Slru {
    fn on_insert(&mut self, slot: u32, layer: u32, record: u32, now: u64) {
        self.layers[layer as usize].held += 1;
        self.is_protected[slot as usize] = false;
        self.probation.push(slot, layer, record, now);
    }

    fn on_hit(&mut self, slot: u32, now: u64) {
        if self.is_protected[slot as usize] {
            self.protected.renew(slot, now);
            return;
        }
        let (layer, record) = self.probation.remove(slot);
        self.protected.push(slot, layer, record, now);
        self.is_protected[slot as usize] = true;
        let counts = &mut self.layers[layer as usize];
        counts.protected += 1;
        if counts.protected > (counts.held / 2).max(1) {
            counts.protected -= 1;
            let oldest = self.protected.first(layer).expect("one was put there");
            let (layer, record) = self.protected.remove(oldest);
            self.is_protected[oldest as usize] = false;
            self.probation.push(oldest, layer, record, now);
        }
    }

    fn on_remove(&mut self, slot: u32) {
        let protected = self.is_protected[slot as usize];
        let lists = if protected { &mut self.protected } else { &mut self.probation };
        let (layer, _) = lists.remove(slot);
        let counts = &mut self.layers[layer as usize];
        counts.held -= 1;
        counts.protected -= u32::from(protected);
    }

    fn victim(&mut self, from: &Candidates<'_>) -> Option<u32> {
        self.probation.oldest(from).or_else(|| self.protected.oldest(from))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Bench, SHAPE};
    use super::*;

    #[test]
    fn what_is_used_again_is_protected_by_half() {
        let mut slru = Slru::new(&SHAPE);
        let mut bench = Bench::filled(&mut slru);
        slru.on_hit(0, 1);
        slru.on_hit(1, 2);
        assert_eq!(slru.victim(&bench.candidates(0)), Some(2));
        slru.on_hit(2, 3); // 0 is on probation again, newer than 3
        bench.layers[1].held = 2; // at its floor
        assert_eq!(slru.victim(&bench.candidates(0)), Some(3));
        bench.slots[3].pins = 1;
        assert_eq!(slru.victim(&bench.candidates(0)), Some(0));
    }

    #[test]
    fn protected_ones_go_when_there_is_no_other() {
        let mut slru = Slru::new(&SHAPE);
        let mut bench = Bench::filled(&mut slru);
        slru.on_hit(3, 1);
        slru.on_hit(2, 2);
        bench.slots[0].pins = 1;
        bench.slots[1].pins = 1;
        bench.layers[1].held = 2; // at its floor
        assert_eq!(slru.victim(&bench.candidates(0)), Some(3));
    }
}

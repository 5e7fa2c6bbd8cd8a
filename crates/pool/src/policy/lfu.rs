//! Least frequently used, with exponential decay.

use super::heap::{Heaps, Unit};
use super::{Candidates, Evict, Shape};

/// Evicts the record with the lowest decayed number of uses,
///
/// ```text
/// f(t) = sum over the uses i of 2^-(floor(t / H) - floor(t_i / H))
/// ```
///
/// at step `t`, with half-life `H`: the "combined recency and frequency" of LRFU with its lambda
/// equal to `1 / H` (Lee et al., "LRFU: A spectrum of policies that subsumes the Least Recently Used
/// and Least Frequently Used policies", IEEE Transactions on Computers 50(12), 2001), in stairs of
/// one half-life, which makes it exact in floating point. Of equal ones the least recent goes, of those
/// of one step the one with the highest number.
///
/// Uses are remembered across evictions: a record that comes back has its old uses again.
#[derive(Clone, Debug)]
pub(crate) struct Lfu {
    unit: Unit,
    /// f of each record, in the units of the start.
    uses: Vec<f64>,
    /// The record in each slot.
    record: Vec<u32>,
    by_uses: Heaps,
}

impl Lfu {
    /// `half_life` in token cycles.
    pub(super) fn new(half_life: u32, shape: &Shape<'_>) -> Self {
        Self {
            unit: Unit::new(u64::from(half_life) * shape.cycle),
            uses: vec![0.0; shape.records()],
            record: vec![0; shape.slots as usize],
            by_uses: Heaps::new(shape),
        }
    }

    fn count(&mut self, record: u32, now: u64) -> f64 {
        let unit = self.unit.at(now, |factor| {
            self.uses.iter_mut().for_each(|uses| *uses *= factor);
            self.by_uses.rescale(factor);
        });
        let uses = &mut self.uses[record as usize];
        *uses += unit;
        *uses
    }
}

impl Evict for Lfu {
    fn on_insert(&mut self, slot: u32, layer: u32, record: u32, now: u64) {
        self.record[slot as usize] = record;
        let uses = self.count(record, now);
        self.by_uses.insert(slot, layer, record, uses, now);
    }

    fn on_hit(&mut self, slot: u32, now: u64) {
        let uses = self.count(self.record[slot as usize], now);
        self.by_uses.renew(slot, uses, now);
    }

    fn on_remove(&mut self, slot: u32) {
        self.by_uses.remove(slot);
    }

    fn victim(&mut self, from: &Candidates<'_>) -> Option<u32> {
        self.by_uses.lowest(from)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Bench, SHAPE};
    use super::*;

    #[test]
    fn the_least_used_goes_and_uses_fade() {
        let mut lfu = Lfu::new(1, &SHAPE); // halves every 2 steps
        let bench = Bench::filled(&mut lfu);
        for slot in [0, 1, 2, 4, 5, 6, 7, 0, 0] {
            lfu.on_hit(slot, 1);
        }
        assert_eq!(lfu.victim(&bench.candidates(0)), Some(3)); // 1 use, the others 2 and more
        lfu.on_hit(3, 2); // 1 / 2 + 1 against 2 / 2
        assert_eq!(lfu.victim(&bench.candidates(0)), Some(1));
        for slot in 1..8 {
            lfu.on_hit(slot, 8);
        }
        assert_eq!(lfu.victim(&bench.candidates(0)), Some(0)); // 4 uses, but 4 half-lives ago
    }

    #[test]
    fn uses_outlive_an_eviction() {
        let mut lfu = Lfu::new(100, &SHAPE);
        let bench = Bench::filled(&mut lfu);
        for slot in [0, 0, 0, 1, 2, 3, 4, 5, 6, 7] {
            lfu.on_hit(slot, 1);
        }
        lfu.on_remove(0);
        lfu.on_insert(0, 0, 7, 2);
        lfu.on_remove(1);
        lfu.on_insert(1, 0, 6, 3);
        // Record 7 has 5 uses, record 6 has 3, the rest 2 each: slot 2 is the least recent of those.
        assert_eq!(lfu.victim(&bench.candidates(0)), Some(2));
    }
}

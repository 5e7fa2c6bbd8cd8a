//! Least frequently and recently used.

use super::heap::{Heaps, Unit};
use super::{Candidates, Evict, Shape};

/// Evicts the record with the lowest product of frequency and recency,
///
/// ```text
/// s(t) = n * 2^-(floor(t / H) - floor(t_last / H))
/// ```
///
/// with `n` uses since the record came into the pool, the last of them in step `t_last`. Of equal
/// ones the least recent goes, of those of one step the one with the highest number.
///
/// The exponential keeps the order between two uses, so that a heap can hold it; a score that is
/// divided by the age would not. Unlike [`Lfu`](super::lfu::Lfu), it gives a favourite its full
/// count back at the first new use, and forgets it with the eviction.
#[derive(Clone, Debug)]
pub(crate) struct Lfru {
    unit: Unit,
    /// n of the record in each slot.
    uses: Vec<f64>,
    by_score: Heaps,
}

impl Lfru {
    /// Token cycles.
    const HALF_LIFE: u64 = 4;

    pub(super) fn new(shape: &Shape<'_>) -> Self {
        Self {
            unit: Unit::new(Self::HALF_LIFE * shape.cycle),
            uses: vec![0.0; shape.slots as usize],
            by_score: Heaps::new(shape),
        }
    }

    fn unit(&mut self, now: u64) -> f64 {
        self.unit.at(now, |factor| self.by_score.rescale(factor))
    }
}

impl Evict for Lfru {
    fn on_insert(&mut self, slot: u32, layer: u32, record: u32, now: u64) {
        self.uses[slot as usize] = 1.0;
        let unit = self.unit(now);
        self.by_score.insert(slot, layer, record, unit, now);
    }

    fn on_hit(&mut self, slot: u32, now: u64) {
        let unit = self.unit(now);
        let uses = &mut self.uses[slot as usize];
        *uses += 1.0;
        let score = *uses * unit;
        self.by_score.renew(slot, score, now);
    }

    fn on_remove(&mut self, slot: u32) {
        self.by_score.remove(slot);
    }

    fn victim(&mut self, from: &Candidates<'_>) -> Option<u32> {
        self.by_score.lowest(from)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Bench, SHAPE};
    use super::*;

    #[test]
    fn frequency_and_recency_both_count() {
        let mut lfru = Lfru::new(&SHAPE); // halves every 8 steps
        let bench = Bench::filled(&mut lfru);
        for slot in [0, 0, 0, 1] {
            lfru.on_hit(slot, 1);
        }
        for slot in 2..8 {
            lfru.on_hit(slot, 8);
        }
        // Slot 0: 4 uses one half-life ago. Slot 1: 2 uses, likewise. The others: 2 uses now.
        assert_eq!(lfru.victim(&bench.candidates(0)), Some(1));
        lfru.on_remove(1);
        assert_eq!(lfru.victim(&bench.candidates(0)), Some(0)); // as the others, but less recent
        lfru.on_hit(0, 16);
        assert_eq!(lfru.victim(&bench.candidates(0)), Some(2));
        lfru.on_remove(0);
        lfru.on_insert(0, 0, 7, 16); // its uses are forgotten: 1 now, as 2 one half-life ago
        for slot in 2..8 {
            lfru.on_hit(slot, 16);
        }
        assert_eq!(lfru.victim(&bench.candidates(0)), Some(0));
    }
}

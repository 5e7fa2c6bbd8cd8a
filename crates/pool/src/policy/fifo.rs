//! First in, first out.

use super::list::Lists;
use super::{Candidates, Evict, Shape};

/// Evicts the record that came into the pool first, however often it was used since.
#[derive(Clone, Debug)]
pub(crate) struct Fifo {
    by_arrival: Lists,
}

impl Fifo {
    pub(super) fn new(shape: &Shape<'_>) -> Self {
        Self { by_arrival: Lists::new(shape) }
    }
}

impl Evict for Fifo {
    fn on_insert(&mut self, slot: u32, layer: u32, record: u32, now: u64) {
        self.by_arrival.push(slot, layer, record, now);
    }

    fn on_hit(&mut self, _slot: u32, _now: u64) {}

    fn on_remove(&mut self, slot: u32) {
        self.by_arrival.remove(slot);
    }

    fn victim(&mut self, from: &Candidates<'_>) -> Option<u32> {
        self.by_arrival.oldest(from)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Bench, SHAPE};
    use super::*;

    #[test]
    fn hits_do_not_count() {
        let mut fifo = Fifo::new(&SHAPE);
        let bench = Bench::filled(&mut fifo);
        fifo.on_hit(0, 1);
        assert_eq!(fifo.victim(&bench.candidates(1)), Some(0));
        fifo.on_remove(0);
        fifo.on_insert(0, 1, 7, 1);
        assert_eq!(fifo.victim(&bench.candidates(1)), Some(1));
    }
}

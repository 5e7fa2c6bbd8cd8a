//! S3-FIFO: three static FIFO queues.

use super::list::Lists;
use super::{Candidates, Evict, Shape};

/// S3-FIFO (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023, algorithm 1). A
/// record comes into the *small* queue, a tenth of the slots. When its turn comes there, it moves to the
/// *main* queue if it was used more than once since, else it goes, and is remembered as a *ghost* until as
/// many have gone after it as the main queue holds; a ghost that comes back goes to the main queue
/// at once. When its turn comes in the main queue, a record that was used stays and is asked one use
/// less the next time. Uses count up to 3.
///
/// The tenth is of the layers that may lose a record, since the rest is out of reach.
#[derive(Clone, Debug)]
pub(crate) struct S3Fifo {
    small: Lists,
    main: Lists,
    slots: Vec<SlotUse>,
    layers: Vec<Counts>,
    /// Of each record: how many had left the small queue of its layer, this one included; 0 if it is no ghost.
    ghosts: Vec<u64>,
}

#[derive(Clone, Debug, Default)]
struct SlotUse {
    is_main: bool,
    uses: u8,
}

#[derive(Clone, Debug, Default)]
struct Counts {
    small: u32,
    main: u32,
    /// Records that have left the small queue for good.
    left: u64,
}

impl S3Fifo {
    const USES_MAX: u8 = 3;

    pub(super) fn new(shape: &Shape<'_>) -> Self {
        Self {
            small: Lists::new(shape),
            main: Lists::new(shape),
            slots: vec![SlotUse::default(); shape.slots as usize],
            layers: vec![Counts::default(); shape.experts.len()],
            ghosts: vec![0; shape.records()],
        }
    }

    /// Whether the small queues of the layers that may lose a record have more than their tenth.
    fn small_is_full(&self, from: &Candidates<'_>) -> bool {
        let (mut small, mut all) = (0, 0);
        for layer in from.layers() {
            let counts = &self.layers[layer as usize];
            small += counts.small;
            all += counts.small + counts.main;
        }
        small > all / 10
    }

    fn promote(&mut self, slot: u32, now: u64) {
        let (layer, record) = self.small.remove(slot);
        self.main.push(slot, layer, record, now);
        self.slots[slot as usize] = SlotUse { is_main: true, uses: 0 };
        let counts = &mut self.layers[layer as usize];
        counts.small -= 1;
        counts.main += 1;
    }

    fn victim_in_small(&mut self, from: &Candidates<'_>) -> Option<u32> {
        loop {
            let slot = self.small.oldest(from)?;
            if self.slots[slot as usize].uses <= 1 {
                return Some(slot);
            }
            self.promote(slot, from.now);
        }
    }

    fn victim_in_main(&mut self, from: &Candidates<'_>) -> Option<u32> {
        loop {
            let slot = self.main.oldest(from)?;
            let uses = &mut self.slots[slot as usize].uses;
            if *uses == 0 {
                return Some(slot);
            }
            *uses -= 1;
            self.main.renew(slot, from.now);
        }
    }
}

impl Evict for S3Fifo {
    fn on_insert(&mut self, slot: u32, layer: u32, record: u32, now: u64) {
        let counts = &mut self.layers[layer as usize];
        let left = std::mem::take(&mut self.ghosts[record as usize]);
        let is_main = left > 0 && counts.left - left < u64::from(counts.main.max(1));
        self.slots[slot as usize] = SlotUse { is_main, uses: 0 };
        if is_main {
            counts.main += 1;
            self.main.push(slot, layer, record, now);
        } else {
            counts.small += 1;
            self.small.push(slot, layer, record, now);
        }
    }

    fn on_hit(&mut self, slot: u32, _now: u64) {
        let uses = &mut self.slots[slot as usize].uses;
        *uses = (*uses + 1).min(Self::USES_MAX);
    }

    fn on_remove(&mut self, slot: u32) {
        if self.slots[slot as usize].is_main {
            let (layer, _) = self.main.remove(slot);
            self.layers[layer as usize].main -= 1;
        } else {
            let (layer, record) = self.small.remove(slot);
            let counts = &mut self.layers[layer as usize];
            counts.small -= 1;
            counts.left += 1;
            self.ghosts[record as usize] = counts.left;
        }
    }

    fn victim(&mut self, from: &Candidates<'_>) -> Option<u32> {
        if self.small_is_full(from) {
            self.victim_in_small(from).or_else(|| self.victim_in_main(from))
        } else {
            self.victim_in_main(from).or_else(|| self.victim_in_small(from))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Bench, SHAPE};
    use super::*;

    #[test]
    fn one_use_does_not_save_and_two_do() {
        let mut s3 = S3Fifo::new(&SHAPE);
        let bench = Bench::filled(&mut s3);
        for slot in [0, 0, 1] {
            s3.on_hit(slot, 1);
        }
        assert_eq!(s3.victim(&bench.candidates(0)), Some(1));
        assert!(s3.slots[0].is_main && !s3.slots[1].is_main);
    }

    #[test]
    fn ghosts_come_back_to_the_main_queue() {
        let mut s3 = S3Fifo::new(&SHAPE);
        let bench = Bench::filled(&mut s3);
        s3.on_remove(2);
        s3.on_insert(2, 0, 5, 1);
        assert!(s3.slots[2].is_main);
        // Three have left since the fourth did, of whom the main queue holds one.
        for slot in [3, 0, 1] {
            s3.on_remove(slot);
        }
        s3.on_insert(3, 0, 4, 2);
        assert!(!s3.slots[3].is_main);
        assert_eq!(s3.victim(&bench.candidates(1)), Some(4));
    }

    #[test]
    fn uses_in_the_main_queue_are_used_up() {
        let mut s3 = S3Fifo::new(&SHAPE);
        let mut bench = Bench::filled(&mut s3);
        bench.layers[1].held = 2; // at its floor
        for slot in 0..4 {
            s3.on_hit(slot, 1);
            s3.on_hit(slot, 1);
            s3.promote(slot, 2);
        }
        for _ in 0..9 {
            s3.on_hit(1, 3);
        }
        s3.on_hit(0, 3);
        assert_eq!(s3.victim(&bench.candidates(0)), Some(2));
        assert_eq!((s3.slots[0].uses, s3.slots[1].uses), (0, 2));
    }
}

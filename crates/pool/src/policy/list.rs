//! Doubly linked lists through the slots, one per layer, oldest first.

use super::{Candidates, Shape};

const NONE: u32 = u32::MAX;

#[derive(Clone, Debug)]
struct Link {
    newer: u32,
    older: u32,
    layer: u32,
    /// The number of the record in the slot.
    record: u32,
    /// The step in which it came to the new end.
    step: u64,
}

#[derive(Clone, Debug)]
struct Ends {
    newest: u32,
    oldest: u32,
}

/// The slots of a class, each in the list of its layer, in the order of the steps in which they came
/// to its new end. Of those of one step the higher numbers of records stand first.
#[derive(Clone, Debug)]
pub(super) struct Lists {
    links: Vec<Link>,
    ends: Vec<Ends>,
}

impl Lists {
    pub(super) fn new(shape: &Shape<'_>) -> Self {
        let link = Link { newer: NONE, older: NONE, layer: NONE, record: NONE, step: 0 };
        Self {
            links: vec![link; shape.slots as usize],
            ends: vec![Ends { newest: NONE, oldest: NONE }; shape.experts.len()],
        }
    }

    /// Puts the slot of a record at the new end of its layer's list. It must be in no list.
    pub(super) fn push(&mut self, slot: u32, layer: u32, record: u32, step: u64) {
        let ends = &mut self.ends[layer as usize];
        // Past those of this step with lower numbers: as many as a step has records.
        let (mut older, mut newer) = (ends.newest, NONE);
        while older != NONE && self.links[older as usize].is_after(step, record) {
            newer = older;
            older = self.links[older as usize].older;
        }
        match older {
            NONE => ends.oldest = slot,
            older => self.links[older as usize].newer = slot,
        }
        match newer {
            NONE => ends.newest = slot,
            newer => self.links[newer as usize].older = slot,
        }
        self.links[slot as usize] = Link { newer, older, layer, record, step };
    }

    /// Takes a slot out of its list and returns the layer and the record.
    pub(super) fn remove(&mut self, slot: u32) -> (u32, u32) {
        let Link { newer, older, layer, record, .. } = self.links[slot as usize];
        let ends = &mut self.ends[layer as usize];
        match newer {
            NONE => ends.newest = older,
            newer => self.links[newer as usize].older = older,
        }
        match older {
            NONE => ends.oldest = newer,
            older => self.links[older as usize].newer = newer,
        }
        (layer, record)
    }

    /// Moves a slot to the new end.
    pub(super) fn renew(&mut self, slot: u32, step: u64) {
        let (layer, record) = self.remove(slot);
        self.push(slot, layer, record, step);
    }

    /// The step in which a slot came to the new end.
    pub(super) fn step(&self, slot: u32) -> u64 {
        self.links[slot as usize].step
    }

    /// The first slot of a layer's list, whether it may go or not.
    pub(super) fn first(&self, layer: u32) -> Option<u32> {
        Some(self.ends[layer as usize].oldest).filter(|&slot| slot != NONE)
    }

    /// The oldest candidate of a layer.
    pub(super) fn oldest_of(&self, layer: u32, from: &Candidates<'_>) -> Option<u32> {
        let mut slot = self.ends[layer as usize].oldest;
        while slot != NONE && !from.allow(slot) {
            slot = self.links[slot as usize].newer;
        }
        Some(slot).filter(|&slot| slot != NONE)
    }

    /// The oldest candidate of all layers.
    pub(super) fn oldest(&self, from: &Candidates<'_>) -> Option<u32> {
        let mut best: Option<u32> = None;
        for layer in from.layers() {
            let mut slot = self.ends[layer as usize].oldest;
            while slot != NONE && best.is_none_or(|best| self.is_older(slot, best)) {
                if from.allow(slot) {
                    best = Some(slot);
                }
                slot = self.links[slot as usize].newer;
            }
        }
        best
    }

    fn is_older(&self, a: u32, b: u32) -> bool {
        let (a, b) = (&self.links[a as usize], &self.links[b as usize]);
        (a.step, b.record) < (b.step, a.record)
    }
}

impl Link {
    fn is_after(&self, step: u64, record: u32) -> bool {
        (self.step, record) > (step, self.record)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::SHAPE;
    use super::*;

    fn order(lists: &Lists, layer: usize) -> Vec<u32> {
        let mut slots = Vec::new();
        let mut slot = lists.ends[layer].oldest;
        while slot != NONE {
            slots.push(slot);
            slot = lists.links[slot as usize].newer;
        }
        let mut back = Vec::new();
        let mut slot = lists.ends[layer].newest;
        while slot != NONE {
            back.insert(0, slot);
            slot = lists.links[slot as usize].older;
        }
        assert_eq!(slots, back);
        slots
    }

    #[test]
    fn removes_at_both_ends_and_in_the_middle() {
        let mut lists = Lists::new(&SHAPE);
        for slot in 0..4 {
            lists.push(slot, 1, slot, slot.into());
        }
        assert_eq!(order(&lists, 0), []);
        for (slot, rest) in [(1, vec![0, 2, 3]), (0, vec![2, 3]), (3, vec![2]), (2, vec![])] {
            assert_eq!(lists.remove(slot), (1, slot));
            assert_eq!(order(&lists, 1), rest);
        }
        lists.push(3, 0, 3, 9);
        assert_eq!(order(&lists, 0), [3]);
    }

    #[test]
    fn within_a_step_the_numbers_of_records_decide() {
        let mut lists = Lists::new(&SHAPE);
        for (slot, record) in [(0, 9), (1, 5), (2, 7), (3, 1)] {
            lists.push(slot, 0, record, 4);
        }
        assert_eq!(order(&lists, 0), [0, 2, 1, 3]);
        lists.push(4, 0, 0, 5);
        lists.renew(3, 5);
        assert_eq!(order(&lists, 0), [0, 2, 1, 3, 4]);
        assert_eq!((lists.first(0), lists.first(1), lists.step(3)), (Some(0), None, 5));
    }
}

//! Doubly linked lists through the slots, one per layer, oldest first.

use super::{Candidates, Shape};

const NONE: u32 = u32::MAX;

#[derive(Clone, Debug)]
struct Link {
    newer: u32,
    older: u32,
    layer: u32,
    /// The serial number of the slot's last move to the new end.
    stamp: u64,
}

#[derive(Clone, Debug)]
struct Ends {
    newest: u32,
    oldest: u32,
}

/// The slots of a class, each in the list of its layer. Stamps order the slots across layers.
#[derive(Clone, Debug)]
pub(super) struct Lists {
    links: Vec<Link>,
    ends: Vec<Ends>,
    stamp: u64,
}

impl Lists {
    pub(super) fn new(shape: &Shape<'_>) -> Self {
        let link = Link { newer: NONE, older: NONE, layer: NONE, stamp: 0 };
        Self {
            links: vec![link; shape.slots as usize],
            ends: vec![Ends { newest: NONE, oldest: NONE }; shape.experts.len()],
            stamp: 0,
        }
    }

    /// Puts a slot at the new end of a layer's list. It must be in no list.
    pub(super) fn push(&mut self, slot: u32, layer: u32) {
        self.stamp += 1;
        let ends = &mut self.ends[layer as usize];
        let older = ends.newest;
        ends.newest = slot;
        match older {
            NONE => ends.oldest = slot,
            older => self.links[older as usize].newer = slot,
        }
        self.links[slot as usize] = Link { newer: NONE, older, layer, stamp: self.stamp };
    }

    /// Takes a slot out of its list and returns the layer.
    pub(super) fn remove(&mut self, slot: u32) -> u32 {
        let Link { newer, older, layer, .. } = self.links[slot as usize];
        let ends = &mut self.ends[layer as usize];
        match newer {
            NONE => ends.newest = older,
            newer => self.links[newer as usize].older = older,
        }
        match older {
            NONE => ends.oldest = newer,
            older => self.links[older as usize].newer = newer,
        }
        layer
    }

    /// The candidate with the smallest stamp: the oldest of each layer's oldest ones.
    pub(super) fn oldest(&self, from: &Candidates<'_>) -> Option<u32> {
        let mut best = None;
        let mut best_stamp = u64::MAX;
        for layer in from.layers() {
            let mut slot = self.ends[layer as usize].oldest;
            while slot != NONE && self.links[slot as usize].stamp < best_stamp {
                if from.allow(slot) {
                    best = Some(slot);
                    best_stamp = self.links[slot as usize].stamp;
                }
                slot = self.links[slot as usize].newer;
            }
        }
        best
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
            lists.push(slot, 1);
        }
        assert_eq!(order(&lists, 0), []);
        for (slot, rest) in [(1, vec![0, 2, 3]), (0, vec![2, 3]), (3, vec![2]), (2, vec![])] {
            assert_eq!(lists.remove(slot), 1);
            assert_eq!(order(&lists, 1), rest);
        }
        lists.push(3, 0);
        assert_eq!(order(&lists, 0), [3]);
    }
}

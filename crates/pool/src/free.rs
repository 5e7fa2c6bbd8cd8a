//! The free slots of a class, and the region of slots that each layer is at home in.

use std::ops::Range;

/// A set of slots that finds the next member from anywhere in O(log n): a bitmap of the slots, a
/// bitmap of its words that are not zero, and so on up to a single word.
#[derive(Clone, Debug)]
pub(crate) struct FreeSlots {
    /// Bit `i` of a level stands for word `i` of the level below it.
    levels: Vec<Vec<u64>>,
    len: u32,
}

const BITS: usize = u64::BITS as usize;

impl FreeSlots {
    /// All slots below `slots`.
    pub(crate) fn all(slots: u32) -> Self {
        let mut levels = Vec::new();
        // One more: searches may begin at the end.
        let mut bits = slots as usize + 1;
        while levels.is_empty() || bits > 1 {
            bits = bits.div_ceil(BITS);
            levels.push(vec![0; bits]);
        }
        let mut set = Self { levels, len: 0 };
        (0..slots).for_each(|slot| set.insert(slot));
        set
    }

    pub(crate) fn len(&self) -> u32 {
        self.len
    }

    pub(crate) fn insert(&mut self, slot: u32) {
        self.len += 1;
        let mut at = slot as usize;
        for words in &mut self.levels {
            let word = &mut words[at / BITS];
            let was_empty = *word == 0;
            *word |= 1 << (at % BITS);
            if !was_empty {
                return;
            }
            at /= BITS;
        }
    }

    pub(crate) fn remove(&mut self, slot: u32) {
        self.len -= 1;
        let mut at = slot as usize;
        for words in &mut self.levels {
            let word = &mut words[at / BITS];
            *word &= !(1 << (at % BITS));
            if *word != 0 {
                return;
            }
            at /= BITS;
        }
    }

    pub(crate) fn contains(&self, slot: u32) -> bool {
        self.word(0, slot as usize / BITS) >> (slot as usize % BITS) & 1 == 1
    }

    /// The lowest member that is not below `from`.
    fn at_or_above(&self, from: u32) -> Option<u32> {
        let mut at = from as usize;
        for level in 0..self.levels.len() {
            let above = self.word(level, at / BITS) & (!0 << (at % BITS));
            if above != 0 {
                let found = at / BITS * BITS + above.trailing_zeros() as usize;
                return Some(self.descend(level, found, |word| word.trailing_zeros()));
            }
            at = at / BITS + 1;
        }
        None
    }

    /// The highest member below `end`.
    fn below(&self, end: u32) -> Option<u32> {
        let mut at = end as usize;
        for level in 0..self.levels.len() {
            let below = self.word(level, at / BITS) & !(!0 << (at % BITS));
            if below != 0 {
                let found = at / BITS * BITS + below.ilog2() as usize;
                return Some(self.descend(level, found, u64::ilog2));
            }
            at /= BITS;
        }
        None
    }

    /// From a bit of `level` down to the slot, by `pick`ing one bit of each word on the way.
    fn descend(&self, level: usize, mut at: usize, pick: impl Fn(u64) -> u32) -> u32 {
        for words in self.levels[..level].iter().rev() {
            at = at * BITS + pick(words[at]) as usize;
        }
        at as u32
    }

    fn word(&self, level: usize, word: usize) -> u64 {
        self.levels[level].get(word).copied().unwrap_or(0)
    }

    /// The lowest member in `region`, else the one that is nearest to it.
    pub(crate) fn nearest(&self, region: &Range<u32>) -> Option<u32> {
        let above = self.at_or_above(region.start);
        if above.is_some_and(|slot| slot < region.end) {
            return above;
        }
        match (self.below(region.start), above) {
            (Some(below), Some(above)) => {
                let nearer = region.start - below <= above + 1 - region.end;
                Some(if nearer { below } else { above })
            }
            (below, above) => below.or(above),
        }
    }
}

/// Shares `slots` out among layers in proportion to their `experts`, in order and without gaps: a
/// layer gets its proportion, rounded up or down, and never more slots than it has experts. What
/// is left over when every expert has a slot follows behind the last share.
pub(crate) fn even_shares(experts: &[u32], slots: u32) -> impl Iterator<Item = Range<u32>> + '_ {
    let all: u64 = experts.iter().copied().map(u64::from).sum();
    let shared = u64::from(slots).min(all);
    // Both factors are below 2^32.
    let cut = move |before: u64| (shared * before / all.max(1)) as u32;
    let mut before = 0;
    experts.iter().map(move |&experts| {
        let start = cut(before);
        before += u64::from(experts);
        start..cut(before)
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

        #[test]
        fn free_slots_agree_with_a_tree_set(
            slots in prop_oneof![0u32..200, 4_000u32..4_200, Just(64), Just(4_096)],
            changes in prop::collection::vec(any::<u32>(), 0..400),
            looks in prop::collection::vec((any::<u32>(), any::<u32>()), 20),
        ) {
            let mut set = FreeSlots::all(slots);
            let mut model: BTreeSet<u32> = (0..slots).collect();
            if changes.len() > 200 {
                // From nearly empty as well as from full.
                (0..slots).for_each(|slot| set.remove(slot));
                model.clear();
            }
            for change in changes.iter().filter(|_| slots > 0) {
                let slot = change % slots;
                prop_assert_eq!(set.contains(slot), model.contains(&slot));
                if model.remove(&slot) {
                    set.remove(slot);
                } else {
                    set.insert(slot);
                    model.insert(slot);
                }
            }
            prop_assert_eq!(set.len() as usize, model.len());
            for (a, b) in looks {
                let (a, b) = (a % (slots + 1), b % (slots + 1));
                let region = a.min(b)..a.max(b);
                prop_assert_eq!(set.at_or_above(a), model.range(a..).next().copied());
                prop_assert_eq!(set.below(a), model.range(..a).next_back().copied());
                let distance = |slot: u32| {
                    if slot < region.start { region.start - slot }
                    else if slot >= region.end { slot + 1 - region.end }
                    else { 0 }
                };
                let expected = model.iter().copied().min_by_key(|&slot| (distance(slot), slot));
                prop_assert_eq!(set.nearest(&region), expected);
            }
        }

        #[test]
        fn shares_are_even_and_cover_what_can_be_used(
            experts in prop::collection::vec(1u32..300, 1..20),
            slots in 0u32..4_000,
        ) {
            let all: u32 = experts.iter().sum();
            let mut end = 0;
            for (share, &experts) in even_shares(&experts, slots).zip(&experts) {
                prop_assert_eq!(share.start, end);
                end = share.end;
                let exact = f64::from(experts) * f64::from(slots.min(all)) / f64::from(all);
                prop_assert!((share.len() as f64 - exact).abs() < 1.0);
                prop_assert!(share.len() as u32 <= experts);
            }
            prop_assert_eq!(end, slots.min(all));
        }
    }
}

//! Any record.

use super::{Candidates, Evict, Shape};

const NONE: u32 = u32::MAX;

/// Evicts any candidate with equal chances, by a seeded generator: what a policy has to beat.
#[derive(Clone, Debug)]
pub(crate) struct Random {
    /// The slots of each layer, in no order.
    members: Vec<u32>,
    layers: Vec<Members>,
    homes: Vec<Home>,
    generator: SplitMix,
}

#[derive(Clone, Debug)]
struct Members {
    /// Where they begin in `Random::members`.
    base: usize,
    len: u32,
}

/// Where a slot stands.
#[derive(Clone, Debug)]
struct Home {
    layer: u32,
    place: u32,
}

impl Random {
    /// Draws before the search counts the candidates one by one.
    const DRAWS: u32 = 16;

    pub(super) fn new(shape: &Shape<'_>) -> Self {
        let mut base = 0;
        let layers = shape.experts.iter().map(|&experts| {
            let members = Members { base, len: 0 };
            base += experts.min(shape.slots) as usize;
            members
        });
        let layers = layers.collect();
        Self {
            members: vec![NONE; base],
            layers,
            homes: vec![Home { layer: NONE, place: NONE }; shape.slots as usize],
            generator: SplitMix { state: shape.seed },
        }
    }

    fn members(&self, layer: u32) -> &[u32] {
        let &Members { base, len } = &self.layers[layer as usize];
        &self.members[base..base + len as usize]
    }

    /// The `nth` slot of the layers that may lose one.
    fn nth(&self, from: &Candidates<'_>, mut nth: u32) -> Option<u32> {
        for layer in from.layers() {
            let members = self.members(layer);
            match members.get(nth as usize) {
                Some(&slot) => return Some(slot),
                None => nth -= members.len() as u32,
            }
        }
        None
    }

    fn candidates<'a>(&'a self, from: &'a Candidates<'_>) -> impl Iterator<Item = u32> + 'a {
        let slots = from.layers().flat_map(|layer| self.members(layer));
        slots.copied().filter(|&slot| from.allow(slot))
    }
}

impl Evict for Random {
    fn on_insert(&mut self, slot: u32, layer: u32, _record: u32, _now: u64) {
        let members = &mut self.layers[layer as usize];
        self.homes[slot as usize] = Home { layer, place: members.len };
        self.members[members.base + members.len as usize] = slot;
        members.len += 1;
    }

    fn on_hit(&mut self, _slot: u32, _now: u64) {}

    fn on_remove(&mut self, slot: u32) {
        let Home { layer, place } = self.homes[slot as usize];
        let members = &mut self.layers[layer as usize];
        members.len -= 1;
        let last = self.members[members.base + members.len as usize];
        self.members[members.base + place as usize] = last;
        self.homes[last as usize].place = place;
    }

    fn victim(&mut self, from: &Candidates<'_>) -> Option<u32> {
        let slots = from.layers().map(|layer| self.layers[layer as usize].len).sum();
        if slots == 0 {
            return None;
        }
        for _ in 0..Self::DRAWS {
            let draw = self.generator.below(slots);
            if let Some(slot) = self.nth(from, draw).filter(|&slot| from.allow(slot)) {
                return Some(slot);
            }
        }
        // Few candidates among many pinned slots: draw among the candidates themselves.
        let count = self.candidates(from).count() as u32;
        if count == 0 {
            return None;
        }
        let draw = self.generator.below(count);
        self.candidates(from).nth(draw as usize)
    }
}

/// SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
#[derive(Clone, Debug)]
struct SplitMix {
    state: u64,
}

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`; the bias of at most `bound` in 2^32 does not matter here.
    fn below(&mut self, bound: u32) -> u32 {
        (((self.next() >> 32) * u64::from(bound)) >> 32) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Bench, SHAPE};
    use super::*;

    #[test]
    fn splitmix_matches_its_reference() {
        // The first outputs of the authors' splitmix64.c for the state 1234567.
        let mut generator = SplitMix { state: 1_234_567 };
        let outputs = [generator.next(), generator.next(), generator.next()];
        let expected =
            [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423];
        assert_eq!(outputs, expected);
    }

    #[test]
    fn every_candidate_gets_its_share() {
        let mut random = Random::new(&SHAPE);
        let mut bench = Bench::filled(&mut random);
        bench.slots[5].pins = 1;
        let mut drawn = [0u32; 8];
        for _ in 0..7_000 {
            drawn[random.victim(&bench.candidates(0)).unwrap() as usize] += 1;
        }
        assert_eq!(drawn[5], 0);
        assert!((0..8).filter(|&slot| slot != 5).all(|slot| (800..1_200).contains(&drawn[slot])));
    }

    #[test]
    fn members_follow_their_slots() {
        let mut random = Random::new(&SHAPE);
        Bench::filled(&mut random);
        random.on_remove(1);
        random.on_remove(7);
        random.on_insert(1, 1, 7, 1);
        assert_eq!(random.members(0), [0, 3, 2]);
        assert_eq!(random.members(1), [4, 5, 6, 1]);
        random.on_remove(4);
        assert_eq!(random.members(1), [1, 5, 6]);
    }
}

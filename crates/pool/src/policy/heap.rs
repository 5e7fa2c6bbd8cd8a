//! Binary min-heaps over the slots, one per layer, whose keys hold still between uses.
//!
//! Both frequency policies weigh a use by 2^-(its age), and all weights fall at the same rate. So
//! the uses are not made lighter as time goes by, the later ones are made heavier ([`Unit`]), and
//! no key changes but that of the slot in use ("forward decay", Cormode et al., ICDE 2009).

use super::{Candidates, Shape};

const NONE: u32 = u32::MAX;

/// The weight of a use now, relative to the time when the pool was made: doubled at every half-life.
#[derive(Clone, Debug)]
pub(super) struct Unit {
    half_life: u64,
    /// Half-lives since the start.
    age: u64,
    weight: f64,
}

impl Unit {
    /// Past this weight, all weights are divided by it. Both are powers of two, so that every
    /// weight stays exact, on any machine.
    const LIMIT: f64 = (1u128 << 127) as f64;

    /// `half_life` in steps.
    pub(super) fn new(half_life: u64) -> Self {
        Self { half_life, age: 0, weight: 1.0 }
    }

    /// The weight of a use in step `now`. Calls `rescale` when all earlier weights are to be
    /// multiplied by its argument.
    pub(super) fn at(&mut self, now: u64, mut rescale: impl FnMut(f64)) -> f64 {
        let age = now / self.half_life;
        while self.age < age {
            self.age += 1;
            self.weight *= 2.0;
            if self.weight >= Self::LIMIT {
                self.weight /= Self::LIMIT;
                rescale(1.0 / Self::LIMIT);
            }
        }
        self.weight
    }
}

#[derive(Clone, Debug)]
struct Node {
    score: f64,
    /// The step of the slot's last use: of equal scores the least recent goes first.
    step: u64,
    /// The number of its record: of those of one step the highest goes first.
    record: u32,
    layer: u32,
    /// Position in the heap of the layer.
    place: u32,
}

#[derive(Clone, Debug)]
struct Heap {
    /// Where the heap begins in `Heaps::order`.
    base: usize,
    len: u32,
}

/// The slots of a class, each in the heap of its layer.
#[derive(Clone, Debug)]
pub(super) struct Heaps {
    nodes: Vec<Node>,
    heaps: Vec<Heap>,
    order: Vec<u32>,
}

impl Heaps {
    pub(super) fn new(shape: &Shape<'_>) -> Self {
        let mut base = 0;
        let heaps = shape.experts.iter().map(|&experts| {
            let heap = Heap { base, len: 0 };
            base += experts.min(shape.slots) as usize;
            heap
        });
        let heaps = heaps.collect();
        let node = Node { score: 0.0, step: 0, record: NONE, layer: NONE, place: NONE };
        Self { nodes: vec![node; shape.slots as usize], heaps, order: vec![NONE; base] }
    }

    /// Puts the slot of a record into its layer's heap. It must be in no heap.
    pub(super) fn insert(&mut self, slot: u32, layer: u32, record: u32, score: f64, step: u64) {
        let heap = &mut self.heaps[layer as usize];
        let place = heap.len;
        heap.len += 1;
        self.nodes[slot as usize] = Node { score, step, record, layer, place };
        self.put(layer, place, slot);
        self.rise(layer, place);
    }

    /// Gives a slot its score at a new use.
    pub(super) fn renew(&mut self, slot: u32, score: f64, step: u64) {
        let node = &mut self.nodes[slot as usize];
        node.score = score;
        node.step = step;
        let (layer, place) = (node.layer, node.place);
        self.restore(layer, place);
    }

    pub(super) fn remove(&mut self, slot: u32) {
        let Node { layer, place, .. } = self.nodes[slot as usize];
        let heap = &mut self.heaps[layer as usize];
        heap.len -= 1;
        let end = heap.len;
        if place < end {
            let last = self.get(layer, end);
            self.put(layer, place, last);
            self.restore(layer, place);
        }
    }

    /// Multiplies every score.
    pub(super) fn rescale(&mut self, factor: f64) {
        for node in &mut self.nodes {
            node.score *= factor;
        }
        // Scores that underflow to zero become equal, and their last uses decide anew.
        for layer in 0..self.heaps.len() as u32 {
            for place in (0..self.heaps[layer as usize].len / 2).rev() {
                self.sink(layer, place);
            }
        }
    }

    /// The candidate with the lowest score.
    pub(super) fn lowest(&self, from: &Candidates<'_>) -> Option<u32> {
        let mut best = None;
        for layer in from.layers() {
            self.search(layer, 0, from, &mut best);
        }
        best
    }

    /// Looks for a better candidate below a place. Ends at the first candidate and at the first slot
    /// that is no better than `best`, since all below are worse: so it visits only the slots that
    /// stand above the answer, and their children. It recurses as deep as the heap is.
    fn search(&self, layer: u32, place: u32, from: &Candidates<'_>, best: &mut Option<u32>) {
        if place >= self.heaps[layer as usize].len {
            return;
        }
        let slot = self.get(layer, place);
        if best.is_some_and(|best| !self.less(slot, best)) {
            return;
        }
        if from.allow(slot) {
            *best = Some(slot);
            return;
        }
        self.search(layer, 2 * place + 1, from, best);
        self.search(layer, 2 * place + 2, from, best);
    }

    fn restore(&mut self, layer: u32, place: u32) {
        if self.rise(layer, place) == place {
            self.sink(layer, place);
        }
    }

    fn rise(&mut self, layer: u32, mut place: u32) -> u32 {
        let slot = self.get(layer, place);
        while place > 0 {
            let parent = (place - 1) / 2;
            let above = self.get(layer, parent);
            if !self.less(slot, above) {
                break;
            }
            self.put(layer, place, above);
            place = parent;
        }
        self.put(layer, place, slot);
        place
    }

    fn sink(&mut self, layer: u32, mut place: u32) {
        let len = self.heaps[layer as usize].len;
        let slot = self.get(layer, place);
        loop {
            let mut child = 2 * place + 1;
            if child >= len {
                break;
            }
            if child + 1 < len && self.less(self.get(layer, child + 1), self.get(layer, child)) {
                child += 1;
            }
            let below = self.get(layer, child);
            if !self.less(below, slot) {
                break;
            }
            self.put(layer, place, below);
            place = child;
        }
        self.put(layer, place, slot);
    }

    fn less(&self, a: u32, b: u32) -> bool {
        let (a, b) = (&self.nodes[a as usize], &self.nodes[b as usize]);
        a.score < b.score || (a.score == b.score && (a.step, b.record) < (b.step, a.record))
    }

    fn get(&self, layer: u32, place: u32) -> u32 {
        self.order[self.heaps[layer as usize].base + place as usize]
    }

    fn put(&mut self, layer: u32, place: u32, slot: u32) {
        self.order[self.heaps[layer as usize].base + place as usize] = slot;
        self.nodes[slot as usize].place = place;
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::Bench;
    use super::super::{Evictor, Policy};
    use super::*;

    fn check(heaps: &Heaps) {
        for (layer, heap) in (0u32..).zip(&heaps.heaps) {
            for place in 0..heap.len {
                let slot = heaps.get(layer, place);
                assert_eq!(heaps.nodes[slot as usize].place, place);
                assert!(place == 0 || !heaps.less(slot, heaps.get(layer, (place - 1) / 2)));
            }
        }
    }

    #[test]
    fn stays_a_heap_under_any_change() {
        let shape = Shape { slots: 100, experts: &[60, 60], cycle: 2, seed: 0 };
        let mut heaps = Heaps::new(&shape);
        let mut held = [false; 100];
        let mut random = 1u64;
        for step in 0..5_000 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let slot = (random >> 33) as u32 % 100;
            let score = ((random >> 20) & 15) as f64;
            match (held[slot as usize], random >> 63) {
                (false, _) => heaps.insert(slot, slot / 50, slot, score, step / 3),
                (true, 0) => heaps.renew(slot, score, step / 3),
                (true, _) => heaps.remove(slot),
            }
            held[slot as usize] = !held[slot as usize] || random >> 63 == 0;
            if step % 1_000 == 0 {
                heaps.rescale(1e-200);
            }
            check(&heaps);
        }
    }

    #[test]
    fn the_unit_doubles_and_is_rescaled_exactly() {
        let mut unit = Unit::new(10);
        let mut factor = 1.0;
        assert_eq!(unit.at(9, |f| factor *= f), 1.0);
        assert_eq!(unit.at(10, |f| factor *= f), 2.0);
        assert_eq!(unit.at(1_269, |f| factor *= f), 2f64.powi(126));
        assert_eq!(factor, 1.0);
        assert_eq!(unit.at(1_270, |f| factor *= f), 1.0);
        assert_eq!(factor, 2f64.powi(-127));
    }

    #[test]
    fn order_survives_many_rescalings() {
        for policy in [Policy::Lfu { half_life: 1 }, Policy::Lfru] {
            let shape = Shape { slots: 8, experts: &[4, 4], cycle: 1, seed: 0 };
            let mut evictor = Evictor::new(&policy, &shape);
            let bench = Bench::filled(evictor.policy());
            for slot in [7, 6, 5, 4, 3, 1, 0, 2] {
                evictor.policy().on_hit(slot, 0);
            }
            // All in one step; then only slot 7, for thousands of half-lives.
            for now in 0..40_000 {
                evictor.policy().on_hit(7, now);
            }
            for expected in 0..8 {
                let mut bench = Bench { layers: bench.layers.clone(), slots: bench.slots.clone() };
                bench.layers[0].floor = 0;
                bench.layers[1].floor = 0;
                assert_eq!(
                    evictor.policy().victim(&bench.candidates(0)),
                    Some(expected),
                    "{policy}"
                );
                evictor.policy().on_remove(expected);
            }
        }
    }
}

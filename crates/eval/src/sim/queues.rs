//! FIFO and random pools per layer, of all sizes beside each other in one pass.
//!
//! They are no stack algorithms: a larger pool does not hold all that a smaller one does. But what a step
//! costs is little where nothing is missing, and an expert tells in one word which of the pools hold it.

use tierstream_pool::Policy;

use super::steps::LayerSteps;
use super::{Eviction, Setup, Steps};
use crate::random::Random;
use crate::trace::Trace;

/// Pools that fit into a word.
const AT_ONCE: usize = 64;

/// Counted hits and first fills of a size, of all layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Hits {
    pub(super) hits: u64,
    pub(super) fills: u64,
}

/// Whether a policy is simulated here.
pub(super) fn knows(eviction: Eviction) -> bool {
    matches!(eviction, Eviction::Online(Policy::Fifo | Policy::Random))
}

/// Hits of each of the sizes, which have room for every step. `slots` are those of the layers.
pub(super) fn hits(
    trace: &Trace,
    setup: &Setup,
    steps: &Steps<'_>,
    slots: &[&[u32]],
) -> (Vec<Hits>, u64) {
    let random = setup.eviction == Eviction::Online(Policy::Random);
    let layers = super::curve::in_parallel(trace.header().layers.len(), |layer| {
        let own = match random {
            true => LayerSteps::by_last_row(steps, layer),
            false => LayerSteps::by_number_down(steps, layer),
        };
        let experts = trace.header().layers[layer].experts as usize;
        let mut all = Vec::new();
        let mut requests = 0;
        for sizes in slots.chunks(AT_ONCE) {
            let sizes: Vec<usize> = sizes.iter().map(|slots| slots[layer] as usize).collect();
            // The pool gives each layer a generator of its own.
            let (hits, asked) = match random {
                true => run::<Drawn>(&own, experts, &sizes, setup.seed ^ layer as u64),
                false => run::<Fifo>(&own, experts, &sizes, 0),
            };
            all.extend(hits);
            requests = asked;
        }
        (all, requests)
    });
    let mut sum = vec![Hits::default(); slots.len()];
    let mut requests = 0;
    for (layer, asked) in layers {
        requests += asked;
        for (sum, hits) in sum.iter_mut().zip(layer) {
            sum.hits += hits.hits;
            sum.fills += hits.fills;
        }
    }
    (sum, requests)
}

/// What is in a pool, in the order that its policy wants.
trait Queue {
    fn new(slots: usize, seed: u64) -> Self;

    /// Puts an expert in, if need be in the place of somebody whom the step does not use, who is
    /// returned.
    fn put(&mut self, expert: u16, is_used: &[bool]) -> Option<u16>;
}

/// Asks for a step's experts one after the other: for each, the pools that lack it are the bits that
/// its word lacks.
fn run<Q: Queue>(
    steps: &LayerSteps,
    experts: usize,
    sizes: &[usize],
    seed: u64,
) -> (Vec<Hits>, u64) {
    let mut queues: Vec<Q> = sizes.iter().map(|&slots| Q::new(slots, seed)).collect();
    let mut held = vec![0u64; experts];
    let mut is_used = vec![false; experts];
    let (mut faults, mut fills) = (vec![0; sizes.len()], vec![0; sizes.len()]);
    let every = u64::MAX >> (AT_ONCE - sizes.len());
    let mut requests = 0;
    for (step, counted) in steps.iter() {
        requests += counted * step.len() as u64;
        let all = step.iter().fold(every, |all, &expert| all & held[usize::from(expert)]);
        if all == every {
            continue;
        }
        step.iter().for_each(|&expert| is_used[usize::from(expert)] = true);
        for &expert in step {
            let mut lacking = every & !held[usize::from(expert)];
            held[usize::from(expert)] = every;
            while lacking != 0 {
                let size = lacking.trailing_zeros() as usize;
                lacking &= lacking - 1;
                faults[size] += counted;
                match queues[size].put(expert, &is_used) {
                    Some(evicted) => held[usize::from(evicted)] &= !(1 << size),
                    None => fills[size] += counted,
                }
            }
        }
        step.iter().for_each(|&expert| is_used[usize::from(expert)] = false);
    }
    let hits = faults.iter().zip(fills);
    (hits.map(|(faults, fills)| Hits { hits: requests - faults, fills }).collect(), requests)
}

/// First come, first out. Of one step the highest numbers have to come first.
struct Fifo {
    /// A ring when it is full: the oldest is at `oldest`.
    ring: Vec<u16>,
    oldest: usize,
    slots: usize,
}

impl Queue for Fifo {
    fn new(slots: usize, _seed: u64) -> Self {
        Self { ring: Vec::with_capacity(slots), oldest: 0, slots }
    }

    fn put(&mut self, expert: u16, is_used: &[bool]) -> Option<u16> {
        if self.ring.len() < self.slots {
            self.ring.push(expert);
            return None;
        }
        let mut place = self.oldest;
        while is_used[usize::from(self.ring[place])] {
            place = if place + 1 == self.slots { 0 } else { place + 1 };
        }
        let evicted = self.ring[place];
        // Those who stay though they are older move up.
        while place != self.oldest {
            let before = if place == 0 { self.slots - 1 } else { place - 1 };
            self.ring[place] = self.ring[before];
            place = before;
        }
        self.ring[place] = expert;
        self.oldest = if place + 1 == self.slots { 0 } else { place + 1 };
        Some(evicted)
    }
}

/// Anybody, by the draws of the pool's own policy.
struct Drawn {
    members: Vec<u16>,
    slots: usize,
    random: Random,
}

impl Drawn {
    /// Draws before the pool's policy counts the candidates one by one.
    const DRAWS: u32 = 16;

    fn draw(&mut self, is_used: &[bool]) -> usize {
        for _ in 0..Self::DRAWS {
            let place = self.random.below(self.members.len());
            if !is_used[usize::from(self.members[place])] {
                return place;
            }
        }
        let may_go = |place: &usize| !is_used[usize::from(self.members[*place])];
        let may_go: Vec<usize> = (0..self.members.len()).filter(may_go).collect();
        may_go[self.random.below(may_go.len())]
    }
}

impl Queue for Drawn {
    fn new(slots: usize, seed: u64) -> Self {
        Self { members: Vec::with_capacity(slots), slots, random: Random::new(seed) }
    }

    fn put(&mut self, expert: u16, is_used: &[bool]) -> Option<u16> {
        let full = self.members.len() == self.slots;
        let evicted = full.then(|| {
            let place = self.draw(is_used);
            self.members.swap_remove(place)
        });
        self.members.push(expert);
        evicted
    }
}

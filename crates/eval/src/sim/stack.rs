//! Hits of pools of all sizes in one pass, for policies that are stack algorithms.
//!
//! A pool of a stack algorithm holds everything that a smaller one holds, so that the records of a
//! layer can be written as a list whose first `c` are those of a pool with `c` slots. An expert at
//! place `d` of the list is a hit for every pool with more than `d` slots (Mattson et al., 1970). LRU is
//! one, and whoever evicts by a priority that does not depend on the size: LFU that counts across
//! evictions, Belady's optimum, and SCH.
//!
//! A step's experts are looked up together. What a pool of `c` slots holds afterwards is the step's
//! experts and the best of the others ([`Keep::Step`]), or the best of both ([`Keep::Best`]).

use tierstream_pool::Policy;

use super::steps::LayerSteps;
use super::{Counting, Eviction, Setup, Steps};
use crate::trace::Trace;

/// What a pool keeps of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Keep {
    /// All of its experts, as an engine does that computes with them. Pools are not smaller than a step.
    Step,
    /// What is best to keep, of its experts too.
    Best,
}

/// How often an expert was at which place of its layer's list; `len` for one that was not in it.
pub(super) type Places = Vec<u64>;

/// The places of all counted requests, layer by layer, and how many requests those are. `None` if the
/// policy is no stack algorithm, or steps need other rules.
pub(super) fn places(trace: &Trace, setup: &Setup, steps: &Steps<'_>) -> Option<Vec<Places>> {
    let layers = trace.header().layers.len();
    if !knows(setup.eviction) {
        return None;
    }
    let stack = |layer: usize| -> Places {
        let own = LayerSteps::by_number(steps, layer);
        let count = trace.header().layers[layer].experts as usize;
        match setup.eviction {
            Eviction::Online(Policy::Lfu { half_life }) => {
                let half_life = u64::from(half_life) * layers as u64;
                let mut lfu = Lfu::new(count, half_life, layers as u64);
                run(&own, count, layer, Keep::Step, &mut lfu)
            }
            Eviction::Belady => run(&own, count, layer, Keep::Step, &mut NextUse::new(&own, count)),
            Eviction::BeladyLeave => {
                run(&own, count, layer, Keep::Best, &mut NextUse::new(&own, count))
            }
            Eviction::Online(_) => lru(&own, count),
        }
    };
    Some(super::curve::in_parallel(layers, stack))
}

/// Whether a policy is a stack algorithm. Least-Stale is LRU where a layer evicts its own records.
fn knows(eviction: Eviction) -> bool {
    match eviction {
        Eviction::Belady | Eviction::BeladyLeave => true,
        Eviction::Online(policy) => {
            matches!(policy, Policy::Lru | Policy::LeastStale | Policy::Lfu { .. })
        }
    }
}

/// Hits of a layer's pool with so many slots.
pub(super) fn hits(places: &Places, slots: usize, counting: Counting) -> u64 {
    let new = places.len() - 1;
    let hits = places[..slots.min(new)].iter().sum();
    match counting {
        Counting::Strict => hits,
        // Each new expert takes an empty slot, as long as there is one.
        Counting::Fill => hits + places[new].min(slots as u64),
    }
}

/// A priority that does not depend on the size of the pool.
trait Rank {
    /// Greater is better to keep. Equal ones do not matter.
    type Key: PartialOrd + Copy;

    /// Of an expert that is in the list.
    fn key(&self, expert: u16) -> Self::Key;

    /// A step of `batch` has begun.
    fn begin(&mut self, _batch: usize, _layer: usize) {}

    /// The step's experts were used.
    fn used(&mut self, batch: usize, experts: &[u16]);
}

/// Runs all steps of a layer.
fn run<R: Rank>(
    steps: &LayerSteps,
    count: usize,
    layer: usize,
    keep: Keep,
    rank: &mut R,
) -> Places {
    let mut places = vec![0; count + 1];
    let mut list: Vec<u16> = Vec::with_capacity(count);
    let mut is_used = vec![false; count];
    let mut limbo: Vec<(R::Key, u16)> = Vec::new();
    for (index, (experts, counted)) in steps.iter().enumerate() {
        rank.begin(index, layer);
        experts.iter().for_each(|&expert| is_used[usize::from(expert)] = true);
        // `Best` ranks a step's experts by what comes after it, `Step` never ranks them.
        if keep == Keep::Best {
            rank.used(index, experts);
        }
        update(&mut list, experts, &is_used, keep, rank, &mut limbo, |place| {
            places[place.unwrap_or(count)] += counted;
        });
        if keep == Keep::Step {
            rank.used(index, experts);
        }
        experts.iter().for_each(|&expert| is_used[usize::from(expert)] = false);
    }
    places
}

/// Looks a step's experts up in a list, and makes it the list after the step.
///
/// `limbo` holds what a pool with as many slots as places were passed has to let go: as many as it
/// had faults. At each place a pool with one slot more keeps the best of it.
fn update<R: Rank>(
    list: &mut Vec<u16>,
    experts: &[u16],
    is_used: &[bool],
    keep: Keep,
    rank: &R,
    limbo: &mut Vec<(R::Key, u16)>,
    mut found: impl FnMut(Option<usize>),
) {
    limbo.clear();
    let mut left = experts.len();
    let mut place = 0;
    match keep {
        Keep::Best => experts.iter().for_each(|&expert| insert(limbo, rank.key(expert), expert)),
        Keep::Step => {
            // The step's experts take the first places; who was there looks for another.
            for &expert in experts {
                match list.get(place) {
                    Some(&old) if is_used[usize::from(old)] => {
                        found(Some(place));
                        left -= 1;
                    }
                    Some(&old) => insert(limbo, rank.key(old), old),
                    None => {}
                }
                match list.get_mut(place) {
                    Some(old) => *old = expert,
                    None => list.push(expert),
                }
                place += 1;
            }
        }
    }
    let len = list.len();
    while place < len {
        if limbo.is_empty() && left == 0 {
            return;
        }
        let old = list[place];
        if is_used[usize::from(old)] {
            found(Some(place));
            left -= 1;
            let (_, best) = limbo.pop().expect("there is one as long as an expert is to be found");
            list[place] = best;
        } else {
            let key = rank.key(old);
            // Who is the best of all stays.
            if let Some(best) = limbo.last_mut().filter(|best| best.0 > key) {
                list[place] = best.1;
                limbo.pop();
                insert(limbo, key, old);
            }
        }
        place += 1;
    }
    (0..left).for_each(|_| found(None));
    while let Some((_, best)) = limbo.pop() {
        list.push(best);
    }
}

/// Keeps the best last.
fn insert<K: PartialOrd + Copy>(limbo: &mut Vec<(K, u16)>, key: K, expert: u16) {
    limbo.push((key, expert));
    let mut place = limbo.len() - 1;
    while place > 0 && limbo[place - 1].0 > key {
        limbo[place] = limbo[place - 1];
        place -= 1;
    }
    limbo[place] = (key, expert);
}

/// LRU needs no priorities: the list is in the order of the last uses, and within a step the
/// higher numbers go first.
fn lru(steps: &LayerSteps, count: usize) -> Places {
    let mut places = vec![0; count + 1];
    let mut list: Vec<u16> = Vec::with_capacity(count);
    let mut is_used = vec![false; count];
    let mut moved = vec![0u16; count];
    for (experts, counted) in steps.iter() {
        experts.iter().for_each(|&expert| is_used[usize::from(expert)] = true);
        let mut left = experts.len();
        // All before the last one found move back, by as many as were found behind them or are new.
        let (mut end, mut stay) = (0, 0);
        while left > 0 && end < list.len() {
            let expert = list[end];
            moved[stay] = expert;
            if is_used[usize::from(expert)] {
                places[end] += counted;
                left -= 1;
            } else {
                stay += 1;
            }
            end += 1;
        }
        places[count] += counted * left as u64;
        list.resize(list.len() + left, 0);
        let step = experts.len();
        list[..step].copy_from_slice(experts);
        list[step..step + stay].copy_from_slice(&moved[..stay]);
        experts.iter().for_each(|&expert| is_used[usize::from(expert)] = false);
    }
    places
}

/// Decayed uses, as the pool's LFU counts them: by steps of all layers, and in the same numbers.
struct Lfu {
    uses: Vec<f64>,
    /// The uses' bits, which are in the order of the numbers since these are positive; then the last
    /// use, and the number of the expert, the highest of which goes first.
    keys: Vec<u128>,
    half_life: u64,
    layers: u64,
    age: u64,
    weight: f64,
}

impl Lfu {
    /// The pool's own limit, past which all weights are divided by it.
    const LIMIT: f64 = (1u128 << 127) as f64;

    fn new(experts: usize, half_life: u64, layers: u64) -> Self {
        let (uses, keys) = (vec![0.0; experts], vec![0; experts]);
        Self { uses, keys, half_life, layers, age: 0, weight: 1.0 }
    }
}

impl Rank for Lfu {
    type Key = u128;

    fn key(&self, expert: u16) -> Self::Key {
        self.keys[usize::from(expert)]
    }

    fn begin(&mut self, batch: usize, layer: usize) {
        let now = batch as u64 * self.layers + layer as u64 + 1;
        while (self.age + 1) * self.half_life <= now {
            self.age += 1;
            self.weight *= 2.0;
            if self.weight >= Self::LIMIT {
                self.weight /= Self::LIMIT;
                for (uses, key) in self.uses.iter_mut().zip(&mut self.keys) {
                    *uses *= 1.0 / Self::LIMIT;
                    *key = u128::from(uses.to_bits()) << 64 | (*key & u128::from(u64::MAX));
                }
            }
        }
    }

    fn used(&mut self, batch: usize, experts: &[u16]) {
        for &expert in experts {
            let uses = &mut self.uses[usize::from(expert)];
            *uses += self.weight;
            let last = (batch as u64) << 16 | u64::from(u16::MAX - expert);
            self.keys[usize::from(expert)] = u128::from(uses.to_bits()) << 64 | u128::from(last);
        }
    }
}

/// When each expert is used next.
struct NextUse {
    /// Of each expert's use in each step, in order: the batch of the next one.
    after: Vec<u32>,
    position: usize,
    next: Vec<u32>,
}

impl NextUse {
    fn new(steps: &LayerSteps, experts: usize) -> Self {
        let mut next = vec![u32::MAX; experts];
        let mut after = Vec::new();
        for (index, (step, _)) in steps.iter().enumerate().rev() {
            for &expert in step.iter().rev() {
                after.push(std::mem::replace(&mut next[usize::from(expert)], index as u32));
            }
        }
        after.reverse();
        Self { after, position: 0, next }
    }
}

impl Rank for NextUse {
    type Key = std::cmp::Reverse<u32>;

    fn key(&self, expert: u16) -> Self::Key {
        std::cmp::Reverse(self.next[usize::from(expert)])
    }

    fn used(&mut self, _batch: usize, experts: &[u16]) {
        for &expert in experts {
            self.next[usize::from(expert)] = self.after[self.position];
            self.position += 1;
        }
    }
}

/// Hits of pools per layer that evict by what comes in the next tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sch {
    /// Tokens that it looks ahead.
    pub window: u32,
    /// Hits for each of the sizes.
    pub hits: Vec<u64>,
    /// The same with first uses that filled an empty slot.
    pub hits_fill: Vec<u64>,
    /// Requests.
    pub requests: u64,
}

/// SCH(m, rho) of arXiv 2505.16056: the hit rate of a cache of `rho * used` slots per layer that
/// evicts the expert with the fewest uses in the next `m` tokens, of those the least recently used. A
/// token's experts are looked up together, and may go at once.
///
/// The paper's own code (ljcleo/moe-lrc, `src/41_sch_calc.py`) looks at `m - 1` tokens, and brings a
/// token's experts one after the other, the last of which has to stay: its rates are lower by 1 point
/// where `rho * used` is 6 or 8, and by more where it is 2.
///
/// `prompts` tells the tokens of each sequence; caches are empty at the beginning of each.
#[must_use]
pub fn sch(trace: &Trace, prompts: &[Vec<u32>], window: u32, slots: &[Vec<u32>]) -> Sch {
    let layers = trace.header().layers.len();
    let of_layer = |layer: usize| {
        let mut hits = vec![(0, 0); slots.len()];
        let mut requests = 0;
        for prompt in prompts {
            let places = future(trace, prompt, layer, window as usize);
            requests += places.iter().sum::<u64>();
            for (hits, slots) in hits.iter_mut().zip(slots) {
                let slots = slots[layer] as usize;
                hits.0 += self::hits(&places, slots, Counting::Strict);
                hits.1 += self::hits(&places, slots, Counting::Fill);
            }
        }
        (hits, requests)
    };
    let all = super::curve::in_parallel(layers, of_layer);
    let sum = |of: fn(&(u64, u64)) -> u64| {
        (0..slots.len()).map(|size| all.iter().map(|(hits, _)| of(&hits[size])).sum()).collect()
    };
    Sch {
        window,
        hits: sum(|hits| hits.0),
        hits_fill: sum(|hits| hits.1),
        requests: all.iter().map(|(_, requests)| requests).sum(),
    }
}

/// Places of a prompt's requests of one layer.
fn future(trace: &Trace, tokens: &[u32], layer: usize, window: usize) -> Places {
    let count = trace.header().layers[layer].experts as usize;
    let experts = |index: usize| trace.experts(tokens[index] as usize, layer);
    let mut rank = Future { coming: vec![0; count], last: vec![0; count] };
    for index in 0..window.min(tokens.len()) {
        experts(index).iter().for_each(|&e| rank.coming[usize::from(e)] += 1);
    }
    let mut places = vec![0; count + 1];
    let (mut list, mut limbo) = (Vec::with_capacity(count), Vec::new());
    let mut is_used = vec![false; count];
    for index in 0..tokens.len() {
        let step = experts(index);
        step.iter().for_each(|&expert| is_used[usize::from(expert)] = true);
        rank.used(index, step);
        if index + window < tokens.len() {
            experts(index + window).iter().for_each(|&e| rank.coming[usize::from(e)] += 1);
        }
        update(&mut list, step, &is_used, Keep::Best, &rank, &mut limbo, |place| {
            places[place.unwrap_or(count)] += 1;
        });
        step.iter().for_each(|&expert| is_used[usize::from(expert)] = false);
    }
    places
}

struct Future {
    coming: Vec<u32>,
    last: Vec<u32>,
}

impl Rank for Future {
    type Key = (u32, u32, u16);

    fn key(&self, expert: u16) -> Self::Key {
        (self.coming[usize::from(expert)], self.last[usize::from(expert)], expert)
    }

    fn used(&mut self, batch: usize, experts: &[u16]) {
        for &expert in experts {
            self.coming[usize::from(expert)] -= 1;
            self.last[usize::from(expert)] = batch as u32 + 1;
        }
    }
}

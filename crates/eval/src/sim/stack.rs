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
    let stack = |layer| -> Option<Places> {
        Some(match setup.eviction {
            Eviction::Online(Policy::Lru) => lru(trace, steps, layer),
            Eviction::Online(Policy::Lfu { half_life }) => {
                let experts = trace.header().layers[layer].experts;
                let half_life = u64::from(half_life) * layers as u64;
                let mut lfu = Lfu::new(experts, half_life, layers as u64);
                run(trace, steps, layer, Keep::Step, &mut lfu)
            }
            Eviction::Belady => {
                let mut next = NextUse::new(trace, steps, layer);
                run(trace, steps, layer, Keep::Step, &mut next)
            }
            Eviction::BeladyLeave => {
                let mut next = NextUse::new(trace, steps, layer);
                run(trace, steps, layer, Keep::Best, &mut next)
            }
            Eviction::Online(_) => return None,
        })
    };
    super::curve::in_parallel(layers, stack).into_iter().collect()
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
    fn used(&mut self, batch: usize, layer: usize, experts: &[u16]);
}

/// Runs all steps of a layer.
fn run<R: Rank>(
    trace: &Trace,
    steps: &Steps<'_>,
    layer: usize,
    keep: Keep,
    rank: &mut R,
) -> Places {
    let count = trace.header().layers[layer].experts as usize;
    let mut places = vec![0; count + 1];
    let mut list: Vec<u16> = Vec::with_capacity(count);
    let mut is_used = vec![false; count];
    let mut limbo: Vec<(R::Key, u16)> = Vec::new();
    let mut experts = Vec::new();
    for (index, batch) in steps.batches().iter().enumerate() {
        steps.experts(batch, layer, &mut experts);
        rank.begin(index, layer);
        experts.iter().for_each(|&expert| is_used[usize::from(expert)] = true);
        let counted = batch.counted > 0;
        // `Best` ranks a step's experts by what comes after it, `Step` never ranks them.
        if keep == Keep::Best {
            rank.used(index, layer, &experts);
        }
        update(&mut list, &experts, &is_used, keep, rank, &mut limbo, |place| {
            if counted {
                places[place.unwrap_or(count)] += 1;
            }
        });
        if keep == Keep::Step {
            rank.used(index, layer, &experts);
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
        } else {
            insert(limbo, rank.key(old), old);
        }
        let (_, best) = limbo.pop().expect("there is one as long as an expert is to be found");
        list[place] = best;
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
fn lru(trace: &Trace, steps: &Steps<'_>, layer: usize) -> Places {
    let count = trace.header().layers[layer].experts as usize;
    let mut places = vec![0; count + 1];
    let mut list: Vec<u16> = Vec::with_capacity(count);
    let mut is_used = vec![false; count];
    let mut experts = Vec::new();
    let mut moved: Vec<u16> = Vec::new();
    for batch in steps.batches() {
        steps.experts(batch, layer, &mut experts);
        let counted = u64::from(batch.counted > 0);
        experts.iter().for_each(|&expert| is_used[usize::from(expert)] = true);
        let mut left = experts.len();
        // All before the last one found move back, by as many as were found behind them or are new.
        moved.clear();
        let mut end = 0;
        while left > 0 && end < list.len() {
            let expert = list[end];
            if is_used[usize::from(expert)] {
                places[end] += counted;
                left -= 1;
            } else {
                moved.push(expert);
            }
            end += 1;
        }
        places[count] += counted * left as u64;
        list.resize(list.len() + left, 0);
        let step = experts.len();
        for (place, &expert) in experts.iter().enumerate() {
            list[place] = expert;
        }
        list[step..step + moved.len()].copy_from_slice(&moved);
        experts.iter().for_each(|&expert| is_used[usize::from(expert)] = false);
    }
    places
}

/// Decayed uses, as the pool's LFU counts them: by steps of all layers, and in the same numbers.
struct Lfu {
    uses: Vec<f64>,
    last: Vec<u32>,
    half_life: u64,
    layers: u64,
    age: u64,
    weight: f64,
}

impl Lfu {
    /// The pool's own limit, past which all weights are divided by it.
    const LIMIT: f64 = (1u128 << 127) as f64;

    fn new(experts: u32, half_life: u64, layers: u64) -> Self {
        let (uses, last) = (vec![0.0; experts as usize], vec![0; experts as usize]);
        Self { uses, last, half_life, layers, age: 0, weight: 1.0 }
    }
}

impl Rank for Lfu {
    type Key = (f64, u32, std::cmp::Reverse<u16>);

    fn key(&self, expert: u16) -> Self::Key {
        let at = usize::from(expert);
        (self.uses[at], self.last[at], std::cmp::Reverse(expert))
    }

    fn begin(&mut self, batch: usize, layer: usize) {
        let now = batch as u64 * self.layers + layer as u64 + 1;
        while self.age < now / self.half_life {
            self.age += 1;
            self.weight *= 2.0;
            if self.weight >= Self::LIMIT {
                self.weight /= Self::LIMIT;
                self.uses.iter_mut().for_each(|uses| *uses *= 1.0 / Self::LIMIT);
            }
        }
    }

    fn used(&mut self, batch: usize, _layer: usize, experts: &[u16]) {
        for &expert in experts {
            self.uses[usize::from(expert)] += self.weight;
            self.last[usize::from(expert)] = batch as u32;
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
    fn new(trace: &Trace, steps: &Steps<'_>, layer: usize) -> Self {
        let count = trace.header().layers[layer].experts as usize;
        let mut experts = Vec::new();
        let mut next = vec![u32::MAX; count];
        let mut after = Vec::new();
        for (index, batch) in steps.batches().iter().enumerate().rev() {
            steps.experts(batch, layer, &mut experts);
            for &expert in experts.iter().rev() {
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

    fn used(&mut self, _batch: usize, _layer: usize, experts: &[u16]) {
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
        rank.used(index, layer, step);
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

    fn used(&mut self, batch: usize, _layer: usize, experts: &[u16]) {
        for &expert in experts {
            self.coming[usize::from(expert)] -= 1;
            self.last[usize::from(expert)] = batch as u32 + 1;
        }
    }
}

//! Pools of so many bytes, in which records of any size lie anywhere.
//!
//! The runtime's pools have slots, classes of them where sizes differ. Published curves are of a byte
//! budget without such: a step's missing records are brought, and then others go until all that is left fits.
//! A step's own records stay, even if they alone are more than the budget (BigMoeOnEdge,
//! `scripts/route-replay.py`).

use std::cmp::Reverse;
use std::collections::BTreeSet;

use tierstream_pool::Policy;

use super::{Eviction, PoolKind, Setup, Steps};
use crate::error::{Error, Result};
use crate::trace::Trace;

/// Hits of the counted requests, of which there are `requests`, and first fills.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Hits {
    pub(super) requests: u64,
    pub(super) hits: u64,
    /// Faults while nothing had gone yet from the part that they came to.
    pub(super) fills: u64,
}

/// Replays a trace in a pool of `sizes` bytes for a record of each layer; with sizes of 1, in slots.
pub(super) fn replay(
    trace: &Trace,
    setup: &Setup,
    steps: &Steps<'_>,
    bytes: u64,
    sizes: &[u64],
) -> Result<Hits> {
    let layers = sizes.len() as u64;
    let (parts, budget) = match setup.pool {
        PoolKind::PerLayer => (sizes.len(), bytes / layers),
        PoolKind::Global => (1, bytes),
        PoolKind::Shares | PoolKind::Floor(_) => {
            return Err(Error::file("a pool with floors has slots, and no budget of bytes"));
        }
    };
    let mut order = Order::new(trace, setup.eviction, steps)?;
    let mut parts = vec![Part { budget, ..Part::default() }; parts];
    let mut total = Hits::default();
    let mut experts = Vec::new();
    let bases = bases(trace);
    for (index, batch) in steps.batches().iter().enumerate() {
        let counted = u64::from(batch.counted > 0);
        for (layer, &size) in sizes.iter().enumerate() {
            steps.experts(batch, layer, &mut experts);
            let now = index as u64 * layers + layer as u64 + 1;
            order.begin(now, &mut |factor| parts.iter_mut().for_each(|part| part.rescale(factor)));
            let part = if parts.len() == 1 { &mut parts[0] } else { &mut parts[layer] };
            total.requests += counted * experts.len() as u64;
            for &expert in &experts {
                let record = bases[layer] + u32::from(expert);
                match part.keys.get(record as usize).copied().flatten() {
                    Some(key) => {
                        part.order.remove(&(key, Reverse(record)));
                        total.hits += counted;
                    }
                    None => {
                        part.used += size;
                        total.fills += counted * u64::from(!part.evicted && part.used <= budget);
                    }
                }
                // A hit keeps the key of its arrival in FIFO.
                let key =
                    order.used(record, now, part.keys.get(record as usize).copied().flatten());
                part.set(record, Some(key));
                part.order.insert((key, Reverse(record)));
                part.sizes.resize(part.keys.len(), 0);
                part.sizes[record as usize] = size;
            }
            part.fit(now, order.protects());
        }
    }
    Ok(total)
}

/// Room of its own: all, or a layer's.
#[derive(Debug, Clone, Default)]
struct Part {
    budget: u64,
    used: u64,
    evicted: bool,
    /// Of each resident record, the first to go first.
    order: BTreeSet<(Key, Reverse<u32>)>,
    keys: Vec<Option<Key>>,
    sizes: Vec<u64>,
}

/// What decides, then the step of the last use.
type Key = (u64, u64);

impl Part {
    fn set(&mut self, record: u32, key: Option<Key>) {
        if self.keys.len() <= record as usize {
            self.keys.resize(record as usize + 1, None);
        }
        self.keys[record as usize] = key;
    }

    fn rescale(&mut self, factor: f64) {
        for ((key, last), Reverse(record)) in std::mem::take(&mut self.order) {
            let key = ((f64::from_bits(key) * factor).to_bits(), last);
            self.keys[record as usize] = Some(key);
            self.order.insert((key, Reverse(record)));
        }
    }

    fn fit(&mut self, now: u64, protects: bool) {
        while self.used > self.budget {
            let others = self.order.iter().find(|((_, last), _)| !protects || *last != now);
            let Some(&(key, Reverse(record))) = others else { return };
            self.order.remove(&(key, Reverse(record)));
            self.set(record, None);
            self.used -= self.sizes[record as usize];
            self.evicted = true;
        }
    }
}

fn bases(trace: &Trace) -> Vec<u32> {
    let layers = trace.header().layers.iter();
    let bases = layers.scan(0, |next, layer| {
        let base = *next;
        *next += layer.experts;
        Some(base)
    });
    bases.collect()
}

/// Who goes first.
enum Order {
    Lru,
    Fifo,
    Lfu { uses: Vec<f64>, half_life: u64, age: u64, weight: f64 },
    Next { after: Vec<u32>, position: usize, leave: bool },
}

impl Order {
    fn new(trace: &Trace, eviction: Eviction, steps: &Steps<'_>) -> Result<Self> {
        let records: u32 = trace.header().layers.iter().map(|layer| layer.experts).sum();
        Ok(match eviction {
            Eviction::Online(Policy::Lru) => Self::Lru,
            Eviction::Online(Policy::Fifo) => Self::Fifo,
            Eviction::Online(Policy::Lfu { half_life }) => Self::Lfu {
                uses: vec![0.0; records as usize],
                half_life: u64::from(half_life) * trace.header().layers.len() as u64,
                age: 0,
                weight: 1.0,
            },
            Eviction::Belady => {
                Self::Next { after: after(trace, steps), position: 0, leave: false }
            }
            Eviction::BeladyLeave => {
                Self::Next { after: after(trace, steps), position: 0, leave: true }
            }
            Eviction::Online(other) => {
                return Err(Error::file(format!(
                    "{other} is not simulated with a budget of bytes; give slots or rho"
                )));
            }
        })
    }

    fn protects(&self) -> bool {
        !matches!(self, Self::Next { leave: true, .. })
    }

    /// Time goes on. When uses are rescaled, keys are too.
    fn begin(&mut self, now: u64, keys: &mut dyn FnMut(f64)) {
        let Self::Lfu { uses, half_life, age, weight } = self else { return };
        while *age < now / *half_life {
            *age += 1;
            *weight *= 2.0;
            if *weight >= 2f64.powi(127) {
                *weight *= 2f64.powi(-127);
                uses.iter_mut().for_each(|uses| *uses *= 2f64.powi(-127));
                keys(2f64.powi(-127));
            }
        }
    }

    fn used(&mut self, record: u32, now: u64, before: Option<Key>) -> Key {
        match self {
            Self::Lru => (now, now),
            // Protected in this step like any other.
            Self::Fifo => (before.map_or(now, |(arrival, _)| arrival), now),
            Self::Lfu { uses, weight, .. } => {
                let uses = &mut uses[record as usize];
                *uses += *weight;
                // Positive numbers have the order of their bits.
                (uses.to_bits(), now)
            }
            Self::Next { after, position, .. } => {
                *position += 1;
                (u64::from(u32::MAX - after[*position - 1]), now)
            }
        }
    }
}

/// Of each use, in order, the step of the next use of the same record.
fn after(trace: &Trace, steps: &Steps<'_>) -> Vec<u32> {
    let bases = bases(trace);
    let records: u32 = trace.header().layers.iter().map(|layer| layer.experts).sum();
    let mut next = vec![u32::MAX; records as usize];
    let mut experts = Vec::new();
    let mut after = Vec::new();
    let layers = bases.len();
    for (index, batch) in steps.batches().iter().enumerate().rev() {
        for layer in (0..layers).rev() {
            steps.experts(batch, layer, &mut experts);
            let now = (index * layers + layer) as u32;
            for &expert in experts.iter().rev() {
                let record = (bases[layer] + u32::from(expert)) as usize;
                after.push(std::mem::replace(&mut next[record], now));
            }
        }
    }
    after.reverse();
    after
}

//! Who goes when room is needed.
//!
//! A policy is one file with one type that implements [`Evict`], one arm of [`Evictor`], and one
//! name in [`Policy`]. Every class of a pool has its own evictor, in which slots, layers and
//! records are numbered within the class. All storage is made in `new`.
//!
//! All policies keep what they know per layer, because the floors protect whole layers at once: a
//! search passes over a protected layer in one comparison, however many records it holds.

mod fifo;
mod heap;
mod least_stale;
mod lfru;
mod lfu;
mod list;
mod lru;
mod random;
mod s3_fifo;
mod slru;

use std::fmt;
use std::str::FromStr;

use crate::class::{LayerState, SlotState, State};

/// The names of the eviction policies.
///
/// As text: `lru`, `lfu` or `lfu:<half-life>`, `lfru`, `fifo`, `random`, `slru`, `s3-fifo`,
/// `least-stale`.
///
/// All but [`Random`](Self::Random) tell records that were last used in the same step by their numbers,
/// and not by the order in which they were asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Policy {
    /// The least recently used goes.
    #[default]
    Lru,
    /// The least frequently used goes, where a use counts half as much with every half-life:
    ///
    /// ```text
    /// f(t) = sum over the uses i of 2^-(floor(t / H) - floor(t_i / H))
    /// ```
    ///
    /// with `t` in steps and `H = half_life * layers` steps. Uses are remembered across evictions.
    Lfu {
        /// In token cycles: one cycle is as many steps as the pool has layers. At least 1.
        half_life: u32,
    },
    /// Frequency times recency: the number of uses since the record came into the pool, halved with
    /// every half-life (of 4 token cycles) since the last of them.
    Lfru,
    /// The one that came first goes.
    Fifo,
    /// Any goes.
    Random,
    /// Two segments of LRU: who is used again is protected from who is not.
    Slru,
    /// A small FIFO queue to pass, a main one, and a memory of who did not pass.
    S3Fifo,
    /// What was not chosen when its layer had its turn goes, and what the next layer may need stays.
    LeastStale,
}

impl Policy {
    /// [`Policy::Lfu`] with the half-life that its plain name stands for: 16 token cycles, about the best
    /// of 2 to 512 on recorded decodes of OLMoE, Qwen3-30B-A3B and gpt-oss-120b.
    pub const LFU: Self = Self::Lfu { half_life: 16 };

    /// Every policy, each with its default parameters.
    pub const ALL: [Self; 8] = [
        Self::Lru,
        Self::LFU,
        Self::Lfru,
        Self::Fifo,
        Self::Random,
        Self::Slru,
        Self::S3Fifo,
        Self::LeastStale,
    ];
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lru => f.pad("lru"),
            &Self::LFU => f.pad("lfu"),
            Self::Lfu { half_life } => write!(f, "lfu:{half_life}"),
            Self::Lfru => f.pad("lfru"),
            Self::Fifo => f.pad("fifo"),
            Self::Random => f.pad("random"),
            Self::Slru => f.pad("slru"),
            Self::S3Fifo => f.pad("s3-fifo"),
            Self::LeastStale => f.pad("least-stale"),
        }
    }
}

/// A text that names no [`Policy`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "unknown eviction policy {0:?}: use lru, lfu, lfu:<half-life in tokens>, lfru, fifo, random, slru, \
     s3-fifo or least-stale"
)]
pub struct UnknownPolicy(String);

impl FromStr for Policy {
    type Err = UnknownPolicy;

    fn from_str(text: &str) -> Result<Self, UnknownPolicy> {
        let unknown = || UnknownPolicy(text.to_owned());
        match text {
            "lru" => Ok(Self::Lru),
            "lfu" => Ok(Self::LFU),
            "lfru" => Ok(Self::Lfru),
            "fifo" => Ok(Self::Fifo),
            "random" => Ok(Self::Random),
            "slru" => Ok(Self::Slru),
            "s3-fifo" => Ok(Self::S3Fifo),
            "least-stale" => Ok(Self::LeastStale),
            _ => {
                let half_life = text.strip_prefix("lfu:").and_then(|text| text.parse().ok());
                half_life
                    .filter(|&half_life| half_life > 0)
                    .map_or_else(|| Err(unknown()), |half_life| Ok(Self::Lfu { half_life }))
            }
        }
    }
}

/// What a policy does.
pub(crate) trait Evict {
    /// A record has taken a slot. `record` is its number within the class; its slot changes over
    /// time, the number does not.
    fn on_insert(&mut self, slot: u32, layer: u32, record: u32, now: u64);

    /// The record in this slot was used again.
    fn on_hit(&mut self, slot: u32, now: u64);

    /// The record has left its slot.
    fn on_remove(&mut self, slot: u32);

    /// The slot whose record should go, among the candidates; `None` only if there is none.
    fn victim(&mut self, from: &Candidates<'_>) -> Option<u32>;
}

/// The slots that may be evicted for one layer's sake.
pub(crate) struct Candidates<'a> {
    pub(crate) layers: &'a [LayerState],
    pub(crate) slots: &'a [SlotState],
    pub(crate) requester: u32,
    pub(crate) now: u64,
    /// Whether records that were used in the current step are candidates as well.
    pub(crate) this_step_too: bool,
}

impl Candidates<'_> {
    /// The layers that may lose a record, in order.
    pub(crate) fn layers(&self) -> impl Iterator<Item = u32> + '_ {
        (0u32..).zip(self.layers).filter_map(|(id, layer)| {
            let can = if id == self.requester { layer.evictable } else { layer.surplus() };
            (can > 0).then_some(id)
        })
    }

    /// Whether the record in this slot, of one of [`layers`](Self::layers), may go.
    pub(crate) fn allow(&self, slot: u32) -> bool {
        let slot = &self.slots[slot as usize];
        slot.state == State::Resident
            && slot.pins == 0
            && (self.this_step_too || slot.used != self.now)
    }
}

/// What an evictor has to prepare for.
pub(crate) struct Shape<'a> {
    /// Slots of the class.
    pub(crate) slots: u32,
    /// Experts of each of its layers.
    pub(crate) experts: &'a [u32],
    /// Steps of one token cycle.
    pub(crate) cycle: u64,
    pub(crate) seed: u64,
}

impl Shape<'_> {
    fn records(&self) -> usize {
        self.experts.iter().map(|&experts| experts as usize).sum()
    }
}

/// One of the policies, at work.
#[derive(Clone, Debug)]
pub(crate) enum Evictor {
    Lru(lru::Lru),
    Lfu(lfu::Lfu),
    Lfru(lfru::Lfru),
    Fifo(fifo::Fifo),
    Random(random::Random),
    Slru(slru::Slru),
    S3Fifo(s3_fifo::S3Fifo),
    LeastStale(least_stale::LeastStale),
}

impl Evictor {
    pub(crate) fn new(policy: &Policy, shape: &Shape<'_>) -> Self {
        match policy {
            Policy::Lru => Self::Lru(lru::Lru::new(shape)),
            Policy::Lfu { half_life } => Self::Lfu(lfu::Lfu::new(*half_life, shape)),
            Policy::Lfru => Self::Lfru(lfru::Lfru::new(shape)),
            Policy::Fifo => Self::Fifo(fifo::Fifo::new(shape)),
            Policy::Random => Self::Random(random::Random::new(shape)),
            Policy::Slru => Self::Slru(slru::Slru::new(shape)),
            Policy::S3Fifo => Self::S3Fifo(s3_fifo::S3Fifo::new(shape)),
            Policy::LeastStale => Self::LeastStale(least_stale::LeastStale::new(shape)),
        }
    }

    pub(crate) fn policy(&mut self) -> &mut dyn Evict {
        match self {
            Self::Lru(policy) => policy,
            Self::Lfu(policy) => policy,
            Self::Lfru(policy) => policy,
            Self::Fifo(policy) => policy,
            Self::Random(policy) => policy,
            Self::Slru(policy) => policy,
            Self::S3Fifo(policy) => policy,
            Self::LeastStale(policy) => policy,
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Two layers of four experts in a class of eight slots, for the policies' own tests: slots 0-3
    /// hold layer 0, slots 4-7 layer 1, all resident and unpinned, last used in step 0.
    pub(crate) struct Bench {
        pub(crate) layers: Vec<LayerState>,
        pub(crate) slots: Vec<SlotState>,
    }

    pub(crate) const SHAPE: Shape<'static> =
        Shape { slots: 8, experts: &[4, 4], cycle: 2, seed: 7 };

    impl Bench {
        pub(crate) fn filled(policy: &mut dyn Evict) -> Self {
            let layer =
                |id, base| LayerState { id, base, floor: 2, held: 4, resident: 4, evictable: 4 };
            let slot = |slot: u32| SlotState {
                state: State::Resident,
                layer: slot / 4,
                expert: 3 - slot % 4,
                pins: 0,
                used: 0,
            };
            // All in one step, in which the highest record counts as the oldest: slot 0's.
            for slot in 0..8 {
                policy.on_insert(slot, slot / 4, 7 - slot, 0);
            }
            Self { layers: vec![layer(0, 0), layer(1, 4)], slots: (0..8).map(slot).collect() }
        }

        pub(crate) fn candidates(&self, requester: u32) -> Candidates<'_> {
            let Self { layers, slots } = self;
            Candidates { layers, slots, requester, now: 9, this_step_too: false }
        }
    }

    #[test]
    fn names_round_trip() {
        for policy in Policy::ALL.into_iter().chain([Policy::Lfu { half_life: 3 }]) {
            assert_eq!(policy.to_string().parse(), Ok(policy));
        }
        assert_eq!("lfu".parse(), Ok(Policy::LFU));
        assert_eq!(Policy::default().to_string(), "lru");
        for text in ["", "LRU", "lfu:", "lfu:0", "lfu:-1", "lfu:99999999999", "belady"] {
            let error = text.parse::<Policy>().unwrap_err();
            assert!(error.to_string().contains(&format!("{text:?}")), "{error}");
        }
    }

    #[test]
    fn every_policy_keeps_to_the_candidates() {
        for policy in Policy::ALL {
            let mut evictor = Evictor::new(&policy, &SHAPE);
            let mut bench = Bench::filled(evictor.policy());
            bench.layers[1].held = 2; // at its floor
            bench.slots[0].pins = 1;
            bench.slots[1].used = 9;
            bench.slots[2].state = State::Loading;
            assert_eq!(evictor.policy().victim(&bench.candidates(0)), Some(3), "{policy}");
            bench.slots[3].pins = 1;
            assert_eq!(evictor.policy().victim(&bench.candidates(0)), None, "{policy}");
            let this_step_too = Candidates { this_step_too: true, ..bench.candidates(0) };
            assert_eq!(evictor.policy().victim(&this_step_too), Some(1), "{policy}");
        }
    }
}

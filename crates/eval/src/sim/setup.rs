//! What is simulated.

use std::fmt;
use std::str::FromStr;

use tierstream_pool::{Policy, UnknownPolicy};

use super::Predictor;
use crate::trace::Phase;

/// How the room is shared between layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PoolKind {
    /// A pool for each layer.
    PerLayer,
    /// One pool, in which each layer is sure of as many slots as there are for it, which are all: what the
    /// runtime has where few are shared out. A pool for each layer to all policies but `random`, which draws
    /// from one row of numbers.
    Shares,
    /// One pool for all layers.
    Global,
    /// One pool, in which each layer has so many slots that no other takes from it.
    Floor(u32),
}

impl fmt::Display for PoolKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PerLayer => f.pad("per_layer"),
            Self::Shares => f.pad("shares"),
            Self::Global => f.pad("global"),
            Self::Floor(slots) => write!(f, "floor:{slots}"),
        }
    }
}

impl FromStr for PoolKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "per_layer" => Ok(Self::PerLayer),
            "shares" => Ok(Self::Shares),
            "global" => Ok(Self::Global),
            _ => text
                .strip_prefix("floor:")
                .and_then(|slots| slots.parse().ok())
                .map(Self::Floor)
                .ok_or_else(|| "there are per_layer, shares, global, floor:<slots>".to_owned()),
        }
    }
}

/// Who goes when room is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Eviction {
    /// A policy of the runtime.
    Online(Policy),
    /// The optimum: who is needed again last. All experts of a step stay until it is over, so that a
    /// layer with room for one step's experts alone has no choice, and does what LRU does.
    Belady,
    /// The optimum in the convention of published tables: once they were looked up, the experts of a
    /// step may go at once. No engine that computes a layer's experts together can do so.
    BeladyLeave,
}

impl fmt::Display for Eviction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Online(policy) => policy.fmt(f),
            Self::Belady => f.pad("belady"),
            Self::BeladyLeave => f.pad("belady-leave"),
        }
    }
}

/// A text that names no [`Eviction`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}; the simulator also has belady and belady-leave")]
pub struct UnknownEviction(UnknownPolicy);

impl FromStr for Eviction {
    type Err = UnknownEviction;

    fn from_str(text: &str) -> Result<Self, UnknownEviction> {
        match text {
            "belady" => Ok(Self::Belady),
            "belady-leave" => Ok(Self::BeladyLeave),
            _ => text.parse().map(Self::Online).map_err(UnknownEviction),
        }
    }
}

/// What is in the pool when the counted tokens begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Start {
    /// Nothing: only the counted tokens are replayed.
    #[default]
    Cold,
    /// What the other tokens have left there: they are replayed, and not counted.
    Warm,
}

impl fmt::Display for Start {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Cold => "cold",
            Self::Warm => "warm",
        })
    }
}

/// What counts as a hit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Counting {
    /// What was resident.
    #[default]
    Strict,
    /// Also what came into a slot that was empty: the convention of moe-lrc (arXiv 2505.16056).
    Fill,
}

impl fmt::Display for Counting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Strict => "strict",
            Self::Fill => "fill",
        })
    }
}

/// How large a pool is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Size {
    /// Slots as a multiple of the experts that a token uses, layer by layer: rho in the literature.
    Rho(f64),
    /// So many slots for each layer; in a shared pool as many times the layers.
    Slots(u32),
    /// Bytes of all slots. A pool per layer gets an equal part for each; in a shared one, records of any
    /// size lie anywhere.
    Bytes(u64),
}

/// A second pool below the first: host memory below a GPU's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tier {
    /// Slots for each layer, in one pool for all.
    pub slots_per_layer: u32,
    /// Its policy.
    pub policy: Policy,
}

/// A simulation, but for the size.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Setup {
    /// How the room is shared.
    pub pool: PoolKind,
    /// Who goes.
    pub eviction: Eviction,
    /// What is there at the start.
    pub start: Start,
    /// What a hit is.
    pub counting: Counting,
    /// The tokens that count.
    pub phase: Phase,
    /// Who guesses the next layer's experts, and how many of them can be read while one layer is computed.
    pub ahead: Option<(Predictor, u32)>,
    /// What is below.
    pub below: Option<Tier>,
    /// Of all that is drawn.
    pub seed: u64,
}

impl Default for Setup {
    /// Pools per layer of LRU, cold, strict, of decoded tokens.
    fn default() -> Self {
        Self {
            pool: PoolKind::PerLayer,
            eviction: Eviction::Online(Policy::Lru),
            start: Start::Cold,
            counting: Counting::Strict,
            phase: Phase::Decode,
            ahead: None,
            below: None,
            seed: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for pool in [PoolKind::PerLayer, PoolKind::Shares, PoolKind::Global, PoolKind::Floor(8)] {
            assert_eq!(pool.to_string().parse(), Ok(pool));
        }
        assert!("floor:x".parse::<PoolKind>().is_err());
        for eviction in
            [Eviction::Belady, Eviction::BeladyLeave, Eviction::Online(Policy::LeastStale)]
        {
            assert_eq!(eviction.to_string().parse(), Ok(eviction));
        }
        let error = "opt".parse::<Eviction>().unwrap_err().to_string();
        assert!(error.contains("\"opt\"") && error.contains("belady-leave"), "{error}");
    }
}

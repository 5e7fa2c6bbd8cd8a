//! How many faults the steps of a token have with a pool of a size: from a trace, or from what other
//! models' traces say.

use tierstream_pool::{EVEN_CYCLES, Policy, Pool};

use super::families;
use crate::error::Result;
use crate::header::Layer;
use crate::random::Random;
use crate::sim::{Eviction, PoolKind, Setup, StepFaults, step_faults};
use crate::trace::{Phase, Trace};

/// Tokens of a run: what is drawn again for another text of the kind.
const RUN_TOKENS: usize = 32;

/// Other texts that are drawn.
const RESAMPLES: u64 = 200;

/// Prompts of a trace from which on their own differences are the bar.
const PROMPTS_LEAST: usize = 8;

/// The steps of a token by their faults.
#[derive(Debug, Clone, PartialEq)]
pub struct Mix {
    /// By number of faults, from 0 on: layers of a token that have so many. Together all layers.
    pub layers: Vec<f64>,
    /// Of the faults, the share that a second pool below has, from 0 to 1.
    pub below: f64,
}

impl Mix {
    /// Faults of a token.
    #[must_use]
    pub fn faults(&self) -> f64 {
        (0..).zip(&self.layers).map(|(faults, layers)| f64::from(faults) * layers).sum()
    }

    /// Half of the one and half of the other.
    fn mean(a: &Self, b: &Self) -> Self {
        let at = |mix: &Self, faults: usize| mix.layers.get(faults).copied().unwrap_or(0.0);
        let most = a.layers.len().max(b.layers.len());
        let layers = (0..most).map(|n| f64::midpoint(at(a, n), at(b, n))).collect();
        let missed = |mix: &Self| mix.below * mix.faults();
        let faults = (a.faults() + b.faults()).max(f64::MIN_POSITIVE);
        Self { layers, below: (missed(a) + missed(b)) / faults }
    }

    fn of(sum: &StepFaults) -> Self {
        let tokens = sum.tokens.max(1) as f64;
        Self {
            layers: sum.steps.iter().map(|&steps| steps as f64 / tokens).collect(),
            below: sum.below_hits as f64 / sum.faults().max(1) as f64,
        }
    }
}

/// What is expected of a pool, and what else may be.
#[derive(Debug, Clone, PartialEq)]
pub struct Expected {
    /// The middle.
    pub mix: Mix,
    /// What it is the middle of: first uses count, and none does.
    pub ends: [Mix; 2],
    /// What other texts, or other models of the kind, would have.
    pub others: Vec<Mix>,
}

/// Where a model's curve is from.
#[derive(Debug, Clone, Copy)]
pub enum Curve<'a> {
    /// A trace of this model.
    Trace(&'a Trace),
    /// Other models' traces, and of them the one of this architecture, if there is one.
    Bundled {
        /// `general.architecture`.
        architecture: &'a str,
    },
}

impl Curve<'_> {
    /// What is expected of a pool with so many slots for all `layers` together, and `below` that of one
    /// of so many in host memory. With slots for all there is no fault.
    ///
    /// # Errors
    ///
    /// If the pool cannot be simulated: it has no room for the experts of a token.
    pub fn at(&self, layers: &[Layer], slots: u64, below: u64, policy: Policy) -> Result<Expected> {
        let all: u64 = layers.iter().map(|layer| u64::from(layer.experts)).sum();
        if slots >= all {
            let mix = Mix { layers: vec![layers.len() as f64], below: 0.0 };
            return Ok(Expected { ends: [mix.clone(), mix.clone()], mix, others: Vec::new() });
        }
        match *self {
            Self::Trace(trace) => of_trace(trace, layers, slots, below, policy),
            Self::Bundled { architecture } => {
                Ok(families::expected(architecture, layers, slots, below))
            }
        }
    }
}

/// The runtime's own pool with so many slots for all layers, and how many each gets in a simulation: few
/// are shared out evenly, of many a layer is sure of those that a token uses. All records are of one
/// size.
#[must_use]
pub fn layout(layers: &[Layer], slots: u64, policy: Policy) -> (Setup, Vec<u32>) {
    let experts: Vec<u32> = layers.iter().map(|layer| layer.experts).collect();
    let cycle: u64 = layers.iter().map(|layer| u64::from(layer.used)).sum();
    let shares = Pool::even_shares(&experts, u32::try_from(slots).unwrap_or(u32::MAX));
    let enough = shares.iter().zip(layers).all(|(&share, layer)| share >= layer.used);
    let pool = match slots < u64::from(EVEN_CYCLES) * cycle && enough {
        true => PoolKind::Shares,
        false => PoolKind::Floor(layers.iter().map(|layer| layer.used).max().unwrap_or(0)),
    };
    (Setup { pool, eviction: Eviction::Online(policy), ..Setup::default() }, shares)
}

fn of_trace(
    trace: &Trace,
    layers: &[Layer],
    slots: u64,
    below: u64,
    policy: Policy,
) -> Result<Expected> {
    let (mut setup, shares) = layout(layers, slots, policy);
    let per_layer = u32::try_from(below / layers.len().max(1) as u64).unwrap_or(u32::MAX);
    setup.below = (per_layer > 0)
        .then_some(crate::sim::Tier { slots_per_layer: per_layer, policy: Policy::Lru });
    let tokens = trace.count(Phase::Decode);
    // First uses count in the one, and in the other none does: what a long run has is between.
    let faults = |these, run| step_faults(trace, &setup, &shares, these, run);
    let runs = [faults(tokens / 2..tokens, RUN_TOKENS)?, faults(tokens..2 * tokens, RUN_TOKENS)?];
    let sums = |of: &dyn Fn(&[StepFaults]) -> StepFaults| -> [Mix; 2] {
        std::array::from_fn(|end| Mix::of(&of(&runs[end])))
    };
    let ends = sums(&|runs| {
        let mut sum = StepFaults::default();
        runs.iter().for_each(|run| sum.add(run));
        sum
    });
    // What is measured is one text: prompts by themselves tell how far these differ, if there are enough.
    let prompts = faults(tokens..2 * tokens, usize::MAX)?;
    if prompts.len() >= PROMPTS_LEAST {
        let others = prompts.iter().map(Mix::of).collect();
        return Ok(Expected { mix: Mix::mean(&ends[0], &ends[1]), ends, others });
    }
    let others = (0..RESAMPLES).flat_map(|seed| {
        sums(&|runs| {
            let (mut random, mut sum) = (Random::new(seed), StepFaults::default());
            runs.iter().for_each(|_| sum.add(&runs[random.below(runs.len())]));
            sum
        })
    });
    let others = others.collect();
    Ok(Expected { mix: Mix::mean(&ends[0], &ends[1]), ends, others })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::header::Header;
    use crate::trace::{NO_EXPERT, Token};

    fn trace(tokens: u32, of: impl Fn(u32) -> [u16; 2]) -> Trace {
        in_prompts(tokens, tokens, of)
    }

    /// Each prompt has so many tokens.
    fn in_prompts(tokens: u32, each: u32, of: impl Fn(u32) -> [u16; 2]) -> Trace {
        let mut trace = Trace::new(Header::uniform(1, 8, 2)).unwrap();
        for at in 0..tokens {
            let token = Token {
                prompt: at / each,
                position: at,
                batch: at,
                id: None,
                phase: Phase::Decode,
                domain: 0,
            };
            trace.push(token, &of(at), &[]).unwrap();
        }
        trace
    }

    #[test]
    fn a_fixed_set_never_faults_and_a_cycle_always_does() {
        let fixed = trace(64, |_| [1, 5]);
        let layers = &fixed.header().layers;
        let at =
            |trace: &Trace, slots| Curve::Trace(trace).at(layers, slots, 0, Policy::Lru).unwrap();
        assert_eq!(at(&fixed, 2).mix.layers, [1.0]);
        // Four pairs in turn, and room for three of them.
        let cycle = trace(64, |at| [2 * (at % 4) as u16, 2 * (at % 4) as u16 + 1]);
        assert_eq!(at(&cycle, 6).mix.layers, [0.0, 0.0, 1.0]);
        assert_eq!(at(&cycle, 6).mix.faults(), 2.0);
        assert_eq!(at(&cycle, 8).mix.faults(), 0.0);
        assert!(at(&cycle, 6).others.iter().all(|other| other.faults() == 2.0));
    }

    #[test]
    fn prompts_that_differ_have_wide_bars() {
        // Every second prompt stays with two experts, the others go through all of them.
        let of = |at: u32| match at / 16 % 2 {
            0 => [0, 1],
            _ => [2 * (at % 4) as u16, 2 * (at % 4) as u16 + 1],
        };
        let trace = in_prompts(16 * 8, 16, of);
        let expected = Curve::Trace(&trace).at(&trace.header().layers, 4, 0, Policy::Lru).unwrap();
        assert_eq!(expected.others.len(), 8);
        let others = expected.others.iter().map(Mix::faults);
        let (least, most) = (others.clone().fold(2.0, f64::min), others.fold(0.0, f64::max));
        assert!(least < 0.2 && most > 1.7, "{least} {most}");
    }

    #[test]
    fn a_single_token_is_enough() {
        let one = trace(1, |_| [3, NO_EXPERT]);
        let expected = Curve::Trace(&one).at(&one.header().layers, 4, 0, Policy::Lru).unwrap();
        // At first it is missing, and again it is not.
        assert_eq!(expected.ends.map(|mix| mix.layers), [vec![0.0, 1.0], vec![1.0]]);
    }

    #[test]
    fn few_slots_are_shared_out_evenly_as_the_runtime_does() {
        let layers = Header::uniform(4, 64, 8).layers;
        assert_eq!(layout(&layers, 4 * 39, Policy::Lru).0.pool, PoolKind::Shares);
        let (setup, shares) = layout(&layers, 4 * 40, Policy::Lru);
        assert_eq!((setup.pool, shares), (PoolKind::Floor(8), vec![40; 4]));
    }
}

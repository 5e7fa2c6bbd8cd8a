//! All metrics of a trace.

use std::collections::BTreeMap;
use std::sync::Mutex;

use serde::Serialize;
use tierstream_pool::Policy;

use super::predict::{Prediction, next_layer, previous_token};
use super::sequences::{Sequence, sequences};
use super::tally::{Tally, WINDOWS};
use super::usage::Usage;
use super::{bootstrap, controls};
use crate::error::Result;
use crate::sim::{self, Curve, Eviction, PoolKind, Setup, Size};
use crate::trace::{Phase, Trace};

/// What to compute.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Options {
    /// Which tokens.
    pub phase: Phase,
    /// Of shuffling, drawing and resampling.
    pub seed: u64,
    /// Resamples of the confidence intervals.
    pub resamples: usize,
    /// Whether the controls are computed.
    pub controls: bool,
    /// Whether pools are simulated for [`Report::curves`].
    pub curves: bool,
}

impl Default for Options {
    /// Decoded tokens, 1000 resamples, with controls and curves.
    fn default() -> Self {
        Self { phase: Phase::Decode, seed: 0, resamples: 1000, controls: true, curves: true }
    }
}

/// Windows of SRP, in tokens, as the paper has them.
const SRP_WINDOWS: [usize; 4] = [4, 16, 64, 256];

/// Windows in which distinct experts are counted: 50 is that of the request, the others are common.
const UNIQUE_WINDOWS: [usize; 4] = [16, 50, 64, 256];

/// Tokens that SCH looks ahead.
const SCH_WINDOWS: [u32; 3] = [4, 16, 64];

/// Sizes of pools, in experts of a token.
const RHOS: [u32; 3] = [1, 2, 4];

/// All metrics. Shares and rates are from 0 to 1.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// Name of the model; may be empty.
    pub model: String,
    /// `decode` or `prefill`: the tokens that everything below is of.
    pub phase: &'static str,
    /// MoE layers.
    pub layers: usize,
    /// Routed experts of a layer, the most of all layers.
    pub experts: u32,
    /// Of those, used by a token.
    pub used: u32,
    /// How many tokens the trace has.
    pub tokens: Tokens,
    /// Prompts that have tokens of the phase.
    pub prompts: usize,
    /// Over all layers and prompts.
    #[serde(flatten)]
    pub locality: Locality,
    /// What uniform routing gives for `unique`.
    pub uniform_unique: BTreeMap<String, f64>,
    /// SCH by window and rho, in units of 1.
    pub sch: BTreeMap<String, BTreeMap<String, SchRate>>,
    /// Entropy of activation as a share of the most, mean of the layers.
    pub entropy: Option<f64>,
    /// Gini coefficient of activation, mean of the layers.
    pub gini: Option<f64>,
    /// Experts of a layer that were used at all, mean of the layers.
    pub working_set: Option<f64>,
    /// Of the uses in one half of the trace, those of the `rho * used` experts of each layer that the other half
    /// used most.
    pub static_hot: BTreeMap<String, Option<f64>>,
    /// What could be read ahead.
    pub predict: Prediction,
    /// Faults in an LRU pool per layer of rho 2, cold.
    pub faulted_experts_per_token: Faults,
    /// The most experts of a layer that a pool without limit would hold.
    pub max_resident_per_layer: usize,
    /// Hit rates of pools by size, cold and strict.
    pub curves: Vec<Curve>,
    /// Confidence intervals over prompts; none for a single prompt.
    pub intervals: Option<Intervals>,
    /// What has no locality of its own.
    pub controls: Option<Controls>,
    /// By layer.
    pub per_layer: Vec<OfLayer>,
    /// By domain; empty if the trace has no tags.
    pub per_domain: Vec<OfDomain>,
    /// By prompt.
    pub per_prompt: Vec<OfPrompt>,
}

/// Numbers of tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Tokens {
    /// Of prompts.
    pub prefill: usize,
    /// One by one.
    pub decode: usize,
}

/// How near to each other uses of an expert are.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Locality {
    /// Mean share of a token's experts of a layer that the token before used there.
    pub reuse_next: Option<f64>,
    /// Tokens since the last use of an expert, of those that were used before.
    pub reuse_distance: Distance,
    /// Segment routing best performance by window.
    pub srp: BTreeMap<String, Option<Srp>>,
    /// Distinct experts of a layer in so many tokens, on average.
    pub unique: BTreeMap<String, Option<f64>>,
}

/// Quantiles, in tokens. From 1024 on all distances count as that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Distance {
    /// Half of the uses are no farther.
    pub median: Option<u64>,
    /// Nine of ten.
    pub p90: Option<u64>,
}

/// SRP(E, m) of arXiv 2505.16056.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Srp {
    /// F1 of the best fixed group of experts for a segment.
    pub srp: f64,
    /// How large that group is, in experts of a token.
    pub rho: f64,
}

/// SCH(m, rho) of the same.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct SchRate {
    /// In the paper's convention, in which filling an empty slot is a hit.
    pub fill: f64,
    /// Hits alone.
    pub strict: f64,
}

/// The request's own metric: how many experts a token has to wait for.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Faults {
    /// On average.
    pub mean: Option<f64>,
    /// The most of a token.
    pub max: u64,
    /// On average after the first token.
    pub steady: Option<f64>,
}

/// An interval that holds 95 % of the resamples.
pub type Interval = Option<[f64; 2]>;

/// Intervals of all that is resampled.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Intervals {
    /// Share of the resamples that are inside.
    pub level: f64,
    /// Number of resamples.
    pub resamples: usize,
    /// The metrics.
    #[serde(flatten)]
    pub locality: LocalityIntervals,
}

/// An interval for each number of [`Locality`].
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LocalityIntervals {
    /// Of [`Locality::reuse_next`].
    pub reuse_next: Interval,
    /// Of the median distance.
    pub reuse_distance_median: Interval,
    /// Of the 90th percentile.
    pub reuse_distance_p90: Interval,
    /// Of SRP by window.
    pub srp: BTreeMap<String, Interval>,
    /// Of distinct experts by window.
    pub unique: BTreeMap<String, Interval>,
}

/// What the trace would look like without what is told of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Controls {
    /// The tokens of each prompt in any order: what is left is not of time.
    pub shuffled: Headline,
    /// Any `used` of the experts: what is left is of chance.
    pub uniform: Headline,
    /// Hit rate of a fixed set of the most used experts, by rho: what is left is of popularity.
    pub static_hot: BTreeMap<String, Option<f64>>,
}

/// The numbers that controls are compared by.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Headline {
    /// As in [`Report`].
    #[serde(flatten)]
    pub locality: Locality,
    /// Hit rate of LRU pools per layer, cold and strict, by rho.
    pub lru: BTreeMap<String, Option<f64>>,
}

/// One layer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct OfLayer {
    /// Index among the MoE layers.
    pub layer: usize,
    /// Number of its block.
    pub block: u32,
    /// Its locality.
    #[serde(flatten)]
    pub locality: Locality,
    /// Entropy of activation as a share of the most.
    pub entropy: Option<f64>,
    /// Gini coefficient of activation.
    pub gini: Option<f64>,
    /// Experts that were used at all.
    pub working_set: usize,
    /// Held-out uses of the most used experts, by rho.
    pub static_hot: BTreeMap<String, Option<f64>>,
}

/// One domain.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct OfDomain {
    /// Its tag.
    pub domain: String,
    /// Its prompts.
    pub prompts: usize,
    /// Their tokens.
    pub tokens: usize,
    /// Their locality.
    #[serde(flatten)]
    pub locality: Locality,
    /// Over its prompts; none if there is one.
    pub intervals: Option<LocalityIntervals>,
}

/// One prompt.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct OfPrompt {
    /// Its number.
    pub prompt: u32,
    /// Its tag; may be empty.
    pub domain: String,
    /// Its tokens.
    pub tokens: usize,
    /// Its locality.
    #[serde(flatten)]
    pub locality: Locality,
}

/// Computes all metrics of a trace. Equal traces and options give equal numbers.
///
/// # Errors
///
/// If pools for the metrics cannot be made, which no trace has been seen to bring about.
pub fn metrics(trace: &Trace, options: &Options) -> Result<Report> {
    counted(trace, options).map(|(report, _)| report)
}

/// What some of a report's numbers are made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Uses of each expert, layer by layer.
    pub(crate) uses: Vec<Vec<u64>>,
    /// Repeated uses by tokens since the last one; the last place has all that are farther.
    pub(crate) distances: Vec<u64>,
}

/// The same as [`metrics`], with its counts.
pub(crate) fn counted(trace: &Trace, options: &Options) -> Result<(Report, Counts)> {
    let header = trace.header();
    let sequences = sequences(trace, options.phase);
    let tallies = Tallies::new(trace, &sequences);
    let usages = sim::in_parallel(header.layers.len(), |layer| Usage::of(trace, &sequences, layer));
    let all = tallies.all();
    let resamples = if sequences.len() > 1000 { options.resamples / 5 } else { options.resamples };
    let intervals = |prompts: &[Tally]| {
        (prompts.len() > 1 && resamples > 0)
            .then(|| bootstrap::intervals(prompts, resamples, options.seed))
    };
    let mean = |of: &dyn Fn(&Usage) -> Option<f64>| {
        let values: Vec<f64> = usages.iter().filter_map(of).collect();
        (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
    };
    let used = header.layers.iter().map(|layer| layer.used).max().unwrap_or(0);
    let experts = header.layers.iter().map(|layer| layer.experts).max().unwrap_or(0);
    let static_hot = static_hot(trace, &usages);
    let report = Report {
        model: header.model.name.clone(),
        phase: options.phase.name(),
        layers: header.layers.len(),
        experts,
        used,
        tokens: Tokens { prefill: trace.count(Phase::Prefill), decode: trace.count(Phase::Decode) },
        prompts: sequences.len(),
        locality: locality(&all),
        uniform_unique: uniform_unique(trace),
        sch: sch(trace, &sequences),
        entropy: mean(&Usage::entropy),
        gini: mean(&Usage::gini),
        working_set: mean(&|usage| (!sequences.is_empty()).then_some(usage.distinct() as f64)),
        predict: Prediction {
            previous_token: previous_token(&all, header.ranked),
            next_layer: next_layer(trace, &sequences),
        },
        faulted_experts_per_token: faults(trace, options)?,
        max_resident_per_layer: usages.iter().map(Usage::distinct).max().unwrap_or(0),
        curves: if options.curves { curves(trace, options)? } else { Vec::new() },
        intervals: intervals(&tallies.prompts).map(|locality| Intervals {
            level: bootstrap::LEVEL,
            resamples,
            locality,
        }),
        controls: match options.controls {
            true => Some(Controls {
                shuffled: headline(&controls::shuffled(trace, &sequences, options.seed)?)?,
                uniform: headline(&controls::uniform(trace, &sequences, options.seed)?)?,
                static_hot: static_hot.clone(),
            }),
            false => None,
        },
        static_hot,
        per_layer: per_layer(trace, &tallies, &usages),
        per_domain: per_domain(trace, &sequences, &tallies, &intervals),
        per_prompt: per_prompt(trace, &sequences, &tallies),
    };
    let uses = usages.iter().map(Usage::all).collect();
    Ok((report, Counts { uses, distances: all.distances }))
}

/// The control of the same name, of [`Controls::shuffled`].
pub(crate) fn shuffled(trace: &Trace, phase: Phase, seed: u64) -> Result<Trace> {
    controls::shuffled(trace, &sequences(trace, phase), seed)
}

/// The control of the same name, of [`Controls::uniform`].
pub(crate) fn uniform(trace: &Trace, phase: Phase, seed: u64) -> Result<Trace> {
    controls::uniform(trace, &sequences(trace, phase), seed)
}

/// Tallies by layer, and by prompt.
struct Tallies {
    layers: Vec<Tally>,
    prompts: Vec<Tally>,
}

impl Tallies {
    fn new(trace: &Trace, sequences: &[Sequence]) -> Self {
        let prompts: Vec<_> = sequences.iter().map(|_| Mutex::new(Tally::default())).collect();
        let layers = sim::in_parallel(trace.header().layers.len(), |layer| {
            let mut sum = Tally::default();
            for (sequence, prompt) in sequences.iter().zip(&prompts) {
                let tally = Tally::of(trace, &sequence.tokens, layer);
                sum.add(&tally);
                prompt.lock().expect("no thread panics with it").add(&tally);
            }
            sum
        });
        let unlock = |tally: Mutex<Tally>| tally.into_inner().expect("no thread panics with it");
        Self { layers, prompts: prompts.into_iter().map(unlock).collect() }
    }

    fn all(&self) -> Tally {
        sum(self.layers.iter())
    }
}

fn sum<'a>(tallies: impl Iterator<Item = &'a Tally>) -> Tally {
    let mut all = Tally::default();
    tallies.for_each(|tally| all.add(tally));
    all
}

pub(super) fn locality(tally: &Tally) -> Locality {
    let window = |len: usize| {
        let place = WINDOWS.iter().position(|&window| window == len);
        &tally.windows[place.expect("it is one of those that are counted")]
    };
    let srp = |len: usize| window(len).srp().map(|(srp, rho)| Srp { srp, rho });
    Locality {
        reuse_next: tally.reuse_next(),
        reuse_distance: Distance { median: tally.distance(0.5), p90: tally.distance(0.9) },
        srp: SRP_WINDOWS.iter().map(|&len| (len.to_string(), srp(len))).collect(),
        unique: UNIQUE_WINDOWS.iter().map(|&len| (len.to_string(), window(len).unique())).collect(),
    }
}

/// Distinct experts of `m` tokens that each use any k of E: E (1 - (1 - k / E)^m), mean of the layers.
fn uniform_unique(trace: &Trace) -> BTreeMap<String, f64> {
    let layers = &trace.header().layers;
    let of = |len: usize| {
        let unique = layers.iter().map(|layer| {
            let (experts, used) = (f64::from(layer.experts), f64::from(layer.used));
            experts * (1.0 - (1.0 - used / experts).powi(len as i32))
        });
        unique.sum::<f64>() / layers.len() as f64
    };
    UNIQUE_WINDOWS.iter().map(|&len| (len.to_string(), of(len))).collect()
}

fn sch(trace: &Trace, sequences: &[Sequence]) -> BTreeMap<String, BTreeMap<String, SchRate>> {
    let prompts: Vec<Vec<u32>> = sequences.iter().map(|s| s.tokens.clone()).collect();
    let slots =
        RHOS.map(|rho| trace.header().layers.iter().map(|layer| layer.used * rho).collect());
    let of = |window: u32| {
        let sch = sim::sch(trace, &prompts, window, &slots);
        let rate = |hits: u64| hits as f64 / sch.requests as f64;
        let rates = sch.hits.iter().zip(&sch.hits_fill);
        let rates =
            rates.map(|(&strict, &fill)| SchRate { fill: rate(fill), strict: rate(strict) });
        let rates = RHOS.iter().map(ToString::to_string).zip(rates);
        (window.to_string(), if sch.requests > 0 { rates.collect() } else { BTreeMap::new() })
    };
    SCH_WINDOWS.into_iter().map(of).collect()
}

fn static_hot(trace: &Trace, usages: &[Usage]) -> BTreeMap<String, Option<f64>> {
    let of = |rho: u32| {
        let layers = usages.iter().zip(&trace.header().layers);
        let parts = layers.map(|(usage, layer)| usage.held_out((rho * layer.used) as usize));
        let (held, all) = parts.fold((0, 0), |sum, part| (sum.0 + part.0, sum.1 + part.1));
        (all > 0).then(|| held as f64 / all as f64)
    };
    RHOS.into_iter().map(|rho| (rho.to_string(), of(rho))).collect()
}

fn faults(trace: &Trace, options: &Options) -> Result<Faults> {
    let setup = Setup { phase: options.phase, seed: options.seed, ..Setup::default() };
    let layers = &trace.header().layers;
    let slots: Vec<u32> = layers.iter().map(|l| (2 * l.used).min(l.experts)).collect();
    let outcome = sim::replay(trace, &setup, &slots)?;
    let faults = outcome.requests - outcome.hits_total();
    let per = |faults: u64, batches: u64| (batches > 0).then(|| faults as f64 / batches as f64);
    Ok(Faults {
        mean: per(faults, outcome.tokens),
        max: outcome.faults_max,
        steady: per(outcome.faults_steady, outcome.batches.saturating_sub(1)),
    })
}

/// Steps of a trace up to which all policies are simulated, and those of one pass alone beyond.
pub(crate) const STEPS_MAX: usize = 1 << 21;

/// Pools of 1 to 16 times the experts of a token, as far as there are so many.
fn curves(trace: &Trace, options: &Options) -> Result<Vec<Curve>> {
    let layers = &trace.header().layers;
    let most = layers.iter().map(|l| f64::from(l.experts) / f64::from(l.used)).fold(1.0, f64::max);
    let rhos = [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0];
    let sizes: Vec<Size> = rhos.into_iter().filter(|&rho| rho <= most).map(Size::Rho).collect();
    let mut all = Vec::new();
    let of_all = layers.len() * trace.count(options.phase) <= STEPS_MAX;
    let online = |policy| Eviction::Online(policy);
    let mut add = |pool: PoolKind, eviction: Eviction| -> Result<()> {
        let setup =
            Setup { pool, eviction, phase: options.phase, seed: options.seed, ..Setup::default() };
        // A prompt in one batch may need more than the smallest pools have.
        let sizes: Vec<Size> = match eviction {
            Eviction::Belady if pool == PoolKind::PerLayer => {
                let roomy = |size: &&Size| sim::curve(trace, &setup, &[**size]).is_ok();
                sizes.iter().filter(roomy).copied().collect()
            }
            _ => sizes.clone(),
        };
        all.push(sim::curve(trace, &setup, &sizes)?);
        Ok(())
    };
    for eviction in
        [online(Policy::Lru), online(Policy::LFU), Eviction::Belady, Eviction::BeladyLeave]
    {
        add(PoolKind::PerLayer, eviction)?;
    }
    if of_all {
        let rest = Policy::ALL.into_iter().filter(|p| ![Policy::Lru, Policy::LFU].contains(p));
        rest.clone().try_for_each(|policy| add(PoolKind::PerLayer, online(policy)))?;
        for eviction in
            [online(Policy::Lru), online(Policy::LFU), online(Policy::LeastStale), Eviction::Belady]
        {
            add(PoolKind::Global, eviction)?;
        }
    }
    Ok(all)
}

fn headline(trace: &Trace) -> Result<Headline> {
    let sequences = sequences(trace, Phase::Decode);
    let sizes = RHOS.map(|rho| Size::Rho(rho.into()));
    let setup = Setup { eviction: Eviction::Online(Policy::Lru), ..Setup::default() };
    let points = sim::curve(trace, &setup, &sizes)?.points;
    let rates = points.iter().map(sim::Point::hit_rate);
    Ok(Headline {
        locality: locality(&Tallies::new(trace, &sequences).all()),
        lru: RHOS.iter().map(ToString::to_string).zip(rates).collect(),
    })
}

fn per_layer(trace: &Trace, tallies: &Tallies, usages: &[Usage]) -> Vec<OfLayer> {
    let layers = trace.header().layers.iter().zip(&tallies.layers).zip(usages).enumerate();
    let of = |(index, ((layer, tally), usage)): (usize, ((&crate::Layer, &Tally), &Usage))| {
        let held = |rho: u32| {
            let (held, all) = usage.held_out((rho * layer.used) as usize);
            (rho.to_string(), (all > 0).then(|| held as f64 / all as f64))
        };
        OfLayer {
            layer: index,
            block: layer.block,
            locality: locality(tally),
            entropy: usage.entropy(),
            gini: usage.gini(),
            working_set: usage.distinct(),
            static_hot: RHOS.into_iter().map(held).collect(),
        }
    };
    layers.map(of).collect()
}

fn per_domain(
    trace: &Trace,
    sequences: &[Sequence],
    tallies: &Tallies,
    intervals: &dyn Fn(&[Tally]) -> Option<LocalityIntervals>,
) -> Vec<OfDomain> {
    let names = trace.domains().names();
    if sequences.iter().all(|sequence| sequence.domain == 0) {
        return Vec::new();
    }
    let of = |(number, name): (u16, &String)| {
        let own = || sequences.iter().zip(&tallies.prompts).filter(|(s, _)| s.domain == number);
        let prompts: Vec<Tally> = own().map(|(_, tally)| tally.clone()).collect();
        (!prompts.is_empty()).then(|| OfDomain {
            domain: name.clone(),
            prompts: prompts.len(),
            tokens: own().map(|(sequence, _)| sequence.tokens.len()).sum(),
            locality: locality(&sum(prompts.iter())),
            intervals: intervals(&prompts),
        })
    };
    (0u16..).zip(names).filter_map(of).collect()
}

fn per_prompt(trace: &Trace, sequences: &[Sequence], tallies: &Tallies) -> Vec<OfPrompt> {
    let names = trace.domains().names();
    let of = |(sequence, tally): (&Sequence, &Tally)| OfPrompt {
        prompt: sequence.prompt,
        domain: names[usize::from(sequence.domain)].clone(),
        tokens: sequence.tokens.len(),
        locality: locality(tally),
    };
    sequences.iter().zip(&tallies.prompts).map(of).collect()
}

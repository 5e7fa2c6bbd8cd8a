//! The numbers of a page.

use tierstream_pool::Policy;

use crate::error::{Error, Result};
use crate::header::Header;
use crate::metrics::{Counts, Options, Report, STEPS_MAX, counted, shuffled, uniform};
use crate::sim::{self, Curve, Eviction, PoolKind, Setup, Size};
use crate::trace::{Phase, Token, Trace};

/// Sizes of pools, as shares of the experts, beside 1, 2 and 4 times what a token uses.
const SHARES: [f64; 12] = [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0];

/// The share that is told in words.
const TOLD: f64 = 0.25;

/// The shares that domains are compared by.
const OF_DOMAINS: [f64; 3] = [0.1, 0.25, 0.5];

/// Domains with rates of their own: those with the most tokens.
const DOMAINS_MAX: usize = 16;

/// All that a page tells of one trace.
#[derive(Debug, Clone, PartialEq)]
pub struct Study {
    pub(super) trace: String,
    pub(super) header: Header,
    pub(super) options: Options,
    pub(super) experts: Option<u32>,
    pub(super) report: Report,
    pub(super) counts: Counts,
    pub(super) slots: Vec<u32>,
    pub(super) shuffled: Curve,
    pub(super) uniform: Curve,
    pub(super) domains: Vec<DomainRates>,
}

/// What LRU pools per layer, cold and strict, hold of the prompts of one domain alone.
#[derive(Debug, Clone, PartialEq)]
pub struct DomainRates {
    /// Its tag.
    pub domain: String,
    /// Of pools of 10, 25 and 50 % of the experts.
    pub curve: Curve,
}

impl Study {
    /// Computes all of it. `trace` is a path, as a command line has it, and `experts` the
    /// [assumption](crate::Assume::experts) that it was read with.
    ///
    /// [`Options::curves`] does not matter: [`Report::curves`] has the sizes of the page.
    ///
    /// # Errors
    ///
    /// If there are no tokens of the phase.
    pub fn of(path: &str, trace: &Trace, options: &Options, experts: Option<u32>) -> Result<Self> {
        if trace.count(options.phase) == 0 {
            let phase = options.phase.name();
            return Err(Error::file(format!("there are no tokens of the phase {phase}")));
        }
        let header = trace.header();
        let slots = slots(header);
        let (mut report, counts) = counted(trace, &Options { curves: false, ..*options })?;
        let setup = Setup { phase: options.phase, seed: options.seed, ..Setup::default() };
        report.curves = curves(trace, &setup, &slots)?;
        // Controls have decoded tokens alone.
        let of_control = Setup { phase: Phase::Decode, ..setup };
        let control = |trace: Result<Trace>| sim::curve(&trace?, &of_control, &sizes(&slots));
        let shuffled = control(shuffled(trace, options.phase, options.seed))?;
        let uniform = control(uniform(trace, options.phase, options.seed))?;
        let domains = domains(trace, &report, &setup, &slots)?;
        Ok(Self {
            trace: path.to_owned(),
            header: header.clone(),
            options: *options,
            experts,
            report,
            counts,
            slots,
            shuffled,
            uniform,
            domains,
        })
    }

    /// The metrics. Its curves are those of the page.
    #[must_use]
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// Hit rates of LRU, of the tokens of each prompt in any order.
    #[must_use]
    pub fn shuffled(&self) -> &Curve {
        &self.shuffled
    }

    /// Hit rates of LRU, of tokens that use any experts.
    #[must_use]
    pub fn uniform(&self) -> &Curve {
        &self.uniform
    }

    /// Rates of the domains with the most tokens.
    #[must_use]
    pub fn domains(&self) -> &[DomainRates] {
        &self.domains
    }

    /// Slots of a layer in each size of pools, in ascending order.
    #[must_use]
    pub fn slots(&self) -> &[u32] {
        &self.slots
    }

    /// The name of the model, or of the file.
    pub(super) fn label(&self) -> String {
        let file = |path: &str| path.rsplit(['/', '\\']).next().unwrap_or_default().to_owned();
        match self.header.model.name.trim() {
            "" => file(&self.trace),
            name => name.strip_suffix(".gguf").map_or(name.to_owned(), file),
        }
    }

    /// Of all experts, those that so many slots of each layer hold.
    pub(super) fn share(&self, slots: u32) -> f64 {
        share(&self.header, slots)
    }

    /// The size that is told in words: the first with a quarter of the experts.
    pub(super) fn told(&self) -> u32 {
        nearest(&self.header, &self.slots, TOLD)
    }

    pub(super) fn curve(&self, pool: PoolKind, eviction: Eviction) -> Option<&Curve> {
        let mut curves = self.report.curves.iter();
        curves.find(|curve| (curve.setup.pool, curve.setup.eviction) == (pool, eviction))
    }

    /// Hit rate of a pool per layer.
    pub(super) fn rate(&self, eviction: Eviction, slots: u32) -> Option<f64> {
        rate(self.curve(PoolKind::PerLayer, eviction)?, slots)
    }
}

/// Hit rate of a curve's pool of so many slots for each layer.
pub(super) fn rate(curve: &Curve, slots: u32) -> Option<f64> {
    let mut points = curve.points.iter();
    points.find(|point| point.slots_per_layer == f64::from(slots))?.hit_rate()
}

/// Steps of a trace up to which all policies are simulated with all sizes: those that no single pass
/// has take a replay for each.
const ALL_SIZES_STEPS_MAX: usize = 1 << 17;

/// How much there is to simulate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd)]
enum Extent {
    Small,
    /// Policies without a single pass have fewer sizes.
    Medium,
    /// They are left out.
    Large,
}

/// The policies that the page compares; of pools per layer, Least-Stale is LRU.
fn policies(pool: PoolKind, extent: Extent) -> Vec<Eviction> {
    let online: &[Policy] = match (pool, extent) {
        (PoolKind::PerLayer, Extent::Large) => &[Policy::Lru, Policy::LFU, Policy::Fifo],
        (PoolKind::PerLayer, _) => {
            &[Policy::Lru, Policy::LFU, Policy::Lfru, Policy::Fifo, Policy::Slru, Policy::S3Fifo]
        }
        (_, Extent::Small) => &[Policy::Lru, Policy::LFU, Policy::LeastStale],
        (_, Extent::Medium) => &[Policy::Lru],
        (_, Extent::Large) => return Vec::new(),
    };
    online.iter().copied().map(Eviction::Online).chain([Eviction::Belady]).collect()
}

/// Whether one pass tells the hits of all sizes.
fn at_once(pool: PoolKind, eviction: Eviction) -> bool {
    let replayed = [Policy::Lfru, Policy::Slru, Policy::S3Fifo].map(Eviction::Online);
    pool == PoolKind::PerLayer && !replayed.contains(&eviction)
}

fn curves(trace: &Trace, setup: &Setup, slots: &[u32]) -> Result<Vec<Curve>> {
    let extent = match trace.header().layers.len() * trace.count(setup.phase) {
        0..=ALL_SIZES_STEPS_MAX => Extent::Small,
        steps if steps <= STEPS_MAX => Extent::Medium,
        _ => Extent::Large,
    };
    let few = few(trace.header(), slots);
    let mut curves = Vec::new();
    for pool in [PoolKind::PerLayer, PoolKind::Global] {
        for eviction in policies(pool, extent) {
            let setup = Setup { pool, eviction, ..*setup };
            let all = extent == Extent::Small || at_once(pool, eviction);
            let slots = if all { slots } else { &few };
            curves.push(match sim::curve(trace, &setup, &sizes(slots)) {
                // A prompt in one batch may need more than the smallest pools have.
                Err(_) if eviction == Eviction::Belady => roomy(trace, &setup, slots)?,
                found => found?,
            });
        }
    }
    Ok(curves)
}

/// A curve of the sizes that can be simulated.
fn roomy(trace: &Trace, setup: &Setup, slots: &[u32]) -> Result<Curve> {
    let fits = |slots: &&u32| sim::curve(trace, setup, &[Size::Slots(**slots)]).is_ok();
    let slots: Vec<u32> = slots.iter().filter(fits).copied().collect();
    sim::curve(trace, setup, &sizes(&slots))
}

fn sizes(slots: &[u32]) -> Vec<Size> {
    slots.iter().map(|&slots| Size::Slots(slots)).collect()
}

/// Slots of a layer, from what a token uses to all.
fn slots(header: &Header) -> Vec<u32> {
    let (experts, used) = shape(header);
    let shares = SHARES.iter().map(|share| (share * f64::from(experts)).round() as u32);
    let mut slots: Vec<u32> = shares.chain([1, 2, 4].map(|rho| rho * used)).collect();
    slots.retain(|slots| (used..=experts).contains(slots));
    slots.sort_unstable();
    slots.dedup();
    slots
}

/// Of all sizes, 1, 2 and 4 times what a token uses, a quarter, half, and all.
fn few(header: &Header, slots: &[u32]) -> Vec<u32> {
    let (experts, used) = shape(header);
    let shares = [0.25, 0.5, 1.0].map(|share| nearest(header, slots, share));
    let kept = |slots: &&u32| {
        [1, 2, 4].map(|rho| rho * used).contains(slots)
            || shares.contains(slots)
            || **slots == experts
    };
    slots.iter().filter(kept).copied().collect()
}

/// The most experts of a layer, and the most that a token uses of one.
pub(super) fn shape(header: &Header) -> (u32, u32) {
    let experts = header.layers.iter().map(|layer| layer.experts).max().unwrap_or(1);
    (experts, header.layers.iter().map(|layer| layer.used).max().unwrap_or(1))
}

fn share(header: &Header, slots: u32) -> f64 {
    let held: f64 = header.layers.iter().map(|layer| f64::from(layer.experts.min(slots))).sum();
    held / header.layers.iter().map(|layer| f64::from(layer.experts)).sum::<f64>()
}

/// The first size with such a share of the experts, but for rounding.
fn nearest(header: &Header, slots: &[u32], wanted: f64) -> u32 {
    let rounded = (wanted * f64::from(shape(header).0)).round() as u32;
    let mut large = slots.iter().copied().filter(|&slots| slots >= rounded);
    large.next().unwrap_or_else(|| shape(header).0)
}

/// Rates of the domains with the most tokens, replayed alone.
fn domains(trace: &Trace, report: &Report, setup: &Setup, all: &[u32]) -> Result<Vec<DomainRates>> {
    let mut slots: Vec<u32> =
        OF_DOMAINS.iter().map(|&share| nearest(trace.header(), all, share)).collect();
    slots.dedup();
    let mut largest: Vec<_> = report.per_domain.iter().collect();
    largest.sort_by_key(|domain| std::cmp::Reverse(domain.tokens));
    let of = |domain: &crate::metrics::OfDomain| {
        let names = trace.domains().names();
        let number = names.iter().position(|name| *name == domain.domain).unwrap_or(0);
        let alone = alone(trace, setup.phase, number as u16)?;
        let curve = sim::curve(&alone, setup, &sizes(&slots))?;
        Ok(DomainRates { domain: domain.domain.clone(), curve })
    };
    largest.into_iter().take(DOMAINS_MAX).map(of).collect()
}

/// The tokens of one domain.
fn alone(trace: &Trace, phase: Phase, domain: u16) -> Result<Trace> {
    let mut alone = Trace::new(trace.header().clone())?;
    for (index, token) in trace.tokens().iter().enumerate() {
        if token.phase == phase && token.domain == domain {
            alone.push(Token { domain: 0, ..*token }, trace.row(index), &[])?;
        }
    }
    Ok(alone)
}

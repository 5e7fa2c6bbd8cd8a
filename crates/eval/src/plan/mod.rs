//! Whether a model is worth streaming on a machine: how fast it would be in each place, and what follows.
//!
//! The time of a token is that of computing with all its experts in the pool, and for each layer what the
//! faults of its step add, which are read as one burst: t = t(hits) + sum over layers of a(faults). Both
//! are measured on the machine ([`Costs`]), so that a(n) has what the engine computes meanwhile taken off
//! already; how many steps have n faults is known from a trace, or guessed ([`Curve`]). Pure functions:
//! `docs/evaluation.md` tells what is measured how.

mod curve;
mod families;
mod verdict;

use serde::{Deserialize, Serialize};

pub use curve::{Curve, Expected, Mix, layout};
pub use families::{FAMILIES, Family, Point};
pub use verdict::{Machine, TOK_S_MIN, Verdict, VerdictKind, verdict};

/// What a prediction leaves out: other texts lengthen attention, and clocks change. Share of the time.
const LEFT_OUT: f64 = 0.05;

/// The middle of what was measured, and between what half of it lies.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Range {
    /// The median.
    pub mid: f64,
    /// The lower quartile.
    pub low: f64,
    /// The upper quartile.
    pub high: f64,
}

impl Range {
    /// Of several figures; 0 of none.
    #[must_use]
    pub fn of(values: &[f64]) -> Self {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let Some(last) = sorted.len().checked_sub(1) else { return Self::exactly(0.0) };
        let at = |share: f64| {
            let place = share * last as f64;
            let (low, high) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
            low + (high - low) * place.fract()
        };
        Self { mid: at(0.5), low: at(0.25), high: at(0.75) }
    }

    /// Of one figure.
    #[must_use]
    pub fn exactly(value: f64) -> Self {
        Self { mid: value, low: value, high: value }
    }
}

/// What tokens cost where records of a pool are missing, seconds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Costs {
    /// A token whose experts are all in the pool.
    pub hit_s: Range,
    /// Faults of a layer, ascending, and what they add to it.
    pub faults_s: Vec<(f64, Range)>,
    /// Records of a layer, ascending, and what reading or copying them alone takes.
    pub bursts_s: Vec<(f64, Range)>,
}

impl Costs {
    /// Seconds of a token.
    fn token_s(&self, mix: &Mix, of: fn(&Range) -> f64) -> f64 {
        (of(&self.hit_s) + sum(&self.faults_s, mix, of)).max(f64::MIN_POSITIVE)
    }

    /// What reading alone takes of a token.
    fn reads_s(&self, mix: &Mix) -> f64 {
        sum(&self.bursts_s, mix, |range| range.mid)
    }

    /// The same with a drive that is so many times faster.
    fn with_drive(&self, mix: &Mix, faster: f64) -> f64 {
        let token = self.token_s(mix, |range| range.mid);
        let saved = self.reads_s(mix) * (1.0 - 1.0 / faster);
        (token - saved).max(self.hit_s.mid).min(token)
    }
}

/// Over the layers of a token: what their faults cost.
fn sum(points: &[(f64, Range)], mix: &Mix, of: fn(&Range) -> f64) -> f64 {
    let cost = |(faults, layers): (u32, &f64)| layers * between(points, f64::from(faults), of);
    (0..).zip(&mix.layers).map(cost).sum()
}

/// On the line through the points from (0, 0) on; beyond the last it goes on.
fn between(points: &[(f64, Range)], at: f64, of: fn(&Range) -> f64) -> f64 {
    let (mut low, mut high) = ((0.0, 0.0), (0.0, 0.0));
    for (x, range) in points {
        (low, high) = (high, (*x, of(range)));
        if *x >= at {
            break;
        }
    }
    if high.0 <= low.0 {
        return high.1;
    }
    low.1 + (high.1 - low.1) * (at - low.0) / (high.0 - low.0)
}

/// Where the experts are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Placement {
    /// All in host memory, computed by the processor.
    ResidentRam,
    /// A pool in host memory, over the drive.
    PoolRam,
    /// All in the GPU's memory.
    ResidentVram,
    /// A pool in the GPU's memory, over all experts in host memory.
    PoolVramOverRam,
    /// The same over a pool in host memory, over the drive.
    PoolVramOverPoolRam,
    /// A pool in the GPU's memory, over the drive.
    PoolVramOverDrive,
}

impl Placement {
    /// Whether no expert is missing ever.
    #[must_use]
    pub fn is_resident(self) -> bool {
        matches!(self, Self::ResidentRam | Self::ResidentVram)
    }

    /// Whether a GPU computes.
    #[must_use]
    pub fn is_on_gpu(self) -> bool {
        !matches!(self, Self::ResidentRam | Self::PoolRam)
    }
}

/// What takes the most of a token's time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Limit {
    /// Computing, and what the engine adds to it.
    Compute,
    /// Reads of the drive.
    Drive,
    /// Copies to the GPU.
    Bus,
}

/// How fast a model would be in one place.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Prediction {
    /// Where the experts are.
    pub placement: Placement,
    /// Host memory that it takes in all, bytes.
    pub ram_bytes: u64,
    /// The GPU's memory that it takes in all, bytes; 0 without one.
    pub vram_bytes: u64,
    /// Of one or the other, the pool that tokens compute with, bytes.
    pub pool_bytes: u64,
    /// Whether the machine, or what is given of it, has room for this.
    pub fits: bool,
    /// Hits of that pool per request, from 0 to 1.
    pub hit_rate: f64,
    /// Records that a token lacks.
    pub faults_per_token: f64,
    /// Tokens per second.
    pub tok_s: f64,
    /// The least that is to be expected.
    pub tok_s_low: f64,
    /// The most.
    pub tok_s_high: f64,
    /// Until the first token, if that is known: the load, and what a prompt of 64 tokens reads.
    pub first_token_s: Option<f64>,
    /// What takes the most of the time.
    pub limited_by: Limit,
    /// Tokens per second with a drive twice as fast; none where nothing is read.
    pub tok_s_drive_x2: Option<f64>,
}

/// A place, but for how fast it is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Place {
    /// Where the experts are.
    pub placement: Placement,
    /// Host memory that it takes in all, bytes.
    pub ram_bytes: u64,
    /// The GPU's, bytes.
    pub vram_bytes: u64,
    /// The pool that tokens compute with, bytes.
    pub pool_bytes: u64,
    /// Whether there is room for it.
    pub fits: bool,
    /// Until the first token, if that is known, seconds.
    pub first_token_s: Option<f64>,
}

/// What `expected` takes in a place, of a model of which a token asks for so many records.
#[must_use]
pub fn predict(place: Place, requests: f64, expected: &Expected, costs: &Costs) -> Prediction {
    let mix = &expected.mix;
    let middle = costs.token_s(mix, |range| range.mid);
    let mut others: Vec<f64> =
        expected.others.iter().map(|mix| costs.token_s(mix, |range| range.mid)).collect();
    others.sort_by(f64::total_cmp);
    let other = |share: f64| {
        let at = (share * (others.len() as f64 - 1.0)).round().max(0.0) as usize;
        others.get(at).copied().unwrap_or(middle)
    };
    // Independent of each other: what was measured, what is asked for, and what is left out.
    let apart = |measured: f64, asked: f64| {
        let squares = [measured - middle, asked - middle, LEFT_OUT * middle].map(|d| d * d);
        squares.iter().sum::<f64>().sqrt()
    };
    let faster = apart(costs.token_s(mix, |range| range.low), other(0.025).min(middle));
    let slower = apart(costs.token_s(mix, |range| range.high), other(0.975).max(middle));
    let faults = mix.faults();
    let added = middle - costs.hit_s.mid;
    let on_drive = match place.placement {
        Placement::PoolVramOverRam | Placement::ResidentRam | Placement::ResidentVram => false,
        Placement::PoolRam | Placement::PoolVramOverPoolRam | Placement::PoolVramOverDrive => true,
    };
    let Place { placement, ram_bytes, vram_bytes, pool_bytes, fits, first_token_s } = place;
    Prediction {
        placement,
        ram_bytes,
        vram_bytes,
        pool_bytes,
        fits,
        hit_rate: if requests > 0.0 { 1.0 - faults / requests } else { 1.0 },
        faults_per_token: faults,
        tok_s: 1.0 / middle,
        tok_s_low: 1.0 / (middle + slower),
        // No faster than twice of what is in the middle, whatever the errors are.
        tok_s_high: 1.0 / (middle - faster).max(middle / 2.0),
        first_token_s,
        limited_by: match (added > costs.hit_s.mid, on_drive) {
            (false, _) => Limit::Compute,
            (true, true) => Limit::Drive,
            (true, false) => Limit::Bus,
        },
        tok_s_drive_x2: (on_drive && faults > 0.0).then(|| 1.0 / costs.with_drive(mix, 2.0)),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// 10 ms of computing, and 1 ms for a fault, of which half is read; 4 of them take 2 ms.
    pub(crate) fn costs() -> Costs {
        let exactly = Range::exactly;
        Costs {
            hit_s: exactly(0.010),
            faults_s: vec![(1.0, exactly(0.001)), (4.0, exactly(0.002))],
            bursts_s: vec![(1.0, exactly(0.0005)), (4.0, exactly(0.001))],
        }
    }

    pub(crate) fn place(placement: Placement, ram_bytes: u64, fits: bool) -> Place {
        let first_token_s = Some(1.0);
        Place { placement, ram_bytes, vram_bytes: 0, pool_bytes: ram_bytes, fits, first_token_s }
    }

    pub(crate) fn expected(layers: &[f64]) -> Expected {
        let mix = Mix { layers: layers.to_vec(), below: 0.0 };
        Expected { ends: [mix.clone(), mix.clone()], others: vec![mix.clone()], mix }
    }

    #[test]
    fn a_range_is_the_median_and_the_quartiles() {
        assert_eq!(Range::of(&[3.0, 1.0, 2.0]), Range { mid: 2.0, low: 1.5, high: 2.5 });
        assert_eq!(Range::of(&[7.0]), Range::exactly(7.0));
        assert_eq!(Range::of(&[1.0, 2.0]).mid, 1.5);
        assert_eq!(Range::of(&[]), Range::exactly(0.0));
    }

    #[test]
    fn faults_of_a_step_cost_what_a_burst_of_so_many_does() {
        let points = costs().faults_s;
        let at = |faults| between(&points, faults, |range| range.mid);
        assert_eq!([0.0, 1.0, 4.0].map(at), [0.0, 0.001, 0.002]);
        assert!((at(2.5) - 0.0015).abs() < 1e-12);
        assert!((at(7.0) - 0.003).abs() < 1e-12, "beyond what was measured it goes on");
        assert_eq!(between(&[], 3.0, |range| range.mid), 0.0);
    }

    #[test]
    fn a_token_is_its_hits_and_what_each_layer_lacks() {
        // 5 layers without a fault, 2 with one, 1 with four: 14 ms.
        let expected = expected(&[5.0, 2.0, 0.0, 0.0, 1.0]);
        let place = place(Placement::PoolRam, 100, true);
        let prediction = predict(place, 32.0, &expected, &costs());
        assert!((prediction.tok_s - 1.0 / 0.014).abs() < 1e-9);
        assert_eq!((prediction.faults_per_token, prediction.hit_rate), (6.0, 1.0 - 6.0 / 32.0));
        assert_eq!(prediction.limited_by, Limit::Compute);
        // The reads take 2 ms, and half of that is saved.
        assert!((prediction.tok_s_drive_x2.unwrap() - 1.0 / 0.013).abs() < 1e-9);
        let missing = predict(place, 32.0, &self::expected(&[0.0, 0.0, 0.0, 0.0, 8.0]), &costs());
        assert_eq!(missing.limited_by, Limit::Drive);
        assert_eq!(missing.hit_rate, 0.0);
    }

    #[test]
    fn errors_of_the_rates_and_of_the_curve_widen_the_bar() {
        let place = place(Placement::PoolRam, 100, true);
        let bar = |expected: &Expected, costs: &Costs| {
            let p = predict(place, 32.0, expected, costs);
            assert!(p.tok_s_low < p.tok_s && p.tok_s < p.tok_s_high);
            p.tok_s_high - p.tok_s_low
        };
        let steady = expected(&[4.0, 4.0]);
        let narrow = bar(&steady, &costs());
        let mut noisy = costs();
        noisy.hit_s = Range { mid: 0.010, low: 0.009, high: 0.013 };
        assert!(bar(&steady, &noisy) > narrow);
        let mut texts = steady.clone();
        texts.others = vec![expected(&[7.0, 1.0]).mix, expected(&[0.0, 8.0]).mix];
        assert!(bar(&texts, &costs()) > narrow);
    }

    #[test]
    fn without_experts_missing_nothing_is_read() {
        let all = expected(&[8.0]);
        let p = predict(place(Placement::ResidentRam, 9, true), 32.0, &all, &costs());
        assert_eq!((p.hit_rate, p.tok_s_drive_x2, p.limited_by), (1.0, None, Limit::Compute));
    }
}

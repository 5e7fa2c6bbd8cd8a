//! Confidence intervals: what would have come of other prompts of the same kind.

use super::report::{Locality, LocalityIntervals, locality};
use super::tally::Tally;
use crate::random::Random;

/// Share of the resamples that an interval holds.
pub(super) const LEVEL: f64 = 0.95;

/// Draws as many prompts as there are, with replacement, so often, and tells in which interval the
/// middle of the results lies (the percentile bootstrap; Efron and Tibshirani, "An introduction to the
/// bootstrap", 1993, chapter 13).
pub(super) fn intervals(prompts: &[Tally], resamples: usize, seed: u64) -> LocalityIntervals {
    let results = crate::sim::in_parallel(resamples, |number| {
        let mut random = Random::new(seed ^ (number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let mut sum = Tally::default();
        (0..prompts.len()).for_each(|_| sum.add(&prompts[random.below(prompts.len())]));
        locality(&sum)
    });
    let of = |value: &dyn Fn(&Locality) -> Option<f64>| {
        let mut values: Vec<f64> = results.iter().filter_map(value).collect();
        values.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let place = (share * (values.len() as f64 - 1.0)).round();
            values.get(place as usize).copied()
        };
        Some([at((1.0 - LEVEL) / 2.0)?, at((1.0 + LEVEL) / 2.0)?])
    };
    let keys = |map: fn(&Locality) -> Vec<String>| results.first().map(map).unwrap_or_default();
    let windows = |locality: &Locality| locality.unique.keys().cloned().collect();
    let srps = |locality: &Locality| locality.srp.keys().cloned().collect();
    LocalityIntervals {
        reuse_next: of(&|l| l.reuse_next),
        reuse_distance_median: of(&|l| l.reuse_distance.median.map(|d| d as f64)),
        reuse_distance_p90: of(&|l| l.reuse_distance.p90.map(|d| d as f64)),
        srp: keys(srps)
            .into_iter()
            .map(|key| {
                let interval = of(&|l| l.srp.get(&key)?.as_ref().map(|srp| srp.srp));
                (key, interval)
            })
            .collect(),
        unique: keys(windows)
            .into_iter()
            .map(|key| {
                let interval = of(&|l| *l.unique.get(&key)?);
                (key, interval)
            })
            .collect(),
    }
}

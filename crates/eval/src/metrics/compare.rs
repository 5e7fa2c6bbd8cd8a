//! Two traces side by side.

use serde::Serialize;

use super::report::{Interval, Report};
use crate::sim::PoolKind;

/// A number of two reports.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Difference {
    /// Which: the name in the JSON of a report, with a window or size behind a dot.
    pub metric: String,
    /// In the first.
    pub a: Option<f64>,
    /// In the second.
    pub b: Option<f64>,
    /// `b - a`, if there are both.
    pub difference: Option<f64>,
    /// Interval of the first; none for a single prompt, and for what is not resampled.
    pub a_interval: Interval,
    /// Interval of the second.
    pub b_interval: Interval,
}

/// The numbers that two reports have in common: two models, or two trainings of one.
#[must_use]
pub fn compare(a: &Report, b: &Report) -> Vec<Difference> {
    let mut all = Vec::new();
    let mut add = |metric: String, of: &dyn Fn(&Report) -> (Option<f64>, Interval)| {
        let ((a, a_interval), (b, b_interval)) = (of(a), of(b));
        let difference = a.zip(b).map(|(a, b)| b - a);
        all.push(Difference { metric, a, b, difference, a_interval, b_interval });
    };
    let intervals = |report: &Report| report.intervals.as_ref().map(|all| all.locality.clone());
    add("reuse_next".to_owned(), &|r| {
        (r.locality.reuse_next, intervals(r).and_then(|i| i.reuse_next))
    });
    add("reuse_distance.median".to_owned(), &|r| {
        let median = r.locality.reuse_distance.median.map(|distance| distance as f64);
        (median, intervals(r).and_then(|i| i.reuse_distance_median))
    });
    add("reuse_distance.p90".to_owned(), &|r| {
        let p90 = r.locality.reuse_distance.p90.map(|distance| distance as f64);
        (p90, intervals(r).and_then(|i| i.reuse_distance_p90))
    });
    for window in a.locality.srp.keys() {
        add(format!("srp.{window}"), &|r| {
            let srp = r.locality.srp.get(window).copied().flatten().map(|srp| srp.srp);
            (srp, intervals(r).and_then(|i| i.srp.get(window).copied().flatten()))
        });
    }
    for window in a.locality.unique.keys() {
        add(format!("unique_share.{window}"), &|r| {
            // Of the layer's experts: models have different numbers of them.
            let share = |unique: f64| unique / f64::from(r.experts);
            let interval = intervals(r).and_then(|i| i.unique.get(window).copied().flatten());
            let unique = r.locality.unique.get(window).copied().flatten().map(share);
            (unique, interval.map(|interval| interval.map(share)))
        });
    }
    add("entropy".to_owned(), &|r| (r.entropy, None));
    add("gini".to_owned(), &|r| (r.gini, None));
    for rho in a.static_hot.keys() {
        add(format!("static_hot.{rho}"), &|r| (r.static_hot.get(rho).copied().flatten(), None));
    }
    add("predict.next_layer.recall".to_owned(), &|r| (r.predict.next_layer.recall, None));
    for policy in ["lru", "lfu", "belady"] {
        for rho in [1.0, 2.0, 4.0] {
            add(format!("hit_rate.{policy}.{rho}"), &|r| (hit_rate(r, policy, rho), None));
        }
    }
    all
}

/// Of a pool per layer.
fn hit_rate(report: &Report, policy: &str, rho: f64) -> Option<f64> {
    let mut curves = report.curves.iter().filter(|curve| curve.setup.pool == PoolKind::PerLayer);
    let curve = curves.find(|curve| curve.setup.eviction.to_string() == policy)?;
    curve.points.iter().find(|point| point.rho == rho)?.hit_rate()
}

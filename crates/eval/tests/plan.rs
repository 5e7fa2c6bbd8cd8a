//! The bundled curves against the public traces that they are of.

use std::path::Path;

use tierstream_eval::plan::{Curve, FAMILIES, Mix, Point};
use tierstream_eval::{Assume, Trace, read};
use tierstream_pool::Policy;

fn load(name: &str) -> Trace {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    read(&folder.join(format!("{name}.parquet")), Assume::default()).unwrap()
}

/// Misses of the second half, of all once more, and how much those of a step come together: by the variance
/// of a beta-binomial distribution.
fn point(trace: &Trace, u: f64) -> Point {
    let layers = &trace.header().layers;
    let (count, used) = (layers.len() as f64, f64::from(layers[0].used));
    let experts = f64::from(layers[0].experts);
    let slots = ((used / experts).powf(1.0 - u) * experts * count).round() as u64;
    let expected = Curve::Trace(trace).at(layers, slots, 0, Policy::default()).unwrap();
    let miss = |mix: &Mix| mix.faults() / count / used;
    let steps =
        || (0..).map(f64::from).zip(expected.mix.layers.iter().map(|layers| layers / count));
    let mean: f64 = steps().map(|(n, share)| n * share).sum();
    let variance: f64 = steps().map(|(n, share)| (n - mean).powi(2) * share).sum();
    let inflation = variance / (mean * (1.0 - mean / used)).max(1e-9);
    let together = ((inflation - 1.0) / (used - 1.0)).clamp(0.0, 0.99);
    let [first, again] = &expected.ends;
    [miss(first), miss(again), together]
}

#[test]
fn bundled_curves_are_those_of_the_traces() {
    let mut wrong = Vec::new();
    for family in &FAMILIES {
        let trace = load(family.name);
        let layer = trace.header().layers[0];
        assert_eq!((layer.experts, layer.used), (family.experts, family.used), "{}", family.name);
        let found: Vec<Point> =
            (0..=10).map(|tenth| point(&trace, f64::from(tenth) / 10.0)).collect();
        let close = |(a, b): (&Point, &Point)| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 0.002);
        if !found.iter().zip(&family.points).all(close) {
            let points = found.iter().map(|[a, b, c]| format!("[{a:.3}, {b:.3}, {c:.3}]"));
            wrong.push(format!("{}: [{}]", family.name, points.collect::<Vec<_>>().join(", ")));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

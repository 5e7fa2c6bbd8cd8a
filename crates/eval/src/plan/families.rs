//! Hit rates of models whose traces are public, for models that have none.
//!
//! Of each: misses of the runtime's default pool by how much of the model is resident. What is resident is measured by u = ln(rho) / ln(E / k): 0 is room for
//! the k experts of a token, 1 for all E. `tests/plan.rs` computes the table from the traces.

use super::curve::{Expected, Mix};
use crate::header::Layer;

/// A public trace.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Family {
    /// As `tests/data` calls it.
    pub name: &'static str,
    /// `general.architecture` of models that are of the family.
    pub architectures: &'static [&'static str],
    /// Experts of a layer.
    pub experts: u32,
    /// Of them, used by a token.
    pub used: u32,
    /// At u = 0, 0.1, ..., 1.
    pub points: [Point; 11],
}

/// The share of misses in the second half of the trace, that when it is replayed once more, and how much a
/// step's misses come together (intra-class correlation of a beta-binomial distribution). These traces
/// are short, so that first uses are many: what a long run has is between the first two.
pub type Point = [f64; 3];

/// Those that there are.
pub const FAMILIES: [Family; 4] = [
    Family {
        name: "olmoe",
        architectures: &["olmoe"],
        experts: 64,
        used: 8,
        points: [
            [0.542, 0.565, 0.107],
            [0.491, 0.519, 0.107],
            [0.437, 0.470, 0.116],
            [0.380, 0.417, 0.128],
            [0.322, 0.365, 0.134],
            [0.266, 0.314, 0.134],
            [0.205, 0.251, 0.126],
            [0.143, 0.173, 0.106],
            [0.077, 0.097, 0.065],
            [0.029, 0.026, 0.021],
            [0.000, 0.000, 0.000],
        ],
    },
    Family {
        name: "qwen",
        architectures: &["qwen3moe"],
        experts: 128,
        used: 6,
        points: [
            [0.633, 0.620, 0.128],
            [0.577, 0.565, 0.136],
            [0.508, 0.496, 0.154],
            [0.412, 0.404, 0.162],
            [0.325, 0.314, 0.156],
            [0.232, 0.221, 0.145],
            [0.129, 0.118, 0.095],
            [0.049, 0.049, 0.069],
            [0.032, 0.000, 0.086],
            [0.032, 0.000, 0.086],
            [0.000, 0.000, 0.000],
        ],
    },
    Family {
        name: "gemma",
        architectures: &["gemma4"],
        experts: 128,
        used: 6,
        points: [
            [0.644, 0.645, 0.123],
            [0.583, 0.583, 0.109],
            [0.500, 0.502, 0.103],
            [0.396, 0.404, 0.109],
            [0.315, 0.324, 0.116],
            [0.239, 0.244, 0.112],
            [0.137, 0.151, 0.071],
            [0.062, 0.064, 0.042],
            [0.022, 0.000, 0.041],
            [0.022, 0.000, 0.041],
            [0.000, 0.000, 0.000],
        ],
    },
    Family {
        name: "gptoss",
        architectures: &["gpt-oss"],
        experts: 128,
        used: 2,
        points: [
            [0.832, 0.823, 0.060],
            [0.723, 0.737, 0.010],
            [0.572, 0.629, 0.126],
            [0.440, 0.521, 0.161],
            [0.347, 0.437, 0.188],
            [0.270, 0.350, 0.206],
            [0.166, 0.237, 0.140],
            [0.135, 0.000, 0.147],
            [0.135, 0.000, 0.147],
            [0.135, 0.000, 0.147],
            [0.000, 0.000, 0.000],
        ],
    },
];

/// At u, between the points.
fn at(family: &Family, u: f64) -> Point {
    let place = u.clamp(0.0, 1.0) * 10.0;
    let low = (place.floor() as usize).min(9);
    between(&family.points[low], &family.points[low + 1], place - low as f64)
}

fn between(a: &Point, b: &Point, share: f64) -> Point {
    std::array::from_fn(|index| a[index] + (b[index] - a[index]) * share)
}

/// Of a token with `used` experts in each of so many layers: how many layers have 0, 1, ... faults if
/// each expert misses with this chance, and the misses of a layer are so correlated (beta-binomial).
pub(super) fn mix(layers: f64, used: u32, miss: f64, correlation: f64) -> Mix {
    let miss = miss.clamp(0.0, 1.0);
    if miss == 0.0 || miss == 1.0 {
        let mut steps = vec![0.0; used as usize + 1];
        steps[if miss == 0.0 { 0 } else { used as usize }] = layers;
        return Mix { layers: steps, below: 0.0 };
    }
    let scale = 1.0 / correlation.clamp(1e-3, 0.99) - 1.0;
    let (alpha, beta, k) = (miss * scale, (1.0 - miss) * scale, f64::from(used));
    let none = (0..used).map(f64::from).map(|i| (beta + i) / (scale + i)).product::<f64>();
    let mut steps = vec![layers * none];
    for n in (0..used).map(f64::from) {
        let ratio = (k - n) / (n + 1.0) * (alpha + n) / (beta + k - n - 1.0);
        steps.push(steps[n as usize] * ratio);
    }
    Mix { layers: steps, below: 0.0 }
}

/// Where a pool lies between room for a token and for all.
fn place(layers: &[Layer], slots: u64) -> (f64, f64) {
    let sum = |of: fn(&Layer) -> u32| -> f64 { layers.iter().map(|l| f64::from(of(l))).sum() };
    let (used, experts) = (sum(|l| l.used), sum(|l| l.experts));
    let density = used / experts;
    let share = (slots as f64 / experts).clamp(density.min(1.0), 1.0);
    let u = if density < 1.0 { 1.0 - share.ln() / density.ln() } else { 1.0 };
    (u, density)
}

/// What these say of a model. The middle is its own family, if there is one, else what lies between those
/// of which a token uses a larger and a smaller share of the experts; the others are all of them.
pub(super) fn expected(architecture: &str, layers: &[Layer], slots: u64, below: u64) -> Expected {
    let used = layers.iter().map(|layer| layer.used).max().unwrap_or(0);
    let count = layers.len() as f64;
    let points = |slots: u64| -> (Point, Vec<Point>) {
        let (u, density) = place(layers, slots);
        let all: Vec<Point> = FAMILIES.iter().map(|family| at(family, u)).collect();
        let own = FAMILIES.iter().position(|f| f.architectures.contains(&architecture));
        (own.map_or_else(|| by_density(&all, density), |own| all[own]), all)
    };
    let ((middle, others), lower) = (points(slots), (below > slots).then(|| points(below)));
    // A pool below that is filled by what the one above lacks holds about what a single one of its size
    // would.
    let with = |miss: f64, together: f64, lower: Option<f64>| Mix {
        below: lower.map_or(0.0, |lower| 1.0 - (lower / miss.max(f64::MIN_POSITIVE)).min(1.0)),
        ..mix(count, used, miss, together)
    };
    let mean: fn(&Point) -> f64 = |point| f64::midpoint(point[0], point[1]);
    let lowers = |index: usize, kind: usize| lower.as_ref().map(|(_, all)| all[index][kind]);
    let others = others.iter().enumerate().flat_map(|(index, point)| {
        [0, 1].map(|kind| with(point[kind], point[2], lowers(index, kind)))
    });
    let lower = |of: fn(&Point) -> f64| lower.as_ref().map(|(middle, _)| of(middle));
    Expected {
        mix: with(mean(&middle), middle[2], lower(mean)),
        ends: [
            with(middle[0], middle[2], lower(|point| point[0])),
            with(middle[1], middle[2], lower(|point| point[1])),
        ],
        others: others.collect(),
    }
}

/// Between the families, in order of the logarithm of the share of experts that a token uses.
fn by_density(all: &[Point], density: f64) -> Point {
    let own = |family: &Family| (f64::from(family.used) / f64::from(family.experts)).ln();
    let mut known: Vec<(f64, Point)> = FAMILIES.iter().map(own).zip(all.iter().copied()).collect();
    known.sort_by(|(a, _), (b, _)| a.total_cmp(b));
    // Families of one density count as one.
    let mean = |same: &[(f64, Point)]| -> Point {
        let sum = |index: usize| same.iter().map(|(_, point)| point[index]).sum::<f64>();
        std::array::from_fn(|index| sum(index) / same.len() as f64)
    };
    let merged: Vec<(f64, Point)> =
        known.chunk_by(|(a, _), (b, _)| a == b).map(|same| (same[0].0, mean(same))).collect();
    let x = density.ln().clamp(merged[0].0, merged[merged.len() - 1].0);
    let above = merged.iter().position(|(at, _)| *at >= x).unwrap_or(merged.len() - 1).max(1);
    let ((a, low), (b, high)) = (&merged[above - 1], &merged[above]);
    between(low, high, (x - a) / (b - a))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::header::Header;

    #[test]
    fn faults_of_a_step_are_as_many_as_the_rate_says() {
        for (miss, correlation) in [(0.3, 0.001), (0.3, 0.4), (0.9, 0.1), (0.0, 0.1), (1.0, 0.1)] {
            let mix = mix(48.0, 8, miss, correlation);
            assert!((mix.layers.iter().sum::<f64>() - 48.0).abs() < 1e-9, "{mix:?}");
            assert!((mix.faults() - 48.0 * 8.0 * miss).abs() < 1e-6, "{mix:?}");
        }
        // Uncorrelated, they are binomial.
        let binomial = 0.7_f64.powi(8);
        assert!((mix(1.0, 8, 0.3, 1e-3).layers[0] - binomial).abs() < 2e-3);
        assert!(mix(1.0, 8, 0.3, 0.4).layers[0] > 3.0 * binomial);
    }

    #[test]
    fn a_larger_pool_misses_less_and_the_middle_is_among_the_others() {
        let layers = Header::uniform(32, 256, 8).layers;
        let mut last = f64::INFINITY;
        for slots in [8, 16, 32, 64, 128, 200, 256] {
            let expected = expected("nobody's", &layers, 32 * slots, 0);
            let (faults, others) = (expected.mix.faults(), expected.others);
            assert!(faults < last, "{slots}: {faults}");
            last = faults;
            let others: Vec<f64> = others.iter().map(Mix::faults).collect();
            let (low, high) = (
                others.iter().copied().fold(f64::INFINITY, f64::min),
                others.iter().copied().fold(0.0, f64::max),
            );
            assert!(low <= faults + 1e-9 && faults <= high + 1e-9, "{low} {faults} {high}");
        }
        assert!(last < 1e-9);
        let [own, nobodys] = ["gpt-oss", ""].map(|name| expected(name, &layers, 32 * 32, 0));
        assert!(
            own.mix.faults() > nobodys.mix.faults(),
            "of gpt-oss, with fewer experts, most miss"
        );
    }

    #[test]
    fn a_pool_below_has_what_a_single_one_of_its_size_would() {
        let layers = Header::uniform(32, 128, 6).layers;
        let [small, large] =
            [20, 80].map(|slots| expected("", &layers, 32 * slots, 0).mix.faults());
        let both = expected("", &layers, 32 * 20, 32 * 80).mix;
        assert!((both.faults() * (1.0 - both.below) - large).abs() < 1e-9);
        assert_eq!(both.faults(), small);
    }

    #[test]
    fn where_all_experts_are_used_all_are_resident() {
        let layers = Header::uniform(2, 4, 4).layers;
        assert_eq!(expected("", &layers, 8, 0).mix.faults(), 0.0);
    }
}

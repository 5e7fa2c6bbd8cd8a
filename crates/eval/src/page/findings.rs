//! What the numbers say, in a few sentences.

use tierstream_pool::Policy;

use super::curves::look;
use super::study::{Study, rate, shape};
use super::text::{bytes, count, number, percent, size};
use crate::sim::{Eviction, PoolKind};

const LRU: Eviction = Eviction::Online(Policy::Lru);

/// Hit rates at the size that is told.
struct Told {
    slots: u32,
    share: f64,
    lru: f64,
    belady: Option<f64>,
    shuffled: Option<f64>,
    uniform: Option<f64>,
}

impl Told {
    fn of(study: &Study) -> Option<Self> {
        let slots = study.told();
        Some(Self {
            slots,
            share: study.share(slots),
            lru: study.rate(LRU, slots)?,
            belady: study.rate(Eviction::Belady, slots),
            shuffled: rate(&study.shuffled, slots),
            uniform: rate(&study.uniform, slots),
        })
    }
}

/// Hundredths, as differences of percentages are told.
fn points(difference: f64) -> String {
    format!("{:.1} points", 100.0 * difference + 0.0).replace('-', "−")
}

/// Figures, each with what it is.
pub(super) fn tiles(study: &Study) -> Vec<(String, String)> {
    let mut tiles = Vec::new();
    if let Some(reuse) = study.report.locality.reuse_next {
        tiles.push((
            percent(reuse),
            "of a token’s experts were used by the token before".to_owned(),
        ));
    }
    let Some(told) = Told::of(study) else { return tiles };
    let share = size(told.share);
    tiles.push((percent(told.lru), format!("hits of LRU with {share} of the experts")));
    if let Some(belady) = told.belady {
        tiles.push((percent(belady), "hits of the optimum there".to_owned()));
    }
    if let Some(shuffled) = told.shuffled {
        let label = "is what time is worth: LRU against the shuffled trace";
        tiles.push((points(told.lru - shuffled), label.to_owned()));
    }
    tiles
}

pub(super) fn sentences(study: &Study) -> Vec<String> {
    let mut all = Vec::new();
    let (experts, used) = shape(&study.header);
    if used == experts {
        all.push(
            "Every token uses every expert: a pool either has room for all of them, or misses."
                .to_owned(),
        );
    }
    if let Some(told) = Told::of(study) {
        all.extend(pool(study, &told));
    }
    all.extend(worth(study));
    all.extend(distances(study));
    if all.is_empty() {
        all.push("There are too few tokens to say anything of them.".to_owned());
    }
    all
}

fn pool(study: &Study, told: &Told) -> Vec<String> {
    let memory = study.curve(PoolKind::PerLayer, LRU).and_then(|curve| {
        let point = curve.points.iter().find(|p| p.slots_per_layer == f64::from(told.slots))?;
        (point.bytes > 0).then(|| format!(", {}", bytes(point.bytes)))
    });
    let mut text = format!(
        "A pool of {} of the experts ({} slots per layer{}) answers {} of requests with LRU",
        size(told.share),
        count(told.slots.into()),
        memory.unwrap_or_default(),
        percent(told.lru)
    );
    if let Some(belady) = told.belady {
        text.push_str(&format!("; the optimum {}", percent(belady)));
    }
    if let Some(uniform) = told.uniform {
        text.push_str(&format!("; uniform routing would give {}", percent(uniform)));
    }
    let mut all = vec![text + "."];
    let online = study.report.curves.iter().filter(|curve| {
        curve.setup.pool == PoolKind::PerLayer && curve.setup.eviction != Eviction::Belady
    });
    let rates = online.filter_map(|curve| Some((curve.setup.eviction, rate(curve, told.slots)?)));
    if let Some((best, rate)) = rates.max_by(|a, b| a.1.total_cmp(&b.1))
        && rate > told.lru
    {
        all.push(format!(
            "The best policy of the runtime there is {}, with {}.",
            look(best).0,
            percent(rate)
        ));
    }
    all
}

fn worth(study: &Study) -> Option<String> {
    let told = Told::of(study)?;
    let (shuffled, uniform) = (told.shuffled?, told.uniform?);
    Some(format!(
        "The same tokens in any order would give LRU {}: time is worth {}, and the popularity of some experts {} \
         above uniform routing.",
        percent(shuffled),
        points(told.lru - shuffled),
        points(shuffled - uniform)
    ))
}

fn distances(study: &Study) -> Option<String> {
    let locality = &study.report.locality;
    let (median, p90) = (locality.reuse_distance.median?, locality.reuse_distance.p90?);
    let tokens = |distance: u64| match distance {
        1 => "1 token".to_owned(),
        1024 => "1,024 tokens or more".to_owned(),
        distance => format!("{} tokens", count(distance)),
    };
    let mut text = format!(
        "Half of the repeated uses of an expert come within {}, nine of ten within {}",
        tokens(median),
        tokens(p90)
    );
    let windows = [64, 16].into_iter().find_map(|window: u32| {
        let key = window.to_string();
        Some((window, locality.unique.get(&key)?.as_ref()?, study.report.uniform_unique.get(&key)?))
    });
    if let Some((window, unique, uniform)) = windows {
        text.push_str(&format!(
            "; {window} tokens touch {} of a layer’s experts, where uniform routing touches {}",
            number(*unique),
            number(*uniform)
        ));
    }
    Some(text + ".")
}

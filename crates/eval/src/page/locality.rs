//! How far apart the uses of experts are, and how many they are of.

use super::chart::{self, Axis, Bar, Line};
use super::study::Study;
use super::table::{Width, figure, panel, table};
use super::text::{count, number, or_dash, percent};

/// Distances from one on: a bin for each power of two, and one for all that is far.
fn bins(distances: &[u64]) -> Vec<(usize, usize)> {
    let far = distances.len() - 1;
    let powers =
        (0..).map(|power| if power == 0 { (1, 1) } else { ((1 << (power - 1)) + 1, 1 << power) });
    let mut bins: Vec<(usize, usize)> = powers.take_while(|bin| bin.0 < far).collect();
    if let Some(last) = bins.last_mut() {
        last.1 = last.1.min(far - 1);
    }
    bins.push((far, usize::MAX));
    bins
}

pub(super) fn distances(study: &Study) -> String {
    let distances = &study.counts.distances;
    let all: u64 = distances.iter().sum();
    if all == 0 {
        let note = "No expert of a layer was used twice.";
        return panel("Tokens until an expert is used again", note, "");
    }
    let layers = &study.header.layers;
    let used: f64 = layers.iter().map(|layer| f64::from(layer.used)).sum();
    // Of geometric distances, farther than so many tokens.
    let beyond = |tokens: usize| {
        let of = |layer: &crate::Layer| {
            let stays = 1.0 - f64::from(layer.used) / f64::from(layer.experts);
            f64::from(layer.used) / used * stays.powf(tokens as f64)
        };
        layers.iter().map(of).sum::<f64>()
    };
    let mut bars = Vec::new();
    let mut rows = Vec::new();
    for (from, to) in bins(distances) {
        let counts: u64 = distances[from..].iter().take(to - from + 1).sum();
        let (value, far) = (counts as f64 / all as f64, to == usize::MAX);
        let chance = beyond(from - 1) - if far { 0.0 } else { beyond(to) };
        let range = match (from, to) {
            _ if far => format!("{from} or more"),
            (from, to) if from == to => from.to_string(),
            (from, to) => format!("{from} to {to}"),
        };
        let told = format!(
            "{range} tokens: {} of the repeated uses; uniform routing {}",
            percent(value),
            percent(chance)
        );
        let name = if far { format!("{from}+") } else { from.to_string() };
        bars.push(Bar { name, value, chance, told });
        rows.push(vec![range, count(counts), percent(value), percent(chance)]);
    }
    let most = bars.iter().map(|bar| bar.value.max(bar.chance)).fold(0.0, f64::max);
    let reuse = study.report.locality.reuse_distance;
    let tokens = |distance: Option<u64>| or_dash(distance, count);
    let note = format!(
        "Repeated uses of an expert of a layer by the tokens since the last one. Median {}, nine of ten within {}. The marks are \
         what uniform routing would give.",
        tokens(reuse.median),
        tokens(reuse.p90)
    );
    figure(
        Width::Half,
        "Tokens until an expert is used again",
        &note,
        &chart::columns(
            "Distribution of the tokens between two uses of an expert, in powers of two",
            "tokens since the last use, from",
            &share_axis(most, "of repeated uses"),
            &bars,
        ),
        &table("Repeated uses by distance", &["tokens", "uses", "share", "uniform"], &rows),
    )
}

/// From 0 to a little above the most.
fn share_axis(most: f64, title: &str) -> Axis {
    let step =
        [0.02, 0.05, 0.1, 0.2, 0.25].into_iter().find(|step| most / step <= 5.0).unwrap_or(0.25);
    let steps = (most / step).ceil().max(1.0);
    let tick = |at: usize| (step * at as f64, vec![format!("{:.0} %", 100.0 * step * at as f64)]);
    Axis {
        min: 0.0,
        max: step * steps,
        log: false,
        ticks: (0..=steps as usize).map(tick).collect(),
        title: title.to_owned(),
    }
}

pub(super) fn windows(study: &Study) -> String {
    let report = &study.report;
    let mut known: Vec<(u32, f64)> = Vec::new();
    for (window, unique) in &report.locality.unique {
        if let (Ok(window), Some(unique)) = (window.parse(), unique) {
            known.push((window, *unique));
        }
    }
    known.sort_unstable_by_key(|(window, _)| *window);
    let title = "Working set by window";
    if known.is_empty() {
        return panel(title, "No prompt has 16 tokens.", "");
    }
    let intervals = report.intervals.as_ref().map(|intervals| &intervals.locality.unique);
    let interval = |window: u32| *intervals?.get(&window.to_string())?;
    let name = "This trace";
    let told = |&(window, unique): &(u32, f64)| {
        format!("{window} tokens touch {} experts of a layer", number(unique))
    };
    let layers = &study.header.layers;
    let uniform = |window: f64| {
        let of = |layer: &crate::Layer| {
            let (experts, used) = (f64::from(layer.experts), f64::from(layer.used));
            experts * (1.0 - (1.0 - used / experts).powf(window))
        };
        layers.iter().map(of).sum::<f64>() / layers.len() as f64
    };
    let mean =
        layers.iter().map(|layer| f64::from(layer.experts)).sum::<f64>() / layers.len() as f64;
    let steps = (0..=48).map(|step| 12.0 * (320.0f64 / 12.0).powf(f64::from(step) / 48.0));
    let trace = Line {
        name: name.to_owned(),
        class: "c-lru",
        points: known.iter().map(|&(window, unique)| (f64::from(window), unique)).collect(),
        told: known.iter().map(told).collect(),
        intervals: known
            .iter()
            .filter_map(|&(window, _)| Some((f64::from(window), interval(window)?)))
            .collect(),
    };
    let line = Line {
        name: "Uniform routing".to_owned(),
        class: "c-uniform",
        points: steps.map(|window| (window, uniform(window))).collect(),
        told: Vec::new(),
        intervals: Vec::new(),
    };
    let x = Axis {
        min: 12.0,
        max: 320.0,
        log: true,
        ticks: [16, 32, 64, 128, 256]
            .map(|window| (f64::from(window), vec![window.to_string()]))
            .to_vec(),
        title: "tokens in a row".to_owned(),
    };
    let y = Axis {
        min: 0.0,
        max: mean,
        log: false,
        ticks: [0.0, 0.25, 0.5, 0.75, 1.0]
            .map(|share| (share * mean, vec![format!("{:.0}", share * mean)]))
            .to_vec(),
        title: "experts of a layer".to_owned(),
    };
    let rows: Vec<Vec<String>> = known
        .iter()
        .map(|&(window, unique)| {
            let range = or_dash(interval(window), |[low, high]| {
                format!("{} to {}", number(low), number(high))
            });
            let uniform = report.uniform_unique.get(&window.to_string());
            vec![window.to_string(), number(unique), range, or_dash(uniform, |u| number(*u))]
        })
        .collect();
    figure(
        Width::Half,
        title,
        "Distinct experts of a layer that tokens in a row touch, on average. All experts are the top of the chart.",
        &chart::lines(
            "Distinct experts of a layer over the number of tokens in a row, beside uniform routing",
            &x,
            &y,
            &[line, trace],
        ),
        &table("Distinct experts", &["tokens", "experts", "95 % of resamples", "uniform"], &rows),
    )
}

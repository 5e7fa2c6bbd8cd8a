//! Numbers that are tables alone.

use tierstream_pool::Policy;

use super::study::{Study, shape};
use super::table::{ROWS_MAX, details, left_out, panel, table};
use super::text::{count, counted, number, or_dash, percent};
use crate::metrics::Locality;
use crate::sim::Eviction;

/// Keys of a map, as the numbers that they are.
fn in_order<'a, T>(map: impl Iterator<Item = (&'a String, T)>) -> Vec<(u32, T)> {
    let mut all: Vec<(u32, T)> =
        map.filter_map(|(key, value)| Some((key.parse().ok()?, value))).collect();
    all.sort_by_key(|(key, _)| *key);
    all
}

pub(super) fn segments(study: &Study) -> String {
    let report = &study.report;
    let intervals = report.intervals.as_ref().map(|intervals| &intervals.locality.srp);
    let srp: Vec<Vec<String>> = in_order(report.locality.srp.iter())
        .into_iter()
        .map(|(window, srp)| {
            let interval = intervals.and_then(|all| *all.get(&window.to_string())?);
            vec![
                window.to_string(),
                or_dash(srp.as_ref(), |srp| percent(srp.srp)),
                or_dash(interval, |[low, high]| format!("{} to {}", percent(low), percent(high))),
                or_dash(srp.as_ref(), |srp| format!("{:.2}", srp.rho)),
            ]
        })
        .collect();
    let sch: Vec<Vec<String>> = in_order(report.sch.iter())
        .into_iter()
        .map(|(window, rates)| {
            let mut row = vec![window.to_string()];
            for (_, rate) in in_order(rates.iter()) {
                row.push(format!("{} / {}", percent(rate.fill), percent(rate.strict)));
            }
            row
        })
        .filter(|row| row.len() > 1)
        .collect();
    let mut inside = table("SRP", &["tokens", "SRP", "95 % of resamples", "its size, ρ"], &srp);
    if !sch.is_empty() {
        inside.push_str(&table(
            "SCH, filling as a hit / strict",
            &["tokens", "ρ 1", "ρ 2", "ρ 4"],
            &sch,
        ));
    }
    panel(
        "Segments",
        "How well one group of experts serves some tokens in a row (SRP), and a cache that knows them (SCH). ρ is a size in experts of a token.",
        &inside,
    )
}

/// What is left without time, without popularity, and with a fixed set.
pub(super) fn controls(study: &Study) -> String {
    let report = &study.report;
    let Some(controls) = &report.controls else { return String::new() };
    let row = |name: &str, locality: &Locality, lru: &dyn Fn(&str) -> Option<f64>| {
        let mut row = vec![name.to_owned(), or_dash(locality.reuse_next, percent)];
        row.extend(["1", "2", "4"].map(|rho| or_dash(lru(rho), percent)));
        row
    };
    let used = shape(&study.header).1;
    let eviction = Eviction::Online(Policy::Lru);
    let of_trace = |rho: &str| study.rate(eviction, used * rho.parse::<u32>().ok()?);
    let hot = ["1", "2", "4"]
        .map(|rho| or_dash(controls.static_hot.get(rho).copied().flatten(), percent));
    let rows = vec![
        row("this trace", &report.locality, &of_trace),
        row("shuffled tokens", &controls.shuffled.locality, &|rho| {
            *controls.shuffled.lru.get(rho)?
        }),
        row("uniform routing", &controls.uniform.locality, &|rho| {
            *controls.uniform.lru.get(rho)?
        }),
        ["a fixed hot set, held out".to_owned(), "–".to_owned()].into_iter().chain(hot).collect(),
    ];
    let inside =
        table("Reuse, and hits of LRU", &["tokens", "reuse", "LRU, ρ 1", "ρ 2", "ρ 4"], &rows);
    panel(
        "Controls",
        "What is left of it in other orders, by chance, and with a set that never changes. Sizes ρ are in experts of a token.",
        &inside,
    )
}

pub(super) fn predictability(study: &Study) -> String {
    let predict = &study.report.predict;
    let used = u64::from(shape(&study.header).1);
    let (previous, next) = (&predict.previous_token, &predict.next_layer);
    let wasted = |value: Option<f64>| or_dash(value, |value| format!("{value:.2}"));
    let rows = vec![
        vec![
            "what the last token used".to_owned(),
            or_dash(previous.recall, percent),
            "–".to_owned(),
            wasted(previous.wasted_per_useful),
        ],
        vec![
            "what follows the layer before".to_owned(),
            or_dash(next.recall, percent),
            or_dash(next.recall_twice, percent),
            wasted(next.wasted_per_useful),
        ],
    ];
    let once = format!("recall of {}", counted(used, "guess").replace("guesss", "guesses"));
    let twice = format!("of {} guesses", 2 * used);
    let mut inside = table("Guesses", &["guess", &once, &twice, "wrong for each right one"], &rows);
    let by_rank = previous.precision_by_rank.as_deref().unwrap_or_default();
    let ranks = by_rank.len().max(next.precision_by_rank.len()).min(ROWS_MAX);
    let rows: Vec<Vec<String>> = (0..ranks)
        .map(|rank| {
            let of = |all: &[f64]| or_dash(all.get(rank), |share| percent(*share));
            vec![(rank + 1).to_string(), of(by_rank), of(&next.precision_by_rank)]
        })
        .collect();
    if !rows.is_empty() {
        let titles = ["place", "last token", "layer before"];
        inside.push_str(&details("By place of the guess", &table("Right guesses", &titles, &rows)));
    }
    let faults = study.report.faulted_experts_per_token;
    let rows = vec![vec![
        "per layer, ρ 2".to_owned(),
        or_dash(faults.mean, number),
        or_dash(faults.steady, number),
        count(faults.max),
    ]];
    inside.push_str(&table(
        "Faulted experts per token, LRU",
        &["pools", "mean", "after the first token", "most"],
        &rows,
    ));
    panel(
        "What could be read ahead",
        "Without hidden states, which a trace has not: a router that looks ahead does better.",
        &inside,
    )
}

pub(super) fn per_layer(study: &Study) -> String {
    let rows: Vec<Vec<String>> = study
        .report
        .per_layer
        .iter()
        .take(ROWS_MAX)
        .map(|layer| {
            let locality = &layer.locality;
            let hot = layer.static_hot.get("2").copied().flatten();
            let unique = locality.unique.get("64").copied().flatten();
            let srp = locality.srp.get("16").copied().flatten();
            vec![
                layer.layer.to_string(),
                layer.block.to_string(),
                or_dash(locality.reuse_next, percent),
                or_dash(locality.reuse_distance.median, count),
                or_dash(locality.reuse_distance.p90, count),
                or_dash(srp, |srp| percent(srp.srp)),
                or_dash(unique, number),
                or_dash(layer.entropy, |value| format!("{value:.3}")),
                or_dash(layer.gini, |value| format!("{value:.3}")),
                count(layer.working_set as u64),
                or_dash(hot, percent),
            ]
        })
        .collect();
    let titles = [
        "MoE layer",
        "block",
        "reuse",
        "distance, median",
        "9 of 10",
        "SRP of 16",
        "distinct in 64",
        "entropy",
        "Gini",
        "used at all",
        "hot set, ρ 2",
    ];
    let mut inside = table("Each layer", &titles, &rows);
    inside.push_str(&left_out(study.report.per_layer.len(), "layers"));
    format!(
        "<div class=\"panel wide\"><h3>Layers</h3>{}</div>\n",
        details(&format!("A table of {}", counted(rows.len() as u64, "layer")), &inside)
    )
}

//! Several traces side by side.

use tierstream_pool::Policy;

use super::chart::{self, Axis, Line};
use super::study::{Study, rate};
use super::table::{Width, figure, table};
use super::text::{or_dash, percent, size};
use crate::metrics::compare;
use crate::sim::{Eviction, PoolKind};

/// Classes of lines, one after the other.
const CLASSES: [&str; 6] = ["c-lru", "c-lfu", "c-slru", "c-s3-fifo", "c-fifo", "c-lfru"];

/// A chart and a table of all traces.
pub(super) fn section(studies: &[Study]) -> String {
    format!(
        "<section id=\"compare\">\n<h2>Side by side</h2>\n{}{}</section>\n",
        curves(studies),
        numbers(studies)
    )
}

/// Names that tell traces apart: two may be of one model.
fn names(studies: &[Study]) -> Vec<String> {
    let labels: Vec<String> = studies.iter().map(Study::label).collect();
    let numbered =
        |(number, label): (usize, &String)| match labels.iter().filter(|l| *l == label).count() {
            1 => label.clone(),
            _ => format!("{} {label}", number + 1),
        };
    labels.iter().enumerate().map(numbered).collect()
}

fn curves(studies: &[Study]) -> String {
    let eviction = Eviction::Online(Policy::Lru);
    let names = names(studies);
    let (mut lines, mut rows) = (Vec::new(), Vec::new());
    for ((study, name), class) in studies.iter().zip(&names).zip(CLASSES.iter().cycle()) {
        let Some(curve) = study.curve(PoolKind::PerLayer, eviction) else { continue };
        let (mut points, mut told) = (Vec::new(), Vec::new());
        for &slots in &study.slots {
            let Some(rate) = rate(curve, slots) else { continue };
            let share = study.share(slots);
            points.push((share, rate));
            told.push(format!("{name}, {} of the experts: {}", size(share), percent(rate)));
            rows.push(vec![name.clone(), size(share), slots.to_string(), percent(rate)]);
        }
        lines.push(Line { name: name.clone(), class, points, told, intervals: Vec::new() });
    }
    lines.reverse();
    figure(
        Width::Full,
        "Hit rates of LRU",
        "Pools per layer, cold, strict, by the share of a model’s experts that they hold.",
        &chart::lines(
            "Hit rates of LRU over the share of experts that are resident, a line for each trace",
            &Axis::of_shares("experts resident"),
            &Axis { title: "hits".to_owned(), ..Axis::of_shares("") },
            &lines,
        ),
        &table("Hit rates of LRU", &["trace", "resident", "slots per layer", "hits"], &rows),
    )
}

fn numbers(studies: &[Study]) -> String {
    let Some((first, others)) = studies.split_first() else { return String::new() };
    let mut rows: Vec<Vec<String>> = Vec::new();
    let show = |value: Option<f64>| or_dash(value, |value| format!("{value:.3}"));
    for (place, other) in others.iter().enumerate() {
        for (row, line) in compare(&first.report, &other.report).iter().enumerate() {
            if place == 0 {
                rows.push(vec![line.metric.clone(), show(line.a)]);
            }
            rows[row].push(show(line.b));
        }
    }
    rows.retain(|row| row[1..].iter().any(|cell| cell != "–"));
    let names = names(studies);
    let titles: Vec<&str> =
        ["metric"].into_iter().chain(names.iter().map(String::as_str)).collect();
    let caption = "The metrics of eval compare: shares are from 0 to 1, distances in tokens";
    table(caption, &titles, &rows)
}

//! Hit rates by the size of pools.

use tierstream_pool::Policy;

use super::chart::{self, Axis, Line};
use super::study::{Study, rate, shape};
use super::table::{Width, figure, table};
use super::text::{bytes, count, or_dash, percent, size};
use crate::sim::{Curve, Eviction, PoolKind};

/// How a curve is called, and its class.
pub(super) fn look(eviction: Eviction) -> (&'static str, &'static str) {
    match eviction {
        Eviction::Belady | Eviction::BeladyLeave => ("Belady, the optimum", "c-belady"),
        Eviction::Online(policy) => match policy {
            Policy::Lru => ("LRU", "c-lru"),
            Policy::Lfu { .. } => ("LFU", "c-lfu"),
            Policy::Lfru => ("LFRU", "c-lfru"),
            Policy::Slru => ("SLRU", "c-slru"),
            Policy::S3Fifo => ("S3-FIFO", "c-s3-fifo"),
            Policy::LeastStale => ("Least-Stale", "c-least-stale"),
            Policy::Fifo | Policy::Random => ("FIFO", "c-fifo"),
        },
    }
}

fn line(study: &Study, curve: &Curve, (name, class): (&str, &'static str)) -> Line {
    let (mut points, mut told) = (Vec::new(), Vec::new());
    for &slots in &study.slots {
        let Some(rate) = rate(curve, slots) else { continue };
        let share = study.share(slots);
        points.push((share, rate));
        let size = size(share);
        told.push(format!(
            "{name}: {} with {size} of the experts, {slots} slots per layer",
            percent(rate)
        ));
    }
    Line { name: name.to_owned(), class, points, told, intervals: Vec::new() }
}

/// Shares of experts, with slots and bytes below.
fn resident(study: &Study) -> Axis {
    let mut axis = Axis::of_shares("experts resident: share, slots per layer");
    let experts = f64::from(shape(&study.header).0);
    let all = study.header.total_bytes();
    for (share, texts) in &mut axis.ticks {
        texts.push(format!("{:.0}", *share * experts));
        if all > 0 {
            texts.push(bytes((*share * all as f64) as u64));
        }
    }
    if all > 0 {
        axis.title.push_str(", bytes");
    }
    axis
}

pub(super) fn hit_rates(study: &Study, pool: PoolKind) -> String {
    let of_pool: Vec<&Curve> =
        study.report.curves.iter().filter(|curve| curve.setup.pool == pool).collect();
    if of_pool.is_empty() {
        return String::new();
    }
    let mut lines: Vec<Line> =
        of_pool.iter().map(|curve| line(study, curve, look(curve.setup.eviction))).collect();
    let mut curves = of_pool;
    if pool == PoolKind::PerLayer {
        for (curve, look) in [
            (&study.shuffled, ("LRU, shuffled tokens", "c-shuffled")),
            (&study.uniform, ("LRU, uniform routing", "c-uniform")),
        ] {
            lines.push(line(study, curve, look));
            curves.push(curve);
        }
    }
    let mut titles = vec!["resident", "slots per layer"];
    let records = study.header.total_bytes() > 0;
    if records {
        titles.push("bytes");
    }
    titles.extend(lines.iter().map(|line| line.name.as_str()));
    let row = |&slots: &u32| {
        let share = study.share(slots);
        let mut row = vec![size(share), count(slots.into())];
        if records {
            let layers = study.header.layers.iter();
            row.push(bytes(layers.map(|l| u64::from(slots.min(l.experts)) * l.record_bytes).sum()));
        }
        row.extend(curves.iter().map(|curve| or_dash(rate(curve, slots), percent)));
        row
    };
    let rows: Vec<Vec<String>> = study.slots.iter().map(row).collect();
    let (title, note) = match pool {
        PoolKind::PerLayer => (
            "Hit rate by size of the pool",
            "A pool for each layer, empty at the start; a first use is a miss. The shuffled tokens have the same popularity and \
             no time, uniform routing has neither.",
        ),
        _ => (
            "One pool for all layers",
            "As many slots in all, which layers take from each other. Below the records of one token LRU hits nothing.",
        ),
    };
    let numbers = table("Hits of requests", &titles, &rows);
    // What the eye looks for first is drawn last.
    let mut drawn = lines.clone();
    drawn.sort_by_key(|line| match line.class {
        "c-belady" => 9,
        "c-lru" => 8,
        "c-shuffled" => 1,
        "c-uniform" => 0,
        _ => 5,
    });
    let y = Axis { title: "hits".to_owned(), ..Axis::of_shares("") };
    let label =
        format!("{title}: hit rates of policies over the share of experts that are resident");
    let chart = chart::lines(&label, &resident(study), &y, &drawn);
    let width = if pool == PoolKind::PerLayer { Width::Full } else { Width::Half };
    figure(width, title, note, &chart, &numbers)
}

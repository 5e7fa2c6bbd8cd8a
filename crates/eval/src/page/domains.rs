//! What domains have in common, and what not.

use super::chart::{self, Group};
use super::study::{Study, rate};
use super::table::{Width, figure, table};
use super::text::{count, or_dash, percent, size};

pub(super) fn bars(study: &Study) -> String {
    let (known, report) = (&study.domains, &study.report);
    if known.is_empty() {
        return String::new();
    }
    let slots: Vec<u32> =
        known[0].curve.points.iter().map(|point| point.slots_per_layer as u32).collect();
    let sizes: Vec<String> = slots.iter().map(|&slots| size(study.share(slots))).collect();
    let mut names = vec!["used by the token before".to_owned()];
    names.extend(sizes.iter().map(|size| format!("hits of LRU, {size} resident")));
    let (mut groups, mut rows) = (Vec::new(), Vec::new());
    for of in known {
        let Some(domain) = report.per_domain.iter().find(|domain| domain.domain == of.domain)
        else {
            continue;
        };
        let name = if of.domain.is_empty() { "(none)" } else { &of.domain };
        let interval = domain.intervals.as_ref().and_then(|intervals| intervals.reuse_next);
        let mut row = vec![
            name.to_owned(),
            count(domain.prompts as u64),
            count(domain.tokens as u64),
            or_dash(domain.locality.reuse_next, percent),
            or_dash(interval, |[low, high]| format!("{} to {}", percent(low), percent(high))),
        ];
        let mut bars = Vec::new();
        if let Some(reuse) = domain.locality.reuse_next {
            bars.push((reuse, format!("{name}, {}: {}", names[0], percent(reuse)), interval));
        }
        for (&slots, label) in slots.iter().zip(&names[1..]) {
            let rate = rate(&of.curve, slots);
            row.push(or_dash(rate, percent));
            bars.extend(
                rate.map(|rate| (rate, format!("{name}, {label}: {}", percent(rate)), None)),
            );
        }
        groups.push(Group { name: name.to_owned(), bars });
        rows.push(row);
    }
    let left = report.per_domain.len() - known.len();
    let left = match left {
        0 => String::new(),
        left => format!(" {left} smaller domains are left out."),
    };
    let note = format!(
        "Each domain’s prompts alone, in pools per layer that are empty at the start. Lines are 95 % of resamples of prompts.{left}"
    );
    let titles: Vec<&str> = ["domain", "prompts", "tokens", "reuse", "95 % of resamples"]
        .into_iter()
        .chain(names[1..].iter().map(String::as_str))
        .collect();
    figure(
        Width::Full,
        "By domain",
        &note,
        &chart::rows("Reuse and hit rates of each domain", &names, &groups),
        &table("By domain", &titles, &rows),
    )
}

//! What the page tells of one trace.

use std::fmt::Write as _;

use super::study::{Study, shape};
use super::text::{bytes, count, counted, escape, list, or_dash};
use super::{curves, domains, findings, heat, locality, panels};
use crate::sim::PoolKind;
use crate::trace::Phase;

pub(super) fn section(study: &Study, number: usize, titled: bool) -> String {
    let mut html = format!("<section id=\"trace-{number}\">\n");
    let title = if titled { study.label() } else { "At a glance".to_owned() };
    _ = writeln!(html, "<h2>{}</h2>", escape(&title));
    html.push_str(&facts(study));
    let tiles = findings::tiles(study).into_iter();
    let tiles = tiles
        .map(|(value, name)| format!("<b>{}</b><span>{}</span>", escape(&value), escape(&name)));
    html.push_str(&list("tiles", tiles));
    let sentences = findings::sentences(study).into_iter().map(|sentence| escape(&sentence));
    html.push_str(&list("findings", sentences));
    html.push_str("<div class=\"charts\">\n");
    for part in [
        curves::hit_rates(study, PoolKind::PerLayer),
        heat::figure_of(study),
        locality::distances(study),
        locality::windows(study),
        domains::bars(study),
        curves::hit_rates(study, PoolKind::Global),
        panels::controls(study),
        panels::segments(study),
        panels::predictability(study),
        panels::per_layer(study),
    ] {
        html.push_str(&part);
    }
    html.push_str("</div>\n</section>\n");
    html
}

fn facts(study: &Study) -> String {
    let (header, report) = (&study.header, &study.report);
    let model = &header.model;
    let (experts, used) = shape(header);
    let equal = header.layers.iter().all(|layer| (layer.experts, layer.used) == (experts, used));
    let most = if equal { "" } else { "at most " };
    let mut facts = vec![("Trace", study.trace.clone())];
    if !model.name.is_empty() {
        facts.push(("Model", model.name.clone()));
    }
    facts.extend(model.hash.clone().map(|hash| ("Hash", hash)));
    facts.extend(model.architecture.clone().map(|name| ("Architecture", name)));
    facts.push(("MoE layers", count(header.layers.len() as u64)));
    facts.push((
        "Experts",
        format!("{most}{} of {} used by a token", count(used.into()), count(experts.into())),
    ));
    if header.total_bytes() > 0 {
        let all = header.layers.iter().map(|layer| u64::from(layer.experts)).sum::<u64>();
        facts.push((
            "Records",
            format!(
                "{} each on average, {} in all, {} for a token",
                bytes(header.total_bytes() / all.max(1)),
                bytes(header.total_bytes()),
                bytes(header.token_bytes())
            ),
        ));
    }
    let tokens = report.tokens;
    facts.push((
        "Tokens",
        format!(
            "{} decoded, {} of prompts",
            count(tokens.decode as u64),
            count(tokens.prefill as u64)
        ),
    ));
    let phase = match study.options.phase {
        Phase::Decode => "those that were decoded",
        Phase::Prefill => "those of prompts",
    };
    facts.push((
        "Counted here",
        format!("{phase}, of {}", counted(report.prompts as u64, "prompt")),
    ));
    if !report.per_domain.is_empty() {
        let named = report.per_domain.iter().take(8).map(|domain| match domain.domain.as_str() {
            "" => "(none)".to_owned(),
            name => name.to_owned(),
        });
        let more = report.per_domain.len().saturating_sub(8);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        facts.push(("Domains", named.collect::<Vec<_>>().join(", ") + &more));
    }
    if let Some(sampling) = &header.sampling {
        let seed = or_dash(sampling.seed, |seed| seed.to_string());
        let temperature = or_dash(sampling.temperature, |t| t.to_string());
        facts.push(("Sampling", format!("temperature {temperature}, seed {seed}")));
    }
    if !header.source.is_empty() {
        facts.push(("Source", header.source.clone()));
    }
    let mut html = "<dl class=\"facts\">".to_owned();
    for (name, value) in facts {
        _ = write!(html, "<div><dt>{name}</dt><dd>{}</dd></div>", escape(&value));
    }
    html + "</dl>\n"
}

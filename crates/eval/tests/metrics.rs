//! Metrics of whole traces: the shapes at the edge, controls, domains, intervals.

use std::path::Path;

use tierstream_eval::metrics::{Options, Report, metrics};
use tierstream_eval::{Assume, Header, NO_EXPERT, Phase, Token, Trace, read};

fn report(trace: &Trace) -> Report {
    metrics(trace, &Options { resamples: 100, ..Options::default() }).unwrap()
}

/// Prompts of `len` tokens, whose experts are drawn around a place that moves a little with each token.
fn drifting(prompts: u32, len: u32, experts: u32, speed: u32) -> Trace {
    let mut trace = Trace::new(Header::uniform(2, experts, 4)).unwrap();
    let domains = ["code", "prose"].map(|name| trace.domains_mut().number(name).unwrap());
    let mut state = 7u64;
    for prompt in 0..prompts {
        for position in 0..len {
            let mut row = Vec::new();
            for layer in 0..2 {
                let begin = row.len();
                while row.len() < begin + 4 {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    let near =
                        (state >> 33) as u32 % 8 + (position * speed / 4) + 13 * layer + prompt;
                    let expert = (near % experts) as u16;
                    if !row[begin..].contains(&expert) {
                        row.push(expert);
                    }
                }
            }
            let token = Token {
                prompt,
                position,
                batch: trace.len() as u32,
                id: None,
                phase: Phase::Decode,
                domain: domains[prompt as usize % 2],
            };
            trace.push(token, &row, &[]).unwrap();
        }
    }
    trace
}

#[test]
fn no_tokens_and_one() {
    let empty = Trace::new(Header::uniform(3, 8, 2)).unwrap();
    let none = report(&empty);
    assert_eq!((none.prompts, none.max_resident_per_layer), (0, 0));
    assert_eq!((none.locality.reuse_next, none.entropy, none.working_set), (None, None, None));
    assert!(none.intervals.is_none() && none.per_prompt.is_empty() && none.per_layer.len() == 3);
    assert_eq!(none.faulted_experts_per_token.mean, None);
    assert!(none.uniform_unique["16"] > 7.0);

    let mut one = empty;
    let token =
        Token { prompt: 0, position: 0, batch: 0, id: None, phase: Phase::Decode, domain: 0 };
    one.push(token, &[0, 1, 2, 3, 4, NO_EXPERT], &[]).unwrap();
    let one = report(&one);
    assert_eq!((one.tokens.decode, one.locality.reuse_next), (1, None));
    assert_eq!(one.locality.reuse_distance.median, None);
    assert_eq!(one.locality.unique["16"], None);
    assert_eq!(one.working_set, Some(5.0 / 3.0));
    assert_eq!(one.faulted_experts_per_token.mean, Some(5.0));
    assert_eq!(one.faulted_experts_per_token.steady, None);
    serde_json::to_string(&one).unwrap();
}

#[test]
fn one_layer_that_uses_all_its_experts() {
    let mut trace = Trace::new(Header::uniform(1, 4, 4)).unwrap();
    for position in 0..20 {
        let token = Token {
            prompt: 0,
            position,
            batch: position,
            id: None,
            phase: Phase::Decode,
            domain: 0,
        };
        trace.push(token, &[3, 1, 0, 2], &[]).unwrap();
    }
    let report = report(&trace);
    assert_eq!(report.locality.reuse_next, Some(1.0));
    assert_eq!(report.locality.srp["16"].unwrap().srp, 1.0);
    assert_eq!((report.locality.unique["16"], report.uniform_unique["16"]), (Some(4.0), 4.0));
    assert_eq!((report.entropy, report.gini), (Some(1.0), Some(0.0)));
    assert_eq!(report.sch["4"]["1"].fill, 1.0);
    assert_eq!(report.predict.next_layer.recall, None);
    assert_eq!(report.faulted_experts_per_token.steady, Some(0.0));
}

#[test]
fn controls_have_no_locality_but_their_own() {
    let trace = drifting(4, 300, 256, 1);
    let report = report(&trace);
    let controls = report.controls.unwrap();
    let lru = |of: &tierstream_eval::metrics::Headline| of.lru["2"].unwrap();
    assert!(report.locality.reuse_next.unwrap() > 0.3);
    let shuffled = controls.shuffled.locality.reuse_next.unwrap();
    assert!(shuffled < 0.12 && lru(&controls.shuffled) < 0.2, "{shuffled}");
    // 4 of 256.
    let uniform = controls.uniform.locality.reuse_next.unwrap();
    assert!((uniform - 4.0 / 256.0).abs() < 0.01, "{uniform}");
    let unique = controls.uniform.locality.unique["64"].unwrap();
    assert!((unique - report.uniform_unique["64"]).abs() < 2.0, "{unique}");
    assert!(controls.static_hot["4"].unwrap() < 0.5);
    assert_eq!(controls.static_hot, report.static_hot);
}

#[test]
fn domains_and_prompts_have_their_own_numbers() {
    let trace = drifting(6, 100, 64, 1);
    let report = report(&trace);
    assert_eq!((report.prompts, report.per_prompt.len(), report.per_layer.len()), (6, 6, 2));
    let domains: Vec<_> =
        report.per_domain.iter().map(|d| (d.domain.as_str(), d.prompts, d.tokens)).collect();
    assert_eq!(domains, [("code", 3, 300), ("prose", 3, 300)]);
    let mean = report.per_prompt.iter().map(|p| p.locality.reuse_next.unwrap()).sum::<f64>() / 6.0;
    assert!((mean - report.locality.reuse_next.unwrap()).abs() < 1e-12);
    let intervals = report.intervals.unwrap();
    let [low, high] = intervals.locality.reuse_next.unwrap();
    assert!(low < mean && mean < high && high - low < 0.1, "{low} {high}");
    assert!(intervals.locality.srp["16"].unwrap()[0] > 0.0);
    assert_eq!(intervals.locality.srp["256"], None);
}

#[test]
fn equal_seeds_give_equal_numbers() {
    let trace = drifting(3, 80, 64, 2);
    let of = |seed| metrics(&trace, &Options { seed, ..Options::default() }).unwrap();
    assert_eq!(of(1), of(1));
    assert_ne!(of(1).controls, of(2).controls);
}

#[test]
fn prompts_can_be_asked_for() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/qwen.parquet");
    let trace = read(&path, Assume::default()).unwrap();
    let prefill =
        metrics(&trace, &Options { phase: Phase::Prefill, ..Options::default() }).unwrap();
    assert_eq!((prefill.phase, prefill.tokens.prefill), ("prefill", 28));
    assert!(prefill.locality.reuse_next.unwrap() > 0.0);
}

#[test]
fn a_thousand_experts() {
    let mut trace = Trace::new(Header::uniform(2, 1000, 8)).unwrap();
    for position in 0..100u32 {
        let row: Vec<u16> = (0..16).map(|n| ((position * 37 + n * 101) % 1000) as u16).collect();
        let token = Token {
            prompt: 0,
            position,
            batch: position,
            id: None,
            phase: Phase::Decode,
            domain: 0,
        };
        trace.push(token, &row, &[]).unwrap();
    }
    let report = report(&trace);
    assert_eq!(report.experts, 1000);
    assert!(report.locality.unique["64"].unwrap() <= 512.0);
    assert!(report.gini.unwrap() > 0.0 && report.entropy.unwrap() < 1.0);
}

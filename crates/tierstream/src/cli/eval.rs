//! `tierstream eval`: what traces say of a model's locality.

use std::path::Path;
use std::process::ExitCode;

use serde::Serialize;
use tierstream::Policy;
use tierstream_eval::metrics::{
    Difference, Options, Report, compare as differences, metrics as all,
};
use tierstream_eval::sim::{Counting, Curve, Eviction, Outcome, Point, Setup, Size, Start, Tier};
use tierstream_eval::{Assume, Phase, Trace, read, sim};

use super::args::{
    Cli, CountingArg, EvalCompare, EvalMetrics, EvalSimulate, EvalWhat, PhaseArg, StartArg,
};
use super::output::{self, Failure};

mod report;

pub(crate) use report::report;

fn open(path: &Path, what: &EvalWhat) -> anyhow::Result<Trace> {
    let trace = read(path, Assume { experts: what.experts })?;
    if trace.count(phase(what)) == 0 {
        let (name, hint) = match what.phase {
            PhaseArg::Decode => ("decoded", "--phase prefill takes those of prompts"),
            PhaseArg::Prefill => ("prompt", "--phase decode takes those that were decoded"),
        };
        let message = format!("{}: there are no {name} tokens in it", path.display());
        return Err(Failure::error(message, hint));
    }
    Ok(trace)
}

fn phase(what: &EvalWhat) -> Phase {
    match what.phase {
        PhaseArg::Decode => Phase::Decode,
        PhaseArg::Prefill => Phase::Prefill,
    }
}

pub(crate) fn metrics(cli: &Cli, args: &EvalMetrics) -> anyhow::Result<ExitCode> {
    let trace = open(&args.trace, &args.what)?;
    let options = Options {
        phase: phase(&args.what),
        seed: args.what.seed,
        resamples: args.resamples as usize,
        controls: !args.no_controls,
        curves: !args.no_curves,
    };
    let report = all(&trace, &options)?;
    if cli.json {
        output::json(&report)?;
    } else {
        output::print(&text(&report))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn percent(share: Option<f64>) -> String {
    share.map_or("-".to_owned(), |share| format!("{:.1} %", 100.0 * share))
}

fn text(report: &Report) -> String {
    let of = |window: &str| {
        let srp = report.locality.srp.get(window).copied().flatten();
        srp.map_or("-".to_owned(), |srp| format!("{:.1} % ({:.2})", 100.0 * srp.srp, srp.rho))
    };
    let unique = |window: &str| {
        let found = report.locality.unique.get(window).copied().flatten();
        let uniform = report.uniform_unique.get(window).copied().unwrap_or_default();
        found.map_or("-".to_owned(), |found| format!("{found:.1} ({uniform:.1})"))
    };
    let distance = |tokens: Option<u64>| tokens.map_or("-".to_owned(), |n| n.to_string());
    let interval = report.intervals.as_ref().and_then(|i| i.locality.reuse_next);
    let interval =
        interval.map(|[low, high]| format!(" [{:.1}, {:.1}]", 100.0 * low, 100.0 * high));
    let reuse = report.locality.reuse_distance;
    let mut lines = vec![
        format!("model: {}", if report.model.is_empty() { "unknown" } else { &report.model }),
        format!(
            "{} MoE layers, {} of {} experts; {} tokens of prompts, {} decoded, of {} prompts",
            report.layers,
            report.used,
            report.experts,
            report.tokens.prefill,
            report.tokens.decode,
            report.prompts
        ),
        String::new(),
        format!(
            "used by the token before: {}{}",
            percent(report.locality.reuse_next),
            interval.unwrap_or_default()
        ),
        format!(
            "used again after tokens: {} (9 of 10: {})",
            distance(reuse.median),
            distance(reuse.p90)
        ),
        format!("SRP of 4, 16, 64 tokens (rho): {}, {}, {}", of("4"), of("16"), of("64")),
        format!(
            "distinct in 16, 64, 256 tokens (uniform): {}, {}, {}",
            unique("16"),
            unique("64"),
            unique("256")
        ),
    ];
    if let Some(controls) = &report.controls {
        let lru = |headline: &tierstream_eval::metrics::Headline| {
            percent(headline.lru.get("2").copied().flatten())
        };
        lines.push(format!(
            "controls, used by the token before and LRU at rho 2: shuffled {} and {}, uniform {} and {}",
            percent(controls.shuffled.locality.reuse_next),
            lru(&controls.shuffled),
            percent(controls.uniform.locality.reuse_next),
            lru(&controls.uniform)
        ));
        let hot = |rho: &str| percent(controls.static_hot.get(rho).copied().flatten());
        lines.push(format!(
            "a fixed hot set of rho 1, 2, 4: {}, {}, {}",
            hot("1"),
            hot("2"),
            hot("4")
        ));
    }
    let mut text = lines.join("\n") + "\n";
    if !report.curves.is_empty() {
        text.push_str(&format!("\n{}", table(&report.curves)));
    }
    text
}

/// Hit rates of curves, a line for each, and one for the sizes above them.
fn table(curves: &[Curve]) -> String {
    let longest = curves.iter().max_by_key(|curve| curve.points.len());
    let sizes: Vec<&Point> = longest.iter().flat_map(|curve| &curve.points).collect();
    let cells = |of: &dyn Fn(&Point) -> String| -> String {
        sizes.iter().map(|size| format!("{:>6}", of(size))).collect::<Vec<_>>().join(" ")
    };
    let mut lines = vec![
        ["POLICY", "POOL", "HITS, %"].map(str::to_owned),
        ["", "rho", &cells(&|size| format!("{:.2}", size.rho))].map(str::to_owned),
        ["", "slots/layer", &cells(&|size| format!("{:.0}", size.slots_per_layer))]
            .map(str::to_owned),
    ];
    if sizes.iter().all(|size| size.bytes > 0) {
        let gib = |size: &Point| format!("{:.2}", size.bytes as f64 / f64::from(1 << 30));
        lines.push(["", "GiB", &cells(&gib)].map(str::to_owned));
    }
    for curve in curves {
        let rate = |size: &Point| {
            let point = curve.points.iter().find(|point| point.rho == size.rho);
            let rate = point.and_then(Point::hit_rate);
            rate.map_or("-".to_owned(), |rate| format!("{:.1}", 100.0 * rate))
        };
        let setup = &curve.setup;
        lines.push([setup.eviction.to_string(), setup.pool.to_string(), cells(&rate)]);
    }
    output::table(lines)
}

/// The answer of `eval simulate`; `docs/json.md` tells what the fields are.
#[derive(Debug, Serialize)]
struct Simulated {
    model: String,
    layers: usize,
    tokens: u64,
    curves: Vec<Curve>,
    /// With `--ahead` or `--below`, for each curve and point.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    reads: Vec<Reads>,
}

#[derive(Debug, Serialize)]
struct Reads {
    policy: String,
    rho: f64,
    ahead_reads: u64,
    ahead_used: u64,
    below_requests: u64,
    below_hits: u64,
    bytes_per_token: f64,
}

pub(crate) fn simulate(cli: &Cli, args: &EvalSimulate) -> anyhow::Result<ExitCode> {
    let trace = open(&args.trace, &args.what)?;
    let sizes: Vec<Size> = if !args.bytes.is_empty() {
        args.bytes.iter().map(|bytes| Size::Bytes(bytes.0)).collect()
    } else if !args.slots.is_empty() {
        args.slots.iter().map(|&slots| Size::Slots(slots)).collect()
    } else {
        args.rho.iter().map(|&rho| Size::Rho(rho)).collect()
    };
    let (mut curves, mut reads) = (Vec::new(), Vec::new());
    for &eviction in &args.policy {
        let setup = setup(args, eviction);
        if setup.ahead.is_some() || setup.below.is_some() {
            let (curve, more) = replayed(&trace, &setup, &sizes)?;
            curves.push(curve);
            reads.extend(more);
        } else {
            curves.push(sim::curve(&trace, &setup, &sizes)?);
        }
    }
    let answer = Simulated {
        model: trace.header().model.name.clone(),
        layers: trace.header().layers.len(),
        tokens: curves.first().map_or(0, |curve| curve.tokens),
        curves,
        reads,
    };
    if cli.json {
        output::json(&answer)?;
    } else {
        let mut text = table(&answer.curves);
        for read in &answer.reads {
            text.push_str(&format!(
                "{} at rho {:.2}: {} read ahead, {} of them used; below {} of {}\n",
                read.policy,
                read.rho,
                read.ahead_reads,
                read.ahead_used,
                read.below_hits,
                read.below_requests
            ));
        }
        output::print(&text)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn setup(args: &EvalSimulate, eviction: Eviction) -> Setup {
    Setup {
        pool: args.pool,
        eviction,
        start: match args.start {
            StartArg::Cold => Start::Cold,
            StartArg::Warm => Start::Warm,
        },
        counting: match args.counting {
            CountingArg::Strict => Counting::Strict,
            CountingArg::Fill => Counting::Fill,
        },
        phase: phase(&args.what),
        ahead: args.ahead.map(|predictor| (predictor, args.ahead_reads)),
        below: args.below.map(|slots_per_layer| Tier { slots_per_layer, policy: Policy::Lru }),
        seed: args.what.seed,
    }
}

/// A curve of pools with something ahead or below, and what that did.
fn replayed(trace: &Trace, setup: &Setup, sizes: &[Size]) -> anyhow::Result<(Curve, Vec<Reads>)> {
    let mut curve = Curve { setup: *setup, tokens: 0, points: Vec::new() };
    let mut reads = Vec::new();
    for &size in sizes {
        let layers = &trace.header().layers;
        let slots: Vec<u32> = match size {
            Size::Rho(rho) => {
                layers.iter().map(|layer| (rho * f64::from(layer.used)).round() as u32).collect()
            }
            Size::Slots(slots) => vec![slots; layers.len()],
            Size::Bytes(_) => {
                let message = "what is read ahead, or is below, is simulated with slots";
                return Err(Failure::error(message, "give --rho or --slots"));
            }
        };
        let outcome = sim::replay(trace, setup, &slots)?;
        let total: u64 = slots.iter().map(|&slots| u64::from(slots)).sum();
        let used: u64 = layers.iter().map(|layer| u64::from(layer.used)).sum();
        let fills = if setup.counting == Counting::Fill { outcome.fills } else { 0 };
        let point = Point {
            rho: total as f64 / used as f64,
            slots_per_layer: total as f64 / layers.len() as f64,
            bytes: slots.iter().zip(layers).map(|(&s, l)| u64::from(s) * l.record_bytes).sum(),
            requests: outcome.requests,
            hits: outcome.hits_total() + fills,
        };
        curve.tokens = outcome.tokens;
        reads.push(of(setup, &point, &outcome));
        curve.points.push(point);
    }
    Ok((curve, reads))
}

fn of(setup: &Setup, point: &Point, outcome: &Outcome) -> Reads {
    Reads {
        policy: setup.eviction.to_string(),
        rho: point.rho,
        ahead_reads: outcome.ahead.reads,
        ahead_used: outcome.ahead.used,
        below_requests: outcome.below.requests,
        below_hits: outcome.below.hits,
        bytes_per_token: outcome.bytes as f64 / outcome.tokens.max(1) as f64,
    }
}

/// The answer of `eval compare`.
#[derive(Debug, Serialize)]
struct Compared {
    a: Side,
    b: Side,
    same_shape: bool,
    differences: Vec<Difference>,
}

#[derive(Debug, Serialize)]
struct Side {
    trace: String,
    model: String,
    layers: usize,
    experts: u32,
    used: u32,
    tokens: tierstream_eval::metrics::Tokens,
    prompts: usize,
}

pub(crate) fn compare(cli: &Cli, args: &EvalCompare) -> anyhow::Result<ExitCode> {
    let options = Options {
        phase: phase(&args.what),
        seed: args.what.seed,
        controls: false,
        ..Options::default()
    };
    let (a, b) = (open(&args.a, &args.what)?, open(&args.b, &args.what)?);
    let same_shape = a.header().same_shape(b.header());
    let (of_a, of_b) = (all(&a, &options)?, all(&b, &options)?);
    let side = |path: &Path, report: &Report| Side {
        trace: path.display().to_string(),
        model: report.model.clone(),
        layers: report.layers,
        experts: report.experts,
        used: report.used,
        tokens: report.tokens,
        prompts: report.prompts,
    };
    let differences = differences(&of_a, &of_b);
    let answer =
        Compared { a: side(&args.a, &of_a), b: side(&args.b, &of_b), same_shape, differences };
    if cli.json {
        output::json(&answer)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut lines = vec![["", "A", "B", "B - A"].map(str::to_owned)];
    let number = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.3}"));
    for line in &answer.differences {
        let cells = [number(line.a), number(line.b), number(line.difference)];
        let [a, b, difference] = cells;
        lines.push([line.metric.clone(), a, b, difference]);
    }
    let of = |side: &Side| {
        format!(
            "{}: {} MoE layers, {} of {} experts",
            side.trace, side.layers, side.used, side.experts
        )
    };
    output::print(&format!(
        "A: {}\nB: {}\n\n{}",
        of(&answer.a),
        of(&answer.b),
        output::table(lines)
    ))?;
    Ok(ExitCode::SUCCESS)
}

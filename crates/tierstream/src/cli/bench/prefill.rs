//! `tierstream bench prefill`: how fast prompts are computed, and how near what has to be brought for
//! them comes to the rate of the bus.

use std::fmt::Write as _;
use std::process::ExitCode;

use serde::Serialize;
use tierstream::bench::{self, Prefill, median_min_max};

use super::{Notes, cache, end_with_parent, model_command, name, peer_options, result_of};
use crate::cli::args::{BenchPrefill, BenchPrefillTurn, Cli, Peer};
use crate::cli::{open, output};

/// The answer of `bench prefill`.
#[derive(Debug, Serialize)]
struct Report {
    model: String,
    repeats: u32,
    threads: u32,
    cold: bool,
    rows: Vec<Row>,
}

/// A length of prompts, by us or a peer.
#[derive(Debug, Serialize)]
struct Row {
    prompt_tokens: u32,
    /// Null: tierstream.
    peer: Option<&'static str>,
    batch: u32,
    experts_percent: Option<f64>,
    tok_s_median: f64,
    tok_s_min: f64,
    tok_s_max: f64,
    tok_s: Vec<f64>,
    /// Our tokens per second over the peer's, median of neighbouring turns.
    ratio_median: Option<f64>,
    bytes_brought: u64,
    bytes_read: u64,
    brought_gbps: Option<f64>,
    bus_gbps: Option<f64>,
    /// `brought_gbps` over `bus_gbps`, median of the turns.
    bus_share: Option<f64>,
    peak_rss_bytes: u64,
}

pub(crate) fn prefill(cli: &Cli, args: &BenchPrefill) -> anyhow::Result<ExitCode> {
    if !args.turns.against.is_empty() {
        let path = open::path(&args.model.load)?;
        let file = tierstream::pack::open(&path).map_err(tierstream::Error::from)?;
        open::check_peers(&file, &args.turns.against)?;
    }
    let who: Vec<Option<Peer>> =
        std::iter::once(None).chain(args.turns.against.iter().copied().map(Some)).collect();
    let mut turns = vec![Vec::new(); args.tokens.len() * who.len()];
    let mut notes = Notes::default();
    for repeat in 1..=args.turns.repeats {
        for (at, &tokens) in args.tokens.iter().enumerate() {
            for (by, &peer) in who.iter().enumerate() {
                let by_whom = peer.map_or("tierstream", name);
                output::stderr(&format!(
                    "turn {repeat} of {}: {tokens} tokens by {by_whom}",
                    args.turns.repeats
                ));
                turns[at * who.len() + by].push(spawn(args, tokens, peer, &mut notes)?);
            }
        }
    }
    let rows = turns.iter().enumerate().map(|(index, these)| {
        let (at, by) = (index / who.len(), index % who.len());
        row(args.tokens[at], who[by].map(name), these, &turns[at * who.len()])
    });
    let report = Report {
        model: args.model.load.model.display().to_string(),
        repeats: args.turns.repeats,
        threads: args.model.load.engine.machine.threads.unwrap_or_else(tierstream::default_threads),
        cold: args.turns.cold,
        rows: rows.collect(),
    };
    if cli.json {
        output::json(&report)?;
    } else {
        output::print(&text(&report)?)?;
        output::stderr(
            "each prompt after another one of its length; GB: records that came into the pool for it",
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// One measurement; the result is a line of JSON.
pub(crate) fn turn(args: &BenchPrefillTurn) -> anyhow::Result<ExitCode> {
    end_with_parent()?;
    let mut options = open::options(&args.model.load.engine, args.model.experts)?;
    options.ctx.get_or_insert(args.tokens.next_multiple_of(256));
    peer_options(args.peer, &mut options);
    let path = open::path(&args.model.load)?;
    options.weight_sums = open::weight_sums(&args.model.load.engine, &path)?;
    let mut engine = open::engine(&args.model.load.engine, &path, options)?;
    let turn = bench::prefill(&mut engine, args.tokens as usize, args.model.load.engine.seed())?;
    output::print(&format!("{}\n", serde_json::to_string(&turn)?))?;
    Ok(ExitCode::SUCCESS)
}

fn spawn(
    args: &BenchPrefill,
    tokens: u32,
    peer: Option<Peer>,
    notes: &mut Notes,
) -> anyhow::Result<Prefill> {
    if args.turns.cold {
        cache::drop_all()?;
    }
    let size = args.model.experts.filter(|_| peer.is_none());
    let mut command = model_command("prefill-turn", &args.model.load, size, peer)?;
    command.args(["--tokens", &tokens.to_string()]);
    result_of(command, "", notes)
}

fn row(prompt_tokens: u32, peer: Option<&'static str>, turns: &[Prefill], ours: &[Prefill]) -> Row {
    let (tok_s_median, tok_s_min, tok_s_max) = median_min_max(turns.iter().map(|t| t.tok_s));
    let median = |of: &dyn Fn(&Prefill) -> Option<f64>| {
        let all: Vec<f64> = turns.iter().filter_map(of).collect();
        (!all.is_empty()).then(|| median_min_max(all).0)
    };
    let brought = |t: &Prefill| {
        let seconds = f64::from(prompt_tokens) / t.tok_s;
        (t.bytes_brought > 0).then(|| t.bytes_brought as f64 / seconds)
    };
    let share = |t: &Prefill| Some(brought(t)? / t.bus_bytes_per_s?);
    let ratios = ours.iter().zip(turns).map(|(ours, theirs)| ours.tok_s / theirs.tok_s);
    Row {
        prompt_tokens,
        peer,
        batch: turns[0].batch,
        experts_percent: turns[0].pool_share.map(|share| share * 100.0),
        tok_s_median,
        tok_s_min,
        tok_s_max,
        tok_s: turns.iter().map(|t| t.tok_s).collect(),
        ratio_median: peer.map(|_| median_min_max(ratios).0),
        bytes_brought: median_bytes(turns, |t| t.bytes_brought),
        bytes_read: median_bytes(turns, |t| t.bytes_read),
        brought_gbps: median(&brought).map(|rate| rate / 1e9),
        bus_gbps: median(&|t| t.bus_bytes_per_s).map(|rate| rate / 1e9),
        bus_share: median(&share),
        peak_rss_bytes: turns.iter().map(|t| t.peak_rss_bytes).max().unwrap_or(0),
    }
}

fn median_bytes(turns: &[Prefill], of: impl Fn(&Prefill) -> u64) -> u64 {
    median_min_max(turns.iter().map(|t| of(t) as f64)).0 as u64
}

fn text(report: &Report) -> Result<String, std::fmt::Error> {
    let mut out = String::new();
    writeln!(
        out,
        "{:>7} {:>14} {:>6} {:>9} {:>19} {:>9} {:>9} {:>9} {:>6} {:>6}",
        "prompt", "", "batch", "tok/s", "(min-max)", "GB", "GB/s", "bus GB/s", "share", "ours x"
    )?;
    let or_dash = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |v| format!("{v:.2}"));
    for r in &report.rows {
        writeln!(
            out,
            "{:>7} {:>14} {:>6} {:>9.1} {:>19} {:>9.2} {:>9} {:>9} {:>6} {:>6}",
            r.prompt_tokens,
            r.peer.unwrap_or("tierstream"),
            r.batch,
            r.tok_s_median,
            format!("({:.1}-{:.1})", r.tok_s_min, r.tok_s_max),
            r.bytes_brought as f64 / 1e9,
            or_dash(r.brought_gbps),
            or_dash(r.bus_gbps),
            or_dash(r.bus_share),
            or_dash(r.ratio_median),
        )?;
    }
    Ok(out)
}

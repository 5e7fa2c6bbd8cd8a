//! `tierstream bench`: every measurement runs in a process of its own, in turns (A, B, A, B, ...),
//! so that neither memory nor a warm cache of one helps or hurts the other.

use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, bail};
use clap::ValueEnum;
use serde::Serialize;
use tierstream::bench::{self, ReadPath, Turn, median_min_max};
use tierstream::size::PoolShare;
use tierstream::{Engine, Weights, demo};

use super::args::{BenchDecode, BenchTurn, Cli, Peer};
use super::{open, output};

/// The answer of `bench decode`.
#[derive(Debug, Serialize)]
struct Report {
    model: String,
    n: u32,
    warmup: u32,
    repeats: u32,
    threads: u32,
    cold: bool,
    rows: Vec<Row>,
    against: Vec<Against>,
    drive: Drive,
    io: Option<ReadPath>,
}

#[derive(Debug, Serialize)]
struct Row {
    experts: String,
    experts_percent: f64,
    tok_s_median: f64,
    tok_s_min: f64,
    tok_s_max: f64,
    hit_rate: f64,
    faults_per_token: f64,
    bytes_per_token: f64,
    stall_share: f64,
    /// Bytes per second of the same reads without computing, median of the turns.
    drive_gbps: Option<f64>,
    /// Time per token over (time per token with all experts resident + bytes / drive rate).
    over_limit: Option<f64>,
    /// Against each peer, median of the ratios of neighbouring turns.
    ratios: Vec<Ratio>,
    peak_rss_bytes: u64,
    tok_s: Vec<f64>,
}

#[derive(Debug, Serialize)]
struct Ratio {
    to: &'static str,
    median: f64,
    all: Vec<f64>,
}

#[derive(Debug, Serialize)]
struct Against {
    name: &'static str,
    tok_s_median: f64,
    tok_s_min: f64,
    tok_s_max: f64,
    /// The first row's tokens per second over this one's, median of neighbouring turns.
    ratio_median: f64,
    peak_rss_bytes: u64,
    tok_s: Vec<f64>,
}

#[derive(Debug, Serialize)]
struct Drive {
    /// GB/s at the sizes and depths that faults had.
    random_gbps: Option<f64>,
    record_bytes: u64,
}

pub(crate) fn decode(cli: &Cli, args: &BenchDecode) -> anyhow::Result<ExitCode> {
    let sizes = &args.experts;
    let path = open::path(&args.model)?;
    let file = tierstream::gguf::Model::open(&path).map_err(tierstream::Error::from)?;
    let experts = tierstream::gguf::Experts::group(&file).map_err(tierstream::Error::from)?;
    let dir = tempdir()?;
    let token_file = dir.path.join("tokens.json");
    write_tokens(args, &token_file)?;

    let mut ours: Vec<Vec<Turn>> = sizes.iter().map(|_| Vec::new()).collect();
    let mut peers: Vec<Vec<Turn>> = args.against.iter().map(|_| Vec::new()).collect();
    for repeat in 0..args.repeats {
        for (turns, &size) in ours.iter_mut().zip(sizes) {
            output::stderr(&format!("turn {} of {}: experts {size}", repeat + 1, args.repeats));
            turns.push(spawn_turn(args, &token_file, Some(size), None, repeat == 0)?);
        }
        for (turns, &peer) in peers.iter_mut().zip(&args.against) {
            output::stderr(&format!("turn {} of {}: {}", repeat + 1, args.repeats, name(peer)));
            turns.push(spawn_turn(args, &token_file, None, Some(peer), repeat == 0)?);
        }
    }
    let report = report(args, &experts, sizes, &ours, &peers);
    if cli.json {
        output::json(&report)?;
    } else {
        output::print(&text(&report)?)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// One measurement; the result is a line of JSON.
pub(crate) fn turn(args: &BenchTurn) -> anyhow::Result<ExitCode> {
    let text = fs::read_to_string(&args.token_file)?;
    let tokens: Vec<tierstream::Token> = serde_json::from_str(&text)?;
    let mut options = open::options(&args.model.load, args.model.experts);
    options.ctx.get_or_insert(u32::try_from(tokens.len().next_multiple_of(256))?);
    match args.peer {
        Some(Peer::Stock) => options.weights = Weights::Stock { mmap: true, repack: false },
        Some(Peer::StockRepack) => options.weights = Weights::Stock { mmap: true, repack: true },
        None => {}
    }
    let mut engine = open::engine(&args.model.load, options)?;
    let turn = bench::turn(&mut engine, &tokens, args.warmup as usize)?;
    output::print(&format!("{}\n", serde_json::to_string(&turn)?))?;
    Ok(ExitCode::SUCCESS)
}

fn name(peer: Peer) -> &'static str {
    match peer {
        Peer::Stock => "stock",
        Peer::StockRepack => "stock-repack",
    }
}

/// The tokens that every turn decodes.
fn write_tokens(args: &BenchDecode, to: &Path) -> anyhow::Result<()> {
    let n = (args.n + args.warmup) as usize;
    let mut options = open::options(&args.model, args.experts.first().copied());
    options.ctx.get_or_insert(u32::try_from(n.next_multiple_of(256))?);
    options.preload = false;
    let mut engine: Engine = open::engine(&args.model, options)?;
    let tokens = bench::tokens(&mut engine, demo::PROMPT, n, args.model.seed)?;
    fs::write(to, serde_json::to_string(&tokens)?)
        .with_context(|| format!("cannot write {}", to.display()))
}

fn spawn_turn(
    args: &BenchDecode,
    tokens: &Path,
    size: Option<PoolShare>,
    peer: Option<Peer>,
    first: bool,
) -> anyhow::Result<Turn> {
    if args.cold {
        drop_caches()?;
    }
    let m = &args.model;
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["bench", "turn"]).arg(&m.model).arg("--token-file").arg(tokens);
    command.args(["--warmup", &args.warmup.to_string()]);
    command.args(["--policy", &m.policy.to_string(), "--io", &m.io.to_string()]);
    command.args(["--batch", &m.batch.to_string(), "--seed", &m.seed.to_string()]);
    let mut option = |flag: &str, value: Option<String>| {
        if let Some(value) = value {
            command.args([flag, &value]);
        }
    };
    let exact = |size: PoolShare| match size {
        PoolShare::Bytes(bytes) => bytes.0.to_string(),
        PoolShare::Share(_) => size.to_string(),
    };
    option("--ram", m.ram.filter(|_| peer.is_none()).map(|b| b.0.to_string()));
    option("--threads", m.threads.map(|t| t.to_string()));
    option("--ctx", m.ctx.map(|c| c.to_string()));
    option("--experts", size.map(exact));
    option("--peer", peer.and_then(|p| p.to_possible_value()).map(|v| v.get_name().to_owned()));
    let out = command.stderr(Stdio::piped()).output()?;
    if !out.status.success() {
        bail!("a turn failed: {}", String::from_utf8_lossy(&out.stderr).trim());
    }
    // The other turns of the same would say the same.
    if first {
        let notes = String::from_utf8_lossy(&out.stderr);
        notes.lines().for_each(|line| output::stderr(&output::printable(line)));
    }
    serde_json::from_slice(&out.stdout).context("a turn printed no result")
}

fn drop_caches() -> anyhow::Result<()> {
    rustix::fs::sync();
    fs::write("/proc/sys/vm/drop_caches", "3").context("--cold empties the page cache, as root")
}

fn report(
    args: &BenchDecode,
    experts: &tierstream::gguf::Experts,
    sizes: &[PoolShare],
    ours: &[Vec<Turn>],
    peers: &[Vec<Turn>],
) -> Report {
    let median = |turns: &[Turn], f: fn(&Turn) -> f64| median_min_max(turns.iter().map(f)).0;
    let seconds = |turns: &[Turn]| 1.0 / median(turns, |t| t.tok_s);
    let all = experts.expert_bytes().max(1) as f64;
    let compute = ours.iter().find(|t| t[0].faults_per_token == 0.0).map(|t| seconds(t));
    let rows = sizes.iter().zip(ours).map(|(size, turns)| {
        let (tok_s_median, tok_s_min, tok_s_max) = median_min_max(turns.iter().map(|t| t.tok_s));
        let drive = median_min_max(turns.iter().filter_map(|t| t.drive_bytes_per_s)).0;
        let drive = (drive > 0.0).then_some(drive);
        // Per turn, since the drive's speed wanders between them.
        let over = |t: &Turn| {
            let reading = t.drive_bytes_per_s.map_or(0.0, |d| t.bytes_per_token / d);
            compute.map(|c| 1.0 / t.tok_s / (c + reading))
        };
        let over: Vec<f64> = turns.iter().filter_map(over).collect();
        Row {
            experts: size.to_string(),
            experts_percent: match size {
                PoolShare::Share(share) => share * 100.0,
                PoolShare::Bytes(bytes) => bytes.0 as f64 / all * 100.0,
            },
            tok_s_median,
            tok_s_min,
            tok_s_max,
            hit_rate: median(turns, |t| t.hit_rate),
            faults_per_token: median(turns, |t| t.faults_per_token),
            bytes_per_token: median(turns, |t| t.bytes_per_token),
            stall_share: median(turns, |t| t.stall_share),
            drive_gbps: drive.map(|d| d / 1e9),
            over_limit: (!over.is_empty()).then(|| median_min_max(over).0),
            ratios: args
                .against
                .iter()
                .zip(peers)
                .map(|(&peer, theirs)| {
                    let ratios = ratios(turns, theirs);
                    Ratio { to: name(peer), median: median_min_max(ratios.clone()).0, all: ratios }
                })
                .collect(),
            peak_rss_bytes: peak(turns),
            tok_s: turns.iter().map(|t| t.tok_s).collect(),
        }
    });
    let rows: Vec<Row> = rows.collect();
    let against = args.against.iter().zip(peers).map(|(&peer, turns)| {
        let (tok_s_median, tok_s_min, tok_s_max) = median_min_max(turns.iter().map(|t| t.tok_s));
        Against {
            name: name(peer),
            tok_s_median,
            tok_s_min,
            tok_s_max,
            ratio_median: median_min_max(ratios(&ours[0], turns)).0,
            peak_rss_bytes: peak(turns),
            tok_s: turns.iter().map(|t| t.tok_s).collect(),
        }
    });
    let rates = ours.iter().flatten().filter_map(|t| t.drive_bytes_per_s);
    let rate = median_min_max(rates).0;
    Report {
        model: args.model.model.display().to_string(),
        n: args.n,
        warmup: args.warmup,
        repeats: args.repeats,
        threads: args.model.threads.unwrap_or_else(tierstream::default_threads),
        cold: args.cold,
        against: against.collect(),
        drive: Drive {
            random_gbps: (rate > 0.0).then_some(rate / 1e9),
            record_bytes: experts.record_bytes(0).unwrap_or(0),
        },
        io: read_path(ours),
        rows,
    }
}

fn ratios(ours: &[Turn], theirs: &[Turn]) -> Vec<f64> {
    ours.iter().zip(theirs).map(|(a, b)| a.tok_s / b.tok_s).collect()
}

/// The path of the reads; where turns differ, one that says why it is not the fastest.
fn read_path(turns: &[Vec<Turn>]) -> Option<ReadPath> {
    let paths = || turns.iter().flatten().filter_map(|t| t.io.as_ref());
    paths().find(|p| p.reason.is_some()).or_else(|| paths().next()).cloned()
}

fn peak(turns: &[Turn]) -> u64 {
    turns.iter().map(|t| t.peak_rss_bytes).max().unwrap_or(0)
}

fn text(report: &Report) -> Result<String, std::fmt::Error> {
    let mut out = String::new();
    writeln!(
        out,
        "{:>8} {:>9} {:>19} {:>7} {:>9} {:>11} {:>7} {:>10}",
        "experts", "tok/s", "(min-max)", "hits", "faults/t", "MB/token", "stall", "x limit"
    )?;
    for r in &report.rows {
        let range = format!("({:.2}-{:.2})", r.tok_s_min, r.tok_s_max);
        let limit = r.over_limit.map_or_else(|| "-".to_owned(), |x| format!("{x:.2}"));
        writeln!(
            out,
            "{:>8} {:>9.2} {:>19} {:>6.1}% {:>9.1} {:>11.1} {:>6.1}% {:>10}",
            r.experts,
            r.tok_s_median,
            range,
            r.hit_rate * 100.0,
            r.faults_per_token,
            r.bytes_per_token / 1e6,
            r.stall_share * 100.0,
            limit
        )?;
        for ratio in &r.ratios {
            writeln!(out, "{:>8} {:.3} x {}", "", ratio.median, ratio.to)?;
        }
    }
    for a in &report.against {
        writeln!(
            out,
            "{:>8} {:>9.2} {:>19}  {}",
            "",
            a.tok_s_median,
            format!("({:.2}-{:.2})", a.tok_s_min, a.tok_s_max),
            a.name
        )?;
    }
    if let Some(rate) = report.drive.random_gbps {
        writeln!(out, "drive: {rate:.2} GB/s at records of {} bytes", report.drive.record_bytes)?;
    }
    if let Some(path) = &report.io {
        let way = if path.direct { "direct" } else { "through the page cache" };
        let reason = path.reason.as_ref().map_or_else(String::new, |r| format!(" ({r})"));
        writeln!(out, "reads: {}, {way}{reason}", path.engine)?;
    }
    Ok(out)
}

struct TempDir {
    path: std::path::PathBuf,
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

fn tempdir() -> anyhow::Result<TempDir> {
    let path = std::env::temp_dir().join(format!("tierstream-bench-{}", std::process::id()));
    fs::create_dir_all(&path)?;
    Ok(TempDir { path })
}

//! `tierstream bench decode`: tokens per second with pools of several sizes.

use std::fmt::Write as _;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::{fs, io};

use serde::Serialize;
use tierstream::bench::{self, ReadPath, Turn, median_min_max};
use tierstream::size::{Bytes, PoolShare};
use tierstream::{Miss, Prefetch, Token, demo, memory};

use super::{
    Notes, cache, end_with_parent, model_command, name, peer_options, read_path, result_of,
};
use crate::cli::args::{BenchDecode, BenchTurn, Cli, Decode, Peer};
use crate::cli::output::Failure;
use crate::cli::report::read_way;
use crate::cli::{open, output, routing};

/// The answer of `bench decode`.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    model: String,
    n: u32,
    warmup: u32,
    repeats: u32,
    threads: u32,
    cold: bool,
    pub(super) rows: Vec<Row>,
    against: Vec<Against>,
    drive: Drive,
    io: Option<ReadPath>,
    /// Whether misses of a GPU may be computed by the processor.
    #[serde(skip)]
    computes: bool,
}

#[derive(Debug, Serialize)]
pub(super) struct Row {
    pub(super) experts: String,
    pub(super) experts_percent: Option<f64>,
    pub(super) tok_s_median: f64,
    tok_s_min: f64,
    tok_s_max: f64,
    hit_rate: Option<f64>,
    faults_per_token: f64,
    computed_per_token: f64,
    bytes_per_token: f64,
    stall_share: f64,
    /// Bytes per second of the same reads without computing, median of the turns.
    drive_gbps: Option<f64>,
    /// Time per token over (time per token with all experts resident + bytes / drive rate).
    over_limit: Option<f64>,
    /// Against each peer, median of the ratios of neighbouring turns.
    pub(super) ratios: Vec<Ratio>,
    pub(super) peak_rss_bytes: u64,
    pub(super) tok_s: Vec<f64>,
}

#[derive(Debug, Serialize)]
pub(super) struct Ratio {
    to: &'static str,
    median: f64,
    all: Vec<f64>,
}

#[derive(Debug, Serialize)]
pub(super) struct Against {
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
pub(super) struct Drive {
    /// GB/s at the sizes and depths that faults had.
    random_gbps: Option<f64>,
    record_bytes: u64,
}

pub(crate) fn decode(cli: &Cli, args: &BenchDecode) -> anyhow::Result<ExitCode> {
    let report = measure(&args.decode, &args.experts)?;
    if cli.json {
        output::json(&report)?;
    } else {
        output::print(&text(&report)?)?;
        output::stderr(&legend(&report));
    }
    Ok(ExitCode::SUCCESS)
}

/// Measures decoding with pools of these sizes, and the peers, by turns.
pub(super) fn measure(args: &Decode, sizes: &[PoolShare]) -> anyhow::Result<Report> {
    if args.routing.is_some()
        && matches!(args.model.engine.prefetch, Prefetch::Auto | Prefetch::Lookahead)
    {
        let message = "recorded routing is no router's, so that none can be asked what comes next";
        return Err(Failure::error(message, "with --routing, --prefetch takes lag or off"));
    }
    let path = open::path(&args.model)?;
    let file = tierstream::pack::open(&path).map_err(tierstream::Error::from)?;
    open::check_peers(&file, &args.turns.against)?;
    let experts = tierstream::gguf::Experts::group(&file).map_err(tierstream::Error::from)?;
    let mut sizes = match args.model.engine.machine.gpu.0 {
        None => sizes_that_fit(sizes, experts.expert_bytes())?,
        Some(_) => sizes.to_vec(),
    };
    let dense = experts.is_empty();
    if dense && sizes.len() > 1 {
        sizes.truncate(1);
        output::note("this model has no experts, so there are no sizes of a pool: one row");
    }
    let tokens = serde_json::to_string(&tokens(args, &path, sizes[0])?)?;
    let mut notes = Notes::default();

    let mut ours: Vec<_> = sizes.into_iter().map(|size| (size, Vec::new())).collect();
    let mut peers: Vec<_> = args.turns.against.iter().map(|&peer| (peer, Vec::new())).collect();
    for repeat in 0..args.turns.repeats {
        for (size, turns) in &mut ours {
            output::stderr(&format!(
                "turn {} of {}: experts {size}",
                repeat + 1,
                args.turns.repeats
            ));
            let size = (!dense).then_some(*size);
            turns.push(spawn_turn(args, &tokens, size, None, &mut notes)?);
        }
        for (peer, turns) in &mut peers {
            output::stderr(&format!(
                "turn {} of {}: {}",
                repeat + 1,
                args.turns.repeats,
                name(*peer)
            ));
            turns.push(spawn_turn(args, &tokens, None, Some(*peer), &mut notes)?);
        }
    }
    Ok(report(args, &experts, &ours, &peers))
}

/// One measurement; the result is a line of JSON.
pub(crate) fn turn(args: &BenchTurn) -> anyhow::Result<ExitCode> {
    end_with_parent()?;
    let tokens: Vec<Token> = serde_json::from_str(&token_text(&args.token_file)?)?;
    let mut options = open::options(&args.model.load.engine, args.model.experts)?;
    options.ctx.get_or_insert(u32::try_from(tokens.len().next_multiple_of(256))?);
    peer_options(args.peer, &mut options);
    let path = open::path(&args.model.load)?;
    options.weight_sums = open::weight_sums(&args.model.load.engine, &path)?;
    let mut engine = open::engine(&args.model.load.engine, &path, options)?;
    if let Some(file) = args.routing.as_ref().filter(|_| args.peer.is_none()) {
        engine.context().replay(Some(routing::read(file)?));
    }
    let turn = bench::turn(&mut engine, &tokens, args.warmup as usize)?;
    output::print(&format!("{}\n", serde_json::to_string(&turn)?))?;
    Ok(ExitCode::SUCCESS)
}

fn token_text(path: &Path) -> io::Result<String> {
    if path == Path::new("-") { io::read_to_string(io::stdin()) } else { fs::read_to_string(path) }
}

/// Of the sizes that are asked for, those that there is memory for; of the others it tells.
fn sizes_that_fit(asked: &[PoolShare], expert_bytes: u64) -> anyhow::Result<Vec<PoolShare>> {
    let available = memory::available_bytes();
    let bytes = |size: PoolShare| match size {
        PoolShare::Bytes(bytes) => bytes.0.min(expert_bytes),
        PoolShare::Share(share) => (expert_bytes as f64 * share.min(1.0)) as u64,
    };
    let (fit, too_large): (Vec<_>, Vec<_>) =
        asked.iter().partition(|&&size| bytes(size) <= available);
    for size in too_large {
        output::note(format!(
            "experts {size} take {}, of {} memory that is available: left out",
            Bytes(bytes(size)),
            Bytes(available)
        ));
    }
    anyhow::ensure!(!fit.is_empty(), "there is no memory for any of these pools");
    Ok(fit)
}

/// The tokens that every turn decodes.
fn tokens(args: &Decode, path: &Path, size: PoolShare) -> anyhow::Result<Vec<Token>> {
    let n = (args.n + args.warmup) as usize;
    let mut options = open::options(&args.model.engine, Some(size))?;
    options.ctx.get_or_insert(u32::try_from(n.next_multiple_of(256))?);
    options.preload = false;
    // The same ones however misses are served.
    options.miss = Miss::Copy;
    options.weight_sums = open::weight_sums(&args.model.engine, path)?;
    // What there is to note, the turns do.
    let mut engine = open::quiet_engine(path, options)?;
    Ok(bench::tokens(&mut engine, demo::PROMPT, n, args.model.engine.seed())?)
}

fn spawn_turn(
    args: &Decode,
    tokens: &str,
    size: Option<PoolShare>,
    peer: Option<Peer>,
    notes: &mut Notes,
) -> anyhow::Result<Turn> {
    if args.turns.cold {
        cache::drop_all()?;
    }
    result_of(turn_command(args, size, peer)?, tokens, notes)
}

fn turn_command(
    args: &Decode,
    size: Option<PoolShare>,
    peer: Option<Peer>,
) -> anyhow::Result<Command> {
    let mut command = model_command("turn", &args.model, size, peer)?;
    command.args(["--token-file", "-", "--warmup", &args.warmup.to_string()]);
    if let Some(routing) = args.routing.as_ref().filter(|_| peer.is_none()) {
        command.arg("--routing").arg(routing);
    }
    Ok(command)
}

/// The turns of each size of the pool.
type Ours = [(PoolShare, Vec<Turn>)];

/// The turns of each peer.
type Peers = [(Peer, Vec<Turn>)];

fn report(
    args: &Decode,
    experts: &tierstream::gguf::Experts,
    ours: &Ours,
    peers: &Peers,
) -> Report {
    let turns = || ours.iter().map(|(_, turns)| turns);
    let resident = turns().find(|t| t[0].faults_per_token == 0.0);
    let resident_s = resident.map(|turns| 1.0 / median(turns, |t| t.tok_s));
    let first = &ours[0].1;
    Report {
        model: args.model.model.display().to_string(),
        n: args.n,
        warmup: args.warmup,
        repeats: args.turns.repeats,
        threads: args.model.engine.machine.threads.unwrap_or_else(tierstream::default_threads),
        cold: args.turns.cold,
        rows: ours.iter().map(|(size, turns)| row(*size, turns, resident_s, peers)).collect(),
        against: peers.iter().map(|(peer, turns)| against(*peer, turns, first)).collect(),
        drive: Drive {
            random_gbps: drive_gbps(turns().flatten()),
            record_bytes: experts.record_bytes(0).unwrap_or(0),
        },
        io: read_path(turns().flatten().map(|t| t.io.as_ref())),
        computes: args.model.engine.miss != Miss::Copy,
    }
}

/// `resident_s` is the time of a token with all experts resident.
fn row(size: PoolShare, turns: &[Turn], resident_s: Option<f64>, peers: &Peers) -> Row {
    let (tok_s_median, tok_s_min, tok_s_max) = median_min_max(turns.iter().map(|t| t.tok_s));
    let ratio = |(peer, theirs): &(Peer, Vec<Turn>)| {
        let all = ratios(turns, theirs);
        Ratio { to: name(*peer), median: median_min_max(all.clone()).0, all }
    };
    Row {
        experts: size.to_string(),
        experts_percent: turns[0].pool_share.map(|share| share * 100.0),
        tok_s_median,
        tok_s_min,
        tok_s_max,
        hit_rate: turns[0].hit_rate.map(|_| median(turns, |t| t.hit_rate.unwrap_or(1.0))),
        faults_per_token: median(turns, |t| t.faults_per_token),
        computed_per_token: median(turns, |t| t.computed_per_token),
        bytes_per_token: median(turns, |t| t.bytes_per_token),
        stall_share: median(turns, |t| t.stall_share),
        drive_gbps: drive_gbps(turns),
        over_limit: resident_s.map(|resident_s| over_limit(turns, resident_s)),
        ratios: peers.iter().map(ratio).collect(),
        peak_rss_bytes: peak(turns),
        tok_s: turns.iter().map(|t| t.tok_s).collect(),
    }
}

/// A peer beside the turns of the first row.
fn against(peer: Peer, turns: &[Turn], first: &[Turn]) -> Against {
    let (tok_s_median, tok_s_min, tok_s_max) = median_min_max(turns.iter().map(|t| t.tok_s));
    Against {
        name: name(peer),
        tok_s_median,
        tok_s_min,
        tok_s_max,
        ratio_median: median_min_max(ratios(first, turns)).0,
        peak_rss_bytes: peak(turns),
        tok_s: turns.iter().map(|t| t.tok_s).collect(),
    }
}

/// Time per token over the least possible one. By turns, since the drive's speed wanders between
/// them.
fn over_limit(turns: &[Turn], resident_s: f64) -> f64 {
    median(turns, |t| {
        let reading_s = t.drive_bytes_per_s.map_or(0.0, |rate| t.bytes_per_token / rate);
        1.0 / t.tok_s / (resident_s + reading_s)
    })
}

/// Of the turns that read something.
fn drive_gbps<'a>(turns: impl IntoIterator<Item = &'a Turn>) -> Option<f64> {
    let rate = median_min_max(turns.into_iter().filter_map(|t| t.drive_bytes_per_s)).0;
    (rate > 0.0).then_some(rate / 1e9)
}

fn median(turns: &[Turn], of: impl Fn(&Turn) -> f64) -> f64 {
    median_min_max(turns.iter().map(of)).0
}

fn ratios(ours: &[Turn], theirs: &[Turn]) -> Vec<f64> {
    ours.iter().zip(theirs).map(|(a, b)| a.tok_s / b.tok_s).collect()
}

fn peak(turns: &[Turn]) -> u64 {
    turns.iter().map(|t| t.peak_rss_bytes).max().unwrap_or(0)
}

/// The table: a row for each size of the pool and each peer.
pub(super) fn text(report: &Report) -> Result<String, std::fmt::Error> {
    let mut out = String::new();
    let sizes = report.rows.iter().map(|r| r.experts.as_str());
    let names = sizes.chain(report.against.iter().map(|a| a.name));
    let width = names.map(str::len).max().unwrap_or(0).max("experts".len());
    write!(
        out,
        "{:>width$} {:>9} {:>17} {:>7} {:>9}",
        "experts", "tok/s", "(min-max)", "hits", "faults/t"
    )?;
    if report.computes {
        write!(out, " {:>9}", "on CPU/t")?;
    }
    write!(out, " {:>9} {:>7} {:>8} {:>8}", "MB/token", "stall", "RSS, MiB", "x limit")?;
    for peer in &report.against {
        write!(out, "  x {}", peer.name)?;
    }
    writeln!(out)?;
    for r in &report.rows {
        let limit = r.over_limit.map_or_else(|| "-".to_owned(), |x| format!("{x:.2}"));
        let hits = r.hit_rate.map_or_else(|| "-".to_owned(), |x| format!("{:.1}%", x * 100.0));
        write!(
            out,
            "{:>width$} {:>9.2} {:>17} {hits:>7} {:>9.1}",
            r.experts,
            r.tok_s_median,
            format!("({:.2}-{:.2})", r.tok_s_min, r.tok_s_max),
            r.faults_per_token,
        )?;
        if report.computes {
            write!(out, " {:>9.1}", r.computed_per_token)?;
        }
        let (mb, stall) = (r.bytes_per_token / 1e6, r.stall_share * 100.0);
        let rss = r.peak_rss_bytes >> 20;
        write!(out, " {mb:>9.1} {stall:>6.1}% {rss:>8} {limit:>8}")?;
        for ratio in &r.ratios {
            write!(out, "  {:>1$.3}", ratio.median, "x ".len() + ratio.to.len())?;
        }
        writeln!(out)?;
    }
    for a in &report.against {
        let range = format!("({:.2}-{:.2})", a.tok_s_min, a.tok_s_max);
        writeln!(out, "{:>width$} {:>9.2} {range:>17}", a.name, a.tok_s_median)?;
    }
    if let Some(rate) = report.drive.random_gbps {
        writeln!(out, "drive: {rate:.2} GB/s at records of {} bytes", report.drive.record_bytes)?;
    }
    if let Some(path) = &report.io {
        let way = read_way(&path.engine, path.direct, path.reason.as_deref());
        writeln!(out, "reads: {way}")?;
    }
    Ok(out)
}

/// What the columns are, for people.
pub(super) fn legend(report: &Report) -> String {
    let mut text = "\
faults/t, MB/token: experts read for a token. stall: share of the time spent waiting for them.
RSS: the most memory that the process had resident. x limit: time for a token over the least possible, that of computing and of reading alone."
        .to_owned();
    if report.computes {
        text.push_str(
            "\non CPU/t: of the faults, those that the CPU computed. Its kernels round differently.",
        );
    }
    let names: Vec<String> = report.against.iter().map(|a| format!("x {}", a.name)).collect();
    if !names.is_empty() {
        let names = names.join(", ");
        text.push_str(&format!("\n{names}: tokens per second over those of llama.cpp beside it."));
    }
    text
}

#[cfg(test)]
pub(super) mod tests {
    use super::{Against, Drive, Ratio, ReadPath, Report, Row, legend, text};

    pub(crate) fn row(experts: &str, tok_s: f64, faults: f64, over_limit: Option<f64>) -> Row {
        let ratio = |to, median| Ratio { to, median, all: vec![median] };
        Row {
            experts: experts.to_owned(),
            experts_percent: None,
            tok_s_median: tok_s,
            tok_s_min: tok_s - 1.5,
            tok_s_max: tok_s + 1.5,
            hit_rate: Some(1.0 - faults / 48.0),
            faults_per_token: faults,
            computed_per_token: 0.0,
            bytes_per_token: faults * 4e6,
            stall_share: faults / 50.0,
            drive_gbps: None,
            over_limit,
            ratios: vec![ratio("stock", tok_s / 100.0), ratio("stock-repack", tok_s / 125.0)],
            peak_rss_bytes: 734_003_200,
            tok_s: vec![tok_s],
        }
    }

    fn peer(name: &'static str, tok_s: f64) -> Against {
        Against {
            name,
            tok_s_median: tok_s,
            tok_s_min: tok_s - 2.0,
            tok_s_max: tok_s + 2.0,
            ratio_median: 1.0,
            peak_rss_bytes: 0,
            tok_s: vec![tok_s],
        }
    }

    pub(crate) fn report(rows: Vec<Row>) -> Report {
        Report {
            model: "model.gguf".to_owned(),
            n: 64,
            warmup: 32,
            repeats: 5,
            threads: 8,
            cold: false,
            rows,
            against: Vec::new(),
            drive: Drive { random_gbps: Some(2.514), record_bytes: 4_128_768 },
            io: Some(ReadPath { engine: "uring".to_owned(), direct: true, reason: None }),
            computes: false,
        }
    }

    #[test]
    fn the_table_and_its_legend() {
        let rows = vec![row("100%", 98.5, 0.0, Some(1.0)), row("1.50 GiB", 7.25, 40.25, None)];
        let mut report = report(rows);
        report.against = vec![peer("stock", 100.0), peer("stock-repack", 125.0)];
        insta::assert_snapshot!(format!("{}\n{}", text(&report).unwrap(), legend(&report)));
        report.against.clear();
        assert_eq!(legend(&report).lines().count(), 2);
        report.rows.iter_mut().for_each(|row| row.ratios.clear());
        (report.computes, report.rows[1].computed_per_token) = (true, 33.5);
        insta::assert_snapshot!(
            "computed_on_the_cpu",
            format!("{}\n{}", text(&report).unwrap(), legend(&report))
        );
    }
}

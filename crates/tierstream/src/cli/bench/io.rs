//! `tierstream bench io`: how fast a drive is, by storage engine, size of reads, and reads in flight.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use serde::Serialize;
use tierstream::bench::{self, median_min_max};
use tierstream::drive::{self, Measured, Reads};
use tierstream::gguf::Experts;
use tierstream::io::EngineKind;
use tierstream::pack;
use tierstream::size::Bytes;

use super::cache::{Caches, Emptied, State, cached_share};
use crate::cli::args::{BenchIo, Cli, ReadOrder};
use crate::cli::{open, output};

/// Bytes of a record of a file that has no experts.
const RECORD_BYTES: u64 = 2 << 20;

/// The answer of `bench io`.
#[derive(Debug, Serialize)]
struct Report {
    file: PathBuf,
    file_bytes: u64,
    record_bytes: u64,
    repeats: u32,
    seconds: f64,
    bytes_read: u64,
    cache: State,
    emptied: Option<Emptied>,
    rows: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    order: &'static str,
    engine: String,
    direct: bool,
    block_bytes: u64,
    depth: u32,
    gbps_median: f64,
    gbps_min: f64,
    gbps_max: f64,
    gbps: Vec<f64>,
    cpu_s_per_gb: f64,
    latency_p50_s: f64,
    latency_p99_s: f64,
}

/// What is measured in each round.
#[derive(Debug, Clone, Copy)]
struct Cell {
    order: ReadOrder,
    engine: EngineKind,
    block: Bytes,
    depth: u32,
}

pub(crate) fn io(cli: &Cli, args: &BenchIo) -> anyhow::Result<ExitCode> {
    let path = open::named(&args.file)?;
    let cells = cells(args)?;
    let record_bytes = args.record.map_or_else(|| record_bytes(&path), |bytes| bytes.0);
    let time = Duration::from_secs(args.seconds.into()) / (cells.len() as u32 * args.rounds);
    let files = [path.clone()];
    let (mut caches, mut cache) = (Caches::default(), State::Cold);
    let mut measured: Vec<Vec<Measured>> = vec![Vec::new(); cells.len()];
    for round in 1..=args.rounds {
        output::stderr(&format!("round {round} of {}: {} measurements", args.rounds, cells.len()));
        for at in bench::order(round, cells.len()) {
            // Direct reads leave nothing there.
            if cached_share(&files)? > 0.0 && caches.empty(&files)? != State::Cold {
                cache = State::Partly;
            }
            let seed = u64::from(round) << 32 | at as u64;
            measured[at].push(cells[at].measure(&path, record_bytes, time, seed)?);
        }
    }
    let all = || measured.iter().flatten();
    let report = Report {
        file_bytes: std::fs::metadata(&path).context("the file is gone")?.len(),
        file: path,
        record_bytes,
        repeats: args.rounds,
        seconds: all().map(|m| m.seconds).sum(),
        bytes_read: all().map(|m| m.bytes).sum(),
        cache,
        emptied: caches.emptied,
        rows: cells.iter().zip(&measured).map(|(cell, these)| row(cell, these)).collect(),
    };
    if cli.json {
        output::json(&report)?;
    } else {
        output::print(&text(&report)?)?;
        output::stderr("p50, p99: half, and 99 of 100 single reads took no longer, milliseconds.");
    }
    Ok(ExitCode::SUCCESS)
}

/// Everything that is to be measured. Where the kernel refuses io_uring, a note says so.
fn cells(args: &BenchIo) -> anyhow::Result<Vec<Cell>> {
    let mut engines = args.engines.clone();
    if let Some(at) = engines.iter().position(|&engine| engine == EngineKind::Uring)
        && let Err(why) = drive::io_uring()
    {
        output::note(format!("no io_uring: {why}: left out"));
        engines.remove(at);
    }
    let mut cells = Vec::new();
    for &order in &args.orders {
        for &block in &args.blocks {
            for &depth in &args.depths {
                cells.extend(engines.iter().map(|&engine| Cell { order, engine, block, depth }));
            }
        }
    }
    anyhow::ensure!(!cells.is_empty(), "there is nothing left to measure");
    Ok(cells)
}

/// Bytes of the largest record of the model in `path`, if it is one with experts.
fn record_bytes(path: &Path) -> u64 {
    let experts = pack::open(path).ok().and_then(|model| Experts::group(&model).ok());
    let layers = |e: &Experts| (0..e.layers().len()).filter_map(|at| e.record_bytes(at)).max();
    experts.as_ref().and_then(layers).unwrap_or(RECORD_BYTES)
}

impl Cell {
    fn measure(
        &self,
        path: &Path,
        record_bytes: u64,
        time: Duration,
        seed: u64,
    ) -> tierstream::Result<Measured> {
        let block_bytes = self.block.0 as usize;
        let reads = Reads { engine: self.engine, block_bytes, depth: self.depth as usize, time };
        match self.order {
            ReadOrder::Sequential => reads.sequential(path, seed),
            ReadOrder::Records => reads.records(path, record_bytes, seed),
        }
    }

    fn order(&self) -> &'static str {
        match self.order {
            ReadOrder::Sequential => "sequential",
            ReadOrder::Records => "records",
        }
    }
}

fn row(cell: &Cell, these: &[Measured]) -> Row {
    let (gbps_median, gbps_min, gbps_max) = median_min_max(these.iter().map(Measured::gbps));
    let median = |of: &dyn Fn(&Measured) -> f64| median_min_max(these.iter().map(of)).0;
    Row {
        order: cell.order(),
        engine: these[0].status.engine.to_owned(),
        direct: these.iter().all(|m| m.status.direct),
        block_bytes: cell.block.0,
        depth: cell.depth,
        gbps_median,
        gbps_min,
        gbps_max,
        gbps: these.iter().map(Measured::gbps).collect(),
        cpu_s_per_gb: median(&|m| m.cpu_s / (m.bytes as f64 / 1e9)),
        latency_p50_s: median(&|m| m.latency.p50.as_secs_f64()),
        latency_p99_s: median(&|m| m.latency.p99.as_secs_f64()),
    }
}

fn text(report: &Report) -> Result<String, std::fmt::Error> {
    let mut out = String::new();
    writeln!(
        out,
        "{:>10} {:>9} {:>5} {:>9} {:>6} {:>13} {:>8} {:>7} {:>7}",
        "order", "block", "depth", "engine", "GB/s", "(min-max)", "CPU s/GB", "p50 ms", "p99 ms"
    )?;
    for r in &report.rows {
        writeln!(
            out,
            "{:>10} {:>9} {:>5} {:>9} {:>6.2} {:>13} {:>8.3} {:>7.2} {:>7.2}{}",
            r.order,
            Bytes(r.block_bytes).to_string(),
            r.depth,
            r.engine,
            r.gbps_median,
            format!("({:.2}-{:.2})", r.gbps_min, r.gbps_max),
            r.cpu_s_per_gb,
            r.latency_p50_s * 1e3,
            r.latency_p99_s * 1e3,
            if r.direct || r.engine == "buffered" { "" } else { "  THROUGH THE PAGE CACHE" },
        )?;
    }
    let (read, seconds) = (report.bytes_read as f64 / 1e9, report.seconds);
    let records = Bytes(report.record_bytes);
    writeln!(out, "{read:.1} GB read in {seconds:.0} s; records of {records}")?;
    Ok(out)
}

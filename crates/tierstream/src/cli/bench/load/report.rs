//! What the measurements say.

use std::fmt::Write as _;

use serde::Serialize;
use tierstream::bench::load::Load;
use tierstream::bench::median_min_max;

use super::super::cache::State;
use super::Report;
use super::method::Method;
use super::subject::Subject;
use crate::cli::report::{percent, read_way};

/// A measurement, as it was made.
#[derive(Debug, Serialize)]
pub(super) struct Measurement {
    pub(super) round: u32,
    pub(super) model: String,
    pub(super) method: &'static str,
    pub(super) cache: State,
    pub(super) gbps: f64,
    /// Over the plain reads of the model in the round.
    pub(super) ratio_to_raw: f64,
    pub(super) cpu_s_per_gb: f64,
    /// Seconds to the first token over ours in the round.
    pub(super) first_token_ratio: Option<f64>,
    #[serde(flatten)]
    pub(super) load: Load,
    #[serde(skip)]
    pub(super) by: Method,
}

/// A loader of a model.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    pub(super) model: String,
    pub(super) method: &'static str,
    pub(super) version: String,
    pub(super) cache: State,
    pub(super) bytes: u64,
    pub(super) gbps_median: f64,
    pub(super) gbps_min: f64,
    pub(super) gbps_max: f64,
    pub(super) ratio_to_raw_median: f64,
    pub(super) cpu_s_per_gb: f64,
    pub(super) peak_rss_bytes: u64,
    pub(super) first_token_s_median: Option<f64>,
    pub(super) first_token_s_min: Option<f64>,
    pub(super) first_token_s_max: Option<f64>,
    pub(super) first_token_ratio_median: Option<f64>,
}

/// A load: its round, model and loader, what the page cache had, and what it took.
pub(super) type Made<'s> = (u32, &'s Subject, Method, State, Load);

/// Puts each load beside the plain reads and our load of its model in its round.
pub(super) fn measurements(made: Vec<Made<'_>>) -> Vec<Measurement> {
    // Without the start of a GPU, which does not depend on the model.
    let gbps = |l: &Load| l.bytes as f64 / 1e9 / (l.seconds - l.gpu_start_s.unwrap_or(0.0));
    let beside = |at: &Made<'_>, method| {
        let found = made.iter().find(|m| m.0 == at.0 && m.1.path == at.1.path && m.2 == method);
        &found.expect("each round has both").4
    };
    let measurement = |at: &Made<'_>| {
        let (round, subject, method, cache, load) = at;
        let token = load.first_token_s.zip(beside(at, Method::Tierstream).first_token_s);
        Measurement {
            round: *round,
            model: subject.path.display().to_string(),
            method: method.name(),
            cache: *cache,
            gbps: gbps(load),
            ratio_to_raw: gbps(load) / gbps(beside(at, Method::Raw)),
            cpu_s_per_gb: load.cpu_s / (load.bytes as f64 / 1e9),
            first_token_ratio: token.map(|(theirs, ours)| theirs / ours),
            load: load.clone(),
            by: *method,
        }
    };
    made.iter().map(measurement).collect()
}

/// A row for each loader of each model, in the order in which they were asked for.
pub(super) fn rows(
    all: &[Measurement],
    subjects: &[Subject],
    version: impl Fn(Method) -> String,
) -> Vec<Row> {
    let mut rows = Vec::new();
    for subject in subjects {
        let model = subject.path.display().to_string();
        for &method in &subject.methods {
            let of = |m: &&Measurement| m.model == model && m.by == method;
            let these: Vec<&Measurement> = all.iter().filter(of).collect();
            rows.push(row(&model, method, version(method), &these));
        }
    }
    rows
}

fn row(model: &str, method: Method, version: String, these: &[&Measurement]) -> Row {
    let spread = |of: &dyn Fn(&Measurement) -> f64| median_min_max(these.iter().map(|m| of(m)));
    let tokens: Vec<f64> = these.iter().filter_map(|m| m.load.first_token_s).collect();
    let token_ratios: Vec<f64> = these.iter().filter_map(|m| m.first_token_ratio).collect();
    let spread_of = |all: Vec<f64>| (!all.is_empty()).then(|| median_min_max(all));
    let first_token = spread_of(tokens);
    let (gbps_median, gbps_min, gbps_max) = spread(&|m| m.gbps);
    let cache = these[0].cache;
    Row {
        model: model.to_owned(),
        method: method.name(),
        version,
        cache: if these.iter().all(|m| m.cache == cache) { cache } else { State::Partly },
        bytes: these[0].load.bytes,
        gbps_median,
        gbps_min,
        gbps_max,
        ratio_to_raw_median: spread(&|m| m.ratio_to_raw).0,
        cpu_s_per_gb: spread(&|m| m.cpu_s_per_gb).0,
        peak_rss_bytes: these.iter().map(|m| m.load.peak_rss_bytes).max().unwrap_or(0),
        first_token_s_median: first_token.map(|s| s.0),
        first_token_s_min: first_token.map(|s| s.1),
        first_token_s_max: first_token.map(|s| s.2),
        first_token_ratio_median: spread_of(token_ratios).map(|s| s.0),
    }
}

/// The table, one below the other for each model.
pub(super) fn text(report: &Report) -> Result<String, std::fmt::Error> {
    let mut out = String::new();
    let width = report.rows.iter().map(|row| row.method.len()).max().unwrap_or(0);
    let on_gpu = report.rounds.iter().any(|m| m.load.gpu_start_s.is_some());
    for (index, row) in report.rows.iter().enumerate() {
        if index == 0 || report.rows[index - 1].model != row.model {
            let cache = if report.cold { "cold" } else { "warm" };
            writeln!(out, "{}, {:.2} GB, {cache}", row.model, row.bytes as f64 / 1e9)?;
            writeln!(
                out,
                "{:width$} {:>6} {:>13} {:>7} {:>8} {:>9} {:>11} {:>6}  version",
                "", "GB/s", "(min-max)", "raw", "CPU s/GB", "+RSS MiB", "1st token s", "ours x"
            )?;
        }
        let range = format!("({:.2}-{:.2})", row.gbps_min, row.gbps_max);
        let or_dash = |value: Option<f64>| value.map_or_else(|| "-".into(), |v| format!("{v:.2}"));
        let partly = if row.cache == State::Partly { ", PARTLY CACHED" } else { "" };
        writeln!(
            out,
            "{:width$} {:>6.2} {range:>13} {:>6.1}% {:>8.3} {:>9} {:>11} {:>6}  {}{partly}",
            row.method,
            row.gbps_median,
            row.ratio_to_raw_median * 100.0,
            row.cpu_s_per_gb,
            beyond_weights_mib(row, on_gpu),
            or_dash(row.first_token_s_median),
            or_dash(row.first_token_ratio_median),
            row.version,
        )?;
    }
    let cached = report.rounds.iter().map(|m| m.load.cached_bytes as f64 / m.load.bytes as f64);
    for (name, path, cached) in
        [("reads", &report.io, cached.fold(0.0, f64::max)), ("raw reads", &report.raw_io, 0.0)]
    {
        if let Some(path) = path {
            let way = read_way(&path.engine, path.direct, path.reason.as_deref());
            write!(out, "{name}: {way}")?;
            if cached > 0.0 {
                write!(out, ", but for what the page cache had: up to {}", percent(cached))?;
            }
            writeln!(out)?;
        }
    }
    Ok(out)
}

/// What was resident beside the weights, the program itself included. Plain reads keep none, and those
/// on a GPU are not in host memory.
fn beyond_weights_mib(row: &Row, on_gpu: bool) -> i64 {
    let kept = row.method != Method::Raw.name() && !on_gpu;
    let weights = if kept { row.bytes } else { 0 };
    (row.peak_rss_bytes as i64 - weights as i64) >> 20
}

/// What the columns are, for people.
pub(super) const LEGEND: &str = "\
raw: of the rate of plain direct reads of the same bytes in the same round, which are kept nowhere.
+RSS: the most host memory resident, without weights in it. 1st token: from the same start to its logits.
ours x: seconds to the first token over ours in the same round.";

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use tierstream::bench::ReadPath;

    use super::*;
    use crate::cli::args::LoadPeer;

    fn subject(name: &str) -> Subject {
        let methods = vec![Method::Raw, Method::Tierstream, Method::Peer(LoadPeer::Mmap)];
        let (path, is_safetensors, bytes) = (PathBuf::from(name), false, 4 << 30);
        let (is_packed, data) = (false, Vec::new());
        Subject { path, methods, is_safetensors, is_packed, data, bytes, copy: None }
    }

    fn load(seconds: f64, token: Option<f64>) -> Load {
        Load {
            seconds,
            cpu_s: seconds / 4.0,
            bytes: 4_000_000_000,
            first_token_s: token,
            gpu_start_s: None,
            ready_rss_bytes: 10 << 20,
            peak_rss_bytes: 4_100_000_000,
            io: None,
            cached_bytes: 0,
        }
    }

    /// Two rounds, in the second of which everything takes twice as long, and a part is cached.
    fn report(subjects: &[Subject]) -> Report {
        let mut made = Vec::new();
        for subject in subjects {
            for (round, factor, cache) in [(1, 1.0, State::Cold), (2, 2.0, State::Partly)] {
                let token = Some(3.0 * factor);
                made.push((
                    round,
                    subject,
                    Method::Tierstream,
                    State::Cold,
                    load(2.0 * factor, token),
                ));
                made.push((round, subject, Method::Raw, State::Cold, load(factor, None)));
                let (mmap, token) = (Method::Peer(LoadPeer::Mmap), Some(6.0 * factor));
                made.push((round, subject, mmap, cache, load(4.0 * factor, token)));
            }
        }
        let rounds = measurements(made);
        let path = ReadPath { engine: "uring".to_owned(), direct: true, reason: None };
        Report {
            models: Vec::new(),
            cold: true,
            emptied: None,
            memory_touched: true,
            threads: 1,
            raw_gbps: 3.0,
            raw_gbps_min: 2.0,
            raw_gbps_max: 4.0,
            rows: rows(&rounds, subjects, |_| "1.2.3".to_owned()),
            rounds,
            io: Some(path.clone()),
            raw_io: Some(path),
        }
    }

    #[test]
    fn ratios_are_of_the_same_round_and_model() {
        let report = report(&[subject("a.gguf"), subject("b.gguf")]);
        for row in &report.rows {
            let (ratio, token) = match row.method {
                "raw" => (1.0, None),
                "tierstream" => (0.5, Some(1.0)),
                _ => (0.25, Some(2.0)),
            };
            assert_eq!(row.ratio_to_raw_median, ratio);
            assert_eq!(row.first_token_ratio_median, token);
            assert_eq!(row.cache == State::Partly, row.method == "mmap");
        }
        assert_eq!((report.rows.len(), report.rounds.len()), (6, 12));
    }

    #[test]
    fn the_table_and_its_legend() {
        let report = report(&[subject("a.gguf"), subject("b.gguf")]);
        insta::assert_snapshot!(format!("{}\n{LEGEND}", text(&report).unwrap()));
    }

    #[test]
    fn weights_on_a_gpu_are_not_in_host_memory() {
        let report = report(&[subject("a.gguf")]);
        let ours = |on_gpu| beyond_weights_mib(&report.rows[1], on_gpu);
        assert_eq!((report.rows[1].method, ours(false), ours(true)), ("tierstream", 95, 3910));
    }
}

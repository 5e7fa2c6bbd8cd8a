//! `tierstream eval squeeze`: `bench decode` over a grid of pools, and where more of it stops paying.

use std::process::ExitCode;

use serde::Serialize;
use tierstream::bench::median_min_max;
use tierstream::gguf::Experts;
use tierstream::size::{Bytes, PoolShare};

use super::decode::{Report, Row, legend, measure, text};
use crate::cli::args::{Cli, EvalSqueeze};
use crate::cli::output::Failure;
use crate::cli::{open, output};

/// By how much a pool may be slower than the best one and still be as good.
const AS_GOOD: f64 = 0.05;

/// With fewer turns, nothing is said to be slower beyond noise.
const TURNS_MIN: usize = 3;

/// The answer of `eval squeeze`.
#[derive(Debug, Serialize)]
struct Squeezed {
    #[serde(flatten)]
    report: Report,
    knee: Option<Knee>,
}

/// Where more cache stops paying.
#[derive(Debug, PartialEq, Serialize)]
struct Knee {
    /// The least pool that is as good as the best, as it was asked for.
    experts: String,
    experts_percent: f64,
    tok_s_median: f64,
    peak_rss_bytes: u64,
    /// Its tokens per second over the best pool's.
    of_best: f64,
    best: String,
    /// Pools larger than the best that are slower beyond noise.
    hurts: Vec<Hurt>,
}

/// A pool that is slower for being larger.
#[derive(Debug, PartialEq, Serialize)]
struct Hurt {
    experts: String,
    /// Its tokens per second over the best pool's, median of the turns.
    ratio: f64,
}

pub(crate) fn squeeze(cli: &Cli, args: &EvalSqueeze) -> anyhow::Result<ExitCode> {
    let path = open::path(&args.decode.model)?;
    let file = tierstream::pack::open(&path).map_err(tierstream::Error::from)?;
    let experts = Experts::group(&file).map_err(tierstream::Error::from)?;
    let sizes = sizes_that_work(&args.experts, &experts)?;
    let report = measure(&args.decode, &sizes)?;
    let knee = knee(&report.rows);
    let answer = Squeezed { report, knee };
    if cli.json {
        output::json(&answer)?;
    } else {
        output::print(&told(&answer)?)?;
        output::stderr(&legend(&answer.report));
    }
    Ok(ExitCode::SUCCESS)
}

/// Of the sizes that are asked for, those in which the experts of one token have room; of the others
/// it tells.
fn sizes_that_work(asked: &[PoolShare], experts: &Experts) -> anyhow::Result<Vec<PoolShare>> {
    let (all, least) = (experts.expert_bytes(), experts.token_cycle_bytes());
    // A share is rounded up to whole records.
    let record = (0..experts.layers().len()).filter_map(|layer| experts.record_bytes(layer)).max();
    let room = |size: &PoolShare| match *size {
        PoolShare::Bytes(bytes) => bytes.0,
        PoolShare::Share(share) => (all as f64 * share) as u64 + record.unwrap_or(0),
    };
    let (work, small): (Vec<_>, Vec<_>) = asked.iter().partition(|size| room(size) >= least);
    for size in small {
        output::note(format!(
            "experts {size}: less than the {} that one token needs: left out",
            Bytes(least)
        ));
    }
    if work.is_empty() {
        let message = "the experts of one token have no room in any of these pools";
        return Err(Failure::error(message, format!("they take {}", Bytes(least).rounded_up())));
    }
    Ok(work)
}

/// None if nothing streams.
fn knee(rows: &[Row]) -> Option<Knee> {
    let mut pools: Vec<(f64, &Row)> =
        rows.iter().filter_map(|row| Some((row.experts_percent?, row))).collect();
    pools.sort_by(|(a, _), (b, _)| a.total_cmp(b));
    // Of equals the smallest.
    let speed = |row: &Row| row.tok_s_median;
    let (_, best) = pools.iter().rev().max_by(|(_, a), (_, b)| speed(a).total_cmp(&speed(b)))?;
    let good = |row: &Row| speed(row) >= (1.0 - AS_GOOD) * speed(best);
    let (percent, least) = pools.iter().find(|(_, row)| good(row))?;
    let larger = pools.iter().rev().take_while(|(_, row)| !std::ptr::eq(*row, *best));
    let mut hurts: Vec<Hurt> = larger.filter_map(|(_, row)| hurt(row, best)).collect();
    hurts.reverse();
    Some(Knee {
        experts: least.experts.clone(),
        experts_percent: *percent,
        tok_s_median: least.tok_s_median,
        peak_rss_bytes: least.peak_rss_bytes,
        of_best: speed(least) / speed(best),
        best: best.experts.clone(),
        hurts,
    })
}

/// That a pool is slower than the best: by more than what counts as good, and in each turn.
fn hurt(row: &Row, best: &Row) -> Option<Hurt> {
    let ratios = || row.tok_s.iter().zip(&best.tok_s).map(|(row, best)| row / best);
    let (ratio, _, most) = median_min_max(ratios());
    let slower = row.tok_s.len() >= TURNS_MIN && ratio < 1.0 - AS_GOOD && most < 1.0;
    slower.then(|| Hurt { experts: row.experts.clone(), ratio })
}

fn told(answer: &Squeezed) -> Result<String, std::fmt::Error> {
    let mut out = text(&answer.report)?;
    out.push('\n');
    let Some(knee) = &answer.knee else {
        out.push_str("knee: none, since nothing streams\n");
        return Ok(out);
    };
    out.push_str(&format!(
        "knee: {} of the experts, {:.2} tok/s, {:.0} % of the best ({}), with {} resident\n",
        knee.experts,
        knee.tok_s_median,
        100.0 * knee.of_best,
        knee.best,
        Bytes(knee.peak_rss_bytes)
    ));
    let rows = answer.report.rows.iter();
    let percent = |row: &&Row| row.experts_percent.unwrap_or_default();
    let largest = rows.max_by(|a, b| percent(a).total_cmp(&percent(b)));
    match &knee.hurts[..] {
        [] if largest.is_some_and(|row| row.experts == knee.best) => {
            out.push_str("the best pool is the largest\n");
        }
        [] if answer.report.rows[0].tok_s.len() < TURNS_MIN => {
            let few = "whether a larger pool is slower: that takes at least";
            out.push_str(&format!("{few} {TURNS_MIN} turns (--repeats)\n"));
        }
        [] => out.push_str("no larger pool than the best is slower beyond noise\n"),
        hurts => {
            let each = hurts.iter().map(|h| format!("{} ({:.2} of it)", h.experts, h.ratio));
            let each = each.collect::<Vec<_>>().join(", ");
            out.push_str(&format!("larger, and slower than the best in every turn: {each}\n"));
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::bench::decode::tests::{report, row};

    fn rows(speeds: &[(&str, [f64; 3])]) -> Vec<Row> {
        let of = |&(experts, tok_s): &(&str, [f64; 3])| {
            let percent = experts.trim_end_matches('%').parse().unwrap();
            let mut row = row(experts, median_min_max(tok_s).0, (100.0 - percent) / 5.0, None);
            (row.experts_percent, row.tok_s) = (Some(percent), tok_s.to_vec());
            row.ratios.clear();
            row
        };
        speeds.iter().map(of).collect()
    }

    #[test]
    fn the_least_pool_that_is_as_good_as_the_best() {
        let rows =
            rows(&[("100%", [9.0; 3]), ("50%", [9.8; 3]), ("75%", [10.0; 3]), ("25%", [5.0; 3])]);
        let found = knee(&rows).unwrap();
        assert_eq!((found.experts.as_str(), found.best.as_str()), ("50%", "75%"));
        assert!((found.of_best - 0.98).abs() < 1e-9);
        assert_eq!(found.hurts, [Hurt { experts: "100%".into(), ratio: 0.9 }]);
    }

    #[test]
    fn what_is_slower_in_some_turns_only_is_noise() {
        let grid = |largest| rows(&[("100%", largest), ("50%", [10.0, 12.0, 8.0])]);
        assert_eq!(knee(&grid([8.0, 8.0, 8.1])).unwrap().hurts, []);
        assert_eq!(knee(&grid([8.0, 9.0, 7.9])).unwrap().hurts.len(), 1);
        // One turn says nothing.
        let mut one = grid([5.0; 3]);
        one.iter_mut().for_each(|row| row.tok_s.truncate(1));
        assert_eq!(knee(&one).unwrap().hurts, []);
    }

    #[test]
    fn where_nothing_streams_there_is_no_knee() {
        assert_eq!(knee(&[row("100%", 10.0, 0.0, None)]), None);
    }

    #[test]
    fn what_is_told() {
        let rows = rows(&[
            ("100%", [30.0, 31.0, 29.0]),
            ("50%", [40.0, 41.0, 39.0]),
            ("25%", [38.5, 39.0, 38.0]),
            ("5%", [12.0, 13.0, 11.0]),
        ]);
        let knee = knee(&rows);
        let answer = Squeezed { report: report(rows), knee };
        insta::assert_snapshot!(told(&answer).unwrap());
    }
}

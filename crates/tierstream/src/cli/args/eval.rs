//! The flags of `tierstream eval`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use tierstream::size::{Bytes, PoolShare};
use tierstream_eval::sim::{Eviction, PoolKind, Predictor};

use super::{Decode, whole};

#[derive(Debug, Subcommand)]
pub(crate) enum Eval {
    /// How local a model's routing is: reuse, segments, working sets, what could be predicted, hit rates
    ///
    /// Beside controls that show how much of it is not of time. docs/evaluation.md has the formulas.
    Metrics(EvalMetrics),
    /// Hit rates of pools of several sizes, as the runtime or an optimum would have them
    Simulate(EvalSimulate),
    /// Two models, or two trainings of one, side by side
    Compare(EvalCompare),
    /// A page with charts, to look at, to print and to share: one HTML file that needs no network
    Report(EvalReport),
    /// Tokens per second over a grid of pools, really run: where more cache stops paying, and whether
    /// it hurts
    Squeeze(EvalSqueeze),
}

#[derive(Debug, Args)]
pub(crate) struct EvalMetrics {
    /// A trace, in any format that `trace import` takes
    #[arg(value_name = "TRACE")]
    pub(crate) trace: PathBuf,
    #[command(flatten)]
    pub(crate) what: EvalWhat,
    /// Resamples of prompts for the confidence intervals; 0 is without
    #[arg(
        long,
        value_name = "N",
        default_value_t = 1000,
        allow_negative_numbers = true,
        value_parser = whole(0..=100_000u32)
    )]
    pub(crate) resamples: u32,
    /// Without the controls: shuffled tokens, uniform routing
    #[arg(long)]
    pub(crate) no_controls: bool,
    /// Without hit rates of pools
    #[arg(long)]
    pub(crate) no_curves: bool,
}

/// Which tokens, and the seed.
#[derive(Debug, Args)]
pub(crate) struct EvalWhat {
    /// Which tokens: those that were decoded, or those of prompts
    #[arg(long, value_name = "PHASE", default_value = "decode")]
    pub(crate) phase: PhaseArg,
    /// Seed of all that is drawn
    #[arg(
        long,
        default_value_t = 0,
        allow_negative_numbers = true,
        value_parser = whole(0..=u64::MAX)
    )]
    pub(crate) seed: u64,
    /// Routed experts of a layer, for formats that do not tell [default: as many as are used]
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = whole(1..=65_535u32))]
    pub(crate) experts: Option<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum PhaseArg {
    /// Tokens that were decoded one by one.
    Decode,
    /// Tokens of prompts.
    Prefill,
}

const SIMULATE_EXAMPLES: &str = "\
Examples:
  tierstream eval simulate qwen.parquet --policy lru,lfu,belady --rho 1,2,4
  tierstream eval simulate qwen.parquet --policy lru --pool global --bytes 1GiB,2GiB,4GiB --start warm
  tierstream eval simulate qwen.parquet --policy lru --rho 2 --ahead oracle:0.88 --ahead-reads 4

Exit codes: 0, 1 for errors, 2 for wrong flags.";

#[derive(Debug, Args)]
#[command(after_help = SIMULATE_EXAMPLES)]
pub(crate) struct EvalSimulate {
    /// A trace, in any format that `trace import` takes
    #[arg(value_name = "TRACE")]
    pub(crate) trace: PathBuf,
    #[command(flatten)]
    pub(crate) what: EvalWhat,
    /// Who goes: a policy of the runtime (lru, lfu[:half-life], lfru, fifo, random, slru, s3-fifo,
    /// least-stale), belady (the optimum), or belady-leave (in the convention of published tables: a
    /// step's experts may go at once)
    #[arg(long, value_delimiter = ',', value_name = "POLICY,...", default_value = "lru")]
    pub(crate) policy: Vec<Eviction>,
    /// A pool for each layer (per_layer), one for all (global), or one in which each layer has so many
    /// slots that no other takes (floor:SLOTS), or all of its own (shares). The runtime's is shares with
    /// room for fewer than five tokens' experts, else floor with those of one
    #[arg(long, value_name = "KIND", default_value = "per_layer")]
    pub(crate) pool: PoolKind,
    /// Slots as multiples of the experts that a token uses
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "N,...",
        default_value = "1,2,4",
        value_parser = rho
    )]
    pub(crate) rho: Vec<f64>,
    /// Slots for each layer
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "N,...",
        conflicts_with = "rho",
        value_parser = whole(0..=65_535u32)
    )]
    pub(crate) slots: Vec<u32>,
    /// Bytes of all records, which lie anywhere (500MiB, 4GiB)
    #[arg(long, value_delimiter = ',', value_name = "SIZE,...", conflicts_with_all = ["rho", "slots"])]
    pub(crate) bytes: Vec<Bytes>,
    /// Nothing is there at the start (cold), or what the other tokens have left (warm)
    #[arg(long, value_name = "HOW", default_value = "cold")]
    pub(crate) start: StartArg,
    /// What is a hit: what was resident (strict), or also what fills an empty slot (fill)
    #[arg(long, value_name = "HOW", default_value = "strict")]
    pub(crate) counting: CountingArg,
    /// Who guesses what the next layer needs: previous (what it used for the last token), following (what
    /// follows most often), oracle:RECALL
    #[arg(long, value_name = "WHO")]
    pub(crate) ahead: Option<Predictor>,
    /// Records that can be read while a layer is computed
    #[arg(
        long,
        value_name = "N",
        default_value_t = 2,
        requires = "ahead",
        allow_negative_numbers = true,
        value_parser = whole(0..=65_535u32)
    )]
    pub(crate) ahead_reads: u32,
    /// Slots for each layer in a second pool of LRU below (host memory below a GPU's)
    #[arg(long, value_name = "SLOTS", allow_negative_numbers = true, value_parser = whole(0..=65_535u32))]
    pub(crate) below: Option<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum StartArg {
    /// Empty pools.
    Cold,
    /// Pools that the other tokens have filled.
    Warm,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum CountingArg {
    /// What was resident.
    Strict,
    /// Also what fills an empty slot.
    Fill,
}

#[derive(Debug, Args)]
pub(crate) struct EvalCompare {
    /// A trace
    #[arg(value_name = "A")]
    pub(crate) a: PathBuf,
    /// Another one
    #[arg(value_name = "B")]
    pub(crate) b: PathBuf,
    #[command(flatten)]
    pub(crate) what: EvalWhat,
}

const REPORT_EXAMPLES: &str = "\
Examples:
  tierstream eval report qwen.parquet -o report.html
  tierstream eval report before.parquet after.parquet -o report.html

Exit codes: 0, 1 for errors, 2 for wrong flags.";

#[derive(Debug, Args)]
#[command(after_help = REPORT_EXAMPLES)]
pub(crate) struct EvalReport {
    /// Traces, in any format that `trace import` takes: a section each, and all of them side by side
    #[arg(value_name = "TRACE", required = true)]
    pub(crate) traces: Vec<PathBuf>,
    /// The HTML file to write; - is stdout
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: PathBuf,
    /// What `tierstream plan --json` has printed: its predictions of tokens per second become a chart
    #[arg(long, value_name = "FILE")]
    pub(crate) plan: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) what: EvalWhat,
}

const SQUEEZE_EXAMPLES: &str = "\
Examples:
  tierstream eval squeeze model.gguf
  tierstream eval squeeze model.gguf --experts 100%,50%,25% --repeats 3 --cold --json

Exit codes: 0, 1 for errors, 2 for wrong flags.";

#[derive(Debug, Args)]
#[command(after_help = SQUEEZE_EXAMPLES)]
pub(crate) struct EvalSqueeze {
    /// Sizes of the expert pool, in turns: sizes, or shares of all experts
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "SIZE|N%,...",
        default_value = "100%,75%,50%,25%,12.5%,5%",
        allow_hyphen_values = true
    )]
    pub(crate) experts: Vec<PoolShare>,
    #[command(flatten)]
    pub(crate) decode: Decode,
}

fn rho(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rho) if (0.0..=65_535.0).contains(&rho) => Ok(rho),
        _ => Err("it takes numbers from 0 on: 1 is room for the experts of one token".to_owned()),
    }
}

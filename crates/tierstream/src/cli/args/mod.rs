//! Every command and flag, documented once: `--help`, completions and the man page come from here.

use std::fmt::Display;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, CommandFactory, Parser, Subcommand};
use tierstream::drive::Io;
use tierstream::io::EngineKind;
use tierstream::size::{Bytes, PoolShare};
use tierstream::{Execution, Miss, Policy, Prefetch};
use tierstream_chat::Think;

pub(crate) use self::bench::{
    Bench, BenchDecode, BenchIo, BenchLoad, BenchLoadTurn, BenchPrefill, BenchPrefillTurn,
    BenchTurn, Decode, LoadPeer, Peer, ReadOrder,
};
pub(crate) use self::client::{Ps, ServerArgs, Stop};
pub(crate) use self::eval::{
    CountingArg, Eval, EvalCompare, EvalMetrics, EvalReport, EvalSimulate, EvalSqueeze, EvalWhat,
    PhaseArg, StartArg,
};
pub(crate) use self::plan::Plan;
pub(crate) use self::serve::{Serve, ram_with_prompts};
pub(crate) use self::trace::{
    ExportFormat, Trace, TraceExport, TraceFiles, TraceImport, TraceRecord,
};

mod bench;
mod client;
mod eval;
mod plan;
mod serve;
mod trace;

/// In a list of flags, those of all verbs come after the verb's own.
const LAST: usize = 100;

/// Names stand two spaces in, and what they are for further on.
pub(crate) const ENVIRONMENT: &str = "\
Environment:
  TIERSTREAM_BACKENDS  ggml backends to load beside those in the program's folder: folders with
                       libggml-*.so, or libraries, separated by colons. They run as the program
  TIERSTREAM_CACHE     folder of the demo model, of recorded checksums, and of the chat's history
                       [default: $XDG_CACHE_HOME/tierstream, or ~/.cache/tierstream]
  TIERSTREAM_MODELS    folders of models that can be named, separated by colons
  OLLAMA_MODELS        where Ollama's models are, as for Ollama
  HF_HUB_CACHE         where those of the Hugging Face cache are, as for its own programs; so are
                       HUGGINGFACE_HUB_CACHE, HF_HOME and XDG_CACHE_HOME
  HF_TOKEN             the token that `pull` sends to the hub, as for its own programs; so are
                       HF_TOKEN_PATH, HF_ENDPOINT and HF_HUB_OFFLINE
  LLAMA_CACHE          where llama.cpp's are, as for llama.cpp
  NO_COLOR             if it is set and not empty, no colours";

/// Run language models that are bigger than memory: experts stream from the drive.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true, arg_required_else_help = true)]
#[command(after_help = ENVIRONMENT)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
    /// Print one JSON object on stdout (docs/json.md) and nothing else there
    #[arg(long, global = true, display_order = LAST)]
    pub(crate) json: bool,
    /// Print timings after the text
    #[arg(long, short, global = true, display_order = LAST)]
    pub(crate) verbose: bool,
    /// Print llama.cpp's log on stderr
    #[arg(long, global = true, display_order = LAST)]
    pub(crate) log: bool,
}

/// All commands and their flags.
pub(crate) fn command() -> clap::Command {
    let (ram, vram) = (serve::RAM_HELP, serve::VRAM_HELP);
    let of_all = |serve: clap::Command| {
        serve.mut_arg("ram", |flag| flag.help(ram)).mut_arg("vram", |flag| flag.help(vram))
    };
    Cli::command().mut_subcommand("serve", of_all)
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Generate text; without a prompt, chat
    Run(Run),
    /// Serve models over HTTP, in the dialects of Ollama and OpenAI
    ///
    /// Programs that talk to Ollama or to OpenAI can be pointed at it.
    Serve(Serve),
    /// List the models that a server has loaded
    Ps(Ps),
    /// Have a server unload a model, when the requests that it has are done
    Stop(Stop),
    /// Fetch a model from the Hugging Face hub, into its cache
    ///
    /// What was interrupted goes on when it is fetched again. Every command that takes a model then
    /// takes its name.
    Pull(Pull),
    /// List the models that are on this machine: Ollama's, LM Studio's, llama.cpp's, those of the
    /// Hugging Face cache, and those in the folders of TIERSTREAM_MODELS
    ///
    /// Every command that takes a model takes one of these names.
    #[command(visible_alias = "ls")]
    List,
    /// Tell what is in a model and what a budget would hold of it
    Show(Show),
    /// Check that streamed output equals the fully resident run, bit for bit
    ///
    /// Without --experts, the pool holds a quarter of the experts, or those that one token uses if
    /// they are more.
    Verify(Verify),
    /// Measure
    #[command(subcommand)]
    Bench(Bench),
    /// Write a copy of a model in which each expert is one piece, so that a miss is one read
    ///
    /// The packed file runs like the model it was made of, to the same bits. What was interrupted goes
    /// on when it is packed again.
    Pack(Pack),
    /// Tell whether to stream a model on this machine, and how fast it would be
    ///
    /// Measures the machine for some seconds, and predicts tokens per second, with an error bar, for each
    /// sensible place of the experts. docs/evaluation.md has the model of time behind it.
    Plan(Plan),
    /// Record which experts the tokens of prompts or texts are routed to
    ///
    /// The trace is a Parquet file (docs/trace-format.md), which `eval` tells whether a model is worth
    /// streaming by. A model that is called `import` or `export` is given as ./import.
    Trace(Trace),
    /// Whether a model is worth streaming: how local its routing is, and what pools would hold of it
    #[command(subcommand)]
    Eval(Eval),
    /// Tell what this machine can do, and measure its drive
    Doctor(Doctor),
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write the man page to stdout
    Man,
}

/// Which model, and what it may take.
#[derive(Debug, Args, Clone)]
pub(crate) struct ModelArgs {
    /// The expert pool alone: a size, or a share of all experts
    #[arg(long, value_name = "SIZE|N%", allow_hyphen_values = true)]
    pub(crate) experts: Option<PoolShare>,
    #[command(flatten)]
    pub(crate) load: LoadArgs,
}

/// The same without the pool, of which `bench decode` takes several.
#[derive(Debug, Args, Clone)]
pub(crate) struct LoadArgs {
    /// A GGUF file (the first one of a split model), a packed one, `demo`, or a name as `tierstream
    /// list` tells it: qwen3:30b, owner/repo:Q4_K_M
    pub(crate) model: PathBuf,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
}

/// What a model may take, and how it is run.
#[derive(Debug, Args, Clone)]
pub(crate) struct EngineArgs {
    /// All host memory for this model: dense weights, KV cache, compute, experts (8GiB, 800MB). With
    /// --gpu: pinned memory for experts that do not fit the GPU's [default: half of what is free]
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true)]
    pub(crate) ram: Option<Bytes>,
    #[command(flatten)]
    pub(crate) machine: MachineArgs,
    /// Eviction policy: lru, lfu[:half-life], lfru, fifo, random, slru, s3-fifo, least-stale
    #[arg(long, default_value_t)]
    pub(crate) policy: Policy,
    /// Read experts before their layer asks for them: what its router guesses (lookahead), while
    /// tokens come faster with it (auto), what the last token needed (lag), or none (off)
    #[arg(long, value_name = "HOW", default_value_t)]
    pub(crate) prefetch: Prefetch,
    /// With --gpu: what happens when a token needs an expert that is in host memory only: copy (to the
    /// GPU), compute (on the CPU, which rounds differently: the output is not bit for bit that of the
    /// resident model), auto (what is faster here; rounds differently too)
    #[arg(long, value_name = "HOW", default_value_t)]
    pub(crate) miss: Miss,
    /// With --gpu: how single tokens are computed, the output being the same: as a whole, where the GPU
    /// looks by itself whether it has the experts (auto, where that can be done), or layer by layer (host)
    #[arg(long, value_name = "HOW", default_value_t)]
    pub(crate) executor: Execution,
    /// Compare all weights with their checksums as they are read: with those that were recorded when
    /// the model was first loaded with this flag, for which all of it is read once, or with a packed
    /// model's own
    #[arg(long)]
    pub(crate) verify_weights: bool,
    /// Tokens of context [default: 4096, or what the model was trained with if that is less]
    #[arg(long, allow_negative_numbers = true, value_parser = whole(1..=16_777_216u32))]
    pub(crate) ctx: Option<u32>,
    /// Tokens of a prompt that are computed at once [default: 512; with --gpu 2048 or 1024 where they
    /// take little of its memory]
    #[arg(long, allow_negative_numbers = true, value_parser = whole(1..=65_536u32))]
    pub(crate) batch: Option<u32>,
    /// Seed of sampling and of random choices [default: another one each time for `run`, else 0]
    #[arg(long, allow_negative_numbers = true, value_parser = whole(0..=u32::MAX))]
    pub(crate) seed: Option<u32>,
}

/// Where a model computes, and how its files are read.
#[derive(Debug, Args, Clone)]
pub(crate) struct MachineArgs {
    /// Compute on this GPU, with the experts in its memory: its number, or `none`
    #[arg(long, value_name = "N|none", default_value = "none", value_parser = gpu)]
    pub(crate) gpu: GpuArg,
    /// With --gpu: all of the GPU's memory for this model (8GiB) [default: 90 % of what is free]
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true)]
    pub(crate) vram: Option<Bytes>,
    /// How files are read: past the page cache (direct; uring, pread: by this engine), through it
    /// (buffered), or whichever is faster on their drive (auto). cufile, with --gpu: weights that
    /// are loaded go past host memory, too (GPUDirect Storage), or there is an error
    #[arg(long, value_name = "HOW", default_value_t)]
    pub(crate) io: Io,
    /// Compute threads [default: one less than the processors, at least 2; with --gpu 1, unless
    /// --miss lets them compute experts]
    #[arg(long, short, allow_negative_numbers = true, value_parser = whole(1..=512u32))]
    pub(crate) threads: Option<u32>,
}

impl EngineArgs {
    /// The seed where runs are to be the same without one.
    pub(crate) fn seed(&self) -> u32 {
        self.seed.unwrap_or(0)
    }
}

const RUN_EXAMPLES: &str = "\
Examples:
  tierstream run demo                                  chat
  tierstream run qwen3:30b 'Once upon a time'          a model of Ollama's
  tierstream run model.gguf --ram 8GiB 'Once upon a time'
  git diff | tierstream run model.gguf 'What does this change?' --verbose
  tierstream run model.gguf --experts 25% --temp 0 --json 'Why is the sky blue?'

Exit codes: 0, 1 for errors, 2 for wrong flags, 130 after Ctrl-C, 143 after SIGTERM.";

#[derive(Debug, Args)]
#[command(after_help = RUN_EXAMPLES)]
pub(crate) struct Run {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// The prompt; what is piped in stands before it. `-`, or none: standard input
    pub(crate) prompt: Option<String>,
    /// What the model is told before the conversation; needs a chat template [default: the model's own]
    #[arg(
        long,
        value_name = "TEXT",
        conflicts_with_all = ["raw", "prompt_tokens"],
        allow_hyphen_values = true
    )]
    pub(crate) system: Option<String>,
    /// Token ids instead of text, for models without a tokenizer: 1,2,3
    #[arg(
        long,
        value_delimiter = ',',
        conflicts_with = "prompt",
        value_name = "IDS",
        allow_hyphen_values = true,
        value_parser = whole(0..=i32::MAX)
    )]
    pub(crate) prompt_tokens: Option<Vec<i32>>,
    /// Most tokens to generate [default: the model's own, or 256; the whole answer if there is a chat
    /// template]
    #[arg(long, short, allow_negative_numbers = true, value_parser = whole(1..=u32::MAX))]
    pub(crate) n: Option<u32>,
    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
    /// End before this text, which is not printed; may be given several times [default: the model's own]
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, value_parser = stop_text)]
    pub(crate) stop: Vec<String>,
    /// Give the prompt to the model as it is, without its chat template
    #[arg(long)]
    pub(crate) raw: bool,
    /// Whether a model thinks before it answers, and how much: true, false, low, medium, high
    /// [default: true if its chat template knows thinking]
    #[arg(
        long,
        value_name = "HOW",
        conflicts_with_all = ["raw", "prompt_tokens"],
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        value_parser = think
    )]
    pub(crate) think: Option<Think>,
    /// Print the answer without what the model thinks before it
    #[arg(long, alias = "hidethinking")]
    pub(crate) hide_thinking: bool,
}

/// How tokens are drawn.
#[derive(Debug, Args, Clone)]
pub(crate) struct SamplingArgs {
    /// Sampling temperature; 0 is greedy [default: the model's own, or 0.8]
    #[arg(long, allow_negative_numbers = true, value_parser = temperature)]
    pub(crate) temp: Option<f32>,
    /// Draw from this many most likely tokens; 0: from all [default: the model's own, or 40]
    #[arg(long, allow_negative_numbers = true, value_parser = whole(0..=i32::MAX))]
    pub(crate) top_k: Option<i32>,
    /// Draw from the most likely tokens that together have this probability [default: the model's own,
    /// or 0.95]
    #[arg(long, allow_negative_numbers = true, value_parser = share)]
    pub(crate) top_p: Option<f32>,
    /// Leave out tokens less likely than this share of the most likely one [default: the model's own,
    /// or 0.05]
    #[arg(long, allow_negative_numbers = true, value_parser = share)]
    pub(crate) min_p: Option<f32>,
    /// Divide the logits of tokens that the last 64 hold, so that they repeat less; 1: off [default: the
    /// model's own, or 1]
    #[arg(long, allow_negative_numbers = true, value_parser = penalty)]
    pub(crate) repeat_penalty: Option<f32>,
}

/// Reads a whole number; clap's own readers do not tell what they take.
fn whole<T>(
    range: RangeInclusive<T>,
) -> impl Fn(&str) -> Result<T, String> + Clone + Send + Sync + 'static
where
    T: FromStr + PartialOrd + Display + Clone + Send + Sync + 'static,
{
    move |text| match text.trim().parse() {
        Ok(n) if range.contains(&n) => Ok(n),
        _ => Err(format!("it takes a whole number from {} to {}", range.start(), range.end())),
    }
}

/// Reads a temperature; the chat's `/set` does too.
pub(crate) fn temperature(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(t) if t.is_finite() && t >= 0.0 => Ok(t),
        _ => Err("a temperature is a number from 0 on".to_owned()),
    }
}

fn share(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(p) if (0.0..=1.0).contains(&p) => Ok(p),
        _ => Err("a share is a number from 0 to 1".to_owned()),
    }
}

fn penalty(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(p) if p.is_finite() && p > 0.0 => Ok(p),
        _ => Err("a penalty is a number greater than 0; 1 is none".to_owned()),
    }
}

/// Reads how much to think; the chat's `/set` does too.
pub(crate) fn think(text: &str) -> Result<Think, String> {
    Ok(match text {
        "true" => Think::On,
        "false" => Think::Off,
        "low" => Think::Low,
        "medium" => Think::Medium,
        "high" => Think::High,
        _ => return Err("there are true, false, low, medium, high".to_owned()),
    })
}

fn stop_text(text: &str) -> Result<String, String> {
    if text.is_empty() {
        Err("an empty text is everywhere".to_owned())
    } else {
        Ok(text.to_owned())
    }
}

#[derive(Debug, Args)]
pub(crate) struct Show {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
}

#[derive(Debug, Args)]
pub(crate) struct Verify {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Tokens to generate and compare after the prompt
    #[arg(
        long,
        default_value_t = 512,
        allow_negative_numbers = true,
        value_parser = whole(0..=u32::MAX)
    )]
    pub(crate) tokens: u32,
    /// Text of the prompt; by default a short one, or token ids drawn from the seed
    #[arg(long)]
    pub(crate) prompt_file: Option<PathBuf>,
    /// Most tokens of the prompt [default: 512], or how many are drawn [default: 128]
    #[arg(long, allow_negative_numbers = true, value_parser = whole(1..=u32::MAX))]
    pub(crate) prompt_limit: Option<u32>,
}

const PULL_EXAMPLES: &str = "\
Examples:
  tierstream pull owner/repo-GGUF              of Q4_K_M, else the first one
  tierstream pull hf.co/owner/repo-GGUF:Q8_0
  tierstream pull owner/repo-GGUF:model-Q8_0.gguf

Exit codes: 0, 1 for errors, 2 for wrong flags, 130 after Ctrl-C, 143 after SIGTERM.";

#[derive(Debug, Args)]
#[command(after_help = PULL_EXAMPLES)]
pub(crate) struct Pull {
    /// owner/repo, owner/repo:QUANT or owner/repo:FILE, with or without hf.co/ before it
    #[arg(value_name = "NAME")]
    pub(crate) name: String,
}

#[derive(Debug, Args)]
pub(crate) struct Pack {
    /// A GGUF file (the first one of a split model), `demo`, or a name as `tierstream list` tells it
    pub(crate) model: PathBuf,
    /// The packed file, or a folder for it [default: beside the model, NAME.tspack; of another
    /// program's model in the current folder]
    #[arg(long, short, value_name = "DIR|FILE")]
    pub(crate) output: Option<PathBuf>,
    /// Pack the experts only: all else stays in the model's own files, which have to stay where they
    /// are from there
    #[arg(long)]
    pub(crate) experts_only: bool,
    /// How files are read: past the page cache (direct; uring, pread: by this engine), through it
    /// (buffered), or whichever is faster on their drive (auto)
    #[arg(long, value_name = "HOW", default_value_t)]
    pub(crate) io: Io,
}

#[derive(Debug, Args)]
pub(crate) struct Doctor {
    /// A model or folder on the drive to look at [default: the current folder]
    pub(crate) path: Option<PathBuf>,
    /// Do not measure read rates (for a folder, that writes a file of 256 MiB there for a while) and
    /// copies to the GPU
    #[arg(long)]
    pub(crate) no_measure: bool,
}

/// Which GPU computes, if one does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct GpuArg(pub(crate) Option<usize>);

impl Display for GpuArg {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(n) => n.fmt(f),
            None => f.write_str("none"),
        }
    }
}

fn gpu(text: &str) -> Result<GpuArg, String> {
    match text {
        "none" => Ok(GpuArg(None)),
        n => match n.parse() {
            Ok(n) => Ok(GpuArg(Some(n))),
            Err(_) => Err("it takes the number of a GPU, from 0 on, or none".to_owned()),
        },
    }
}

/// A storage engine, of which `bench io` takes several; `noop` is for measuring the reader itself.
fn io_engine(text: &str) -> Result<EngineKind, String> {
    match text.parse() {
        Ok(EngineKind::Noop) | Err(_) => Err("there are auto, uring, pread, buffered".to_owned()),
        Ok(engine) => Ok(engine),
    }
}

//! The flags of `tierstream trace`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::{ModelArgs, SamplingArgs, whole};

const RECORD_EXAMPLES: &str = "\
Examples:
  tierstream trace model.gguf --prompts prompts.txt -o t.parquet      answers to the lines of a file
  tierstream trace qwen3:30b --prompts prompts.jsonl -o t.parquet --ram 8GiB
  tierstream trace demo --text books/ -o t.parquet --tokens 4000      no answers: texts, as they are
  tierstream eval metrics t.parquet

Lines of a .jsonl are objects with `prompt` (or `text`), and `domain` if they have one. Of a folder each
file is a prompt or a text, or a .jsonl; its domain is the folder that it lies in, or its own name.

Exit codes: 0, 1 for errors, 2 for wrong flags; 130 after Ctrl-C and 143 after SIGTERM, with what was
recorded until then in the file.";

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
#[command(after_help = RECORD_EXAMPLES)]
pub(crate) struct Trace {
    #[command(subcommand)]
    pub(crate) files: Option<TraceFiles>,
    #[command(flatten)]
    pub(crate) record: Option<TraceRecord>,
}

// clap knows by this one whether there are any: it does not look into what is flattened.
#[derive(Debug, Args)]
#[group(arg = "out")]
pub(crate) struct TraceRecord {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Have the model answer the prompts of a file (a line each), or a folder
    #[arg(
        long,
        value_name = "FILE|DIR",
        conflicts_with = "text",
        required_unless_present = "text"
    )]
    pub(crate) prompts: Option<PathBuf>,
    /// Have the model read a text, or those of a folder: their tokens count as decoded ones
    #[arg(long, value_name = "FILE|DIR")]
    pub(crate) text: Option<PathBuf>,
    /// The Parquet file to write
    #[arg(long, short, value_name = "FILE")]
    pub(crate) out: PathBuf,
    /// Most tokens of an answer [default: 256], or of a text [default: all]
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = whole(1..=u32::MAX))]
    pub(crate) tokens: Option<u32>,
    /// What the prompts or texts are about, in place of the names of files and folders
    #[arg(long, value_name = "TAG")]
    pub(crate) domain: Option<String>,
    /// Give prompts to the model as they are, without its chat template
    #[arg(long, conflicts_with = "text")]
    pub(crate) raw: bool,
    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum TraceFiles {
    /// Read a trace in any format that is known, and write it as Parquet
    Import(TraceImport),
    /// Write a trace in a format of other programs
    Export(TraceExport),
}

const IMPORT_EXAMPLES: &str = "\
Formats, found by what is in the file: Parquet of this program; `route_trace v1` CSV; JSON lines with
`layers`; CSVs with `Layer ID,Batch Number,Token,Activated Expert IDs`, a file per prompt; the folder
that the `topk` step of moe-lrc writes.

Examples:
  tierstream trace import qwen.route.csv qwen.parquet
  tierstream trace import olmoe.jsonl olmoe.parquet --experts 64 --domain prose

Exit codes: 0, 1 for errors, 2 for wrong flags.";

#[derive(Debug, Args)]
#[command(after_help = IMPORT_EXAMPLES)]
pub(crate) struct TraceImport {
    /// The trace: a file, or a folder of files
    #[arg(value_name = "IN")]
    pub(crate) input: PathBuf,
    /// The Parquet file to write
    #[arg(value_name = "OUT")]
    pub(crate) output: PathBuf,
    /// Routed experts of a layer, for formats that do not tell [default: as many as are used]
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = whole(1..=65_535u32))]
    pub(crate) experts: Option<u32>,
    /// What the prompts are about, for tokens of which the trace does not tell
    #[arg(long, value_name = "TAG")]
    pub(crate) domain: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct TraceExport {
    /// The trace, in any format
    #[arg(value_name = "IN")]
    pub(crate) input: PathBuf,
    /// The file to write; - is stdout
    #[arg(value_name = "OUT", default_value = "-")]
    pub(crate) output: PathBuf,
    /// The format [default: csv for a file that ends so, else jsonl]
    #[arg(long, value_name = "FORMAT")]
    pub(crate) format: Option<ExportFormat>,
}

/// A format of other programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ExportFormat {
    /// `route_trace v1`, of BigMoeOnEdge.
    Csv,
    /// A line for each token, as waste has them, after one for the header.
    Jsonl,
}

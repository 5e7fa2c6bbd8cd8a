//! The flags of `tierstream trace`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::whole;

#[derive(Debug, Subcommand)]
pub(crate) enum Trace {
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

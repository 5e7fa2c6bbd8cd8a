//! The flags of `tierstream plan`.

use std::path::PathBuf;

use clap::Args;
use tierstream::size::PoolShare;

use super::LoadArgs;

const PLAN_EXAMPLES: &str = "\
Examples:
  tierstream plan model.gguf
  tierstream plan model.gguf --ram 16GiB --trace model.parquet
  tierstream plan model.gguf --gpu 0 --vram 8GiB --json

Exit codes: 0, 1 for errors, 2 for wrong flags.";

#[derive(Debug, Args)]
#[command(after_help = PLAN_EXAMPLES)]
pub(crate) struct Plan {
    #[command(flatten)]
    pub(crate) model: LoadArgs,
    /// A trace of this model, in any format that `trace import` takes [default: what public traces of
    /// other models say, with wide error bars]
    #[arg(long, value_name = "TRACE")]
    pub(crate) trace: Option<PathBuf>,
    /// Sizes of the expert pool to tell of: sizes, or shares of all experts [default: what there is room
    /// for, and sizes around it]
    #[arg(long, value_delimiter = ',', value_name = "SIZE|N%,...", allow_hyphen_values = true)]
    pub(crate) experts: Vec<PoolShare>,
}

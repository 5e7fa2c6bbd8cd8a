//! `tierstream show`.
use std::process::ExitCode;
use super::args::{Cli, Show};
pub(crate) fn show(_cli: &Cli, _args: &Show) -> anyhow::Result<ExitCode> { anyhow::bail!("being written") }

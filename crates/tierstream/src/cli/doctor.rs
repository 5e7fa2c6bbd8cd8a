//! `tierstream doctor`.
use std::process::ExitCode;
use super::args::{Cli, Doctor};
pub(crate) fn doctor(_cli: &Cli, _args: &Doctor) -> anyhow::Result<ExitCode> { anyhow::bail!("being written") }

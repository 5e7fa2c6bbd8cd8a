//! `tierstream bench`.
use std::process::ExitCode;
use super::args::{BenchDecode, BenchTurn, Cli};
pub(crate) fn decode(_cli: &Cli, _args: &BenchDecode) -> anyhow::Result<ExitCode> { anyhow::bail!("being written") }
pub(crate) fn turn(_args: &BenchTurn) -> anyhow::Result<ExitCode> { anyhow::bail!("being written") }

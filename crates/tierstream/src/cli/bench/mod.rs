//! `tierstream bench`: every measurement of a model runs in a process of its own, in turns (A, B, A,
//! B, ...), so that neither memory nor a warm cache of one helps or hurts the other.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::process::{Command, Stdio};

use anyhow::{Context, bail};
use clap::ValueEnum;
use serde::de::DeserializeOwned;
use tierstream::bench::ReadPath;
use tierstream::size::PoolShare;
use tierstream::{Options, Weights};

pub(crate) use self::decode::{decode, turn};
pub(crate) use self::io::io;
pub(crate) use self::load::{load, turn as load_turn};
pub(crate) use self::prefill::{prefill, turn as prefill_turn};
pub(crate) use self::squeeze::squeeze;
use super::args::{LoadArgs, MachineArgs, Peer};
use super::{open, output};

mod cache;
mod decode;
mod io;
mod load;
mod prefill;
mod squeeze;

/// Whoever starts a turn may be ended by a signal, and then nobody wants its result.
fn end_with_parent() -> std::io::Result<()> {
    Ok(rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))?)
}

/// What the peer does with the weights.
fn peer_options(peer: Option<Peer>, options: &mut Options) {
    match peer {
        Some(Peer::Stock) => {
            options.weights = Weights::Stock { mmap: true, repack: false, cpu_experts: false }
        }
        Some(Peer::StockRepack) => {
            options.weights = Weights::Stock { mmap: true, repack: true, cpu_experts: false }
        }
        Some(Peer::StockCpuMoe) => {
            options.weights = Weights::Stock { mmap: true, repack: true, cpu_experts: true };
            options.threads.get_or_insert_with(tierstream::default_threads);
        }
        None => {}
    }
}

fn name(peer: Peer) -> &'static str {
    match peer {
        Peer::Stock => "stock",
        Peer::StockRepack => "stock-repack",
        Peer::StockCpuMoe => "stock-cpu-moe",
    }
}

/// What turns say on stderr, each line once: the turns of the same say the same.
#[derive(Debug, Default)]
struct Notes(BTreeSet<String>);

impl Notes {
    fn tell(&mut self, stderr: &[u8]) {
        for line in String::from_utf8_lossy(stderr).lines() {
            let line = output::printable(line);
            if !self.0.contains(&line) {
                output::stderr(&line);
                self.0.insert(line);
            }
        }
    }
}

/// Runs `command` to its end, with `input` on its standard input, and reads the JSON that it prints.
fn result_of<T: DeserializeOwned>(
    mut command: Command,
    input: &str,
    notes: &mut Notes,
) -> anyhow::Result<T> {
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    // It reads it before it does anything else. Where it fails before, its status tells more.
    let _ = child.stdin.take().expect("a pipe").write_all(input.as_bytes());
    let out = child.wait_with_output()?;
    if !out.status.success() {
        let told = String::from_utf8_lossy(&out.stderr);
        bail!("a turn failed: {}", told.trim().trim_start_matches("error: "));
    }
    notes.tell(&out.stderr);
    serde_json::from_slice(&out.stdout).context("a turn printed no result")
}

/// This program's hidden command `turn` of `bench`, with the options of `m` that it takes.
fn model_command(
    turn: &str,
    m: &LoadArgs,
    size: Option<PoolShare>,
    peer: Option<Peer>,
) -> anyhow::Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["bench", turn]).arg(open::path(m)?);
    machine_flags(&mut command, &m.engine.machine, peer.is_some());
    command.args(["--policy", &m.engine.policy.to_string()]);
    command.args(["--prefetch", &m.engine.prefetch.to_string()]);
    if peer.is_none() {
        command.args(["--miss", &m.engine.miss.to_string()]);
        command.args(["--executor", &m.engine.executor.to_string()]);
        command.args(m.engine.verify_weights.then_some("--verify-weights"));
    }
    command.args(["--seed", &m.engine.seed().to_string()]);
    let mut option = |flag: &str, value: Option<String>| {
        if let Some(value) = value {
            command.args([flag, &value]);
        }
    };
    let exact = |size: PoolShare| match size {
        PoolShare::Bytes(bytes) => format!("{}B", bytes.0),
        PoolShare::Share(_) => size.to_string(),
    };
    option("--ram", m.engine.ram.filter(|_| peer.is_none()).map(|b| format!("{}B", b.0)));
    option("--ctx", m.engine.ctx.map(|c| c.to_string()));
    option("--batch", m.engine.batch.map(|b| b.to_string()));
    option("--experts", size.map(exact));
    option("--peer", peer.and_then(|p| p.to_possible_value()).map(|v| v.get_name().to_owned()));
    Ok(command)
}

/// The flags of `m`, of which llama.cpp by itself takes no budget.
fn machine_flags(command: &mut Command, m: &MachineArgs, is_peer: bool) {
    command.args(["--io", &m.io.to_string()]);
    if let Some(gpu) = m.gpu.0 {
        command.args(["--gpu", &gpu.to_string()]);
    }
    if let Some(vram) = m.vram.filter(|_| !is_peer) {
        command.args(["--vram", &format!("{}B", vram.0)]);
    }
    if let Some(threads) = m.threads {
        command.args(["--threads", &threads.to_string()]);
    }
}

/// The path of the reads; of several, one that says why it is not the fastest.
fn read_path<'a>(paths: impl Iterator<Item = Option<&'a ReadPath>> + Clone) -> Option<ReadPath> {
    let mut paths = paths.flatten();
    let first = paths.clone().next();
    paths.find(|path| path.reason.is_some()).or(first).cloned()
}

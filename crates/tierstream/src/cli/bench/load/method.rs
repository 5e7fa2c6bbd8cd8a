//! Who loads.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use tierstream::ggml::ggml_version;

use super::super::{Notes, result_of};
use crate::cli::args::{BenchLoad, LoadPeer};
use crate::cli::output::Failure;

/// Loads by a package of Python, and tells versions.
const SCRIPT: &str = include_str!("peers.py");

const HINT: &str = "scripts/load-peers.sh makes a Python with all of them; --python names another";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Method {
    /// Plain reads of the same bytes, which are kept nowhere.
    Raw,
    Tierstream,
    Peer(LoadPeer),
}

impl Method {
    pub(super) fn name(self) -> &'static str {
        match self {
            Method::Raw => "raw",
            Method::Tierstream => "tierstream",
            Method::Peer(LoadPeer::Mmap) => "mmap",
            Method::Peer(LoadPeer::Direct) => "direct",
            Method::Peer(LoadPeer::Runai) => "runai",
            Method::Peer(LoadPeer::Fastsafetensors) => "fastsafetensors",
            Method::Peer(LoadPeer::Safetensors) => "safetensors",
        }
    }

    /// The package of Python, if it is one.
    pub(super) fn package(self) -> Option<&'static str> {
        match self {
            Method::Peer(LoadPeer::Runai) => Some("runai-model-streamer"),
            Method::Peer(LoadPeer::Fastsafetensors) => Some("fastsafetensors"),
            Method::Peer(LoadPeer::Safetensors) => Some("safetensors"),
            _ => None,
        }
    }

    /// How many times the weights it takes of free memory: for themselves, or in the page cache.
    pub(super) fn memory_times(self) -> u64 {
        match self {
            Method::Raw => 0,
            _ if self.package().is_some() => 2,
            _ => 1,
        }
    }
}

/// The Python that packages are loaded with, if any are asked for.
pub(super) struct Python {
    program: PathBuf,
    versions: HashMap<String, Option<String>>,
}

impl Python {
    /// Looks whether the packages that are asked for are there.
    pub(super) fn of(args: &BenchLoad) -> anyhow::Result<Self> {
        let packages: Vec<_> =
            args.against.iter().filter_map(|&peer| Method::Peer(peer).package()).collect();
        let program = args.python.clone().map_or_else(beside_the_program, Ok)?;
        let mut python = Self { program, versions: HashMap::new() };
        if packages.is_empty() {
            return Ok(python);
        }
        if args.machine.gpu.0.is_some() {
            let message = format!("{} loads to host memory, and --gpu does not", packages[0]);
            return Err(Failure::error(message, "measure it without --gpu"));
        }
        let shown = python.program.display();
        if !python.program.exists() {
            return Err(Failure::error(format!("there is no Python at {shown}"), HINT));
        }
        let mut command = python.script();
        command.arg("versions");
        python.versions = result_of(command, "", &mut Notes::default())?;
        if let Some(missing) = packages.iter().find(|&&p| python.version(p).is_none()) {
            return Err(Failure::error(format!("{shown} has no package {missing}"), HINT));
        }
        Ok(python)
    }

    /// Loads `files` by `package`, after so much of the free memory was touched.
    pub(super) fn command(&self, package: &str, touched: u64, files: &[PathBuf]) -> Command {
        let mut command = self.script();
        command.args([package, &touched.to_string()]).args(files);
        command
    }

    fn script(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.args(["-c", SCRIPT]);
        command
    }

    fn version(&self, package: &str) -> Option<&String> {
        self.versions.get(package)?.as_ref()
    }

    pub(super) fn version_of(&self, method: Method) -> String {
        match (method, method.package()) {
            (_, Some(package)) => self.version(package).cloned().unwrap_or_default(),
            (Method::Peer(_), None) => format!("ggml {}", ggml_version()),
            (Method::Raw | Method::Tierstream, None) => env!("CARGO_PKG_VERSION").to_owned(),
        }
    }
}

/// `target/load-peers`, seen from `target/release/tierstream`.
fn beside_the_program() -> anyhow::Result<PathBuf> {
    let program = std::env::current_exe()?;
    let target = program.parent().and_then(Path::parent).unwrap_or(Path::new("/"));
    Ok(target.join("load-peers/bin/python"))
}

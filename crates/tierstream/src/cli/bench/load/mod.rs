//! `tierstream bench load`: how fast weights come from the drive, beside plain reads of the same bytes
//! in the same rounds, and other loaders.

use std::path::Path;
use std::process::{Command, ExitCode};
use std::sync::Arc;

use serde::Serialize;
use tierstream::bench::load::{Load, Start, engine, raw, touch_free_memory};
use tierstream::bench::{self, ReadPath};
use tierstream::drive::Io;
use tierstream::io::{EngineKind, Reader};
use tierstream::{Options, Placement, Weights, gguf, pack};
use tierstream::{default_threads, io_config, io_config_for};
use tierstream_safetensors::{Checkpoint, Loader};

use self::method::{Method, Python};
use self::report::{Measurement, Row, rows};
use self::subject::{Subject, is_safetensors};
use super::cache::{Caches, Emptied};
use super::{Notes, end_with_parent, machine_flags, read_path, result_of};
use crate::cli::args::{BenchLoad, BenchLoadTurn, Cli, LoadPeer};
use crate::cli::output::Failure;
use crate::cli::{open, output};

mod copy;
mod method;
mod report;
mod subject;

/// Tokens of context: no more memory than a first token needs.
const CTX: u32 = 256;

/// Of the token that comes first.
const SEED: u32 = 0;

/// The answer of `bench load`.
#[derive(Debug, Serialize)]
struct Report {
    models: Vec<String>,
    cold: bool,
    emptied: Option<Emptied>,
    memory_touched: bool,
    threads: u32,
    raw_gbps: f64,
    raw_gbps_min: f64,
    raw_gbps_max: f64,
    rows: Vec<Row>,
    rounds: Vec<Measurement>,
    io: Option<ReadPath>,
    raw_io: Option<ReadPath>,
}

pub(crate) fn load(cli: &Cli, args: &BenchLoad) -> anyhow::Result<ExitCode> {
    let python = Python::of(args)?;
    let mut subjects: Vec<Subject> = Vec::new();
    for (index, path) in args.models.iter().enumerate() {
        if !args.models[..index].contains(path) {
            subjects.push(Subject::open(path, args)?);
        }
    }
    let plan: Vec<(&Subject, Method)> = subjects
        .iter()
        .flat_map(|subject| subject.methods.iter().map(move |&method| (subject, method)))
        .collect();

    // What goes to a GPU takes no memory of the host's.
    let touches = !args.no_touch && args.machine.gpu.0.is_none();
    let (mut caches, mut notes) = (Caches::default(), Notes::default());
    let mut loads = Vec::with_capacity(plan.len() * args.rounds as usize);
    for round in 1..=args.rounds {
        for at in bench::order(round, plan.len()) {
            let (subject, method) = plan[at];
            let (name, path) = (method.name(), subject.path.display());
            output::stderr(&format!("round {round} of {}: {name}, {path}", args.rounds));
            let files = subject.files_for(method);
            let cache = if args.warm { caches.fill(&files) } else { caches.empty(&files) }?;
            let touched = if touches { method.memory_times() * subject.bytes } else { 0 };
            let command = match method.package() {
                Some(package) => python.command(package, touched, &files),
                None => turn_command(args, subject, method, touched)?,
            };
            let load: Load = result_of(command, "", &mut notes)?;
            loads.push((round, subject, method, cache, load));
        }
    }
    let path_of = |wanted: Method| {
        let of = loads.iter().filter(move |(_, _, method, ..)| *method == wanted);
        read_path(of.map(|(.., load)| load.io.as_ref()))
    };
    let (io, raw_io) = (path_of(Method::Tierstream), path_of(Method::Raw));
    let measurements = report::measurements(loads);
    let all_raw = measurements.iter().filter(|m| m.method == Method::Raw.name()).map(|m| m.gbps);
    let (raw_gbps, raw_gbps_min, raw_gbps_max) = bench::median_min_max(all_raw);
    let report = Report {
        models: subjects.iter().map(|subject| subject.path.display().to_string()).collect(),
        cold: !args.warm,
        emptied: caches.emptied,
        memory_touched: touches,
        threads: args.machine.threads.unwrap_or_else(default_threads),
        raw_gbps,
        raw_gbps_min,
        raw_gbps_max,
        rows: rows(&measurements, &subjects, |method| python.version_of(method)),
        rounds: measurements,
        io,
        raw_io,
    };
    if cli.json {
        output::json(&report)?;
    } else {
        output::print(&report::text(&report)?)?;
        output::stderr(report::LEGEND);
    }
    Ok(ExitCode::SUCCESS)
}

fn turn_command(
    args: &BenchLoad,
    subject: &Subject,
    method: Method,
    touched: u64,
) -> anyhow::Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["bench", "load-turn"]).arg(&subject.path);
    command.args(["--touch", &touched.to_string()]);
    machine_flags(&mut command, &args.machine, matches!(method, Method::Peer(_)));
    match method {
        Method::Raw => command.arg("--raw"),
        Method::Peer(_) => command.args(["--peer", method.name()]),
        Method::Tierstream => &mut command,
    };
    Ok(command)
}

/// One measurement; the result is a line of JSON.
pub(crate) fn turn(args: &BenchLoadTurn) -> anyhow::Result<ExitCode> {
    end_with_parent()?;
    let path = args.model.as_path();
    let load = if args.raw {
        let subject = Subject::headers(path)?;
        touch(args)?;
        // As fast as it goes, whatever ours are to be.
        let engine = match args.machine.io {
            Io::Buffered => EngineKind::Auto,
            io => io.engine(),
        };
        raw(&subject.data, subject.bytes, engine)?
    } else if is_safetensors(path) {
        touch(args)?;
        checkpoint(path, args.machine.io)?
    } else {
        open::backends();
        let options = options(args)?;
        touch(args)?;
        let (load, notes) = engine(path, options, SEED)?;
        notes.iter().for_each(output::note);
        load
    };
    output::print(&format!("{}\n", serde_json::to_string(&load)?))?;
    Ok(ExitCode::SUCCESS)
}

/// The last thing before a measurement.
fn touch(args: &BenchLoadTurn) -> tierstream::Result<()> {
    if args.touch == 0 { Ok(()) } else { touch_free_memory(args.touch) }
}

/// Loads a safetensors checkpoint.
fn checkpoint(path: &Path, io: Io) -> anyhow::Result<Load> {
    let start = Start::now();
    let reader = Arc::new(Reader::new(io_config_for(io, &[path.to_owned()])?)?);
    let loader = Loader::new(reader, Checkpoint::open(path)?)?;
    let loaded = loader.load_all(|_| true)?;
    let load = start.loaded(loader.checkpoint().tensor_bytes(), Some(loader.reader().status()));
    drop(loaded);
    Ok(load)
}

/// All weights in memory, for one and the same kernels, whoever loads them.
fn options(args: &BenchLoadTurn) -> anyhow::Result<Options> {
    let file = pack::open(&args.model).map_err(tierstream::Error::from)?;
    let dense = gguf::Experts::group(&file).map_err(tierstream::Error::from)?.is_empty();
    let placement = open::placement(&args.machine)?;
    let on_cpu = matches!(placement, Placement::Cpu);
    let mut options = Options {
        weights: if on_cpu { Weights::Resident } else { Weights::Streamed },
        placement,
        vram_bytes: args.machine.vram.map(|bytes| bytes.0),
        threads: args.machine.threads,
        ctx: Some(CTX),
        io: io_config(args.machine.io),
        io_direct: args.machine.io.is_direct(),
        gpu_reads: args.machine.io.gpu_reads(),
        ..Options::default()
    };
    let mmap = match args.peer {
        None => return Ok(options),
        Some(LoadPeer::Mmap) => true,
        Some(LoadPeer::Direct) => false,
        Some(_) => {
            let hint = "`tierstream bench load --against` starts it";
            return Err(Failure::error("this one is loaded by Python", hint));
        }
    };
    // As ours: of dense models on the CPU, weights get the layouts that its kernels like best.
    options.weights = Weights::Stock { mmap, repack: on_cpu && dense, cpu_experts: false };
    Ok(options)
}

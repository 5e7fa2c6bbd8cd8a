//! `tierstream doctor`: what this machine can do, and how fast its drive is.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use serde::Serialize;
use tierstream::drive::{self, GpuWay, Measure, Rate, Scratch, Way};
use tierstream::ggml::CufilePlaces;
use tierstream::machine::{self, Filesystem, Machine};
use tierstream::size::Bytes;
use tierstream::{DeviceInfo, Error, Gpu, cache, io, memory, numa};

use super::args::{Cli, Doctor};
use super::open;
use super::output::{self, Progress};
use super::report::lines;
use gpu::Gpus;

mod gpu;

/// Size of the file that is written to measure a folder's drive: more than drives cache.
const SCRATCH_BYTES: u64 = 256 << 20;

/// Size of the file that is written only to see how a folder's files can be read.
const PROBE_BYTES: u64 = 64 << 10;

/// For each depth.
const MEASURE_TIME: Duration = Duration::from_millis(1500);

/// Reads in flight of the measurements.
const DEPTHS: [usize; 2] = [1, 8];

/// The answer of `doctor`; `docs/json.md` tells what the fields are.
#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    machine: Machine,
    memory: Memory,
    devices: Vec<Device>,
    gpu: Gpus,
    io_uring: Works,
    storage: Storage,
    drive: Drive,
}

#[derive(Debug, Serialize)]
struct Memory {
    total_bytes: u64,
    available_bytes: u64,
    cgroup_left_bytes: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Device {
    name: String,
    description: String,
    kind: &'static str,
    memory_free_bytes: u64,
    memory_total_bytes: u64,
}

#[derive(Debug, Serialize)]
struct Works {
    works: bool,
    reason: Option<String>,
}

#[derive(Debug, Serialize)]
struct Storage {
    path: PathBuf,
    filesystem: Option<Filesystem>,
    direct: Direct,
    /// How files are read unless `--io` says so; none where there was none to look at.
    reads: Option<Way>,
    /// How weights reach the first GPU unless `--io` says so.
    gpu_reads: Option<GpuWay>,
    numa_node: Option<u32>,
}

/// Direct I/O.
#[derive(Debug, Serialize)]
struct Direct {
    works: bool,
    mem_align: Option<u32>,
    offset_align: Option<u32>,
    reason: Option<String>,
}

#[derive(Debug, Serialize)]
struct Drive {
    /// The file that was read; none for a file that was written for this.
    file: Option<PathBuf>,
    file_bytes: Option<u64>,
    /// `bypassed`, `warm or cold`, or none when nothing was measured.
    page_cache: Option<&'static str>,
    reads: Vec<Rate>,
    skipped: Option<String>,
    /// What was measured or seen before.
    limit_gbps: Option<f64>,
}

/// What was found out about a file.
struct Looked {
    direct: Direct,
    reads: Option<Way>,
    gpu_reads: Option<GpuWay>,
    drive: Drive,
}

pub(crate) fn doctor(cli: &Cli, args: &Doctor) -> anyhow::Result<ExitCode> {
    let path = args.path.as_deref().unwrap_or(Path::new("."));
    let path = if path.exists() { path.into() } else { open::named(path)? };
    open::backends();
    let progress = Progress::start("measuring the drive");
    let report = report(&path, !args.no_measure, &progress)?;
    drop(progress);
    if cli.json {
        output::json(&report)?;
    } else {
        output::print(&report.to_string())?;
    }
    Ok(ExitCode::SUCCESS)
}

fn report(path: &Path, measure: bool, progress: &Progress) -> tierstream::Result<Report> {
    let unreadable = |source| Error::File { path: path.to_owned(), source };
    let is_dir = fs::metadata(path).map_err(unreadable)?.is_dir();
    let filesystem = Filesystem::of(path);
    let looked = match is_dir {
        true => folder(path, filesystem.as_ref(), measure, progress),
        false => file(path, filesystem.as_ref(), measure)?,
    };
    let io_uring = drive::io_uring().err().map(|why| match machine::io_uring_disabled() {
        Some(setting) => format!("{why} ({setting})"),
        None => why,
    });
    Ok(Report {
        version: env!("CARGO_PKG_VERSION"),
        machine: Machine::here(),
        memory: Memory {
            total_bytes: memory::total_bytes(),
            available_bytes: memory::available_bytes(),
            cgroup_left_bytes: memory::cgroup_left_bytes(),
        },
        devices: tierstream::devices().into_iter().map(Device::from).collect(),
        gpu: Gpus::here(measure),
        io_uring: Works { works: io_uring.is_none(), reason: io_uring },
        storage: Storage {
            path: fs::canonicalize(path).unwrap_or_else(|_| path.to_owned()),
            filesystem,
            direct: looked.direct,
            reads: looked.reads,
            gpu_reads: looked.gpu_reads,
            numa_node: numa::node_of(path),
        },
        drive: looked.drive,
    })
}

/// Looks at a file, and reads it.
fn file(path: &Path, filesystem: Option<&Filesystem>, measure: bool) -> tierstream::Result<Looked> {
    let looked = look(path, filesystem, measure)?;
    let file_bytes = fs::metadata(path).ok().map(|m| m.len());
    let drive = Drive { file: Some(path.to_owned()), file_bytes, ..looked.drive };
    Ok(Looked { drive, ..looked })
}

fn look(path: &Path, filesystem: Option<&Filesystem>, measure: bool) -> tierstream::Result<Looked> {
    let direct = Direct::of(&io::File::open(path)?);
    let reads = Some(Way::on(filesystem, path, measure)?);
    let drive = Drive::measured(path, filesystem, measure)?;
    let gpu_reads = gpu_reads(path, filesystem, measure);
    Ok(Looked { direct, reads, gpu_reads, drive })
}

/// None without a GPU that ggml computes on.
fn gpu_reads(path: &Path, filesystem: Option<&Filesystem>, measure: bool) -> Option<GpuWay> {
    let gpu = Gpu::all().ok()?.into_iter().next()?;
    let (places, cache) = (CufilePlaces::here(), cache::dir());
    let measure = if measure { Measure::Again } else { Measure::Never };
    Some(GpuWay::of(path, filesystem, &gpu, &places, cache.as_deref(), measure))
}

/// Looks at a folder through a file that is written there. A folder that takes none is no error.
fn folder(
    dir: &Path,
    filesystem: Option<&Filesystem>,
    measure: bool,
    progress: &Progress,
) -> Looked {
    let bytes = if measure { SCRATCH_BYTES } else { PROBE_BYTES };
    let written = || -> tierstream::Result<Looked> {
        let failed = |source| Error::File { path: dir.to_owned(), source };
        has_room(dir, bytes).map_err(failed)?;
        let mut scratch =
            Scratch::new(dir, bytes, &mut |share| progress.set(share * 0.5)).map_err(failed)?;
        // What was written is in the page cache, where nothing can be measured.
        io::cache::evict(scratch.file()).map_err(failed)?;
        look(&scratch.path(), filesystem, measure)
    };
    written().unwrap_or_else(|error| {
        let source = std::error::Error::source(&error).map(ToString::to_string);
        let why = source.unwrap_or_else(|| error.to_string());
        let why = format!(
            "not known: cannot write a file there to look at ({why}); `doctor FILE` looks at a file \
             that is there"
        );
        let direct =
            Direct { works: false, mem_align: None, offset_align: None, reason: Some(why.clone()) };
        Looked { direct, reads: None, gpu_reads: None, drive: Drive::skipped(why) }
    })
}

/// Filling a drive up to look at it would be no help.
fn has_room(dir: &Path, bytes: u64) -> std::io::Result<()> {
    let stat = rustix::fs::statvfs(dir)?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    if free < 2 * bytes {
        return Err(std::io::Error::other(format!("only {} are free", Bytes(free))));
    }
    Ok(())
}

impl Drive {
    fn skipped(why: impl Into<String>) -> Self {
        let (reads, skipped) = (Vec::new(), Some(why.into()));
        Self { file: None, file_bytes: None, page_cache: None, reads, skipped, limit_gbps: None }
    }

    fn measured(
        path: &Path,
        filesystem: Option<&Filesystem>,
        measure: bool,
    ) -> tierstream::Result<Self> {
        if !measure {
            let limit_gbps = drive::limit_gbps(path, filesystem);
            return Ok(Self { limit_gbps, ..Self::skipped("--no-measure") });
        }
        let mut reads = Vec::new();
        for depth in DEPTHS {
            reads.extend(drive::random_reads(path, depth, MEASURE_TIME)?);
        }
        let Some(first) = reads.first() else {
            return Ok(Self::skipped("the file is smaller than a page"));
        };
        let page_cache = if first.direct { "bypassed" } else { "warm or cold" };
        let best = reads.iter().map(|rate| rate.gbps).fold(0.0, f64::max);
        let limit_gbps = first.direct.then_some(best);
        if let Some(best) = limit_gbps
            && let Err(error) = drive::set_limit(path, filesystem, best)
        {
            output::note(format!("cannot remember how fast this drive is: {error}"));
        }
        Ok(Self {
            file: None,
            file_bytes: Some(SCRATCH_BYTES),
            page_cache: Some(page_cache),
            reads,
            skipped: None,
            limit_gbps,
        })
    }
}

impl Direct {
    fn of(file: &io::File) -> Self {
        let state = file.direct_state();
        let align = |n| state.direct.then_some(n);
        Self {
            works: state.direct,
            mem_align: align(state.mem_align),
            offset_align: align(state.offset_align),
            reason: state.reason.clone(),
        }
    }
}

impl From<DeviceInfo> for Device {
    fn from(d: DeviceInfo) -> Self {
        Self {
            name: d.name,
            description: d.description,
            kind: d.kind,
            memory_free_bytes: d.memory_free_bytes,
            memory_total_bytes: d.memory_total_bytes,
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let machine = &self.machine;
        let processors = match (machine.processors_usable, machine.processors) {
            (usable, all) if usable < all => format!("{usable} of {all} usable here"),
            (_, all) => all.to_string(),
        };
        let mut rows = vec![
            ("tierstream", self.version.to_owned()),
            ("system", format!("{} {}", machine.os, machine.kernel)),
            ("processor", machine.cpu.clone()),
            ("processors", processors),
            ("features", machine.features.join(" ")),
            ("memory", self.memory.to_string()),
            ("NUMA nodes", self.numa()),
        ];
        rows.extend(self.devices.iter().map(|d| ("computes on", d.to_string())));
        rows.extend(self.gpu.rows());
        rows.push(("io_uring", yes_or(self.io_uring.works, "works", &self.io_uring.reason)));
        rows.extend(self.storage.rows());
        rows.extend(self.drive.rows());
        f.write_str(&lines(&rows))
    }
}

impl Report {
    fn numa(&self) -> String {
        let nodes = &self.machine.numa_nodes;
        match self.storage.numa_node {
            Some(node) if nodes.len() > 1 => format!("{}, the drive is on {node}", nodes.len()),
            _ => nodes.len().to_string(),
        }
    }
}

fn yes_or(works: bool, yes: &str, reason: &Option<String>) -> String {
    match reason {
        _ if works => yes.to_owned(),
        Some(reason) => format!("no: {reason}"),
        None => "no".to_owned(),
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} available of {}", Bytes(self.available_bytes), Bytes(self.total_bytes))?;
        match self.cgroup_left_bytes {
            Some(left) => write!(f, ", the memory cgroup leaves {}", Bytes(left)),
            None => f.write_str(", no cgroup limit"),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}, {})", self.name, self.kind, output::printable(&self.description))?;
        match self.kind {
            "cpu" | "accel" => Ok(()),
            _ => {
                let (free, total) = (Bytes(self.memory_free_bytes), Bytes(self.memory_total_bytes));
                write!(f, ", {free} free of {total}")
            }
        }
    }
}

impl Storage {
    fn rows(&self) -> Vec<(&'static str, String)> {
        let filesystem = match &self.filesystem {
            None => "unknown".to_owned(),
            Some(f) => {
                let spins = match f.rotational {
                    Some(true) => ", a spinning disk",
                    Some(false) | None => "",
                };
                format!("{} on {} ({}{spins})", f.kind, f.mount.display(), f.source)
            }
        };
        let direct = match (self.direct.mem_align, self.direct.offset_align) {
            (Some(mem), Some(offset)) => {
                format!("works, aligned to {offset} bytes in the file and {mem} in memory")
            }
            _ => match &self.direct.reason {
                Some(reason) if reason.starts_with("not known") => reason.clone(),
                reason => yes_or(false, "", reason),
            },
        };
        vec![
            ("path", output::printable(&self.path.display().to_string())),
            ("filesystem", filesystem),
            ("direct reads", direct),
        ]
        .into_iter()
        .chain(self.reads.as_ref().map(|way| {
            let side = if way.direct { "past" } else { "through" };
            ("auto reads", format!("{side} the page cache: {}", way.reason))
        }))
        .chain(self.gpu_reads.as_ref().map(|way| {
            let side = if way.cufile { "past" } else { "through" };
            ("auto GPU reads", format!("{side} host memory: {}", way.reason))
        }))
        .collect()
    }
}

impl Drive {
    fn rows(&self) -> Vec<(&'static str, String)> {
        if let Some(why) = &self.skipped {
            let seen = self.limit_gbps.map_or_else(String::new, |gbps| {
                format!("; up to {} before", output::rate(gbps * 1e9))
            });
            return vec![("read rates", format!("not measured: {why}{seen}"))];
        }
        let what = match (&self.file, self.file_bytes) {
            (Some(_), Some(bytes)) if bytes < SCRATCH_BYTES => {
                format!("this file, whose {} the drive itself may cache", Bytes(bytes))
            }
            (Some(_), _) => "this file".to_owned(),
            (None, _) => format!("a new file of {}", Bytes(SCRATCH_BYTES)),
        };
        let cache = match self.page_cache {
            Some("bypassed") => "past the page cache",
            _ => "THROUGH THE PAGE CACHE, so perhaps from memory",
        };
        let mut rows: Vec<(&str, String)> = vec![("measured on", format!("{what}, {cache}"))];
        rows.extend(self.reads.iter().map(|r| {
            let block = Bytes(r.block_bytes);
            let way = format!("random reads of {block}, {} at a time, {}", r.depth, r.engine);
            ("read rate", format!("{} ({way})", output::rate(r.gbps * 1e9)))
        }));
        rows
    }
}

//! Measuring how fast weights come into memory.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tierstream_ggml::{Keep, Weights};
use tierstream_io::{Config, EngineKind, Extent, PAGE, Pages, Priority, Reader, Status};

use super::{ReadPath, cpu_time};
use crate::drive::Discard;
use crate::engine::{Engine, Options};
use crate::error::{Error, Result};
use crate::memory::{self, Usage};
use crate::random::drawn_tokens;

/// Size of plain reads, and how many are in flight.
const RAW_BLOCK_BYTES: usize = 4 << 20;
const RAW_DEPTH: usize = 8;

/// One measurement of a load.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Load {
    /// From a process that is ready to all weights in memory.
    pub seconds: f64,
    /// Time of processors meanwhile, of all threads, in the kernel too.
    pub cpu_s: f64,
    /// The weights.
    pub bytes: u64,
    /// From the same start to the logits of a first token; none of what computes none.
    pub first_token_s: Option<f64>,
    /// Of `seconds`, the time until the GPU could be used; none without one.
    pub gpu_start_s: Option<f64>,
    /// What the process had resident at the start.
    pub ready_rss_bytes: u64,
    /// The most that it had resident until all weights were there.
    pub peak_rss_bytes: u64,
    /// The path of the reads, where they are ours.
    pub io: Option<ReadPath>,
    /// Of the weights, what the page cache had, and we took from there.
    #[serde(default)]
    pub cached_bytes: u64,
}

/// Writes to so many bytes of memory that nobody uses, as far as there are, and lets go of them. A
/// hypervisor may have taken away what has been free for some seconds; then the first one to use it
/// waits for each page, longer than for the drive.
///
/// # Errors
/// What the system says.
pub fn touch_free_memory(bytes: u64) -> Result<()> {
    let bytes = bytes.min(memory::free_bytes() / 10 * 9);
    let mut pages = Pages::new(usize::try_from(bytes).unwrap_or(usize::MAX))?;
    pages.iter_mut().step_by(PAGE).for_each(|byte| *byte = 1);
    drop(pages);
    // The most that was resident is to be the load's (proc_pid_clear_refs(5)).
    let path = Path::new("/proc/self/clear_refs");
    std::fs::write(path, "5").map_err(|source| Error::File { path: path.into(), source })
}

/// From here on is measured.
#[derive(Debug)]
pub struct Start {
    ready_rss_bytes: u64,
    cpu: Duration,
    time: Instant,
}

impl Start {
    /// The process is ready.
    pub fn now() -> Self {
        let ready_rss_bytes = Usage::now().rss_bytes;
        Self { ready_rss_bytes, cpu: cpu_time(), time: Instant::now() }
    }

    /// So many bytes of weights are all there.
    pub fn loaded(&self, bytes: u64, io: Option<Status>) -> Load {
        let seconds = self.time.elapsed().as_secs_f64();
        Load {
            seconds,
            cpu_s: (cpu_time() - self.cpu).as_secs_f64(),
            bytes,
            first_token_s: None,
            gpu_start_s: None,
            ready_rss_bytes: self.ready_rss_bytes,
            peak_rss_bytes: Usage::now().peak_rss_bytes,
            io: io.map(ReadPath::from),
            cached_bytes: 0,
        }
    }
}

/// Loads the GGUF at `path` and computes one token with it. Also returns what is to be noted.
///
/// # Errors
/// As [`Engine::load`]; [`Error::Request`] if some of the weights have not been loaded.
pub fn engine(path: &Path, options: Options, seed: u32) -> Result<(Load, Vec<String>)> {
    let ours = !matches!(options.weights, Weights::Stock { .. });
    let start = Start::now();
    let mut engine = Engine::load(path, options, &mut |_| true)?;
    let io = engine.model().read_status().filter(|_| ours);
    let mut load = start.loaded(engine.file().tensor_bytes(), io);
    if let Some(share) = engine.model().pool_share().filter(|&share| share < 1.0) {
        let percent = share * 100.0;
        let text = format!("only {percent:.0} % of the experts fit, and the rest is not loaded");
        return Err(Error::Request(text));
    }
    // What lies between weights is mapped with them.
    load.cached_bytes = engine.model().from_cache().bytes().min(load.bytes);
    if let (Some(io), Some(true)) = (&mut load.io, engine.model().gds_read().map(|r| r.bytes > 0)) {
        io.engine = "cufile".to_owned();
        io.reason = engine.model().gds_read().and_then(|read| read.failed.clone());
    }
    load.gpu_start_s = engine.gpu_start_time().map(|time| time.as_secs_f64());
    let token = drawn_tokens(1, engine.model().vocab().len(), seed);
    engine.context().decode(&token, Keep::Last, |_, _| {})?;
    load.first_token_s = Some(start.time.elapsed().as_secs_f64());
    Ok((load, engine.notes().to_vec()))
}

/// The part of a file that holds weights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Data {
    /// Which file.
    pub path: PathBuf,
    /// First byte.
    pub offset: u64,
    /// One past the last byte.
    pub end: u64,
}

/// Reads `files` one after the other, many reads in flight, and keeps nothing: what the drive, the
/// kernel and the storage engine allow. `bytes` of them are weights.
///
/// # Errors
/// As the reader's.
pub fn raw(files: &[Data], bytes: u64, engine: EngineKind) -> Result<Load> {
    let reader = Reader::new(Config {
        engine,
        // Twice the depth, so that buffers in the sink's hands do not slow the drive.
        ring_bytes: 2 * RAW_DEPTH * RAW_BLOCK_BYTES,
        buffer_bytes: RAW_BLOCK_BYTES,
        depth: RAW_DEPTH,
        ..Config::default()
    })?;
    let extents = files.iter().map(|data| {
        let file = reader.open(&data.path)?;
        Ok(Extent { file, offset: data.offset, len: data.end - data.offset })
    });
    let extents = extents.collect::<Result<Vec<_>>>()?;
    let start = Start::now();
    reader.submit(Priority::Demand, extents, Arc::new(Discard)).wait()?;
    Ok(start.loaded(bytes, Some(reader.status())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_was_touched_is_nobodys_peak() {
        let before = Usage::now().rss_bytes;
        touch_free_memory(256 << 20).unwrap();
        assert!(Usage::now().peak_rss_bytes < before + (200 << 20));
    }

    #[test]
    fn raw_reads_are_of_the_data_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, vec![1; 9000]).unwrap();
        let data = Data { path: path.clone(), offset: 100, end: 9000 };
        let load = raw(&[data.clone(), data], 17_000, EngineKind::Pread).unwrap();
        assert_eq!((load.bytes, load.first_token_s), (17_000, None));
        assert_eq!(load.io.unwrap().engine, "pread");
        assert!(load.peak_rss_bytes >= load.ready_rss_bytes);
        let beyond = Data { path, offset: 0, end: 9001 };
        assert!(raw(&[beyond], 9001, EngineKind::Pread).is_err());
    }
}

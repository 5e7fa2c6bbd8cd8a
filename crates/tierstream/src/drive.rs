//! What a drive can do: whether direct I/O and io_uring work, how fast random reads are, and which way
//! is the faster one.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;
use tierstream_io::wrap::Latency;
use tierstream_io::{Chunk, Config, EngineKind, Extent, PAGE, Priority, Reader, Sink, Status};

use crate::bench::cpu_time;
use crate::error::{Error, Result};
use crate::machine::Filesystem;
use crate::random::Random;
use crate::size::Bytes;

pub(crate) use self::gpu::GpuLoad;
pub use self::gpu::{GpuProbe, GpuReads, GpuWay, Measure};
pub(crate) use self::known::{Identity, Known};
pub use self::probe::Probe;
pub(crate) use self::way::settle;
pub use self::way::{Io, Way};

mod gpu;
mod known;
mod probe;
mod way;

/// Size of the reads that are measured, bytes.
pub const BLOCK_BYTES: u64 = 1 << 20;

/// Reads of one measurement, at least.
const READS_MIN: u64 = 16;

/// Whether io_uring works here; the reason where it does not.
pub fn io_uring() -> Result<(), String> {
    let config = Config {
        engine: EngineKind::Uring,
        ring_bytes: 2 * PAGE,
        buffer_bytes: PAGE,
        depth: 2,
        ..Config::default()
    };
    let Err(error) = Reader::new(config) else { return Ok(()) };
    let source = std::error::Error::source(&error).map(ToString::to_string);
    Err(source.unwrap_or_else(|| error.to_string()))
}

/// What the drive of the file at `path`, a part of `filesystem`, is known to deliver at most, 1e9 bytes per
/// second: by `doctor`, loads and short measurements of the last month.
pub fn limit_gbps(path: &Path, filesystem: Option<&Filesystem>) -> Option<f64> {
    Known::load(&crate::cache::dir()?, Identity::of(path, filesystem)?).limit_gbps()
}

/// Remembers what that drive was measured to deliver.
///
/// # Errors
/// What the system says.
pub fn set_limit(path: &Path, filesystem: Option<&Filesystem>, gbps: f64) -> io::Result<()> {
    let drive = crate::cache::dir().zip(Identity::of(path, filesystem));
    let Some((dir, drive)) = drive else { return Ok(()) };
    let mut known = Known::load(&dir, drive);
    known.set_limit(gbps);
    known.save(&dir)
}

/// A file without a name in some folder: gone when dropped, and when the program is killed.
#[derive(Debug)]
pub struct Scratch {
    file: File,
}

impl Scratch {
    /// An empty one in `dir`.
    ///
    /// # Errors
    /// What the system says.
    pub fn empty(dir: &Path) -> io::Result<Scratch> {
        let path = dir.join(format!(".tierstream-{}", std::process::id()));
        let file = fs::OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
        fs::remove_file(&path)?;
        Ok(Scratch { file })
    }

    /// Writes `bytes` bytes that do not compress to a file in `dir` and waits until the drive has
    /// them. `progress` gets the share that is done.
    ///
    /// # Errors
    /// What the system says, a full drive for example.
    pub fn new(dir: &Path, bytes: u64, progress: &mut dyn FnMut(f32)) -> io::Result<Scratch> {
        let Scratch { mut file } = Scratch::empty(dir)?;
        let mut random = Random::new(bytes);
        let mut block = Vec::with_capacity(BLOCK_BYTES as usize);
        let mut written = 0;
        while written < bytes {
            let n = (bytes - written).min(BLOCK_BYTES);
            block.clear();
            while (block.len() as u64) < n {
                block.extend_from_slice(&random.next().to_le_bytes());
            }
            file.write_all(&block[..n as usize])?;
            written += n;
            progress(written as f32 / bytes as f32);
        }
        file.sync_data()?;
        Ok(Scratch { file })
    }

    /// To write to.
    pub fn file(&mut self) -> &mut File {
        &mut self.file
    }

    /// A path that opens it while it lives, in other processes too.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd()))
    }
}

/// How fast random reads were.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Rate {
    /// Reads in flight.
    pub depth: usize,
    /// Bytes of one.
    pub block_bytes: u64,
    /// How many there were.
    pub reads: u64,
    /// How long they took together, seconds.
    pub seconds: f64,
    /// 1e9 bytes per second.
    pub gbps: f64,
    /// The engine that read.
    pub engine: &'static str,
    /// Whether it went past the page cache; otherwise this may be the speed of memory.
    pub direct: bool,
}

/// Reads random blocks of the file at `path`, `depth` at a time, for about `time`. `None` for a
/// file that is smaller than a page. Bytes are not copied out of the ring.
///
/// # Errors
/// As the reader's.
pub fn random_reads(path: &Path, depth: usize, time: Duration) -> Result<Option<Rate>> {
    let size =
        fs::metadata(path).map_err(|source| Error::File { path: path.into(), source })?.len();
    let block = BLOCK_BYTES.min(size / PAGE as u64 * PAGE as u64);
    if block == 0 {
        return Ok(None);
    }
    let engine = EngineKind::Auto;
    let reads = Reads { engine, block_bytes: BLOCK_BYTES as usize, depth, time };
    let measured = reads.records(path, block, size)?;
    Ok(Some(Rate {
        depth,
        block_bytes: block,
        reads: measured.requests,
        seconds: measured.seconds,
        gbps: measured.gbps(),
        engine: measured.status.engine,
        direct: measured.status.direct,
    }))
}

/// How a drive is to be read for a measurement. Bytes are not copied out of the ring.
#[derive(Debug, Clone, Copy)]
pub struct Reads {
    /// The storage engine.
    pub engine: EngineKind,
    /// Most bytes of one read, a multiple of [`PAGE`].
    pub block_bytes: usize,
    /// Reads in flight.
    pub depth: usize,
    /// About how long.
    pub time: Duration,
}

/// What such reads took.
#[derive(Debug, Clone)]
pub struct Measured {
    /// Blocks, or records.
    pub requests: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// How long they took together.
    pub seconds: f64,
    /// Time of processors, all threads of this process.
    pub cpu_s: f64,
    /// Of single reads.
    pub latency: Latency,
    /// The path that the reads took.
    pub status: Status,
}

impl Measured {
    /// 1e9 bytes per second.
    pub fn gbps(&self) -> f64 {
        self.bytes as f64 / 1e9 / self.seconds
    }
}

impl Reads {
    /// Reads whole records of the file at `path` in random order: pieces of `record_bytes` that lie
    /// one after the other. Every one once before any comes again.
    ///
    /// # Errors
    /// As the reader's; [`Error::Request`] where the file has no such piece.
    pub fn records(&self, path: &Path, record_bytes: u64, seed: u64) -> Result<Measured> {
        let mut random = Random::new(seed);
        let mut order: Vec<u64> = Vec::new();
        self.measure(path, record_bytes, |records| {
            order.pop().unwrap_or_else(|| {
                order = random.shuffled(records);
                order.pop().expect("a file has a record")
            })
        })
    }

    /// Reads blocks of the file at `path` one after the other, from a random one on and after the last
    /// one from the start.
    ///
    /// # Errors
    /// As the reader's; [`Error::Request`] where the file has no whole block.
    pub fn sequential(&self, path: &Path, seed: u64) -> Result<Measured> {
        let mut next = Random::new(seed).next() >> 1;
        self.measure(path, self.block_bytes as u64, |blocks| {
            next += 1;
            next % blocks
        })
    }

    /// Asks `pick` which piece of the file is next, of so many.
    fn measure(
        &self,
        path: &Path,
        piece_bytes: u64,
        mut pick: impl FnMut(u64) -> u64,
    ) -> Result<Measured> {
        let window_bytes = self.depth.saturating_mul(self.block_bytes);
        let reader = Reader::new(Config {
            engine: self.engine,
            // Twice the depth, so that buffers in the sink's hands do not slow the drive.
            ring_bytes: window_bytes.saturating_mul(2),
            buffer_bytes: self.block_bytes,
            depth: self.depth,
            ..Config::default()
        })?;
        let file = reader.open(path)?;
        let size = reader.file(file)?.size();
        let pieces = size.checked_div(piece_bytes).unwrap_or(0);
        if pieces == 0 {
            let (path, piece) = (path.display(), Bytes(piece_bytes));
            let text =
                format!("{path} has {}, which is less than one read of {piece}", Bytes(size));
            return Err(Error::Request(text));
        }
        // As many as keep the drive at its depth while the oldest is waited for.
        let queued = (2 * window_bytes as u64).div_ceil(piece_bytes).max(2) as usize;
        let mut tickets = VecDeque::with_capacity(queued);
        let (mut requests, cpu, start) = (0, cpu_time(), Instant::now());
        while requests < READS_MIN || start.elapsed() < self.time {
            let extent = Extent { file, offset: pick(pieces) * piece_bytes, len: piece_bytes };
            tickets.push_back(reader.submit(Priority::Demand, vec![extent], Arc::new(Discard)));
            requests += 1;
            if tickets.len() == queued {
                tickets.pop_front().expect("just filled").wait()?;
            }
        }
        for ticket in tickets {
            ticket.wait()?;
        }
        Ok(Measured {
            requests,
            bytes: requests * piece_bytes,
            seconds: start.elapsed().as_secs_f64(),
            cpu_s: (cpu_time() - cpu).as_secs_f64(),
            latency: reader.stats().latency,
            status: reader.status(),
        })
    }
}

/// Takes what is read only to measure.
pub(crate) struct Discard;

impl Sink for Discard {
    fn chunk(&self, _: Chunk) {}

    fn done(&self, _: usize, _: tierstream_io::Result<()>) {}
}

#[cfg(test)]
mod tests {
    use super::{BLOCK_BYTES, Duration, Scratch, random_reads};

    #[test]
    fn a_scratch_file_leaves_nothing_and_can_be_read() {
        let dir = tempfile::tempdir().unwrap();
        let mut shares = Vec::new();
        let bytes = 3 * BLOCK_BYTES + 100;
        let scratch = Scratch::new(dir.path(), bytes, &mut |s| shares.push(s)).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        assert_eq!(shares.last(), Some(&1.0));
        let content = std::fs::read(scratch.path()).unwrap();
        assert_eq!(content.len() as u64, bytes);
        assert!(content.windows(8).any(|w| w.iter().any(|&b| b != 0)));
        for depth in [1, 8] {
            let rate = random_reads(&scratch.path(), depth, Duration::ZERO).unwrap().unwrap();
            assert_eq!((rate.depth, rate.reads, rate.block_bytes), (depth, 16, BLOCK_BYTES));
            assert!(rate.gbps > 0.0);
        }
    }

    #[test]
    fn files_below_a_page_have_no_rate() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("small");
        std::fs::write(&path, [1; 100]).unwrap();
        assert_eq!(random_reads(&path, 1, Duration::ZERO).unwrap(), None);
    }
}

//! What a drive can do: whether direct I/O and io_uring work, and how fast random reads are.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;
use tierstream_io::{Chunk, Config, EngineKind, Extent, PAGE, Priority, Reader, Sink};

use crate::error::Result;
use crate::random::Random;

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

/// A file without a name in some folder: gone when dropped, and when the program is killed.
#[derive(Debug)]
pub struct Scratch {
    file: File,
}

impl Scratch {
    /// Writes `bytes` bytes that do not compress to a file in `dir` and waits until the drive has
    /// them. `progress` gets the share that is done.
    ///
    /// # Errors
    /// What the system says, a full drive for example.
    pub fn new(dir: &Path, bytes: u64, progress: &mut dyn FnMut(f32)) -> io::Result<Scratch> {
        let path = dir.join(format!(".tierstream-doctor-{}", std::process::id()));
        let mut file =
            fs::OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
        fs::remove_file(&path)?;
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

    /// A path that opens it while it lives.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.file.as_raw_fd()))
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
    let buffer_bytes = BLOCK_BYTES as usize;
    let reader = Reader::new(Config {
        engine: EngineKind::Auto,
        // Twice the depth, so that buffers in the sink's hands do not slow the drive.
        ring_bytes: 2 * depth * buffer_bytes,
        buffer_bytes,
        depth,
        ..Config::default()
    })?;
    let file = reader.open(path)?;
    let size = reader.file(file)?.size();
    let page = PAGE as u64;
    let block = BLOCK_BYTES.min(size / page * page);
    if block == 0 {
        return Ok(None);
    }
    let blocks = size / block;
    let mut random = Random::new(size);
    let mut order: Vec<u64> = Vec::new();
    let mut tickets = VecDeque::with_capacity(depth);
    let (mut reads, start) = (0, Instant::now());
    while reads < READS_MIN || start.elapsed() < time {
        // Every block once before any comes again.
        let n = order.pop().unwrap_or_else(|| {
            order = random.shuffled(blocks);
            order.pop().expect("a file has a block")
        });
        let extent = Extent { file, offset: n * block, len: block };
        tickets.push_back(reader.submit(Priority::Demand, vec![extent], Arc::new(Discard)));
        reads += 1;
        if tickets.len() == depth {
            tickets.pop_front().expect("just filled").wait()?;
        }
    }
    for ticket in tickets {
        ticket.wait()?;
    }
    let seconds = start.elapsed().as_secs_f64();
    let status = reader.status();
    Ok(Some(Rate {
        depth,
        block_bytes: block,
        reads,
        seconds,
        gbps: (reads * block) as f64 / 1e9 / seconds,
        engine: status.engine,
        direct: status.direct,
    }))
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

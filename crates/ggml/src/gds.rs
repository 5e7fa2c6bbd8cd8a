//! GPUDirect Storage: weights that the drive writes to a GPU's memory by itself, past the host's.
//!
//! Such reads want both ends aligned to pages, and tensors are at neither: a GGUF aligns them to 32
//! bytes, a GPU's buffer to 128. So whole blocks of the file are read to a few buffers in the GPU's
//! memory, and the tensors' bytes copied from there on the GPU, in a hundredth of the time.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use tierstream_cuda::{Block, Buffer, Cufile, GdsFile, Span, Stream};
use tierstream_io::{Extent, File, PAGE, Priority, Reader};

use crate::error::{Error, Result};
use crate::placement::Gpu;
use crate::uploads::{ToBlocks, Uploads};
use crate::verified::First;

/// Threads that read, each one block at a time: cuFile waits for the drive.
pub(crate) const THREADS: usize = 8;

/// Most bytes of one read.
pub(crate) const BLOCK_BYTES: u64 = 4 << 20;

/// How both ways are measured.
const SHAPE: Shape = Shape {
    block_bytes: BLOCK_BYTES,
    blocks: THREADS,
    rounds_min: 4,
    rounds_max: 12,
    time: Duration::from_millis(400),
};

/// A libcufile that is started, for one GPU. Clones are the same; it ends with the last of them.
#[derive(Debug, Clone)]
pub struct Gds {
    cufile: tierstream_cuda::Gds,
    gpu: Gpu,
    required: bool,
}

/// What turns of either way brought: 1e9 bytes per second. Turns of the same number were neighbours.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GdsTurns {
    /// By cuFile.
    pub cufile_gbps: Vec<f64>,
    /// Through the ring in host memory.
    pub ring_gbps: Vec<f64>,
}

impl Gds {
    /// Starts the library for reads to `gpu`.
    ///
    /// # Errors
    /// [`Error::Gpu`]: there is no GPUDirect Storage here, with the reason.
    pub fn open(cufile: Cufile, gpu: &Gpu) -> Result<Self> {
        let cufile = cufile.open(gpu.device())?;
        Ok(Self { cufile, gpu: gpu.clone(), required: false })
    }

    /// The same for loads that fail where it fails. Others go on through host memory.
    #[must_use]
    pub fn required(self) -> Self {
        Self { required: true, ..self }
    }

    pub(crate) fn is_required(&self) -> bool {
        self.required
    }

    /// Reads parts of the file at `path` to the GPU for a moment, in turns: by cuFile, and through the
    /// ring of `reader`. None for a file that is too small to tell.
    ///
    /// # Errors
    /// [`Error::Gpu`] and [`Error::Io`]: the library, or the drive, fails.
    pub fn measure(&self, reader: &Arc<Reader>, path: &Path) -> Result<Option<GdsTurns>> {
        self.measure_as(reader, path, &SHAPE)
    }

    fn measure_as(
        &self,
        reader: &Arc<Reader>,
        path: &Path,
        shape: &Shape,
    ) -> Result<Option<GdsTurns>> {
        let id = reader.open(path)?;
        let source = self.source(&reader.file(id)?)?;
        let size = source.opened.size();
        let blocks = size / shape.block_bytes;
        let rounds = (blocks / (2 * shape.blocks) as u64).min(shape.rounds_max as u64) as usize;
        if rounds < shape.rounds_min {
            return Ok(None);
        }
        let turns = 2 * rounds;
        let step = blocks / (turns * shape.blocks) as u64;
        // Each turn all over the file, and no block twice.
        let places = |turn: usize| -> Vec<u64> {
            let nth = (0..shape.blocks).map(|block| (block * turns + turn) as u64);
            nth.map(|nth| nth * step * shape.block_bytes).collect()
        };
        let lanes =
            (0..THREADS).map(|_| self.lane(shape.block_bytes)).collect::<Result<Vec<_>>>()?;
        let uploads = Uploads::new(&self.gpu, reader)?;
        let scratch = self.gpu.device().allocate(shape.block_bytes)?;
        let bytes = (shape.blocks as u64 * shape.block_bytes) as f64;
        let gbps = |start: Instant| bytes / 1e9 / start.elapsed().as_secs_f64();
        let begun = Instant::now();
        let mut measured = GdsTurns::default();
        for round in 0..rounds {
            let so_far = begun.elapsed();
            if round > 0 && so_far + so_far / round as u32 > shape.time {
                break;
            }
            // Whoever comes second may find the drive awake.
            for way in [round % 2, (round + 1) % 2] {
                let offsets = places(2 * round + way);
                let start = Instant::now();
                if way == 0 {
                    past_host(&lanes, &source, &offsets, shape.block_bytes, &scratch)?;
                    measured.cufile_gbps.push(gbps(start));
                } else {
                    let len = shape.block_bytes;
                    let extent = |&offset: &u64| Extent { file: id, offset, len };
                    let extents: Vec<Extent> = offsets.iter().map(extent).collect();
                    let sink = ToBlocks::new(&uploads, vec![(scratch.clone(), 0); extents.len()]);
                    reader.submit(Priority::Bulk, extents, sink.clone()).wait()?;
                    sink.settle()?;
                    measured.ring_gbps.push(gbps(start));
                }
            }
        }
        Ok(Some(measured))
    }

    /// Lets a file be read.
    pub(crate) fn source(&self, opened: &Arc<File>) -> Result<Source> {
        let handle = opened.handle().try_clone().map_err(|source| read_error(opened, 0, 0, source));
        Ok(Source { file: self.cufile.register(handle?)?, opened: opened.clone() })
    }

    /// What one thread reads with.
    pub(crate) fn lane(&self, block_bytes: u64) -> Result<Lane> {
        let buffer = self.cufile.buffer(block_bytes as usize)?;
        Ok(Lane { stream: self.gpu.device().stream()?, buffer })
    }
}

/// How long, and how much at once.
struct Shape {
    block_bytes: u64,
    /// Of a turn.
    blocks: usize,
    /// Of a file that has no blocks for so many, nothing can be told.
    rounds_min: usize,
    rounds_max: usize,
    /// No round begins that would end later.
    time: Duration,
}

/// A turn of a measurement.
fn past_host(lanes: &[Lane], source: &Source, offsets: &[u64], len: u64, to: &Block) -> Result<()> {
    let (next, failed) = (AtomicUsize::new(0), First::default());
    thread::scope(|scope| {
        for lane in lanes {
            scope.spawn(|| {
                while let Some(&offset) = offsets.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let read = lane.read(source, offset, len);
                    failed.note(read.and_then(|at| lane.copy(at, to.span(0, len)?)));
                }
            });
        }
    });
    failed.check()
}

/// A file that cuFile reads.
#[derive(Debug)]
pub(crate) struct Source {
    file: GdsFile,
    opened: Arc<File>,
}

/// What one thread reads with.
pub(crate) struct Lane {
    // Dropped first: what it copies from the buffer ends with it.
    stream: Stream,
    buffer: Buffer,
}

impl Lane {
    /// Brings the `len` bytes from `offset` on, which lie in one block of the file, to the buffer.
    /// Returns where they begin there.
    ///
    /// # Errors
    /// [`Error::Io`] as the reader's, [`Error::Gpu`] if the GPU is lost.
    pub(crate) fn read(&self, source: &Source, offset: u64, len: u64) -> Result<u64> {
        let Source { file, opened } = source;
        let (before, page) = (offset % PAGE as u64, PAGE as u64);
        let end = (offset + len).next_multiple_of(page).min(opened.size());
        let bytes = end.saturating_sub(offset - before);
        let got = match bytes {
            0 => 0,
            _ => file.read(offset - before, bytes as usize, &self.buffer).map_err(|error| {
                match error.get_ref().and_then(|source| source.downcast_ref()) {
                    Some(gpu) => Error::from(tierstream_cuda::Error::clone(gpu)),
                    None => read_error(opened, offset, len, error).into(),
                }
            })?,
        };
        let got = (got as u64).saturating_sub(before);
        if got < len {
            let path = opened.path().into();
            let error = tierstream_io::Error::Truncated { path, offset, wanted: len, got };
            return Err(error.into());
        }
        Ok(before)
    }

    /// Copies from where in the buffer they begin, and waits for it.
    pub(crate) fn copy(&self, at: u64, to: Span) -> Result<()> {
        self.stream.copy_within(self.buffer.span(at, to.bytes())?, to)?;
        Ok(self.stream.synchronize()?)
    }
}

fn read_error(file: &File, offset: u64, len: u64, source: std::io::Error) -> tierstream_io::Error {
    let path = file.path().into();
    tierstream_io::Error::Read { path, offset, len, source: Arc::new(source) }
}

#[cfg(test)]
#[path = "../../cuda/tests/support/cufile.rs"]
mod cufile;

#[cfg(test)]
mod tests {
    use tierstream_cuda::Places;
    use tierstream_cuda::standin::{Config, StandIn};

    use super::cufile::Stub;
    use super::*;

    #[test]
    fn both_ways_are_measured_in_turns() {
        let shape = Shape {
            block_bytes: 64 << 10,
            blocks: 4,
            rounds_min: 3,
            rounds_max: 5,
            time: Duration::from_secs(600),
        };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let stub = Stub::new();
        let stand_in = StandIn::new(Config::default()).unwrap();
        let gpu = Gpu::stand_in(&stand_in).unwrap();
        let (ring_bytes, buffer_bytes) = (4 << 20, 256 << 10);
        let config = || tierstream_io::Config { ring_bytes, buffer_bytes, ..Default::default() };
        let measure = || {
            let places = Places {
                libraries: vec![stub.path()],
                nvidia_fs: stub.nvidia_fs(),
                ..Places::here()
            };
            let gds = Gds::open(Cufile::find(&places).unwrap(), &gpu).unwrap();
            let reader = Arc::new(Reader::new(config()).unwrap());
            let measured = gds.measure_as(&reader, &path, &shape);
            measured.map(|turns| (turns, reader.stats().bytes_wanted))
        };
        std::fs::write(&path, vec![7; 1 << 20]).unwrap();
        assert_eq!(measure().unwrap(), (None, 0));
        assert_eq!(stub.get("reads"), 0);

        std::fs::write(&path, vec![7; 3 << 19]).unwrap();
        let (turns, through_ring) = measure().unwrap();
        let turns = turns.unwrap();
        assert_eq!((turns.cufile_gbps.len(), turns.ring_gbps.len()), (3, 3));
        assert!(turns.cufile_gbps.iter().chain(&turns.ring_gbps).all(|gbps| *gbps > 0.0));
        let bytes_of_turns = 3 * 4 * (64 << 10);
        assert_eq!((stub.get("bytes"), through_ring), (bytes_of_turns, bytes_of_turns as u64));

        // Only the compatibility mode would read.
        stub.set("needs_compat", 1);
        let error = measure().unwrap_err();
        assert!(matches!(error, Error::Io(tierstream_io::Error::Read { .. })), "{error:?}");
        stub.assert_ended();
        let memory = stand_in.device().memory().unwrap();
        assert_eq!((memory.free_bytes, stand_in.pinned_bytes()), (memory.total_bytes, 0));
    }
}

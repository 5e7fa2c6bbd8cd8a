//! How a model's files are read: by which way of their drive, to which ring; and how fast that was.

use std::path::PathBuf;
use std::time::Duration;

use tierstream_ggml::{FromCache, Gds, Gpu, Weights};
use tierstream_gguf::Experts;
use tierstream_io::{Config, PAGE, Reader};

use crate::drive::{self, GpuLoad, GpuReads, GpuWay, Identity, Io, Known};
use crate::engine::Options;
use crate::error::{Error, Result};
use crate::machine::Filesystem;
use crate::numa;
use crate::progress::LoadRate;

/// Bytes of the ring.
const RING_BYTES: usize = 16 << 20;

/// The largest buffers that the ring is made of, bytes.
const BUFFER_MAX_BYTES: usize = 8 << 20;

/// As many records as the ring holds when it is made for them.
const RECORDS: usize = 8;

/// A load of fewer bytes than this tells nothing of a drive.
const TELLING_BYTES: u64 = 256 << 20;

/// The reader's configuration that tierstream uses, with the engine of `io`. What is named has all reads.
pub fn io_config(io: Io) -> Config {
    Config {
        engine: io.engine(),
        ring_bytes: RING_BYTES,
        use_cache: io == Io::Auto,
        ..Config::default()
    }
}

/// The same for reading the files at `paths`: see [`drive::Way`].
///
/// # Errors
/// When one of them cannot be opened. [`Error::Cufile`]: no GPU has to do with this.
pub fn io_config_for(io: Io, paths: &[PathBuf]) -> Result<Config> {
    check_cpu(io.gpu_reads())?;
    let mut config = io_config(io);
    if io == Io::Auto {
        drive::settle(&mut config, paths)?;
    }
    Ok(config)
}

/// Refuses reads to a GPU where there is none.
fn check_cpu(reads: GpuReads) -> Result<()> {
    let reason = "it reads to a GPU, and none is to be used".to_owned();
    if reads == GpuReads::Cufile { Err(Error::Cufile { reason }) } else { Ok(()) }
}

/// The drive of a model's (first) file, as far as a load has to do with it.
pub(crate) struct Drive {
    /// What is known of it, and the folder that it is remembered in.
    known: Option<(Known, PathBuf)>,
}

impl Drive {
    /// Settles how `options` read the files of the model.
    pub(crate) fn of(file: &tierstream_gguf::Model, options: &mut Options) -> Result<Self> {
        let paths: Vec<PathBuf> = file.files().iter().map(|file| file.path.clone()).collect();
        if !options.io_direct {
            drive::settle(&mut options.io, &paths)?;
        }
        if options.io.numa_node.is_none() {
            let gpu = options.placement.gpu().and_then(Gpu::numa_node);
            options.io.numa_node = numa::ring_node(&paths[0], gpu);
        }
        // After the way was settled, which may have measured the drive.
        let remembered =
            crate::cache::dir().zip(Identity::of(&paths[0], Filesystem::of(&paths[0]).as_ref()));
        let known = remembered.map(|(dir, drive)| (Known::load(&dir, drive), dir));
        Ok(Self { known })
    }

    /// How the weights of a load reach the GPU, if it is one of ours to a GPU.
    pub(crate) fn way_to_gpu(
        &mut self,
        file: &tierstream_gguf::Model,
        options: &Options,
    ) -> Result<Option<(Option<Gds>, GpuWay)>> {
        let Some(gpu) = options.placement.gpu() else {
            check_cpu(options.gpu_reads)?;
            return Ok(None);
        };
        if options.weights != Weights::Streamed {
            return Ok(None);
        }
        let io = &options.io;
        let config = Config {
            engine: io.engine,
            ring_bytes: io.ring_bytes,
            dropping: io.dropping.clone(),
            numa_node: io.numa_node,
            ..Config::default()
        };
        let (path, places) = (&file.files()[0].path, &options.cufile);
        let load = GpuLoad { path, gpu, places, verified: options.weight_sums.is_some() };
        let known = self.known.as_mut().map(|(known, dir)| (known, dir.as_path()));
        load.choose(options.gpu_reads, known, config).map(Some)
    }

    pub(crate) fn limit_bytes_per_s(&self) -> Option<f64> {
        self.known.as_ref()?.0.limit_gbps().map(|gbps| gbps * 1e9)
    }

    /// What `reader` has read for a load, in `time`, and for a while as fast as `peak` bytes per second:
    /// that is remembered, if it is the most so far that came past the page cache, which had none of it.
    /// Beside it, what came past host memory, and from the page cache.
    pub(crate) fn load_rate(
        mut self,
        reader: &Reader,
        (past_host, cached): (u64, FromCache),
        time: Duration,
        peak: f64,
    ) -> Option<LoadRate> {
        let wanted = reader.stats().bytes_wanted;
        let bytes = wanted.saturating_sub(cached.copied_bytes) + past_host;
        let cached_bytes = cached.bytes();
        let gbps = (bytes + cached_bytes) as f64 / 1e9 / time.as_secs_f64();
        // To compare a load with itself says nothing.
        let was_known = self.limit_bytes_per_s().is_some();
        if let Some((known, dir)) = &mut self.known
            && bytes >= TELLING_BYTES
            && cached_bytes == 0
            && reader.status().direct
            && known.raise_limit((peak / 1e9).max(gbps))
        {
            // Without it, the next load does not know.
            let _ = known.save(dir);
        }
        // How long a short load takes has little to do with the drive, nor one from memory.
        let tells = was_known && bytes >= TELLING_BYTES && cached_bytes == 0;
        let limit = self.limit_bytes_per_s().filter(|_| tells);
        let limit_gbps = limit.map(|limit| limit / 1e9);
        let any = bytes + cached_bytes > 0;
        any.then_some(LoadRate { bytes, cached_bytes, gbps, limit_gbps })
    }
}

/// Makes the ring of `io` of buffers that hold a record, so that a miss is one read: of a packed model whose
/// records go to a GPU through it. Records larger than [`BUFFER_MAX_BYTES`] come in several reads.
pub(crate) fn hold_records(io: &mut Config, file: &tierstream_gguf::Model, experts: &Experts) {
    if file.originals().is_none() {
        return;
    }
    let streamed = experts.layers().iter().filter(|layer| layer.is_streamed());
    let strides = streamed.flat_map(|layer| &layer.parts).map(|part| part.stride);
    let record = strides.max().and_then(|bytes| usize::try_from(bytes).ok()).unwrap_or(0);
    let buffer = record.next_multiple_of(PAGE);
    if (io.buffer_bytes + 1..=BUFFER_MAX_BYTES).contains(&buffer) {
        io.buffer_bytes = buffer;
        io.ring_bytes = io.ring_bytes.max(RECORDS * buffer);
    }
}

//! Copies from the drive's ring to a GPU's memory: for a load and for the pool, whoever needs them.
//!
//! The ring that reads arrive in is pinned, once, and each chunk is copied from there on a stream of
//! our own, beside what the GPU computes. A chunk goes back to the ring when its copy is seen done.

use std::collections::VecDeque;
use std::fmt;
use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tierstream_cuda::{Block, Event, Registered, Span, Stream};
use tierstream_io::{Chunk, Reader, Ring, Sink};

use crate::error::{Error, Result};
use crate::placement::Gpu;
use crate::verified::First;

/// Copies from the ring that nobody has waited for, at most, and one in so many of its buffers: the reader
/// needs the others, and nothing but the next copy sees that one is done.
const COPIES_IN_FLIGHT: usize = 4;
const RING_SHARE: usize = 4;

/// A stream of copies from the host, and the ring that most of them are from.
pub(crate) struct Uploads {
    // In the order in which they are to be dropped: copies end before the ring is unpinned.
    in_flight: Mutex<VecDeque<Event>>,
    most_in_flight: usize,
    stream: Stream,
    gpu: Gpu,
    _ring: Registered<Arc<Ring>>,
}

impl Uploads {
    /// Pins the ring of `reader`, for copies to `gpu`.
    ///
    /// # Errors
    /// What the driver says: [`Error::OutOfGpuMemory`] if so much
    /// cannot be pinned, [`Error::Gpu`].
    pub(crate) fn new(gpu: &Gpu, reader: &Reader) -> Result<Arc<Self>> {
        let stream = gpu.device().stream()?;
        let ring = reader.ring().clone();
        let base = NonNull::new(ring.base()).expect("a ring is mapped");
        let bytes = ring.bytes();
        let most_in_flight = COPIES_IN_FLIGHT.min(ring.count() / RING_SHARE);
        // SAFETY: the ring is mapped as long as it lives, and copies end before it is dropped.
        let ring = unsafe { gpu.device().register(ring, base, bytes) }?;
        let (in_flight, gpu) = (Mutex::default(), gpu.clone());
        Ok(Arc::new(Self { in_flight, most_in_flight, stream, gpu, _ring: ring }))
    }

    /// The GPU that is copied to.
    pub(crate) fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Starts to copy a chunk of the ring. Comes from the reader's thread, and may wait for copies
    /// that were started before.
    pub(crate) fn upload_chunk(&self, chunk: Chunk, to: Span) -> Result<()> {
        self.stream.upload(Arrived(chunk), to)?;
        let event = self.stream.record()?;
        let mut in_flight = self.in_flight();
        in_flight.push_back(event);
        // A copy takes some 20 us per MiB, less than the read of the next one.
        while in_flight.len() > self.most_in_flight {
            in_flight.pop_front().expect("there are some").wait()?;
        }
        Ok(())
    }

    /// Waits for every copy that was started.
    pub(crate) fn settle(&self) -> Result<()> {
        self.stream.record()?.wait()?;
        self.in_flight().clear();
        Ok(())
    }

    fn in_flight(&self) -> MutexGuard<'_, VecDeque<Event>> {
        self.in_flight.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Deref for Uploads {
    type Target = Stream;

    fn deref(&self) -> &Stream {
        &self.stream
    }
}

impl fmt::Debug for Uploads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Uploads").field("gpu", &self.gpu).finish_non_exhaustive()
    }
}

/// Takes pieces to a GPU's memory, each to its block, from a place there on.
pub(crate) struct ToBlocks {
    uploads: Arc<Uploads>,
    blocks: Vec<(Block, u64)>,
    failed: First,
}

impl ToBlocks {
    pub(crate) fn new(uploads: &Arc<Uploads>, blocks: Vec<(Block, u64)>) -> Arc<Self> {
        Arc::new(Self { uploads: uploads.clone(), blocks, failed: First::default() })
    }

    /// Waits for the copies of what has arrived.
    ///
    /// # Errors
    /// What the driver says.
    pub(crate) fn settle(&self) -> Result<()> {
        self.failed.check()?;
        self.uploads.settle()
    }
}

impl Sink for ToBlocks {
    fn chunk(&self, chunk: Chunk) {
        let (block, start) = &self.blocks[chunk.piece];
        let to = block.span(start + chunk.offset, chunk.len() as u64);
        self.failed
            .note(to.map_err(Error::from).and_then(|to| self.uploads.upload_chunk(chunk, to)));
    }

    fn done(&self, _: usize, _: tierstream_io::Result<()>) {}
}

/// A chunk as the bytes of a copy.
struct Arrived(Chunk);

impl AsRef<[u8]> for Arrived {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

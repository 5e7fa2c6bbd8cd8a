//! Weights on their way to a GPU's memory: read in file order, many reads in flight, and copied from
//! the pinned ring as they arrive.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tierstream_cuda::Block;
use tierstream_io::{Chunk, Extent, FileId, Priority, Reader, Sink, Ticket};

use super::{Inner, Progress};
use crate::error::{Error, Result};
use crate::proxy::PlacedTensor;
use crate::uploads::Uploads;

/// How often progress is told, and errors of copies are looked for.
const LOOKED_AT_EVERY: Duration = Duration::from_millis(20);

/// Weights that are being read to where llama.cpp has allocated them. Dropping it stops that, and
/// waits until nothing is written there any more.
pub(super) struct Arriving {
    /// Whose weights they are.
    model: Arc<Inner>,
    reader: Arc<Reader>,
    files: Vec<FileId>,
    uploads: Arc<Uploads>,
    ticket: Ticket,
    fill: Arc<Fill>,
    bytes: u64,
    /// Whether nothing is on its way.
    over: bool,
}

impl Arriving {
    /// Starts to read `tensors` of `file`, whose files `reader` has opened as `files`.
    ///
    /// # Errors
    /// [`Error::SelfCheck`] for a tensor that the file has not, or not of this size.
    pub(super) fn start(
        model: Arc<Inner>,
        file: &tierstream_gguf::Model,
        tensors: &[PlacedTensor],
        reader: Arc<Reader>,
        files: Vec<FileId>,
        uploads: Arc<Uploads>,
    ) -> Result<Self> {
        let mut extents = Vec::with_capacity(tensors.len());
        let mut blocks = Vec::with_capacity(tensors.len());
        for PlacedTensor { name, address, bytes } in tensors {
            let source = file.tensor(name).filter(|tensor| tensor.len == *bytes);
            let Some(source) = source else {
                let what = format!("llama.cpp has a tensor {name} of {bytes} bytes, the file not");
                return Err(Error::SelfCheck(what));
            };
            extents.push(Extent {
                file: files[source.file],
                offset: source.offset,
                len: source.len,
            });
            // SAFETY: a part of a buffer that the model has on this device. The model is held until
            // every copy is done, or for ever: see `drop`.
            blocks.push(unsafe { uploads.gpu().device().borrow(*address, *bytes) });
        }
        let fill = Arc::new(Fill {
            blocks,
            uploads: uploads.clone(),
            arrived_bytes: AtomicU64::new(0),
            failed: Mutex::default(),
        });
        let bytes = extents.iter().map(|e| e.len).sum();
        let ticket = reader.submit(Priority::Bulk, extents, fill.clone());
        Ok(Self { model, reader, files, uploads, ticket, fill, bytes, over: false })
    }

    /// What has gone wrong with copies so far.
    pub(super) fn failed(&self) -> Option<Error> {
        self.fill.check().and_then(|()| self.uploads.settle()).err()
    }

    /// Waits until all is there, and the files are still those that were opened. `progress` goes from
    /// the share of the model's bytes that are not read here to 1.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Gpu`], [`Error::Cancelled`].
    pub(super) fn wait(mut self, all_bytes: u64, progress: Progress<'_>) -> Result<()> {
        let elsewhere = all_bytes.saturating_sub(self.bytes);
        let all = (elsewhere + self.bytes).max(1) as f32;
        while !self.ticket.wait_timeout(LOOKED_AT_EVERY)? {
            self.fill.check()?;
            let arrived = self.fill.arrived_bytes.load(Ordering::Relaxed);
            if !progress((elsewhere + arrived) as f32 / all) {
                return Err(Error::Cancelled);
            }
        }
        self.fill.check()?;
        self.uploads.settle()?;
        self.over = true;
        for &file in &self.files {
            self.reader.file(file)?.check_unchanged()?;
        }
        if progress(1.0) { Ok(()) } else { Err(Error::Cancelled) }
    }
}

impl Drop for Arriving {
    fn drop(&mut self) {
        if self.over {
            return;
        }
        self.ticket.cancel();
        // Whatever it returns, the sink starts no copy after it.
        let _ = self.ticket.wait();
        if self.uploads.synchronize().is_err() {
            // The GPU is lost, and may still write there for all we know. Nor can ggml-cuda free
            // memory of a lost GPU: it would end the process.
            std::mem::forget(self.model.clone());
        }
    }
}

/// Copies what arrives to its place on the GPU.
struct Fill {
    /// Where each piece goes.
    blocks: Vec<Block>,
    uploads: Arc<Uploads>,
    arrived_bytes: AtomicU64,
    /// What went wrong first; the reader has no place for it.
    failed: Mutex<Option<Error>>,
}

impl Fill {
    fn check(&self) -> Result<()> {
        let failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner).clone();
        failed.map_or(Ok(()), Err)
    }
}

impl Sink for Fill {
    fn chunk(&self, chunk: Chunk) {
        let bytes = chunk.len() as u64;
        let to = self.blocks[chunk.piece].span(chunk.offset, bytes);
        let copied = to.map_err(Error::from).and_then(|to| self.uploads.upload_chunk(chunk, to));
        match copied {
            Ok(()) => _ = self.arrived_bytes.fetch_add(bytes, Ordering::Relaxed),
            Err(error) => {
                let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
                failed.get_or_insert(error);
            }
        }
    }

    fn done(&self, _piece: usize, _result: tierstream_io::Result<()>) {}
}

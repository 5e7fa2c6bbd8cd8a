//! Weights on their way to a GPU past host memory: threads that have cuFile read them, block by block.
//! Where it fails, they go through the ring, unless that is not wanted.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tierstream_cuda::Block;
use tierstream_io::{Extent, FileId, Priority, Reader};

use crate::error::{Error, Result};
use crate::gds::{BLOCK_BYTES, Gds, Lane, Source, THREADS};
use crate::uploads::{ToBlocks, Uploads};
use crate::verified::First;

/// What a load has read past host memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GdsRead {
    /// Bytes of weights.
    pub bytes: u64,
    /// Why not all that was to be.
    pub failed: Option<String>,
}

/// What is to be read past host memory.
pub(super) struct Plan {
    gds: Gds,
    sources: Vec<(FileId, Source)>,
    parts: Vec<Part>,
    /// What failed first, if that is no error of the load.
    refused: OnceLock<String>,
}

/// A part of a tensor, in one block of its file.
struct Part {
    extent: Extent,
    to: Block,
    /// Where it begins there.
    at: u64,
}

impl Plan {
    /// Nothing yet, of `files`, as `reader` knows them.
    ///
    /// # Errors
    /// [`Error::Gpu`] if one of them cannot be read that way, and has to be.
    pub(super) fn new(gds: &Gds, reader: &Reader, files: &[FileId]) -> Result<Self> {
        let (gds, refused) = (gds.clone(), OnceLock::new());
        let mut plan = Self { gds, sources: Vec::new(), parts: Vec::new(), refused };
        for &file in files {
            match plan.gds.source(&reader.file(file)?) {
                Ok(source) => plan.sources.push((file, source)),
                Err(error) => plan.refuse(error)?,
            }
        }
        Ok(plan)
    }

    /// Adds what is to be read from `extent` to `to`, unless another way has to bring it.
    pub(super) fn add(&mut self, extent: Extent, to: &Block) -> bool {
        let is_known = self.sources.iter().any(|(file, _)| *file == extent.file);
        if is_known {
            self.parts.extend(cut(extent).map(|(extent, at)| Part { extent, to: to.clone(), at }));
        }
        is_known
    }

    /// Starts to read, in the order of the files.
    pub(super) fn start(mut self, reader: Arc<Reader>, uploads: Arc<Uploads>) -> PastHost {
        self.parts.sort_by_key(|part| (part.extent.file, part.extent.offset));
        let shared = Arc::new(Shared {
            bytes: self.parts.iter().map(|part| part.extent.len).sum(),
            plan: self,
            reader,
            uploads,
            next: AtomicUsize::new(0),
            stopped: AtomicBool::new(false),
            failed: First::default(),
            given_up: AtomicBool::new(false),
            arrived_bytes: AtomicU64::new(0),
            read_bytes: AtomicU64::new(0),
        });
        let (sender, ended) = channel();
        let count = THREADS.min(shared.plan.parts.len());
        let threads = (0..count).map(|_| shared.clone().spawn(sender.clone())).collect();
        PastHost { shared, threads, ended }
    }

    /// Keeps the reason, or fails with it.
    fn refuse(&self, error: Error) -> Result<()> {
        if self.gds.is_required() {
            return Err(error);
        }
        self.refused.get_or_init(|| in_full(&error));
        Ok(())
    }
}

/// Weights that are being read. Dropping it stops that, and waits for the reads that are under way.
pub(super) struct PastHost {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// Closed when all threads have ended.
    ended: Receiver<()>,
}

struct Shared {
    plan: Plan,
    reader: Arc<Reader>,
    uploads: Arc<Uploads>,
    next: AtomicUsize,
    stopped: AtomicBool,
    failed: First,
    /// cuFile has failed to read, and is left alone.
    given_up: AtomicBool,
    bytes: u64,
    arrived_bytes: AtomicU64,
    /// Of these, by cuFile.
    read_bytes: AtomicU64,
}

impl PastHost {
    /// Bytes to be read.
    pub(super) fn bytes(&self) -> u64 {
        self.shared.bytes
    }

    /// Bytes that are there.
    pub(super) fn arrived_bytes(&self) -> u64 {
        self.shared.arrived_bytes.load(Ordering::Relaxed)
    }

    /// What has come past host memory.
    pub(super) fn read(&self) -> GdsRead {
        let bytes = self.shared.read_bytes.load(Ordering::Relaxed);
        GdsRead { bytes, failed: self.shared.plan.refused.get().cloned() }
    }

    /// The error, if something has gone wrong.
    pub(super) fn check(&self) -> Result<()> {
        self.shared.failed.check()
    }

    /// Whether all is there, waiting for so long at most.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Gpu`].
    pub(super) fn wait_timeout(&self, most: Duration) -> Result<bool> {
        match self.ended.recv_timeout(most) {
            Err(RecvTimeoutError::Disconnected) => {
                self.check()?;
                if self.arrived_bytes() < self.bytes() {
                    return Err(Error::Internal("a thread that reads to the GPU is gone".into()));
                }
                Ok(true)
            }
            _ => self.check().map(|()| false),
        }
    }
}

impl Drop for PastHost {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // One that has panicked does nothing any more either.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn spawn(self: Arc<Self>, ends: Sender<()>) -> JoinHandle<()> {
        thread::spawn(move || {
            let worked = self.work();
            if worked.is_err() {
                self.stopped.store(true, Ordering::Relaxed);
            }
            self.failed.note(worked);
            drop(ends);
        })
    }

    fn work(&self) -> Result<()> {
        let lane = match self.plan.gds.lane(BLOCK_BYTES) {
            Ok(lane) => Some(lane),
            Err(error) => self.plan.refuse(error).map(|()| None)?,
        };
        while !self.stopped.load(Ordering::Relaxed)
            && let Some(part) = self.plan.parts.get(self.next.fetch_add(1, Ordering::Relaxed))
        {
            self.bring(part, lane.as_ref())?;
            self.arrived_bytes.fetch_add(part.extent.len, Ordering::Relaxed);
        }
        Ok(())
    }

    fn bring(&self, part: &Part, lane: Option<&Lane>) -> Result<()> {
        let Extent { file, offset, len } = part.extent;
        let source = self.plan.sources.iter().find(|(of, _)| *of == file);
        if let (Some(lane), Some((_, source))) = (lane, source)
            && !self.given_up.load(Ordering::Relaxed)
        {
            match lane.read(source, offset, len) {
                Ok(at) => {
                    lane.copy(at, part.to.span(part.at, len)?)?;
                    self.read_bytes.fetch_add(len, Ordering::Relaxed);
                    return Ok(());
                }
                // If it is the drive's fault, the ring's read tells.
                Err(error) => {
                    self.given_up.store(true, Ordering::Relaxed);
                    self.plan.refuse(error)?;
                }
            }
        }
        self.bring_through_ring(part)
    }

    fn bring_through_ring(&self, part: &Part) -> Result<()> {
        let sink = ToBlocks::new(&self.uploads, vec![(part.to.clone(), part.at)]);
        self.reader.submit(Priority::Bulk, vec![part.extent], sink.clone()).wait()?;
        sink.settle()
    }
}

/// Parts of an extent, each in one block of the file, and where they begin in the extent.
fn cut(extent: Extent) -> impl Iterator<Item = (Extent, u64)> {
    let Extent { file, offset: start, len } = extent;
    let mut at = start;
    std::iter::from_fn(move || {
        let end = ((at / BLOCK_BYTES + 1) * BLOCK_BYTES).min(start + len);
        let part = Extent { file, offset: at, len: end - at };
        at = end;
        (part.len > 0).then_some((part, part.offset - start))
    })
}

/// An error with all its sources.
fn in_full(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_an_extent_and_end_with_blocks() {
        let lens = [1, 5, 4095, 4096, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 20 << 20];
        for start in [0, 32, BLOCK_BYTES - 32, BLOCK_BYTES, 3 * BLOCK_BYTES + 4096] {
            for len in lens {
                let mut next = 0;
                for (part, at) in cut(Extent { file: FileId(2), offset: start, len }) {
                    assert_eq!((part.file, part.offset, at), (FileId(2), start + next, next));
                    let last = part.offset + part.len - 1;
                    assert_eq!(part.offset / BLOCK_BYTES, last / BLOCK_BYTES);
                    next += part.len;
                }
                assert_eq!(next, len);
            }
        }
        assert_eq!(cut(Extent { file: FileId(0), offset: 7, len: 0 }).count(), 0);
    }
}

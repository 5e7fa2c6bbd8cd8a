//! Weights on their way to where llama.cpp has allocated them: read in file order, many reads in
//! flight. Straight to host memory; to a GPU's by copies from the pinned ring as they arrive, or past
//! host memory, see `past_host.rs`.

use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tierstream_cuda::Block;
use tierstream_io::mapped::populate;
use tierstream_io::{Ahead, Chunk, Extent, FileId, PAGE, Place, Priority, Reader, Sink, Ticket};

use super::checking::Checking;
use super::converting::Converting;
use super::past_host::{PastHost, Plan};
use super::{Inner, Progress};
use crate::cached::Cached;
use crate::capture::{At, Unread};
use crate::error::{Error, Result};
use crate::gds::Gds;
use crate::uploads::Uploads;
use crate::verified::{Chunks, First, Stream};

/// How often progress is told, and errors of copies are looked for.
pub(super) const LOOKED_AT_EVERY: Duration = Duration::from_millis(20);

/// The most bytes of host memory that are read as one piece: progress goes by these. A multiple of
/// every alignment that direct reads ask for.
const PIECE_BYTES: u64 = 16 << 20;

/// Weights that are being read. Dropping it stops that, and waits until nothing is written there any
/// more.
pub(super) struct Arriving {
    /// Whose weights they are.
    model: Arc<Inner>,
    reader: Arc<Reader>,
    files: Vec<FileId>,
    ticket: Ticket,
    fill: Arc<Fill>,
    converting: Converting,
    past_host: Option<PastHost>,
    /// Addresses of pages that a file has in the page cache, and of the piece that is there.
    mapped: Vec<(Range<usize>, Range<usize>)>,
    _ahead: Ahead,
    bytes: u64,
    /// Whether nothing is on its way.
    over: bool,
}

impl Arriving {
    /// Starts to read the tensors `unread` of `file`, whose files `reader` has opened as `files`;
    /// those in a GPU's memory through `uploads`, or past host memory with `gds`, but for what the page
    /// cache has, and what is compared with checksums.
    ///
    /// # Errors
    /// [`Error::SelfCheck`] for a tensor that the file has not, or not of this size; [`Error::Gpu`] if
    /// `gds` is required, and refuses a file.
    pub(super) fn start(
        model: Arc<Inner>,
        file: &tierstream_gguf::Model,
        unread: &[Unread],
        reader: Arc<Reader>,
        files: &[FileId],
        uploads: Option<Arc<Uploads>>,
        gds: Option<&Gds>,
    ) -> Result<Self> {
        let checksums = model.checksums.clone();
        let mut checked = Vec::new();
        let mut pieces = Vec::with_capacity(unread.len());
        let mut on_host = Vec::new();
        let cached = Cached::new(&reader, files)?.leased()?;
        let mut converting = Converting::default();
        let mut past_host = gds.map(|gds| Plan::new(gds, &reader, files)).transpose()?;
        for Unread { name, bytes, at: place } in unread {
            let source = file.tensor(name).filter(|tensor| tensor.len == *bytes);
            let Some(source) = source else {
                let what = format!("llama.cpp has a tensor {name} of {bytes} bytes, the file not");
                return Err(Error::SelfCheck(what));
            };
            let check = match &checksums {
                Some(checksums) => checksums.of(name)?,
                None => None,
            };
            if let (At::Host { address, .. }, Some(check)) = (place, &check) {
                checked.push((*address..address + source.len as usize, check.clone()));
            }
            let mut at = 0;
            for (nth, extent) in source.extents().enumerate() {
                let (file, offset, len) = (files[extent.file], extent.offset, extent.len);
                let extent = Extent { file, offset, len };
                match (place.further(at), &uploads) {
                    (At::Host { address, in_file_order }, _) => {
                        on_host.push(Run { extent, address, in_file_order });
                    }
                    (At::Device(address), Some(uploads)) => {
                        // SAFETY: a part of a buffer that the model has on this device. The model is
                        // held until every copy is done, or for ever: see `drop`.
                        let block = unsafe { uploads.gpu().device().borrow(address, len) };
                        let source = cached.source(extent);
                        // Bytes are hashed in host memory, and others are there already.
                        let is_past_host = check.is_none()
                            && source == extent
                            && past_host.as_mut().is_some_and(|plan| plan.add(extent, &block));
                        if !is_past_host {
                            let check = check.as_ref().map(|of| Stream::from(of.clone(), nth));
                            let check = check.map(|check| Box::new(Chunks::new(check)));
                            pieces.push((source, Target::Device(block, check)));
                        }
                    }
                    (At::Device(_), None) => {
                        return Err(Error::Internal(format!(
                            "{name} is on a GPU that is not used"
                        )));
                    }
                    (At::Converted { .. }, _) if len < *bytes => {
                        return Err(Error::Internal(format!("{name} is converted, and in pieces")));
                    }
                    // SAFETY: a live tensor of the model, which is held.
                    (At::Converted { tensor }, _) => unsafe {
                        converting
                            .add(extent, tensor, check.clone(), |extent| cached.source(extent));
                    },
                }
                at += len;
            }
        }
        let runs = joined(on_host);
        let mut mapped = Vec::new();
        let mut mapped_bytes = 0;
        let mut fresh = Vec::new();
        for (in_file_order, (extent, target)) in
            runs.into_iter().flat_map(|run| run.cut().map(move |piece| (run.in_file_order, piece)))
        {
            let start = target.at.addr().get();
            let memory = start..start + extent.len as usize;
            if in_file_order {
                // SAFETY: whole pages of a buffer of the model's, which outlives what is mapped
                // (`Inner::mapped`); they hold what is next to the piece in its file, or nothing.
                if let Some(pages) = unsafe { cached.map(extent, target.at) }? {
                    mapped.push((pages, memory));
                    mapped_bytes += extent.len;
                    continue;
                }
            }
            fresh.push(memory);
            pieces.push((cached.source(extent), Target::Host(target)));
        }
        model.note_cached((cached.taken(), cached.why()));
        model.hold_mapped(cached.into_mapped());
        let ahead = Ahead::start(fresh);
        let past_host = past_host.zip(uploads.clone());
        let past_host = past_host.map(|(plan, uploads)| plan.start(reader.clone(), uploads));
        let read_bytes = pieces.iter().map(|(extent, _)| extent.len).sum::<u64>();
        let bytes = read_bytes
            + mapped_bytes
            + converting.bytes()
            + past_host.as_ref().map_or(0, PastHost::bytes);
        let (extents, targets): (Vec<Extent>, Vec<Target>) = pieces.into_iter().unzip();
        let fill = Arc::new(Fill {
            lens: extents.iter().map(|extent| extent.len).collect(),
            targets,
            uploads,
            arrived_bytes: AtomicU64::new(0),
            failed: First::default(),
            // SAFETY: tensors of the model, which the sink holds. A piece has arrived when it is done, and
            // nothing is read to its pages then: `lay_out` and `cut` see to that.
            checking: unsafe { Checking::new(checked) },
            _model: model.clone(),
        });
        let ticket = reader.submit(Priority::Bulk, extents, fill.clone());
        let files = files.to_vec();
        Ok(Self {
            model,
            reader,
            files,
            ticket,
            fill,
            converting,
            past_host,
            mapped,
            _ahead: ahead,
            bytes,
            over: false,
        })
    }

    /// What has gone wrong so far.
    pub(super) fn failed(&self) -> Option<Error> {
        self.check().and_then(|()| self.fill.settle()).err()
    }

    fn check(&self) -> Result<()> {
        self.fill.check()?;
        self.past_host.as_ref().map_or(Ok(()), PastHost::check)
    }

    /// Waits until all is there, and the files are still those that were opened. `progress` goes from
    /// the share of the model's bytes that are not read here to 1.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Gpu`], [`Error::Cancelled`], [`Error::Checksum`].
    pub(super) fn wait(mut self, all_bytes: u64, progress: Progress<'_>) -> Result<()> {
        let elsewhere = all_bytes.saturating_sub(self.bytes);
        let all = (elsewhere + self.bytes).max(1) as f32;
        let mut tell = |here: &Self| {
            let arrived = here.fill.arrived_bytes.load(Ordering::Relaxed);
            let past_host = here.past_host.as_ref().map_or(0, PastHost::arrived_bytes);
            let done = elsewhere + arrived + past_host + here.converting.done_bytes();
            if progress((done as f32 / all).min(1.0)) { Ok(()) } else { Err(Error::Cancelled) }
        };
        let read = || {
            for (pages, piece) in &self.mapped {
                let mut told = Ok(());
                let populated = populate(pages.clone(), |bytes| {
                    self.fill.arrived_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
                    told = tell(&self);
                    told.is_ok()
                });
                told?;
                populated.map_err(|error| Error::Backend(format!("a mapped file: {error}")))?;
                self.fill.checking.arrived(piece.clone());
            }
            while !self.ticket.wait_timeout(LOOKED_AT_EVERY)? {
                self.check()?;
                tell(&self)?;
            }
            if let Some(past_host) = &self.past_host {
                while !past_host.wait_timeout(LOOKED_AT_EVERY)? {
                    tell(&self)?;
                }
            }
            while !self.converting.wait_timeout(LOOKED_AT_EVERY)? {
                tell(&self)?;
            }
            self.fill.check()?;
            self.fill.settle()?;
            while !self.fill.checking.wait_timeout(LOOKED_AT_EVERY)? {
                tell(&self)?;
            }
            Ok(())
        };
        let checking = &self.fill.checking;
        checking.while_working(|| self.converting.while_working(&self.reader, read))?;
        self.over = true;
        if let Some(past_host) = &self.past_host {
            self.model.note_gds_read(past_host.read());
        }
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
        self.past_host = None;
        // Whatever it returns, the sink starts no copy after it.
        let _ = self.ticket.wait();
        let Some(uploads) = &self.fill.uploads else { return };
        if uploads.synchronize().is_err() {
            // The GPU is lost, and may still write there for all we know. Nor can ggml-cuda free
            // memory of a lost GPU: it would end the process.
            std::mem::forget(self.model.clone());
        }
    }
}

/// A part of a file, and the host memory that it goes to.
#[derive(Debug, Clone, Copy)]
struct Run {
    extent: Extent,
    address: usize,
    /// As [`At::Host`] has it.
    in_file_order: bool,
}

impl Run {
    /// As pieces, each of whole blocks of the file, but for the first one's start and the last one's end.
    fn cut(self) -> impl Iterator<Item = (Extent, Host)> {
        let Run { extent: Extent { file, offset: start, len }, address, in_file_order } = self;
        let end = start + len;
        let mut at = start;
        std::iter::from_fn(move || {
            if at == end {
                return None;
            }
            let next = (at / PIECE_BYTES + 1) * PIECE_BYTES;
            let (offset, len) = (at, next.min(end) - at);
            at += len;
            let room = |bytes: u64| if in_file_order { bytes as usize % PAGE } else { 0 };
            let target = Host {
                at: NonNull::new(std::ptr::with_exposed_provenance_mut(
                    address + (offset - start) as usize,
                ))
                .expect("tensors are not at address 0"),
                before: room(offset),
                after: room((PAGE - at as usize % PAGE) as u64),
            };
            Some((Extent { file, offset, len }, target))
        })
    }
}

/// Neighbours in a file that are neighbours in memory too become one.
fn joined(mut runs: Vec<Run>) -> Vec<Run> {
    runs.sort_by_key(|run| (run.extent.file, run.extent.offset, run.address));
    let mut all: Vec<Run> = Vec::with_capacity(runs.len());
    for run in runs {
        if let Some(last) = all.last_mut()
            && last.in_file_order
            && run.in_file_order
            && last.extent.file == run.extent.file
            && let Some(apart) = run.extent.offset.checked_sub(last.extent.offset)
            && apart < last.extent.len + PAGE as u64
            && run.address.checked_sub(last.address) == usize::try_from(apart).ok()
        {
            last.extent.len = last.extent.len.max(apart + run.extent.len);
            continue;
        }
        all.push(run);
    }
    all
}

/// Where a piece goes.
enum Target {
    /// With what is compared on its way.
    Device(Block, Option<Box<Chunks>>),
    Host(Host),
}

/// Host memory of a piece, and the room around it that may be written to as well: bytes.
struct Host {
    at: NonNull<u8>,
    before: usize,
    after: usize,
}

/// Takes what arrives to its place.
struct Fill {
    targets: Vec<Target>,
    lens: Vec<u64>,
    uploads: Option<Arc<Uploads>>,
    arrived_bytes: AtomicU64,
    /// What went wrong first; the reader has no place for it.
    failed: First,
    checking: Checking,
    /// Keeps the memory while reads are under way.
    _model: Arc<Inner>,
}

// SAFETY: the addresses are of a model that is being loaded, which nobody computes with; it is held.
unsafe impl Send for Fill {}
// SAFETY: distinct pieces, and distinct chunks of them, cover distinct bytes.
unsafe impl Sync for Fill {}

impl Fill {
    fn check(&self) -> Result<()> {
        self.failed.check().and_then(|()| self.checking.check())
    }

    /// Waits for the copies that were started.
    fn settle(&self) -> Result<()> {
        self.uploads.as_ref().map_or(Ok(()), |uploads| uploads.settle())
    }

    fn upload(&self, chunk: Chunk, block: &Block) -> Result<()> {
        let uploads = self.uploads.as_ref().ok_or_else(|| Error::Internal("no uploads".into()))?;
        let to = block.span(chunk.offset, chunk.len() as u64)?;
        uploads.upload_chunk(chunk, to)
    }
}

impl Sink for Fill {
    fn chunk(&self, chunk: Chunk) {
        let bytes = chunk.len() as u64;
        match &self.targets[chunk.piece] {
            Target::Device(block, check) => {
                let checked = check.as_ref().map(|check| (check, chunk.share()));
                let uploaded = self.upload(chunk, block);
                if uploaded.is_ok() {
                    self.arrived_bytes.fetch_add(bytes, Ordering::Relaxed);
                }
                self.failed.note(uploaded);
                // The copy is under way meanwhile.
                self.failed.note(checked.map_or(Ok(()), |(check, chunk)| check.take(&chunk)));
            }
            Target::Host(host) => {
                assert!(
                    chunk.offset + bytes <= self.lens[chunk.piece],
                    "chunks lie in their piece"
                );
                // SAFETY: a part of the piece's memory, which is the model's; see `Send`.
                unsafe {
                    let to = host.at.as_ptr().add(chunk.offset as usize);
                    std::ptr::copy_nonoverlapping(chunk.as_ptr(), to, chunk.len());
                }
            }
        }
    }

    fn place(&self, piece: usize) -> Option<Place> {
        let Target::Host(Host { at, before, after }) = self.targets[piece] else { return None };
        // SAFETY: the piece's memory and the room around it are in a buffer of the model, which the
        // sink holds, from new pages of the system; nobody looks at it before the model is loaded. The
        // pages at the ends are no other piece's: `lay_out` and `cut` see to that.
        Some(unsafe { Place::new(at, before, after) })
    }

    fn done(&self, piece: usize, result: tierstream_io::Result<()>) {
        match &self.targets[piece] {
            Target::Host(host) if result.is_ok() => {
                let (at, len) = (host.at.addr().get(), self.lens[piece]);
                self.arrived_bytes.fetch_add(len, Ordering::Relaxed);
                self.checking.arrived(at..at + len as usize);
            }
            Target::Host(_) => {}
            Target::Device(_, check) => check.iter().for_each(|check| check.end()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(offset: u64, len: u64, address: usize, in_file_order: bool) -> Run {
        Run { extent: Extent { file: FileId(0), offset, len }, address, in_file_order }
    }

    fn spans(runs: Vec<Run>) -> Vec<(u64, u64, usize)> {
        let span = |run: Run| (run.extent.offset, run.extent.len, run.address);
        joined(runs).into_iter().map(span).collect()
    }

    #[test]
    fn what_lies_together_in_both_places_is_read_together() {
        let (a, b) = (run(100, 50, 8292, true), run(160, 40, 8352, true));
        assert_eq!(spans(vec![b, a]), [(100, 100, 8292)]);
        // Not if it is somewhere else, the same once more, or far away.
        assert_eq!(spans(vec![a, run(160, 40, 8384, true)]).len(), 2);
        assert_eq!(spans(vec![a, run(160, 40, 8352, false)]).len(), 2);
        assert_eq!(spans(vec![a, run(100, 50, 4196, true)]).len(), 2);
        assert_eq!(spans(vec![a, run(100 + 9000, 40, 8292 + 9000, true)]).len(), 2);
        let mut other = b;
        other.extent.file = FileId(1);
        assert_eq!(spans(vec![a, other]).len(), 2);
    }

    #[test]
    fn pieces_cover_a_run_in_whole_blocks() {
        for (start, len) in
            [(100, 50), (PIECE_BYTES - 1, 2), (4096, 3 * PIECE_BYTES), (777, 40 << 20)]
        {
            for in_file_order in [true, false] {
                let at = 1 << 30 | (start as usize % PAGE);
                let mut next = start;
                for (extent, host) in run(start, len, at, in_file_order).cut() {
                    assert_eq!(extent.offset, next);
                    assert_eq!(host.at.addr().get(), at + (next - start) as usize);
                    next += extent.len;
                    let is_first = extent.offset == start;
                    let is_last = next == start + len;
                    assert!(is_first || extent.offset.is_multiple_of(PAGE as u64));
                    assert!(is_last || next.is_multiple_of(PAGE as u64));
                    let before = if in_file_order { extent.offset as usize % PAGE } else { 0 };
                    let after = (next as usize).next_multiple_of(PAGE) - next as usize;
                    let after = if in_file_order { after } else { 0 };
                    assert_eq!((host.before, host.after), (before, after));
                }
                assert_eq!(next, start + len);
            }
        }
    }
}

//! Reads many pieces in order, some of them ahead.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use tierstream_gguf::{Extent, FileIdentity, FileInfo};
use tierstream_io::{Chunk, FileId, Priority, Reader, Sink, Ticket};

use crate::error::Result;

/// Bytes that are read and handed out together, at most: what reading takes of memory is a few times
/// as much.
const PIECE_BYTES: u64 = 8 << 20;

/// Bytes that are read ahead, and the most pieces that they are in.
const AHEAD_BYTES: u64 = 3 * PIECE_BYTES;
const AHEAD_PIECES: usize = 64;

/// A part of a unit, or all of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Which one.
    pub(crate) unit: usize,
    /// Where in it these bytes begin.
    pub(crate) start: u64,
    pub(crate) is_last: bool,
    len: u64,
    /// What is read, and where in the piece it goes. Zeros lie between.
    extents: Vec<(Extent, u64)>,
}

impl Piece {
    /// Cuts a unit of `len` bytes into pieces.
    pub(crate) fn cut(
        unit: usize,
        len: u64,
        extents: Vec<(Extent, u64)>,
    ) -> impl Iterator<Item = Piece> {
        let mut start = 0;
        std::iter::from_fn(move || {
            let first = start == 0;
            if start == len && !(first && len == 0) || start > len {
                return None;
            }
            let end = len.min(start + PIECE_BYTES);
            let within = |&(extent, at): &(Extent, u64)| {
                let (from, to) = (at.max(start), (at + extent.len).min(end));
                let offset = extent.offset + from.saturating_sub(at);
                (from < to).then(|| (Extent { offset, len: to - from, ..extent }, from - start))
            };
            let extents = extents.iter().filter_map(within).collect();
            let piece = Piece { unit, start, is_last: end == len, len: end - start, extents };
            start = if end == len { len + 1 } else { end };
            Some(piece)
        })
    }
}

/// Pieces that are read ahead while the one before is used.
pub(crate) struct Feed {
    reader: Arc<Reader>,
    files: Vec<FileId>,
    waiting: VecDeque<Piece>,
    coming: VecDeque<(Piece, Ticket, Arc<Gather>)>,
}

impl Feed {
    /// Extents name `files` by their place.
    pub(crate) fn new(reader: Arc<Reader>, files: Vec<FileId>) -> Self {
        Self { reader, files, waiting: VecDeque::new(), coming: VecDeque::new() }
    }

    /// To be read behind what was added before.
    pub(crate) fn add(&mut self, pieces: impl Iterator<Item = Piece>) {
        self.waiting.extend(pieces);
    }

    /// The next piece; `None` at the end.
    ///
    /// # Errors
    /// Of its reads.
    pub(crate) fn next(&mut self) -> Result<Option<(Piece, Vec<u8>)>> {
        let mut ahead_bytes: u64 = self.coming.iter().map(|(piece, ..)| piece.len).sum();
        while (self.coming.is_empty() || ahead_bytes < AHEAD_BYTES)
            && self.coming.len() < AHEAD_PIECES
            && let Some(piece) = self.waiting.pop_front()
        {
            ahead_bytes += piece.len;
            let starts = piece.extents.iter().map(|(_, at)| *at as usize).collect();
            let bytes = Mutex::new(vec![0; piece.len as usize]);
            let gather = Arc::new(Gather { starts, bytes });
            let extents = piece.extents.iter().map(|(Extent { file, offset, len }, _)| {
                tierstream_io::Extent { file: self.files[*file], offset: *offset, len: *len }
            });
            let extents = extents.collect();
            let ticket = self.reader.submit(Priority::Bulk, extents, gather.clone());
            self.coming.push_back((piece, ticket, gather));
        }
        let Some((piece, ticket, gather)) = self.coming.pop_front() else { return Ok(None) };
        ticket.wait()?;
        let bytes = std::mem::take(&mut *lock(&gather.bytes));
        Ok(Some((piece, bytes)))
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.coming.iter().for_each(|(_, ticket, _)| ticket.cancel());
    }
}

/// Puts what is read into one buffer.
struct Gather {
    starts: Vec<usize>,
    bytes: Mutex<Vec<u8>>,
}

impl Sink for Gather {
    fn chunk(&self, chunk: Chunk) {
        let at = self.starts[chunk.piece] + chunk.offset as usize;
        lock(&self.bytes)[at..at + chunk.len()].copy_from_slice(&chunk);
    }

    fn done(&self, _: usize, _: tierstream_io::Result<()>) {}
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Opens a file whose header has been read.
///
/// # Errors
/// [`tierstream_io::Error::Changed`] if it is another one now.
pub(crate) fn open(reader: &Reader, file: &FileInfo) -> Result<FileId> {
    let id = reader.open(&file.path)?;
    let opened = reader.file(id)?;
    let (device, inode) = opened.device_inode();
    let identity = FileIdentity { device, inode, modified: opened.modified() };
    if opened.size() != file.len || file.identity.is_some_and(|known| known != identity) {
        let what = "it was exchanged or written to since its header was read".into();
        let path = file.path.as_path().into();
        return Err(tierstream_io::Error::Changed { path, what }.into());
    }
    Ok(id)
}

/// Fails if one of the files was written to since it was opened.
pub(crate) fn check_unchanged(reader: &Reader, files: &[FileId]) -> Result<()> {
    Ok(files.iter().try_for_each(|&file| reader.file(file)?.check_unchanged())?)
}

//! Brings named tensors from the drive: into memory of their own, or to the caller.

mod image;

use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::Duration;

use tierstream_io::{Chunk, Extent, FileId, Pages, Placed, Priority, Reader, Sink, Ticket};

use self::image::Image;
use crate::Result;
use crate::checkpoint::Checkpoint;
use crate::error::{Error, ErrorKind};
use crate::tensor::Tensor;

/// How long a load goes on before it asks again whether it should, if nothing arrives.
const ASK_EVERY: Duration = Duration::from_millis(100);

/// How far a load has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// Bytes of the wanted tensors that have arrived.
    pub bytes_done: u64,
    /// Bytes of all wanted tensors.
    pub bytes_total: u64,
}

/// Loads tensors of one checkpoint through one reader. May be used by several threads at once.
///
/// All files' reads are queued at once, in file order, behind everything of a higher priority than
/// [`Priority::Bulk`]. After a load the files are looked at: one that has changed since its header
/// was read is an error, as far as its length and its time of modification tell.
pub struct Loader {
    reader: Arc<Reader>,
    checkpoint: Arc<Checkpoint>,
    /// As [`Checkpoint::files`].
    files: Vec<FileId>,
}

impl Loader {
    /// Opens the files of `checkpoint` in `reader`, where they stay open as long as that lives:
    /// keep the loader rather than make another.
    ///
    /// # Errors
    /// [`ErrorKind::Reader`] where a file cannot be opened, or is no longer what its header was
    /// read from.
    pub fn new(reader: Arc<Reader>, checkpoint: impl Into<Arc<Checkpoint>>) -> Result<Self> {
        let checkpoint = checkpoint.into();
        let mut files = Vec::with_capacity(checkpoint.files().len());
        for info in checkpoint.files() {
            let file = reader.open(&info.path)?;
            info.check_same(&*reader.file(file)?)?;
            files.push(file);
        }
        Ok(Self { reader, checkpoint, files })
    }

    /// What it loads.
    pub fn checkpoint(&self) -> &Arc<Checkpoint> {
        &self.checkpoint
    }

    /// The reader, whose [`status`](Reader::status) tells which way the bytes take.
    pub fn reader(&self) -> &Arc<Reader> {
        &self.reader
    }

    /// Loads tensors into memory that is allocated for them, all at once. Blocks until they are
    /// there.
    ///
    /// Direct reads land where the bytes stay: a tensor's address is as far off a multiple of
    /// [`tierstream_io::PAGE`] as its offset in its file. So it is aligned for its type if it is so
    /// in the file, which the `safetensors` package sees to when it writes one. Neighbours in a file
    /// are neighbours in memory.
    ///
    /// `progress` is asked on this thread whether to go on, whenever something has arrived and ten
    /// times a second besides.
    ///
    /// # Errors
    /// [`ErrorKind::UnknownTensor`] before anything is read; [`ErrorKind::Reader`] with the tensor
    /// whose bytes could not be had; [`ErrorKind::Cancelled`].
    pub fn load<N: AsRef<str>>(
        &self,
        names: impl IntoIterator<Item = N>,
        progress: impl FnMut(Progress) -> bool,
    ) -> Result<Loaded> {
        let names = names.into_iter();
        let wanted = names.map(|name| self.position(name.as_ref())).collect::<Result<Vec<_>>>()?;
        self.load_positions(wanted, progress)
    }

    /// Loads all tensors of the checkpoint, see [`load`](Self::load).
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_all(&self, progress: impl FnMut(Progress) -> bool) -> Result<Loaded> {
        self.load_positions((0..self.checkpoint.tensors().len()).collect(), progress)
    }

    fn load_positions(
        &self,
        wanted: Vec<usize>,
        mut progress: impl FnMut(Progress) -> bool,
    ) -> Result<Loaded> {
        let tensors = self.checkpoint.tensors();
        let image = Image::new(tensors, &wanted)?;
        let pages = Pages::new(image.bytes)?;
        let placed = image.pieces.iter().map(|piece| {
            let extent =
                Extent { file: self.files[piece.file], offset: piece.offset, len: piece.len };
            Placed { extent, at: piece.at }
        });
        let (sender, events) = mpsc::channel();
        let told = Box::new(move |piece, result: &tierstream_io::Result<()>| {
            // Whoever has stopped listening has cancelled.
            let _ = sender.send(Event::Done(piece, result.clone()));
        });
        let fill = self.reader.fill(Priority::Bulk, pages, placed.collect(), told)?;
        let mut now = Progress { bytes_done: 0, bytes_total: image.wanted_bytes };
        let mut failed = None;
        let followed = follow(fill.ticket(), &events, image.pieces.len(), |event| {
            match event {
                Some(Event::Done(piece, Ok(()))) => now.bytes_done += image.pieces[piece].wanted,
                Some(Event::Done(piece, Err(error))) => failed = Some((piece, error)),
                Some(Event::Chunk(_)) | None => {}
            }
            failed.is_none() && progress(now)
        });
        drop(events);
        let filled = fill.wait();
        if let Some((piece, error)) = failed {
            return Err(self.blame(&image, &wanted, piece, error));
        }
        followed?;
        let pages = filled?;
        self.check_unchanged(&wanted)?;
        let starts = wanted.iter().map(|position| image.start(*position)).collect();
        Ok(Loaded(Arc::new(Inner {
            checkpoint: Arc::clone(&self.checkpoint),
            pages,
            by_name: by_name(tensors, &wanted),
            wanted,
            starts,
        })))
    }

    /// Loads tensors into buffers of the caller's, each as long as its tensor. Blocks until they
    /// are there. The bytes are copied once on their way, by this thread; [`load`](Self::load) does
    /// without. After an error the contents of the buffers are unspecified.
    ///
    /// `progress` is asked as by [`load`](Self::load).
    ///
    /// # Errors
    /// As [`load`](Self::load); [`ErrorKind::BufferLen`] before anything is read.
    pub fn load_into<'b, N: AsRef<str>>(
        &self,
        buffers: impl IntoIterator<Item = (N, &'b mut [u8])>,
        mut progress: impl FnMut(Progress) -> bool,
    ) -> Result<()> {
        let (mut wanted, mut into) = (Vec::new(), Vec::new());
        for (name, buffer) in buffers {
            let position = self.position(name.as_ref())?;
            let (expected, found) = (self.checkpoint.tensors()[position].len, buffer.len() as u64);
            if expected != found {
                let error = Error::from(ErrorKind::BufferLen { expected, found });
                return Err(error.in_tensor(name.as_ref()));
            }
            wanted.push(position);
            into.push(buffer);
        }
        let bytes_total = into.iter().map(|buffer| buffer.len() as u64).sum();
        let mut now = Progress { bytes_done: 0, bytes_total };
        self.bring(&wanted, |chunk| {
            if let Some(chunk) = chunk {
                let at = chunk.offset as usize;
                into[chunk.piece][at..at + chunk.len()].copy_from_slice(&chunk);
                now.bytes_done += chunk.len() as u64;
            }
            progress(now)
        })
    }

    /// Gives the bytes of tensors to `take`, on this thread, as they arrive: in any order, each
    /// byte once. [`Chunk::piece`] counts the names, [`Chunk::offset`] the bytes of the tensor. A
    /// chunk may be kept, as for a copy that is under way; it holds a buffer of the reader's ring.
    /// What `take` returns says whether to go on. Blocks until all is there.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn stream<N: AsRef<str>>(
        &self,
        names: impl IntoIterator<Item = N>,
        mut take: impl FnMut(Chunk) -> bool,
    ) -> Result<()> {
        let names = names.into_iter();
        let wanted = names.map(|name| self.position(name.as_ref())).collect::<Result<Vec<_>>>()?;
        self.bring(&wanted, |chunk| chunk.is_none_or(&mut take))
    }

    /// Calls `take` with each chunk, and ten times a second with none, until it returns false.
    fn bring(&self, wanted: &[usize], mut take: impl FnMut(Option<Chunk>) -> bool) -> Result<()> {
        let tensors = self.checkpoint.tensors();
        let extents = wanted.iter().map(|position| {
            let Tensor { file, offset, len, .. } = tensors[*position];
            Extent { file: self.files[file], offset, len }
        });
        let (sender, events) = mpsc::channel();
        let sink = Arc::new(Pass(sender));
        let ticket = self.reader.submit(Priority::Bulk, extents.collect(), sink);
        let mut failed = None;
        let followed = follow(&ticket, &events, wanted.len(), |event| match event {
            Some(Event::Chunk(chunk)) => take(Some(chunk)),
            Some(Event::Done(_, Ok(()))) => true,
            Some(Event::Done(piece, Err(error))) => {
                failed = Some((piece, error));
                false
            }
            None => take(None),
        });
        // With the chunks that nobody wants any more, for whose buffers others may wait.
        drop(events);
        let ended = ticket.wait();
        if let Some((piece, error)) = failed {
            return Err(Error::from(error).in_tensor(&tensors[wanted[piece]].name));
        }
        followed?;
        ended?;
        self.check_unchanged(wanted)
    }

    fn position(&self, name: &str) -> Result<usize> {
        let position = self.checkpoint.position(name);
        position.ok_or_else(|| Error::from(ErrorKind::UnknownTensor).in_tensor(name))
    }

    /// The first wanted tensor that misses bytes for this error of a piece.
    fn blame(
        &self,
        image: &Image,
        wanted: &[usize],
        piece: usize,
        error: tierstream_io::Error,
    ) -> Error {
        let piece = &image.pieces[piece];
        let offset = match &error {
            tierstream_io::Error::Read { offset, .. }
            | tierstream_io::Error::Truncated { offset, .. } => *offset,
            _ => 0,
        };
        let from = offset.max(piece.offset);
        let tensors = self.checkpoint.tensors();
        let hit =
            |tensor: &&Tensor| tensor.file == piece.file && tensor.end() > from && tensor.len > 0;
        let tensors = wanted.iter().map(|position| &tensors[*position]).filter(hit);
        let error = Error::from(error);
        match tensors.min_by_key(|tensor| tensor.offset) {
            Some(tensor) => error.in_tensor(&tensor.name),
            None => error,
        }
    }

    fn check_unchanged(&self, wanted: &[usize]) -> Result<()> {
        let tensors = self.checkpoint.tensors();
        let mut files: Vec<usize> = wanted.iter().map(|position| tensors[*position].file).collect();
        files.sort_unstable();
        files.dedup();
        for file in files {
            self.reader.file(self.files[file])?.check_unchanged()?;
        }
        Ok(())
    }
}

impl fmt::Debug for Loader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Loader")
            .field("files", &self.files.len())
            .field("reader", &self.reader)
            .finish_non_exhaustive()
    }
}

/// Tensors in memory of their own. Clones share it; it is given back with the last of them.
#[derive(Clone)]
pub struct Loaded(Arc<Inner>);

struct Inner {
    checkpoint: Arc<Checkpoint>,
    pages: Pages,
    /// Positions in the checkpoint, in the order that was asked for.
    wanted: Vec<usize>,
    /// Where in the pages each of them begins.
    starts: Vec<usize>,
    /// Places in `wanted`, sorted by name.
    by_name: Vec<u32>,
}

impl Loaded {
    /// The bytes of a tensor, if it is one of those that were asked for.
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        let inner = &*self.0;
        let tensors = inner.checkpoint.tensors();
        let named = |at: &u32| tensors[inner.wanted[*at as usize]].name.as_str();
        let found = inner.by_name.binary_search_by(|at| named(at).cmp(name)).ok()?;
        Some(self.nth(inner.by_name[found] as usize).1)
    }

    /// The tensors and their bytes, in the order that was asked for.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&Tensor, &[u8])> {
        (0..self.len()).map(|n| self.nth(n))
    }

    /// How many tensors they are.
    pub fn len(&self) -> usize {
        self.0.wanted.len()
    }

    /// Whether nothing was asked for.
    pub fn is_empty(&self) -> bool {
        self.0.wanted.is_empty()
    }

    /// Memory that is held, in bytes: the tensors, what of pages is between them, and gaps of at
    /// most 16 KiB that were read with them.
    pub fn held_bytes(&self) -> usize {
        self.0.pages.len()
    }

    fn nth(&self, n: usize) -> (&Tensor, &[u8]) {
        let inner = &*self.0;
        let tensor = &inner.checkpoint.tensors()[inner.wanted[n]];
        (tensor, &inner.pages[inner.starts[n]..][..tensor.len as usize])
    }
}

impl fmt::Debug for Loaded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Loaded")
            .field("tensors", &self.len())
            .field("held_bytes", &self.held_bytes())
            .finish_non_exhaustive()
    }
}

fn by_name(tensors: &[Tensor], wanted: &[usize]) -> Vec<u32> {
    let mut by_name: Vec<u32> = (0..wanted.len() as u32).collect();
    by_name.sort_by_key(|at| tensors[wanted[*at as usize]].name.as_str());
    by_name
}

/// What the reader's thread tells.
enum Event {
    Chunk(Chunk),
    Done(usize, tierstream_io::Result<()>),
}

struct Pass(Sender<Event>);

impl Sink for Pass {
    fn chunk(&self, chunk: Chunk) {
        // Whoever has stopped listening has cancelled.
        let _ = self.0.send(Event::Chunk(chunk));
    }

    fn done(&self, piece: usize, result: tierstream_io::Result<()>) {
        let _ = self.0.send(Event::Done(piece, result));
    }
}

/// Gives the events of a request to `take` until all pieces are done, and now and then none. Cancels
/// the request once that returns false, or panics.
fn follow(
    ticket: &Ticket,
    events: &Receiver<Event>,
    pieces: usize,
    mut take: impl FnMut(Option<Event>) -> bool,
) -> Result<()> {
    struct Guard<'t>(&'t Ticket);
    impl Drop for Guard<'_> {
        fn drop(&mut self) {
            if !self.0.is_finished() {
                self.0.cancel();
            }
        }
    }
    // Events never come to a sink that waits for them on the reader's own thread.
    if let Err(error @ tierstream_io::Error::InsideSink) = ticket.wait_timeout(Duration::ZERO) {
        ticket.cancel();
        return Err(error.into());
    }
    let guard = Guard(ticket);
    let mut left = pieces;
    while left > 0 {
        let event = match events.recv_timeout(ASK_EVERY) {
            Ok(event) => Some(event),
            Err(RecvTimeoutError::Timeout) => None,
            // Every piece is done once; without a sender, none will be any more.
            Err(RecvTimeoutError::Disconnected) => break,
        };
        left -= usize::from(matches!(event, Some(Event::Done(..))));
        if !take(event) {
            return Err(ErrorKind::Cancelled.into());
        }
    }
    std::mem::forget(guard);
    Ok(())
}

//! Engines: the mechanisms that move bytes from a file into a buffer, behind one trait.
//!
//! To add one: implement [`Engine`] in a file of its own here, name it in [`EngineKind`] and
//! [`build`], and add it to the engines at the top of `tests/support/mod.rs`.

mod buffered;
mod inbox;
mod noop;
mod pool;
mod pread;
#[cfg(target_os = "linux")]
mod uring;

use std::fmt;
use std::io::{self, IoSliceMut};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Instant;

pub use buffered::Buffered;
pub use inbox::Inbox;
pub use noop::Noop;
pub use pread::Pread;
#[cfg(target_os = "linux")]
pub use uring::Uring;

use crate::error::{Error, Result};
use crate::file::File;
use crate::ring::{Buffer, Ring};
use crate::sink::Held;

/// Moves bytes from files into memory. Owns each read, and with it its memory, from
/// [`Engine::submit`] until [`Engine::wait`] hands it back.
pub trait Engine: Send + Sync {
    /// Short name of the mechanism, as [`EngineKind`] writes it. Wrappers say that of what they
    /// wrap.
    fn name(&self) -> &'static str;

    /// Reads that it accepts in flight; the caller keeps to it.
    fn depth(&self) -> usize;

    /// Whether its files are to be opened for direct I/O.
    fn direct(&self) -> bool {
        true
    }

    /// Remarks on how it really runs: a feature that the kernel refused, in one line.
    fn remark(&self) -> Option<String> {
        None
    }

    /// Takes reads. Callable from any thread, also while another is in [`Engine::wait`]; does not
    /// block on the drive. Also hands on reads that other threads have submitted, so that the
    /// thread that waits may call it with none.
    fn submit(&self, reads: &mut dyn Iterator<Item = RawRead>);

    /// Appends completed reads, in any order. Blocks until there is one, or until
    /// [`Engine::wake`]; may return with none. To be called from one thread only.
    fn wait(&self, done: &mut Vec<RawDone>);

    /// Lets the current call of [`Engine::wait`] return, or the next when there is none.
    fn wake(&self);
}

impl<E: Engine + ?Sized> Engine for Box<E> {
    fn name(&self) -> &'static str {
        (**self).name()
    }
    fn depth(&self) -> usize {
        (**self).depth()
    }
    fn direct(&self) -> bool {
        (**self).direct()
    }
    fn remark(&self) -> Option<String> {
        (**self).remark()
    }
    fn submit(&self, reads: &mut dyn Iterator<Item = RawRead>) {
        (**self).submit(reads);
    }
    fn wait(&self, done: &mut Vec<RawDone>) {
        (**self).wait(done);
    }
    fn wake(&self) {
        (**self).wake();
    }
}

/// One read, with the memory that it fills.
pub struct RawRead {
    id: u64,
    file: Arc<File>,
    offset: u64,
    memory: Memory,
    len: usize,
    issued: Instant,
}

enum Memory {
    /// A buffer of the ring, from a byte on.
    Ring(Buffer, usize),
    /// Places of the caller's, one after the other.
    Places(Vec<Segment>),
}

/// A part of a place that a read fills.
pub(crate) struct Segment {
    pub(crate) held: Held,
    /// Where it begins, see [`Held::slice`].
    pub(crate) skip: isize,
    /// Bytes; not zero.
    pub(crate) len: usize,
}

impl RawRead {
    /// A read of `len` bytes at `offset` of `file`, into `buffer` from its byte `start` on. `id`
    /// tells it from the others in flight.
    ///
    /// # Panics
    /// When `start + len` is more than the buffer holds.
    pub fn new(
        id: u64,
        file: Arc<File>,
        offset: u64,
        buffer: Buffer,
        start: usize,
        len: usize,
    ) -> Self {
        let end = start.checked_add(len);
        assert!(end.is_some_and(|end| end <= buffer.ring().buffer_bytes()), "read past its buffer");
        Self { id, file, offset, memory: Memory::Ring(buffer, start), len, issued: Instant::now() }
    }

    /// A read into places: its first bytes go to the first segment, those behind them to the next.
    ///
    /// # Safety
    /// As for [`Held::slice`], for each segment until the read is dropped.
    pub(crate) unsafe fn to_places(
        id: u64,
        file: Arc<File>,
        offset: u64,
        segments: Vec<Segment>,
    ) -> Self {
        let len = segments.iter().map(|segment| segment.len).sum();
        Self { id, file, offset, memory: Memory::Places(segments), len, issued: Instant::now() }
    }

    /// Tells it from the others in flight.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The file to read.
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// First byte, from the start of the file.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Bytes to read.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.len
    }

    /// When the read was made, for latency.
    pub fn issued(&self) -> Instant {
        self.issued
    }

    /// The buffer of the ring that it fills, if it is one.
    pub fn buffer(&self) -> Option<&Buffer> {
        match &self.memory {
            Memory::Ring(buffer, _) => Some(buffer),
            Memory::Places(_) => None,
        }
    }

    /// The memory that is to be filled, in the order of the file; none of it is empty.
    pub fn targets(&mut self) -> Vec<IoSliceMut<'_>> {
        match &mut self.memory {
            Memory::Ring(buffer, start) => {
                vec![IoSliceMut::new(&mut buffer.as_mut_slice()[*start..*start + self.len])]
            }
            Memory::Places(segments) => segments
                .iter_mut()
                // SAFETY: `to_places` was told so, and this read is borrowed alone.
                .map(|s| IoSliceMut::new(unsafe { s.held.slice(s.skip, s.len) }))
                .collect(),
        }
    }

    /// The same read without its first `bytes`.
    pub(crate) fn skip(mut self, bytes: usize) -> Self {
        self.len -= bytes;
        self.offset += bytes as u64;
        self.issued = Instant::now();
        match &mut self.memory {
            Memory::Ring(_, start) => *start += bytes,
            Memory::Places(segments) => {
                let mut left = bytes;
                segments.retain_mut(|segment| {
                    let gone = left.min(segment.len);
                    left -= gone;
                    segment.len -= gone;
                    segment.skip += gone as isize;
                    segment.len > 0
                });
            }
        }
        self
    }

    pub(crate) fn into_buffer(self) -> Option<Buffer> {
        match self.memory {
            Memory::Ring(buffer, _) => Some(buffer),
            Memory::Places(_) => None,
        }
    }

    /// The kernel may write to the memory at any time from now on.
    #[cfg(target_os = "linux")]
    pub(crate) fn quarantine(&mut self) {
        match &mut self.memory {
            Memory::Ring(buffer, _) => buffer.quarantine(),
            Memory::Places(segments) => segments.iter().for_each(|s| s.held.leak()),
        }
    }
}

impl fmt::Debug for RawRead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RawRead")
            .field("id", &self.id)
            .field("file", &self.file.path())
            .field("offset", &self.offset)
            .field("len", &self.len)
            .field("in_place", &self.buffer().is_none())
            .finish_non_exhaustive()
    }
}

/// A read that came back.
#[derive(Debug)]
pub struct RawDone {
    /// The read as it was submitted.
    pub read: RawRead,
    /// Bytes that arrived, from the start of the target on; fewer than asked at the end of the
    /// file or when the read was cut short.
    pub result: io::Result<usize>,
}

/// Which engine a [`Reader`](crate::Reader) is to run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum EngineKind {
    /// `uring` where the kernel gives it, else `pread`.
    #[default]
    Auto,
    /// io_uring, direct I/O.
    Uring,
    /// A thread pool, direct I/O.
    Pread,
    /// A thread pool, through the page cache.
    Buffered,
    /// Completes every read at once and reads nothing: to measure everything else.
    Noop,
}

impl EngineKind {
    /// Every kind.
    pub const ALL: [Self; 5] = [Self::Auto, Self::Uring, Self::Pread, Self::Buffered, Self::Noop];

    /// Its name, as [`FromStr`] reads it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Uring => "uring",
            Self::Pread => "pread",
            Self::Buffered => "buffered",
            Self::Noop => "noop",
        }
    }
}

impl fmt::Display for EngineKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for EngineKind {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == text).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            Error::config(format!("no I/O engine is called {text:?}; there are {names}"))
        })
    }
}

/// Starts an engine over `ring`, and says why it is not the one that was asked for, if so.
///
/// # Errors
/// [`Error::Engine`] when it cannot be started. `Auto` falls back instead.
pub fn build(
    kind: EngineKind,
    ring: &Arc<Ring>,
    depth: usize,
    register_buffers: bool,
) -> Result<(Box<dyn Engine>, Option<String>)> {
    let uring = || start_uring(ring, depth, register_buffers);
    Ok(match kind {
        EngineKind::Uring => (uring()?, None),
        EngineKind::Auto => uring().map(|engine| (engine, None)).or_else(|e| instead(&e, depth))?,
        EngineKind::Pread => (Box::new(Pread::new(depth)?), None),
        EngineKind::Buffered => (Box::new(Buffered::new(depth)?), None),
        EngineKind::Noop => (Box::new(Noop::new(depth)), None),
    })
}

/// What `Auto` runs on where io_uring is refused, and why.
fn instead(refusal: &Error, depth: usize) -> Result<(Box<dyn Engine>, Option<String>)> {
    let why = std::error::Error::source(refusal).map(ToString::to_string);
    let why = format!("no io_uring: {}", why.unwrap_or_else(|| refusal.to_string()));
    Ok((Box::new(Pread::new(depth)?), Some(why)))
}

#[cfg(target_os = "linux")]
fn start_uring(ring: &Arc<Ring>, depth: usize, register: bool) -> Result<Box<dyn Engine>> {
    Ok(Box::new(Uring::new(ring, depth, register)?))
}

#[cfg(not(target_os = "linux"))]
fn start_uring(_: &Arc<Ring>, _: usize, _: bool) -> Result<Box<dyn Engine>> {
    let source = Arc::new(io::Error::new(io::ErrorKind::Unsupported, "io_uring is of Linux"));
    Err(Error::Engine { engine: "uring", source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_read_as_they_are_written() {
        for kind in EngineKind::ALL {
            assert_eq!(kind.to_string().parse::<EngineKind>().unwrap(), kind);
        }
        let error = "iouring".parse::<EngineKind>().unwrap_err();
        assert!(error.to_string().contains("uring, pread"), "{error}");
    }

    #[test]
    fn auto_keeps_the_reason_of_a_refusal() {
        let source = Arc::new(io::Error::from_raw_os_error(1));
        let refusal = Error::Engine { engine: "uring", source };
        let (engine, why) = instead(&refusal, 2).unwrap();
        assert_eq!(engine.name(), "pread");
        assert!(why.unwrap().contains("not permitted"));
    }
}

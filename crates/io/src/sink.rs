//! What takes the bytes of a request: as chunks of the ring, or in places of its own.

use std::fmt;
use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::Arc;

use crate::error::Result;
use crate::file::DirectState;
use crate::plan::{InPlace, round_up};
use crate::ring::Buffer;

/// Takes the bytes of one request. All calls come from the reader's own thread, one at a time, so
/// a sink must neither block for long nor wait for this reader.
///
/// A panic in a sink fails the piece with [`Error::SinkPanicked`](crate::Error::SinkPanicked) and
/// nothing else.
pub trait Sink: Send + Sync {
    /// Some bytes of a piece, in any order, each byte once.
    fn chunk(&self, chunk: Chunk);

    /// Where a piece may be read to directly, if it has such a place. Asked on the thread that
    /// submits the request. The bytes of a piece that is read to its place do not come as chunks;
    /// where the place does not suit the drive's alignment, or the sink has none, they do.
    /// A panic here fails the piece, too.
    fn place(&self, piece: usize) -> Option<Place> {
        let _ = piece;
        None
    }

    /// The end of a piece, once: after its last chunk, or with what went wrong. After an error
    /// nothing of the piece counts as arrived, and no chunk of it follows.
    fn done(&self, piece: usize, result: Result<()>);
}

/// Bytes of one piece, as they arrived. Holds its ring buffer until it is dropped, which may be
/// long after the call that gave it; every buffer held is one less to read into.
pub struct Chunk {
    /// Which extent of the request, counted from 0.
    pub piece: usize,
    /// Where in the piece these bytes begin.
    pub offset: u64,
    buffer: Arc<Buffer>,
    start: usize,
    len: usize,
}

impl Chunk {
    pub(crate) fn new(
        piece: usize,
        offset: u64,
        buffer: Arc<Buffer>,
        start: usize,
        len: usize,
    ) -> Self {
        Self { piece, offset, buffer, start, len }
    }

    /// The same bytes once more: the buffer is held until both are dropped.
    pub fn share(&self) -> Self {
        let Self { piece, offset, ref buffer, start, len } = *self;
        Self { piece, offset, buffer: Arc::clone(buffer), start, len }
    }
}

impl Deref for Chunk {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.buffer.as_slice()[self.start..self.start + self.len]
    }
}

impl fmt::Debug for Chunk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Chunk")
            .field("piece", &self.piece)
            .field("offset", &self.offset)
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

/// Where one piece of a request is to lie, and how much room is around it.
///
/// Direct reads are of whole blocks of a file into aligned memory. They go straight to a place
/// whose address is off such an alignment by as much as the piece is off it in the file (or by
/// anything, where the drive asks for no more than a word's alignment), with room in front and
/// behind for what the first and the last block hold besides.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    at: NonNull<u8>,
    before: usize,
    after: usize,
    record: Option<u32>,
}

// SAFETY: an address; who made it vouches for the memory, see `new`.
unsafe impl Send for Place {}
// SAFETY: as above.
unsafe impl Sync for Place {}

impl Place {
    /// The piece's first byte goes to `at`. The `before` bytes in front of it and the `after`
    /// bytes behind the piece may be overwritten with whatever the file holds there.
    ///
    /// # Safety
    /// All these bytes are initialised and valid for writes as long as the sink lives that gives
    /// this place, and nobody else reads or writes them until the sink is told that the piece is
    /// done, with success, or until the request is finished. Should the engine itself die in
    /// between ([`Error::EnginePanicked`](crate::Error::EnginePanicked), or an io_uring that the
    /// kernel gave up), the reader completes no read any more, and these bytes may be written at
    /// any time as long as the process lives.
    pub unsafe fn new(at: NonNull<u8>, before: usize, after: usize) -> Self {
        Self { at, before, after, record: None }
    }

    /// The piece is a part of this record of the request: parts that follow each other in the file
    /// are read with one read, whatever its length, if what lies between them has room behind the
    /// place of the first.
    pub fn of_record(self, record: u32) -> Self {
        Self { record: Some(record), ..self }
    }

    /// What the planner must know of it.
    pub(crate) fn in_place(&self) -> InPlace {
        InPlace { after: self.after as u64, record: self.record }
    }

    /// Whether the blocks that hold `len` bytes at `offset` of a file can be read straight to it.
    pub(crate) fn suits(&self, offset: u64, len: u64, state: &DirectState) -> bool {
        let align = u64::from(state.offset_align);
        let end = offset + len;
        let head = offset % align;
        let tail = round_up(end, align) - end;
        let first = (self.at.as_ptr().addr() as u64).wrapping_sub(head);
        head <= self.before as u64
            && tail <= self.after as u64
            && first.is_multiple_of(u64::from(state.mem_align))
    }
}

/// A place of a piece that is being read, and what keeps its memory.
#[derive(Clone)]
pub(crate) struct Held {
    place: Place,
    keep: Arc<dyn Sink>,
}

impl Held {
    pub(crate) fn new(place: Place, keep: Arc<dyn Sink>) -> Self {
        Self { place, keep }
    }

    /// The bytes from `skip` on, counted from the piece's first byte, negative within the room in
    /// front of it.
    ///
    /// # Safety
    /// The range lies within the place and its room, and no other part of it that is in use
    /// overlaps.
    pub(crate) unsafe fn slice(&mut self, skip: isize, len: usize) -> &mut [u8] {
        // SAFETY: as the caller and the maker of the place say.
        unsafe { std::slice::from_raw_parts_mut(self.place.at.as_ptr().offset(skip), len) }
    }

    /// Keeps the memory for ever: the kernel may still write to it.
    pub(crate) fn leak(&self) {
        std::mem::forget(Arc::clone(&self.keep));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::file::FileId;
    use crate::plan::{Layout, Plan, Wanted};

    proptest! {
        /// Every read that the planner makes of a piece whose place suits lies within the place
        /// and its room, in aligned memory; so does what is left of a read that was cut short.
        #[test]
        fn a_place_that_suits_takes_every_read(
            at in 4096usize..20_000,
            (before, after) in (0usize..5000, 0usize..5000),
            (offset, len) in (0u64..100_000, 1u64..100_000),
            (mem_shift, more) in (0u32..13, 0u32..4),
            cut in 0u64..100_000,
        ) {
            let mem_align = 1u32 << mem_shift;
            let offset_align = (mem_align << more).min(4096);
            let state = DirectState { direct: true, mem_align, offset_align, reason: None };
            let address = NonNull::new(std::ptr::without_provenance_mut::<u8>(at)).unwrap();
            // SAFETY: nobody reads to it.
            let place = unsafe { Place::new(address, before, after) };
            if !place.suits(offset, len, &state) {
                return Ok(());
            }
            let in_place = Some(InPlace { after: after as u64, record: None });
            let wanted = vec![Wanted { piece: 0, file: FileId(0), offset, len, in_place }];
            let layout = |_| Layout { align: offset_align, size: 1 << 40 };
            let plan = Plan::new(wanted, layout, 16 << 10);
            for read in plan.reads() {
                let start = at as i64 + read.offset as i64 - offset as i64;
                prop_assert!(start >= at as i64 - before as i64);
                let end = start + read.len as i64;
                prop_assert!(end <= at as i64 + len as i64 + after as i64);
                let again = start + ((cut % read.len as u64) & !u64::from(offset_align - 1)) as i64;
                for first in [start, again] {
                    prop_assert_eq!(first % i64::from(mem_align), 0);
                }
            }
        }
    }
}

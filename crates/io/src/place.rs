//! Memory of the caller that bytes are read into without a stop in the ring.

use std::ptr::NonNull;
use std::sync::Arc;

use crate::file::DirectState;
use crate::plan::round_up;
use crate::reader::{Extent, Sink};

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
        Self { at, before, after }
    }

    /// Whether the blocks that hold `extent` can be read straight to it.
    pub(crate) fn suits(&self, extent: &Extent, state: &DirectState) -> bool {
        let align = u64::from(state.offset_align);
        let end = extent.offset + extent.len;
        let head = extent.offset % align;
        let tail = round_up(end, align) - end;
        let first = (self.at.as_ptr().addr() as u64).wrapping_sub(head);
        head <= self.before as u64
            && tail <= self.after as u64
            && first.is_multiple_of(u64::from(state.mem_align.max(1)))
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

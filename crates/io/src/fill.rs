//! Reads that land in memory of their own, which is handed out when all of it has arrived.

use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

use crate::ahead::Ahead;
use crate::error::{Error, Result};
use crate::pages::Pages;
use crate::reader::{Extent, Priority, Reader, Ticket};
use crate::ring::PAGE;
use crate::sink::{Chunk, Place, Sink};

/// An extent, and where its bytes are to lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Placed {
    /// What is read.
    pub extent: Extent,
    /// Where its first byte goes, counted from the first byte of the pages. Direct reads land there
    /// where this is as far off a multiple of [`PAGE`] as the extent's offset is in its file;
    /// others are copied.
    pub at: usize,
}

/// Is told how each piece ended, once, on the reader's own thread: see [`Sink::done`].
pub type Told = Box<dyn Fn(usize, &Result<()>) + Send + Sync>;

/// A [`Reader::fill`] on its way. Dropping it cancels what has not been read; the memory is given
/// back when the last read in flight is over.
pub struct Fill {
    // Goes first: it is of the landing's memory.
    _ahead: Ahead,
    landing: Option<Arc<Landing>>,
    ticket: Ticket,
}

impl Fill {
    /// Blocks until every piece has arrived, and hands out the pages.
    ///
    /// # Errors
    /// Those of [`Ticket::wait`].
    pub fn wait(mut self) -> Result<Pages> {
        self.ticket.wait()?;
        // A finished request has dropped its sink, and each of its reads, so this is the last
        // handle. An engine that keeps reads all the same keeps the memory.
        let landing = self.landing.take().and_then(Arc::into_inner).ok_or(Error::Closed)?;
        landing.pages.end_reads();
        Ok(landing.pages)
    }

    /// To cancel the reads, to raise their priority, or to look whether they are done.
    pub fn ticket(&self) -> &Ticket {
        &self.ticket
    }
}

impl Drop for Fill {
    fn drop(&mut self) {
        if !self.ticket.is_finished() {
            self.ticket.cancel();
        }
    }
}

impl fmt::Debug for Fill {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fill").field("ticket", &self.ticket).finish_non_exhaustive()
    }
}

impl Reader {
    /// Starts reading `pieces` into `pages`, and returns at once. `told` hears of each piece;
    /// errors, those of a bad extent too, go there and to [`Fill::wait`].
    ///
    /// In the pages that hold a piece, bytes that belong to none may be overwritten. All others
    /// stay as they are.
    ///
    /// # Errors
    /// [`Error::Config`] where a piece is to lie outside of `pages`, or where another does.
    pub fn fill(
        &self,
        priority: Priority,
        pages: Pages,
        pieces: Vec<Placed>,
        told: Told,
    ) -> Result<Fill> {
        let extents: Vec<Extent> = pieces.iter().map(|piece| piece.extent).collect();
        let targets = targets(&pieces, pages.bytes())?;
        pages.begin_reads();
        let base = pages.base().addr().get();
        let range = |target: &Target| base + target.at..base + target.at + target.len;
        let ahead = Ahead::start(targets.iter().map(range).collect());
        let landing = Arc::new(Landing { pages, targets, told });
        let ticket = self.submit(priority, extents, Arc::clone(&landing) as Arc<dyn Sink>);
        Ok(Fill { _ahead: ahead, landing: Some(landing), ticket })
    }
}

/// Where a piece lies, with the room around it that is its own too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Target {
    at: usize,
    len: usize,
    before: usize,
    after: usize,
}

/// Targets of `pieces`, in their order, in `bytes` of memory. With their rooms they lie within it
/// and share no byte.
fn targets(pieces: &[Placed], bytes: usize) -> Result<Vec<Target>> {
    let mut targets = Vec::with_capacity(pieces.len());
    for Placed { extent, at } in pieces {
        let len = usize::try_from(extent.len).ok();
        let end = len.and_then(|len| at.checked_add(len)).filter(|end| *end <= bytes);
        let (Some(len), Some(_)) = (len, end) else {
            let text = format!("{} bytes are to lie at {at} of {bytes}", extent.len);
            return Err(Error::config(text));
        };
        targets.push(Target { at: *at, len, before: 0, after: 0 });
    }
    let mut order: Vec<usize> = (0..targets.len()).filter(|n| targets[*n].len > 0).collect();
    order.sort_unstable_by_key(|n| targets[*n].at);
    // What is taken already ends here.
    let mut taken = 0;
    for (n, index) in order.iter().enumerate() {
        let next = order.get(n + 1).map_or(bytes, |next| targets[*next].at);
        let target = &mut targets[*index];
        let end = target.at + target.len;
        if end > next {
            return Err(Error::config(format!("two pieces are to lie at {next}")));
        }
        target.before = (target.at % PAGE).min(target.at - taken);
        target.after = (end.next_multiple_of(PAGE) - end).min(next - end);
        taken = end + target.after;
    }
    Ok(targets)
}

/// The memory while it is read to: its only owner until the request is over.
struct Landing {
    pages: Pages,
    targets: Vec<Target>,
    told: Told,
}

impl Sink for Landing {
    fn chunk(&self, chunk: Chunk) {
        let Target { at, len, .. } = self.targets[chunk.piece];
        let offset = chunk.offset as usize;
        assert!(offset <= len && chunk.len() <= len - offset, "a chunk lies inside its piece");
        // SAFETY: within the piece, and so within the pages. No read in flight writes there: this
        // piece comes in chunks, one at a time, and the others lie elsewhere, rooms and all. The
        // pages are lent to nobody before `Fill::wait` has the last handle to this.
        unsafe {
            let to = self.pages.base().add(at + offset);
            to.copy_from_nonoverlapping(NonNull::from(&*chunk).cast::<u8>(), chunk.len());
        }
    }

    fn place(&self, piece: usize) -> Option<Place> {
        let Target { at, before, after, .. } = self.targets[piece];
        // SAFETY: `at` is within the pages, which are initialised and live as long as this. They
        // are reached by nothing but chunks, which see to it, and reads in place, whose pieces lie
        // apart, rooms and all; each holds a handle to this while it can write, and is leaked with
        // it where its end is not known. So `Fill::wait`, which needs the last handle, lends the
        // pages only when no read is left, whatever has become of the engine.
        Some(unsafe { Place::new(self.pages.base().add(at), before, after) })
    }

    fn done(&self, piece: usize, result: Result<()>) {
        (self.told)(piece, &result);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::file::FileId;

    fn placed(at: usize, len: u64) -> Placed {
        Placed { extent: Extent { file: FileId(0), offset: 0, len }, at }
    }

    proptest! {
        /// Rooms are what is free of the pages that a piece has bytes in, and nobody else's.
        #[test]
        fn targets_share_no_byte(
            parts in prop::collection::vec((0usize..9000, 0u64..9000), 0..8),
            slack in 0usize..9000,
        ) {
            let mut end = 0;
            let mut pieces = Vec::new();
            for (gap, len) in parts {
                pieces.push(placed(end + gap, len));
                end += gap + len as usize;
            }
            // In any order.
            pieces.reverse();
            let bytes = end + slack;
            let targets = targets(&pieces, bytes).unwrap();
            let mut owner = vec![None; bytes];
            for (n, (target, piece)) in targets.iter().zip(&pieces).enumerate() {
                prop_assert_eq!((target.at, target.len as u64), (piece.at, piece.extent.len));
                prop_assert!(target.before <= target.at % PAGE);
                let end = target.at + target.len;
                prop_assert!(target.after <= end.next_multiple_of(PAGE) - end);
                for byte in &mut owner[target.at - target.before..end + target.after] {
                    prop_assert_eq!(byte.replace(n), None);
                }
            }
        }
    }

    #[test]
    fn a_page_of_its_own_is_all_room() {
        let target = targets(&[placed(PAGE + 100, 50)], 3 * PAGE).unwrap()[0];
        assert_eq!((target.before, target.after), (100, PAGE - 150));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let cases: [&[Placed]; 5] = [
            &[placed(0, PAGE as u64 + 1)],
            &[placed(PAGE, 1)],
            &[placed(usize::MAX, 2)],
            &[placed(1, u64::MAX)],
            &[placed(20, 10), placed(0, 21)],
        ];
        for pieces in cases {
            assert!(matches!(targets(pieces, PAGE), Err(Error::Config(_))), "{pieces:?}");
        }
        targets(&[placed(20, 10), placed(0, 20), placed(25, 0), placed(PAGE, 0)], PAGE).unwrap();
    }
}

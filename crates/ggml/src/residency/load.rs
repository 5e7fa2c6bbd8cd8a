//! Reads of records into slots.

use std::ptr::{self, NonNull};
use std::sync::Arc;

use tierstream_io::{Chunk, Extent, FileId, Place, Priority, Sink, Ticket};

use super::layer::IN_PLACE_LEAST_BYTES;
use super::{Placed, Residency};
use crate::error::Result;

/// Reads of some parts of some records of a layer, under way.
pub(super) struct Load {
    ticket: Arc<Ticket>,
    /// Where the parts are; almost always one file.
    files: Vec<FileId>,
}

impl Load {
    /// Starts to read `parts` of the records in `placed`, whose slots are reserved for them until
    /// the ticket has been waited for.
    pub(super) fn start(
        residency: &Arc<Residency>,
        layer: usize,
        parts: &[usize],
        placed: &[Placed],
        priority: Priority,
    ) -> Self {
        let layer = &residency.layers[layer];
        let mut extents = Vec::with_capacity(placed.len() * parts.len());
        let mut targets = Vec::with_capacity(placed.len() * parts.len());
        let mut files = Vec::with_capacity(1);
        for &part in parts {
            let source = &layer.parts[part];
            let pool = &residency.classes[layer.class].parts[part];
            if !files.contains(&source.file) {
                files.push(source.file);
            }
            for p in placed {
                extents.push(Extent {
                    file: source.file,
                    offset: source.offset + u64::from(p.expert) * source.bytes as u64,
                    len: source.bytes as u64,
                });
                let first = p.slot as usize * source.slot.stride + source.slot.position;
                targets.push(Target {
                    data: pool.data.cast::<u8>().wrapping_add(first),
                    bytes: source.bytes,
                    before: source.slot.position,
                    after: source.slot.room(source.bytes),
                });
            }
        }
        let sink = Arrival { targets, _residency: residency.clone() };
        let ticket = Arc::new(residency.reader.submit(priority, extents, Arc::new(sink)));
        Self { ticket, files }
    }

    /// To wait for it, or to cancel it.
    pub(super) fn ticket(&self) -> &Arc<Ticket> {
        &self.ticket
    }

    /// Waits until all has arrived. Fails also if the file was written to since it was opened.
    pub(super) fn arrived(&self, residency: &Residency) -> Result<()> {
        self.ticket.wait()?;
        for &file in &self.files {
            residency.reader.file(file)?.check_unchanged()?;
        }
        Ok(())
    }
}

/// Lets records be read into their slots, and copies there what comes another way.
struct Arrival {
    /// Where each piece goes.
    targets: Vec<Target>,
    /// Keeps the pool's memory while reads are under way.
    _residency: Arc<Residency>,
}

/// One part of a slot.
struct Target {
    data: *mut u8,
    bytes: usize,
    /// Room of the slot in front of the part and behind it.
    before: usize,
    after: usize,
}

// SAFETY: the targets are slots that this step has reserved and that nobody reads before the
// ticket is finished; the residency that owns their memory is held.
unsafe impl Send for Arrival {}
// SAFETY: distinct chunks cover distinct bytes.
unsafe impl Sync for Arrival {}

impl Sink for Arrival {
    fn chunk(&self, chunk: Chunk) {
        let offset = usize::try_from(chunk.offset).expect("a piece is smaller than memory");
        let target = &self.targets[chunk.piece];
        assert!(offset + chunk.len() <= target.bytes, "a chunk lies inside its piece");
        // SAFETY: in bounds of the slot (checked above); see the `Send` argument.
        unsafe {
            ptr::copy_nonoverlapping(chunk.as_ptr(), target.data.add(offset), chunk.len());
        }
    }

    fn place(&self, piece: usize) -> Option<Place> {
        let &Target { data, bytes, before, after } = &self.targets[piece];
        if bytes < IN_PLACE_LEAST_BYTES {
            return None;
        }
        // SAFETY: the slot, room and all, is reserved for this step, which does not give it back
        // before the request is finished; kernels get it when the piece has arrived. The sink
        // holds the memory. A reader that is dead fills no slot any more.
        NonNull::new(data).map(|at| unsafe { Place::new(at, before, after) })
    }

    fn done(&self, _piece: usize, _result: Result<(), tierstream_io::Error>) {}
}

//! What one layer of one batch holds of the pool, and the reads that fill it.

use std::ptr::{self, NonNull};
use std::sync::Arc;

use tierstream_io::{Chunk, Extent, FileId, Place, Priority, Sink, Ticket};
use tierstream_pool::Slot;

use super::Residency;
use super::layer::IN_PLACE_LEAST_BYTES;
use crate::error::Result;

/// One expert that a batch needs, with the last row of the batch that needs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Need {
    pub(crate) expert: u32,
    pub(crate) last_row: u32,
}

/// An expert and the slot that holds it, or will.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Placed {
    pub(crate) expert: u32,
    pub(crate) slot: u32,
}

/// What one layer of one batch holds of the pool. Dropping it without [`Step::finish`] gives the
/// reserved slots back as empty; reads that are under way are waited for in any case.
pub(crate) struct Step {
    residency: Arc<Residency>,
    layer: usize,
    hits: Vec<Placed>,
    groups: Vec<Vec<Placed>>,
    reserved: Vec<Slot>,
    pinned: Vec<Slot>,
    loads: Vec<Load>,
}

/// Reads of some parts of a group's records.
struct Load {
    ticket: Arc<Ticket>,
    /// Where the parts are; almost always one file.
    files: Vec<FileId>,
}

impl Step {
    /// `hits` are in the `pinned` slots; `experts` are to be read into the `reserved` ones.
    pub(super) fn new(
        residency: Arc<Residency>,
        layer: usize,
        hits: Vec<Placed>,
        pinned: Vec<Slot>,
        experts: &[u32],
        reserved: Vec<Slot>,
    ) -> Self {
        let slots: Vec<u32> = reserved.iter().map(|slot| slot.index).collect();
        let groups = groups(experts, &slots);
        Self { residency, layer, hits, groups, reserved, pinned, loads: Vec::new() }
    }

    /// Records that are resident.
    pub(crate) fn hits(&self) -> &[Placed] {
        &self.hits
    }

    /// Records to load, in groups that take turns in the same slots: group `g` may load a part
    /// only after group `g - 2` (or `g - 1`, if there is one slot) has been computed with it.
    pub(crate) fn arriving(&self) -> &[Vec<Placed>] {
        &self.groups
    }

    /// Starts to read `parts` of the records of a group; returns the index for
    /// [`Step::arrived`].
    pub(crate) fn load(&mut self, parts: &[usize], group: usize, priority: Priority) -> usize {
        let residency = &self.residency;
        let layer = &residency.layers[self.layer];
        let placed = &self.groups[group];
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
        self.loads.push(Load { ticket, files });
        self.loads.len() - 1
    }

    /// To wait for one [`Step::load`], or to cancel it.
    pub(crate) fn ticket(&self, load: usize) -> &Arc<Ticket> {
        &self.loads[load].ticket
    }

    /// Waits until the reads of one [`Step::load`] have arrived. Fails also if the file was
    /// written to since it was opened.
    pub(crate) fn arrived(&self, load: usize) -> Result<()> {
        let Load { ticket, files } = &self.loads[load];
        ticket.wait()?;
        for &file in files {
            self.residency.reader.file(file)?.check_unchanged()?;
        }
        Ok(())
    }

    /// The layer is computed, with every part of its records loaded and [`Step::arrived`]: what was
    /// loaded last is resident from now on. If something has not arrived after all, nothing is.
    pub(crate) fn finish(mut self) -> Result<()> {
        for load in &self.loads {
            load.ticket.wait()?;
        }
        self.loads.clear();
        let mut pool = self.residency.lock();
        for slot in self.reserved.drain(..) {
            pool.commit(slot);
            self.pinned.push(slot);
        }
        Ok(())
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        for load in &self.loads {
            load.ticket.cancel();
        }
        for load in &self.loads {
            // Whatever it returns, nobody writes into the slots after it, or the reader is dead and
            // they are never filled again.
            let _ = load.ticket.wait();
        }
        let mut pool = self.residency.lock();
        for slot in self.reserved.drain(..) {
            pool.abandon(slot);
        }
        for slot in self.pinned.drain(..) {
            pool.unpin(slot);
        }
        drop(pool);
        self.residency.settled.notify_all();
    }
}

/// Cuts `experts` into groups that take turns in `slots`. When one group is not enough, the slots
/// are halved, so that one half loads while the other computes; the last groups stay.
fn groups(experts: &[u32], slots: &[u32]) -> Vec<Vec<Placed>> {
    if experts.is_empty() {
        return Vec::new();
    }
    let (first, second) = if experts.len() <= slots.len() || slots.len() < 2 {
        (slots, slots)
    } else {
        slots.split_at(slots.len() / 2)
    };
    let mut groups = Vec::new();
    let mut rest = experts;
    let mut half = second;
    let mut other = first;
    while !rest.is_empty() {
        let (before, group) = rest.split_at(rest.len() - half.len().min(rest.len()));
        let placed = group.iter().zip(half).map(|(&expert, &slot)| Placed { expert, slot });
        groups.push(placed.collect());
        rest = before;
        std::mem::swap(&mut half, &mut other);
    }
    groups.reverse();
    groups
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

#[cfg(test)]
mod tests {
    use super::*;

    fn experts(groups: &[Vec<Placed>]) -> Vec<Vec<u32>> {
        groups.iter().map(|g| g.iter().map(|p| p.expert).collect()).collect()
    }

    #[test]
    fn one_group_when_all_fit() {
        let g = groups(&[3, 1, 2], &[7, 8, 9]);
        assert_eq!(experts(&g), [[3, 1, 2]]);
        assert_eq!(g[0][2], Placed { expert: 2, slot: 9 });
    }

    #[test]
    fn groups_take_turns_and_the_last_two_keep_their_slots() {
        let g = groups(&[0, 1, 2, 3, 4, 5, 6], &[10, 11, 12, 13, 14]);
        assert_eq!(experts(&g), [vec![0, 1], vec![2, 3], vec![4, 5, 6]]);
        assert_eq!(g[2].iter().map(|p| p.slot).collect::<Vec<_>>(), [12, 13, 14]);
        assert_eq!(g[1].iter().map(|p| p.slot).collect::<Vec<_>>(), [10, 11]);
        assert_eq!(g[0].iter().map(|p| p.slot).collect::<Vec<_>>(), [12, 13]);
    }

    #[test]
    fn one_slot_serves_one_expert_at_a_time() {
        assert_eq!(experts(&groups(&[4, 5, 6], &[0])), [[4], [5], [6]]);
    }
}

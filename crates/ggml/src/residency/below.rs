//! Records of a GPU's pool that come from a pool in host memory below it, and from there are copied.
//!
//! What the pool below does not have either is read into its slots first, so that it has the record
//! when the GPU's pool gives it up and asks for it again.

use std::sync::Arc;

use tierstream_io::Priority;

use super::load::{Destination, Waits};
use super::step::{Need, Placed, Step};
use super::{Residency, Store};
use crate::error::{Error, Result};

/// Parts of records that are to come from the tier below.
pub(super) struct Below {
    pub(super) layer: usize,
    pub(super) parts: Vec<usize>,
    /// Where they go.
    pub(super) placed: Vec<Placed>,
    pub(super) to: Destination,
}

impl Below {
    /// Brings them: those that are there at once, the others as they are read.
    pub(super) fn bring(&self, above: &Residency, mut waits: Waits<'_>) -> Result<()> {
        let below = above.below.as_ref().ok_or_else(|| Error::Internal("no tier below".into()))?;
        let mut need: Vec<Need> =
            self.placed.iter().map(|p| Need { expert: p.expert, last_row: 0 }).collect();
        need.sort_unstable_by_key(|n| n.expert);
        let mut step = below.acquire(self.layer, &need, None, waits.cancelled)?;
        let brought = self.bring_from(above, below, &mut step, &mut waits);
        // The slots below are not filled anew, nor those above used, before the copies are done.
        let settled = above.settle();
        brought.and(settled)?;
        step.finish()
    }

    fn bring_from(
        &self,
        above: &Residency,
        below: &Arc<Residency>,
        step: &mut Step,
        waits: &mut Waits<'_>,
    ) -> Result<()> {
        let groups = step.arriving().to_vec();
        let start = |step: &mut Step, group| step.load(&self.parts, group, Priority::Demand);
        let mut loads = Vec::with_capacity(groups.len());
        if !groups.is_empty() {
            loads.push(start(step, 0));
        }
        self.upload(above, below, step.hits())?;
        (waits.meanwhile)()?;
        for (index, group) in groups.iter().enumerate() {
            // Groups take turns in the same slots: neighbours in different ones, unless there is
            // but one slot.
            let next = groups.get(index + 1);
            let apart =
                |next: &[Placed]| !next.iter().any(|n| group.iter().any(|p| p.slot == n.slot));
            let ahead = next.is_some_and(|next| apart(next));
            if ahead {
                loads.push(start(step, index + 1));
            }
            let (cancelled, ticket) = (waits.cancelled, &mut *waits.ticket);
            step.wait(loads[index], Waits { cancelled, ticket, meanwhile: &mut || Ok(()) })?;
            self.upload(above, below, group)?;
            if next.is_some() {
                above.settle()?;
            }
            if next.is_some() && !ahead {
                loads.push(start(step, index + 1));
            }
        }
        Ok(())
    }

    /// Starts to copy records that are in slots below.
    pub(super) fn upload(
        &self,
        above: &Residency,
        below: &Arc<Residency>,
        there: &[Placed],
    ) -> Result<()> {
        let Store::Vram(vram) = &above.store else { return Ok(()) };
        for from in there {
            let to = self.placed.iter().find(|p| p.expert == from.expert);
            let to = to.expect("only what is to be placed was asked for");
            for &part in &self.parts {
                let data = below.part_in(self.layer, part, Destination::Slots, from.slot);
                let bytes = below.layers[self.layer].parts[part].bytes;
                let source = InSlot { data, bytes, _residency: below.clone() };
                let offset = above.store.offset(above.part_in(self.layer, part, self.to, to.slot));
                vram.upload(source, offset)?;
            }
        }
        Ok(())
    }
}

/// A part of a record in a slot in host memory, as the bytes of a copy.
struct InSlot {
    data: *const u8,
    bytes: usize,
    /// Keeps the slot's memory.
    _residency: Arc<Residency>,
}

// SAFETY: nobody writes to the slot while it is pinned, which it is until the copies are done.
unsafe impl Send for InSlot {}

impl AsRef<[u8]> for InSlot {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: a part of a resident record: initialised, in memory that is held, and not written
        // to while it is pinned. After an error the slot may be filled anew while the copy is
        // under way; the driver reads it then, no code of ours, and what it brings is used by
        // nobody.
        unsafe { std::slice::from_raw_parts(self.data, self.bytes) }
    }
}

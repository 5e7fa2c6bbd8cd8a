//! What one layer of one batch holds of the pool, and the reads that fill it.

use std::sync::Arc;

use tierstream_io::{Extent, Priority, Ticket};
use tierstream_pool::Slot;

use super::Residency;
use super::ahead::{Ahead, Fetch};
use super::load::{Destination, Load, Waits};
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
    /// Records of the only group whose reads were begun before.
    begun: Vec<Fetch>,
    /// Of each [`Step::load`].
    loads: Vec<Vec<Arc<Load>>>,
    /// What was begun and is not needed.
    surplus: Option<Ahead>,
}

/// Slots for what one layer of one batch needs.
#[derive(Default)]
pub(super) struct Slots {
    pub(super) hits: Vec<Placed>,
    /// To be given back: of the hits, and of whom else.
    pub(super) pinned: Vec<Slot>,
    /// Records to load, and slots for them; fewer, if they have to take turns.
    pub(super) experts: Vec<u32>,
    pub(super) reserved: Vec<Slot>,
    /// Records that are on their way, into the last of the slots.
    pub(super) begun: Vec<Fetch>,
}

impl Step {
    /// `surplus` is read for nobody.
    pub(super) fn new(
        residency: Arc<Residency>,
        layer: usize,
        slots: Slots,
        surplus: Option<Ahead>,
    ) -> Self {
        let Slots { hits, pinned, experts, reserved, begun } = slots;
        let indices: Vec<u32> = reserved.iter().map(|slot| slot.index).collect();
        let groups = groups(&experts, &indices);
        Self { residency, layer, hits, groups, reserved, pinned, begun, loads: Vec::new(), surplus }
    }

    /// Makes sure that there is memory behind the slots that will be filled.
    pub(super) fn back(&self) -> Result<()> {
        self.reserved.iter().try_for_each(|slot| self.residency.back(self.layer, slot.index))
    }

    /// Whether a record is one piece of the file.
    pub(crate) fn in_one_piece(&self) -> bool {
        self.residency.layers[self.layer].in_one_piece
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

    /// Starts to read `parts` of the records of a group, those that are not on their way; returns
    /// the index for [`Step::tickets`] and [`Step::arrived`].
    pub(crate) fn load(&mut self, parts: &[usize], group: usize, priority: Priority) -> usize {
        self.load_from(parts, group, priority, &|extent| extent)
    }

    /// The same, of the files that `source` says.
    pub(super) fn load_from(
        &mut self,
        parts: &[usize],
        group: usize,
        priority: Priority,
        source: &dyn Fn(Extent) -> Extent,
    ) -> usize {
        let begun = |p: &&Placed| self.begun.iter().any(|fetch| fetch.expert == p.expert);
        let placed = self.groups[group].iter().filter(|p| !begun(p)).copied().collect::<Vec<_>>();
        let mut loads: Vec<_> =
            self.begun.iter().flat_map(|fetch| fetch.loads_of(parts)).cloned().collect();
        // What was begun on a guess is waited for now.
        loads.iter().filter_map(|load| load.ticket()).for_each(|ticket| ticket.raise(priority));
        if !placed.is_empty() {
            let to = Destination::Slots;
            let from = (self.layer, source);
            let load = Load::start_from(&self.residency, from, parts, &placed, to, priority);
            loads.push(Arc::new(load));
        }
        self.loads.push(loads);
        self.loads.len() - 1
    }

    /// To wait for one [`Step::load`], or to cancel it.
    pub(crate) fn tickets(&self, load: usize) -> impl Iterator<Item = &Arc<Ticket>> {
        self.loads[load].iter().filter_map(|load| load.ticket())
    }

    /// Waits for one [`Step::load`], as `waits` does, until it has [arrived](Self::arrived).
    pub(crate) fn wait(&mut self, load: usize, waits: Waits<'_>) -> Result<()> {
        let Self { residency, loads, surplus, .. } = self;
        let Waits { cancelled, ticket, meanwhile } = waits;
        meanwhile()?;
        // All that can come is on its way before anything is waited for.
        let mut later = Vec::new();
        for load in &loads[load] {
            if !load.begin(residency)? {
                later.push(load);
            }
        }
        let mut wait = |load: &Load| {
            let (ticket, meanwhile) = (&mut *ticket, &mut || Ok(()));
            load.wait(residency, Waits { cancelled, ticket, meanwhile })
        };
        let begun = |load: &&Arc<Load>| !later.iter().any(|l| Arc::ptr_eq(l, load));
        loads[load].iter().filter(begun).try_for_each(|load| wait(load))?;
        if !later.is_empty() {
            // Who waits for others has nothing on its way that they may wait for.
            *surplus = None;
        }
        later.into_iter().try_for_each(|load| wait(load))
    }

    /// Whether some of what arrives was on its way before.
    pub(crate) fn has_begun(&self) -> bool {
        !self.begun.is_empty()
    }

    /// Whether nothing that was begun in vain is read or copied any more.
    pub(crate) fn is_idle(&self) -> bool {
        self.surplus.as_ref().is_none_or(Ahead::is_idle)
    }

    /// Waits until the reads of one [`Step::load`] have arrived. Fails also if the file was
    /// written to since it was opened.
    pub(crate) fn arrived(&self, load: usize) -> Result<()> {
        self.loads[load].iter().try_for_each(|load| load.arrived(&self.residency))
    }

    /// Every read into the reserved slots.
    fn all_loads(&self) -> impl Iterator<Item = &Arc<Load>> {
        self.loads.iter().flatten().chain(self.begun.iter().flat_map(Fetch::loads))
    }

    /// The layer is computed, with every part of its records loaded and [`Step::arrived`]: what was
    /// loaded last is resident from now on. If something has not arrived after all, nothing is.
    pub(crate) fn finish(mut self) -> Result<()> {
        self.commit()
    }

    /// The same, and holds all slots until the step is dropped.
    pub(super) fn commit(&mut self) -> Result<()> {
        for ticket in self.all_loads().filter_map(|load| load.ticket()) {
            ticket.wait()?;
        }
        self.loads.clear();
        self.begun.clear();
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
        let tickets = || self.all_loads().filter_map(|load| load.ticket());
        tickets().for_each(|ticket| ticket.cancel());
        // Whatever it returns, nobody writes into the slots after it, or the reader is dead and
        // they are never filled again.
        for load in self.all_loads() {
            load.close(&self.residency);
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

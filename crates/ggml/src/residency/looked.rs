//! For experts that are computed elsewhere: what is in slots is pinned, and nothing is waited for.
//! What was missing comes to slots later, while the bus has nothing else to do.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tierstream_cuda::Event;
use tierstream_io::Ticket;
use tierstream_pool::{Lookup, Slot};

use super::ahead::Ahead;
use super::below::Below;
use super::load::Destination;
use super::stage::Held;
use super::{Need, Placed, Residency, Step, Store, index32, record};
use crate::error::Result;

/// What a layer's experts were found to be. Those in slots stay there until this is dropped.
pub(crate) struct Looked {
    residency: Arc<Residency>,
    pinned: Vec<Slot>,
    hits: Vec<Placed>,
    missing: Vec<u32>,
    /// Guesses that have not come in time.
    late: Option<Ahead>,
}

impl Looked {
    /// Experts that are in slots.
    pub(crate) fn hits(&self) -> &[Placed] {
        &self.hits
    }

    /// All others, ascending.
    pub(crate) fn missing(&self) -> &[u32] {
        &self.missing
    }

    /// Whether nothing is read or copied on guesses any more.
    pub(crate) fn is_idle(&self) -> bool {
        self.late.as_ref().is_none_or(Ahead::is_idle)
    }

    /// Gives up what is on its way on guesses, since others may wait for that. Reads of what is
    /// missing are waited for, which `wait` does: they fill slots of the pool below.
    pub(crate) fn give_up_guesses(
        &mut self,
        wait: impl FnMut(&Arc<Ticket>) -> Result<()>,
    ) -> Result<()> {
        let Some(late) = self.late.take() else { return Ok(()) };
        late.tickets_of(&self.missing).try_for_each(wait)
    }
}

impl Drop for Looked {
    fn drop(&mut self) {
        let mut pool = self.residency.lock();
        self.pinned.drain(..).for_each(|slot| pool.unpin(slot));
        drop(pool);
        self.residency.settled.notify_all();
    }
}

/// Records on their way from the pool below to slots of this one, for later. Whoever holds it waits
/// for no slots meanwhile: others may wait for these.
pub(crate) struct Promotion {
    // In the order in which they are to be dropped, after the wait.
    held: Held,
    _below: Step,
    copied: Event,
}

impl Promotion {
    /// Whether all copies are done.
    pub(crate) fn is_done(&self) -> Result<bool> {
        Ok(self.copied.is_done()?)
    }

    /// Waits for the copies. Their records are resident from then on.
    pub(crate) fn finish(mut self) -> Result<()> {
        self.copied.wait()?;
        self.held.commit();
        Ok(())
    }
}

impl Drop for Promotion {
    fn drop(&mut self) {
        // Nobody gets slots that are still written to, or read. A lost device does neither.
        let _ = self.copied.wait();
    }
}

impl Residency {
    /// Looks for `need` (distinct experts, at least one), counts that, and pins those that are in
    /// slots: with those of `ahead` that have come. The others count as used without one.
    pub(crate) fn look(
        self: &Arc<Self>,
        layer: usize,
        need: &[Need],
        ahead: Option<Ahead>,
    ) -> Looked {
        let mut late = ahead.filter(|ahead| ahead.layer() == layer);
        let (mut pinned, mut hits, mut missing) = (Vec::new(), Vec::new(), Vec::new());
        let mut pool = self.change();
        if let Some(ahead) = &mut late {
            self.count_ahead(ahead.experts(), need);
            ahead.settle(&mut pool);
        }
        pool.begin_step();
        for &Need { expert, .. } in need {
            match pool.request(record(layer, expert)) {
                Lookup::Resident(slot) => {
                    pinned.push(slot);
                    hits.push(Placed { expert, slot: slot.index });
                }
                // For another context, or ahead: not waited for.
                Lookup::Loading(slot) => {
                    pool.unpin(slot);
                    missing.push(expert);
                }
                Lookup::Absent => {
                    pool.stream(record(layer, expert));
                    let bytes = self.layers[layer].record_bytes();
                    self.not_brought_bytes.fetch_add(bytes, Ordering::Relaxed);
                    missing.push(expert);
                }
            }
        }
        drop(pool);
        if let Some(late) = &late {
            late.keep_only(&missing);
            self.settled.notify_all();
        }
        Looked { residency: self.clone(), pinned, hits, missing, late }
    }

    /// Whether all of `experts` are in slots now.
    pub(crate) fn has_all(&self, layer: usize, mut experts: impl Iterator<Item = u32>) -> bool {
        let pool = self.lock();
        experts.all(|expert| matches!(pool.peek(record(layer, expert)), Lookup::Resident(_)))
    }

    /// Starts to copy records that `below`, a step of the pool below, holds in `there`, to slots of
    /// this one: as many as there are slots for now, `most` at the most. What `below` has read stays
    /// in the pool below.
    pub(crate) fn promote(
        self: &Arc<Self>,
        layer: usize,
        mut below: Step,
        there: &[Placed],
        most: usize,
    ) -> Result<Option<Promotion>> {
        let (Some(pool_below), Store::Vram(vram)) = (&self.below, &self.store) else {
            return Ok(None);
        };
        below.commit()?;
        let mut held = Held::new(self);
        let mut pool = self.change();
        for placed in there {
            let is_absent = pool.peek(record(layer, placed.expert)) == Lookup::Absent;
            if is_absent && held.reserved.len() < most && pool.reservable(index32(layer)) > 0 {
                let found = pool.reserve(record(layer, placed.expert));
                held.reserved.extend(found.map(|found| (placed.expert, found.slot)));
            }
        }
        drop(pool);
        // What has no memory stays where it is.
        self.back_kept(layer, &mut held.reserved)?;
        if held.reserved.is_empty() {
            return Ok(None);
        }
        let to = held.reserved.iter();
        let to: Vec<Placed> =
            to.map(|&(expert, slot)| Placed { expert, slot: slot.index }).collect();
        let parts: Vec<usize> = (0..self.layers[layer].parts.len()).collect();
        let copies = Below::new(layer, &parts, &to, Destination::Slots);
        let from: Vec<Placed> = there
            .iter()
            .filter(|p| held.reserved.iter().any(|&(expert, _)| expert == p.expert))
            .copied()
            .collect();
        let started = copies.upload(self, pool_below, &from);
        let copied = started.and_then(|()| vram.uploaded());
        match copied {
            Ok(copied) => Ok(Some(Promotion { held, _below: below, copied })),
            Err(error) => {
                // Some may be under way.
                vram.settle()?;
                Err(error)
            }
        }
    }
}

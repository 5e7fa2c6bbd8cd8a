//! All slots at once, for a graph that finds them by a copy of the whole map, without pins.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};

use tierstream_pool::{Lookup, Pool};

use super::{Placed, Residency, record};
use crate::error::{Error, Result};
use crate::memory;

/// The pool, and who has all of its slots.
pub(super) struct Guarded {
    pool: Pool,
    holder: Option<ThreadId>,
    /// Threads that wait for the holder.
    waiting: usize,
}

impl Guarded {
    pub(super) fn new(pool: Pool) -> Self {
        Self { pool, holder: None, waiting: 0 }
    }
}

impl Deref for Guarded {
    type Target = Pool;

    fn deref(&self) -> &Pool {
        &self.pool
    }
}

impl DerefMut for Guarded {
    fn deref_mut(&mut self) -> &mut Pool {
        &mut self.pool
    }
}

/// Until this is dropped, no other thread pins a slot or takes one: every record stays where it is,
/// unless this thread gives its slot to another.
pub(crate) struct Hold {
    residency: Arc<Residency>,
}

impl Residency {
    /// All slots, for this thread. None if something is pinned, here or in the pool below, or if
    /// others wait: they would not come to their turn.
    pub(crate) fn hold(self: &Arc<Self>) -> Option<Hold> {
        let mut pool = self.lock();
        let is_idle = pool.holder.is_none() && pool.waiting == 0 && pool.is_idle();
        if !is_idle || self.below.as_ref().is_some_and(|below| !below.lock().is_idle()) {
            return None;
        }
        pool.holder = Some(thread::current().id());
        drop(pool);
        Some(Hold { residency: self.clone() })
    }

    /// The pool, to pin slots or to give them away: while no other thread has all of them.
    pub(super) fn change(&self) -> MutexGuard<'_, Guarded> {
        let mut pool = self.lock();
        while pool.holder.is_some_and(|holder| holder != thread::current().id()) {
            pool.waiting += 1;
            pool = self.settled.wait(pool).unwrap_or_else(PoisonError::into_inner);
            pool.waiting -= 1;
        }
        pool
    }

    /// Puts memory behind so many slots of each class. Whether it is there: some may have to stay free.
    pub(crate) fn back_all(&self, slots: &[u32]) -> Result<bool> {
        for (class, &slots) in slots.iter().enumerate() {
            let Some(layer) = self.layers.iter().position(|layer| layer.class == class) else {
                continue;
            };
            for slot in 0..slots {
                match self.back(layer, slot) {
                    Err(Error::OutOfGpuMemory(_)) => return Ok(false),
                    backed => backed?,
                }
            }
        }
        Ok(true)
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.residency.lock().holder = None;
        self.residency.settled.notify_all();
    }
}

/// A copy of what the pool knows: the slot of each record, all layers one after the other, and -1
/// for one that has none.
#[derive(Default)]
pub(crate) struct SlotMap {
    entries: Vec<i32>,
    /// Where each layer begins.
    bases: Vec<usize>,
    /// The entry of the record that is in a slot, by class.
    entry_in: Vec<Vec<Option<usize>>>,
    /// The pool's count of changes when this was right.
    changes: Option<u64>,
}

impl SlotMap {
    /// All entries.
    pub(crate) fn entries(&self) -> &[i32] {
        &self.entries
    }

    /// Takes over what has changed. Whether something has.
    pub(crate) fn refresh(&mut self, residency: &Residency) -> bool {
        let pool = residency.lock();
        if self.changes == Some(pool.changes()) {
            return false;
        }
        *self = Self::of(residency, &pool);
        true
    }

    fn of(residency: &Residency, pool: &Pool) -> Self {
        let classes = residency.classes.iter();
        let slots = classes.map(|class| class.parts.first().map_or(0, |part| part.ne[2]));
        let mut map = Self {
            entry_in: slots.map(|slots| vec![None; memory::usize_of(slots)]).collect(),
            changes: Some(pool.changes()),
            ..Self::default()
        };
        for (index, layer) in residency.layers.iter().enumerate() {
            map.bases.push(map.entries.len());
            for expert in 0..layer.experts {
                let found = pool.peek(record(index, expert));
                if let Lookup::Resident(slot) = found {
                    map.entry_in[layer.class][slot.index as usize] = Some(map.entries.len());
                    map.entries.push(number(slot.index));
                } else {
                    map.entries.push(NOWHERE);
                }
            }
        }
        map
    }

    /// After records of a layer have come to slots: which entries are others now, and what they are.
    pub(crate) fn take_in(
        &mut self,
        residency: &Residency,
        layer: usize,
        placed: &[Placed],
    ) -> Vec<(usize, i32)> {
        let pool = residency.lock();
        let mut changed = Vec::with_capacity(2 * placed.len());
        let entry_in = &mut self.entry_in[residency.layers[layer].class];
        for &Placed { expert, slot } in placed {
            let entry = self.bases[layer] + expert as usize;
            if let Some(before) = entry_in[slot as usize].replace(entry) {
                changed.push((before, NOWHERE));
            }
            changed.push((entry, number(slot)));
        }
        changed.iter().for_each(|&(entry, slot)| self.entries[entry] = slot);
        // Each of them is one change of the pool: a record that has got a slot, or lost it.
        let changes = self.changes.map(|changes| changes + changed.len() as u64);
        if changes == Some(pool.changes()) {
            self.changes = changes;
            return changed;
        }
        let before = std::mem::replace(self, Self::of(residency, &pool));
        let now = self.entries.iter().copied().enumerate();
        let others = now.zip(&before.entries).filter(|((_, now), before)| now != *before);
        let others = others.map(|(now, _)| now);
        // What was noted above is not known to whoever has the entries of before.
        let noted = changed.iter().map(|&(entry, _)| (entry, self.entries[entry]));
        noted.chain(others).collect()
    }
}

/// The entry of a record without a slot.
const NOWHERE: i32 = -1;

fn number(slot: u32) -> i32 {
    i32::try_from(slot).expect("slots fit ggml's ids")
}

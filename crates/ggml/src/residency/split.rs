//! How what a layer needs is served by a pool that may not hold all of it.

use tierstream_pool::{Lookup, Pool};

use super::ahead::Ahead;
use super::{Need, Residency, index32, record};

#[derive(Default)]
pub(super) struct Split {
    /// Resident, to be pinned.
    pub(super) keep: Vec<Need>,
    /// On their way, read ahead for this.
    pub(super) begun: Vec<Need>,
    /// Resident, but their slots are needed for waves.
    pub(super) give_up: Vec<Need>,
    pub(super) missing: Vec<Need>,
    /// Slots to reserve.
    pub(super) reserve: usize,
}

impl Residency {
    /// How `need` is served with what the pool can give now, and with what `ahead` is reading;
    /// `None`: not together with `ahead`, or not before another context is done.
    pub(super) fn split(
        &self,
        pool: &Pool,
        layer: usize,
        need: &[Need],
        ahead: Option<&Ahead>,
    ) -> Option<Split> {
        let mut split = Split { keep: Vec::with_capacity(need.len()), ..Split::default() };
        let begun = |expert| ahead.is_some_and(|ahead| ahead.experts().any(|e| e == expert));
        for &n in need {
            match pool.peek(record(layer, n.expert)) {
                Lookup::Resident(_) => split.keep.push(n),
                Lookup::Absent => split.missing.push(n),
                Lookup::Loading(_) if begun(n.expert) => split.begun.push(n),
                Lookup::Loading(_) => return None,
            }
        }
        if split.missing.is_empty() {
            return Some(split);
        }
        // Own resident records count as reservable until they are pinned.
        let reservable = pool.reservable(index32(layer)) as usize;
        let spare = reservable.saturating_sub(split.keep.len());
        if spare >= split.missing.len() {
            split.reserve = split.missing.len();
            return Some(split);
        }
        if ahead.is_some() {
            return None;
        }
        // Waves. They turn over about this layer's share of the pool and leave the rest to the
        // other layers; when even that is not there, resident records of this layer give way.
        let share = self.share(pool, layer).min(reservable);
        split.reserve = spare.min(share).max(share.div_ceil(2)).min(split.missing.len());
        if split.reserve == 0 {
            return None;
        }
        let mut surplus = split.reserve.saturating_sub(spare);
        split.keep.sort_by_key(|n| (n.last_row, n.expert));
        split.keep.retain(|&n| {
            let give = surplus > 0 && pool.is_evictable(record(layer, n.expert));
            if give {
                surplus -= 1;
                split.give_up.push(n);
            }
            !give
        });
        (surplus == 0).then_some(split)
    }

    /// An even share of the class's slots, in slots.
    pub(super) fn share(&self, pool: &Pool, layer: usize) -> usize {
        let class = self.layers[layer].class;
        let sharers = self.layers.iter().filter(|l| l.class == class).count();
        (pool.slots(index32(class)) as usize / sharers).max(1)
    }
}

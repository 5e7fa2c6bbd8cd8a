//! Records of a layer that are read before anybody has asked for them.

use std::sync::Arc;

use tierstream_io::Priority;
use tierstream_pool::{Lookup, Pool, Slot};

use super::load::{Destination, Load};
use super::{Placed, Residency, index32, record};

/// Records of one layer on their way into the pool, on somebody's guess. Dropping it keeps those
/// that have arrived, gives the others up, and waits for what is being read.
pub(crate) struct Ahead {
    residency: Arc<Residency>,
    layer: usize,
    /// Of resident records that are part of the guess, so that the others do not replace them.
    held: Vec<Slot>,
    fetches: Vec<Fetch>,
}

/// A record on its way into the slot that is reserved for it.
pub(super) struct Fetch {
    pub(super) expert: u32,
    pub(super) slot: Slot,
    /// Reads, and the parts that each brings.
    loads: Vec<(Vec<usize>, Arc<Load>)>,
    /// The reads of all parts have been started.
    whole: bool,
}

impl Fetch {
    pub(super) fn loads(&self) -> impl Iterator<Item = &Arc<Load>> {
        self.loads.iter().map(|(_, load)| load)
    }

    /// The reads that bring some of `parts`.
    pub(super) fn loads_of(&self, parts: &[usize]) -> impl Iterator<Item = &Arc<Load>> {
        let brings = |theirs: &[usize]| theirs.iter().any(|part| parts.contains(part));
        self.loads.iter().filter(move |(theirs, _)| brings(theirs)).map(|(_, load)| load)
    }

    fn is_over(&self) -> bool {
        self.loads().filter_map(|load| load.ticket()).all(|ticket| ticket.is_finished())
    }
}

impl Residency {
    /// Those of `experts` of a layer that are in no slot, nor on their way into one.
    pub(crate) fn absent<T: Copy>(&self, layer: usize, experts: &[(u32, T)]) -> Vec<(u32, T)> {
        let pool = self.lock();
        let absent = |&(e, _): &(u32, T)| pool.peek(record(layer, e)) == Lookup::Absent;
        experts.iter().copied().filter(absent).collect()
    }

    /// Starts to read those of `wanted` that are absent, as far as that leaves the layer room to
    /// compute with others; they replace none of `expected`. `stages` are the parts in the order of
    /// their use. None if nothing is to be read. Waits for nothing.
    pub(crate) fn read_ahead(
        self: &Arc<Self>,
        layer: usize,
        expected: &[u32],
        wanted: &[u32],
        stages: &[Vec<usize>],
    ) -> Option<Ahead> {
        let mut ahead =
            Ahead { residency: self.clone(), layer, held: Vec::new(), fetches: Vec::new() };
        let mut pool = self.lock();
        let room = pool.reservable(index32(layer)).saturating_sub(self.layers[layer].used);
        let absent = |pool: &Pool, e| pool.peek(record(layer, e)) == Lookup::Absent;
        let wanted: Vec<u32> =
            wanted.iter().copied().filter(|&e| absent(&pool, e)).take(room as usize).collect();
        if wanted.is_empty() {
            return None;
        }
        ahead.held = expected.iter().filter_map(|&e| pool.hold(record(layer, e))).collect();
        for expert in wanted {
            let Some(reservation) = pool.reserve(record(layer, expert)) else { break };
            ahead.fetches.push(Fetch {
                expert,
                slot: reservation.slot,
                loads: Vec::new(),
                whole: false,
            });
        }
        drop(pool);
        for parts in stages {
            for fetch in &mut ahead.fetches {
                let placed = [Placed { expert: fetch.expert, slot: fetch.slot.index }];
                let to = Destination::Slots;
                let load = Load::start(self, layer, parts, &placed, to, Priority::Prefetch);
                fetch.loads.push((parts.clone(), Arc::new(load)));
            }
        }
        ahead.fetches.iter_mut().for_each(|fetch| fetch.whole = true);
        Some(ahead)
    }
}

impl Ahead {
    /// Index of the layer.
    pub(crate) fn layer(&self) -> usize {
        self.layer
    }

    /// The records that are being read for this guess.
    pub(crate) fn experts(&self) -> impl Iterator<Item = u32> {
        self.fetches.iter().map(|fetch| fetch.expert)
    }

    /// The layer has come: what has arrived is resident from now on, what was held is free again.
    pub(super) fn settle(&mut self, pool: &mut Pool) {
        self.held.drain(..).for_each(|slot| pool.unpin(slot));
        let (over, under_way) = self.fetches.drain(..).partition(Fetch::is_over);
        self.fetches = under_way;
        self.end(pool, over);
    }

    /// Takes out the reads of a record that are under way.
    pub(super) fn take(&mut self, expert: u32) -> Option<Fetch> {
        let index = self.fetches.iter().position(|fetch| fetch.expert == expert)?;
        Some(self.fetches.swap_remove(index))
    }

    /// Nobody needs what is left: reads that have not begun are dropped.
    pub(super) fn give_up(&self) {
        for ticket in self.fetches.iter().flat_map(Fetch::loads).filter_map(|l| l.ticket()) {
            ticket.cancel();
        }
    }

    /// Of reads that are over.
    fn end(&self, pool: &mut Pool, fetches: Vec<Fetch>) {
        for fetch in fetches {
            // An error is told to whoever asks for the record: it is read again then.
            if fetch.whole && fetch.loads().all(|load| load.arrived(&self.residency).is_ok()) {
                pool.commit(fetch.slot);
                pool.unpin(fetch.slot);
            } else {
                pool.abandon(fetch.slot);
            }
        }
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        self.give_up();
        let fetches = std::mem::take(&mut self.fetches);
        let tickets = fetches.iter().flat_map(Fetch::loads).filter_map(|load| load.ticket());
        tickets.for_each(|ticket| drop(ticket.wait()));
        let mut pool = self.residency.lock();
        self.held.drain(..).for_each(|slot| pool.unpin(slot));
        self.end(&mut pool, fetches);
        drop(pool);
        self.residency.settled.notify_all();
    }
}

//! Records of a layer that are read before anybody has asked for them.

use std::sync::Arc;

use tierstream_io::{Priority, Ticket};
use tierstream_pool::{Lookup, Pool, Slot};

use super::load::Load;
use super::{Placed, Residency, Store, index32, record};

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
        self.loads().all(|load| load.is_over())
    }

    /// Waits until nothing is on its way any more. Whether the record is in its slot. If not, an
    /// error is told to whoever asks for the record: it is read again then.
    fn close(&self, residency: &Residency) -> bool {
        let closed = self.loads().map(|load| load.close(residency));
        closed.fold(true, |all, there| all & there) && self.whole
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
    /// their use. None if nothing is to be read, or nothing can be. Waits for no other context.
    pub(crate) fn read_ahead(
        self: &Arc<Self>,
        layer: usize,
        expected: &[u32],
        wanted: &[u32],
        stages: &[Vec<usize>],
    ) -> Option<Ahead> {
        let mut ahead =
            Ahead { residency: self.clone(), layer, held: Vec::new(), fetches: Vec::new() };
        let mut pool = self.change();
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
        // Copies to a GPU are the fewer the better, and are waited for together. What is one piece of a
        // file is one read.
        let together = [stages.concat()];
        let stages = match &self.store {
            Store::Host { .. } if !self.layers[layer].in_one_piece => stages,
            _ => &together,
        };
        // Not worth any slots where memory is short.
        let fetches = std::mem::take(&mut ahead.fetches);
        let (backed, unbacked): (Vec<Fetch>, Vec<Fetch>) =
            fetches.into_iter().partition(|fetch| self.back(layer, fetch.slot.index).is_ok());
        ahead.fetches = backed;
        for parts in stages {
            for fetch in &mut ahead.fetches {
                let placed = [Placed { expert: fetch.expert, slot: fetch.slot.index }];
                let load = Load::ahead(self, layer, parts, &placed);
                fetch.loads.extend(load.map(|load| (parts.clone(), Arc::new(load))));
            }
        }
        ahead.fetches.iter_mut().for_each(|fetch| fetch.whole = fetch.loads.len() == stages.len());
        let whole = std::mem::take(&mut ahead.fetches).into_iter().partition(|fetch| fetch.whole);
        let (whole, part): (Vec<Fetch>, Vec<Fetch>) = whole;
        ahead.fetches = whole;
        let none: Vec<Fetch> = unbacked.into_iter().chain(part).collect();
        if !none.is_empty() {
            let closed = ahead.close(none);
            ahead.end(&mut self.lock(), closed);
            self.settled.notify_all();
        }
        (!ahead.fetches.is_empty()).then_some(ahead)
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
        let closed = self.close(over);
        self.end(pool, closed);
    }

    /// Whether nothing is read or copied any more.
    pub(super) fn is_idle(&self) -> bool {
        self.fetches.iter().flat_map(Fetch::loads).all(|load| load.is_idle())
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

    /// Reads of `needed` records are for somebody now. Of the others, those that have not begun are
    /// dropped.
    pub(super) fn keep_only(&self, needed: &[u32]) {
        for fetch in &self.fetches {
            for ticket in fetch.loads().filter_map(|load| load.ticket()) {
                if needed.contains(&fetch.expert) {
                    ticket.raise(Priority::Demand);
                } else {
                    ticket.cancel();
                }
            }
        }
    }

    /// To wait for the reads of some records.
    pub(super) fn tickets_of(&self, experts: &[u32]) -> impl Iterator<Item = &Arc<Ticket>> {
        let of = self.fetches.iter().filter(|fetch| experts.contains(&fetch.expert));
        of.flat_map(Fetch::loads).filter_map(|load| load.ticket())
    }

    /// Waits until nothing of `fetches` is on its way any more. Says of each slot whether it is filled.
    fn close(&self, fetches: Vec<Fetch>) -> Vec<(Slot, bool)> {
        let closed = fetches.into_iter().map(|fetch| (fetch.slot, fetch.close(&self.residency)));
        closed.collect()
    }

    fn end(&self, pool: &mut Pool, closed: Vec<(Slot, bool)>) {
        for (slot, filled) in closed {
            if filled {
                pool.commit(slot);
                pool.unpin(slot);
            } else {
                pool.abandon(slot);
            }
        }
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        self.give_up();
        let fetches = std::mem::take(&mut self.fetches);
        let closed = self.close(fetches);
        let mut pool = self.residency.lock();
        self.held.drain(..).for_each(|slot| pool.unpin(slot));
        self.end(&mut pool, closed);
        drop(pool);
        self.residency.settled.notify_all();
    }
}

//! The slots of one class, the floor-and-overflow rule over its layers, and where their records lie.

use std::ops::Range;

use crate::free::{FreeSlots, even_shares};
use crate::policy::{Candidates, Evictor};
use crate::pool::Record;

/// What a slot holds. Layers and records are numbered within the class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Free,
    Loading,
    Resident,
    /// Its load failed while others waited for it: free once they have let go.
    Draining,
}

#[derive(Clone, Debug)]
pub(crate) struct SlotState {
    pub(crate) state: State,
    pub(crate) layer: u32,
    pub(crate) expert: u32,
    pub(crate) pins: u32,
    /// The step of its last use.
    pub(crate) used: u64,
}

#[derive(Clone, Debug)]
pub(crate) struct LayerState {
    /// The layer's number in the pool.
    pub(crate) id: u32,
    /// Index of this layer's expert 0 among the records of the class.
    pub(crate) base: u32,
    pub(crate) floor: u32,
    /// Slots of this layer, resident or loading.
    pub(crate) held: u32,
    pub(crate) resident: u32,
    /// Resident and not pinned.
    pub(crate) evictable: u32,
}

impl LayerState {
    /// Slots that the layer still lacks to its floor.
    fn lack(&self) -> u32 {
        self.floor.saturating_sub(self.held)
    }

    /// Slots that other layers can take from it now.
    pub(crate) fn surplus(&self) -> u32 {
        self.evictable.min(self.held.saturating_sub(self.floor))
    }
}

/// One class. Before a first [`resize`](Class::resize), `free + draining >= lack` holds always, so
/// that a layer below its floor finds a free slot whatever is pinned, as long as no failed load is
/// being waited for. A resize may leave other layers above their new floors: what a layer lacks
/// then is free, draining, or among theirs.
#[derive(Clone, Debug)]
pub(crate) struct Class {
    /// With those out of use.
    slots: Vec<SlotState>,
    /// The slots below are in use. Those from here on get no record, and lose the one that they have
    /// when it is not pinned.
    in_use: u32,
    layers: Vec<LayerState>,
    /// Experts of each layer.
    experts: Vec<u32>,
    /// Of the slots in use.
    free: FreeSlots,
    /// Where each layer takes free slots first: its even share of the slots.
    regions: Vec<Range<u32>>,
    /// There is a slot for every record, so that each has a place of its own.
    holds_all: bool,
    /// The sum of the layers' [`LayerState::lack`].
    lack: u32,
    /// The sum of the layers' [`LayerState::surplus`].
    surplus: u32,
    /// Pins of all slots.
    pins: u64,
    evictor: Evictor,
}

impl Class {
    /// With `room` slots, of which `in_use` are used. `experts` holds the number of experts of each
    /// layer.
    pub(crate) fn new(
        room: u32,
        in_use: u32,
        layers: Vec<LayerState>,
        experts: Vec<u32>,
        evictor: Evictor,
    ) -> Self {
        let empty = SlotState { state: State::Free, layer: 0, expert: 0, pins: 0, used: 0 };
        let mut free = FreeSlots::all(room);
        (in_use..room).for_each(|slot| free.remove(slot));
        let mut class = Self {
            slots: vec![empty; room as usize],
            in_use,
            regions: vec![0..0; layers.len()],
            layers,
            experts,
            free,
            holds_all: false,
            lack: 0,
            surplus: 0,
            pins: 0,
            evictor,
        };
        class.share_out();
        class
    }

    /// Uses so many slots, or all if they are more, with a new floor for each layer. Tells which
    /// records had to go at once.
    pub(crate) fn resize(
        &mut self,
        slots: u32,
        floors: impl Iterator<Item = u32>,
        mut evicted: impl FnMut(Record),
    ) {
        let before = self.in_use;
        self.in_use = slots.min(self.slots.len() as u32);
        for slot in before..self.in_use {
            if self.slot(slot).state == State::Free {
                self.free.insert(slot);
            }
        }
        for slot in self.in_use..before {
            if self.slot(slot).state == State::Free {
                self.free.remove(slot);
            } else if self.is_evictable(slot) {
                self.record(slot).into_iter().for_each(&mut evicted);
                self.vacate(slot);
            }
        }
        self.layers.iter_mut().zip(floors).for_each(|(layer, floor)| layer.floor = floor);
        self.share_out();
    }

    /// Divides the slots in use into regions, and sums up what the floors leave.
    fn share_out(&mut self) {
        let shares = even_shares(&self.experts, self.in_use);
        self.regions.iter_mut().zip(shares).for_each(|(region, share)| *region = share);
        let records: u64 = self.experts.iter().copied().map(u64::from).sum();
        self.holds_all = records <= u64::from(self.in_use);
        self.lack = self.layers.iter().map(LayerState::lack).sum();
        self.surplus = self.layers.iter().map(LayerState::surplus).sum();
    }

    /// Pins of all slots.
    pub(crate) fn pins(&self) -> u64 {
        self.pins
    }

    /// Number of slots in use.
    pub(crate) fn in_use(&self) -> u32 {
        self.in_use
    }

    /// The first slot from which on none is in use, nor has anything in it or a pin on it.
    pub(crate) fn end(&self) -> u32 {
        let out_of_use = &self.slots[self.in_use as usize..];
        let held = out_of_use.iter().rposition(|slot| slot.state != State::Free);
        held.map_or(self.in_use, |last| self.in_use + last as u32 + 1)
    }

    pub(crate) fn slot(&self, slot: u32) -> &SlotState {
        &self.slots[slot as usize]
    }

    pub(crate) fn layer(&self, layer: u32) -> &LayerState {
        &self.layers[layer as usize]
    }

    /// The record in a loading or resident slot.
    pub(crate) fn record(&self, slot: u32) -> Option<Record> {
        let SlotState { state, layer, expert, .. } = *self.slot(slot);
        match state {
            State::Loading | State::Resident => {
                Some(Record { layer: self.layer(layer).id, expert })
            }
            State::Free | State::Draining => None,
        }
    }

    /// Number of [`take`](Self::take)s for `layer` that would succeed in a row.
    pub(crate) fn reservable(&self, layer: u32) -> u32 {
        let own = self.layer(layer);
        let free = self.free.len();
        let to_floor = own.lack().min(free);
        let overflow = (free - to_floor).saturating_sub(self.lack - own.lack());
        to_floor + overflow + self.evictable_for(layer)
    }

    /// Takes a slot for a record of `layer`, loading and pinned once. Also returns the record that
    /// had to go.
    pub(crate) fn take(
        &mut self,
        layer: u32,
        expert: u32,
        now: u64,
    ) -> Option<(u32, Option<Record>)> {
        let (slot, evicted) = match self.take_free(layer, expert) {
            Some(slot) => (slot, None),
            None => {
                let slot = self.victim(layer, now)?;
                let evicted = self.record(slot);
                self.vacate(slot);
                (slot, evicted)
            }
        };
        self.slots[slot as usize] =
            SlotState { state: State::Loading, layer, expert, pins: 1, used: now };
        self.pins += 1;
        self.update(layer, |layer| layer.held += 1);
        self.evictor.policy().on_insert(
            slot,
            layer,
            self.layers[layer as usize].base + expert,
            now,
        );
        Some((slot, evicted))
    }

    /// Records a use of a loading or resident slot and pins it.
    pub(crate) fn touch(&mut self, slot: u32, now: u64) {
        self.pin(slot);
        self.slots[slot as usize].used = now;
        self.evictor.policy().on_hit(slot, now);
    }

    /// Pins a loading or resident slot.
    pub(crate) fn pin(&mut self, slot: u32) {
        self.pins += 1;
        let entry = &mut self.slots[slot as usize];
        entry.pins += 1;
        if entry.state == State::Resident && entry.pins == 1 {
            let layer = entry.layer;
            self.update(layer, |layer| layer.evictable -= 1);
        }
    }

    /// Loading to resident; the pins stay.
    pub(crate) fn commit(&mut self, slot: u32) {
        let entry = &mut self.slots[slot as usize];
        assert!(entry.state == State::Loading, "commit of slot {slot}, which is not loading");
        entry.state = State::Resident;
        let layer = entry.layer;
        self.update(layer, |layer| layer.resident += 1);
    }

    /// Loading to free, or to draining while others have it pinned.
    pub(crate) fn abandon(&mut self, slot: u32) {
        let entry = &self.slots[slot as usize];
        assert!(entry.state == State::Loading, "abandon of slot {slot}, which is not loading");
        let pins = entry.pins - 1;
        self.pins -= 1;
        self.vacate(slot);
        let entry = &mut self.slots[slot as usize];
        entry.pins = pins;
        if pins == 0 {
            self.release(slot);
        } else {
            entry.state = State::Draining;
        }
    }

    /// Gives one pin back. Returns the record that has to go with the last one, from a slot that is
    /// out of use.
    pub(crate) fn unpin(&mut self, slot: u32) -> Option<Record> {
        let entry = &mut self.slots[slot as usize];
        assert!(entry.pins > 0, "unpin of slot {slot}, which is not pinned");
        assert!(
            entry.state != State::Loading || entry.pins > 1,
            "unpin of slot {slot} by the owner of its load, which is neither committed nor abandoned"
        );
        entry.pins -= 1;
        self.pins -= 1;
        if entry.pins > 0 {
            return None;
        }
        if entry.state == State::Draining {
            entry.state = State::Free;
            self.release(slot);
            return None;
        }
        let layer = entry.layer;
        self.update(layer, |layer| layer.evictable += 1);
        if slot < self.in_use {
            return None;
        }
        let evicted = self.record(slot);
        self.vacate(slot);
        evicted
    }

    pub(crate) fn is_evictable(&self, slot: u32) -> bool {
        let entry = &self.slots[slot as usize];
        entry.state == State::Resident && entry.pins == 0
    }

    /// Frees a slot if its record is resident and not pinned.
    pub(crate) fn forget(&mut self, slot: u32) -> bool {
        let can = self.is_evictable(slot);
        if can {
            self.vacate(slot);
            self.release(slot);
        }
        can
    }

    /// A slot that holds nothing is free, if it is in use.
    fn release(&mut self, slot: u32) {
        if slot < self.in_use {
            self.free.insert(slot);
        }
    }

    /// Takes a free slot, if the layer may: the record's own place in a class that holds all, else
    /// the lowest of the layer's region, else the one nearest to it.
    fn take_free(&mut self, layer: u32, expert: u32) -> Option<u32> {
        let own = self.layer(layer);
        let others_lack = self.lack - own.lack();
        if own.lack() == 0 && self.free.len() <= others_lack {
            return None;
        }
        let region = &self.regions[layer as usize];
        let place = region.start + expert;
        let slot = if self.holds_all && self.free.contains(place) {
            place
        } else {
            self.free.nearest(region)?
        };
        self.free.remove(slot);
        Some(slot)
    }

    fn victim(&mut self, layer: u32, now: u64) -> Option<u32> {
        if self.evictable_for(layer) == 0 {
            return None;
        }
        let mut from = Candidates {
            layers: &self.layers,
            slots: &self.slots,
            requester: layer,
            now,
            this_step_too: false,
        };
        self.evictor.policy().victim(&from).or_else(|| {
            from.this_step_too = true;
            self.evictor.policy().victim(&from)
        })
    }

    fn evictable_for(&self, layer: u32) -> u32 {
        let own = self.layer(layer);
        self.surplus - own.surplus() + own.evictable
    }

    /// Takes the record out of a loading or resident slot. The slot is not among the free ones
    /// yet.
    fn vacate(&mut self, slot: u32) {
        self.evictor.policy().on_remove(slot);
        let entry = &mut self.slots[slot as usize];
        let SlotState { state, layer, pins, .. } = *entry;
        entry.state = State::Free;
        self.update(layer, |layer| {
            layer.held -= 1;
            if state == State::Resident {
                layer.resident -= 1;
                layer.evictable -= u32::from(pins == 0);
            }
        });
    }

    /// Changes a layer's counts and keeps the sums of the class in step.
    fn update(&mut self, layer: u32, change: impl FnOnce(&mut LayerState)) {
        let layer = &mut self.layers[layer as usize];
        let (lack, surplus) = (layer.lack(), layer.surplus());
        change(layer);
        self.lack = self.lack - lack + layer.lack();
        self.surplus = self.surplus - surplus + layer.surplus();
    }
}

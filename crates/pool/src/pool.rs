//! The pool: records of all layers and classes, and what the caller does with them.

use crate::class::{Class, LayerState, State};
use crate::config::{self, Config, Error, LayerSpec};
use crate::counters::LayerCounters;
use crate::free;
use crate::policy::{Evictor, Shape};

const ABSENT: u32 = u32::MAX;

/// One expert of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Record {
    /// Index among the MoE layers, from 0 without gaps.
    pub layer: u32,
    /// Index among the experts of the layer.
    pub expert: u32,
}

/// Room for one record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot {
    /// The class, which names the pool tensor.
    pub class: u32,
    /// Index within the pool tensor of the class.
    pub index: u32,
}

/// Where a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lookup {
    /// In this slot, ready for use.
    Resident(Slot),
    /// On its way into this slot; whoever reserved it will commit or abandon it.
    Loading(Slot),
    /// In no slot.
    Absent,
}

/// A slot to load a record into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reservation {
    /// The slot, loading and pinned once.
    pub slot: Slot,
    /// The record that had to go, absent from now on; its bytes are still in the slot.
    pub evicted: Option<Record>,
}

/// Which record sits in which slot. The crate's front page tells the rules.
///
/// A record out of range (layer or expert) or a slot out of range is a mistake of the caller and
/// panics, in every method that takes one.
#[derive(Clone, Debug)]
pub struct Pool {
    layers: Vec<Layer>,
    classes: Vec<Class>,
    /// Slot index of each record, or [`ABSENT`].
    slot_of: Vec<u32>,
    /// Whether a record has ever arrived.
    touched: Vec<bool>,
    /// How often each record was asked for, modulo 2^32.
    uses: Vec<u32>,
    counters: Vec<LayerCounters>,
    step: u64,
    changes: u64,
}

#[derive(Clone, Debug)]
struct Layer {
    class: u32,
    /// Number of this layer among the layers of its class.
    local: u32,
    /// Index of expert 0 in `slot_of`, `touched` and `uses`.
    base: u32,
    experts: u32,
    record_bytes: u64,
}

impl Pool {
    /// An empty pool. All memory that it will ever use is allocated here.
    ///
    /// # Errors
    ///
    /// If the configuration makes no sense, or if a class has fewer slots than the floors of its
    /// layers need: the error then names the least number of slots and bytes.
    pub fn new(config: Config) -> Result<Self, Error> {
        config.check()?;
        let room = rooms(&config);
        let mut layers = Vec::with_capacity(config.layers.len());
        let mut states = vec![Vec::new(); config.slots.len()];
        let mut experts = vec![Vec::new(); config.slots.len()];
        let mut base = 0;
        for spec in &config.layers {
            let class = spec.class as usize;
            let local = states[class].len() as u32;
            let class_base = experts[class].iter().sum();
            layers.push(Layer {
                class: spec.class,
                local,
                base,
                experts: spec.experts,
                record_bytes: spec.record_bytes,
            });
            states[class].push(LayerState {
                id: layers.len() as u32 - 1,
                base: class_base,
                floor: spec.capped_floor(),
                held: 0,
                resident: 0,
                evictable: 0,
            });
            experts[class].push(spec.experts);
            base += spec.experts;
        }
        let cycle = layers.len() as u64;
        let classes = (0u64..)
            .zip(room.into_iter().zip(&config.slots))
            .zip(states.into_iter().zip(experts))
            .map(|((class, (room, &slots)), (states, experts))| {
                let seed = config.seed ^ class;
                let shape = Shape { slots: room, experts: &experts, cycle, seed };
                let evictor = Evictor::new(&config.policy, &shape);
                Class::new(room, slots, states, experts, evictor)
            })
            .collect();
        Ok(Self {
            counters: vec![LayerCounters::default(); layers.len()],
            layers,
            classes,
            slot_of: vec![ABSENT; base as usize],
            touched: vec![false; base as usize],
            uses: vec![0; base as usize],
            step: 0,
            changes: 0,
        })
    }

    /// The least number of slots per class that [`Pool::new`] accepts: the sum of the floors of its
    /// layers. Layers whose class is not below `classes` do not count.
    #[must_use]
    pub fn least_slots(layers: &[LayerSpec], classes: usize) -> Vec<u32> {
        config::least_slots(layers, classes)
    }

    /// An even share of `slots` for each layer of a class, in proportion to its `experts`; together
    /// they are all slots, or all experts when there are fewer. These are the sizes of the layers'
    /// regions. With these as floors no record ever leaves the region of its layer, see the crate's
    /// front page.
    #[must_use]
    pub fn even_shares(experts: &[u32], slots: u32) -> Vec<u32> {
        free::even_shares(experts, slots).map(|share| share.end - share.start).collect()
    }

    /// Uses `slots` slots of each class from now on, with `floors` for the layers.
    ///
    /// A class has room for a slot per record, or for what it was made with if that is more; a
    /// larger number counts as that. When there are fewer than before, the highest go out of use,
    /// whatever is in them: free ones at once; those of resident records that are not pinned at
    /// once too, which counts as evictions; the others when their last pin is given back, or their
    /// load has failed. Until then [`end`](Self::end) tells of them. A record in such a slot is
    /// found as any other, and pinned again by who asks for it.
    ///
    /// Records keep their slots, so that some will lie outside of their layers' new regions, and
    /// layers that had their records in the highest slots are below their floors. They get there
    /// again at the cost of the others, which may be all pinned in the meantime: then
    /// [`reserve`](Self::reserve) has nothing to give.
    ///
    /// # Errors
    ///
    /// [`Error::FloorsDoNotFit`], with the least. Nothing has changed then.
    ///
    /// # Panics
    ///
    /// If there is not one number for each class, and one floor for each layer.
    pub fn resize(&mut self, slots: &[u32], floors: &[u32]) -> Result<(), Error> {
        assert_eq!(slots.len(), self.classes.len(), "slots for every class");
        assert_eq!(floors.len(), self.layers.len(), "a floor for every layer");
        let specs = self.layers.iter().zip(floors).map(|(layer, &floor)| LayerSpec {
            class: layer.class,
            experts: layer.experts,
            floor,
            record_bytes: layer.record_bytes,
        });
        let specs: Vec<LayerSpec> = specs.collect();
        config::check_floors(&specs, slots)?;
        let mut gone = Vec::new();
        for (class, &slots) in slots.iter().enumerate() {
            let own = specs.iter().filter(|spec| spec.class as usize == class);
            let floors = own.map(LayerSpec::capped_floor);
            self.classes[class].resize(slots, floors, |record| gone.push(record));
        }
        gone.into_iter().for_each(|record| self.forget_evicted(record));
        Ok(())
    }

    /// Slots of a class that are in use.
    #[must_use]
    pub fn slots(&self, class: u32) -> u32 {
        self.classes[class as usize].in_use()
    }

    /// Where the slots of a class end: no slot from here on is in use, nor has anything in it, nor a
    /// pin on it. That stays so until the next [`resize`](Self::resize), so that what is behind
    /// those slots can be taken away. It is above [`slots`](Self::slots) as long as slots that are
    /// to go out of use are pinned.
    #[must_use]
    pub fn end(&self, class: u32) -> u32 {
        self.classes[class as usize].end()
    }

    /// Begins the next step: one MoE layer of one batch. Recency is measured in steps.
    pub fn begin_step(&mut self) {
        self.step += 1;
    }

    /// Asks for a record on behalf of the current step, counts that, and pins the slot if there is
    /// one. Ask once per distinct expert of the batch.
    ///
    /// - `Resident`: a hit.
    /// - `Loading`: a hit in flight. Wait until the owner is done, then [`peek`](Self::peek): while
    ///   the pin is held, `Resident` with the same slot says that the bytes are there, and anything
    ///   else that the load failed ([`abandon`](Self::abandon)). Unpin in either case.
    /// - `Absent`: a fault, nothing is pinned. [`reserve`](Self::reserve) a slot for it or read it
    ///   through staging and tell [`stream`](Self::stream).
    pub fn request(&mut self, record: Record) -> Lookup {
        let found = self.peek(record);
        let (_, key) = self.locate(record);
        self.uses[key] = self.uses[key].wrapping_add(1);
        let counters = &mut self.counters[record.layer as usize];
        counters.requests += 1;
        match found {
            Lookup::Absent => counters.faults += 1,
            Lookup::Resident(slot) => {
                counters.hits += 1;
                self.classes[slot.class as usize].touch(slot.index, self.step);
            }
            Lookup::Loading(slot) => {
                counters.hits_in_flight += 1;
                self.classes[slot.class as usize].touch(slot.index, self.step);
            }
        }
        found
    }

    /// Where a record is. Counts nothing, touches nothing, pins nothing.
    #[must_use]
    pub fn peek(&self, record: Record) -> Lookup {
        let (layer, key) = self.locate(record);
        let index = self.slot_of[key];
        if index == ABSENT {
            return Lookup::Absent;
        }
        let slot = Slot { class: layer.class, index };
        match self.classes[layer.class as usize].slot(index).state {
            State::Resident => Lookup::Resident(slot),
            State::Loading => Lookup::Loading(slot),
            State::Free | State::Draining => unreachable!("a mapped slot holds its record"),
        }
    }

    /// Pins a resident record that is expected to be asked for, so that nothing evicts it before:
    /// counts nothing, and the policies do not see it. `None` if it is not resident.
    pub fn hold(&mut self, record: Record) -> Option<Slot> {
        let Lookup::Resident(slot) = self.peek(record) else { return None };
        self.classes[slot.class as usize].pin(slot.index);
        Some(slot)
    }

    /// Takes a slot for an absent record: a free one, or the one of a victim that the policy
    /// chooses. The record counts as used in this step, its slot is loading and pinned once; the
    /// caller fills it and then calls [`commit`](Self::commit) or [`abandon`](Self::abandon).
    ///
    /// `None` if every slot that the layer may have is pinned or held for other layers. That cannot
    /// happen to a layer below its floor, unless waiters still pin slots whose load failed, or a
    /// [`resize`](Self::resize) has left other layers with more than their floors, all pinned.
    ///
    /// # Panics
    ///
    /// If the record is resident or loading.
    pub fn reserve(&mut self, record: Record) -> Option<Reservation> {
        let (layer, key) = self.locate(record);
        assert!(self.slot_of[key] == ABSENT, "reserve of {record:?}, which has a slot");
        let (class, local) = (layer.class, layer.local);
        let (index, evicted) =
            self.classes[class as usize].take(local, record.expert, self.step)?;
        if let Some(evicted) = evicted {
            self.forget_evicted(evicted);
        }
        self.slot_of[key] = index;
        self.changes += 1;
        Some(Reservation { slot: Slot { class, index }, evicted })
    }

    /// How many [`reserve`](Self::reserve) calls for absent records of this layer would succeed
    /// one after the other, with nothing else in between.
    #[must_use]
    pub fn reservable(&self, layer: u32) -> u32 {
        let layer = &self.layers[layer as usize];
        self.classes[layer.class as usize].reservable(layer.local)
    }

    /// The bytes have arrived: the slot is resident. The owner's pin stays, so that the record
    /// cannot go before it is used. Counts the bytes, and the first arrival of a record.
    ///
    /// # Panics
    ///
    /// If the slot is not loading.
    pub fn commit(&mut self, slot: Slot) {
        self.classes[slot.class as usize].commit(slot.index);
        if let Some(record) = self.record_in(slot) {
            self.count_arrival(record);
        }
    }

    /// The load has failed: the record is absent at once, and the owner's pin is gone.
    ///
    /// The slot is free again when no waiter has it pinned. As long as one does, it holds nothing
    /// and is given to nobody, so that a waiter never finds a stranger's bytes under its pin: it
    /// sees that its record is `Absent`, or loading into another slot, and unpins as always.
    ///
    /// # Panics
    ///
    /// If the slot is not loading.
    pub fn abandon(&mut self, slot: Slot) {
        let record = self.record_in(slot);
        self.classes[slot.class as usize].abandon(slot.index);
        if let Some(record) = record {
            let (_, key) = self.locate(record);
            self.slot_of[key] = ABSENT;
            self.changes += 1;
        }
    }

    /// Gives one pin back. With the last one, the record of a slot that is out of use is evicted.
    ///
    /// # Panics
    ///
    /// If the slot is not pinned, or if this is the last pin of a loading slot: its owner commits
    /// or abandons first.
    pub fn unpin(&mut self, slot: Slot) {
        if let Some(evicted) = self.classes[slot.class as usize].unpin(slot.index) {
            self.forget_evicted(evicted);
        }
    }

    /// A record was read through staging and used there, without a slot: counts its bytes and its
    /// first arrival. [`request`](Self::request) has already counted the fault. The policies do not
    /// see it, so that a prefill does not disturb what decoding has taught them.
    pub fn stream(&mut self, record: Record) {
        self.count_arrival(record);
    }

    /// Whether a record is resident and not pinned.
    #[must_use]
    pub fn is_evictable(&self, record: Record) -> bool {
        let (layer, key) = self.locate(record);
        let index = self.slot_of[key];
        index != ABSENT && self.classes[layer.class as usize].is_evictable(index)
    }

    /// Forgets a record if it [is evictable](Self::is_evictable); returns whether it did. Not
    /// counted as an eviction: nothing has taken its slot yet.
    pub fn evict(&mut self, record: Record) -> bool {
        let (layer, key) = self.locate(record);
        let (class, index) = (layer.class as usize, self.slot_of[key]);
        let forgotten = index != ABSENT && self.classes[class].forget(index);
        if forgotten {
            self.slot_of[key] = ABSENT;
            self.changes += 1;
        }
        forgotten
    }

    /// Forgets every record that is resident and not pinned; returns how many. They do not count
    /// as evictions. Counters, and what the policies have learned about absent records, stay.
    pub fn clear(&mut self) -> u32 {
        let mut forgotten = 0;
        for &Layer { class, base, experts, .. } in &self.layers {
            for slot_of in &mut self.slot_of[base as usize..(base + experts) as usize] {
                if *slot_of != ABSENT && self.classes[class as usize].forget(*slot_of) {
                    *slot_of = ABSENT;
                    forgotten += 1;
                }
            }
        }
        self.changes += u64::from(forgotten);
        forgotten
    }

    /// Whether nothing is pinned, and so nothing on its way.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.classes.iter().all(|class| class.pins() == 0)
    }

    /// How often a record has got a slot or lost it so far: who has a copy of what
    /// [`peek`](Self::peek) tells of all records can see whether it is still right.
    #[must_use]
    pub fn changes(&self) -> u64 {
        self.changes
    }

    /// What was counted so far, one entry per layer.
    #[must_use]
    pub fn counters(&self) -> &[LayerCounters] {
        &self.counters
    }

    /// How often each expert of a layer was [asked for](Self::request), modulo 2^32.
    #[must_use]
    pub fn uses(&self, layer: u32) -> &[u32] {
        let layer = &self.layers[layer as usize];
        &self.uses[layer.base as usize..][..layer.experts as usize]
    }

    /// Number of resident records of a layer; those being loaded do not count.
    #[must_use]
    pub fn resident(&self, layer: u32) -> u32 {
        let layer = &self.layers[layer as usize];
        self.classes[layer.class as usize].layer(layer.local).resident
    }

    /// Bytes of all resident records.
    #[must_use]
    pub fn resident_bytes(&self) -> u64 {
        let layers = (0u32..).zip(&self.layers);
        layers.map(|(id, layer)| u64::from(self.resident(id)) * layer.record_bytes).sum()
    }

    /// The record that is resident in a slot or being loaded into it.
    #[must_use]
    pub fn record_in(&self, slot: Slot) -> Option<Record> {
        self.classes[slot.class as usize].record(slot.index)
    }

    /// The layer's spec, and the record's index in `slot_of`, `touched` and `uses`.
    fn locate(&self, record: Record) -> (&Layer, usize) {
        let layer = &self.layers[record.layer as usize];
        assert!(
            record.expert < layer.experts,
            "{record:?}: the layer has {} experts",
            layer.experts
        );
        (layer, (layer.base + record.expert) as usize)
    }

    /// A record has lost its slot.
    fn forget_evicted(&mut self, record: Record) {
        let (_, key) = self.locate(record);
        self.slot_of[key] = ABSENT;
        self.changes += 1;
        self.counters[record.layer as usize].evictions += 1;
    }

    fn count_arrival(&mut self, record: Record) {
        let (layer, key) = self.locate(record);
        let bytes = layer.record_bytes;
        let counters = &mut self.counters[record.layer as usize];
        counters.bytes_faulted += bytes;
        counters.first_touches += u64::from(!self.touched[key]);
        self.touched[key] = true;
    }
}

/// Slots that each class ever has: one for every record, or what it is made with.
fn rooms(config: &Config) -> Vec<u32> {
    let mut records = vec![0u32; config.slots.len()];
    config.layers.iter().for_each(|spec| records[spec.class as usize] += spec.experts);
    records.iter().zip(&config.slots).map(|(&records, &slots)| records.max(slots)).collect()
}

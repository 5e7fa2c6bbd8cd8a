//! Whole layers in expert order, in an area of their own behind the slots: what a batch of several
//! tokens is computed with on a GPU.
//!
//! Kernels for several tokens cut their work by the number of an expert's matrix (mmq.cuh,
//! "stream-k"), so that the bits of their output depend on where each expert lies. With every
//! expert at the place that it has in the file, they are those of the resident model.

use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use tierstream_cuda::Event;
use tierstream_io::Priority;
use tierstream_pool::{Lookup, Slot};

use super::elastic::Elastic;
use super::layer::TAIL_BYTES;
use super::load::{Destination, Load, Waits};
use super::vram::lock;
use super::{CANCEL_LOOKED_FOR_EVERY, Layer, Need, Placed, Residency, Store, index32, record};
use crate::abi::*;
use crate::error::{Error, Result};

/// Rows at the end of a batch whose records stay in slots. What only earlier ones needed would have to
/// be copied there too, for nothing if another batch follows.
const KEPT_ROWS: u32 = 4;

/// Room for whole layers, each taken by one context at a time: one layer is computed, while another
/// is brought if there is room for two.
pub(super) struct Area {
    /// Where it begins in the store.
    pub(super) offset: u64,
    /// Bytes of room for one layer.
    bytes: u64,
    free: Mutex<Vec<bool>>,
    freed: Condvar,
}

impl Area {
    /// For `count` of `layers` at a time, from `offset` of the store on.
    pub(super) fn new(offset: u64, layers: &[Layer], count: usize) -> Self {
        let bytes = layers.iter().map(layer_bytes).max().unwrap_or(0);
        Self { offset, bytes, free: Mutex::new(vec![true; count]), freed: Condvar::new() }
    }

    /// Where it ends in the store.
    pub(super) fn end(&self) -> u64 {
        self.offset_of(lock(&self.free).len())
    }

    /// Where in the store the rooms are that are taken.
    pub(super) fn taken(&self) -> Vec<Range<u64>> {
        let free = lock(&self.free);
        let taken = free.iter().enumerate().filter(|&(_, &free)| !free);
        taken.map(|(room, _)| self.offset_of(room)..self.offset_of(room) + self.bytes).collect()
    }

    fn offset_of(&self, room: usize) -> u64 {
        self.offset + room as u64 * self.bytes
    }

    /// Room for a layer, if there is some now.
    fn try_take(&self) -> Option<usize> {
        take_free(&mut lock(&self.free))
    }

    fn take(&self, cancelled: &dyn Fn() -> bool) -> Result<usize> {
        let mut free = lock(&self.free);
        loop {
            if let Some(room) = take_free(&mut free) {
                return Ok(room);
            }
            if cancelled() {
                return Err(Error::Cancelled);
            }
            let waited = self.freed.wait_timeout(free, CANCEL_LOOKED_FOR_EVERY);
            free = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn give_back(&self, room: usize) {
        lock(&self.free)[room] = true;
        self.freed.notify_one();
    }
}

fn take_free(free: &mut [bool]) -> Option<usize> {
    let room = free.iter().position(|&free| free)?;
    free[room] = false;
    Some(room)
}

/// Bytes of all records of a layer, as they lie in the area.
pub(crate) fn layer_bytes(layer: &Layer) -> u64 {
    (0..layer.parts.len()).map(|part| part_bytes(layer, part)).sum()
}

fn part_bytes(layer: &Layer, part: usize) -> u64 {
    layer.parts[part].slot.bytes_of(layer.experts as usize, TAIL_BYTES) as u64
}

/// What a batch needs of a layer, in the area. Nobody else gets its room while this lives.
pub(crate) struct Stage {
    residency: Arc<Residency>,
    layer: usize,
    /// Of the area.
    room: usize,
    /// Experts that are there.
    experts: Vec<u32>,
    /// Records that were brought, not from a slot, before they were asked for.
    ahead: Vec<u32>,
}

impl Residency {
    /// Room for a layer, with nothing in it. The caller holds nothing of the pool.
    pub(crate) fn stage(
        self: &Arc<Self>,
        layer: usize,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<Stage> {
        let area = self.area.as_ref().ok_or_else(|| Error::Internal("no area".into()))?;
        let room = area.take(cancelled)?;
        let stage = Stage::new(self, layer, room);
        // Here, where the caller holds nothing of the pool: it may have to wait for a resize, which
        // waits for what is held.
        self.back_area(area.offset_of(room), layer_bytes(&self.layers[layer]), cancelled)?;
        Ok(stage)
    }

    /// The same, with records (distinct, of a layer that comes next) on their way that it will probably
    /// need, likely ones first: those in slots, and of the others no more than `most_bytes`. None if
    /// there is no room now, or no memory: it is not worth any slots.
    pub(crate) fn stage_ahead(
        self: &Arc<Self>,
        layer: usize,
        experts: &[u32],
        most_bytes: u64,
    ) -> Result<Option<Coming>> {
        let (Store::Vram(vram), Some(area)) = (&self.store, &self.area) else { return Ok(None) };
        let Some(room) = area.try_take() else { return Ok(None) };
        let mut stage = Stage::new(self, layer, room);
        let left = self.elastic.as_ref().map_or(0, Elastic::left_bytes);
        match vram.back(area.offset_of(room), layer_bytes(&self.layers[layer]), left) {
            Err(Error::OutOfGpuMemory(_)) => return Ok(None),
            backed => backed?,
        }
        let most = most_bytes / self.layers[layer].record_bytes().max(1);
        let most = usize::try_from(most).unwrap_or(usize::MAX);
        let (transfer, missing) = stage.start(experts, most)?;
        let is_cut = missing.len() == most;
        stage.ahead = missing;
        Ok(Some(Coming { transfer, stage, is_cut }))
    }

    /// Zeros where kernels may read beyond a record and no needed one follows: what other layers have
    /// left there may be no numbers in this one's type.
    fn clear_gaps(
        &self,
        layer: usize,
        area: Destination,
        (new, all): (&[u32], &[u32]),
    ) -> Result<()> {
        let Store::Vram(vram) = &self.store else { return Ok(()) };
        let Layer { parts, experts: count, .. } = &self.layers[layer];
        let mut cleared = false;
        for (index, part) in parts.iter().enumerate().filter(|(_, part)| part.is_read_beyond()) {
            for next in new.iter().map(|expert| expert + 1) {
                if all.contains(&next) {
                    continue;
                }
                // Not into the place of the one after.
                let room = if next < *count { part.slot.stride } else { TAIL_BYTES };
                let at = self.part_in(layer, index, area, next);
                vram.clear(self.store.offset(at), room.min(TAIL_BYTES) as u64)?;
                cleared = true;
            }
        }
        // A record may be copied there from its slot, later.
        if cleared { vram.copy_after_clearing() } else { Ok(()) }
    }

    /// Starts to copy a record from one place of the store to another.
    fn copy_record(
        &self,
        layer: usize,
        (from, from_slot): (Destination, u32),
        (to, to_slot): (Destination, u32),
    ) -> Result<()> {
        let Store::Vram(vram) = &self.store else { return Ok(()) };
        for (index, part) in self.layers[layer].parts.iter().enumerate() {
            let at = |place, slot| self.store.offset(self.part_in(layer, index, place, slot));
            vram.copy(at(from, from_slot), at(to, to_slot), part.bytes as u64)?;
        }
        Ok(())
    }

    /// Where the slots of `part` of `layer` begin.
    pub(super) fn first_slot(&self, layer: usize, part: usize, place: Destination) -> *mut u8 {
        let spec = &self.layers[layer];
        match (place, &self.area) {
            (Destination::Area(room), Some(area)) => {
                let before: u64 = (0..part).map(|p| part_bytes(spec, p)).sum();
                let offset = usize::try_from(area.offset_of(room) + before).expect("an address");
                self.store.base().wrapping_add(offset)
            }
            _ => self.classes[spec.class].parts[part].data.cast(),
        }
    }
}

impl Stage {
    fn new(residency: &Arc<Residency>, layer: usize, room: usize) -> Self {
        let (experts, ahead) = (Vec::new(), Vec::new());
        Self { residency: residency.clone(), layer, room, experts, ahead }
    }

    /// Brings those records of `experts` that are not here yet, from slots and from where the pool
    /// has its records from.
    pub(crate) fn bring(&mut self, experts: &[u32], waits: Waits<'_>) -> Result<()> {
        let Some(mut transfer) = self.start_rest(experts)? else { return Ok(()) };
        transfer.wait(self, waits)
    }

    /// Starts to bring those records of `experts` that are not here yet, if there are any.
    fn start_rest(&mut self, experts: &[u32]) -> Result<Option<Transfer>> {
        let new: Vec<u32> = experts.iter().filter(|e| !self.experts.contains(e)).copied().collect();
        if new.is_empty() {
            return Ok(None);
        }
        self.start(&new, usize::MAX).map(|(transfer, _)| Some(transfer))
    }

    /// Starts to bring `new` records, which are not here yet: what comes without waiting for another
    /// context, and no more than the first `most` of those that are in no slot, which are returned, too.
    fn start(&mut self, new: &[u32], most: usize) -> Result<(Transfer, Vec<u32>)> {
        let Self { residency, layer, room, experts: there, .. } = self;
        let mut transfer =
            Transfer { held: Held::new(residency), hits: Vec::new(), load: None, over: false };
        let mut missing = Vec::new();
        let mut pool = residency.change();
        let mut new: Vec<u32> = new.to_vec();
        new.retain(|&expert| match pool.hold(record(*layer, expert)) {
            Some(slot) => {
                transfer.held.pinned.push(slot);
                transfer.hits.push((expert, slot));
                true
            }
            None if missing.len() < most => {
                missing.push(expert);
                true
            }
            None => false,
        });
        drop(pool);
        let to = Destination::Area(*room);
        there.extend(&new);
        residency.clear_gaps(*layer, to, (&new, there))?;
        if !missing.is_empty() {
            let parts: Vec<usize> = (0..residency.layers[*layer].parts.len()).collect();
            let in_order = |&expert: &u32| Placed { expert, slot: expert };
            let placed: Vec<Placed> = missing.iter().map(in_order).collect();
            let load = Load::start(residency, *layer, &parts, &placed, to, Priority::Demand);
            transfer.load.insert(load).begin(residency)?;
        }
        Ok((transfer, missing))
    }

    /// Counts what a batch needs of the layer (distinct experts, at least one), which is here, and
    /// starts to copy the records of its last rows to slots, as far as there are some: decoding goes
    /// on from there. No more than the layer's share, so that a prompt does not turn over what others
    /// have.
    pub(crate) fn keep(&self, need: &[Need]) -> Result<Kept> {
        let Self { residency, layer, room, ahead, .. } = self;
        residency.count_ahead(ahead.iter().copied(), need);
        let mut held = Held::new(residency);
        let mut missing = Vec::new();
        let mut pool = residency.change();
        pool.begin_step();
        for &n in need {
            match pool.request(record(*layer, n.expert)) {
                Lookup::Resident(slot) | Lookup::Loading(slot) => held.pinned.push(slot),
                Lookup::Absent => missing.push(n),
            }
        }
        missing.sort_by_key(|n| (n.last_row, n.expert));
        let last_row = need.iter().map(|n| n.last_row).max().unwrap_or(0);
        let recent = missing.iter().filter(|n| n.last_row + KEPT_ROWS > last_row).count();
        let slots = pool.reservable(index32(*layer)) as usize;
        let stay = missing.len() - recent.min(slots).min(residency.share(&pool, *layer));
        for n in &missing[stay..] {
            let found = pool.reserve(record(*layer, n.expert));
            held.reserved.extend(found.map(|found| (n.expert, found.slot)));
        }
        for n in &missing[..stay] {
            pool.stream(record(*layer, n.expert));
        }
        drop(pool);
        for expert in residency.back_kept(*layer, &mut held.reserved)? {
            residency.lock().stream(record(*layer, expert));
        }
        let mut kept = Kept { held, copied: None };
        kept.held.reserved.iter().try_for_each(|&(expert, slot)| {
            let from = (Destination::Area(*room), expert);
            residency.copy_record(*layer, from, (Destination::Slots, slot.index))
        })?;
        if let (Store::Vram(vram), false) = (&residency.store, kept.held.reserved.is_empty()) {
            kept.copied = Some(vram.copied()?);
        }
        Ok(kept)
    }

    /// The tensor of `part`, as kernels get it: all experts of the layer, in order.
    pub(crate) fn tensor(&self, part: usize) -> ggml_tensor {
        let spec = &self.residency.layers[self.layer];
        let mut tensor = self.residency.classes[spec.class].parts[part];
        tensor.data =
            self.residency.first_slot(self.layer, part, Destination::Area(self.room)).cast();
        tensor.ne[2] = i64::from(spec.experts);
        tensor.nb[3] = tensor.nb[2] * spec.experts as usize;
        tensor
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.residency.area.as_ref().expect("it was taken").give_back(self.room);
    }
}

/// A layer in the area, with records on their way there.
pub(crate) struct Coming {
    // Dropped first: the room is used again when nothing is on its way to it.
    transfer: Transfer,
    stage: Stage,
    /// Whether there would have been more of them.
    is_cut: bool,
}

impl Coming {
    pub(crate) fn layer(&self) -> usize {
        self.stage.layer
    }

    /// Whether there would have been more to bring.
    pub(crate) fn is_cut(&self) -> bool {
        self.is_cut
    }

    /// Whether nothing is on its way from outside the pool any more.
    pub(crate) fn is_idle(&self) -> bool {
        self.transfer.load.as_ref().is_none_or(Load::is_over)
    }

    /// Starts to copy what is in slots. Not done from the start, since it takes the host some time.
    pub(crate) fn copy_hits(&mut self) -> Result<()> {
        self.transfer.copy_hits(&self.stage)
    }

    /// Brings the rest of `experts`, and waits until all of them are there.
    pub(crate) fn complete(self, experts: &[u32], waits: Waits<'_>) -> Result<Stage> {
        let Self { mut stage, mut transfer, .. } = self;
        let Waits { cancelled, ticket, meanwhile } = waits;
        if !transfer.begin(&stage)? {
            // Who waits for others has nothing on its way that they may wait for.
            transfer.wait(&stage, Waits { cancelled, ticket, meanwhile })?;
        }
        let mut rest = stage.start_rest(experts)?;
        if let Some(rest) = &mut rest {
            rest.copy_hits(&stage)?;
        }
        transfer.wait(&stage, Waits { cancelled, ticket, meanwhile })?;
        if let Some(rest) = &mut rest {
            rest.wait(&stage, Waits { cancelled, ticket, meanwhile })?;
        }
        drop((transfer, rest));
        Ok(stage)
    }
}

/// Records on their way to the area.
struct Transfer {
    held: Held,
    /// Those that are to be copied from slots, which are held.
    hits: Vec<(u32, Slot)>,
    /// The others.
    load: Option<Load>,
    /// Whether nothing is on its way any more.
    over: bool,
}

impl Transfer {
    /// Starts to bring what comes without waiting for another context. Whether that is everything.
    fn begin(&self, stage: &Stage) -> Result<bool> {
        self.load.as_ref().map_or(Ok(true), |load| load.begin(&stage.residency))
    }

    /// Starts to copy what is in slots, unless that has been done.
    fn copy_hits(&mut self, stage: &Stage) -> Result<()> {
        let Stage { residency, layer, room, .. } = stage;
        std::mem::take(&mut self.hits).into_iter().try_for_each(|(expert, slot)| {
            let to = (Destination::Area(*room), expert);
            residency.copy_record(*layer, (Destination::Slots, slot.index), to)
        })
    }

    /// Copies what is in slots, while the rest arrives, and waits for all.
    fn wait(&mut self, stage: &Stage, waits: Waits<'_>) -> Result<()> {
        let residency = &stage.residency;
        match self.load.take() {
            None => self.copy_hits(stage)?,
            Some(load) => {
                let Waits { cancelled, ticket, .. } = waits;
                let mut meanwhile = || self.copy_hits(stage);
                let waits = Waits { cancelled, ticket, meanwhile: &mut meanwhile };
                let arrived = load.wait(residency, waits);
                self.load = Some(load);
                arrived?;
            }
        }
        residency.settle()?;
        self.over = true;
        Ok(())
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        if self.over {
            return;
        }
        if let Some(load) = &self.load {
            load.ticket().inspect(|ticket| ticket.cancel());
            load.close(&self.held.residency);
        }
        // The room is used again, and the slots given up, only when nothing is on its way. On a lost
        // device nothing is copied any more, whatever this says.
        let _ = self.held.residency.settle();
    }
}

/// Records on their way from the area to the slots that they stay in. The [`Stage`] is held until
/// this is gone. Not waited for at once: the GPU takes its time for copies of its own while it
/// computes, and the bus is free.
pub(crate) struct Kept {
    held: Held,
    /// Behind the copies, if there are any.
    copied: Option<Event>,
}

impl Kept {
    /// Waits until they are there: they are resident from now on.
    pub(crate) fn finish(mut self) -> Result<()> {
        // And for nothing else that is copied.
        self.copied.as_ref().map_or(Ok(()), Event::wait)?;
        self.held.commit();
        Ok(())
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        // Slots are not given up before: another record could be on its way into one of them. On a
        // lost device nothing is copied any more, whatever this says.
        if !self.held.reserved.is_empty() {
            let _ = self.held.residency.settle();
        }
    }
}

/// What a batch holds of the pool while copies are under way.
pub(super) struct Held {
    residency: Arc<Residency>,
    pinned: Vec<Slot>,
    /// Slots that are being filled, and whose records.
    pub(super) reserved: Vec<(u32, Slot)>,
}

impl Held {
    pub(super) fn new(residency: &Arc<Residency>) -> Self {
        Self { residency: residency.clone(), pinned: Vec::new(), reserved: Vec::new() }
    }

    /// The reserved slots are filled.
    pub(super) fn commit(&mut self) {
        let mut pool = self.residency.lock();
        for (_, slot) in self.reserved.drain(..) {
            pool.commit(slot);
            self.pinned.push(slot);
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut pool = self.residency.lock();
        self.reserved.drain(..).for_each(|(_, slot)| pool.abandon(slot));
        self.pinned.drain(..).for_each(|slot| pool.unpin(slot));
        drop(pool);
        self.residency.settled.notify_all();
    }
}

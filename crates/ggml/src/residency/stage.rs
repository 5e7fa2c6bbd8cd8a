//! Whole layers in expert order, in an area of their own behind the slots: what a batch of several
//! tokens is computed with on a GPU.
//!
//! Kernels for several tokens cut their work by the number of an expert's matrix (mmq.cuh,
//! "stream-k"), so that the bits of their output depend on where each expert lies. With every
//! expert at the place that it has in the file, they are those of the resident model.

use std::sync::{Arc, Condvar, Mutex, PoisonError};

use tierstream_io::Priority;
use tierstream_pool::{Lookup, Slot};

use super::layer::TAIL_BYTES;
use super::load::{Destination, Load, Waits};
use super::{CANCEL_LOOKED_FOR_EVERY, Layer, Need, Placed, Residency, Store, index32, record};
use crate::abi::*;
use crate::error::{Error, Result};

/// Rows at the end of a batch whose records stay in slots. What only earlier ones needed would have to
/// be copied there too, for nothing if another batch follows.
const KEPT_ROWS: u32 = 4;

/// Room for one layer, for one context at a time.
pub(super) struct Area {
    /// Where it begins in the store.
    pub(super) offset: u64,
    bytes: u64,
    free: Mutex<bool>,
    freed: Condvar,
}

impl Area {
    /// For any of `layers`, from `offset` of the store on.
    pub(super) fn new(offset: u64, layers: &[Layer]) -> Self {
        let bytes = layers.iter().map(layer_bytes).max().unwrap_or(0);
        Self { offset, bytes, free: Mutex::new(true), freed: Condvar::new() }
    }

    /// Where it ends in the store.
    pub(super) fn end(&self) -> u64 {
        self.offset + self.bytes
    }

    fn take(&self, cancelled: &dyn Fn() -> bool) -> Result<()> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        while !*free {
            if cancelled() {
                return Err(Error::Cancelled);
            }
            let waited = self.freed.wait_timeout(free, CANCEL_LOOKED_FOR_EVERY);
            free = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        *free = false;
        Ok(())
    }

    fn give_back(&self) {
        *self.free.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.freed.notify_one();
    }
}

/// Bytes of all records of a layer, as they lie in the area.
pub(crate) fn layer_bytes(layer: &Layer) -> u64 {
    (0..layer.parts.len()).map(|part| part_bytes(layer, part)).sum()
}

fn part_bytes(layer: &Layer, part: usize) -> u64 {
    layer.parts[part].slot.bytes_of(layer.experts as usize, TAIL_BYTES) as u64
}

/// What a batch needs of a layer, in the area. Nobody else gets the area while this lives.
pub(crate) struct Stage {
    residency: Arc<Residency>,
    layer: usize,
}

impl Residency {
    /// Brings the records of `need` (distinct experts, at least one) into the area, from slots and
    /// from files, and those of the last rows into slots, as far as there are some.
    pub(crate) fn stage(
        self: &Arc<Self>,
        layer: usize,
        need: &[Need],
        waits: Waits<'_>,
    ) -> Result<Stage> {
        let area = self.area.as_ref().ok_or_else(|| Error::Internal("no area".into()))?;
        area.take(waits.cancelled)?;
        let stage = Stage { residency: self.clone(), layer };
        let Store::Vram(vram) = &self.store else { return Ok(stage) };
        self.back_area(area.offset, layer_bytes(&self.layers[layer]), waits.cancelled)?;
        let mut held = self.hold(layer, need, waits.cancelled)?;
        self.back_kept(layer, &mut held.kept)?;
        self.clear_gaps(layer, need)?;
        let brought = self.bring_to_area(layer, &held, waits);
        // The area is used again only when nothing is on its way there.
        let settled = vram.settle();
        brought.and(settled)?;
        let kept = held.kept.iter().try_for_each(|(expert, slot)| {
            let (from, to) = ((Destination::Area, *expert), (Destination::Slots, slot.index));
            self.copy_record(layer, from, to)
        });
        // Nor are the slots given up before: another record could be on its way into one of them.
        let settled = vram.settle();
        kept.and(settled)?;
        held.commit();
        Ok(stage)
    }

    /// Zeros where kernels may read beyond a record and no needed one follows: what other layers have
    /// left there may be no numbers in this one's type.
    fn clear_gaps(&self, layer: usize, need: &[Need]) -> Result<()> {
        let Store::Vram(vram) = &self.store else { return Ok(()) };
        let Layer { parts, experts, .. } = &self.layers[layer];
        for (index, part) in parts.iter().enumerate().filter(|(_, part)| part.is_read_beyond()) {
            for next in need.iter().map(|n| n.expert + 1) {
                if need.iter().any(|n| n.expert == next) {
                    continue;
                }
                // Not into the place of the one after.
                let room = if next < *experts { part.slot.stride } else { TAIL_BYTES };
                let at = self.part_in(layer, index, Destination::Area, next);
                vram.clear(self.store.offset(at), room.min(TAIL_BYTES) as u64)?;
            }
        }
        Ok(())
    }

    /// Copies what is in slots, while what is missing arrives.
    fn bring_to_area(self: &Arc<Self>, layer: usize, held: &Held, waits: Waits<'_>) -> Result<()> {
        let mut copy_hits = || {
            held.hits.iter().try_for_each(|(expert, slot)| {
                let (from, to) = ((Destination::Slots, slot.index), (Destination::Area, *expert));
                self.copy_record(layer, from, to)
            })
        };
        if held.missing.is_empty() {
            return copy_hits();
        }
        let parts: Vec<usize> = (0..self.layers[layer].parts.len()).collect();
        let in_order = |&expert: &u32| Placed { expert, slot: expert };
        let placed: Vec<Placed> = held.missing.iter().map(in_order).collect();
        let to = Destination::Area;
        let load = Load::start(self, layer, &parts, &placed, to, Priority::Demand);
        let Waits { cancelled, ticket, .. } = waits;
        let brought = load.wait(self, Waits { cancelled, ticket, meanwhile: &mut copy_hits });
        if let (Err(_), Some(ticket)) = (&brought, load.ticket()) {
            ticket.cancel();
            let _ = ticket.wait();
        }
        brought
    }

    /// Pins what is resident, and takes slots for what is to stay of the rest.
    fn hold(
        self: &Arc<Self>,
        layer: usize,
        need: &[Need],
        cancelled: &dyn Fn() -> bool,
    ) -> Result<Held> {
        let mut pool = self.lock();
        // Another context brings one of them: it is waited for, not read twice.
        while need.iter().any(|n| matches!(pool.peek(record(layer, n.expert)), Lookup::Loading(_)))
        {
            if cancelled() {
                return Err(Error::Cancelled);
            }
            let waited = self.settled.wait_timeout(pool, CANCEL_LOOKED_FOR_EVERY);
            pool = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        let mut held = Held {
            residency: self.clone(),
            hits: Vec::new(),
            missing: Vec::new(),
            kept: Vec::new(),
        };
        pool.begin_step();
        let mut missing = Vec::new();
        for &n in need {
            match pool.request(record(layer, n.expert)) {
                Lookup::Resident(slot) => held.hits.push((n.expert, slot)),
                _ => missing.push(n),
            }
        }
        // Those of the last rows stay: decoding goes on from there. No more than this layer's
        // share, so that a prompt does not turn over what the others have.
        missing.sort_by_key(|n| (n.last_row, n.expert));
        let last_row = need.iter().map(|n| n.last_row).max().unwrap_or(0);
        let recent = missing.iter().filter(|n| n.last_row + KEPT_ROWS > last_row).count();
        let room = pool.reservable(index32(layer)) as usize;
        let stay = missing.len() - recent.min(room).min(self.share(&pool, layer));
        for n in &missing[stay..] {
            let found = pool.reserve(record(layer, n.expert));
            held.kept.extend(found.map(|found| (n.expert, found.slot)));
        }
        for n in &missing[..stay] {
            pool.stream(record(layer, n.expert));
        }
        drop(pool);
        held.missing = missing.iter().map(|n| n.expert).collect();
        held.missing.sort_unstable();
        Ok(held)
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
            (Destination::Area, Some(area)) => {
                let before: u64 = (0..part).map(|p| part_bytes(spec, p)).sum();
                let offset = usize::try_from(area.offset + before).expect("an address");
                self.store.base().wrapping_add(offset)
            }
            _ => self.classes[spec.class].parts[part].data.cast(),
        }
    }
}

impl Stage {
    /// The tensor of `part`, as kernels get it: all experts of the layer, in order.
    pub(crate) fn tensor(&self, part: usize) -> ggml_tensor {
        let spec = &self.residency.layers[self.layer];
        let mut tensor = self.residency.classes[spec.class].parts[part];
        tensor.data = self.residency.first_slot(self.layer, part, Destination::Area).cast();
        tensor.ne[2] = i64::from(spec.experts);
        tensor.nb[3] = tensor.nb[2] * spec.experts as usize;
        tensor
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.residency.area.as_ref().expect("it was taken").give_back();
    }
}

/// What a batch holds of the pool while its layer is staged.
struct Held {
    residency: Arc<Residency>,
    /// Resident records, pinned.
    hits: Vec<(u32, Slot)>,
    /// Experts to be read, ascending.
    missing: Vec<u32>,
    /// Of those, the ones that are to stay, and their slots.
    kept: Vec<(u32, Slot)>,
}

impl Held {
    /// What was to stay is in its slots.
    fn commit(&mut self) {
        let mut pool = self.residency.lock();
        for (expert, slot) in self.kept.drain(..) {
            pool.commit(slot);
            self.hits.push((expert, slot));
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut pool = self.residency.lock();
        self.kept.drain(..).for_each(|(_, slot)| pool.abandon(slot));
        self.hits.drain(..).for_each(|(_, slot)| pool.unpin(slot));
        drop(pool);
        self.residency.settled.notify_all();
    }
}

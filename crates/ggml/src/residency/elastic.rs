//! A pool on a GPU grows and shrinks while it is used.
//!
//! Its slots have addresses for all records from the start. How many of them are in use is what the
//! user asked for, or less while the GPU's memory is short: the bookkeeping ([`Pool::resize`]) takes
//! the highest slots out of use, and when nothing has them pinned any more, which is when no kernel
//! reads them, the granules that lie wholly among them are unmapped. Growing raises the number;
//! memory is mapped when a slot is filled. When there is none, the pool gets as small as what it has,
//! and what asked for the slot is served with less.
//!
//! [`Pool::resize`]: tierstream_pool::Pool::resize

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use tierstream_cuda::Device;
use tierstream_pool::Slot;

use super::layer::{self, TAIL_BYTES};
use super::stage::Area;
use super::vram::Vram;
use super::{Ahead, CANCEL_LOOKED_FOR_EVERY, Layer, Need, Residency, Spec, Step, Store, index32};
use crate::error::{Error, Result};
use crate::model::{all_slots, pool_bytes, slots_within};
use crate::placement::Gpu;

/// The most bytes of a granule: the costs of mapping hardly depend on the size.
const GRANULE_BYTES_MAX: u64 = 32 << 20;

/// Granules of the largest part of a class: each part has one that is used in part.
const GRANULES_MIN: u64 = 64;

/// Memory of the GPU that is left to others when the pool has to give way: ggml cannot go on without
/// what it asks for. Bytes; less on a small device.
const RESERVE_BYTES_MAX: u64 = 256 << 20;

/// How often the GPU is asked how much of its memory is free: that costs up to some 100 us.
const LOOKED_EVERY: Duration = Duration::from_millis(250);

/// How long a resize waits for slots that are in use. A layer that comes from a slow drive holds its
/// slots for seconds.
const WAITED_AT_MOST: Duration = Duration::from_secs(30);

/// Attempts after which a pool that finds no memory gives up all that it can; and all of them.
const ATTEMPTS_WITH_MORE: u32 = 3;
const ATTEMPTS: u32 = 8;

/// How large a pool on a GPU is to be.
pub(super) struct Elastic {
    device: Device,
    granule_bytes: u64,
    /// Slots per class of the smallest pool.
    least: Vec<u32>,
    /// Slots per class that were asked for: there are fewer while memory is short. Held while the
    /// number of slots changes.
    asked: Mutex<Vec<u32>>,
    /// Slots were pinned when they were taken out of use, so that their memory is still there.
    leaving: AtomicBool,
    /// When the device was last asked for its free memory, if it need not be asked again at once.
    looked: Mutex<Option<Instant>>,
}

/// What the slots of a part may take beyond their size, and the area too, bytes: memory comes in
/// granules.
pub(crate) fn rounding_bytes(gpu: &Gpu, layers: &[Layer]) -> Result<u64> {
    let granule_bytes = granule_bytes(gpu.device(), layers)?;
    Ok((by_part(layers).count() as u64 + 1) * granule_bytes)
}

/// The class and the stride of every part of every class.
fn by_part(layers: &[Layer]) -> impl Iterator<Item = (usize, u64)> + '_ {
    let first_of = |class: &usize| layers.iter().find(|l| l.class == *class);
    let classes = 0..all_slots(layers).len();
    classes
        .filter_map(move |class| first_of(&class))
        .flat_map(|layer| layer.parts.iter().map(|part| (layer.class, part.slot.stride as u64)))
}

fn granule_bytes(device: &Device, layers: &[Layer]) -> Result<u64> {
    let unit = device.granularity()?;
    let all = all_slots(layers);
    let largest = by_part(layers).map(|(class, stride)| stride * u64::from(all[class])).max();
    let fine = largest.unwrap_or(0) / GRANULES_MIN;
    Ok(fine.min(GRANULE_BYTES_MAX).next_multiple_of(unit).max(unit))
}

impl Elastic {
    pub(super) fn new(gpu: &Gpu, spec: &Spec) -> Result<Self> {
        Ok(Self {
            device: gpu.device().clone(),
            granule_bytes: granule_bytes(gpu.device(), &spec.layers)?,
            least: Spec::least_slots(&spec.layers),
            asked: Mutex::new(spec.slots.clone()),
            leaving: AtomicBool::new(false),
            looked: Mutex::default(),
        })
    }

    pub(super) fn granule_bytes(&self) -> u64 {
        self.granule_bytes
    }

    fn reserve_bytes(&self) -> u64 {
        (self.device.info().memory_bytes / 32).min(RESERVE_BYTES_MAX)
    }

    /// Bytes that stay free when the pool takes more than it must have, as it does in the midst of a
    /// graph: so many that [it need not give some back](Residency::look_after_memory) at once.
    pub(super) fn left_bytes(&self) -> u64 {
        self.reserve_bytes() / 4
    }

    /// The same for a slot of a class: nothing, if it is one of those that there have to be.
    pub(super) fn left_beside(&self, class: usize, slot: u32) -> u64 {
        if slot < self.least[class] { 0 } else { self.left_bytes() }
    }

    /// Bytes that the slots take in whole granules.
    fn bytes_of(&self, layers: &[Layer], slots: &[u32]) -> u64 {
        let part_bytes = |(class, stride): (usize, u64)| {
            let bytes = stride * u64::from(slots[class]) + TAIL_BYTES as u64;
            bytes.next_multiple_of(self.granule_bytes)
        };
        by_part(layers).map(part_bytes).sum()
    }

    /// Whether it is time to ask for the free memory; if so, not again for a while.
    fn is_time(&self) -> bool {
        let Ok(mut looked) = self.looked.try_lock() else { return false };
        let is_time = looked.is_none_or(|looked| looked.elapsed() >= LOOKED_EVERY);
        if is_time {
            *looked = Some(Instant::now());
        }
        is_time
    }

    /// The right to change the number of slots, as long as nobody else has it.
    fn try_turn(&self) -> Option<MutexGuard<'_, Vec<u32>>> {
        match self.asked.try_lock() {
            Ok(asked) => Some(asked),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }
}

impl Residency {
    /// Uses `slots` per class from now on, or as many of them as there is memory for. Waits until
    /// nothing computes with those that go, but for no longer than half a minute, and gives their
    /// memory back. Returns the bytes of all slots that are in use then, or still hold something.
    pub(crate) fn resize(&self, slots: Vec<u32>) -> Result<u64> {
        let (elastic, vram) = self.elastic().ok_or(Error::NotElastic)?;
        let mut asked = elastic.asked.lock().unwrap_or_else(PoisonError::into_inner);
        self.set_slots(&slots)?;
        *asked = slots;
        self.wait_until_unused(&|| false)?;
        self.unmap_unused(elastic, vram)?;
        Ok(pool_bytes(&self.layers, &self.ends()))
    }

    /// Bytes of the slots that were asked for, and are not there because memory is short.
    pub(crate) fn shortage_bytes(&self) -> u64 {
        let Some((elastic, _)) = self.elastic() else { return 0 };
        let asked = elastic.asked.lock().unwrap_or_else(PoisonError::into_inner);
        pool_bytes(&self.layers, &asked) - pool_bytes(&self.layers, &self.slots())
    }

    /// Gives back one `part`th of the memory that the smallest pool could do without; it may be taken
    /// again when there is enough. Whether there was any.
    pub(crate) fn spare(&self, part: u64) -> Result<bool> {
        let Some((elastic, vram)) = self.elastic() else { return Ok(false) };
        let _turn = elastic.asked.lock().unwrap_or_else(PoisonError::into_inner);
        let least = elastic.bytes_of(&self.layers, &elastic.least);
        let memory = self.slot_memory(vram);
        let kept = memory - memory.saturating_sub(least) / part;
        let slots = self.slots();
        let fit = merged(&self.slots_in(elastic, kept), &slots, u32::min);
        self.set_slots(&fit)?;
        self.wait_until_unused(&|| false)?;
        Ok(self.unmap_unused(elastic, vram)? > 0)
    }

    /// Before the next graph, memory is [looked after](Self::look_after_memory) in any case.
    pub(crate) fn look_soon(&self) {
        if let Some(elastic) = &self.elastic {
            *elastic.looked.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
    }

    /// Between two graphs, now and then: gives memory back when the GPU has hardly any left, and
    /// takes what was asked for when there is some again. The caller holds nothing of the pool.
    pub(crate) fn look_after_memory(&self) -> Result<()> {
        let Some((elastic, vram)) = self.elastic() else { return Ok(()) };
        if !elastic.is_time() {
            return Ok(());
        }
        let Some(asked) = elastic.try_turn() else { return Ok(()) };
        let free_bytes = elastic.device.memory()?.free_bytes;
        let (reserve_bytes, slots) = (elastic.reserve_bytes(), self.slots());
        // Far apart, so that it does not go to and fro.
        let is_scarce = free_bytes < elastic.left_bytes();
        let can_grow = slots != *asked && free_bytes >= 2 * reserve_bytes;
        if is_scarce || can_grow {
            let room = self.slot_memory(vram) + free_bytes;
            let fit = self.slots_in(elastic, room.saturating_sub(reserve_bytes));
            let fit = merged(&fit, &asked, u32::min);
            let fit = merged(&fit, &slots, if is_scarce { u32::min } else { u32::max });
            self.set_slots(&fit)?;
        }
        if is_scarce || elastic.leaving.load(Ordering::Relaxed) {
            self.unmap_unused(elastic, vram)?;
        }
        Ok(())
    }

    /// As [`Residency::try_acquire`], with a smaller pool if there is too little memory for this one.
    pub(crate) fn acquire(
        self: &Arc<Self>,
        layer: usize,
        need: &[Need],
        mut ahead: Option<Ahead>,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<Step> {
        let mut attempt = 0;
        loop {
            match self.try_acquire(layer, need, ahead.take(), cancelled) {
                Err(error @ Error::OutOfGpuMemory(_)) => {
                    self.give_way(error, 0, attempt, cancelled)?;
                    attempt += 1;
                }
                acquired => return acquired,
            }
        }
    }

    /// Makes sure that there is memory behind a part of the area, at the cost of slots. The caller
    /// holds none.
    pub(super) fn back_area(
        &self,
        offset: u64,
        bytes: u64,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<()> {
        let Store::Vram(vram) = &self.store else { return Ok(()) };
        let mut attempt = 0;
        loop {
            match vram.back(offset, bytes, 0) {
                Err(error @ Error::OutOfGpuMemory(_)) => {
                    self.give_way(error, bytes, attempt, cancelled)?;
                    attempt += 1;
                }
                backed => return backed,
            }
        }
    }

    /// Makes sure that there is memory behind the slots that experts of a layer are to stay in.
    /// Those for which there is none do not stay, and are returned.
    pub(super) fn back_kept(&self, layer: usize, kept: &mut Vec<(u32, Slot)>) -> Result<Vec<u32>> {
        let (mut short, mut failed) = (Vec::new(), Ok(()));
        kept.retain(|&(expert, slot)| match self.back(layer, slot.index) {
            Err(Error::OutOfGpuMemory(_)) => {
                self.lock().abandon(slot);
                short.push(expert);
                false
            }
            Ok(()) => true,
            // Given up with all others.
            Err(error) => {
                failed = Err(error);
                true
            }
        });
        failed?;
        // Slots are held, so that there is no waiting for others.
        match self.elastic() {
            Some((elastic, vram)) if !short.is_empty() => {
                let Some(_turn) = elastic.try_turn() else { return Ok(short) };
                self.shrink(elastic, vram, 0, 0)?;
                self.unmap_unused(elastic, vram).map(|_| short)
            }
            _ => Ok(short),
        }
    }

    /// After memory could not be had, for the `attempt`th time: gets so small that there is some, for
    /// the slots and for `beside` bytes. Waits until what goes is out of use; the caller holds none
    /// of it. An error if the pool is the smallest already.
    pub(super) fn give_way(
        &self,
        error: Error,
        beside: u64,
        attempt: u32,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<()> {
        let Some((elastic, vram)) = self.elastic() else { return Err(error) };
        let _turn = loop {
            match elastic.try_turn() {
                Some(turn) => break turn,
                None if cancelled() => return Err(Error::Cancelled),
                None => {
                    let waited = self.settled.wait_timeout(self.lock(), CANCEL_LOOKED_FOR_EVERY);
                    drop(waited);
                }
            }
        };
        let lowered = self.shrink(elastic, vram, beside, attempt)?;
        self.wait_until_unused(cancelled)?;
        let unmapped = self.unmap_unused(elastic, vram)? > 0;
        // The first time, another one may have made room meanwhile.
        if attempt < ATTEMPTS && (lowered || unmapped || attempt == 0) {
            return Ok(());
        }
        let Error::OutOfGpuMemory(source) = error else { return Err(error) };
        let free_bytes = elastic.device.memory()?.free_bytes;
        Err(Error::GpuMemoryTaken {
            least_bytes: elastic.bytes_of(&self.layers, &elastic.least) + beside,
            had_bytes: self.slot_memory(vram) + free_bytes,
            source,
        })
    }

    /// Takes slots out of use until the others have room in what memory there is, `beside` bytes and
    /// a reserve apart. Whether there are fewer now.
    fn shrink(&self, elastic: &Elastic, vram: &Vram, beside: u64, attempt: u32) -> Result<bool> {
        let slots = self.slots();
        let fit = if attempt < ATTEMPTS_WITH_MORE {
            let there = self.slot_memory(vram) + elastic.device.memory()?.free_bytes;
            // What the driver calls free could not be had, so it has to be less than now.
            let now = elastic.bytes_of(&self.layers, &slots) - elastic.granule_bytes;
            let beside = beside.next_multiple_of(elastic.granule_bytes);
            let room = there.saturating_sub(beside + elastic.reserve_bytes());
            self.slots_in(elastic, room.min(now))
        } else {
            elastic.least.clone()
        };
        let fit = merged(&fit, &slots, u32::min);
        self.set_slots(&fit)?;
        Ok(fit != slots)
    }

    /// The most slots per class that take no more than so many bytes, but no fewer than the least.
    fn slots_in(&self, elastic: &Elastic, bytes: u64) -> Vec<u32> {
        slots_within(&self.layers, |slots| elastic.bytes_of(&self.layers, slots) <= bytes)
    }

    /// Changes the number of slots, by whose turn it is.
    fn set_slots(&self, slots: &[u32]) -> Result<()> {
        if slots.iter().zip(self.slots()).any(|(&slots, now)| slots < now) {
            // Graphs that compute without pins are waited for, and there are none from here on.
            *self.identity.write().unwrap_or_else(PoisonError::into_inner) = None;
        }
        let specs = layer::specs(&self.layers, Some(slots));
        let floors: Vec<u32> = specs.iter().map(|spec| spec.floor).collect();
        self.change().resize(slots, &floors)?;
        // Who waits for slots looks again.
        self.settled.notify_all();
        Ok(())
    }

    /// Waits until slots out of use hold nothing and are not pinned; not for ever.
    fn wait_until_unused(&self, cancelled: &dyn Fn() -> bool) -> Result<()> {
        let start = Instant::now();
        let mut pool = self.lock();
        let classes = 0..index32(self.classes.len());
        while classes.clone().any(|class| pool.end(class) > pool.slots(class))
            && start.elapsed() < WAITED_AT_MOST
        {
            if cancelled() {
                return Err(Error::Cancelled);
            }
            let waited = self.settled.wait_timeout(pool, CANCEL_LOOKED_FOR_EVERY);
            pool = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    /// Gives back the memory of slots that hold nothing and that nobody gets before the number
    /// changes, which it does not by whose turn it is; and that of free rooms. Returns its bytes.
    fn unmap_unused(&self, elastic: &Elastic, vram: &Vram) -> Result<u64> {
        let ends = self.ends();
        elastic.leaving.store(ends != self.slots(), Ordering::Relaxed);
        let mut used: Vec<Range<u64>> = Vec::new();
        for (class, &end) in self.classes.iter().zip(&ends) {
            for part in &class.parts {
                let first = self.store.offset(part.data.cast());
                let bytes = part.nb[2] as u64 * u64::from(end);
                // Kernels read a little beyond the last one.
                used.push(first..first + bytes + TAIL_BYTES as u64);
            }
        }
        // Whoever takes room asks for its memory afterwards.
        vram.unback(|| used.into_iter().chain(self.area.iter().flat_map(Area::taken)).collect())
    }

    /// Per class, where the slots end that are in use or hold something.
    fn ends(&self) -> Vec<u32> {
        let pool = self.lock();
        (0..index32(self.classes.len())).map(|class| pool.end(class)).collect()
    }

    /// Bytes of memory behind slots.
    fn slot_memory(&self, vram: &Vram) -> u64 {
        self.area.as_ref().map_or(0, |area| vram.mapped_bytes_before(area.offset))
    }

    fn elastic(&self) -> Option<(&Elastic, &Vram)> {
        match (&self.elastic, &self.store) {
            (Some(elastic), Store::Vram(vram)) => Some((elastic, vram)),
            _ => None,
        }
    }
}

/// One of each pair.
fn merged(these: &[u32], those: &[u32], pick: fn(u32, u32) -> u32) -> Vec<u32> {
    these.iter().zip(those).map(|(&this, &that)| pick(this, that)).collect()
}

//! The pool of one model: which records are resident, where their bytes are, how they get there.
//!
//! Joins the three that know nothing of each other: the pool's bookkeeping
//! ([`tierstream_pool`]), the reads ([`tierstream_io`]) and the tensors that kernels read.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use tierstream_cuda::{Device, Event};
use tierstream_io::Reader;
use tierstream_pool::{LayerCounters, Lookup, Pool, Record};

pub(crate) use self::ahead::Ahead;
pub use self::counters::{ExpertCounters, LayerUse};
use self::elastic::Elastic;
pub(crate) use self::elastic::rounding_bytes;
use self::hold::Guarded;
pub(crate) use self::hold::SlotMap;
use self::layer::TAIL_BYTES;
pub(crate) use self::layer::{IN_PLACE_LEAST_BYTES, Layer, Part, SlotPart, Spec};
use self::load::Destination;
pub(crate) use self::load::Waits;
pub(crate) use self::looked::{Looked, Promotion};
use self::split::Split;
use self::stage::Area;
pub(crate) use self::stage::{Coming, Kept, Stage, layer_bytes};
use self::step::Slots;
pub(crate) use self::step::{Need, Placed, Step};
use self::store::Store;
use self::vram::Vram;
use crate::abi::*;
use crate::error::{Error, Result};
use crate::memory::{self, Memory};
use crate::model::{all_slots, pool_bytes};
use crate::placement::Gpu;
use crate::uploads::Uploads;
use crate::verified::{Checksums, Of};

mod ahead;
mod all;
mod below;
mod counters;
mod elastic;
mod hold;
mod layer;
mod load;
mod looked;
mod split;
mod stage;
mod step;
mod store;
mod vram;

/// The pool of one model. Shared by its contexts.
pub(crate) struct Residency {
    layers: Vec<Layer>,
    classes: Vec<Class>,
    /// Holds every slot.
    store: Store,
    /// Of a pool whose size can change: one on a GPU.
    elastic: Option<Elastic>,
    /// Behind the slots, for whole layers; on a GPU.
    area: Option<Area>,
    /// The pool that records come from; without one they are read.
    below: Option<Arc<Residency>>,
    pool: Mutex<Guarded>,
    /// Signalled when slots settle: loads end, pins are dropped, nobody has all slots any more.
    settled: Condvar,
    reader: Arc<Reader>,
    /// Per layer and part what records are compared with when they are read, if they are.
    checks: Option<Vec<Vec<Of>>>,
    /// Per layer the slot of expert 0, while every record sits in expert order. Whoever computes
    /// by it, without pins, keeps it locked.
    identity: RwLock<Option<Vec<u32>>>,
    /// Per layer, selections served without a look-up because everything is resident.
    resident_requests: Vec<AtomicU64>,
    /// Records read ahead whose layer has come, and those of them that it needed.
    read_ahead: AtomicU64,
    read_ahead_used: AtomicU64,
    /// Records that the processor has computed with, beside a GPU.
    computed: AtomicU64,
    /// Bytes of records that count as brought without a slot, and were used where they were.
    not_brought_bytes: AtomicU64,
}

/// The slots of one size class.
struct Class {
    /// A tensor per part, with as many matrices as there are addresses for slots; its data begin
    /// where slot 0 does.
    parts: Vec<ggml_tensor>,
}

/// How slots lie in memory: those of each part of each class side by side.
struct Layout {
    /// Slots per class that there are addresses for.
    room: Vec<u32>,
    /// Bytes behind the last slot of a part.
    tail_bytes: usize,
    /// Where each part begins.
    align: usize,
}

/// Where the slots of a part begin, in memory: the largest alignment that direct reads ask for.
const PAGE: usize = tierstream_io::PAGE;

// SAFETY: the tensors are templates that are copied, never written; the memory behind them is
// guarded by the pool's slot states (see `load::Arrival`).
unsafe impl Send for Residency {}
// SAFETY: as above.
unsafe impl Sync for Residency {}

/// How soon a context that waits for another one sees that it is cancelled.
const CANCEL_LOOKED_FOR_EVERY: Duration = Duration::from_millis(20);

impl Residency {
    /// Makes the pool that executors compute with, in memory that takes room only as slots fill: in
    /// that of the GPU that `uploads` copy to, if there are some, or the host's. One in a GPU's
    /// memory may get its records from another one, `below`.
    pub(crate) fn new(
        spec: Spec,
        uploads: Option<&Arc<Uploads>>,
        below: Option<Arc<Residency>>,
        reader: Arc<Reader>,
    ) -> Result<Arc<Self>> {
        let Some(uploads) = uploads else {
            let layout = Layout::in_host_memory(&spec);
            let built = Self::build(spec, reader, below, layout, |total, _| {
                let memory = Arc::new(Memory::weights(total)?);
                Ok((Store::Host { _pin: None, memory }, None))
            })?;
            return Ok(Arc::new(built));
        };
        let elastic = Elastic::new(uploads.gpu(), &spec)?;
        let granule_bytes = elastic.granule_bytes();
        let align = usize::try_from(granule_bytes).expect("addresses have 64 bits");
        let room = all_slots(&spec.layers);
        let layout = Layout { room, tail_bytes: TAIL_BYTES, align };
        let mut built = Self::build(spec, reader, below, layout, |total, spec| {
            let area = Area::new(total as u64, &spec.layers, spec.staged);
            let vram = Vram::new(uploads.clone(), area.end(), granule_bytes)?;
            Ok((Store::Vram(vram), Some(area)))
        })?;
        built.elastic = Some(elastic);
        Ok(Arc::new(built))
    }

    /// Makes a pool in host memory for the one of a GPU to get its records from. All of its memory
    /// is taken, and pinned, at once.
    pub(crate) fn below(spec: Spec, gpu: &Gpu, reader: Arc<Reader>) -> Result<Arc<Self>> {
        let layout = Layout::in_host_memory(&spec);
        let built = Self::build(spec, reader, None, layout, |total, _| {
            let memory = Arc::new(Memory::weights(total)?);
            let base = NonNull::new(memory.base()).expect("memory is not at address 0");
            // SAFETY: mapped as long as the memory is held; who copies from slots holds the pool.
            let pin = unsafe { gpu.device().register(memory.clone(), base, memory.bytes()) }?;
            Ok((Store::Host { _pin: Some(pin), memory }, None))
        })?;
        Ok(Arc::new(built))
    }

    /// `store` makes memory for so many bytes of slots.
    fn build(
        spec: Spec,
        reader: Arc<Reader>,
        below: Option<Arc<Residency>>,
        layout: Layout,
        store: impl FnOnce(usize, &Spec) -> Result<(Store, Option<Area>)>,
    ) -> Result<Self> {
        let Layout { room, tail_bytes, align } = layout;
        let pool = Pool::new(tierstream_pool::Config {
            layers: layer::specs(&spec.layers, Some(&spec.slots)),
            slots: spec.slots.clone(),
            policy: spec.policy,
            seed: spec.seed,
        })?;
        // Layers of a class differ only in where a part begins in its slot.
        let model_of = |class: usize| spec.layers.iter().find(|l| l.class == class);
        let parts_of = |class: usize| model_of(class).map_or(&[][..], |l| &l.parts);
        let part_bytes = |part: &Part, slots: u32| {
            part.slot.bytes_of(slots as usize, tail_bytes).next_multiple_of(align)
        };
        let by_class = || room.iter().copied().enumerate();
        let total: usize = by_class()
            .flat_map(|(class, slots)| parts_of(class).iter().map(move |p| part_bytes(p, slots)))
            .sum();
        let (store, area) = store(total, &spec)?;
        let mut at = store.base();
        let mut classes = Vec::with_capacity(room.len());
        for (class, slots) in by_class() {
            let mut parts = Vec::new();
            for part in parts_of(class) {
                let shape = [part.ne[0], part.ne[1], i64::from(slots)];
                let mut tensor = memory::tensor(store.buffer(), part.type_, shape, at);
                tensor.nb[2] = part.slot.stride;
                tensor.nb[3] = part.slot.stride * slots as usize;
                parts.push(tensor);
                at = at.wrapping_add(part_bytes(part, slots));
            }
            classes.push(Class { parts });
        }
        let checks = match &spec.checksums {
            Some(all) => checks(&spec.layers, all)?,
            None => None,
        };
        Ok(Self {
            resident_requests: spec.layers.iter().map(|_| AtomicU64::new(0)).collect(),
            layers: spec.layers,
            classes,
            store,
            elastic: None,
            area,
            below,
            pool: Mutex::new(Guarded::new(pool)),
            settled: Condvar::new(),
            reader,
            checks,
            identity: RwLock::new(None),
            read_ahead: AtomicU64::new(0),
            read_ahead_used: AtomicU64::new(0),
            computed: AtomicU64::new(0),
            not_brought_bytes: AtomicU64::new(0),
        })
    }

    pub(crate) fn layer(&self, layer: usize) -> &Layer {
        &self.layers[layer]
    }

    pub(crate) fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// The GPU that slots are on.
    pub(crate) fn device(&self) -> Option<&Device> {
        match &self.store {
            Store::Host { .. } => None,
            Store::Vram(vram) => Some(vram.device()),
        }
    }

    /// Bytes of all slots in use.
    pub(crate) fn budget_bytes(&self) -> u64 {
        pool_bytes(&self.layers, &self.slots())
    }

    /// Bytes of a GPU's memory that the pool has taken so far.
    pub(crate) fn vram_bytes(&self) -> Option<u64> {
        match &self.store {
            Store::Host { .. } => None,
            Store::Vram(vram) => Some(vram.mapped_bytes()),
        }
    }

    /// Slots in use per size class.
    pub(crate) fn slots(&self) -> Vec<u32> {
        let pool = self.lock();
        (0..self.classes.len()).map(|class| pool.slots(index32(class))).collect()
    }

    /// Slots that there are addresses for, of the size class of a layer.
    pub(crate) fn slots_of(&self, layer: usize) -> u32 {
        let parts = &self.classes[self.layers[layer].class].parts;
        parts.first().map_or(0, |part| u32::try_from(part.ne[2]).expect("made of a u32"))
    }

    /// Bytes of the records that are resident now.
    pub(crate) fn resident_bytes(&self) -> u64 {
        self.lock().resident_bytes()
    }

    /// Of the pool whose faults are read.
    pub(crate) fn layer_counters(&self) -> Vec<LayerCounters> {
        self.below.as_ref().map_or_else(|| self.lock().counters().to_vec(), |b| b.layer_counters())
    }

    /// The pool below this one.
    pub(crate) fn below_pool(&self) -> Option<&Arc<Residency>> {
        self.below.as_ref()
    }

    /// Forgets every record that is not in use. Waits for graphs that compute without pins.
    pub(crate) fn clear(&self) {
        *self.identity.write().unwrap_or_else(PoisonError::into_inner) = None;
        self.change().clear();
        if let Some(below) = &self.below {
            below.clear();
        }
    }

    /// Per layer the slot of expert 0, if all records are resident in expert order; they stay so
    /// while the lock is held.
    pub(crate) fn identity(&self) -> RwLockReadGuard<'_, Option<Vec<u32>>> {
        self.identity.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts the selections of `tokens` tokens in one layer that needed no look-up: top-k times
    /// tokens, because nobody has looked at the ids. In batches of several tokens that is more
    /// than the distinct experts that [`Residency::acquire`] counts.
    pub(crate) fn count_resident(&self, layer: usize, tokens: u64) {
        let selections = tokens * u64::from(self.layers[layer].used);
        self.resident_requests[layer].fetch_add(selections, Ordering::Relaxed);
    }

    /// Counts records of the pool below that the processor has computed with.
    pub(crate) fn count_computed(&self, records: usize) {
        self.computed.fetch_add(records as u64, Ordering::Relaxed);
    }

    /// The pool tensor of `part` of `layer`, cut down to slots `low..=high`, as kernels get it.
    pub(crate) fn window(&self, layer: usize, part: usize, low: u32, high: u32) -> ggml_tensor {
        let Layer { class, parts, .. } = &self.layers[layer];
        let mut tensor = self.classes[*class].parts[part];
        let first = low as usize * tensor.nb[2] + parts[part].slot.position;
        tensor.data = tensor.data.wrapping_byte_add(first);
        tensor.ne[2] = i64::from(high - low) + 1;
        tensor.nb[3] = tensor.nb[2] * (high - low + 1) as usize;
        tensor
    }

    /// Finds and pins the resident records among `need` (distinct experts, at least one) and
    /// reserves slots for the others. What does not fit at once comes in groups through the same
    /// slots, see [`Step::arriving`]. Takes over what `ahead` has begun to read. Waits while
    /// another context holds what this one needs; holds nothing while it waits, and gives up when
    /// `cancelled` says so. Fails, and holds nothing, if there is too little memory of a GPU.
    fn try_acquire(
        self: &Arc<Self>,
        layer: usize,
        need: &[Need],
        ahead: Option<Ahead>,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<Step> {
        let mut ahead = ahead.filter(|ahead| ahead.layer() == layer);
        let mut pool = self.change();
        if let Some(ahead) = &mut ahead {
            self.count_ahead(ahead.experts(), need);
            ahead.settle(&mut pool);
        }
        let split = loop {
            match self.split(&pool, layer, need, ahead.as_ref()) {
                Some(split) if split.give_up.is_empty() => break split,
                // Their slots are counted again: after a resize, other layers may lack them.
                Some(split) => split.give_up.iter().for_each(|need| {
                    let evicted = pool.evict(record(layer, need.expert));
                    assert!(evicted, "an unpinned resident record can be evicted");
                }),
                None if ahead.is_some() => {
                    drop(pool);
                    ahead = None;
                    pool = self.change();
                }
                None if cancelled() => return Err(Error::Cancelled),
                None => {
                    let waited = self.settled.wait_timeout(pool, CANCEL_LOOKED_FOR_EVERY);
                    drop(waited.unwrap_or_else(PoisonError::into_inner).0);
                    pool = self.change();
                }
            }
        };
        self.serve(pool, layer, split, ahead)
    }

    /// As [`Residency::acquire`], if that waits for no other context and all comes in one group, and
    /// leaves `spare` slots that the layer may have; None otherwise.
    pub(crate) fn acquire_now(
        self: &Arc<Self>,
        layer: usize,
        need: &[Need],
        spare: u32,
    ) -> Option<Step> {
        let pool = self.change();
        let split = self.split(&pool, layer, need, None)?;
        let missing = split.missing.len();
        let whole = split.give_up.is_empty() && split.reserve == missing;
        let left = (pool.reservable(index32(layer)) as usize).saturating_sub(missing);
        if !whole || (missing > 0 && left < spare as usize) {
            return None;
        }
        self.serve(pool, layer, split, None).ok()
    }

    /// Pins and reserves what `split` says, which was found under this lock.
    fn serve(
        self: &Arc<Self>,
        mut pool: MutexGuard<'_, Guarded>,
        layer: usize,
        split: Split,
        mut ahead: Option<Ahead>,
    ) -> Result<Step> {
        pool.begin_step();
        // The step comes last: its drop takes the lock, and would wait for ever if a panic dropped
        // it in here.
        let mut slots = Slots::default();
        for need in split.keep {
            let Lookup::Resident(slot) = pool.request(record(layer, need.expert)) else {
                unreachable!("the lock is held since the record was found resident");
            };
            slots.pinned.push(slot);
            slots.hits.push(Placed { expert: need.expert, slot: slot.index });
        }
        // The records wanted last come last and stay: decoding goes on from there.
        let mut missing = split.missing;
        missing.sort_by_key(|n| (n.last_row, n.expert));
        for need in &missing {
            let found = pool.request(record(layer, need.expert));
            assert_eq!(found, Lookup::Absent, "`split` has looked them up under this lock");
        }
        let stay = missing.len() - split.reserve.min(missing.len());
        for need in &missing[stay..] {
            let found = pool.reserve(record(layer, need.expert));
            let found = found.expect("`split` counted the slots that can be reserved");
            slots.reserved.push(found.slot);
        }
        for need in &missing[..stay] {
            pool.stream(record(layer, need.expert));
        }
        slots.experts = missing.iter().map(|n| n.expert).collect();
        for need in split.begun {
            let Lookup::Loading(slot) = pool.request(record(layer, need.expert)) else {
                unreachable!("the lock is held since the record was found on its way");
            };
            slots.pinned.push(slot);
            let fetch = ahead.as_mut().and_then(|ahead| ahead.take(need.expert));
            slots.begun.push(fetch.expect("`split` has found it there"));
            slots.experts.push(need.expert);
            slots.reserved.push(slot);
        }
        drop(pool);
        if let Some(ahead) = &ahead {
            ahead.give_up();
            self.settled.notify_all();
        }
        let step = Step::new(self.clone(), layer, slots, ahead);
        step.back()?;
        Ok(step)
    }

    /// Where `part` of a record of `layer` lies in a slot.
    fn part_in(&self, layer: usize, part: usize, place: Destination, slot: u32) -> *mut u8 {
        let lies = self.layers[layer].parts[part].slot;
        let first = self.first_slot(layer, part, place);
        first.wrapping_add(slot as usize * lies.stride + lies.position)
    }

    /// Waits for the copies into this pool that were started.
    fn settle(&self) -> Result<()> {
        match &self.store {
            Store::Host { .. } => Ok(()),
            Store::Vram(vram) => vram.settle(),
        }
    }

    /// An event behind every copy from the host that was started.
    fn uploaded(&self) -> Result<Event> {
        match &self.store {
            Store::Host { .. } => Err(Error::Internal("host memory is not copied to".into())),
            Store::Vram(vram) => vram.uploaded(),
        }
    }

    /// Makes sure that there is memory behind a slot.
    fn back(&self, layer: usize, slot: u32) -> Result<()> {
        let Store::Vram(vram) = &self.store else { return Ok(()) };
        let Layer { class, parts, .. } = &self.layers[layer];
        let left = self.elastic.as_ref().map_or(0, |elastic| elastic.left_beside(*class, slot));
        for (index, part) in parts.iter().enumerate() {
            let at = self.part_in(layer, index, Destination::Slots, slot);
            vram.back(self.store.offset(at), part.bytes as u64, left)?;
        }
        Ok(())
    }

    fn count_ahead(&self, experts: impl Iterator<Item = u32>, need: &[Need]) {
        for expert in experts {
            let used = need.iter().any(|n| n.expert == expert);
            self.read_ahead.fetch_add(1, Ordering::Relaxed);
            self.read_ahead_used.fetch_add(u64::from(used), Ordering::Relaxed);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Guarded> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Layout {
    /// No more than there are slots at first: their number does not change.
    fn in_host_memory(spec: &Spec) -> Self {
        Self { room: spec.slots.clone(), tail_bytes: 0, align: PAGE }
    }
}

fn index32(index: usize) -> u32 {
    u32::try_from(index).expect("a GGUF has fewer than 2^32 layers")
}

/// What the records of `layers` are compared with, if they are.
fn checks(layers: &[Layer], checksums: &Arc<Checksums>) -> Result<Option<Vec<Vec<Of>>>> {
    let of = |layer: &Layer, part: &Part| {
        let Some(of) = checksums.of(&part.name)? else { return Ok(None) };
        let is_right =
            of.shares() == layer.experts as usize && of.share_bytes() == part.bytes as u64;
        let wrong = || Error::Internal(format!("checksums of {} are no experts'", part.name));
        if is_right { Ok(Some(of)) } else { Err(wrong()) }
    };
    layers.iter().map(|layer| layer.parts.iter().map(|part| of(layer, part)).collect()).collect()
}

fn record(layer: usize, expert: u32) -> Record {
    Record { layer: index32(layer), expert }
}

#[cfg(test)]
mod tests {
    use tierstream_io::FileId;
    use tierstream_pool::Policy;

    use super::*;

    /// A panic with the pool locked ends `acquire`; it must not wait for the lock on its way out.
    #[test]
    fn a_panic_while_slots_are_handed_out_is_no_deadlock() {
        let layer = Layer {
            block: 0,
            class: 0,
            experts: 4,
            used: 2,
            parts: vec![Part {
                name: "blk.0.ffn_up_exps.weight".into(),
                file: FileId(0),
                offset: 0,
                bytes: 4,
                stride: 4,
                slot: SlotPart::new(0, 4, 512),
                type_: GGML_TYPE_F32,
                ne: [1, 1],
            }],
            in_one_piece: false,
        };
        let spec = Spec {
            layers: vec![layer],
            slots: vec![4],
            staged: 1,
            policy: Policy::Lru,
            seed: 1,
            checksums: None,
        };
        let reader = Arc::new(Reader::new(tierstream_io::Config::default()).unwrap());
        let residency = Residency::new(spec, None, None, reader).unwrap();
        let (done, ended) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            // The same expert twice breaks the contract.
            let need = [Need { expert: 3, last_row: 0 }; 2];
            let acquire = std::panic::AssertUnwindSafe(|| {
                residency.acquire(0, &need, None, &|| false).map(drop)
            });
            let panicked = std::panic::catch_unwind(acquire).is_err();
            // Others go on with what is left.
            let other = [Need { expert: 1, last_row: 0 }];
            let served = residency.acquire(0, &other, None, &|| false).is_ok();
            done.send((panicked, served)).unwrap();
        });
        let ended = ended.recv_timeout(Duration::from_secs(60)).expect("no deadlock");
        assert_eq!(ended, (true, true));
    }
}

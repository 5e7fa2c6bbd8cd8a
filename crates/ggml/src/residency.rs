//! The pool of one model: which records are resident, where their bytes are, how they get there.
//!
//! Joins the three that know nothing of each other: the pool's bookkeeping
//! ([`tierstream_pool`]), the reads ([`tierstream_io`]) and the tensors that kernels read.

use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use tierstream_io::{Chunk, Extent, FileId, Priority, Reader, Sink, Ticket};
use tierstream_pool::{LayerCounters, LayerSpec, Lookup, Policy, Pool, Record, Slot};

use crate::abi::*;
use crate::error::{Error, Result};

/// One tensor of a layer's records.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Part {
    /// Name of the tensor in the file.
    pub(crate) name: String,
    /// Where expert 0 starts.
    pub(crate) file: FileId,
    /// Byte offset of expert 0 in that file.
    pub(crate) offset: u64,
    /// Bytes of one expert.
    pub(crate) bytes: usize,
    /// ggml's type of the elements.
    pub(crate) type_: ggml_type,
    /// Elements of a row, rows of one expert.
    pub(crate) ne: [i64; 2],
}

/// The records of one MoE layer.
#[derive(Debug, Clone)]
pub(crate) struct Layer {
    /// Transformer block, `blk.N`.
    pub(crate) block: u32,
    /// Size class: layers of one class share slots.
    pub(crate) class: usize,
    /// Experts of the layer.
    pub(crate) experts: u32,
    /// Experts that one token is routed to.
    pub(crate) used: u32,
    pub(crate) parts: Vec<Part>,
}

impl Layer {
    /// Bytes of one record.
    pub(crate) fn record_bytes(&self) -> u64 {
        self.parts.iter().map(|p| p.bytes as u64).sum()
    }
}

/// One expert that a batch needs, with the last row of the batch that needs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Need {
    pub(crate) expert: u32,
    pub(crate) last_row: u32,
}

/// An expert and the slot that holds it, or will.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Placed {
    pub(crate) expert: u32,
    pub(crate) slot: u32,
}

/// Sums over all layers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ExpertCounters {
    /// Records asked for: one per layer, batch and distinct expert; with a preloaded pool one per
    /// layer, token and selected expert, since ids are not read back then.
    pub requests: u64,
    /// Of those, resident (or on their way for another context).
    pub hits: u64,
    /// Of those, read from the drive.
    pub faults: u64,
    /// Records that gave their slot to another.
    pub evictions: u64,
    /// Bytes of faulted records.
    pub bytes_read: u64,
    /// Records asked for at least once.
    pub first_touches: u64,
}

impl ExpertCounters {
    /// What was counted since `before`.
    pub fn since(&self, before: &ExpertCounters) -> ExpertCounters {
        ExpertCounters {
            requests: self.requests - before.requests,
            hits: self.hits - before.hits,
            faults: self.faults - before.faults,
            evictions: self.evictions - before.evictions,
            bytes_read: self.bytes_read - before.bytes_read,
            first_touches: self.first_touches - before.first_touches,
        }
    }

    /// Hits per request, 0 to 1; 1 when nothing was requested.
    pub fn hit_rate(&self) -> f64 {
        if self.requests == 0 { 1.0 } else { self.hits as f64 / self.requests as f64 }
    }
}

/// The pool of one model. Shared by its contexts.
pub(crate) struct Residency {
    layers: Vec<Layer>,
    classes: Vec<Class>,
    /// Holds every slot; freed last.
    memory: Memory,
    pool: Mutex<Pool>,
    /// Signalled when slots settle: loads end, pins are dropped.
    settled: Condvar,
    reader: Arc<Reader>,
    /// Per layer the slot of expert 0, while every record sits in expert order. Whoever computes
    /// by it, without pins, keeps it locked.
    identity: RwLock<Option<Vec<u32>>>,
    /// Selections served without a look-up because everything is resident.
    resident_requests: AtomicU64,
}

/// The slots of one size class.
struct Class {
    slots: u32,
    /// A tensor per part, `ne[2]` = slots.
    parts: Vec<ggml_tensor>,
}

// SAFETY: the tensors are templates that are copied, never written; the memory behind them is
// guarded by the pool's slot states (see `Arrival`).
unsafe impl Send for Residency {}
// SAFETY: as above.
unsafe impl Sync for Residency {}

/// Everything that a pool is made of.
pub(crate) struct Spec {
    pub(crate) layers: Vec<Layer>,
    /// Slots per class.
    pub(crate) slots: Vec<u32>,
    pub(crate) policy: Policy,
    pub(crate) seed: u64,
}

impl Spec {
    /// Slots that the smallest working pool has, per class.
    pub(crate) fn least_slots(layers: &[Layer]) -> Vec<u32> {
        let classes = layers.iter().map(|l| l.class + 1).max().unwrap_or(0);
        Pool::least_slots(&specs(layers, None), classes)
    }
}

/// With `slots`, the floors for pools of that size; without, the least.
///
/// While a class holds less than [`EVEN_CYCLES`] token cycles its slots are shared out evenly;
/// above, a layer is sure of its top-k only and the rest goes where it is used. Measured on public
/// routing traces (OLMoE, Qwen3, gpt-oss, Gemma) with LRU: even shares gain 2.5-4.6 points of hit
/// rate at two cycles and 0.3-1.0 at four, and begin to lose at six.
fn specs(layers: &[Layer], slots: Option<&[u32]>) -> Vec<LayerSpec> {
    let least = |l: &Layer| l.used.min(l.experts);
    let spec = |l: &Layer| LayerSpec {
        class: index32(l.class),
        experts: l.experts,
        floor: least(l),
        record_bytes: l.record_bytes(),
    };
    let mut specs: Vec<LayerSpec> = layers.iter().map(spec).collect();
    for (class, &have) in slots.unwrap_or_default().iter().enumerate() {
        let same = || layers.iter().enumerate().filter(move |(_, l)| l.class == class);
        let cycle: u32 = same().map(|(_, l)| least(l)).sum();
        let experts: Vec<u32> = same().map(|(_, l)| l.experts).collect();
        // These add up to all slots, so that no record leaves its layer's region and windows stay
        // narrow.
        let shares = Pool::even_shares(&experts, have);
        let enough = same().zip(&shares).all(|((_, l), &share)| share >= least(l));
        if have < EVEN_CYCLES * cycle && enough {
            for ((index, _), share) in same().zip(shares) {
                specs[index].floor = share;
            }
        }
    }
    specs
}

/// How soon a context that waits for another one sees that it is cancelled.
const CANCEL_LOOKED_FOR_EVERY: Duration = Duration::from_millis(20);

/// Token cycles of room below which a pool is shared out evenly among the layers.
const EVEN_CYCLES: u32 = 5;

impl Residency {
    /// Allocates the pool in `buffer_type`, which must be host memory. The memory is touched, and
    /// so takes room, only as slots fill.
    pub(crate) fn new(
        spec: Spec,
        buffer_type: ggml_backend_buffer_type_t,
        reader: Arc<Reader>,
    ) -> Result<Arc<Self>> {
        let pool = Pool::new(tierstream_pool::Config {
            layers: specs(&spec.layers, Some(&spec.slots)),
            slots: spec.slots.clone(),
            policy: spec.policy,
            seed: spec.seed,
        })?;
        let mut shapes: Vec<Vec<(ggml_type, [i64; 2], usize)>> = vec![Vec::new(); spec.slots.len()];
        for layer in &spec.layers {
            let parts = layer.parts.iter().map(|p| (p.type_, p.ne, p.bytes)).collect();
            shapes[layer.class] = parts;
        }
        let part_bytes =
            |bytes: usize, slots: u32| (bytes * slots as usize).next_multiple_of(Memory::ALIGNMENT);
        let total = shapes
            .iter()
            .zip(&spec.slots)
            .flat_map(|(parts, &slots)| parts.iter().map(move |p| part_bytes(p.2, slots)))
            .sum();
        let memory = Memory::weights(buffer_type, total)?;
        let mut at = memory.base();
        let classes = shapes
            .iter()
            .zip(&spec.slots)
            .map(|(parts, &slots)| {
                let tensor = |&(type_, ne, bytes): &(ggml_type, [i64; 2], usize)| {
                    let tensor = memory.tensor(type_, [ne[0], ne[1], i64::from(slots)], at);
                    at = at.wrapping_add(part_bytes(bytes, slots));
                    tensor
                };
                Class { slots, parts: parts.iter().map(tensor).collect() }
            })
            .collect();
        Ok(Arc::new(Self {
            layers: spec.layers,
            classes,
            memory,
            pool: Mutex::new(pool),
            settled: Condvar::new(),
            reader,
            identity: RwLock::new(None),
            resident_requests: AtomicU64::new(0),
        }))
    }

    pub(crate) fn layer(&self, layer: usize) -> &Layer {
        &self.layers[layer]
    }

    pub(crate) fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// Bytes of all slots.
    pub(crate) fn budget_bytes(&self) -> u64 {
        self.memory.bytes as u64
    }

    /// Bytes of the records that are resident now.
    pub(crate) fn resident_bytes(&self) -> u64 {
        self.lock().resident_bytes()
    }

    pub(crate) fn counters(&self) -> ExpertCounters {
        let resident = self.resident_requests.load(Ordering::Relaxed);
        let mut sum =
            ExpertCounters { requests: resident, hits: resident, ..ExpertCounters::default() };
        for c in self.lock().counters() {
            sum.requests += c.requests;
            sum.hits += c.hits + c.hits_in_flight;
            sum.faults += c.faults;
            sum.evictions += c.evictions;
            sum.bytes_read += c.bytes_faulted;
            sum.first_touches += c.first_touches;
        }
        sum
    }

    pub(crate) fn layer_counters(&self) -> Vec<LayerCounters> {
        self.lock().counters().to_vec()
    }

    /// Forgets every record that is not in use. Waits for graphs that compute without pins.
    pub(crate) fn clear(&self) {
        *self.identity.write().unwrap_or_else(PoisonError::into_inner) = None;
        self.lock().clear();
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
        self.resident_requests.fetch_add(selections, Ordering::Relaxed);
    }

    /// The pool tensor of `part` of `layer`, cut down to slots `low..=high`, as kernels get it.
    pub(crate) fn window(&self, layer: usize, part: usize, low: u32, high: u32) -> ggml_tensor {
        let mut tensor = self.classes[self.layers[layer].class].parts[part];
        tensor.data = tensor.data.wrapping_byte_add(low as usize * tensor.nb[2]);
        tensor.ne[2] = i64::from(high - low) + 1;
        tensor.nb[3] = tensor.nb[2] * (high - low + 1) as usize;
        tensor
    }

    /// Reads every record into its slot, in file order, if all fit; then kernels find each
    /// layer's experts in expert order and no look-up is needed. `progress` gets bytes done.
    pub(crate) fn load_all(self: &Arc<Self>, progress: &mut dyn FnMut(u64) -> bool) -> Result<()> {
        let mut done = 0;
        let mut finish = |layer: usize, step: Step| -> Result<()> {
            for load in 0..step.arriving().len() {
                step.arrived(load)?;
            }
            let records: usize = step.arriving().iter().map(Vec::len).sum();
            step.finish()?;
            done += records as u64 * self.layers[layer].record_bytes();
            if progress(done) { Ok(()) } else { Err(Error::Cancelled) }
        };
        // The next layer's reads are queued before this one's are waited for.
        let mut under_way: Option<(usize, Step)> = None;
        for (index, layer) in self.layers.iter().enumerate() {
            let need: Vec<Need> =
                (0..layer.experts).map(|expert| Need { expert, last_row: 0 }).collect();
            let mut step = self.acquire(index, &need, &|| false)?;
            let parts: Vec<usize> = (0..layer.parts.len()).collect();
            for group in 0..step.arriving().len() {
                step.load(&parts, group, Priority::Bulk);
            }
            if let Some((layer, step)) = under_way.replace((index, step)) {
                finish(layer, step)?;
            }
        }
        if let Some((layer, step)) = under_way {
            finish(layer, step)?;
        }
        let pool = self.lock();
        let slot = |layer, expert| match pool.peek(record(layer, expert)) {
            Lookup::Resident(slot) => Some(slot.index),
            _ => None,
        };
        let in_order = |(layer, spec): (usize, &Layer)| {
            let base = slot(layer, 0)?;
            (0..spec.experts).all(|e| slot(layer, e) == Some(base + e)).then_some(base)
        };
        let identity = self.layers.iter().enumerate().map(in_order).collect();
        drop(pool);
        *self.identity.write().unwrap_or_else(PoisonError::into_inner) = identity;
        Ok(())
    }

    /// Finds and pins the resident records among `need` (distinct experts, at least one) and
    /// reserves slots for the others. What does not fit at once comes in groups through the same
    /// slots, see [`Step::arriving`]. Waits while another context holds what this one needs;
    /// holds nothing while it waits, and gives up when `cancelled` says so.
    pub(crate) fn acquire(
        self: &Arc<Self>,
        layer: usize,
        need: &[Need],
        cancelled: &dyn Fn() -> bool,
    ) -> Result<Step> {
        let mut pool = self.lock();
        let split = loop {
            match self.split(&pool, layer, need) {
                Some(split) => break split,
                None if cancelled() => return Err(Error::Cancelled),
                None => {
                    let waited = self.settled.wait_timeout(pool, CANCEL_LOOKED_FOR_EVERY);
                    pool = waited.unwrap_or_else(PoisonError::into_inner).0;
                }
            }
        };
        pool.begin_step();
        // The step comes last: its drop takes the lock, and would wait for ever if a panic dropped
        // it in here.
        let mut hits = Vec::with_capacity(split.keep.len());
        let mut pinned = Vec::with_capacity(split.keep.len());
        let mut reserved = Vec::with_capacity(split.reserve);
        for need in split.keep {
            let Lookup::Resident(slot) = pool.request(record(layer, need.expert)) else {
                unreachable!("the lock is held since the record was found resident");
            };
            pinned.push(slot);
            hits.push(Placed { expert: need.expert, slot: slot.index });
        }
        for need in &split.give_up {
            let evicted = pool.evict(record(layer, need.expert));
            debug_assert!(evicted, "an unpinned resident record can be evicted");
        }
        // The records wanted last come last and stay: decoding goes on from there.
        let mut missing = split.missing;
        missing.extend(split.give_up);
        missing.sort_by_key(|n| (n.last_row, n.expert));
        for need in &missing {
            let found = pool.request(record(layer, need.expert));
            debug_assert_eq!(found, Lookup::Absent);
        }
        let stay = missing.len() - split.reserve.min(missing.len());
        let mut slots = Vec::with_capacity(split.reserve);
        for need in &missing[stay..] {
            let found = pool.reserve(record(layer, need.expert));
            let found = found.expect("`split` counted the slots that can be reserved");
            reserved.push(found.slot);
            slots.push(found.slot.index);
        }
        for need in &missing[..stay] {
            pool.stream(record(layer, need.expert));
        }
        let experts: Vec<u32> = missing.iter().map(|n| n.expert).collect();
        let groups = groups(&experts, &slots);
        drop(pool);
        Ok(Step {
            residency: self.clone(),
            layer,
            hits,
            groups,
            reserved,
            pinned,
            loads: Vec::new(),
        })
    }

    /// How `need` is served with what the pool can give now; `None`: wait for another context.
    fn split(&self, pool: &Pool, layer: usize, need: &[Need]) -> Option<Split> {
        let mut keep = Vec::with_capacity(need.len());
        let mut missing = Vec::with_capacity(need.len());
        for &n in need {
            match pool.peek(record(layer, n.expert)) {
                Lookup::Resident(_) => keep.push(n),
                Lookup::Absent => missing.push(n),
                Lookup::Loading(_) => return None,
            }
        }
        if missing.is_empty() {
            return Some(Split { keep, give_up: Vec::new(), missing, reserve: 0 });
        }
        // Own resident records count as reservable until they are pinned.
        let reservable = pool.reservable(index32(layer)) as usize;
        let spare = reservable.saturating_sub(keep.len());
        if spare >= missing.len() {
            let reserve = missing.len();
            return Some(Split { keep, give_up: Vec::new(), missing, reserve });
        }
        // Waves. They turn over about this layer's share of the pool and leave the rest to the
        // other layers; when even that is not there, resident records of this layer give way.
        let share = self.share(layer).min(reservable);
        let reserve = spare.min(share).max(share.div_ceil(2)).min(missing.len());
        if reserve == 0 {
            return None;
        }
        let mut surplus = reserve.saturating_sub(spare);
        keep.sort_by_key(|n| (n.last_row, n.expert));
        let mut give_up = Vec::with_capacity(surplus);
        keep.retain(|&n| {
            let give = surplus > 0 && pool.is_evictable(record(layer, n.expert));
            if give {
                surplus -= 1;
                give_up.push(n);
            }
            !give
        });
        (surplus == 0).then_some(Split { keep, give_up, missing, reserve })
    }

    /// An even share of the class's slots, in slots.
    fn share(&self, layer: usize) -> usize {
        let class = self.layers[layer].class;
        let sharers = self.layers.iter().filter(|l| l.class == class).count();
        (self.classes[class].slots as usize / sharers).max(1)
    }

    fn lock(&self) -> MutexGuard<'_, Pool> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Split {
    /// Resident, to be pinned.
    keep: Vec<Need>,
    /// Resident, but their slots are needed for waves.
    give_up: Vec<Need>,
    missing: Vec<Need>,
    /// Slots to reserve.
    reserve: usize,
}

fn index32(index: usize) -> u32 {
    u32::try_from(index).expect("a GGUF has fewer than 2^32 layers")
}

fn record(layer: usize, expert: u32) -> Record {
    Record { layer: index32(layer), expert }
}

/// Cuts `experts` into groups that take turns in `slots`. When one group is not enough, the slots
/// are halved, so that one half loads while the other computes; the last groups stay.
fn groups(experts: &[u32], slots: &[u32]) -> Vec<Vec<Placed>> {
    if experts.is_empty() {
        return Vec::new();
    }
    let (first, second) = if experts.len() <= slots.len() || slots.len() < 2 {
        (slots, slots)
    } else {
        slots.split_at(slots.len() / 2)
    };
    let mut groups = Vec::new();
    let mut rest = experts;
    let mut half = second;
    let mut other = first;
    while !rest.is_empty() {
        let (before, group) = rest.split_at(rest.len() - half.len().min(rest.len()));
        let placed = group.iter().zip(half).map(|(&expert, &slot)| Placed { expert, slot });
        groups.push(placed.collect());
        rest = before;
        std::mem::swap(&mut half, &mut other);
    }
    groups.reverse();
    groups
}

/// What one layer of one batch holds of the pool. Dropping it without [`Step::finish`] gives the
/// reserved slots back as empty; reads that are under way are waited for in any case.
pub(crate) struct Step {
    residency: Arc<Residency>,
    layer: usize,
    hits: Vec<Placed>,
    groups: Vec<Vec<Placed>>,
    reserved: Vec<Slot>,
    pinned: Vec<Slot>,
    loads: Vec<Load>,
}

/// Reads of some parts of a group's records.
struct Load {
    ticket: Arc<Ticket>,
    /// Where the parts are; almost always one file.
    files: Vec<FileId>,
}

impl Step {
    /// Records that are resident.
    pub(crate) fn hits(&self) -> &[Placed] {
        &self.hits
    }

    /// Records to load, in groups that take turns in the same slots: group `g` may load a part
    /// only after group `g - 2` (or `g - 1`, if there is one slot) has been computed with it.
    pub(crate) fn arriving(&self) -> &[Vec<Placed>] {
        &self.groups
    }

    /// Starts to read `parts` of the records of a group; returns the index for
    /// [`Step::arrived`].
    pub(crate) fn load(&mut self, parts: &[usize], group: usize, priority: Priority) -> usize {
        let residency = &self.residency;
        let layer = &residency.layers[self.layer];
        let placed = &self.groups[group];
        let mut extents = Vec::with_capacity(placed.len() * parts.len());
        let mut targets = Vec::with_capacity(placed.len() * parts.len());
        let mut files = Vec::with_capacity(1);
        for &part in parts {
            let source = &layer.parts[part];
            let pool = &residency.classes[layer.class].parts[part];
            if !files.contains(&source.file) {
                files.push(source.file);
            }
            for p in placed {
                extents.push(Extent {
                    file: source.file,
                    offset: source.offset + u64::from(p.expert) * source.bytes as u64,
                    len: source.bytes as u64,
                });
                let slot = pool.data.cast::<u8>().wrapping_add(p.slot as usize * source.bytes);
                targets.push(Target { slot, bytes: source.bytes });
            }
        }
        let sink = Arrival { targets, _residency: residency.clone() };
        let ticket = Arc::new(residency.reader.submit(priority, extents, Arc::new(sink)));
        self.loads.push(Load { ticket, files });
        self.loads.len() - 1
    }

    /// To wait for one [`Step::load`], or to cancel it.
    pub(crate) fn ticket(&self, load: usize) -> &Arc<Ticket> {
        &self.loads[load].ticket
    }

    /// Waits until the reads of one [`Step::load`] have arrived. Fails also if the file was
    /// written to since it was opened.
    pub(crate) fn arrived(&self, load: usize) -> Result<()> {
        let Load { ticket, files } = &self.loads[load];
        ticket.wait()?;
        for &file in files {
            self.residency.reader.file(file)?.check_unchanged()?;
        }
        Ok(())
    }

    /// The layer is computed, with every part of its records loaded and [`Step::arrived`]: what was
    /// loaded last is resident from now on. If something has not arrived after all, nothing is.
    pub(crate) fn finish(mut self) -> Result<()> {
        for load in &self.loads {
            load.ticket.wait()?;
        }
        self.loads.clear();
        let mut pool = self.residency.lock();
        for slot in self.reserved.drain(..) {
            pool.commit(slot);
            self.pinned.push(slot);
        }
        Ok(())
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        for load in &self.loads {
            load.ticket.cancel();
        }
        for load in &self.loads {
            // Whatever it returns, nobody writes into the slots after it.
            let _ = load.ticket.wait();
        }
        let mut pool = self.residency.lock();
        for slot in self.reserved.drain(..) {
            pool.abandon(slot);
        }
        for slot in self.pinned.drain(..) {
            pool.unpin(slot);
        }
        drop(pool);
        self.residency.settled.notify_all();
    }
}

/// Copies what arrives into slots.
struct Arrival {
    /// Where each piece goes.
    targets: Vec<Target>,
    /// Keeps the pool's memory while reads are under way.
    _residency: Arc<Residency>,
}

/// One part of a slot.
struct Target {
    slot: *mut u8,
    bytes: usize,
}

// SAFETY: the targets are slots that this step has reserved and that nobody reads before the
// ticket is finished; the residency that owns their memory is held.
unsafe impl Send for Arrival {}
// SAFETY: distinct chunks cover distinct bytes.
unsafe impl Sync for Arrival {}

impl Sink for Arrival {
    fn chunk(&self, chunk: Chunk) {
        let offset = usize::try_from(chunk.offset).expect("a piece is smaller than memory");
        let target = &self.targets[chunk.piece];
        assert!(offset + chunk.len() <= target.bytes, "a chunk lies inside its piece");
        // SAFETY: in bounds of the slot (checked above); see the `Send` argument.
        unsafe {
            ptr::copy_nonoverlapping(chunk.as_ptr(), target.slot.add(offset), chunk.len());
        }
    }

    fn done(&self, _piece: usize, _result: Result<(), tierstream_io::Error>) {}
}

/// One buffer of a backend, filled from a base address upwards.
pub(crate) struct Memory {
    buffer: ggml_backend_buffer_t,
    bytes: usize,
}

impl Memory {
    /// Of every tensor's address, bytes.
    pub(crate) const ALIGNMENT: usize = 64;

    /// For weights. Kernels are chosen by the buffer's usage.
    fn weights(buffer_type: ggml_backend_buffer_type_t, bytes: usize) -> Result<Self> {
        let this = Self::new(buffer_type, bytes, "expert slots")?;
        this.prefer_huge_pages();
        // SAFETY: a live buffer.
        unsafe {
            ggml_backend_buffer_set_usage(this.buffer.cast(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
        }
        Ok(this)
    }

    /// For activations.
    pub(crate) fn scratch(buffer_type: ggml_backend_buffer_type_t, bytes: usize) -> Result<Self> {
        Self::new(buffer_type, bytes, "gathered rows")
    }

    fn new(
        buffer_type: ggml_backend_buffer_type_t,
        bytes: usize,
        what: &'static str,
    ) -> Result<Self> {
        let bytes = bytes.max(Self::ALIGNMENT);
        // SAFETY: a buffer type of ggml's registry.
        unsafe {
            if !ggml_backend_buft_is_host(buffer_type.cast()) {
                return Err(Error::Backend("the host executor needs host memory".into()));
            }
            let buffer = ggml_backend_buft_alloc_buffer(buffer_type.cast(), bytes);
            if buffer.is_null() {
                return Err(Error::OutOfMemory { bytes, what });
            }
            Ok(Self { buffer: buffer.cast(), bytes })
        }
    }

    /// Asks for huge pages: a fresh slot costs a page fault per 4 KiB otherwise, and kernels
    /// stream through slots. What it brings is in BENCHMARKS.md.
    fn prefer_huge_pages(&self) {
        const HUGE_PAGE: usize = 2 << 20;
        let (start, end) = (self.base().addr(), self.base().addr() + self.bytes);
        let (first, last) = (start.next_multiple_of(HUGE_PAGE), end / HUGE_PAGE * HUGE_PAGE);
        if first < last {
            let at = self.base().wrapping_add(first - start);
            // SAFETY: advice about pages that lie wholly inside our buffer; a refusal is harmless.
            unsafe { libc::madvise(at.cast(), last - first, libc::MADV_HUGEPAGE) };
        }
    }

    pub(crate) fn base(&self) -> *mut u8 {
        // SAFETY: a live buffer.
        unsafe { ggml_backend_buffer_get_base(self.buffer.cast()).cast() }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn buffer(&self) -> ggml_backend_buffer_t {
        self.buffer
    }

    /// A contiguous tensor of this buffer at `data`.
    pub(crate) fn tensor(&self, type_: ggml_type, ne: [i64; 3], data: *mut u8) -> ggml_tensor {
        // SAFETY: plain data, for which zero is a valid value everywhere.
        let mut t: ggml_tensor = unsafe { std::mem::zeroed() };
        t.type_ = type_;
        t.buffer = self.buffer.cast();
        t.ne = [ne[0], ne[1], ne[2], 1];
        // SAFETY: pure functions of the type; the shape was checked with the file's header.
        let (element, row) = unsafe { (ggml_type_size(type_), ggml_row_size(type_, ne[0])) };
        let size = |n: i64| usize::try_from(n).expect("checked with the file's header");
        t.nb = [element, row, row * size(ne[1]), row * size(ne[1]) * size(ne[2])];
        t.data = data.cast();
        t
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: made by `new`, freed once; contexts that compute with it are gone.
        unsafe { ggml_backend_buffer_free(self.buffer.cast()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn experts(groups: &[Vec<Placed>]) -> Vec<Vec<u32>> {
        groups.iter().map(|g| g.iter().map(|p| p.expert).collect()).collect()
    }

    #[test]
    fn one_group_when_all_fit() {
        let g = groups(&[3, 1, 2], &[7, 8, 9]);
        assert_eq!(experts(&g), [[3, 1, 2]]);
        assert_eq!(g[0][2], Placed { expert: 2, slot: 9 });
    }

    #[test]
    fn groups_take_turns_and_the_last_two_keep_their_slots() {
        let g = groups(&[0, 1, 2, 3, 4, 5, 6], &[10, 11, 12, 13, 14]);
        assert_eq!(experts(&g), [vec![0, 1], vec![2, 3], vec![4, 5, 6]]);
        assert_eq!(g[2].iter().map(|p| p.slot).collect::<Vec<_>>(), [12, 13, 14]);
        assert_eq!(g[1].iter().map(|p| p.slot).collect::<Vec<_>>(), [10, 11]);
        assert_eq!(g[0].iter().map(|p| p.slot).collect::<Vec<_>>(), [12, 13]);
    }

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
                type_: GGML_TYPE_F32,
                ne: [1, 1],
            }],
        };
        let spec = Spec { layers: vec![layer], slots: vec![4], policy: Policy::Lru, seed: 1 };
        let reader = Arc::new(Reader::new(tierstream_io::Config::default()).unwrap());
        // SAFETY: lives for ever.
        let host = unsafe { ggml_backend_cpu_buffer_type() }.cast();
        let residency = Residency::new(spec, host, reader).unwrap();
        let (done, ended) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            // The same expert twice breaks the contract.
            let need = [Need { expert: 3, last_row: 0 }; 2];
            let acquire =
                std::panic::AssertUnwindSafe(|| residency.acquire(0, &need, &|| false).map(drop));
            let panicked = std::panic::catch_unwind(acquire).is_err();
            // Others go on with what is left.
            let other = [Need { expert: 1, last_row: 0 }];
            let served = residency.acquire(0, &other, &|| false).is_ok();
            done.send((panicked, served)).unwrap();
        });
        let ended = ended.recv_timeout(Duration::from_secs(60)).expect("no deadlock");
        assert_eq!(ended, (true, true));
    }

    #[test]
    fn one_slot_serves_one_expert_at_a_time() {
        assert_eq!(experts(&groups(&[4, 5, 6], &[0])), [[4], [5], [6]]);
    }
}

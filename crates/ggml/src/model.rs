//! A loaded model: its weights, which are there, and its expert records, which are read by nobody until they
//! are routed to.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, TryLockError};

use tierstream_io::mapped::Mapped;
use tierstream_io::{FileId, Reader, Status};
use tierstream_pool::Policy;

pub use self::load::{Progress, Source, Weights};
pub use self::past_host::GdsRead;
pub use self::size::PoolSize;
use self::size::slots_for;
pub(crate) use self::size::{all_slots, pool_bytes, slots_within};
use crate::abi::*;
use crate::cached::FromCache;
use crate::error::{Error, Result};
use crate::gpu::disturbing;
use crate::placement::{Gpu, Placement};
use crate::proxy::{Device, OwnedDevice};
use crate::residency::{
    ExpertCounters, Layer, LayerUse, Residency, Spec, layer_bytes, rounding_bytes,
};
use crate::uploads::Uploads;
use crate::verified::Checksums;
use crate::vocab::Vocab;

mod arriving;
mod checking;
mod converting;
mod layers;
mod load;
mod loader;
mod past_host;
mod shown;
mod size;

/// A loaded model. Cheap to clone; contexts hold it too.
#[derive(Clone)]
pub struct Model {
    inner: Arc<Inner>,
}

pub(crate) struct Inner {
    llama: *mut llama_model,
    /// The proxy, for [`Weights::Streamed`] models with experts or on a GPU.
    device: Option<OwnedDevice>,
    streamed: Option<Streamed>,
    /// Where it computes, unless on the processor.
    gpu: Option<Gpu>,
    /// The path of the reads that the load took, if we read something.
    read: Option<Status>,
    /// Blocks whose experts are not streamed, though the model was to be, and why.
    resident: Vec<Resident>,
    /// What weights are compared with when they are read.
    checksums: Option<Arc<Checksums>>,
    /// Held while the pool is made.
    attaching: Mutex<()>,
    path: PathBuf,
    /// What of the weights the page cache had, and why not all was taken from there that it may have had.
    cached: Mutex<(FromCache, Option<String>)>,
    /// Files that weights are mapped from. Dropped before the weights.
    mapped: OnceLock<Vec<Mapped>>,
    /// What the load has read past host memory, if it was to.
    gds_read: OnceLock<GdsRead>,
    /// Whether only the header was read: there are no weights to compute with.
    rehearsal: bool,
}

/// What a pool is made from.
struct Streamed {
    layers: Vec<Layer>,
    /// The same, as they lie in host memory, where `layers` do not.
    layers_below: Vec<Layer>,
    placement: Placement,
    /// To the GPU of `placement`.
    uploads: Option<Arc<Uploads>>,
    reader: Arc<Reader>,
    files: Vec<FileId>,
    checksums: Option<Arc<Checksums>>,
}

/// A block, and why its experts cannot be streamed.
type Resident = (u32, String);

// SAFETY: a loaded llama_model is constant; llama.cpp serves several contexts of it from several
// threads.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

impl Inner {
    fn note_cached(&self, (more, why): (FromCache, Option<String>)) {
        let mut cached = self.cached.lock().unwrap_or_else(PoisonError::into_inner);
        cached.0 += more;
        cached.1 = why.or_else(|| cached.1.take());
    }

    fn note_gds_read(&self, read: GdsRead) {
        assert!(self.gds_read.set(read).is_ok(), "weights are loaded once");
    }

    /// Keeps what weights are mapped from as long as they live.
    fn hold_mapped(&self, mapped: Vec<Mapped>) {
        assert!(self.mapped.set(mapped).is_ok(), "weights are loaded once");
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // They may be copied to where the weights are, which is about to go.
        drop(self.mapped.take());
        // SAFETY: contexts hold an `Arc` of this, so they are gone; the device, which the model's
        // buffers refer to, is dropped after.
        disturbing(|| unsafe { llama_model_free(self.llama) });
    }
}

/// How large the pool is and what it keeps.
#[derive(Debug, Clone)]
pub struct PoolOptions {
    /// Slots of all size classes together.
    pub size: PoolSize,
    /// Which record gives way.
    pub policy: Policy,
    /// For the `random` policy.
    pub seed: u64,
    /// Read every record at once if all of them fit; otherwise records come when routed to.
    pub preload: bool,
    /// On a GPU, whose memory the pool above is in: a pool in host memory below it, pinned, of this
    /// size. Without one, records come from the drive straight away.
    pub below: Option<PoolSize>,
    /// On a GPU: how many whole layers there is room for beside the slots, at least one; prompts are
    /// computed over them. With two, one is brought while the other is computed.
    pub staged: usize,
}

impl Model {
    /// Something has been computed: weights that are mapped are copied to where they are read faster.
    pub(crate) fn copy_weights(&self) {
        self.inner.mapped.get().into_iter().flatten().for_each(Mapped::copy);
    }

    /// Looks whether the weights are still those that were loaded.
    pub(crate) fn check_weights(&self) -> Result<()> {
        let mapped = self.inner.mapped.get().map_or(&[][..], Vec::as_slice);
        Ok(mapped.iter().try_for_each(Mapped::check_intact)?)
    }

    /// Gives a streamed model its pool, once. `progress` reports the preload.
    ///
    /// # Errors
    /// [`Error::PoolTooSmall`] when the size is below [`Model::least_pool_bytes`];
    /// [`Error::HasPool`] and [`Error::Rehearsal`];
    /// [`Error::OutOfMemory`], [`Error::Io`] and [`Error::Cancelled`] from allocating and
    /// preloading.
    pub fn attach_pool(&self, options: &PoolOptions, progress: Progress<'_>) -> Result<()> {
        let (Some(device), Some(streamed)) = (&self.inner.device, &self.inner.streamed) else {
            return Ok(());
        };
        if self.inner.rehearsal {
            return Err(Error::Rehearsal);
        }
        let _attaching = match self.inner.attaching.try_lock() {
            // Of a caller whose `progress` has panicked: there is no pool.
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Err(Error::HasPool),
            Ok(guard) => guard,
        };
        if device.pooled().residency().is_some() {
            return Err(Error::HasPool);
        }
        let slots = slots_for(&streamed.layers, options.size)?;
        let all = all_slots(&streamed.layers);
        let whole = slots.iter().zip(&all).all(|(have, all)| have >= all);
        let spec = |layers: &[Layer], slots| Spec {
            layers: layers.to_vec(),
            slots,
            staged: options.staged.max(1),
            policy: options.policy,
            seed: options.seed,
            checksums: streamed.checksums.clone(),
        };
        let total: u64 = self.expert_bytes();
        let mut told = |done| progress(done as f32 / total as f32);
        let reader = || streamed.reader.clone();
        let below = match (streamed.placement.gpu(), options.below) {
            (Some(gpu), Some(size)) if !whole => {
                let layers = &streamed.layers_below;
                let slots = slots_for(layers, size)?;
                let whole = slots == all_slots(layers);
                let below = Residency::below(spec(layers, slots), gpu, reader())?;
                if whole && options.preload {
                    self.inner.note_cached(below.load_all(&streamed.files, &mut told)?);
                }
                Some(below)
            }
            _ => None,
        };
        let uploads = streamed.uploads.as_ref();
        let residency = Residency::new(spec(&streamed.layers, slots), uploads, below, reader())?;
        if whole && options.preload {
            self.inner.note_cached(residency.load_all(&streamed.files, &mut told)?);
        }
        if device.pooled().attach(residency) { Ok(()) } else { Err(Error::HasPool) }
    }

    /// Changes the size of the pool on a GPU, while others compute with it.
    ///
    /// A smaller pool gives memory back: at once, but for what is being computed with, which is
    /// waited for (half a minute at most). The records in the slots that go are evicted, whichever
    /// these are. A larger one takes memory as it fills. Where the GPU has less than that, the pool
    /// gets as large as it can, now and later.
    ///
    /// Returns the bytes of the slots that there are now: those of `size`, or more if some that
    /// were to go are still computed with. Their memory is given back soon after.
    ///
    /// A pool of all experts that were read beforehand is computed with by look-up once it has been
    /// smaller, which is a little slower, and stays so.
    ///
    /// # Errors
    /// [`Error::PoolTooSmall`], with the least; nothing has changed then. [`Error::NotElastic`]
    /// without a pool on a GPU. [`Error::Gpu`]: what the driver says.
    pub fn resize_pool(&self, size: PoolSize) -> Result<u64> {
        let (Some(streamed), Some(residency)) = (&self.inner.streamed, self.residency()) else {
            return Err(Error::NotElastic);
        };
        residency.resize(slots_for(&streamed.layers, size)?)
    }

    /// Calls `make`, which takes memory of the GPU that is not the pool's, and when that fails calls
    /// it again with a smaller pool: first with half of what the pool can spare, then with the
    /// least. The pool grows again as far as memory reaches, now and when what was made is gone.
    pub(crate) fn with_room<T>(&self, mut make: impl FnMut() -> Option<T>) -> Result<Option<T>> {
        // What is made takes more when it is first used: whether there is some is looked at before.
        if let Some(residency) = self.residency() {
            residency.look_soon();
        }
        let made = make();
        match self.residency() {
            Some(residency) if made.is_none() => {
                for share in [2, 1] {
                    if !residency.spare(share)? {
                        break;
                    }
                    let made = make();
                    if made.is_some() {
                        return Ok(made);
                    }
                }
                Ok(None)
            }
            _ => Ok(made),
        }
    }

    /// Bytes of all streamed experts; 0 for models that do not stream.
    pub fn expert_bytes(&self) -> u64 {
        let layers = self.inner.streamed.as_ref().map_or(&[][..], |s| &s.layers);
        layers.iter().map(|l| l.record_bytes() * u64::from(l.experts)).sum()
    }

    /// The smallest pool that works, bytes: the top-k records of every layer.
    pub fn least_pool_bytes(&self) -> u64 {
        let layers = self.inner.streamed.as_ref().map_or(&[][..], |s| &s.layers);
        pool_bytes(layers, &Spec::least_slots(layers))
    }

    /// Bytes of a pool with a slot for every expert: a little more than [`Model::expert_bytes`],
    /// since slots have room around their records.
    pub fn whole_pool_bytes(&self) -> u64 {
        let layers = self.inner.streamed.as_ref().map_or(&[][..], |s| &s.layers);
        pool_bytes(layers, &all_slots(layers))
    }

    /// Bytes of a GPU's memory that are needed beside the slots for a whole layer; 0 on the CPU.
    pub fn area_bytes(&self) -> u64 {
        let streamed = self.inner.streamed.as_ref().filter(|s| s.placement.gpu().is_some());
        streamed.map_or(0, |s| s.layers.iter().map(layer_bytes).max().unwrap_or(0))
    }

    /// Bytes of a GPU's memory that slots and [area](Self::area_bytes) may take beyond their size,
    /// because they take it in large pieces; 0 on the CPU.
    ///
    /// # Errors
    /// [`Error::Gpu`]: what the driver says.
    pub fn rounding_bytes(&self) -> Result<u64> {
        let Some(streamed) = &self.inner.streamed else { return Ok(0) };
        let gpu = streamed.placement.gpu();
        gpu.map_or(Ok(0), |gpu| rounding_bytes(gpu, &streamed.layers))
    }

    /// The GPU that the model computes on, if it does.
    pub fn gpu(&self) -> Option<&Gpu> {
        self.inner.gpu.as_ref()
    }

    /// Bytes of a GPU's memory that the pool has taken so far; none on the CPU.
    pub fn vram_bytes(&self) -> Option<u64> {
        self.residency()?.vram_bytes()
    }

    /// Bytes that a pool of `size` takes.
    ///
    /// # Errors
    /// [`Error::PoolTooSmall`].
    pub fn pool_bytes_of(&self, size: PoolSize) -> Result<u64> {
        let layers = self.inner.streamed.as_ref().map_or(&[][..], |s| &s.layers);
        Ok(pool_bytes(layers, &slots_for(layers, size)?))
    }

    /// The block of a MoE layer.
    pub(crate) fn block_of(&self, layer: usize) -> u32 {
        let layers = self.inner.streamed.as_ref().map_or(&[][..], |s| &s.layers);
        layers.get(layer).map_or(0, |l| l.block)
    }

    /// Whether expert records go through a pool.
    pub fn is_streamed(&self) -> bool {
        self.inner.streamed.is_some()
    }

    /// Blocks whose experts stay resident outside the pool, though the model was to be streamed,
    /// and why.
    pub fn resident_blocks(&self) -> &[(u32, String)] {
        &self.inner.resident
    }

    /// What the pool has done so far, if there is one.
    pub fn expert_counters(&self) -> ExpertCounters {
        self.residency().map_or_else(ExpertCounters::default, |r| r.counters())
    }

    /// Bytes of all slots, and bytes of the records in them.
    pub fn pool_bytes(&self) -> (u64, u64) {
        self.residency().map_or((0, 0), |r| (r.budget_bytes(), r.resident_bytes()))
    }

    /// Bytes of the slots that the pool was to have and has not, because the GPU's memory is short.
    pub fn pool_shortage_bytes(&self) -> u64 {
        self.residency().map_or(0, |r| r.shortage_bytes())
    }

    /// Bytes of all slots of the pool in host memory below a GPU's, and bytes of the records in them;
    /// none without one.
    pub fn pool_below_bytes(&self) -> Option<(u64, u64)> {
        let below = self.residency()?.below_pool()?;
        Some((below.budget_bytes(), below.resident_bytes()))
    }

    /// The smallest pool below a GPU's that works, and one of all experts, bytes.
    pub fn below_bytes(&self) -> (u64, u64) {
        let layers = self.inner.streamed.as_ref().map_or(&[][..], |s| &s.layers_below);
        (pool_bytes(layers, &Spec::least_slots(layers)), pool_bytes(layers, &all_slots(layers)))
    }

    /// Share of all streamed experts that the pool has slots for, by bytes, 0 to 1; none without a
    /// pool.
    pub fn pool_share(&self) -> Option<f64> {
        let residency = self.residency()?;
        let layers = residency.layers();
        let all = pool_bytes(layers, &all_slots(layers));
        Some(pool_bytes(layers, &residency.slots()) as f64 / all as f64)
    }

    /// Per MoE layer: block and counters.
    pub fn layer_counters(&self) -> Vec<(u32, tierstream_pool::LayerCounters)> {
        let Some(r) = self.residency() else { return Vec::new() };
        r.layers().iter().map(|l| l.block).zip(r.layer_counters()).collect()
    }

    /// Per MoE layer: where its experts were found, and how often each was asked for; nothing without a pool.
    pub fn layer_uses(&self) -> Vec<LayerUse> {
        self.residency().map_or_else(Vec::new, |r| r.layer_uses())
    }

    /// Empties the pool, so that the next tokens start cold.
    pub fn clear_pool(&self) {
        if let Some(r) = self.residency() {
            r.clear();
        }
    }

    /// The reader that serves faults, if the model streams.
    pub fn reader(&self) -> Option<&Arc<Reader>> {
        self.inner.streamed.as_ref().map(|s| &s.reader)
    }

    /// The path that reads of the model take, or took when it was loaded; none if llama.cpp has read it.
    pub fn read_status(&self) -> Option<Status> {
        self.reader().map(|reader| reader.status()).or_else(|| self.inner.read.clone())
    }

    /// What the load has read to a GPU past host memory, and what not; none if it was not to.
    pub fn gds_read(&self) -> Option<&GdsRead> {
        self.inner.gds_read.get()
    }

    /// What of the weights that were loaded the page cache had, so that the drive was not asked for it.
    pub fn from_cache(&self) -> FromCache {
        self.inner.cached.lock().unwrap_or_else(PoisonError::into_inner).0
    }

    /// Why the page cache was not asked, or what it has is copied and not mapped; none if all is as it can be.
    pub fn cache_remark(&self) -> Option<String> {
        self.inner.cached.lock().unwrap_or_else(PoisonError::into_inner).1.clone()
    }

    /// The model's files as that reader knows them.
    pub fn files(&self) -> &[FileId] {
        self.inner.streamed.as_ref().map_or(&[], |s| &s.files)
    }

    /// A file of the model, as the reader has it open, whose name is gone or stands for another
    /// file by now: what is read is still the model that was loaded, and a restart would load the
    /// new one.
    pub fn replaced_file(&self) -> Option<PathBuf> {
        let streamed = self.inner.streamed.as_ref()?;
        let files = streamed.files.iter().filter_map(|&id| streamed.reader.file(id).ok());
        files.into_iter().find(|f| f.is_replaced()).map(|f| f.path().to_owned())
    }

    /// What its weights are compared with when they are read, if they are.
    pub fn checksums(&self) -> Option<&Arc<Checksums>> {
        self.inner.checksums.as_ref()
    }

    /// The (first) file of the model.
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// The tokenizer.
    pub fn vocab(&self) -> Vocab<'_> {
        Vocab::new(self.inner.llama)
    }

    /// Tokens of context that the model was trained with.
    pub fn n_ctx_train(&self) -> u32 {
        // SAFETY: a live model.
        u32::try_from(unsafe { llama_model_n_ctx_train(self.inner.llama) }).unwrap_or(0)
    }

    /// The block of a MoE layer.
    pub(crate) fn block(&self, layer: usize) -> Option<u32> {
        Some(self.inner.streamed.as_ref()?.layers.get(layer)?.block)
    }

    pub(crate) fn is_rehearsal(&self) -> bool {
        self.inner.rehearsal
    }

    pub(crate) fn raw(&self) -> *mut llama_model {
        self.inner.llama
    }

    pub(crate) fn device(&self) -> Option<&Device> {
        self.inner.device.as_deref()
    }

    fn residency(&self) -> Option<&Arc<Residency>> {
        self.inner.device.as_ref().and_then(|d| d.pooled().residency())
    }
}

#[cfg(test)]
mod tests;

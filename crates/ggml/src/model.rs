//! Loading a model: llama.cpp allocates its weights, and we read them; expert records are read by
//! nobody until they are routed to.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::{Arc, Mutex, OnceLock, TryLockError};

use tierstream_io::mapped::Mapped;
use tierstream_io::{FileId, Reader, Status};
use tierstream_pool::Policy;

use self::arriving::Arriving;
use self::layers::{block_bytes, names, pooled_layers};
use self::loader::{
    call_loader, check_all_taken, check_identities, first_not_taken, most_read_bytes, open,
    thread_read_bytes,
};
pub use self::past_host::GdsRead;
pub use self::size::PoolSize;
use self::size::slots_for;
pub(crate) use self::size::{all_slots, pool_bytes, slots_within};
use crate::abi::*;
use crate::context::{Context, ContextOptions};
use crate::error::{Error, Result};
use crate::gds::Gds;
use crate::loading::{Captured, capture, types_of};
use crate::log;
use crate::placement::{Gpu, Placement};
use crate::precheck;
use crate::proxy::{Device, OwnedDevice};
use crate::residency::{ExpertCounters, Layer, Residency, Spec, layer_bytes, rounding_bytes};
use crate::uploads::Uploads;
use crate::verified::Checksums;
use crate::vocab::Vocab;

mod arriving;
mod checking;
mod converting;
mod layers;
mod loader;
mod past_host;
mod shown;
mod size;

/// Who reads the weights, and with which kernels they are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weights {
    /// Expert records through a pool; everything else is read at once, as the records are. The weights
    /// of a dense model on the CPU are repacked where its kernels have layouts of their own.
    Streamed,
    /// Everything loaded by llama.cpp. Of a packed model, which it cannot read, by us: to the same
    /// memory, for the same kernels.
    Stock {
        /// Map the file instead of reading it.
        mmap: bool,
        /// Let the CPU backend repack weights into layouts of its own. Faster, and with other
        /// last bits; records in a pool cannot be repacked.
        repack: bool,
        /// With a GPU: keep the experts in host memory, and compute with them there.
        cpu_experts: bool,
    },
}

/// What reads the weights, and what they are compared with.
#[derive(Debug, Clone)]
pub struct Source {
    /// Reads the files.
    pub reader: Arc<Reader>,
    /// All weights are compared with these as they are read: now, and expert records whenever they are
    /// read later.
    pub checksums: Option<Arc<Checksums>>,
    /// Reads the weights that go to a GPU with the load, past host memory, but for those that the page
    /// cache has or that are compared with checksums.
    pub gds: Option<Gds>,
}

impl Source {
    /// By a reader alone.
    pub fn of(reader: Arc<Reader>) -> Self {
        Self { reader, checksums: None, gds: None }
    }
}

/// Reports how much of the load is done, 0 to 1; returning false stops it.
pub type Progress<'a> = &'a mut dyn FnMut(f32) -> bool;

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
    /// Files that weights are mapped from. Dropped before the weights.
    mapped: OnceLock<Vec<Mapped>>,
    /// What the load has read past host memory, if it was to.
    gds_read: OnceLock<GdsRead>,
    /// Whether only the header was read: there are no weights to compute with.
    rehearsal: bool,
}

/// How llama.cpp loads a model by itself: as [`Weights::Stock`].
#[derive(Clone, Copy)]
struct Stock {
    mmap: bool,
    repack: bool,
    cpu_experts: bool,
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
    /// Keeps what weights are mapped from as long as they live.
    fn hold_mapped(&self, mapped: Vec<Mapped>) {
        assert!(self.mapped.set(mapped).is_ok(), "weights are loaded once");
    }
}

impl Inner {
    fn note_gds_read(&self, read: GdsRead) {
        assert!(self.gds_read.set(read).is_ok(), "weights are loaded once");
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // They may be copied to where the weights are, which is about to go.
        drop(self.mapped.take());
        // SAFETY: contexts hold an `Arc` of this, so they are gone; the device, which the model's
        // buffers refer to, is dropped after.
        unsafe { llama_model_free(self.llama) };
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
    /// Loads `file`, whose header is already read and checked, to where `placement` says.
    ///
    /// With [`Weights::Streamed`], no byte of the experts is read and `reader` will serve them;
    /// call [`Model::attach_pool`] before decoding. All else is read by `reader`: straight to host
    /// memory, to a GPU's through its ring, which is pinned then.
    ///
    /// # Errors
    /// [`Error::Unusable`] and [`Error::Load`] when llama.cpp would abort on the file or refuses
    /// it, [`Error::SelfCheck`] when it does not behave as the proxy device needs, [`Error::Io`],
    /// [`Error::Cancelled`], [`Error::PackedForStock`]; of a GPU [`Error::WeightsTooLarge`], [`Error::OutOfGpuMemory`] if the
    /// ring cannot be pinned, and [`Error::Gpu`].
    pub fn load(
        file: &tierstream_gguf::Model,
        weights: Weights,
        placement: &Placement,
        reader: Arc<Reader>,
        progress: Progress<'_>,
    ) -> Result<Model> {
        Self::load_from(file, weights, placement, Source::of(reader), progress)
    }

    /// The same with all that `source` has.
    ///
    /// # Errors
    /// As [`Model::load`]; [`Error::Checksum`] for weights that do not have theirs,
    /// [`Error::NotVerified`] for such that llama.cpp reads by itself. Later, when records are read, a
    /// decode fails with the former, and the next one is independent of it.
    pub fn load_from(
        file: &tierstream_gguf::Model,
        weights: Weights,
        placement: &Placement,
        source: Source,
        progress: Progress<'_>,
    ) -> Result<Model> {
        log::init();
        precheck::check(file)?;
        let experts = tierstream_gguf::Experts::group(file)?;
        match weights {
            Weights::Stock { repack, cpu_experts, .. } if file.originals().is_some() => {
                if cpu_experts || repack && !experts.is_empty() {
                    return Err(Error::PackedForStock { path: first_path(file) });
                }
                let why = || "the whole model is".to_owned();
                let resident = experts.layers().iter().map(|l| (l.layer, why())).collect();
                Self::load_streamed(file, &experts, placement, source, resident, progress)
            }
            Weights::Stock { .. } if source.checksums.is_some() => {
                Err(Error::NotVerified { path: first_path(file), tensor: None })
            }
            Weights::Stock { mmap, repack, cpu_experts } => {
                let how = Stock { mmap, repack, cpu_experts };
                Self::load_stock(file, how, placement, progress)
            }
            Weights::Streamed => {
                Self::load_streamed(file, &experts, placement, source, Vec::new(), progress)
            }
        }
    }

    /// Loads with as many layers streamed as can be; those in `resident` are known not to.
    fn load_streamed(
        file: &tierstream_gguf::Model,
        experts: &tierstream_gguf::Experts,
        placement: &Placement,
        source: Source,
        mut resident: Vec<Resident>,
        progress: Progress<'_>,
    ) -> Result<Model> {
        let Source { reader, checksums, gds } = source;
        let files = file.files().iter().map(|f| open(&reader, f)).collect::<Result<Vec<_>>>()?;
        let uploads = placement.gpu().map(|gpu| Uploads::new(gpu, &reader)).transpose()?;
        // Layers that turn out to use their experts in a way that the proxy cannot serve are
        // resident. That is known once a graph was built.
        loop {
            let skip: BTreeSet<u32> = resident.iter().map(|(block, _)| *block).collect();
            let align = block_bytes(&reader, &files)?;
            let on_host = pooled_layers(file, experts, &files, align, &skip);
            let (layers, layers_below) = match placement {
                Placement::Cpu => (on_host, Vec::new()),
                // Kernels want records side by side there, and nothing is read in place.
                Placement::Gpu(_) => (pooled_layers(file, experts, &files, 1, &skip), on_host),
            };
            if layers.is_empty() && uploads.is_none() {
                let repack = experts.is_empty();
                let source = (reader, checksums);
                return Self::load_whole(file, repack, source, files, resident, progress);
            }
            let streamed = Streamed {
                layers,
                layers_below,
                placement: placement.clone(),
                uploads: uploads.clone(),
                reader: reader.clone(),
                files: files.clone(),
                checksums: checksums.clone(),
            };
            let blocks: Vec<u32> = streamed.layers.iter().map(|l| l.block).collect();
            let before = thread_read_bytes();
            let kept = resident.clone();
            let (model, captured) =
                Self::load_on_device(file, streamed, kept, experts, false, progress)?;
            model.check_load(file, &captured, before)?;
            // The drive is busy while graphs are built.
            let (inner, unread) = (model.inner.clone(), &captured.unread);
            let (uploads, gds) = (uploads.clone(), gds.as_ref());
            let arriving =
                Arriving::start(inner, file, unread, reader.clone(), &files, uploads, gds)?;
            let lost = || arriving.failed();
            let foreign = model.probe().map_err(|error| lost().unwrap_or(error))?;
            if foreign.is_empty() {
                let all = file.tensor_bytes() - model.expert_bytes();
                arriving.wait(all, progress)?;
                return Ok(model);
            }
            resident.extend(foreign.into_iter().map(|(layer, why)| (blocks[layer], why)));
        }
    }

    /// A model to make contexts of that cannot compute: of `file`'s header, with all experts
    /// streamed that may be.
    pub(crate) fn load_header(
        file: &tierstream_gguf::Model,
        reader: &Arc<Reader>,
    ) -> Result<Model> {
        log::init();
        precheck::check(file)?;
        let experts = tierstream_gguf::Experts::group(file)?;
        let files = file.files().iter().map(|f| open(reader, f)).collect::<Result<Vec<_>>>()?;
        let align = block_bytes(reader, &files)?;
        let layers = pooled_layers(file, &experts, &files, align, &BTreeSet::new());
        let (placement, reader) = (Placement::Cpu, reader.clone());
        let (layers_below, uploads) = (Vec::new(), None);
        let checksums = None;
        let streamed =
            Streamed { layers, layers_below, placement, uploads, reader, files, checksums };
        let resident = Vec::new();
        let loaded = Self::load_on_device(file, streamed, resident, &experts, true, &mut |_| true);
        loaded.map(|(model, _)| model)
    }

    /// Loads a model whose experts are not streamed, to host memory. With `repack`, to the layouts that
    /// the CPU's kernels like best.
    fn load_whole(
        file: &tierstream_gguf::Model,
        repack: bool,
        (reader, checksums): (Arc<Reader>, Option<Arc<Checksums>>),
        files: Vec<FileId>,
        resident: Vec<Resident>,
        progress: Progress<'_>,
    ) -> Result<Model> {
        let mut devices = [ptr::null_mut()];
        // SAFETY: a plain struct of defaults.
        let mut params = unsafe { llama_model_default_params() };
        params.devices = devices.as_mut_ptr();
        params.n_gpu_layers = 0;
        params.load_mode = LLAMA_LOAD_MODE_DIRECT_IO;
        params.use_extra_bufts = repack;
        let path = first_path(file);
        let types = types_of(&Placement::Cpu, repack)?;
        let before = thread_read_bytes();
        let (llama, captured) = capture(file, types, || call_loader(file, params, &mut *progress))?;
        let inner = Inner {
            llama,
            device: None,
            streamed: None,
            gpu: None,
            read: Some(reader.status()),
            resident,
            checksums,
            attaching: Mutex::new(()),
            path,
            mapped: OnceLock::new(),
            gds_read: OnceLock::new(),
            rehearsal: false,
        };
        let model = Model { inner: Arc::new(inner) };
        model.check_load(file, &captured, before)?;
        let inner = model.inner.clone();
        let arriving = Arriving::start(inner, file, &captured.unread, reader, &files, None, None)?;
        arriving.wait(file.tensor_bytes(), progress)?;
        Ok(model)
    }

    fn load_stock(
        file: &tierstream_gguf::Model,
        how: Stock,
        placement: &Placement,
        progress: Progress<'_>,
    ) -> Result<Model> {
        let device = placement.gpu().map_or(ptr::null_mut(), |gpu| gpu.inner().cast());
        let mut devices = [device, ptr::null_mut()];
        // SAFETY: a plain struct of defaults.
        let mut params = unsafe { llama_model_default_params() };
        params.devices = devices.as_mut_ptr();
        params.n_gpu_layers = if device.is_null() { 0 } else { -1 };
        params.load_mode = if how.mmap { LLAMA_LOAD_MODE_MMAP } else { LLAMA_LOAD_MODE_DIRECT_IO };
        params.use_extra_bufts = how.repack;
        // As llama.cpp's `--cpu-moe`.
        let mut on_cpu = [
            llama_model_tensor_buft_override {
                pattern: c"\\.ffn_(up|down|gate|gate_up)_(ch|)exps".as_ptr(),
                // SAFETY: lives for ever.
                buft: unsafe { ggml_backend_cpu_buffer_type() },
            },
            llama_model_tensor_buft_override { pattern: ptr::null(), buft: ptr::null_mut() },
        ];
        if how.cpu_experts {
            params.tensor_buft_overrides = on_cpu.as_mut_ptr();
        }
        let path = first_path(file);
        let llama = call_loader(file, params, progress)?;
        let inner = Inner {
            llama,
            device: None,
            streamed: None,
            gpu: placement.gpu().cloned(),
            read: None,
            resident: Vec::new(),
            checksums: None,
            attaching: Mutex::new(()),
            path,
            mapped: OnceLock::new(),
            gds_read: OnceLock::new(),
            rehearsal: false,
        };
        let model = Model { inner: Arc::new(inner) };
        check_identities(file)?;
        Ok(model)
    }

    /// Loads with our device as llama.cpp's only one. Returns what is yet to be read, too. A rehearsal
    /// is of the header only.
    fn load_on_device(
        file: &tierstream_gguf::Model,
        streamed: Streamed,
        resident: Vec<Resident>,
        experts: &tierstream_gguf::Experts,
        rehearsal: bool,
        progress: Progress<'_>,
    ) -> Result<(Model, Captured)> {
        let slots = all_slots(&streamed.layers).into_iter().max().unwrap_or(0);
        let names = names(&streamed.layers);
        let device = Device::wrap(&streamed.placement, names, slots as usize)?;
        let plain = device.plain_buffer_type();
        let pooled: BTreeSet<u32> = streamed.layers.iter().map(|l| l.block).collect();
        let mut patterns: Vec<(String, ggml_backend_buffer_type_t)> = experts
            .layers()
            .iter()
            .map(|l| l.layer)
            .filter(|block| !pooled.contains(block))
            .map(|block| (format!(r"^blk\.{block}\.ffn_.*_exps\.weight$"), plain))
            .collect();
        if !pooled.is_empty() {
            let pattern = r"^blk\.[0-9]+\.ffn_(gate|up|down|gate_up)_exps\.weight$";
            patterns.push((pattern.to_owned(), device.buffer_type()));
        }
        let patterns: Vec<(CString, ggml_backend_buffer_type_t)> = patterns
            .into_iter()
            .map(|(p, buft)| (CString::new(p).expect("no NUL in a pattern"), buft))
            .collect();
        let mut overrides: Vec<_> = patterns
            .iter()
            .map(|(p, buft)| (p.as_ptr(), buft.cast()))
            .chain([(ptr::null(), ptr::null_mut())])
            .map(|(pattern, buft)| llama_model_tensor_buft_override { pattern, buft })
            .collect();
        let mut devices = [device.handle().cast(), ptr::null_mut()];
        // SAFETY: a plain struct of defaults.
        let mut params = unsafe { llama_model_default_params() };
        params.devices = devices.as_mut_ptr();
        params.n_gpu_layers = -1;
        params.tensor_buft_overrides = overrides.as_mut_ptr();
        params.load_mode = LLAMA_LOAD_MODE_DIRECT_IO;
        params.use_extra_bufts = false;
        params.no_alloc = rehearsal;
        let path = first_path(file);
        let types = types_of(&streamed.placement, false)?;
        let (llama, captured) = capture(file, types, || call_loader(file, params, progress))?;
        device.pooled().table().restore_names();
        let inner = Inner {
            llama,
            device: Some(device),
            gpu: streamed.placement.gpu().cloned(),
            read: Some(streamed.reader.status()),
            checksums: streamed.checksums.clone(),
            streamed: Some(streamed).filter(|s| rehearsal || !s.layers.is_empty()),
            resident,
            attaching: Mutex::new(()),
            path,
            mapped: OnceLock::new(),
            gds_read: OnceLock::new(),
            rehearsal,
        };
        Ok((Model { inner: Arc::new(inner) }, captured))
    }

    /// llama.cpp has loaded the files whose headers were read. Every expert tensor is with us,
    /// untouched; and of what is ours to read, llama.cpp has read nothing since this thread had read
    /// `before` bytes.
    fn check_load(
        &self,
        file: &tierstream_gguf::Model,
        captured: &Captured,
        before: Option<u64>,
    ) -> Result<()> {
        let read = before.zip(thread_read_bytes()).map(|(before, after)| after - before);
        check_identities(file)?;
        if let Some(device) = &self.inner.device {
            device.check_callbacks()?;
            if let Some(name) = device.pooled().table().missing().first() {
                return Err(Error::SelfCheck(format!("llama.cpp does not use the tensor {name}")));
            }
        }
        if let Some(what) = captured.faults.first() {
            return Err(Error::SelfCheck(what.clone()));
        }
        // A tensor may be there twice: embeddings that serve as the output's weights too.
        let names: BTreeSet<&str> = captured.unread.iter().map(|t| t.name.as_str()).collect();
        let ours: u64 = names.iter().filter_map(|name| file.tensor(name)).map(|t| t.len).sum();
        let layers = self.inner.streamed.as_ref().map_or(&[][..], |s| &s.layers);
        let parts = layers.iter().flat_map(|l| &l.parts).map(|part| part.name.as_str());
        let pooled: BTreeSet<&str> = parts.collect();
        let is_ours = |name: &str| names.contains(name) || pooled.contains(name);
        if self.inner.checksums.is_some()
            && let Some(tensor) = first_not_taken(file, is_ours)?
        {
            return Err(Error::NotVerified { path: first_path(file), tensor: Some(tensor) });
        }
        let rest = match file.originals() {
            Some(_) => {
                check_all_taken(file, is_ours)?;
                0
            }
            None => file.file_bytes().saturating_sub(self.expert_bytes() + ours),
        };
        let most = most_read_bytes(rest, file.header_bytes(), file.tensors().len());
        match read {
            Some(read) if read > most => Err(Error::SelfCheck(format!(
                "llama.cpp read {read} bytes while loading, of which {rest} are its to read"
            ))),
            _ => Ok(()),
        }
    }

    /// Something has been computed: weights that are mapped are copied to where they are read faster.
    pub(crate) fn copy_weights(&self) {
        self.inner.mapped.get().into_iter().flatten().for_each(Mapped::copy);
    }

    /// Looks whether the weights are still those that were loaded.
    pub(crate) fn check_weights(&self) -> Result<()> {
        let mapped = self.inner.mapped.get().map_or(&[][..], Vec::as_slice);
        Ok(mapped.iter().try_for_each(Mapped::check_intact)?)
    }

    /// Builds graphs once, with a small context, and returns the layers that cannot be streamed.
    fn probe(&self) -> Result<Vec<(usize, String)>> {
        let options = ContextOptions { n_ctx: 64, n_batch: 8, ..ContextOptions::default() };
        let context = Context::new(self.clone(), &options)?;
        drop(context);
        let device = self.inner.device.as_ref().expect("called for models on our device");
        device.check_callbacks()?;
        if !device.has_seen_graph() {
            return Err(Error::SelfCheck(
                "llama.cpp has made a context without showing a graph".into(),
            ));
        }
        Ok(device.foreign_users())
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
                    below.load_all(&streamed.files, &mut told)?;
                }
                Some(below)
            }
            _ => None,
        };
        let uploads = streamed.uploads.as_ref();
        let residency = Residency::new(spec(&streamed.layers, slots), uploads, below, reader())?;
        if whole && options.preload {
            residency.load_all(&streamed.files, &mut told)?;
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

fn first_path(file: &tierstream_gguf::Model) -> PathBuf {
    file.files()[0].path.clone()
}

#[cfg(test)]
mod tests;

//! Loading: llama.cpp allocates the weights, and we read them; or it does both, to compare with.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::path::PathBuf;
use std::ptr;
use std::sync::{Arc, Mutex, OnceLock};

use tierstream_io::{FileId, Reader};

use super::arriving::Arriving;
use super::layers::{block_bytes, names, pooled_layers};
use super::loader::{
    call_loader, check_all_taken, check_identities, first_not_taken, most_read_bytes, open,
    thread_read_bytes,
};
use super::{Inner, Model, Resident, Streamed, all_slots};
use crate::abi::*;
use crate::capture::{Captured, capture, types_of};
use crate::context::{Context, ContextOptions};
use crate::error::{Error, Result};
use crate::gds::Gds;
use crate::log;
use crate::placement::Placement;
use crate::precheck;
use crate::proxy::Device;
use crate::uploads::Uploads;
use crate::verified::Checksums;

/// Who reads the weights, and with which kernels they are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weights {
    /// Expert records through a pool; everything else is read at once, as the records are. The weights
    /// of a dense model on the CPU are repacked where its kernels have layouts of their own.
    Streamed,
    /// Everything read at once, experts too, to stay. Computed by the kernels of `Streamed`, to the same
    /// bits.
    Resident,
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

/// How llama.cpp loads a model by itself: as [`Weights::Stock`].
#[derive(Clone, Copy)]
struct Stock {
    mmap: bool,
    repack: bool,
    cpu_experts: bool,
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
                Self::load_ours(file, &experts, placement, source, all(&experts), progress)
            }
            Weights::Stock { .. } if source.checksums.is_some() => {
                Err(Error::NotVerified { path: first_path(file), tensor: None })
            }
            Weights::Stock { mmap, repack, cpu_experts } => {
                let how = Stock { mmap, repack, cpu_experts };
                Self::load_stock(file, how, placement, progress)
            }
            Weights::Resident => {
                Self::load_ours(file, &experts, placement, source, all(&experts), progress)
            }
            Weights::Streamed => {
                Self::load_ours(file, &experts, placement, source, Vec::new(), progress)
            }
        }
    }

    /// Loads with all weights read by us, and the experts of as many layers in the pool as can be; those in
    /// `resident` are known not to.
    pub(super) fn load_ours(
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
            cached: Mutex::default(),
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
            cached: Mutex::default(),
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
            cached: Mutex::default(),
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
}

fn first_path(file: &tierstream_gguf::Model) -> PathBuf {
    file.files()[0].path.clone()
}

/// For a model that is to be resident as a whole.
fn all(experts: &tierstream_gguf::Experts) -> Vec<Resident> {
    experts.layers().iter().map(|layer| (layer.layer, "all of the model is".to_owned())).collect()
}

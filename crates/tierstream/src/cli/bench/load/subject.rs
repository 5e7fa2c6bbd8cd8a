//! A model that is loaded: its files, and where its weights lie in them.

use std::path::{Path, PathBuf};

use tierstream::bench::load::Data;
use tierstream::drive::Scratch;
use tierstream::{Error, gguf, pack};
use tierstream_safetensors::Checkpoint;

use super::copy;
use super::method::Method;
use crate::cli::args::BenchLoad;
use crate::cli::named::Named;
use crate::cli::output;

/// What lies less apart than this is read with what lies between.
const NEAR_BYTES: u64 = 64 << 10;

/// A model that is loaded.
pub(super) struct Subject {
    pub(super) path: PathBuf,
    /// Who loads it.
    pub(super) methods: Vec<Method>,
    pub(super) is_safetensors: bool,
    /// Whether it is a packed model.
    pub(super) is_packed: bool,
    /// The parts of files that hold weights, in order.
    pub(super) data: Vec<Data>,
    /// The weights, without what lies between them.
    pub(super) bytes: u64,
    /// The weights of a GGUF once more, for who reads safetensors.
    pub(super) copy: Option<Scratch>,
}

/// Whether a model is a safetensors checkpoint, by its name.
pub(super) fn is_safetensors(path: &Path) -> bool {
    let is = |end: &str| path.extension().is_some_and(|found| found.eq_ignore_ascii_case(end));
    is("safetensors") || is("json") || path.is_dir()
}

impl Subject {
    /// Reads the headers. Says who cannot load it; if a package of Python is to load a GGUF, writes the
    /// copy that it needs.
    pub(super) fn open(model: &Path, args: &BenchLoad) -> anyhow::Result<Self> {
        let named = Named::find(model)?;
        let mut subject = Self::headers(&named.path)?;
        subject.methods = vec![Method::Raw, Method::Tierstream];
        for &peer in &args.against {
            let method = Method::Peer(peer);
            let (name, path) = (method.name(), subject.path.display());
            if subject.is_safetensors && method.package().is_none() {
                output::note(format!("{name} is llama.cpp's, which cannot load {path}: left out"));
            } else if subject.is_packed {
                output::note(format!("{name} cannot load {path}, which is packed: left out"));
            } else if !subject.methods.contains(&method) {
                subject.methods.push(method);
            }
        }
        if !subject.is_safetensors && subject.methods.iter().any(|m| m.package().is_some()) {
            let folder = args.temp.as_deref().unwrap_or(named.folder());
            subject.copy = Some(copy::write(&subject.path, folder)?);
        }
        Ok(subject)
    }

    /// What the headers of the model tell.
    pub(super) fn headers(path: &Path) -> anyhow::Result<Self> {
        let is_safetensors = is_safetensors(path);
        let is_packed = pack::is_packed(path);
        let (data, bytes) = if is_safetensors {
            let checkpoint = Checkpoint::open(path)?;
            let files = checkpoint.files().iter();
            let data = |path: &Path, offset, end| Data { path: path.into(), offset, end };
            let data = files.map(|f| data(&f.path, f.data_offset, f.len)).collect();
            (data, checkpoint.tensor_bytes())
        } else {
            let model = pack::open(path).map_err(Error::from)?;
            (weights(&model), model.tensor_bytes())
        };
        let (path, methods) = (path.into(), Vec::new());
        Ok(Self { path, methods, is_safetensors, is_packed, data, bytes, copy: None })
    }

    /// The files that are read.
    pub(super) fn files_for(&self, method: Method) -> Vec<PathBuf> {
        match &self.copy {
            Some(copy) if method.package().is_some() => vec![copy.path()],
            _ => {
                let mut files: Vec<_> = self.data.iter().map(|data| data.path.clone()).collect();
                files.dedup();
                files
            }
        }
    }
}

/// Where weights lie, those that a drive reads as one as one.
fn weights(model: &gguf::Model) -> Vec<Data> {
    let extents = model.tensors().iter().flat_map(|tensor| tensor.extents());
    let mut extents: Vec<_> = extents.map(|e| (e.file, e.offset, e.offset + e.len)).collect();
    extents.sort_unstable();
    let mut data: Vec<Data> = Vec::new();
    for (file, offset, end) in extents {
        let path = &model.files()[file].path;
        match data.last_mut() {
            Some(last) if last.path == *path && offset < last.end + NEAR_BYTES => {
                last.end = last.end.max(end);
            }
            _ => data.push(Data { path: path.clone(), offset, end }),
        }
    }
    data
}

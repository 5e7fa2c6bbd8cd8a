//! A model: one file, or the files of a split one, as a single list of tensors.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::Result;
use crate::error::{Error, ErrorKind};
use crate::header::{Header, KEY_ARCHITECTURE, KEY_SPLIT_COUNT, KEY_SPLIT_NO, KEY_SPLIT_TENSORS};
use crate::limits;
use crate::split;
use crate::tensor::{Tensor, index_by_name};
use crate::value::{Array, Metadata, Value};

/// One file of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileInfo {
    /// As it was opened.
    pub path: PathBuf,
    /// Bytes, when its header was read. A file whose length differs later has changed underneath.
    pub len: u64,
    /// Where its tensor data begins, in bytes.
    pub data_offset: u64,
    /// What its tensors are aligned to, in bytes.
    pub alignment: u64,
    /// Which file it was, of the very descriptor that the header was read from; `None` for headers
    /// that were not read from files ([`Model::from_parts`]).
    pub identity: Option<FileIdentity>,
}

/// Tells a file from others of its name, before and after. Its length is [`FileInfo::len`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileIdentity {
    /// Device number.
    pub device: u64,
    /// Inode number.
    pub inode: u64,
    /// When it was last written to: seconds and nanoseconds.
    pub modified: (i64, i64),
}

impl FileIdentity {
    /// Of what the system says about a file.
    #[cfg(unix)]
    pub fn of(file: &fs::Metadata) -> Option<Self> {
        use std::os::unix::fs::MetadataExt;
        let modified = (file.mtime(), file.mtime_nsec());
        Some(Self { device: file.dev(), inode: file.ino(), modified })
    }

    /// Of what the system says about a file; `None` where files have no such numbers.
    #[cfg(not(unix))]
    pub fn of(_: &fs::Metadata) -> Option<Self> {
        None
    }
}

/// A GGUF file whose header is kept apart from it, in a packed file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Original {
    /// Its name, when it was packed.
    pub name: PathBuf,
    /// Bytes of the file.
    pub len: u64,
    /// Its first bytes, up to the tensors' data.
    pub header: Arc<[u8]>,
}

/// Where a tensor's data lie that were moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Index into the files.
    pub file: usize,
    /// First byte, from the start of the file.
    pub offset: u64,
    /// As [`Tensor::stride`].
    pub stride: Option<u64>,
}

/// A model's files, metadata and tensors. Holds no file open.
///
/// What holds for every `Model`: all that holds for each [`Header`]; tensor names are unique over
/// all files; `general.architecture` is present; the sum of all tensors fits in a `u64`.
#[derive(Clone, Debug)]
pub struct Model {
    files: Vec<FileInfo>,
    metadata: Metadata,
    tensors: Vec<Tensor>,
    by_name: Vec<u32>,
    architecture: String,
    originals: Option<Arc<[Original]>>,
}

impl Model {
    /// Reads the model that begins in the file at `path`: the file itself, and if its metadata says
    /// that it is the first of a split model, all others beside it.
    ///
    /// # Errors
    ///
    /// Any [`ErrorKind`] but those of experts, with the path of the file concerned.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let (first, identity) = read_file(path)?;
        let mut identities = vec![identity];
        let count = split_count(path, &first)?;
        let mut parts = vec![(path.to_owned(), first)];
        for part in 2..=count {
            // Checked by `split_count`; a missing name here would be our mistake, not a panic.
            let sibling = split::sibling(path, 1, part, count)
                .ok_or_else(|| Error::from(ErrorKind::SplitFileName { count }).in_file(path))?;
            let (header, identity) = read_file(&sibling).map_err(|error| match error.kind() {
                ErrorKind::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                    Error::from(ErrorKind::MissingPart { part, count }).in_file(&sibling)
                }
                _ => error,
            })?;
            parts.push((sibling, header));
            identities.push(identity);
        }
        let mut model = Self::from_parts(parts)?;
        for (file, identity) in model.files.iter_mut().zip(identities) {
            file.identity = identity;
        }
        Ok(model)
    }

    /// Joins the headers of all files of a model, in order, as read from the given paths. The
    /// metadata is the first's.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::SplitMismatch`] if the parts do not belong together or are not all there,
    /// [`ErrorKind::NotFirstPart`], [`ErrorKind::Duplicate`] for a tensor in two files,
    /// [`ErrorKind::MissingKey`] if there is no `general.architecture` or, in a split model, no
    /// `split.tensors.count`, [`ErrorKind::Limit`].
    pub fn from_parts(parts: Vec<(PathBuf, Header)>) -> Result<Self> {
        check_parts(&parts)?;
        let mut files = Vec::with_capacity(parts.len());
        let mut tensors = Vec::new();
        let mut metadata = Metadata::new();
        for (index, (path, header)) in parts.into_iter().enumerate() {
            let (len, data_offset) = (header.file_len(), header.data_offset());
            let alignment = header.alignment();
            files.push(FileInfo { path, len, data_offset, alignment, identity: None });
            let (own_metadata, own_tensors) = header.into_metadata_and_tensors();
            if index == 0 {
                metadata = own_metadata;
            }
            tensors.extend(own_tensors.into_iter().map(|tensor| Tensor { file: index, ..tensor }));
        }
        let first = files.first().map(|file| file.path.clone()).unwrap_or_default();
        let architecture = match metadata.require(KEY_ARCHITECTURE) {
            Ok(Value::Str(name)) => name.clone(),
            // The header's check of known types leaves nothing but a string.
            Ok(_) | Err(_) => {
                return Err(Error::from(ErrorKind::MissingKey)
                    .in_key(KEY_ARCHITECTURE)
                    .in_file(&first));
            }
        };
        let by_name = index_by_name(&tensors).map_err(|second| {
            let Tensor { name, file, .. } = &tensors[second];
            Error::from(ErrorKind::Duplicate).in_tensor(name).in_file(&files[*file].path)
        })?;
        Ok(Self { files, metadata, tensors, by_name, architecture, originals: None })
    }

    /// The same model, with its data in `files`: each tensor's at its place. `originals` are the
    /// files whose headers this model was made of.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::GgmlRefuses`] for headers that llama.cpp would not read; [`ErrorKind::Misplaced`]
    /// for a place that does not lie in its file, one too few or too many, and shares of experts of a
    /// tensor that has none, or that overlap.
    pub fn relocated(
        mut self,
        files: Vec<FileInfo>,
        places: &[Place],
        originals: Vec<Original>,
    ) -> Result<Self> {
        self.check_ggml()?;
        let misplaced = |tensor: Option<&Tensor>| {
            let error = Error::from(ErrorKind::Misplaced);
            tensor.map_or(error, |tensor| Error::from(ErrorKind::Misplaced).in_tensor(&tensor.name))
        };
        if places.len() != self.tensors.len() || files.is_empty() {
            return Err(misplaced(None));
        }
        for (tensor, place) in self.tensors.iter_mut().zip(places) {
            let file = files.get(place.file);
            let fits = file.is_some_and(|file| fits(tensor, place, file.len));
            if !fits {
                return Err(misplaced(Some(tensor)));
            }
            let Place { file, offset, stride } = *place;
            (tensor.file, tensor.offset, tensor.stride) = (file, offset, stride);
        }
        (self.files, self.originals) = (files, Some(originals.into()));
        Ok(self)
    }

    /// Of a packed file: the GGUF files that it was made of, in order.
    pub fn originals(&self) -> Option<&[Original]> {
        self.originals.as_deref()
    }

    /// Bytes of all headers together.
    pub fn header_bytes(&self) -> u64 {
        match &self.originals {
            Some(originals) => originals.iter().map(|file| file.header.len() as u64).sum(),
            None => self.files.iter().map(|file| file.data_offset).sum(),
        }
    }

    /// The model's files, in order. [`Tensor::file`] and [`Extent::file`](crate::Extent::file) are
    /// indices into it.
    pub fn files(&self) -> &[FileInfo] {
        &self.files
    }

    /// The first file's metadata.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// All tensors: the first file's in the order of its table, then the second's, and so on.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// The alignment of the first file's tensors, in bytes.
    pub fn alignment(&self) -> u64 {
        self.files[0].alignment
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.tensor_index(name).map(|index| &self.tensors[index])
    }

    /// The place of the tensor of this name in [`tensors`](Self::tensors).
    pub fn tensor_index(&self, name: &str) -> Option<usize> {
        let found = self
            .by_name
            .binary_search_by(|index| self.tensors[*index as usize].name.as_str().cmp(name));
        found.ok().map(|found| self.by_name[found] as usize)
    }

    /// `general.architecture`, such as `qwen3moe`.
    pub fn architecture(&self) -> &str {
        &self.architecture
    }

    /// The value of `<architecture>.<suffix>`, a number below 2^32; `None` if the key is not there.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::WrongType`], [`ErrorKind::OutOfRange`].
    pub fn arch_u32(&self, suffix: &str) -> Result<Option<u32>> {
        self.metadata.u32(&self.arch_key(suffix)).map_err(|error| self.in_first_file(error))
    }

    /// `<architecture>.block_count`: the layers of the model, as the file counts them.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::WrongType`], [`ErrorKind::OutOfRange`].
    pub fn block_count(&self) -> Result<Option<u32>> {
        self.arch_u32("block_count")
    }

    /// `<architecture>.expert_count`: experts per layer.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::WrongType`], [`ErrorKind::OutOfRange`].
    pub fn expert_count(&self) -> Result<Option<u32>> {
        self.arch_u32("expert_count")
    }

    /// `<architecture>.expert_used_count` in layer `layer`: experts that a token uses there (k).
    /// The key holds one number for all layers or, in newer files, an array with one for each.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::WrongType`], [`ErrorKind::OutOfRange`].
    pub fn expert_used_count(&self, layer: u32) -> Result<Option<u32>> {
        let key = self.arch_key("expert_used_count");
        let Some(Value::Array(per_layer)) = self.metadata.get(&key) else {
            return self.arch_u32("expert_used_count");
        };
        let value = per_layer.integer(layer as usize).ok_or_else(|| ErrorKind::WrongType {
            expected: "an integer for each layer",
            found: per_layer.element_type(),
        });
        value
            .and_then(|value| {
                u32::try_from(value).map(Some).map_err(|_| ErrorKind::OutOfRange {
                    value,
                    allowed: format!("0..={}", u32::MAX),
                })
            })
            .map_err(|kind| self.in_first_file(Error::from(kind).in_key(&key)))
    }

    /// Bytes of all files together.
    pub fn file_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.len).sum()
    }

    /// Bytes of all tensors together, without padding.
    pub fn tensor_bytes(&self) -> u64 {
        self.tensors.iter().map(|tensor| tensor.len).sum()
    }

    /// Checks what ggml's reader demands beyond the GGUF specification (`gguf_init_from_reader` in
    /// `ggml/src/gguf.cpp`): no arrays in arrays, and the tensors of a file following each other in
    /// the order of its table, with no gap but the padding to the alignment.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::GgmlRefuses`].
    pub fn check_ggml(&self) -> Result<()> {
        for (key, value) in self.metadata.iter() {
            if matches!(value, Value::Array(Array::Nested(_))) {
                let error = Error::from(ErrorKind::GgmlRefuses("arrays in arrays")).in_key(key);
                return Err(self.in_first_file(error));
            }
        }
        if self.originals.is_some() {
            // Looked at before it was relocated.
            return Ok(());
        }
        let mut next: Vec<u64> = self.files.iter().map(|file| file.data_offset).collect();
        for tensor in &self.tensors {
            let file = &self.files[tensor.file];
            if tensor.offset != next[tensor.file] {
                let kind =
                    ErrorKind::GgmlRefuses("its data does not follow that of the tensor before it");
                return Err(Error::from(kind)
                    .at(tensor.offset)
                    .in_tensor(&tensor.name)
                    .in_file(&file.path));
            }
            // Files are shorter than 2^63 bytes, alignments at most 2^26.
            next[tensor.file] = tensor.end().next_multiple_of(file.alignment);
        }
        Ok(())
    }

    /// The metadata key `<architecture>.<suffix>`.
    pub fn arch_key(&self, suffix: &str) -> String {
        format!("{}.{suffix}", self.architecture)
    }

    pub(crate) fn in_first_file(&self, error: Error) -> Error {
        error.in_file(&self.files[0].path)
    }
}

/// Whether a tensor may lie at `place` of a file of `len` bytes.
fn fits(tensor: &Tensor, place: &Place, len: u64) -> bool {
    let Some(stride) = place.stride else {
        return place.offset.checked_add(tensor.len).is_some_and(|end| end <= len);
    };
    let experts = tensor.dims.last().copied().filter(|_| tensor.dims.len() == 3);
    let Some(experts) = experts.and_then(|experts| u32::try_from(experts).ok()) else {
        return false;
    };
    let experts = u64::from(experts);
    let end = (experts - 1).checked_mul(stride);
    let end =
        end.and_then(|last| last.checked_add(place.offset)?.checked_add(tensor.len / experts));
    tensor.len.is_multiple_of(experts)
        && stride >= tensor.len / experts
        && end.is_some_and(|end| end <= len)
}

fn read_file(path: &Path) -> Result<(Header, Option<FileIdentity>)> {
    let read = || {
        let io = |source| Error::io("open the file", source);
        // Before opening: opening a pipe would wait for a writer.
        let kind = fs::metadata(path).map_err(io)?;
        if kind.is_dir() {
            return Err(ErrorKind::Directory.into());
        }
        if !kind.is_file() {
            return Err(ErrorKind::NotRegular.into());
        }
        let file = File::open(path).map_err(io)?;
        // Before the header is read: what is written to the file from here on moves the time.
        let identity = FileIdentity::of(&file.metadata().map_err(io)?);
        Ok((Header::read(file)?, identity))
    };
    read().map_err(|error: Error| error.in_file(path))
}

/// The file's number among the parts, from 1, and their count; (1, 1) for a model in one file.
fn split_keys(path: &Path, header: &Header) -> Result<(u64, u64)> {
    let number = |key| header.metadata().u64(key).map_err(|error| error.in_file(path));
    Ok((number(KEY_SPLIT_NO)?.unwrap_or(0) + 1, number(KEY_SPLIT_COUNT)?.unwrap_or(1).max(1)))
}

/// How many files the model has whose supposed first one is `header` at `path`; at least 1.
fn split_count(path: &Path, header: &Header) -> Result<u64> {
    let (number, count) = split_keys(path, header)?;
    let refuse = |kind: ErrorKind| Err(Error::from(kind).in_file(path));
    if count > limits::MAX_SPLIT_FILES {
        let (what, limit) = ("the number of files of a split model", limits::MAX_SPLIT_FILES);
        return refuse(ErrorKind::Limit { what, value: count, limit });
    }
    if number != 1 {
        let first = split::sibling(path, number, 1, count);
        return refuse(ErrorKind::NotFirstPart { part: number, count, first });
    }
    if count > 1 && split::sibling(path, 1, 2, count).is_none() {
        return refuse(ErrorKind::SplitFileName { count });
    }
    Ok(count)
}

/// Every part must know its number and agree with the first on how many there are (as llama.cpp
/// checks in `llama_model_loader`).
fn check_parts(parts: &[(PathBuf, Header)]) -> Result<()> {
    let Some((first_path, first)) = parts.first() else {
        let (what, expected, found) = ("the number of files", 1, 0);
        return Err(ErrorKind::SplitMismatch { what, expected, found }.into());
    };
    let mismatch = |path: &Path, what, expected: u64, found: u64| {
        let kind = ErrorKind::SplitMismatch { what, expected, found };
        if expected == found { Ok(()) } else { Err(Error::from(kind).in_file(path)) }
    };
    let total = parts.len() as u64;
    let mut tensors: u64 = 0;
    let mut bytes: u64 = 0;
    for (index, (path, header)) in parts.iter().enumerate() {
        let part = index as u64 + 1;
        let (number, count) = split_keys(path, header)?;
        if index == 0 && number != 1 {
            let first = split::sibling(path, number, 1, count);
            return Err(
                Error::from(ErrorKind::NotFirstPart { part: number, count, first }).in_file(path)
            );
        }
        mismatch(path, "the number of files", total, count)?;
        mismatch(path, "the number of this part", part, number)?;
        tensors += header.tensors().len() as u64;
        bytes = bytes.checked_add(header.file_len()).ok_or_else(|| {
            let (what, limit) = ("the model's size in bytes", u64::MAX);
            Error::from(ErrorKind::Limit { what, value: u64::MAX, limit }).in_file(path)
        })?;
    }
    if tensors > limits::MAX_TENSORS {
        let (what, limit) = ("the number of tensors", limits::MAX_TENSORS);
        return Err(
            Error::from(ErrorKind::Limit { what, value: tensors, limit }).in_file(first_path)
        );
    }
    if total > 1 {
        let declared = first.metadata().u64(KEY_SPLIT_TENSORS).and_then(|declared| {
            declared.ok_or_else(|| Error::from(ErrorKind::MissingKey).in_key(KEY_SPLIT_TENSORS))
        });
        let declared = declared.map_err(|error| error.in_file(first_path))?;
        mismatch(first_path, "the number of tensors", declared, tensors)?;
    }
    Ok(())
}

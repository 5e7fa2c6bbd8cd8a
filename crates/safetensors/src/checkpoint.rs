//! A checkpoint: one file, or the shards that an index names, as a single list of tensors.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use tierstream_io::File;

use crate::error::{Error, ErrorKind};
use crate::header::Header;
use crate::index::Index;
use crate::tensor::{Tensor, index_by_name};
use crate::{Metadata, Result};

/// What a checkpoint of one file is called, and the index of one of several (Transformers,
/// `SAFE_WEIGHTS_NAME` and `SAFE_WEIGHTS_INDEX_NAME` in `utils/__init__.py`).
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The headers of a checkpoint, checked; none of its data.
///
/// What holds for every `Checkpoint`: what holds for each [`Header`], and tensor names are unique
/// over all files. Where there is an index, it and the files have the same tensors in the same
/// places.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    files: Vec<FileInfo>,
    tensors: Vec<Tensor>,
    by_name: Vec<u32>,
}

/// A file of a checkpoint.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct FileInfo {
    /// Where it is.
    pub path: PathBuf,
    /// Its length in bytes.
    pub len: u64,
    /// Its first byte of data, one past its header.
    pub data_offset: u64,
    /// What it says of itself.
    pub metadata: Metadata,
    identity: Identity,
}

/// Tells whether a path still leads to what a header was read from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Identity {
    device_inode: (u64, u64),
    modified: (i64, i64),
}

impl Identity {
    fn of(file: &File) -> Self {
        Self { device_inode: file.device_inode(), modified: file.modified() }
    }
}

impl FileInfo {
    /// Compares a file, opened by the same path, with what the header was read from.
    pub(crate) fn check_same(&self, file: &File) -> Result<()> {
        let what = if file.size() != self.len {
            format!("{} bytes when its header was read, {} now", self.len, file.size())
        } else if Identity::of(file) != self.identity {
            "it is not the file any more that its header was read from".to_owned()
        } else {
            return Ok(());
        };
        let path = self.path.as_path().into();
        Err(tierstream_io::Error::Changed { path, what: what.into() }.into())
    }
}

impl Checkpoint {
    /// Opens a `.safetensors` file, an index (a file whose name ends in `.json`), or a folder: its
    /// `model.safetensors`, else its `model.safetensors.index.json`, else the only index, else the
    /// only `.safetensors` file in it.
    ///
    /// Reads headers and index, through the page cache. Files may be links, as in the cache of
    /// Hugging Face.
    ///
    /// # Errors
    /// Any [`ErrorKind`] but those of loading. The error names the file, and the tensor where there
    /// is one.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        if fs::metadata(path).is_ok_and(|found| found.is_dir()) {
            return Self::open_file(&find(path)?);
        }
        Self::open_file(path)
    }

    fn open_file(path: &Path) -> Result<Self> {
        if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("json")) {
            return Self::open_sharded(path);
        }
        let (info, tensors) = open_one(path, 0)?;
        Self::new(vec![info], tensors)
    }

    fn open_sharded(path: &Path) -> Result<Self> {
        let file = open(path)?;
        let index = Index::read(file.handle()).map_err(|error| error.in_file(path))?;
        let folder = path.parent().unwrap_or(Path::new(""));
        let (mut files, mut tensors) = (Vec::new(), Vec::new());
        for (number, name) in index.files().iter().enumerate() {
            let shard = folder.join(name);
            let (info, found) = open_one(&shard, number).map_err(|error| {
                if is_missing(&error) {
                    let first = index.tensors().iter().find(|(_, file)| *file == number);
                    let tensor = first.map_or("", |(tensor, _)| tensor);
                    return Error::from(ErrorKind::MissingShard).in_file(&shard).in_tensor(tensor);
                }
                error
            })?;
            for tensor in &found {
                let told = index.file_of(&tensor.name);
                if told != Some(number) {
                    let in_file = told.map(|file| index.files()[file].clone());
                    let error = Error::from(ErrorKind::NotInIndex { in_file });
                    return Err(error.in_file(&shard).in_tensor(&tensor.name));
                }
            }
            files.push(info);
            // No more than the index has, which is bounded.
            tensors.extend(found);
        }
        let checkpoint = Self::new(files, tensors)?;
        for (name, number) in index.tensors() {
            if checkpoint.tensor(name).is_none() {
                let shard = &checkpoint.files[*number].path;
                return Err(Error::from(ErrorKind::NotInShard).in_file(shard).in_tensor(name));
            }
        }
        Ok(checkpoint)
    }

    /// `tensors` are in the order of `files`, and of their offsets in each.
    fn new(files: Vec<FileInfo>, tensors: Vec<Tensor>) -> Result<Self> {
        // Names are unique in a file, and in an index, which has each in one file. So this finds
        // none twice.
        let by_name = index_by_name(&tensors).map_err(|second| {
            let tensor = &tensors[second];
            let error = Error::from(ErrorKind::Duplicate).in_tensor(&tensor.name);
            error.in_file(&files[tensor.file].path)
        })?;
        Ok(Self { files, tensors, by_name })
    }

    /// Its files: one, or the shards in the order of their names.
    pub fn files(&self) -> &[FileInfo] {
        &self.files
    }

    /// All tensors, in the order of files and, within one, of their bytes.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.position(name).map(|at| &self.tensors[at])
    }

    /// Where a tensor is in [`Checkpoint::tensors`].
    pub(crate) fn position(&self, name: &str) -> Option<usize> {
        let named = |index: &u32| self.tensors[*index as usize].name.as_str();
        let found = self.by_name.binary_search_by(|index| named(index).cmp(name));
        found.ok().map(|at| self.by_name[at] as usize)
    }

    /// What the first file that has this key says under it: `metadata("format")` is `Some("pt")`
    /// where PyTorch wrote it.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.files.iter().find_map(|file| file.metadata.get(key)).map(String::as_str)
    }

    /// Bytes of all tensors.
    pub fn tensor_bytes(&self) -> u64 {
        self.tensors.iter().map(|tensor| tensor.len).sum()
    }
}

/// Opens a regular file; one that would block, as a FIFO, is an error.
fn open(path: &Path) -> Result<File> {
    Ok(File::open_buffered(path, "only its header is read")?)
}

fn open_one(path: &Path, number: usize) -> Result<(FileInfo, Vec<Tensor>)> {
    let file = open(path)?;
    let header = Header::read(file.handle()).map_err(|error| error.in_file(path))?;
    file.check_unchanged()?;
    let (len, data_offset) = (header.file_len(), header.data_offset());
    let (mut tensors, metadata) = header.into_parts();
    tensors.iter_mut().for_each(|tensor| tensor.file = number);
    let identity = Identity::of(&file);
    Ok((FileInfo { path: path.to_owned(), len, data_offset, metadata, identity }, tensors))
}

fn is_missing(error: &Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::Reader(tierstream_io::Error::Open { source, .. })
            if source.kind() == io::ErrorKind::NotFound
    )
}

/// The file of a folder that its checkpoint is opened by.
fn find(folder: &Path) -> Result<PathBuf> {
    for name in [SINGLE, INDEX] {
        let path = folder.join(name);
        if fs::symlink_metadata(&path).is_ok() {
            return Ok(path);
        }
    }
    let refused = |source| Error::io("read the folder", source).in_file(folder);
    let (mut indices, mut singles) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(folder).map_err(refused)? {
        let name = entry.map_err(refused)?.file_name();
        let bytes = name.as_encoded_bytes();
        if bytes.ends_with(b".safetensors.index.json") {
            indices.push(name);
        } else if bytes.ends_with(b".safetensors") {
            singles.push(name);
        }
    }
    let mut found = if indices.is_empty() { singles } else { indices };
    found.sort();
    match &found[..] {
        [] => Err(Error::from(ErrorKind::NoCheckpoint).in_file(folder)),
        [only] => Ok(folder.join(only)),
        several => {
            let found = several.iter().take(4).map(|name| format!("{name:?}")).collect();
            Err(Error::from(ErrorKind::Ambiguous { found }).in_file(folder))
        }
    }
}

//! What can be wrong with a checkpoint or a load, where, and what to do about it.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use crate::dtype::Dtype;
use crate::guess;

/// Why a checkpoint was refused or tensors were not loaded: the kind, and where known the file and
/// the tensor.
///
/// [`Display`](fmt::Display) gives one line for the user; where the operating system refused
/// something, its reason is the [`source`](std::error::Error::source). [`hint`](Self::hint) says
/// what to do next. Strings that come from a file are escaped, so that the line is safe to print on
/// a terminal.
#[derive(Debug)]
pub struct Error {
    // Boxed: results of small values stay small.
    inner: Box<Inner>,
}

#[derive(Debug)]
struct Inner {
    kind: ErrorKind,
    path: Option<PathBuf>,
    tensor: Option<String>,
}

/// What is wrong. Offsets and lengths are in bytes; those of a file count from its start, unless
/// they are said to be of its data.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The operating system refused something.
    #[error("cannot {op}")]
    Io {
        /// What was tried: "read the header", ...
        op: &'static str,
        /// What the operating system said.
        source: io::Error,
    },
    /// The reader could not open or read a file, or it changed on the way.
    #[error(transparent)]
    Reader(#[from] tierstream_io::Error),
    /// The folder has neither an index nor a safetensors file.
    #[error("there is no safetensors file in this folder")]
    NoCheckpoint,
    /// The folder has several, and none with the usual name.
    #[error("this folder holds several: {}", found.join(", "))]
    Ambiguous {
        /// Names of up to four of them, escaped.
        found: Vec<String>,
    },
    /// The file is shorter than the shortest header.
    #[error("the file has {file_len} bytes, too few for safetensors")]
    TooShort {
        /// Length of the file.
        file_len: u64,
    },
    /// The file is something else.
    #[error("not a safetensors file: {0}")]
    NotSafetensors(&'static str),
    /// The file ends inside the header.
    #[error("the file ends inside its header: that has {header_len} bytes, the file {file_len}")]
    HeaderPastEnd {
        /// What the file begins with.
        header_len: u64,
        /// Length of the file.
        file_len: u64,
    },
    /// A count or length beyond one of the [`limits`](crate::limits).
    #[error("{what} is {value}, more than the limit of {limit}")]
    Limit {
        /// What was counted.
        what: &'static str,
        /// What the file says, as far as it was read.
        value: u64,
        /// The highest accepted value.
        limit: u64,
    },
    /// The header or the index is not UTF-8.
    #[error("not valid UTF-8 (at byte {offset})")]
    NotUtf8 {
        /// First byte that is wrong.
        offset: u64,
    },
    /// The header or the index is not the JSON that the format wants.
    #[error("{message}")]
    Json {
        /// What the JSON reader says.
        message: String,
    },
    /// The same name twice.
    #[error("appears twice")]
    Duplicate,
    /// The same metadata key twice.
    #[error("the metadata key {key:?} appears twice")]
    DuplicateMetadata {
        /// The key.
        key: String,
    },
    /// A type that the format does not have.
    #[error("unknown type {name:?}")]
    UnknownDtype {
        /// As the header names it, or its beginning.
        name: String,
    },
    /// More elements or bytes than 64 bits can count.
    #[error("its shape {shape:?} is too large")]
    ShapeOverflow {
        /// The dimensions.
        shape: Vec<u64>,
    },
    /// Elements smaller than a byte that fill no whole number of bytes.
    #[error("{dtype} of shape {shape:?} is no whole number of bytes")]
    PartialByte {
        /// The type.
        dtype: Dtype,
        /// The dimensions.
        shape: Vec<u64>,
    },
    /// The end of the data lies before its beginning.
    #[error("its data ends at {end}, before it begins at {begin}")]
    Reversed {
        /// First byte, in the data.
        begin: u64,
        /// One past the last, in the data.
        end: u64,
    },
    /// Type and shape want another number of bytes than the tensor has.
    #[error("{dtype} of shape {shape:?} has {expected} bytes, its data {found}")]
    WrongBytes {
        /// The type.
        dtype: Dtype,
        /// The dimensions.
        shape: Vec<u64>,
        /// Bytes by type and shape.
        expected: u64,
        /// Bytes by the header's offsets.
        found: u64,
    },
    /// Two tensors share bytes, or one begins within another.
    #[error("its data overlaps that of {other:?}")]
    Overlap {
        /// The tensor that begins earlier.
        other: String,
    },
    /// Bytes that belong to no tensor lie in front of one.
    #[error("bytes {begin}..{end} of the data, in front of it, belong to no tensor")]
    Hole {
        /// First of these bytes, in the data.
        begin: u64,
        /// One past the last, in the data.
        end: u64,
    },
    /// A tensor's data lies beyond the end of the file.
    #[error("the file is truncated: the data needs bytes {offset}..{end}, the file has {file_len}")]
    PastEnd {
        /// First byte of the tensor.
        offset: u64,
        /// One past its last byte; 2^64-1 when 64 bits do not hold it.
        end: u64,
        /// Length of the file.
        file_len: u64,
    },
    /// Bytes that belong to no tensor lie behind all of them.
    #[error("the last tensor ends at byte {end}, the file has {file_len}")]
    Trailing {
        /// One past the last byte of the last tensor.
        end: u64,
        /// Length of the file.
        file_len: u64,
    },
    /// The index names a file that is not a plain name.
    #[error("the index says that it is in {name:?}, which is no name of a file beside the index")]
    ShardName {
        /// As the index has it, or its beginning.
        name: String,
    },
    /// A file that the index names is not there. The error's path is the missing file, its tensor
    /// one that should be in it.
    #[error("the file is missing; the index says that it is there, with this tensor in it")]
    MissingShard,
    /// The index says that a tensor is in a file, which lacks it.
    #[error("not in this file, although the index says so")]
    NotInShard,
    /// A file has a tensor that the index does not have there.
    #[error("{}", not_in_index(in_file))]
    NotInIndex {
        /// Where the index has it instead, if it has.
        in_file: Option<String>,
    },
    /// There is no tensor of this name.
    #[error("no such tensor")]
    UnknownTensor,
    /// The caller's buffer is not as long as the tensor.
    #[error("it has {expected} bytes, the buffer for it {found}")]
    BufferLen {
        /// Bytes of the tensor.
        expected: u64,
        /// Bytes of the buffer.
        found: u64,
    },
    /// The caller did not want any more.
    #[error("cancelled")]
    Cancelled,
}

fn not_in_index(in_file: &Option<String>) -> String {
    match in_file {
        Some(file) => format!("in this file, but the index says that it is in {file:?}"),
        None => "in this file, but not in the index".to_owned(),
    }
}

impl Error {
    /// What is wrong.
    pub fn kind(&self) -> &ErrorKind {
        &self.inner.kind
    }

    /// The file, or the folder, where it is about one.
    pub fn path(&self) -> Option<&Path> {
        self.inner.path.as_deref().or(match self.kind() {
            ErrorKind::Reader(error) => error.path(),
            _ => None,
        })
    }

    /// The tensor, where it is about one. Where a read failed that was for several, the first of
    /// them.
    pub fn tensor(&self) -> Option<&str> {
        self.inner.tensor.as_deref()
    }

    /// What the user can do about it, as one sentence without a full stop.
    pub fn hint(&self) -> Option<&'static str> {
        Some(match self.kind() {
            ErrorKind::NoCheckpoint => "name the folder that the checkpoint was downloaded to",
            ErrorKind::Ambiguous { .. } => "name one of the files",
            ErrorKind::NotSafetensors(what) => return guess::hint(what),
            ErrorKind::TooShort { .. }
            | ErrorKind::HeaderPastEnd { .. }
            | ErrorKind::PastEnd { .. } => {
                "the download is probably unfinished; fetch the file again"
            }
            ErrorKind::UnknownDtype { .. } => "the file may be newer than this program; update it",
            ErrorKind::MissingShard => "put all files of the checkpoint into the same folder",
            ErrorKind::NotInShard | ErrorKind::NotInIndex { .. } => {
                "index and files are not of one checkpoint; fetch them again"
            }
            _ => return None,
        })
    }

    pub(crate) fn io(op: &'static str, source: io::Error) -> Self {
        ErrorKind::Io { op, source }.into()
    }

    pub(crate) fn in_file(mut self, path: &Path) -> Self {
        // The reader's errors name it themselves.
        if self.path().is_none() {
            self.inner.path = Some(path.to_owned());
        }
        self
    }

    pub(crate) fn in_tensor(mut self, name: &str) -> Self {
        self.inner.tensor.get_or_insert_with(|| name.to_owned());
        self
    }
}

impl From<ErrorKind> for Error {
    fn from(kind: ErrorKind) -> Self {
        Self { inner: Box::new(Inner { kind, path: None, tensor: None }) }
    }
}

impl From<tierstream_io::Error> for Error {
    fn from(error: tierstream_io::Error) -> Self {
        ErrorKind::from(error).into()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(path) = &self.inner.path {
            write!(f, "{}: ", path.display())?;
        }
        if let Some(tensor) = self.tensor() {
            write!(f, "tensor {tensor:?}: ")?;
        }
        write!(f, "{}", self.kind())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        std::error::Error::source(self.kind())
    }
}

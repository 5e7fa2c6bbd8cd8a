//! What can be wrong with a file, where, and what to do about it.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use crate::format::Format;
use crate::value::ValueType;

/// Why a file was refused: the kind, and where known the file, the byte offset and the key or
/// tensor.
///
/// [`Display`](fmt::Display) gives one line for the user; where the operating system refused
/// something, its reason is the [`source`](std::error::Error::source). [`hint`](Self::hint) says what
/// to do next. Strings that come from the file are escaped, so that the line is safe to print on a
/// terminal.
#[derive(Debug)]
pub struct Error {
    // Boxed: results of small values stay small.
    inner: Box<Inner>,
}

#[derive(Debug)]
struct Inner {
    kind: ErrorKind,
    path: Option<PathBuf>,
    offset: Option<u64>,
    subject: Option<Subject>,
}

/// What an error is about, within the file.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Subject {
    /// The metadata pair with this key.
    Key(String),
    /// The tensor of this name.
    Tensor(String),
}

/// What is wrong. Byte counts and offsets are in bytes from the start of the file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The operating system refused to open, measure or read the file, or a writer to take the
    /// header.
    #[error("cannot {op}")]
    Io {
        /// What was tried: "open the file", "read the header", ...
        op: &'static str,
        /// What the operating system said.
        source: io::Error,
    },
    /// The path is a directory.
    #[error("is a directory, not a GGUF file")]
    Directory,
    /// The path is a device, a pipe or a socket.
    #[error("is not a regular file")]
    NotRegular,
    /// The file has no bytes.
    #[error("the file is empty")]
    Empty,
    /// The file does not begin with the GGUF magic.
    #[error("not a GGUF file: {0}")]
    NotGguf(Format),
    /// The file was written for a big-endian machine.
    #[error("big-endian GGUF files are not supported")]
    BigEndian,
    /// A version other than 2 and 3.
    #[error("GGUF version {0} is not supported (2 and 3 are)")]
    Version(u32),
    /// The file ends inside the header.
    #[error("the file ends inside its header: {what} needs {needs} bytes, {has} are left")]
    HeaderTruncated {
        /// The field that did not fit.
        what: &'static str,
        /// Bytes that the field takes, at least.
        needs: u64,
        /// Bytes left in the file.
        has: u64,
    },
    /// A count or length beyond one of the [`limits`](crate::limits).
    #[error("{what} is {value}, more than the limit of {limit}")]
    Limit {
        /// What was counted.
        what: &'static str,
        /// What the file says.
        value: u64,
        /// The highest accepted value.
        limit: u64,
    },
    /// A metadata key of no bytes.
    #[error("a metadata key is empty")]
    EmptyKey,
    /// Bytes that must be UTF-8 are not.
    #[error("{what} is not valid UTF-8")]
    NotUtf8 {
        /// Which string.
        what: &'static str,
    },
    /// A string with a NUL inside, which C code would cut short there.
    #[error("{what} contains a NUL byte")]
    InteriorNul {
        /// Which string.
        what: &'static str,
    },
    /// The same key or tensor name twice.
    #[error("appears twice")]
    Duplicate,
    /// A metadata value type that GGUF does not define.
    #[error("unknown metadata value type {id}")]
    UnknownValueType {
        /// The number in the file.
        id: u32,
    },
    /// A boolean that is neither 0 nor 1; invalid by the GGUF specification.
    #[error("a boolean has the value {value}, not 0 or 1")]
    InvalidBool {
        /// The byte in the file.
        value: u8,
    },
    /// A key that must be there is not.
    #[error("the key is missing")]
    MissingKey,
    /// A key holds a value of another type than it must.
    #[error("must be {expected}, is {found}")]
    WrongType {
        /// What the key must hold.
        expected: &'static str,
        /// What it holds.
        found: ValueType,
    },
    /// A key holds a value outside what is possible.
    #[error("is {value}, must be {allowed}")]
    OutOfRange {
        /// What the file says.
        value: i128,
        /// What would be accepted.
        allowed: String,
    },
    /// `general.alignment` is no power of two.
    #[error("the alignment {value} is not a power of two")]
    InvalidAlignment {
        /// What the file says, in bytes.
        value: u32,
    },
    /// A tensor type that ggml once had and removed.
    #[error("tensor type {name} (number {id}) was removed from ggml")]
    RemovedTensorType {
        /// Its `ggml_type` number.
        id: u32,
        /// Its name.
        name: &'static str,
    },
    /// A tensor type number that ggml 0.26 does not know.
    #[error("unknown tensor type number {id}")]
    UnknownTensorType {
        /// The number in the file.
        id: u32,
    },
    /// A dimension of a tensor is zero.
    #[error("dimension {dim} is zero")]
    ZeroDimension {
        /// Which dimension, from 0.
        dim: usize,
    },
    /// The elements or bytes of a tensor do not fit in 63 bits.
    #[error("the shape {dims:?} is too large")]
    ShapeOverflow {
        /// The dimensions, innermost first.
        dims: Vec<u64>,
    },
    /// A row is not a whole number of blocks.
    #[error(
        "a row of {ne0} elements is not a multiple of the {block_elems} elements in a {ty} block"
    )]
    PartialBlock {
        /// Elements in a row.
        ne0: u64,
        /// Elements in a block.
        block_elems: u64,
        /// The tensor's type.
        ty: &'static str,
    },
    /// A tensor's data does not begin at a multiple of the alignment.
    #[error("its data offset {offset} is not a multiple of the alignment {alignment}")]
    Misaligned {
        /// As the file gives it: relative to the start of the data.
        offset: u64,
        /// Bytes.
        alignment: u64,
    },
    /// Two tensors share bytes.
    #[error("its data overlaps that of tensor {other:?}")]
    Overlap {
        /// The tensor that begins earlier.
        other: String,
    },
    /// A tensor's data lies beyond the end of the file.
    #[error("the file is truncated: the data needs bytes {offset}..{end}, the file has {file_len}")]
    TensorPastEnd {
        /// First byte of the data.
        offset: u64,
        /// One past its last byte.
        end: u64,
        /// Length of the file.
        file_len: u64,
    },
    /// A later part of a split model was opened.
    #[error("is part {part} of a model split into {count} files")]
    NotFirstPart {
        /// From 1.
        part: u64,
        /// Files in the model.
        count: u64,
        /// Where the first part should be, if the file name tells.
        first: Option<PathBuf>,
    },
    /// A file of a split model is not there. The error's path is the missing file.
    #[error("part {part} of {count} of the split model is missing")]
    MissingPart {
        /// From 1.
        part: u64,
        /// Files in the model.
        count: u64,
    },
    /// The first file of a split model has a name from which the other names do not follow.
    #[error(
        "the model is split into {count} files, but the file name does not end in \
         \"-00001-of-{count:05}.gguf\""
    )]
    SplitFileName {
        /// Files in the model.
        count: u64,
    },
    /// The files of a split model contradict each other.
    #[error("the parts of the split model do not agree: {what} is {found}, expected {expected}")]
    SplitMismatch {
        /// Which figure.
        what: &'static str,
        /// What it should be.
        expected: u64,
        /// What it is.
        found: u64,
    },
    /// A tensor with the name of an expert tensor does not have the shape of one.
    #[error("not the shape of an expert tensor: {dims:?}, expected {expected}")]
    ExpertShape {
        /// The dimensions, innermost first.
        dims: Vec<u64>,
        /// What was expected.
        expected: &'static str,
    },
    /// Tensors of one layer hold different numbers of experts.
    #[error("has {found} experts, other tensors of its layer have {expected}")]
    ExpertCount {
        /// Of the layer's first tensor.
        expected: u64,
        /// Of this one.
        found: u64,
    },
    /// Biases or scales of experts whose weights are not in the file.
    #[error("belongs to experts whose weights are missing")]
    ExpertWeightsMissing,
    /// Data cannot lie where they are said to have been moved.
    #[error("its data do not fit the place that they were moved to")]
    Misplaced,
    /// The file is good GGUF, but ggml's own reader refuses it.
    #[error("llama.cpp cannot read this file: {0}")]
    GgmlRefuses(&'static str),
}

impl Error {
    /// What is wrong.
    pub fn kind(&self) -> &ErrorKind {
        &self.inner.kind
    }

    /// The file, where it has a name.
    pub fn path(&self) -> Option<&Path> {
        self.inner.path.as_deref()
    }

    /// The byte of the file at which the wrong field begins, where there is one.
    pub fn offset(&self) -> Option<u64> {
        self.inner.offset
    }

    /// The metadata key or the tensor concerned, where there is one.
    pub fn subject(&self) -> Option<&Subject> {
        self.inner.subject.as_ref()
    }

    /// What the user can do about it, as one sentence without a full stop.
    pub fn hint(&self) -> Option<String> {
        let hint = match self.kind() {
            ErrorKind::NotGguf(format) => format.hint()?,
            ErrorKind::Directory => "name a .gguf file inside it",
            ErrorKind::Empty
            | ErrorKind::HeaderTruncated { .. }
            | ErrorKind::TensorPastEnd { .. } => {
                "the download is probably unfinished; fetch the file again"
            }
            ErrorKind::Version(1) => {
                "convert the model again; llama.cpp no longer reads version 1 either"
            }
            ErrorKind::Version(_) | ErrorKind::UnknownTensorType { .. } => {
                "the file may be newer than this program; update it"
            }
            ErrorKind::BigEndian => "llama.cpp's gguf_convert_endian.py makes a little-endian copy",
            ErrorKind::RemovedTensorType { .. } => {
                "use a Q4_0 or IQ4_NL version of the model; it is repacked for the CPU when loaded"
            }
            ErrorKind::NotFirstPart { first: Some(first), .. } => {
                return Some(format!("open {} instead", first.display()));
            }
            ErrorKind::NotFirstPart { first: None, .. } => "open the first part instead",
            ErrorKind::MissingPart { count, .. } => {
                return Some(format!("put all {count} parts into the same folder"));
            }
            ErrorKind::SplitFileName { .. } => "give all parts back their original names",
            _ => return None,
        };
        Some(hint.to_owned())
    }

    pub(crate) fn io(op: &'static str, source: io::Error) -> Self {
        ErrorKind::Io { op, source }.into()
    }

    pub(crate) fn at(mut self, offset: u64) -> Self {
        self.inner.offset.get_or_insert(offset);
        self
    }

    pub(crate) fn in_file(mut self, path: &Path) -> Self {
        self.inner.path.get_or_insert_with(|| path.to_owned());
        self
    }

    pub(crate) fn in_key(mut self, key: &str) -> Self {
        self.inner.subject.get_or_insert_with(|| Subject::Key(key.to_owned()));
        self
    }

    pub(crate) fn in_tensor(mut self, name: &str) -> Self {
        self.inner.subject.get_or_insert_with(|| Subject::Tensor(name.to_owned()));
        self
    }
}

impl From<ErrorKind> for Error {
    fn from(kind: ErrorKind) -> Self {
        Self { inner: Box::new(Inner { kind, path: None, offset: None, subject: None }) }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(path) = self.path() {
            write!(f, "{}: ", path.display())?;
        }
        match self.subject() {
            Some(Subject::Key(key)) => write!(f, "metadata key {key:?}: ")?,
            Some(Subject::Tensor(name)) => write!(f, "tensor {name:?}: ")?,
            None => {}
        }
        write!(f, "{}", self.kind())?;
        match self.offset() {
            Some(offset) => write!(f, " (at byte {offset})"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        std::error::Error::source(self.kind())
    }
}

//! What can go wrong, with the file and the place in it.

use std::any::Any;
use std::io;
use std::path::Path;
use std::sync::Arc;

use crate::file::FileId;

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failed open, read or set-up. Cheap to clone: several pieces may fail through one read.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file could not be opened, or is not a regular file.
    #[error("cannot open {}", path.display())]
    Open {
        /// The path as it was given.
        path: Arc<Path>,
        /// What the system said.
        source: Arc<io::Error>,
    },
    /// The drive, the file system or the kernel refused a read.
    #[error("cannot read {len} bytes at offset {offset} of {}", path.display())]
    Read {
        /// The file.
        path: Arc<Path>,
        /// Where the failed read began, in bytes from the start of the file.
        offset: u64,
        /// How long the failed read was, in bytes.
        len: u64,
        /// What the system said.
        source: Arc<io::Error>,
    },
    /// The file ends before the wanted bytes do.
    #[error("{} is too short: {wanted} bytes wanted at offset {offset}, {got} there", path.display())]
    Truncated {
        /// The file.
        path: Arc<Path>,
        /// First wanted byte, from the start of the file.
        offset: u64,
        /// Bytes wanted from `offset` on.
        wanted: u64,
        /// Bytes that the file has from `offset` on.
        got: u64,
    },
    /// The file is no longer what it was when it was opened.
    #[error("{} changed while it was open: {what}", path.display())]
    Changed {
        /// The file.
        path: Arc<Path>,
        /// What differs, in words.
        what: Arc<str>,
    },
    /// An extent whose end does not fit into 64 bits.
    #[error("extent of {len} bytes at offset {offset} overflows (file {file})")]
    Overflow {
        /// The file.
        file: FileId,
        /// Start of the extent.
        offset: u64,
        /// Length of the extent.
        len: u64,
    },
    /// A [`FileId`] that this reader did not give out.
    #[error("this reader has no file {0}")]
    UnknownFile(FileId),
    /// The ticket was cancelled before the piece had arrived.
    #[error("cancelled")]
    Cancelled,
    /// The reader was dropped, or its thread died, before the piece had arrived.
    #[error("the reader is closed")]
    Closed,
    /// The sink panicked while it took a chunk of the piece.
    #[error("the sink panicked: {message}")]
    SinkPanicked {
        /// The panic's message.
        message: Arc<str>,
    },
    /// The engine panicked, and the reader died of it. Later requests fail with
    /// [`Error::Closed`].
    #[error("the I/O engine panicked: {message}")]
    EnginePanicked {
        /// The panic's message.
        message: Arc<str>,
    },
    /// A blocking call on the reader's own thread, which would wait for itself.
    #[error("blocking read from inside a sink")]
    InsideSink,
    /// A configuration that cannot work.
    #[error("bad I/O configuration: {0}")]
    Config(Arc<str>),
    /// An engine could not be started.
    #[error("cannot start the {engine} engine")]
    Engine {
        /// Name of the engine.
        engine: &'static str,
        /// What the system said.
        source: Arc<io::Error>,
    },
    /// Memory to read into could not be had.
    #[error("cannot map {bytes} bytes to read into")]
    Memory {
        /// Size asked for.
        bytes: usize,
        /// What the system said.
        source: Arc<io::Error>,
    },
    /// The ring's memory could not be had.
    #[error("cannot map {bytes} bytes for the ring")]
    Ring {
        /// Size asked for.
        bytes: usize,
        /// What the system said.
        source: Arc<io::Error>,
    },
}

impl Error {
    /// The file that the error is about, if it is about one.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Open { path, .. }
            | Self::Read { path, .. }
            | Self::Truncated { path, .. }
            | Self::Changed { path, .. } => Some(path),
            _ => None,
        }
    }

    pub(crate) fn config(message: impl Into<String>) -> Self {
        Self::Config(message.into().into())
    }
}

/// What a panic said.
pub(crate) fn panic_message(panic: &(dyn Any + Send)) -> Arc<str> {
    let text = panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("no message").into()
}

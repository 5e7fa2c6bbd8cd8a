//! What can be wrong with a packed file, or with making one.

use std::io;
use std::path::{Path, PathBuf};

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a packed file cannot be read or made. Offsets are in bytes from the start of the file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Of a GGUF, or of the headers in a packed file.
    #[error(transparent)]
    Gguf(#[from] tierstream_gguf::Error),
    /// Reading a file that is packed.
    #[error(transparent)]
    Source(#[from] tierstream_io::Error),
    /// The operating system refused something.
    #[error("{}: cannot {doing}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// A packed file of another version.
    #[error("{}: packed files of version {version} are not supported ({} is)", path.display(), crate::VERSION)]
    Version {
        /// The file.
        path: PathBuf,
        /// What it says.
        version: u32,
    },
    /// A packed file with features that are not known.
    #[error("{}: the packed file has unknown flags ({flags:#x})", path.display())]
    Flags {
        /// The file.
        path: PathBuf,
        /// Those that are not known.
        flags: u32,
    },
    /// A packed file that breaks its format.
    #[error("{}: the packed file is damaged: {what} (at byte {offset})", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// In what way.
        what: String,
        /// Where the section or block begins that says so.
        offset: u64,
    },
    /// A packed file that is not as long as it says.
    #[error("{}: the packed file has {len} bytes, not the {expected} that it was made with", path.display())]
    Length {
        /// The file.
        path: PathBuf,
        /// Bytes that it has.
        len: u64,
        /// Bytes that it says it has.
        expected: u64,
    },
    /// Bytes of a packed file are not those that were written.
    #[error("{}: {what} does not have its checksum (at byte {offset})", path.display())]
    Checksum {
        /// The file.
        path: PathBuf,
        /// Which record or tensor.
        what: String,
        /// Where it begins.
        offset: u64,
    },
    /// A file that an experts-only pack takes the other weights from is not the one it was made of.
    #[error("{}: the pack needs {}, which {what}", path.display(), file.display())]
    Original {
        /// The packed file.
        path: PathBuf,
        /// The file it needs.
        file: PathBuf,
        /// What is wrong with that one.
        what: String,
    },
    /// A model that is packed already.
    #[error("{}: is packed already", path.display())]
    IsPacked {
        /// The file.
        path: PathBuf,
    },
    /// A dense model has no experts to pack alone.
    #[error("{}: the model has no experts, so there is nothing to pack of them alone", path.display())]
    NoExperts {
        /// The model.
        path: PathBuf,
    },
    /// There is a file of the target's name.
    #[error("{}: the file exists", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// Somebody else is making the same file.
    #[error("{}: another process is writing it", path.display())]
    Busy {
        /// The unfinished file.
        path: PathBuf,
    },
    /// The drive has too little room.
    #[error(
        "{}: {needed} bytes are needed there and {free} are free: {} too few", 
        path.display(), needed.saturating_sub(*free)
    )]
    NoRoom {
        /// The folder.
        path: PathBuf,
        /// Bytes that are yet to be written.
        needed: u64,
        /// Bytes that are free.
        free: u64,
    },
    /// The caller asked to stop. What was written is taken up by the next attempt.
    #[error("stopped before the packed file was complete")]
    Cancelled,
}

impl Error {
    /// What the user can do about it, as one sentence without a full stop.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Error::Gguf(error) => return error.hint(),
            Error::Version { .. } | Error::Flags { .. } => {
                "the file may be newer than this program; update it, or pack the model again"
            }
            Error::Damaged { .. } | Error::Length { .. } | Error::Checksum { .. } => {
                "pack the model again, or fetch the file again; the drive may be failing"
            }
            Error::Original { .. } => {
                "a pack of experts alone needs the files that it was made of, as they were and where \
                 they were beside it; pack the model again"
            }
            Error::IsPacked { .. } => "name the GGUF that it was made of",
            Error::NoExperts { .. } => "without --experts-only its tensors are packed",
            Error::Exists { .. } => "remove it, or give the packed file another name with -o",
            Error::NoRoom { .. } => {
                "free some, or name another drive with -o; --experts-only takes less"
            }
            Error::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                "free some room and pack again: it goes on where it stopped"
            }
            Error::Io { source, .. }
                if matches!(
                    source.kind(),
                    io::ErrorKind::PermissionDenied
                        | io::ErrorKind::NotFound
                        | io::ErrorKind::ReadOnlyFilesystem
                ) =>
            {
                "the packed file is made beside what it is named; name a folder that you may write to with -o"
            }
            Error::Busy { .. } => "wait for it, or give the packed file another name with -o",
            Error::Source(tierstream_io::Error::Changed { .. }) => {
                "pack it again when nobody writes to it any more"
            }
            Error::Cancelled => "pack it again: it goes on where it stopped",
            _ => return None,
        };
        Some(hint.to_owned())
    }

    /// For `map_err`.
    pub(crate) fn io<'a>(
        path: &'a Path,
        doing: &'static str,
    ) -> impl Fn(io::Error) -> Error + use<'a> {
        move |source| Error::Io { path: path.to_owned(), doing, source }
    }
}

//! Why a pull failed, and what to do about it.

use std::io;
use std::path::{Path, PathBuf};

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a model could not be fetched.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A name, a repository without such a file, or a cache that cannot be read.
    #[error(transparent)]
    Store(#[from] tierstream_store::Error),
    /// There is no home, and no variable that says where the cache is.
    #[error("there is no folder for the Hugging Face cache")]
    NoCache,
    /// The address of the hub is none.
    #[error("HF_ENDPOINT is {0:?}, which is no address of a server")]
    Endpoint(String),
    /// The token cannot be sent.
    #[error("the token for the hub has characters that no token has")]
    Token,
    /// Nothing may be fetched.
    #[error("{0} is not in the Hugging Face cache, and HF_HUB_OFFLINE forbids to fetch it")]
    Offline(String),
    /// The hub has no such repository, or does not say so to this user.
    #[error("the hub has no repository {0}, or it is a private one")]
    NoRepository(String),
    /// The repository's owner wants to be asked.
    #[error("the repository {0} is open only to those who have agreed to its terms")]
    Gated(String),
    /// The token is not right.
    #[error("the hub refuses the token: {0}")]
    Refused(String),
    /// The hub could not be reached, or the connection was cut again and again.
    #[error("{host}: {what}")]
    Unreachable {
        /// The host.
        host: String,
        /// The last failure.
        what: String,
    },
    /// An answer that is none.
    #[error("{host} answered {what}")]
    Answer {
        /// The host.
        host: String,
        /// What is wrong with it.
        what: String,
    },
    /// What was fetched is not what the hub has.
    #[error("{path}: its SHA-256 is {found} and should be {expected}; what was fetched is deleted")]
    Hash {
        /// The file's name below the repository.
        path: String,
        /// The SHA-256 of what came.
        found: String,
        /// That of the hub.
        expected: String,
    },
    /// The drive has not enough room.
    #[error("{}: there is room for {free_bytes} bytes, and {needed_bytes} are to be fetched", path.display())]
    NoSpace {
        /// The repository in the cache.
        path: PathBuf,
        /// Bytes that are to be fetched yet.
        needed_bytes: u64,
        /// Bytes that there is room for.
        free_bytes: u64,
    },
    /// A file of the cache cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It was asked to stop. What has come stays.
    #[error("stopped")]
    Cancelled,
}

impl Error {
    /// What the user can do about it, as one sentence without a full stop.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Error::Store(error) => return error.hint(),
            Error::NoCache => "set HF_HUB_CACHE to a folder",
            Error::Endpoint(_) => "it is like https://host, or http://localhost:8080",
            Error::Token => "check HF_TOKEN, or log in again",
            Error::Offline(_) => "`tierstream list` tells what is there",
            Error::NoRepository(_) => {
                "check the name; for a private one, set HF_TOKEN to a token that may read it"
            }
            Error::Gated(_) => {
                "agree to them on its page, and set HF_TOKEN to a token of the same user"
            }
            Error::Refused(_) => "set HF_TOKEN to one that is valid, or to none",
            Error::Unreachable { .. } => {
                "check the network; what has come stays, and the same command goes on from there"
            }
            Error::Hash { .. } => {
                "try again; if it happens again, a proxy may change what it sends"
            }
            Error::NoSpace { .. } => "make room, or set HF_HUB_CACHE to a folder on another drive",
            Error::Io { source, .. } if is_full(source) => {
                "make room; what has come stays, and the same command goes on from there"
            }
            Error::Cancelled => "what has come stays, and the same command goes on from there",
            Error::Answer { .. } | Error::Io { .. } => return None,
        };
        Some(hint.to_owned())
    }

    pub(crate) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Error::Io { path, source }
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

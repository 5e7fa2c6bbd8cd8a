//! What can go wrong.

use std::path::PathBuf;

/// Why no model was written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The shape that was asked for is none that llama.cpp would load.
    #[error("{field} = {value}: {why}")]
    Spec {
        /// The field of [`Spec`](crate::Spec).
        field: &'static str,
        /// Its value.
        value: u64,
        /// What it would have to be.
        why: String,
    },
    /// A file could not be created or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

/// The result of this crate's functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

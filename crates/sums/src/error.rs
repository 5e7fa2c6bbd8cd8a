//! Why there are no checksums to compare with.

use std::io;
use std::path::PathBuf;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why the checksums of a model cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Of a GGUF.
    #[error(transparent)]
    Gguf(#[from] tierstream_gguf::Error),
    /// Reading the model.
    #[error(transparent)]
    Source(#[from] tierstream_io::Error),
    /// A record of checksums that is not as it was written.
    #[error("{}: the record of checksums is damaged: {what}", path.display())]
    Damaged {
        /// The record.
        path: PathBuf,
        /// In what way.
        what: &'static str,
    },
    /// A record of checksums of another version.
    #[error(
        "{}: records of checksums of version {version} are not supported ({} is)",
        path.display(), crate::record::VERSION
    )]
    Version {
        /// The record.
        path: PathBuf,
        /// What it says.
        version: String,
    },
    /// A record that is there and cannot be read.
    #[error("{}: cannot read the record of checksums", path.display())]
    Unreadable {
        /// The record, or its folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The header of a file cannot be read again.
    #[error("{}: cannot read the header", path.display())]
    HeaderUnreadable {
        /// The model file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A header that has changed, though nobody has written to the file.
    #[error(
        "{}: the header (bytes 0 to {end}) is not the one that was recorded on {recorded}, though \
         nobody has written to the file since",
        path.display()
    )]
    Header {
        /// The model file.
        path: PathBuf,
        /// Where its header ends.
        end: u64,
        /// When it was recorded.
        recorded: String,
        /// The record.
        record: PathBuf,
    },
    /// A blob that is not what its name says.
    #[error(
        "{}: the file does not have the SHA-256 that its name says (bytes 0 to {len}): it is {found}",
        path.display()
    )]
    Sha256 {
        /// The file.
        path: PathBuf,
        /// Its length.
        len: u64,
        /// What it has.
        found: String,
    },
    /// The caller asked to stop.
    #[error("stopped before the weights' checksums were computed")]
    Cancelled,
}

impl Error {
    /// What the user can do about it, as one sentence without a full stop.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Error::Gguf(error) => return error.hint(),
            Error::Damaged { path, .. } => format!(
                "no weights can be compared with it; remove {} and they are recorded anew, as they \
                 are now",
                path.display()
            ),
            Error::Version { path, .. } => format!(
                "it may be a newer program's; update this one, or remove {} and the checksums are \
                 recorded anew, of the weights as they are now",
                path.display()
            ),
            Error::Unreadable { path, .. } => {
                format!("give yourself the right to read {}", path.display())
            }
            Error::Header { record, .. } => format!(
                "the drive may be failing: fetch the file again; if it is as it should be, remove {}",
                record.display()
            ),
            Error::Sha256 { .. } => {
                "the file is damaged, or was not fetched as a whole: `ollama pull` its model again"
                    .to_owned()
            }
            Error::Cancelled => "the next load reads them again".to_owned(),
            _ => return None,
        })
    }
}

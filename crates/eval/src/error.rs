//! What can be wrong with a trace.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// Where in a file something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Line of a text file, from 1.
    Line(u64),
    /// Row of a Parquet file, from 0.
    Row(u64),
    /// Token of a trace, from 0.
    Token(u64),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Line(n) => write!(f, "line {n}"),
            Self::Row(n) => write!(f, "row {n}"),
            Self::Token(n) => write!(f, "token {n}"),
        }
    }
}

/// Results of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a trace could not be read, written or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read or written.
    #[error("cannot {what} {}: {source}", path.display())]
    File {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Of something that is no file.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// What is in a file is no trace, or a damaged one.
    #[error("{}{reason}", place.map(|p| format!("{p}: ")).unwrap_or_default())]
    Damaged {
        /// Where, if that is known.
        place: Option<Place>,
        /// What is wrong there.
        reason: String,
    },
    /// Something is beyond one of the [`limits`](crate::limits).
    #[error("{what}: {found}, at most {max} can be read")]
    Limit {
        /// What there is too much of.
        what: &'static str,
        /// How much.
        found: u64,
        /// The limit.
        max: u64,
    },
    /// A file in none of the formats that are known, or in one that holds no routing.
    #[error("{reason}")]
    Format {
        /// What it looks like.
        reason: String,
        /// What to do about it.
        hint: &'static str,
    },
    /// One of these, with the file that it is about.
    #[error("{}: {source}", path.display())]
    In {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: Box<Error>,
    },
}

impl Error {
    pub(crate) fn damaged(place: Place, reason: impl fmt::Display) -> Self {
        Self::Damaged { place: Some(place), reason: printable(&reason.to_string()) }
    }

    pub(crate) fn file(reason: impl fmt::Display) -> Self {
        Self::Damaged { place: None, reason: printable(&reason.to_string()) }
    }

    pub(crate) fn limit(what: &'static str, found: u64, max: u64) -> Result<()> {
        if found > max { Err(Self::Limit { what, found, max }) } else { Ok(()) }
    }

    /// With the place, where none is known yet.
    pub(crate) fn at(self, at: Place) -> Self {
        match self {
            Self::Damaged { place: None, reason } => Self::Damaged { place: Some(at), reason },
            other => other,
        }
    }

    /// With the file that it is about.
    pub(crate) fn of(self, path: &Path) -> Self {
        match self {
            Self::File { .. } | Self::In { .. } => self,
            source => Self::In { path: path.to_owned(), source: Box::new(source) },
        }
    }

    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Format { hint, .. } => Some(hint),
            Self::In { source, .. } => source.hint(),
            _ => None,
        }
    }
}

/// Messages are made from a file's own text, which a terminal may get.
fn printable(text: &str) -> String {
    let shown: String =
        text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).take(400).collect();
    shown
}

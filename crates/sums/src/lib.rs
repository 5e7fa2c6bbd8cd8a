//! Checksums of a model's weights: computed once, recorded, and found again when the model is loaded
//! the next time, so that what a drive has damaged meanwhile is not computed with.
//!
//! A checksum is XXH3, 64 bits, seed 0, as in packed files; BENCHMARKS.md tells why. There is one for
//! each tensor, and one for each expert's share of a tensor whose experts are streamed, since those
//! are read one by one. Bytes between tensors have none: nobody computes with them.
//!
//! [`reference()`] finds what a model was recorded with, or reads all of it once and records that. What
//! is read later is compared by who reads it, [`Sum`] by [`Sum`].

#![forbid(unsafe_code)]

mod blob;
mod error;
mod identity;
mod pass;
mod record;

use std::hash::Hasher;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tierstream_gguf::Model;
use tierstream_io::Reader;
use twox_hash::XxHash3_64;

pub use blob::blob_sha256;
pub use error::{Error, Result};
pub use identity::identity;

use self::record::{Found, Records};

/// The checksum of these bytes.
pub fn sum(bytes: &[u8]) -> u64 {
    XxHash3_64::oneshot(bytes)
}

/// The checksum of bytes that come in pieces.
#[derive(Default)]
pub struct Sum(XxHash3_64);

impl Sum {
    /// Of no bytes yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.write(bytes);
    }

    /// The checksum of all bytes so far.
    pub fn finish(&self) -> u64 {
        self.0.finish()
    }
}

/// What a model's weights are compared with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    /// Of each tensor of the model, in their order: the checksum of all its bytes, or of each expert's
    /// share, from expert 0 on.
    pub sums: Vec<Vec<u64>>,
    /// Where the checksums come from.
    pub against: Against,
    /// The record that they are in; none where it could not be written.
    pub record: Option<PathBuf>,
    /// When they were recorded; none where that is not told.
    pub recorded: Option<SystemTime>,
    /// If all of the model was read to compute them: how many bytes, and how long that took.
    pub first: Option<(u64, Duration)>,
    /// What a user should know.
    pub notes: Vec<String>,
}

/// Where checksums come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Against {
    /// Recorded by an earlier load.
    Record,
    /// Computed just now: there was nothing to compare with.
    FirstLoad,
    /// Computed just now, of a file with the SHA-256 that its name says.
    Sha256,
    /// In the packed file itself.
    Pack,
}

impl Against {
    /// One word for it, as in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Record => "record",
            Self::FirstLoad => "first_load",
            Self::Sha256 => "sha256",
            Self::Pack => "pack",
        }
    }
}

/// Finds the checksums that `model`, which lies in GGUF files, was recorded with in `folder`. If there
/// are none, reads all of it once through `reader`, and records them. `progress` gets the share that is
/// read, and stops it by returning false.
///
/// Of an Ollama blob, whose name says its SHA-256, that is compared when all of it is read.
///
/// # Errors
/// [`Error::Damaged`], [`Error::Version`] and [`Error::Unreadable`] for a record that cannot be
/// trusted, [`Error::Header`] for a file whose header is another one than when it was recorded though
/// nobody has written to it, [`Error::Sha256`], [`Error::Source`] of reads, [`Error::Gguf`] for a
/// model that llama.cpp would refuse, and [`Error::Cancelled`]. That the record cannot be written is
/// none, but a note.
pub fn reference(
    model: &Model,
    folder: Option<&Path>,
    reader: &Arc<Reader>,
    progress: &mut dyn FnMut(f32) -> bool,
) -> Result<Reference> {
    model.check_ggml()?;
    let records = Records::of(model, folder)?;
    let mut notes = Vec::new();
    match records.find(model)? {
        Found::Record { sums, recorded, path } => {
            return Ok(Reference {
                sums,
                against: Against::Record,
                record: Some(path),
                recorded: Some(recorded),
                first: None,
                notes,
            });
        }
        Found::Replaced => notes.push(format!(
            "{} is another model than when its checksums were recorded, and was written to since",
            model.files()[0].path.display()
        )),
        Found::Nothing => {}
    }
    let start = Instant::now();
    let expected = match model.files() {
        [file] => blob_sha256(&file.path),
        _ => None,
    };
    let (sums, bytes) = pass::compute(model, reader, expected, progress)?;
    let first = Some((bytes, start.elapsed()));
    let recorded = SystemTime::now();
    let record = match records.write(model, &sums, recorded) {
        Ok(path) => Some(path),
        Err(why) => {
            notes.push(format!(
                "the weights' checksums cannot be recorded, so that the next load has nothing to \
                 compare with: {why}"
            ));
            None
        }
    };
    let against = if expected.is_some() { Against::Sha256 } else { Against::FirstLoad };
    Ok(Reference { sums, against, record, recorded: Some(recorded), first, notes })
}

/// A time as people write it: `2026-11-27 12:00:00 UTC`.
pub fn date(time: SystemTime) -> String {
    let text = humantime::format_rfc3339_seconds(time).to_string();
    text.trim_end_matches('Z').replace('T', " ") + " UTC"
}

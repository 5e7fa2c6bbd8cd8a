//! What of an unfinished packed file is surely on the drive: a file beside it, to which an entry is
//! added when that is so, and not before.
//!
//! It begins with a magic, which layout of which files is being written, and the checksum of both. Each
//! entry is the number of its first unit, how many units there are, their checksums, and the
//! entry's own, which goes over what the journal is of, too. What was torn by a loss of power does not
//! have its checksum, and is where the journal ends.

use std::io;

use crate::disk::DiskFile;
use crate::format::{Checksum, checksum};

/// The first bytes of a journal; the digit is its version.
const MAGIC: [u8; 8] = *b"TSPJRNL1";

/// Bytes before the first entry.
const HEAD_BYTES: usize = 24;

/// The journal of a file that is being written.
pub(crate) struct Journal<F> {
    file: F,
    /// What is written, of what.
    of: u64,
    /// Of the units that are on the drive.
    pub(crate) sums: Vec<u64>,
    /// Where the next entry goes.
    end: u64,
}

impl<F: DiskFile> Journal<F> {
    /// Reads `file` as the journal of what `of` stands for, with at most `units` units; `None` if it is
    /// another one's, or none.
    pub(crate) fn read(file: F, of: u64, units: usize) -> io::Result<Result<Self, F>> {
        let most = HEAD_BYTES as u64 + units as u64 * 32;
        let mut bytes = vec![0; file.len()?.min(most) as usize];
        file.read_at(&mut bytes, 0)?;
        if !bytes.starts_with(&head(of)) {
            return Ok(Err(file));
        }
        let mut journal = Self { file, of, sums: Vec::new(), end: HEAD_BYTES as u64 };
        let mut left = &bytes[HEAD_BYTES..];
        while let Some((sums, len)) = entry(left, of, journal.sums.len()) {
            journal.sums.extend(sums);
            journal.end += len as u64;
            left = &left[len..];
        }
        journal.sums.truncate(units);
        Ok(Ok(journal))
    }

    /// Makes `file`, which says nothing, the journal of what `of` stands for.
    pub(crate) fn begin(file: F, of: u64) -> io::Result<Self> {
        file.write_at(&head(of), 0)?;
        file.sync()?;
        Ok(Self { file, of, sums: Vec::new(), end: HEAD_BYTES as u64 })
    }

    /// Gives the file up, whatever it says.
    pub(crate) fn into_file(self) -> F {
        self.file
    }

    /// These units, which follow the ones before, are on the drive.
    pub(crate) fn add(&mut self, sums: &[u64]) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(24 + sums.len() * 8);
        bytes.extend((self.sums.len() as u64).to_le_bytes());
        bytes.extend((sums.len() as u64).to_le_bytes());
        sums.iter().for_each(|sum| bytes.extend(sum.to_le_bytes()));
        bytes.extend(signature(&bytes, self.of).to_le_bytes());
        // What a loss of power has torn may be longer than the entry that takes its place.
        self.file.set_len(self.end)?;
        self.file.write_at(&bytes, self.end)?;
        self.file.sync()?;
        self.end += bytes.len() as u64;
        self.sums.extend(sums);
        Ok(())
    }
}

fn head(of: u64) -> [u8; HEAD_BYTES] {
    let mut head = [0; HEAD_BYTES];
    head[..8].copy_from_slice(&MAGIC);
    head[8..16].copy_from_slice(&of.to_le_bytes());
    let sum = checksum(&head[..16]);
    head[16..].copy_from_slice(&sum.to_le_bytes());
    head
}

fn signature(entry: &[u8], of: u64) -> u64 {
    let mut sum = Checksum::new();
    sum.update(&of.to_le_bytes());
    sum.update(entry);
    sum.finish()
}

/// The checksums of the entry that begins with unit `first`, and its length; `None` if it is no whole
/// one.
fn entry(bytes: &[u8], of: u64, first: usize) -> Option<(Vec<u64>, usize)> {
    let word = |at: usize| {
        let bytes = bytes.get(at..at.checked_add(8)?)?;
        Some(u64::from_le_bytes(bytes.try_into().expect("eight bytes")))
    };
    let count = usize::try_from(word(8)?).ok()?;
    let len = count.checked_mul(8)?.checked_add(24)?;
    let signed = bytes.get(..len)?.split_at(len - 8).0;
    let is_next = word(0)? == first as u64 && count > 0;
    if !is_next || word(len - 8)? != signature(signed, of) {
        return None;
    }
    let sums = (0..count).map(|n| word(16 + n * 8)).collect::<Option<Vec<_>>>()?;
    Some((sums, len))
}

//! Reads all of a model once, in the order of its files, and computes every checksum on the way.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;

use sha2::{Digest, Sha256};
use tierstream_gguf::{Experts, FileIdentity, FileInfo, Model};
use tierstream_io::{Extent, FileId, Fill, Pages, Placed, Priority, Reader};

use crate::Sum;
use crate::error::{Error, Result};

/// Bytes that are read together; a multiple of every alignment of direct reads.
const PIECE_BYTES: u64 = 8 << 20;

/// Pieces that are read ahead.
const AHEAD: usize = 3;

/// A range of a file with a checksum of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Range {
    offset: u64,
    len: u64,
    /// Index into the model's tensors.
    tensor: usize,
    /// Which share of it.
    nth: usize,
}

/// The checksums of all tensors, and the bytes that were read. With `sha256`, that of the only file is
/// compared with it.
pub(crate) fn compute(
    model: &Model,
    reader: &Arc<Reader>,
    sha256: Option<[u8; 32]>,
    progress: &mut dyn FnMut(f32) -> bool,
) -> Result<(Vec<Vec<u64>>, u64)> {
    let shares = shares(model)?;
    let mut sums: Vec<Vec<u64>> = shares.iter().map(|&n| vec![0; n as usize]).collect();
    let total = model.file_bytes();
    let mut done = 0;
    for (index, info) in model.files().iter().enumerate() {
        let file = open(reader, info)?;
        let mut ranges = Ranges::new(ranges(model, &shares, index));
        let mut whole = sha256.map(|expected| (expected, Sha256::new()));
        let mut pieces = Pieces::new(reader, file, info.len);
        while let Some((offset, len, pages)) = pieces.next()? {
            let bytes = &pages[..len];
            ranges.take(offset, bytes, &mut sums);
            if let Some((_, sum)) = &mut whole {
                sum.update(bytes);
            }
            pieces.give_back(pages);
            done += len as u64;
            if !progress(done as f32 / total.max(1) as f32) {
                return Err(Error::Cancelled);
            }
        }
        reader.file(file)?.check_unchanged()?;
        if let Some((expected, sum)) = whole {
            check_sha256(&info.path, info.len, expected, sum)?;
        }
    }
    Ok((sums, done))
}

fn check_sha256(path: &Path, len: u64, expected: [u8; 32], sum: Sha256) -> Result<()> {
    let found: [u8; 32] = sum.finalize().into();
    if found == expected {
        return Ok(());
    }
    let found = found.iter().map(|byte| format!("{byte:02x}")).collect();
    Err(Error::Sha256 { path: path.to_owned(), len, found })
}

/// How many checksums each tensor has: one, or one for each expert where those are streamed.
pub(crate) fn shares(model: &Model) -> Result<Vec<u32>> {
    let mut shares = vec![1; model.tensors().len()];
    let experts = Experts::group(model)?;
    for layer in experts.layers().iter().filter(|layer| layer.is_streamed()) {
        layer.parts.iter().for_each(|part| shares[part.tensor] = layer.experts);
    }
    Ok(shares)
}

/// What has checksums in a file, in its order.
fn ranges(model: &Model, shares: &[u32], file: usize) -> Vec<Range> {
    let mut ranges = Vec::new();
    for (tensor, t) in model.tensors().iter().enumerate().filter(|(_, t)| t.file == file) {
        let count = u64::from(shares[tensor]);
        // Experts' tensors are a whole number of shares: `Experts::group` has looked.
        let len = t.len / count;
        let share = |nth| Range { offset: t.offset + nth * len, len, tensor, nth: nth as usize };
        ranges.extend((0..count).map(share));
    }
    ranges.sort_unstable();
    ranges
}

/// The ranges of a file as its bytes go by.
struct Ranges {
    left: std::vec::IntoIter<Range>,
    current: Option<(Range, Sum)>,
}

impl Ranges {
    /// They share no byte.
    fn new(ranges: Vec<Range>) -> Self {
        let mut this = Self { left: ranges.into_iter(), current: None };
        this.advance();
        this
    }

    fn advance(&mut self) {
        self.current = self.left.next().map(|range| (range, Sum::new()));
    }

    /// Takes the next bytes of the file, which begin at `offset`.
    fn take(&mut self, offset: u64, bytes: &[u8], sums: &mut [Vec<u64>]) {
        let end = offset + bytes.len() as u64;
        while let Some((range, sum)) = &mut self.current
            && range.offset < end
        {
            let from = range.offset.max(offset) - offset;
            let to = (range.offset + range.len).min(end) - offset;
            sum.update(&bytes[from as usize..to as usize]);
            if range.offset + range.len > end {
                return;
            }
            sums[range.tensor][range.nth] = sum.finish();
            self.advance();
        }
    }
}

/// A file's bytes in order, some of them read ahead.
struct Pieces<'a> {
    reader: &'a Reader,
    file: FileId,
    len: u64,
    next: u64,
    coming: VecDeque<(u64, u64, Fill)>,
    free: Vec<Pages>,
}

impl<'a> Pieces<'a> {
    fn new(reader: &'a Reader, file: FileId, len: u64) -> Self {
        Self { reader, file, len, next: 0, coming: VecDeque::new(), free: Vec::new() }
    }

    /// Where the next piece begins, its bytes, and the pages that they are at the start of.
    fn next(&mut self) -> Result<Option<(u64, usize, Pages)>> {
        while self.coming.len() < AHEAD && self.next < self.len {
            let (offset, len) = (self.next, PIECE_BYTES.min(self.len - self.next));
            let pages = match self.free.pop() {
                Some(pages) => pages,
                None => Pages::new(PIECE_BYTES as usize)?,
            };
            let placed = Placed { extent: Extent { file: self.file, offset, len }, at: 0 };
            let told = Box::new(|_, _: &_| ());
            let fill = self.reader.fill(Priority::Bulk, pages, vec![placed], told)?;
            self.coming.push_back((offset, len, fill));
            self.next += len;
        }
        let Some((offset, len, fill)) = self.coming.pop_front() else { return Ok(None) };
        Ok(Some((offset, len as usize, fill.wait()?)))
    }

    fn give_back(&mut self, pages: Pages) {
        self.free.push(pages);
    }
}

/// Opens a file whose header has been read.
fn open(reader: &Reader, info: &FileInfo) -> Result<FileId> {
    let id = reader.open(&info.path)?;
    let opened = reader.file(id)?;
    let (device, inode) = opened.device_inode();
    let identity = FileIdentity { device, inode, modified: opened.modified() };
    if opened.size() != info.len || info.identity.is_some_and(|known| known != identity) {
        let what = "it was exchanged or written to since its header was read".into();
        return Err(tierstream_io::Error::Changed { path: info.path.as_path().into(), what }.into());
    }
    Ok(id)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::sum;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

        /// However a file is cut, each range has the checksum of its bytes.
        #[test]
        fn ranges_have_the_checksums_of_their_bytes(
            parts in prop::collection::vec((0usize..50, 1usize..300), 0..12),
            cuts in prop::collection::vec(1usize..200, 1..9),
            rest in 0usize..90,
        ) {
            let mut at = 0;
            let mut all = Vec::new();
            for (tensor, (gap, len)) in parts.into_iter().enumerate() {
                all.push(Range { offset: (at + gap) as u64, len: len as u64, tensor, nth: 0 });
                at += gap + len;
            }
            let bytes: Vec<u8> = (0..at + rest).map(|i| (i * 7 + i / 251) as u8).collect();
            let mut sums = vec![vec![0]; all.len()];
            let mut ranges = Ranges::new(all.clone());
            let (mut offset, mut cuts) = (0, cuts.into_iter().cycle());
            while offset < bytes.len() {
                let end = bytes.len().min(offset + cuts.next().unwrap());
                ranges.take(offset as u64, &bytes[offset..end], &mut sums);
                offset = end;
            }
            for range in all {
                let own = &bytes[range.offset as usize..(range.offset + range.len) as usize];
                prop_assert_eq!(sums[range.tensor][0], sum(own));
            }
        }
    }
}

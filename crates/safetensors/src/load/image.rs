//! Where tensors of files lie in one piece of memory, and what is read to get them there.

use tierstream_io::PAGE;
use tierstream_io::plan::COALESCE_GAP_BYTES;

use crate::Result;
use crate::error::{Error, ErrorKind};
use crate::tensor::Tensor;

/// Reads are told of in pieces of this, in bytes: often enough for a progress bar, and a multiple of
/// every drive's alignment, so that pieces of a run meet without sharing a block.
const PIECE_BYTES: u64 = 16 << 20;

/// The layout of tensors in memory.
///
/// Tensors that lie close in their file are one run, read and kept with the gaps between them. A run
/// begins in a page of its own, as far behind the page's first byte as in the file.
#[derive(Debug)]
pub(crate) struct Image {
    /// Memory for all of it.
    pub(crate) bytes: usize,
    /// In file order, none of them empty.
    pub(crate) pieces: Vec<Piece>,
    /// Bytes of the wanted tensors, each counted once.
    pub(crate) wanted_bytes: u64,
    /// Position and first byte in memory of each wanted tensor, sorted.
    starts: Vec<(usize, usize)>,
}

/// A part of a run that is read by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) file: usize,
    pub(crate) offset: u64,
    pub(crate) len: u64,
    /// First byte in memory.
    pub(crate) at: usize,
    /// How many of its bytes belong to wanted tensors.
    pub(crate) wanted: u64,
}

impl Image {
    /// Lays out the tensors at these positions, in any order. `tensors` are sorted by file and
    /// offset.
    pub(crate) fn new(tensors: &[Tensor], wanted: &[usize]) -> Result<Self> {
        let mut order = wanted.to_vec();
        order.sort_unstable();
        order.dedup();
        let wanted_bytes = order.iter().map(|position| tensors[*position].len).sum();
        let mut image = Self {
            bytes: 0,
            pieces: Vec::new(),
            wanted_bytes,
            starts: Vec::with_capacity(order.len()),
        };
        let mut rest = order.as_slice();
        while let Some(first) = rest.first() {
            let first = &tensors[*first];
            let mut end = first.end();
            let mut count = 1;
            while let Some(next) = rest.get(count).map(|position| &tensors[*position])
                && next.file == first.file
                && next.offset <= end.saturating_add(COALESCE_GAP_BYTES)
            {
                end = end.max(next.end());
                count += 1;
            }
            image.add_run(tensors, &rest[..count], end)?;
            rest = &rest[count..];
        }
        Ok(image)
    }

    /// Where a wanted tensor begins in memory.
    pub(crate) fn start(&self, position: usize) -> usize {
        let found = self.starts.binary_search_by_key(&position, |(position, _)| *position);
        self.starts[found.expect("one of the wanted positions")].1
    }

    fn add_run(&mut self, tensors: &[Tensor], run: &[usize], end: u64) -> Result<()> {
        let &Tensor { file, offset: begin, .. } = &tensors[run[0]];
        let phase = (begin % PAGE as u64) as usize;
        let start = self.bytes.next_multiple_of(PAGE) + phase;
        let bytes = usize::try_from(end - begin).ok().and_then(|len| start.checked_add(len));
        let bytes = bytes.and_then(|bytes| bytes.checked_next_multiple_of(PAGE));
        self.bytes = bytes.ok_or_else(|| {
            let source = std::io::ErrorKind::OutOfMemory.into();
            Error::from(ErrorKind::Io { op: "have that much memory", source })
        })?;
        // No larger than the run, so all of this fits.
        let in_memory = |offset: u64| start + (offset - begin) as usize;
        for position in run {
            self.starts.push((*position, in_memory(tensors[*position].offset)));
        }
        let mut waiting = run.iter().map(|position| &tensors[*position]).peekable();
        let mut at = begin;
        while at < end {
            let next = ((at / PIECE_BYTES + 1) * PIECE_BYTES).min(end);
            let mut wanted = 0;
            while let Some(tensor) = waiting.peek() {
                let (from, to) = (tensor.offset.max(at), tensor.end().min(next));
                wanted += to.saturating_sub(from);
                if tensor.end() > next {
                    break;
                }
                waiting.next();
            }
            self.pieces.push(Piece { file, offset: at, len: next - at, at: in_memory(at), wanted });
            at = next;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::dtype::Dtype;

    fn tensors(parts: &[(usize, u64)]) -> Vec<Tensor> {
        let (mut offset, mut last) = (1000, 0);
        let mut tensor = |&(file, len): &(usize, u64)| {
            if file != last {
                (offset, last) = (1000, file);
            }
            let (name, shape) = (String::new(), vec![len]);
            let tensor = Tensor { name, dtype: Dtype::U8, shape, file, offset, len };
            offset += len;
            tensor
        };
        parts.iter().map(&mut tensor).collect()
    }

    proptest! {
        #[test]
        fn every_wanted_byte_is_read_once_in_phase(
            mut parts in prop::collection::vec(
                (0usize..3, prop_oneof![0u64..100, 0u64..40_000, 0u64..(40 << 20)]), 1..12),
            picks in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
        ) {
            parts.sort_by_key(|(file, _)| *file);
            let tensors = tensors(&parts);
            let wanted: Vec<usize> = picks.iter().map(|pick| pick.index(tensors.len())).collect();
            let image = Image::new(&tensors, &wanted).unwrap();
            let mut end_in_memory = 0;
            let mut before: Option<Piece> = None;
            for piece in &image.pieces {
                prop_assert!(piece.len > 0 && piece.len <= PIECE_BYTES && piece.wanted <= piece.len);
                prop_assert!(piece.at >= end_in_memory);
                prop_assert_eq!(piece.at % PAGE, (piece.offset % PAGE as u64) as usize);
                // Pieces share no page in memory, unless nothing of it is read twice.
                if piece.at / PAGE == end_in_memory.saturating_sub(1) / PAGE && end_in_memory > 0 {
                    prop_assert!(piece.at.is_multiple_of(PAGE));
                }
                if let Some(before) = before && before.file == piece.file {
                    prop_assert!(before.offset + before.len <= piece.offset);
                }
                end_in_memory = piece.at + piece.len as usize;
                before = Some(*piece);
            }
            prop_assert!(end_in_memory <= image.bytes);
            let mut distinct = wanted.clone();
            distinct.sort_unstable();
            distinct.dedup();
            for position in &distinct {
                let Tensor { file, offset, len, .. } = tensors[*position];
                let start = image.start(*position);
                prop_assert!(start + len as usize <= image.bytes);
                let mut covered = 0;
                for piece in image.pieces.iter().filter(|piece| piece.file == file) {
                    let from = piece.offset.max(offset);
                    let to = (piece.offset + piece.len).min(offset + len);
                    if from < to {
                        covered += to - from;
                        let of_piece = piece.at + (from - piece.offset) as usize;
                        prop_assert_eq!(of_piece, start + (from - offset) as usize);
                    }
                }
                prop_assert_eq!(covered, len);
            }
            let bytes: u64 = distinct.iter().map(|position| tensors[*position].len).sum();
            prop_assert_eq!(image.wanted_bytes, bytes);
            prop_assert_eq!(image.pieces.iter().map(|piece| piece.wanted).sum::<u64>(), bytes);
            // Pages and gaps, and nothing else besides.
            let most = bytes + distinct.len() as u64 * (2 * PAGE as u64 + COALESCE_GAP_BYTES);
            prop_assert!(image.bytes as u64 <= most);
        }
    }

    #[test]
    fn a_whole_file_is_one_run() {
        let tensors = tensors(&[(0, 30 << 20), (0, 5), (0, 20 << 20)]);
        let image = Image::new(&tensors, &[2, 0, 1]).unwrap();
        let offsets: Vec<u64> = image.pieces.iter().map(|piece| piece.offset).collect();
        assert_eq!(offsets, [1000, 16 << 20, 32 << 20, 48 << 20]);
        assert_eq!(image.start(1), 1000 + (30 << 20));
    }
}

//! What the bytes of a packed file mean: `docs/pack-format.md`.

use std::hash::Hasher;

use twox_hash::XxHash3_64;

use crate::cursor::Cursor;

/// The first bytes of every packed file. Its line end does not survive a transfer as text.
pub const MAGIC: [u8; 8] = *b"TSPACK\r\n";

/// The version that is written, and the only one that is read.
pub const VERSION: u32 = 3;

/// Sections, records, their parts and tensors begin at multiples of this, bytes: what direct reads,
/// whatever the drive, and a GPU's DMA are content with.
pub const ALIGN: u64 = 4096;

/// The packed file holds the expert records only.
const FLAG_EXPERTS_ONLY: u32 = 1;

/// Where the first block's own checksum is, and what comes before it.
const CHECKSUM_AT: usize = ALIGN as usize - 8;

/// Files of a model (as `tierstream_gguf::limits::MAX_SPLIT_FILES`).
const MAX_FILES: usize = 1024;
/// Bytes of all headers. The largest published models have some 30 MiB.
pub(crate) const MAX_HEADERS_BYTES: u64 = 512 << 20;
/// Bytes of the index: 8 for each expert of each layer, 24 for each other tensor. The largest
/// published models have less than 1 MiB.
pub(crate) const MAX_INDEX_BYTES: u64 = 64 << 20;
/// Bytes of a file's name.
const MAX_NAME_BYTES: u32 = 4096;
/// Parts of a record.
const MAX_PARTS: usize = 16;

/// What is wrong with a packed file.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Broken(pub(crate) &'static str);

/// XXH3, 64 bits, seed 0.
pub(crate) fn checksum(bytes: &[u8]) -> u64 {
    XxHash3_64::oneshot(bytes)
}

/// The same of bytes that come in pieces.
pub(crate) struct Checksum(XxHash3_64);

impl Checksum {
    pub(crate) fn new() -> Self {
        Self(XxHash3_64::new())
    }

    pub(crate) fn update(&mut self, bytes: &[u8]) {
        self.0.write(bytes);
    }

    pub(crate) fn finish(&self) -> u64 {
        self.0.finish()
    }
}

/// Where a section lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Section {
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) checksum: u64,
}

impl Section {
    /// Where it ends, and what follows may begin.
    pub(crate) fn end(&self) -> Option<u64> {
        self.offset.checked_add(self.len)?.checked_next_multiple_of(ALIGN)
    }
}

/// The first block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Front {
    pub(crate) experts_only: bool,
    pub(crate) file_len: u64,
    pub(crate) headers: Section,
    pub(crate) index: Section,
}

/// Why a first block is refused.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    Version(u32),
    Flags(u32),
    Broken(Broken),
}

impl Front {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut block = Vec::with_capacity(ALIGN as usize);
        block.extend(MAGIC);
        block.extend(VERSION.to_le_bytes());
        let flags = if self.experts_only { FLAG_EXPERTS_ONLY } else { 0 };
        block.extend(flags.to_le_bytes());
        block.extend(self.file_len.to_le_bytes());
        for Section { offset, len, checksum } in [self.headers, self.index] {
            [offset, len, checksum].iter().for_each(|field| block.extend(field.to_le_bytes()));
        }
        block.resize(CHECKSUM_AT, 0);
        let sum = checksum(&block);
        block.extend(sum.to_le_bytes());
        block
    }

    /// `block` begins with the magic.
    pub(crate) fn decode(block: &[u8; ALIGN as usize]) -> Result<Self, Refused> {
        let word = |at: usize| u64::from_le_bytes(block[at..at + 8].try_into().expect("8 bytes"));
        let half = |at: usize| u32::from_le_bytes(block[at..at + 4].try_into().expect("4 bytes"));
        let (version, flags) = (half(8), half(12));
        // First: what follows may mean something else in another version.
        if version != VERSION {
            return Err(Refused::Version(version));
        }
        if checksum(&block[..CHECKSUM_AT]) != word(CHECKSUM_AT) {
            return Err(Refused::Broken(Broken("its first block does not have its checksum")));
        }
        if flags & !FLAG_EXPERTS_ONLY != 0 {
            return Err(Refused::Flags(flags & !FLAG_EXPERTS_ONLY));
        }
        let section = |at| Section { offset: word(at), len: word(at + 8), checksum: word(at + 16) };
        let experts_only = flags & FLAG_EXPERTS_ONLY != 0;
        let front =
            Self { experts_only, file_len: word(16), headers: section(24), index: section(48) };
        if block[72..CHECKSUM_AT].iter().any(|byte| *byte != 0) {
            return Err(Refused::Broken(Broken("its first block has fields that are not known")));
        }
        front.check().map_err(Refused::Broken)?;
        Ok(front)
    }

    fn check(&self) -> Result<(), Broken> {
        let aligned = |section: &Section| section.offset.is_multiple_of(ALIGN);
        let in_order = self.headers.offset >= ALIGN
            && self.headers.end().is_some_and(|end| end <= self.index.offset)
            && self.index.end().is_some_and(|end| end <= self.file_len);
        if !(aligned(&self.headers) && aligned(&self.index) && in_order) {
            return Err(Broken("its sections do not lie in the file, one after the other"));
        }
        if self.headers.len > MAX_HEADERS_BYTES || self.index.len > MAX_INDEX_BYTES {
            return Err(Broken("a section is longer than any model needs"));
        }
        Ok(())
    }

    /// Where data may begin.
    pub(crate) fn data_offset(&self) -> u64 {
        self.index.end().expect("checked")
    }
}

/// Gives the first bytes of a packed file, up to the end of its index, the checksums that they should
/// have: for tests that change something. What is no packed file is left as it is.
#[doc(hidden)]
pub fn sign(bytes: &mut [u8]) {
    if bytes.len() < ALIGN as usize {
        return;
    }
    for at in [24, 48] {
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        let (start, len) = (word(at), word(at + 8));
        let end = start.checked_add(len).and_then(|end| usize::try_from(end).ok());
        let section = end.and_then(|end| bytes.get(usize::try_from(start).ok()?..end));
        if let Some(sum) = section.map(checksum) {
            bytes[at + 16..at + 24].copy_from_slice(&sum.to_le_bytes());
        }
    }
    let sum = checksum(&bytes[..CHECKSUM_AT]);
    bytes[CHECKSUM_AT..ALIGN as usize].copy_from_slice(&sum.to_le_bytes());
}

/// A file that the model was made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct File {
    /// Bytes of the file, and of its header.
    pub(crate) len: u64,
    pub(crate) header_len: u64,
    /// With experts only, its path from the packed file's folder; else its name alone.
    pub(crate) name: Vec<u8>,
}

/// The records of one layer, side by side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Layer {
    /// The N of `blk.N`.
    pub(crate) block: u32,
    /// Where the record of expert 0 begins, and bytes from one record to the next.
    pub(crate) offset: u64,
    pub(crate) stride: u64,
    /// Tensors, and where their shares begin in a record.
    pub(crate) parts: Vec<(u32, u64)>,
    /// Of each expert's parts, in their order, expert by expert.
    pub(crate) checksums: Vec<u64>,
}

impl Layer {
    /// Experts, by the checksums that there are; parts that some expert lacks do not count.
    pub(crate) fn experts(&self) -> usize {
        self.checksums.len() / self.parts.len().max(1)
    }

    /// The checksum of a part of an expert's record.
    pub(crate) fn checksum(&mut self, expert: usize, part: usize) -> &mut u64 {
        &mut self.checksums[expert * self.parts.len() + part]
    }
}

/// A tensor that lies in one piece.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Dense {
    pub(crate) tensor: u32,
    /// 0 is the packed file, n the n-th of the files that it was made of.
    pub(crate) file: u32,
    pub(crate) offset: u64,
    pub(crate) checksum: u64,
}

/// Where everything lies. Tensors are numbered as in the model's headers.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Index {
    pub(crate) files: Vec<File>,
    pub(crate) layers: Vec<Layer>,
    pub(crate) dense: Vec<Dense>,
}

impl Index {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let count = |n: usize| u32::try_from(n).expect("headers bound every count").to_le_bytes();
        out.extend(count(self.files.len()));
        for File { len, header_len, name } in &self.files {
            out.extend(len.to_le_bytes());
            out.extend(header_len.to_le_bytes());
            out.extend(count(name.len()));
            out.extend(name);
        }
        out.extend(count(self.layers.len()));
        for Layer { block, offset, stride, parts, checksums } in &self.layers {
            out.extend(block.to_le_bytes());
            out.extend(offset.to_le_bytes());
            out.extend(stride.to_le_bytes());
            out.extend(count(parts.len()));
            for (tensor, start) in parts {
                out.extend(tensor.to_le_bytes());
                out.extend(start.to_le_bytes());
            }
            out.extend(count(checksums.len()));
            checksums.iter().for_each(|sum| out.extend(sum.to_le_bytes()));
        }
        out.extend(count(self.dense.len()));
        for Dense { tensor, file, offset, checksum } in &self.dense {
            out.extend(tensor.to_le_bytes());
            out.extend(file.to_le_bytes());
            out.extend(offset.to_le_bytes());
            out.extend(checksum.to_le_bytes());
        }
        out
    }

    /// What it says is not yet compared with the headers.
    pub(crate) fn decode(section: &[u8]) -> Result<Self, Broken> {
        let mut cursor = Cursor::new(section);
        let files = cursor.count(20)?;
        if files == 0 || files > MAX_FILES {
            return Err(Broken("it was made of no file, or of too many"));
        }
        let files = (0..files).map(|_| {
            let (len, header_len, name_len) = (cursor.u64()?, cursor.u64()?, cursor.u32()?);
            if name_len > MAX_NAME_BYTES {
                return Err(Broken("a file's name is too long"));
            }
            let name = cursor.bytes(name_len.into())?.to_vec();
            Ok(File { len, header_len, name })
        });
        let files = files.collect::<Result<Vec<_>, Broken>>()?;
        let layers = cursor.count(28)?;
        let layers = (0..layers).map(|_| decode_layer(&mut cursor)).collect::<Result<_, _>>()?;
        let dense = cursor.count(24)?;
        let dense = (0..dense).map(|_| {
            let (tensor, file) = (cursor.u32()?, cursor.u32()?);
            Ok(Dense { tensor, file, offset: cursor.u64()?, checksum: cursor.u64()? })
        });
        let dense = dense.collect::<Result<Vec<_>, Broken>>()?;
        if !cursor.is_empty() {
            return Err(Broken("the index goes on behind its end"));
        }
        Ok(Self { files, layers, dense })
    }
}

fn decode_layer(cursor: &mut Cursor<'_>) -> Result<Layer, Broken> {
    let (block, offset, stride) = (cursor.u32()?, cursor.u64()?, cursor.u64()?);
    let parts = cursor.count(12)?;
    if parts == 0 || parts > MAX_PARTS {
        return Err(Broken("a record has no parts, or too many"));
    }
    let parts = (0..parts).map(|_| Ok((cursor.u32()?, cursor.u64()?)));
    let parts = parts.collect::<Result<Vec<_>, Broken>>()?;
    let experts = cursor.count(8)?;
    let checksums = (0..experts).map(|_| cursor.u64()).collect::<Result<_, _>>()?;
    Ok(Layer { block, offset, stride, parts, checksums })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn front() -> Front {
        let section = |offset, len| Section { offset, len, checksum: 7 };
        let (headers, index) = (section(4096, 100), section(8192, 5000));
        Front { experts_only: true, file_len: 1 << 20, headers, index }
    }

    fn block(front: &Front) -> [u8; ALIGN as usize] {
        front.encode().try_into().unwrap()
    }

    #[test]
    fn the_first_block_is_read_as_it_was_written() {
        assert_eq!(Front::decode(&block(&front())), Ok(front()));
        assert_eq!(front().data_offset(), 16384);
    }

    #[test]
    fn no_bit_of_the_first_block_may_change() {
        let whole = block(&front());
        for bit in 8 * 8..8 * ALIGN as usize {
            let mut block = whole;
            block[bit / 8] ^= 1 << (bit % 8);
            assert!(Front::decode(&block).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn what_is_not_known_is_refused() {
        let signed = |at: usize, byte: u8| {
            let mut block = block(&front());
            block[at] = byte;
            let sum = checksum(&block[..CHECKSUM_AT]);
            block[CHECKSUM_AT..].copy_from_slice(&sum.to_le_bytes());
            Front::decode(&block).unwrap_err()
        };
        assert_eq!(signed(8, 1), Refused::Version(1));
        assert_eq!(signed(12, 3), Refused::Flags(2));
        assert_eq!(signed(15, 0x80), Refused::Flags(0x8000_0000));
        assert!(matches!(signed(72, 1), Refused::Broken(_)));
        assert!(matches!(signed(CHECKSUM_AT - 1, 1), Refused::Broken(_)));
        // Sections: off a block, over each other, beyond the end, too long.
        for (at, byte) in [(24, 1), (25, 0x30), (50, 0xFF), (37, 1), (61, 0x10)] {
            assert!(matches!(signed(at, byte), Refused::Broken(_)), "{at}");
        }
    }

    prop_compose! {
        fn any_index()(
            files in prop::collection::vec((any::<u64>(), any::<u64>(), prop::collection::vec(any::<u8>(), 0..9)), 1..4),
            layers in prop::collection::vec(
                (any::<u32>(), any::<u64>(), any::<u64>(),
                 prop::collection::vec((any::<u32>(), any::<u64>()), 1..4),
                 prop::collection::vec(any::<u64>(), 0..5)),
                0..4,
            ),
            dense in prop::collection::vec((any::<u32>(), any::<u32>(), any::<u64>(), any::<u64>()), 0..4),
        ) -> Index {
            Index {
                files: files.into_iter().map(|(len, header_len, name)| File { len, header_len, name }).collect(),
                layers: layers.into_iter().map(|(block, offset, stride, parts, checksums)| {
                    Layer { block, offset, stride, parts, checksums }
                }).collect(),
                dense: dense.into_iter().map(|(tensor, file, offset, checksum)| {
                    Dense { tensor, file, offset, checksum }
                }).collect(),
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

        #[test]
        fn an_index_is_read_as_it_was_written(index in any_index()) {
            let bytes = index.encode();
            prop_assert_eq!(Index::decode(&bytes), Ok(index));
            for len in 0..bytes.len() {
                prop_assert!(Index::decode(&bytes[..len]).is_err());
            }
            prop_assert!(Index::decode(&[&bytes[..], &[0]].concat()).is_err());
        }

        /// Memory is proportional to the bytes that are there, whatever they say.
        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(index) = Index::decode(&bytes) {
                prop_assert_eq!(index.encode(), bytes);
            }
        }
    }
}

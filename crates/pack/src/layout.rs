//! Where everything of a model goes in a packed file: the tensors that are no experts' in the order of
//! the headers, then the records, layer by layer, expert by expert.

use std::sync::Arc;

use tierstream_gguf::{Experts, Extent, Model};

use crate::error::Result;
use crate::format::{ALIGN, Checksum, Dense, File, Front, Index, Layer, Section};

/// What becomes of a model.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    pub(crate) front: Front,
    pub(crate) index: Index,
    /// What is written behind the index, in the order of the file; of experts alone, before that what is
    /// only read, for its checksum.
    pub(crate) units: Vec<Unit>,
}

/// A range with a checksum of its own, of the packed file or of one that the model was made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Unit {
    pub(crate) of: Of,
    /// In the file that it lies in.
    pub(crate) offset: u64,
    pub(crate) len: u64,
    /// What it is made of, and where that begins in it. Zeros lie between.
    pub(crate) pieces: Vec<(Extent, u64)>,
    /// Whether it lies in a file that the model was made of.
    pub(crate) elsewhere: bool,
}

/// What a unit is: an entry of the index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Of {
    /// An entry of [`Index::dense`].
    Dense(usize),
    /// A part of a record.
    Part {
        /// An entry of [`Index::layers`].
        layer: usize,
        /// Which record of it.
        expert: usize,
        /// Which part of that.
        part: usize,
    },
}

/// What packing a model takes and gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gain {
    /// Bytes of the packed file.
    pub file_bytes: u64,
    /// Bytes of one of the experts alone.
    pub experts_only_bytes: u64,
    /// Bytes of all records that stream, as they lie in it; with what aligns their parts.
    pub record_bytes: u64,
}

impl Gain {
    /// Of packing `model`, whose names are not looked at.
    ///
    /// # Errors
    /// As [`Experts::group`].
    pub fn of(model: &Model) -> Result<Self> {
        let experts = Experts::group(model)?;
        let names = vec![Vec::new(); model.files().len()];
        let whole = Layout::new(model, &experts, names.clone(), false);
        let alone = Layout::new(model, &experts, names, true);
        let records = |layer: &Layer| layer.stride * layer.experts() as u64;
        Ok(Self {
            file_bytes: whole.front.file_len,
            experts_only_bytes: alone.front.file_len,
            record_bytes: whole.index.layers.iter().map(records).sum(),
        })
    }
}

impl Layout {
    /// Of `model`, as it lies in GGUF files. `names` are those that the packed file gives them.
    pub(crate) fn new(
        model: &Model,
        experts: &Experts,
        names: Vec<Vec<u8>>,
        experts_only: bool,
    ) -> Self {
        let file = |(file, name): (&tierstream_gguf::FileInfo, Vec<u8>)| File {
            len: file.len,
            header_len: file.data_offset.min(file.len),
            name,
        };
        let files: Vec<File> = model.files().iter().zip(names).map(file).collect();
        let mut layout =
            Self { front: Front::default(), index: Index::default(), units: Vec::new() };
        layout.index.files = files;
        layout.list(model, experts);
        let headers = Section {
            offset: ALIGN,
            len: layout.index.files.iter().map(|file| file.header_len).sum(),
            checksum: 0,
        };
        // The index has its length whatever is in its fields.
        let index = Section {
            offset: end_of(&headers),
            len: layout.index.encode().len() as u64,
            checksum: 0,
        };
        layout.place(model, end_of(&index), experts_only);
        let last = layout.units.last().filter(|unit| !unit.elsewhere);
        let file_len = last.map_or(end_of(&index), |unit| unit.offset + unit.len);
        let file_len = file_len.next_multiple_of(ALIGN);
        layout.front = Front { experts_only, file_len, headers, index };
        layout
    }

    /// Fills the index, but for places and checksums.
    fn list(&mut self, model: &Model, experts: &Experts) {
        let mut in_records = vec![false; model.tensors().len()];
        for layer in experts.layers().iter().filter(|layer| layer.is_streamed()) {
            let mut end = 0;
            let parts = layer.parts.iter().map(|part| {
                in_records[part.tensor] = true;
                let start = end;
                end += part.bytes_per_expert.next_multiple_of(ALIGN);
                (index32(part.tensor), start)
            });
            let parts: Vec<_> = parts.collect();
            let checksums = vec![0; layer.experts as usize * parts.len()];
            let block = layer.layer;
            self.index.layers.push(Layer { block, offset: 0, stride: end, parts, checksums });
        }
        let dense = in_records.iter().enumerate().filter(|(_, in_records)| !**in_records);
        let dense = dense.map(|(tensor, _)| Dense {
            tensor: index32(tensor),
            file: 0,
            offset: 0,
            checksum: 0,
        });
        self.index.dense = dense.collect();
    }

    /// Says where everything goes, from `at` on, and lists it.
    fn place(&mut self, model: &Model, mut at: u64, experts_only: bool) {
        let Index { layers, dense, .. } = &mut self.index;
        for (n, entry) in dense.iter_mut().enumerate() {
            let tensor = &model.tensors()[entry.tensor as usize];
            (entry.file, entry.offset) = match experts_only {
                true => (index32(tensor.file) + 1, tensor.offset),
                false => (0, at),
            };
            let pieces = tensor.extents().map(|extent| (extent, 0)).collect();
            let (of, offset, len) = (Of::Dense(n), entry.offset, tensor.len);
            self.units.push(Unit { of, offset, len, pieces, elsewhere: experts_only });
            if !experts_only {
                at += tensor.len.next_multiple_of(ALIGN);
            }
        }
        for (n, layer) in layers.iter_mut().enumerate() {
            layer.offset = at;
            for expert in 0..layer.experts() {
                for (part, &(tensor, start)) in layer.parts.iter().enumerate() {
                    let tensor = &model.tensors()[tensor as usize];
                    let len = tensor.len / layer.experts() as u64;
                    let offset = tensor.offset + expert as u64 * len;
                    let pieces = vec![(Extent { file: tensor.file, offset, len }, 0)];
                    let of = Of::Part { layer: n, expert, part };
                    let offset = at + start;
                    self.units.push(Unit { of, offset, len, pieces, elsewhere: false });
                }
                at += layer.stride;
            }
        }
    }

    /// The two sections and the first block, with the units' checksums.
    pub(crate) fn finish(mut self, sums: &[u64], headers: &[Arc<[u8]>]) -> Sections {
        for (unit, &sum) in self.units.iter().zip(sums) {
            match unit.of {
                Of::Dense(n) => self.index.dense[n].checksum = sum,
                Of::Part { layer, expert, part } => {
                    *self.index.layers[layer].checksum(expert, part) = sum;
                }
            }
        }
        let index = self.index.encode();
        let headers = headers.concat();
        let mut sum = Checksum::new();
        sum.update(&headers);
        self.front.headers.checksum = sum.finish();
        self.front.index.checksum = crate::format::checksum(&index);
        Sections { front: self.front, headers, index }
    }
}

/// What is written when all units are.
pub(crate) struct Sections {
    pub(crate) front: Front,
    pub(crate) headers: Vec<u8>,
    pub(crate) index: Vec<u8>,
}

fn end_of(section: &Section) -> u64 {
    section.end().expect("sections of models are shorter than 2^63 bytes")
}

fn index32(index: usize) -> u32 {
    u32::try_from(index).expect("headers bound the number of tensors and files")
}

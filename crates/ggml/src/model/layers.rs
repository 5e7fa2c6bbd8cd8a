//! Which experts of a file go through the pool, and how they lie in it.

use std::collections::{BTreeSet, HashMap};

use tierstream_gguf::experts::MoeLayer;
use tierstream_io::{FileId, PAGE, Reader};

use crate::error::Result;
use crate::residency::{IN_PLACE_LEAST_BYTES, Layer, Part, SlotPart};
use crate::weights::PartRef;

/// What direct reads of the files must be aligned to, in the file and in memory; 1 when none is
/// direct.
pub(super) fn block_bytes(reader: &Reader, files: &[FileId]) -> Result<usize> {
    let mut most = 1;
    for &id in files {
        let file = reader.file(id)?;
        let state = file.direct_state();
        most = most.max(state.offset_align as usize).max(state.mem_align as usize);
    }
    Ok(most)
}

/// The layers whose experts go through the pool, in block order, with classes numbered anew.
pub(super) fn pooled_layers(
    file: &tierstream_gguf::Model,
    experts: &tierstream_gguf::Experts,
    files: &[FileId],
    align: usize,
    skip: &BTreeSet<u32>,
) -> Vec<Layer> {
    let mut classes: Vec<usize> = Vec::new();
    // Chunk experts and layers for multi-token prediction stay with llama.cpp.
    let routed = |l: &&MoeLayer| l.is_streamed() && !skip.contains(&l.layer);
    experts
        .layers()
        .iter()
        .filter(routed)
        .map(|layer| {
            let class = classes.iter().position(|&c| c == layer.class).unwrap_or_else(|| {
                classes.push(layer.class);
                classes.len() - 1
            });
            let in_one_piece = is_in_one_piece(layer);
            let of_record =
                in_one_piece && align > 1 && layer.record_bytes >= IN_PLACE_LEAST_BYTES as u64;
            let part = |part: &tierstream_gguf::experts::Part| {
                let tensor = &file.tensors()[part.tensor];
                let bytes = usize::try_from(part.bytes_per_expert).expect("checked by the reader");
                let ne = |dim| i64::try_from(tensor.dims.ne(dim)).expect("checked by the reader");
                Part {
                    name: tensor.name.clone(),
                    file: files[part.file],
                    offset: part.offset,
                    bytes,
                    stride: part.stride,
                    slot: match of_record {
                        true => SlotPart::of_record(bytes),
                        false => SlotPart::new(part.offset, bytes, align),
                    },
                    type_: tensor.ty.id(),
                    ne: [ne(0), ne(1)],
                }
            };
            Layer {
                block: layer.layer,
                class,
                experts: layer.experts,
                used: layer.used,
                parts: layer.parts.iter().map(part).collect(),
                in_one_piece,
            }
        })
        .collect()
}

/// Whether the parts of a record follow each other in one file, each at a page, with nothing between
/// them that is another record's.
fn is_in_one_piece(layer: &MoeLayer) -> bool {
    let Some(first) = layer.parts.first() else { return false };
    let page = PAGE as u64;
    let mut next = first.offset;
    let follow = layer.parts.iter().all(|part| {
        let follows = (part.file, part.stride, part.offset) == (first.file, first.stride, next);
        next = part.offset + part.bytes_per_expert.next_multiple_of(page);
        follows
    });
    let is_aligned = first.offset.is_multiple_of(page) && first.stride.is_multiple_of(page);
    follow && is_aligned && next - first.offset <= first.stride
}

pub(super) fn names(layers: &[Layer]) -> HashMap<String, PartRef> {
    let parts = |(layer, l): (usize, &Layer)| {
        let name = |(part, p): (usize, &Part)| (p.name.clone(), PartRef { layer, part });
        l.parts.iter().enumerate().map(name).collect::<Vec<_>>()
    };
    layers.iter().enumerate().flat_map(parts).collect()
}

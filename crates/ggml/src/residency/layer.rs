//! What the pool is told of a model: the records of its MoE layers, and how they lie in slots.

use std::sync::Arc;

use tierstream_io::FileId;
use tierstream_pool::{EVEN_CYCLES, LayerSpec, Policy, Pool};

use super::{PAGE, index32};
use crate::abi::*;
use crate::verified::Checksums;

/// Parts smaller than this are read through the ring, where neighbours share a read: another
/// request costs about as much as copying this many bytes.
pub(crate) const IN_PLACE_LEAST_BYTES: usize = 64 << 10;

/// Bytes of finite numbers behind the last slot of a part, zeros until something is there: kernels of
/// GPUs read a row in steps of 256 elements, and so beyond the end of a matrix whose rows are no
/// multiple of that (mmq.cuh, `ITER_K`). What they read there is multiplied by zero.
pub(super) const TAIL_BYTES: usize = 4096;

/// Elements that a row is read in steps of.
const ROW_STEP: i64 = 256;

/// Of a tensor's address, in bytes, as ggml has it (`TENSOR_ALIGNMENT`, ggml.c).
const TENSOR_ALIGNMENT: u64 = 32;

/// One tensor of a layer's records.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Part {
    /// Name of the tensor in the file.
    pub(crate) name: String,
    /// Where expert 0 starts.
    pub(crate) file: FileId,
    /// Byte offset of expert 0 in that file.
    pub(crate) offset: u64,
    /// Bytes of one expert.
    pub(crate) bytes: usize,
    /// Bytes from one expert to the next, in the file.
    pub(crate) stride: u64,
    /// How it lies in a slot.
    pub(crate) slot: SlotPart,
    /// ggml's type of the elements.
    pub(crate) type_: ggml_type,
    /// Elements of a row, rows of one expert.
    pub(crate) ne: [i64; 2],
}

impl Part {
    /// Where an expert begins in the file, bytes.
    pub(super) fn offset_of(&self, expert: u32) -> u64 {
        self.offset + u64::from(expert) * self.stride
    }

    /// Whether kernels may read beyond the end of a record.
    pub(super) fn is_read_beyond(&self) -> bool {
        self.ne[0] % ROW_STEP != 0
    }
}

/// How a part of a record comes to its slot in host memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reading {
    /// In place, with one read for all parts of the record.
    WithRecord,
    /// In place.
    Alone,
    /// By way of the ring.
    ThroughRing,
}

/// How one part of a record lies in its slot. Slots of a class are alike, so that kernels find one
/// at a fixed distance from the next; where a part begins in its slot is the same for all experts
/// of a layer.
///
/// Direct reads bring whole blocks. A part that is read to its slot without a copy has to be off
/// the blocks in memory by as much as it is in the file, and needs room for the rest of its first
/// and last block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SlotPart {
    /// Bytes from one slot to the next.
    pub(crate) stride: usize,
    /// Where the part begins in its slot.
    pub(crate) position: usize,
}

impl SlotPart {
    /// For a part of `bytes` an expert, the first of which is at `offset` of its file, when direct
    /// reads are of blocks of `align` bytes.
    pub(crate) fn new(offset: u64, bytes: usize, align: usize) -> Self {
        if bytes < IN_PLACE_LEAST_BYTES || align == 1 {
            return Self { stride: bytes, position: 0 };
        }
        if bytes.is_multiple_of(align) {
            let phase = if offset.is_multiple_of(TENSOR_ALIGNMENT) { offset } else { 0 };
            return Self { stride: bytes + align, position: phase as usize % align };
        }
        // Experts are off the blocks by different amounts. They all are read in place if the drive
        // takes memory of a finer alignment, else only those that happen to match their slot.
        Self { stride: bytes.next_multiple_of(align) + 2 * align, position: align }
    }

    /// For a part of a record that lies in the file in one piece, each part at a page: then it does so
    /// here, and what lies behind a part in the file has room.
    pub(crate) fn of_record(bytes: usize) -> Self {
        Self { stride: bytes.next_multiple_of(PAGE), position: 0 }
    }

    /// Bytes of so many slots side by side, and of a tail behind them.
    pub(super) fn bytes_of(&self, slots: usize, tail_bytes: usize) -> usize {
        (self.stride * slots + tail_bytes).next_multiple_of(PAGE)
    }

    /// Bytes of the slot behind the part.
    pub(crate) fn room(&self, bytes: usize) -> usize {
        self.stride - self.position - bytes
    }
}

/// The records of one MoE layer.
#[derive(Debug, Clone)]
pub(crate) struct Layer {
    /// Transformer block, `blk.N`.
    pub(crate) block: u32,
    /// Size class: layers of one class share slots.
    pub(crate) class: usize,
    /// Experts of the layer.
    pub(crate) experts: u32,
    /// Experts that one token is routed to.
    pub(crate) used: u32,
    pub(crate) parts: Vec<Part>,
    /// A record is one piece of the file, so that all of it is read at once.
    pub(crate) in_one_piece: bool,
}

impl Layer {
    /// Bytes of one record.
    pub(crate) fn record_bytes(&self) -> u64 {
        self.parts.iter().map(|p| p.bytes as u64).sum()
    }

    /// How the parts of its records are read to slots in host memory.
    pub(super) fn reading(&self, part: usize) -> Reading {
        let alone = self.parts[part].bytes >= IN_PLACE_LEAST_BYTES;
        match self.in_one_piece && self.record_bytes() >= IN_PLACE_LEAST_BYTES as u64 {
            true => Reading::WithRecord,
            false if alone => Reading::Alone,
            false => Reading::ThroughRing,
        }
    }

    /// Bytes that a slot for one record takes.
    pub(crate) fn slot_bytes(&self) -> u64 {
        self.parts.iter().map(|p| p.slot.stride as u64).sum()
    }
}

/// Everything that a pool is made of.
pub(crate) struct Spec {
    pub(crate) layers: Vec<Layer>,
    /// Slots per class.
    pub(crate) slots: Vec<u32>,
    /// On a GPU: how many layers there is room for beside the slots.
    pub(crate) staged: usize,
    pub(crate) policy: Policy,
    pub(crate) seed: u64,
    /// What records are compared with when they are read.
    pub(crate) checksums: Option<Arc<Checksums>>,
}

impl Spec {
    /// Slots that the smallest working pool has, per class.
    pub(crate) fn least_slots(layers: &[Layer]) -> Vec<u32> {
        let classes = layers.iter().map(|l| l.class + 1).max().unwrap_or(0);
        Pool::least_slots(&specs(layers, None), classes)
    }
}

/// With `slots`, the floors for pools of that size; without, the least.
///
/// While a class holds less than [`EVEN_CYCLES`] token cycles its slots are shared out evenly;
/// above, a layer is sure of its top-k only and the rest goes where it is used.
pub(super) fn specs(layers: &[Layer], slots: Option<&[u32]>) -> Vec<LayerSpec> {
    let least = |l: &Layer| l.used.min(l.experts);
    let spec = |l: &Layer| LayerSpec {
        class: index32(l.class),
        experts: l.experts,
        floor: least(l),
        record_bytes: l.record_bytes(),
    };
    let mut specs: Vec<LayerSpec> = layers.iter().map(spec).collect();
    for (class, &have) in slots.unwrap_or_default().iter().enumerate() {
        let same = || layers.iter().enumerate().filter(move |(_, l)| l.class == class);
        let cycle: u32 = same().map(|(_, l)| least(l)).sum();
        let experts: Vec<u32> = same().map(|(_, l)| l.experts).collect();
        // These add up to all slots, so that no record leaves its layer's region and windows stay
        // narrow.
        let shares = Pool::even_shares(&experts, have);
        let enough = same().zip(&shares).all(|((_, l), &share)| share >= least(l));
        if have < EVEN_CYCLES * cycle && enough {
            for ((index, _), share) in same().zip(shares) {
                specs[index].floor = share;
            }
        }
    }
    specs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_lies_off_the_blocks_as_it_does_in_the_file() {
        let part = SlotPart::new(5 * 512 + 96, 884_736, 512);
        assert_eq!(part, SlotPart { stride: 884_736 + 512, position: 96 });
        // Every expert of the layer, in any slot.
        for (expert, slot) in [(0, 7), (3, 0), (63, 63)] {
            let in_file = 5 * 512 + 96 + expert * 884_736;
            let in_memory = slot * part.stride + part.position;
            assert_eq!(in_file % 512, in_memory % 512);
        }
        // The last block ends within the slot.
        assert!(part.position + 884_736 + (512 - 96) <= part.stride);
    }

    #[test]
    fn experts_that_are_no_whole_blocks_have_room_on_both_sides() {
        // MXFP4, 2880 x 2880: a multiple of 128.
        let part = SlotPart::new(96, 4_406_400, 512);
        assert!(part.position >= 511 && part.room(4_406_400) >= 511, "{part:?}");
        assert!(part.stride.is_multiple_of(512));
    }

    #[test]
    fn small_parts_and_buffered_files_are_packed() {
        assert_eq!(SlotPart::new(96, 18_432, 512), SlotPart { stride: 18_432, position: 0 });
        assert_eq!(SlotPart::new(96, 1 << 20, 1), SlotPart { stride: 1 << 20, position: 0 });
    }
}

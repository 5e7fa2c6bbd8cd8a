//! From the size of a pool to slots per class.

use crate::error::{Error, Result};
use crate::residency::{Layer, Spec};

/// Size of the expert pool.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum PoolSize {
    /// At most this many bytes.
    Bytes(u64),
    /// This share of all records, 0 to 1, rounded up to whole records in each size class, and to
    /// what a token needs in it.
    Share(f64),
}

/// Slots that hold every record, per class.
pub(crate) fn all_slots(layers: &[Layer]) -> Vec<u32> {
    let mut slots = vec![0; layers.iter().map(|l| l.class + 1).max().unwrap_or(0)];
    for layer in layers {
        slots[layer.class] += layer.experts;
    }
    slots
}

/// Bytes of `slots` slots per class.
pub(crate) fn pool_bytes(layers: &[Layer], slots: &[u32]) -> u64 {
    let bytes = |(class, &n): (usize, &u32)| {
        let layer = layers.iter().find(|l| l.class == class);
        layer.map_or(0, |l| l.slot_bytes() * u64::from(n))
    };
    slots.iter().enumerate().map(bytes).sum()
}

/// The most slots per class, shared out as [`slots_for`] does, of which `fits` says that they fit;
/// the least if none do.
pub(crate) fn slots_within(layers: &[Layer], fits: impl Fn(&[u32]) -> bool) -> Vec<u32> {
    let least = Spec::least_slots(layers);
    let shared =
        |bytes| slots_for(layers, PoolSize::Bytes(bytes)).unwrap_or_else(|_| least.clone());
    let (mut fit, mut most) = (pool_bytes(layers, &least), pool_bytes(layers, &all_slots(layers)));
    while fit < most {
        let bytes = fit + (most - fit).div_ceil(2);
        if fits(&shared(bytes)) { fit = bytes } else { most = bytes - 1 }
    }
    shared(fit)
}

/// Shares a budget out between the size classes: each gets its floor and a share of the rest in
/// proportion to its bytes.
pub(super) fn slots_for(layers: &[Layer], size: PoolSize) -> Result<Vec<u32>> {
    let all = all_slots(layers);
    let least = Spec::least_slots(layers);
    let (whole, floor) = (pool_bytes(layers, &all), pool_bytes(layers, &least));
    let bytes = match size {
        PoolSize::Share(share) => {
            let slots = |&n: &u32| ((f64::from(n) * share).ceil() as u32).min(n);
            let slots: Vec<u32> = all.iter().map(slots).collect();
            let bytes = pool_bytes(layers, &slots);
            if bytes < floor {
                return Err(Error::PoolTooSmall { bytes, least_bytes: floor });
            }
            // A class of few experts may need a larger share than the others.
            return Ok(slots.iter().zip(&least).map(|(&have, &least)| have.max(least)).collect());
        }
        PoolSize::Bytes(bytes) if bytes < floor => {
            return Err(Error::PoolTooSmall { bytes, least_bytes: floor });
        }
        PoolSize::Bytes(bytes) => bytes.min(whole),
    };
    // In integers: a rounded share could come out one slot above the budget.
    let (over, most) = (u128::from(bytes - floor), u128::from((whole - floor).max(1)));
    let slots = |(&all, &least): (&u32, &u32)| {
        let more = u128::from(all - least) * over / most;
        least + u32::try_from(more).expect("at most `all`")
    };
    Ok(all.iter().zip(&least).map(slots).collect())
}

#[cfg(test)]
mod tests {
    use tierstream_io::FileId;

    use super::*;
    use crate::abi::GGML_TYPE_F32;
    use crate::residency::{Part, SlotPart};

    /// Two layers of 64 records of 300 bytes, and one of 8 of 1000, of which a token uses 6.
    fn layers() -> Vec<Layer> {
        let layer = |block, class, experts, used, bytes| Layer {
            block,
            class,
            experts,
            used,
            parts: vec![Part {
                name: format!("blk.{block}.ffn_up_exps.weight"),
                file: FileId(0),
                offset: 0,
                bytes,
                stride: bytes as u64,
                slot: SlotPart::new(0, bytes, 512),
                type_: GGML_TYPE_F32,
                ne: [1, 1],
            }],
            in_one_piece: false,
        };
        vec![layer(0, 0, 64, 8, 300), layer(1, 1, 8, 6, 1000), layer(2, 0, 64, 8, 300)]
    }

    #[test]
    fn a_share_gives_each_class_at_least_what_a_token_needs() {
        let layers = layers();
        let slots = |share| slots_for(&layers, PoolSize::Share(share));
        assert_eq!(slots(1.0).unwrap(), [128, 8]);
        assert_eq!(slots(0.9).unwrap(), [116, 8]);
        // 4 of 8 records are fewer than the 6 of one token, but the other class has plenty.
        assert_eq!(slots(0.5).unwrap(), [64, 6]);
        assert_eq!(slots(0.25).unwrap(), [32, 6]);
        // The floor is 16 * 300 + 6 * 1000 bytes.
        match slots(0.2) {
            Err(Error::PoolTooSmall { bytes, least_bytes }) => {
                assert_eq!((bytes, least_bytes), (26 * 300 + 2 * 1000, 10_800));
            }
            other => panic!("{other:?}"),
        }
    }
}

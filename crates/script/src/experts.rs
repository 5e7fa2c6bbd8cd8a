//! Experts that a scripted model says it has: which ones a token is routed to depends on it alone.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tierstream_server::engine::{Counters, LayerCounters, Token};

/// Layers with experts; the first of all layers has none.
const LAYERS: u32 = 6;
const EXPERTS: u32 = 16;
/// Experts of a layer that a token is routed to.
const USED: u32 = 2;
/// Of each layer, the first ones are in memory.
const IN_MEMORY: u32 = 8;
const EXPERT_BYTES: u64 = 1 << 16;

/// What happened to them.
#[derive(Debug)]
pub(super) struct Experts {
    layers: Mutex<Vec<LayerCounters>>,
}

impl Default for Experts {
    fn default() -> Self {
        let layer = |block| LayerCounters {
            block,
            uses: vec![0; EXPERTS as usize],
            ..LayerCounters::default()
        };
        Self { layers: Mutex::new((1..=LAYERS).map(layer).collect()) }
    }
}

impl Experts {
    fn lock(&self) -> MutexGuard<'_, Vec<LayerCounters>> {
        self.layers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A token is computed.
    pub(super) fn route(&self, token: Token) {
        for layer in &mut *self.lock() {
            for rank in 0..USED {
                // Neighbours in a product that wraps are far from each other: tokens spread.
                let mixed = (token.unsigned_abs() + layer.block * 31 + rank * 7)
                    .wrapping_mul(0x9e37_79b1)
                    .rotate_left(13);
                let expert = mixed % EXPERTS;
                layer.uses[expert as usize] += 1;
                match expert < IN_MEMORY {
                    true => layer.from_ram += 1,
                    false => layer.from_drive += 1,
                }
            }
        }
    }

    pub(super) fn layers(&self) -> Vec<LayerCounters> {
        self.lock().clone()
    }

    pub(super) fn counters(&self) -> Counters {
        let layers = self.lock();
        let reads = layers.iter().map(|layer| layer.from_drive).sum();
        let per_layer = u64::from(LAYERS) * EXPERT_BYTES;
        Counters {
            from_ram: layers.iter().map(|layer| layer.from_ram).sum(),
            from_drive: reads,
            reads,
            bytes_read: reads * EXPERT_BYTES,
            drive_bytes: reads * EXPERT_BYTES,
            ram_pool_bytes: u64::from(IN_MEMORY) * per_layer,
            ram_filled_bytes: u64::from(IN_MEMORY) * per_layer,
            expert_bytes: u64::from(EXPERTS) * per_layer,
            ..Counters::default()
        }
    }
}

//! All records at once, when a model is loaded.

use std::collections::VecDeque;
use std::sync::{Arc, PoisonError};

use tierstream_io::{FileId, Priority};
use tierstream_pool::Lookup;

use super::{Layer, Need, Residency, Step, record};
use crate::cached::{Cached, FromCache};
use crate::error::{Error, Result};

/// So much is queued while a layer that has arrived is settled, and the next one's memory is mapped:
/// with less the drive would run dry between the layers of a small model.
const QUEUED_LEAST_BYTES: u64 = 256 << 20;

impl Residency {
    /// Reads every record into its slot, in file order, if all fit; then kernels find each
    /// layer's experts in expert order and no look-up is needed. Where memory is short, only as many
    /// as there turns out to be room for. What the page cache has of `files` comes from there.
    /// `progress` gets bytes done. Returns what the page cache had, and why it was not asked.
    pub(crate) fn load_all(
        self: &Arc<Self>,
        files: &[FileId],
        progress: &mut dyn FnMut(u64) -> bool,
    ) -> Result<(FromCache, Option<String>)> {
        let cached = Cached::new(&self.reader, files)?;
        let mut done = 0;
        let mut finish = |layer: usize, step: Step| -> Result<()> {
            for load in 0..step.arriving().len() {
                step.arrived(load)?;
            }
            let records: usize = step.arriving().iter().map(Vec::len).sum();
            step.finish()?;
            done += records as u64 * self.layers[layer].record_bytes();
            if progress(done) { Ok(()) } else { Err(Error::Cancelled) }
        };
        // Later layers' reads are queued before the oldest one's are waited for.
        let bytes = |layer: usize| layer_record_bytes(&self.layers[layer]);
        let mut under_way: VecDeque<(usize, Step)> = VecDeque::new();
        let mut queued = 0;
        for (index, layer) in self.layers.iter().enumerate() {
            let need: Vec<Need> =
                (0..layer.experts).map(|expert| Need { expert, last_row: 0 }).collect();
            let mut step = match self.try_acquire(index, &need, None, &|| false) {
                Err(error @ Error::OutOfGpuMemory(_)) => {
                    for (layer, step) in under_way {
                        finish(layer, step)?;
                    }
                    self.give_way(error, 0, 0, &|| false)?;
                    return Ok((cached.taken(), cached.why()));
                }
                acquired => acquired?,
            };
            let parts: Vec<usize> = (0..layer.parts.len()).collect();
            for group in 0..step.arriving().len() {
                step.load_from(&parts, group, Priority::Bulk, &|extent| cached.source(extent));
            }
            under_way.push_back((index, step));
            queued += bytes(index);
            while let Some(&(oldest, _)) = under_way.front()
                && queued - bytes(oldest) >= QUEUED_LEAST_BYTES
                && let Some((layer, step)) = under_way.pop_front()
            {
                queued -= bytes(layer);
                finish(layer, step)?;
            }
        }
        for (layer, step) in under_way {
            finish(layer, step)?;
        }
        let pool = self.lock();
        let slot = |layer, expert| match pool.peek(record(layer, expert)) {
            Lookup::Resident(slot) => Some(slot.index),
            _ => None,
        };
        let in_order = |(layer, spec): (usize, &Layer)| {
            let base = slot(layer, 0)?;
            (0..spec.experts).all(|e| slot(layer, e) == Some(base + e)).then_some(base)
        };
        let identity = self.layers.iter().enumerate().map(in_order).collect();
        drop(pool);
        *self.identity.write().unwrap_or_else(PoisonError::into_inner) = identity;
        Ok((cached.taken(), cached.why()))
    }
}

/// Bytes of all records of a layer, as they are read.
fn layer_record_bytes(layer: &Layer) -> u64 {
    layer.record_bytes() * u64::from(layer.experts)
}

//! What a pool has done so far.

use std::sync::atomic::Ordering;

use tierstream_pool::LayerCounters;

use super::{Residency, index32};

/// Sums over all layers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ExpertCounters {
    /// Records asked for: one per layer, batch and distinct expert; with a preloaded pool one per
    /// layer, token and selected expert, since ids are not read back then.
    pub requests: u64,
    /// Of those, resident (or on their way for another context).
    pub hits: u64,
    /// Of those, missing in the pool.
    pub faults: u64,
    /// Served by the pool below, in host memory: of the faults, whose others are read, and of what was
    /// brought ahead for nobody.
    pub ram_hits: u64,
    /// Of the records that were not in the GPU's memory, those that the processor computed with.
    pub computed: u64,
    /// Records that gave their slot to another.
    pub evictions: u64,
    /// Bytes of the records that were read.
    pub bytes_read: u64,
    /// Bytes of the records that came into the pool: those that were read, and on a GPU those from
    /// the pool below.
    pub bytes_brought: u64,
    /// Records asked for at least once.
    pub first_touches: u64,
    /// Records brought before they were asked for.
    pub read_ahead: u64,
    /// Of those, asked for by the batch that they were brought for: hits, or faults where whole layers
    /// are brought beside the slots.
    pub read_ahead_used: u64,
}

impl ExpertCounters {
    /// What was counted since `before`.
    pub fn since(&self, before: &ExpertCounters) -> ExpertCounters {
        ExpertCounters {
            requests: self.requests - before.requests,
            hits: self.hits - before.hits,
            faults: self.faults - before.faults,
            ram_hits: self.ram_hits - before.ram_hits,
            computed: self.computed - before.computed,
            evictions: self.evictions - before.evictions,
            bytes_read: self.bytes_read - before.bytes_read,
            bytes_brought: self.bytes_brought - before.bytes_brought,
            first_touches: self.first_touches - before.first_touches,
            read_ahead: self.read_ahead - before.read_ahead,
            read_ahead_used: self.read_ahead_used - before.read_ahead_used,
        }
    }

    /// Hits per request, 0 to 1; none when nothing was requested.
    pub fn hit_rate(&self) -> Option<f64> {
        (self.requests > 0).then(|| self.hits as f64 / self.requests as f64)
    }
}

/// What happened to the experts of one layer so far.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LayerUse {
    /// Its number among all layers of the model.
    pub block: u32,
    /// Records asked for that were in the GPU's memory.
    pub from_vram: u64,
    /// Those that were in host memory.
    pub from_ram: u64,
    /// Those that were read.
    pub from_drive: u64,
    /// How often each expert was asked for, modulo 2^32. Empty while all records are resident and nobody
    /// looks at the routing.
    pub uses: Vec<u32>,
}

impl Residency {
    pub(crate) fn counters(&self) -> ExpertCounters {
        let resident = self.resident_requests.iter().map(|n| n.load(Ordering::Relaxed)).sum();
        let mut sum =
            ExpertCounters { requests: resident, hits: resident, ..ExpertCounters::default() };
        sum.read_ahead = self.read_ahead.load(Ordering::Relaxed);
        sum.read_ahead_used = self.read_ahead_used.load(Ordering::Relaxed);
        sum.computed = self.computed.load(Ordering::Relaxed);
        let pool = self.lock();
        for c in pool.counters() {
            sum.requests += c.requests;
            sum.hits += c.hits + c.hits_in_flight;
            sum.faults += c.faults;
            sum.evictions += c.evictions;
            sum.bytes_brought += c.bytes_faulted;
            sum.first_touches += c.first_touches;
        }
        sum.bytes_brought -= self.not_brought_bytes.load(Ordering::Relaxed);
        drop(pool);
        sum.bytes_read = sum.bytes_brought;
        if let Some(below) = &self.below {
            let below = below.counters();
            (sum.ram_hits, sum.bytes_read) = (below.hits, below.bytes_read);
        }
        sum
    }

    /// By layer. Locks the pool for as long as a copy of its counters takes.
    pub(crate) fn layer_uses(&self) -> Vec<LayerUse> {
        let is_identity = self.identity().is_some();
        let below = self.below.as_ref().map(|below| below.lock().counters().to_vec());
        let found = |c: &LayerCounters| c.hits + c.hits_in_flight;
        let pool = self.lock();
        let of = |(index, layer): (usize, &super::Layer)| {
            let counters = &pool.counters()[index];
            let resident = self.resident_requests[index].load(Ordering::Relaxed);
            let hits = found(counters) + resident;
            // What was brought ahead for nobody counts there, too.
            let below = below.as_ref().map_or(0, |all| found(&all[index]).min(counters.faults));
            let (from_vram, from_ram) =
                if self.elastic.is_some() { (hits, below) } else { (0, hits) };
            LayerUse {
                block: layer.block,
                from_vram,
                from_ram,
                from_drive: counters.faults - below,
                uses: if is_identity { Vec::new() } else { pool.uses(index32(index)).to_vec() },
            }
        };
        self.layers.iter().enumerate().map(of).collect()
    }
}

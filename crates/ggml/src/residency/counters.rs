//! What a pool has done so far.

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

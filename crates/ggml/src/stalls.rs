//! How long computing waited for expert records.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Waits by the time that they took: so many up to each of [`STALL_BOUNDS`], and longer ones.
#[derive(Debug, Default)]
pub struct Stalls {
    counts: [AtomicU64; STALL_BOUNDS.len() + 1],
    ns: AtomicU64,
}

/// Bounds of [`Stalls`]: from what a copy in memory takes to what a drive does that is in trouble.
pub const STALL_BOUNDS: [Duration; 10] = [
    Duration::from_micros(16),
    Duration::from_micros(64),
    Duration::from_micros(256),
    Duration::from_millis(1),
    Duration::from_millis(4),
    Duration::from_millis(16),
    Duration::from_millis(64),
    Duration::from_millis(256),
    Duration::from_secs(1),
    Duration::from_secs(4),
];

impl Stalls {
    pub(crate) fn add(&self, waited: Duration) {
        let at = STALL_BOUNDS.partition_point(|&bound| bound < waited);
        self.counts[at].fetch_add(1, Ordering::Relaxed);
        let ns = u64::try_from(waited.as_nanos()).unwrap_or(u64::MAX);
        self.ns.fetch_add(ns, Ordering::Relaxed);
    }

    /// Waits up to the first of [`STALL_BOUNDS`], from there up to the second, and so on; the last are longer than
    /// all of them.
    pub fn counts(&self) -> [u64; STALL_BOUNDS.len() + 1] {
        std::array::from_fn(|at| self.counts[at].load(Ordering::Relaxed))
    }

    /// All of them together.
    pub fn total(&self) -> Duration {
        Duration::from_nanos(self.ns.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_are_counted_up_to_their_bound() {
        let stalls = Stalls::default();
        for micros in [0, 16, 17, 1000, 1001, 4_000_000, 4_000_001] {
            stalls.add(Duration::from_micros(micros));
        }
        assert_eq!(stalls.counts(), [2, 1, 0, 1, 1, 0, 0, 0, 0, 1, 1]);
        assert_eq!(stalls.total(), Duration::from_micros(8_002_035));
    }
}

//! Drives a pool as an engine does that reads one record at a time.

use tierstream_pool::{Lookup, Pool, Record};

/// One step: requests the experts of a layer, loads those that are missing, lets go of all.
/// Returns the number of hits.
pub(crate) fn step(pool: &mut Pool, layer: u32, experts: &[u32]) -> usize {
    pool.begin_step();
    let mut pinned = Vec::new();
    let mut missing = Vec::new();
    for &expert in experts {
        let record = Record { layer, expert };
        match pool.request(record) {
            Lookup::Resident(slot) => pinned.push(slot),
            Lookup::Loading(_) => unreachable!("nobody else loads here"),
            Lookup::Absent => missing.push(record),
        }
    }
    let hits = pinned.len();
    for record in missing {
        let slot = pool.reserve(record).expect("the floor covers the top-k").slot;
        pool.commit(slot);
        pinned.push(slot);
    }
    pinned.into_iter().for_each(|slot| pool.unpin(slot));
    hits
}

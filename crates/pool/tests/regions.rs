//! Where a layer's records lie: in its region, as far as the crate's front page promises.

mod common;

use std::ops::Range;

use common::step;
use proptest::prelude::*;
use tierstream_pool::{Config, LayerSpec, Lookup, Policy, Pool, Record};

/// One class, `floors` for its layers.
fn pool(experts: &[u32], floors: &[u32], slots: u32, policy: Policy) -> Pool {
    let layers = experts.iter().zip(floors).map(|(&experts, &floor)| LayerSpec {
        class: 0,
        experts,
        floor,
        record_bytes: 1,
    });
    Pool::new(Config { layers: layers.collect(), slots: vec![slots], policy, seed: 5 }).unwrap()
}

fn regions(experts: &[u32], slots: u32) -> Vec<Range<u32>> {
    let mut end = 0;
    let region = |share| {
        let start = end;
        end += share;
        start..end
    };
    Pool::even_shares(experts, slots).into_iter().map(region).collect()
}

fn at(pool: &Pool, record: Record) -> Option<u32> {
    match pool.peek(record) {
        Lookup::Resident(slot) | Lookup::Loading(slot) => Some(slot.index),
        Lookup::Absent => None,
    }
}

/// All records that have a slot, and which.
fn held(pool: &Pool, experts: &[u32]) -> Vec<(Record, u32)> {
    let records = (0u32..)
        .zip(experts)
        .flat_map(|(layer, &experts)| (0..experts).map(move |expert| Record { layer, expert }));
    records.filter_map(|record| Some((record, at(pool, record)?))).collect()
}

fn policies() -> impl Strategy<Value = Policy> {
    prop::sample::select(&Policy::ALL)
}

fn experts() -> impl Strategy<Value = Vec<u32>> {
    prop::collection::vec(1u32..20, 1..6)
}

/// Layer and first expert of a step, and what happens after it.
type Step = (usize, u32, u8);

fn steps() -> impl Strategy<Value = Vec<Step>> {
    prop::collection::vec((any::<usize>(), any::<u32>(), 0u8..20), 1..120)
}

/// Runs a step of up to `most` experts; now and then forgets a layer, a record, or everything, or
/// has a load fail with nobody waiting.
fn run(pool: &mut Pool, experts: &[u32], most: impl Fn(usize) -> u32, (layer, first, then): Step) {
    let local = layer % experts.len();
    let (layer, count) = (local as u32, experts[local]);
    let wanted: Vec<_> = (0..most(local)).map(|i| (first.wrapping_add(i)) % count).collect();
    step(pool, layer, &wanted);
    match then {
        0 => {
            for expert in 0..count {
                pool.evict(Record { layer, expert });
            }
        }
        1 => drop(pool.evict(Record { layer, expert: first % count })),
        2 => drop(pool.clear()),
        3 => {
            let record = Record { layer, expert: first.wrapping_add(count / 2) % count };
            if at(pool, record).is_none()
                && let Some(given) = pool.reserve(record)
            {
                pool.abandon(given.slot);
            }
        }
        _ => {}
    }
}

#[test]
fn a_full_pool_that_is_filled_in_order_is_the_model_file() {
    let experts = [3, 128, 64, 1];
    for spare in [0, 1, 1_000] {
        let mut pool = pool(&experts, &[1; 4], 196 + spare, Policy::Lru);
        let mut next = 0;
        for (layer, &experts) in (0u32..).zip(&experts) {
            for expert in 0..experts {
                let given = pool.reserve(Record { layer, expert }).unwrap();
                assert_eq!((given.slot.index, given.evicted), (next, None));
                pool.commit(given.slot);
                next += 1;
            }
        }
    }
}

#[test]
fn a_failed_load_that_is_waited_for_is_the_exception() {
    let mut pool = pool(&[2, 2], &[2, 2], 4, Policy::Lru);
    let record = Record { layer: 0, expert: 0 };
    let failed = pool.reserve(record).unwrap().slot;
    pool.request(record);
    pool.abandon(failed);
    assert_eq!(pool.reserve(record).unwrap().slot.index, 1);
    assert_eq!(pool.reserve(Record { layer: 0, expert: 1 }).unwrap().slot.index, 2);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

    #[test]
    fn a_full_pool_has_one_place_per_record(
        policy in policies(), experts in experts(), spare in 0u32..3, steps in steps(),
    ) {
        let slots = experts.iter().sum::<u32>() + spare;
        let mut pool = pool(&experts, &vec![0; experts.len()], slots, policy);
        let homes = regions(&experts, slots);
        for step in steps {
            run(&mut pool, &experts, |layer| experts[layer].min(8), step);
            for (record, slot) in held(&pool, &experts) {
                prop_assert_eq!(slot, homes[record.layer as usize].start + record.expert);
            }
        }
        prop_assert_eq!(pool.counters().iter().map(|c| c.evictions).sum::<u64>(), 0);
    }

    #[test]
    fn with_even_shares_as_floors_no_record_leaves_its_region(
        policy in policies(), experts in experts(), part in 0u32..100, steps in steps(),
    ) {
        let slots = (experts.iter().sum::<u32>() * part / 100).max(1);
        let shares = Pool::even_shares(&experts, slots);
        let mut pool = pool(&experts, &shares, slots, policy);
        let homes = regions(&experts, slots);
        for step in steps {
            run(&mut pool, &experts, |layer| shares[layer], step);
            for (record, slot) in held(&pool, &experts) {
                prop_assert!(homes[record.layer as usize].contains(&slot));
            }
        }
    }

    /// A pool that has been of another size, and is cleared, lays records out as a new one does.
    #[test]
    fn a_resized_pool_is_in_order_again_when_it_is_cleared(
        experts in experts(), sizes in prop::collection::vec(1u32..60, 1..4), steps in steps(),
    ) {
        let floors = |slots| Pool::even_shares(&experts, slots);
        let mut resized = pool(&experts, &floors(sizes[0]), sizes[0], Policy::Lru);
        let mut size = sizes[0];
        for (index, &step) in steps.iter().enumerate() {
            let now = sizes[index * sizes.len() / steps.len()];
            if now != size {
                size = now;
                resized.resize(&[size], &floors(size)).unwrap();
            }
            run(&mut resized, &experts, |layer| floors(size)[layer], step);
        }
        resized.clear();
        let mut new = pool(&experts, &floors(size), size, Policy::Lru);
        for step in steps {
            run(&mut resized, &experts, |layer| floors(size)[layer], step);
            run(&mut new, &experts, |layer| floors(size)[layer], step);
            prop_assert_eq!(held(&resized, &experts), held(&new, &experts));
        }
    }

    /// With any floors: a free slot is taken from the region as long as it has one.
    #[test]
    fn free_slots_of_the_region_go_first(
        policy in policies(), experts in experts(), more in 0u32..40, steps in steps(),
    ) {
        let slots = experts.len() as u32 + more;
        let mut pool = pool(&experts, &vec![1; experts.len()], slots, policy);
        let homes = regions(&experts, slots);
        for step in steps {
            run(&mut pool, &experts, |_| 1, step);
            let taken: Vec<_> = held(&pool, &experts).into_iter().map(|(_, slot)| slot).collect();
            for (layer, home) in (0u32..).zip(&homes) {
                let record = (0..experts[layer as usize]).map(|expert| Record { layer, expert });
                let Some(record) = record.into_iter().find(|&r| at(&pool, r).is_none()) else {
                    continue;
                };
                let Some(given) = pool.clone().reserve(record) else { continue };
                if given.evicted.is_none() && home.clone().any(|slot| !taken.contains(&slot)) {
                    prop_assert!(home.contains(&given.slot.index));
                }
            }
        }
    }
}

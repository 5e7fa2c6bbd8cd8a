//! The floor-and-overflow rule, pins and failed loads, by example.

mod common;

use common::step;
use tierstream_pool::{
    Config, Error, LayerCounters, LayerSpec, Lookup, Policy, Pool, Record, Slot,
};

const SIX: LayerSpec = LayerSpec { class: 0, experts: 64, floor: 8, record_bytes: 100 };

fn pool(layers: Vec<LayerSpec>, slots: Vec<u32>, policy: Policy) -> Pool {
    Pool::new(Config { layers, slots, policy, seed: 1 }).unwrap()
}

fn record(layer: u32, expert: u32) -> Record {
    Record { layer, expert }
}

fn load(pool: &mut Pool, record: Record) -> Slot {
    let slot = pool.reserve(record).unwrap().slot;
    pool.commit(slot);
    slot
}

/// Loads experts of a layer, each in a step of its own, and unpins them.
fn fill(pool: &mut Pool, layer: u32, experts: std::ops::Range<u32>) {
    for expert in experts {
        pool.begin_step();
        let slot = load(pool, record(layer, expert));
        pool.unpin(slot);
    }
}

fn total(pool: &Pool) -> LayerCounters {
    pool.counters().iter().copied().sum()
}

/// A token of six layers, eight experts each, that differ between even and odd tokens by `moved`.
fn token(pool: &mut Pool, token: u32, moved: u32) -> usize {
    let experts = |layer| (0..8).map(move |i| (layer + i + token % 2 * moved) % 64);
    (0..6).map(|layer| step(pool, layer, &experts(layer).collect::<Vec<_>>())).sum()
}

#[test]
fn at_the_floor_a_repeating_token_hits_where_a_global_lru_does_not() {
    let mut floors = pool(vec![SIX; 6], vec![48], Policy::Lru);
    assert_eq!(token(&mut floors, 0, 0), 0);
    assert_eq!(token(&mut floors, 1, 0), 48);
    assert_eq!(token(&mut floors, 2, 2), 48);
    assert_eq!(token(&mut floors, 3, 2), 36); // 6 of 8 experts overlap

    // One layer's experts less than a token cycle: the oldest are always those that come next.
    let global = LayerSpec { floor: 0, ..SIX };
    let mut global = pool(vec![global; 6], vec![40], Policy::Lru);
    assert_eq!((0..20).map(|t| token(&mut global, t, 0)).sum::<usize>(), 0);

    // The same slots with floors of 6 and 4 slots to share.
    let smaller = LayerSpec { floor: 6, ..SIX };
    for policy in Policy::ALL {
        let mut smaller = pool(vec![smaller; 6], vec![40], policy);
        token(&mut smaller, 0, 0);
        assert!((1..20).all(|t| token(&mut smaller, t, 0) >= 36), "{policy}");
    }
}

#[test]
fn a_quarter_of_the_experts_serves_two_alternating_tokens_under_every_policy() {
    for policy in Policy::ALL {
        let mut pool = pool(vec![SIX; 6], vec![96], policy);
        token(&mut pool, 0, 8);
        token(&mut pool, 1, 8);
        for t in 2..10 {
            assert_eq!(token(&mut pool, t, 8), 48, "{policy}, token {t}");
        }
        let total = total(&pool);
        assert_eq!((total.requests, total.faults, total.evictions), (480, 96, 0));
        assert_eq!((total.first_touches, total.bytes_faulted), (96, 9_600));
        assert_eq!(pool.resident_bytes(), 9_600);
    }
}

#[test]
fn the_overflow_goes_to_the_layer_that_needs_it() {
    // Layers 1-5 always want the same 8 experts, layer 0 wants 24 in turns: 64 slots hold both.
    let mut pool = pool(vec![SIX; 6], vec![64], Policy::Lru);
    for turn in 0..30u32 {
        let first = turn % 3 * 8;
        step(&mut pool, 0, &(first..first + 8).collect::<Vec<_>>());
        (1..6).for_each(|layer| {
            step(&mut pool, layer, &[0, 1, 2, 3, 4, 5, 6, 7]);
        });
    }
    assert_eq!(total(&pool).faults, 24 + 5 * 8);
    assert_eq!(pool.resident(0), 24);
}

#[test]
fn free_slots_are_held_back_for_floors_that_are_not_reached() {
    let mut pool = pool(vec![SIX; 6], vec![50], Policy::Lru);
    assert_eq!(pool.reservable(0), 10);
    let slots: Vec<_> = (0..10).map(|expert| load(&mut pool, record(0, expert))).collect();
    assert_eq!(pool.reserve(record(0, 10)), None); // 40 slots are free, and not for layer 0
    assert_eq!((pool.reservable(0), pool.reservable(1)), (0, 8));
    pool.unpin(slots[3]);
    let given = pool.reserve(record(0, 10)).unwrap();
    assert_eq!((given.slot, given.evicted), (slots[3], Some(record(0, 3))));
    pool.commit(given.slot);

    fill(&mut pool, 1, 0..8);
    assert_eq!(pool.reservable(1), 8); // its own; those of layer 0 are pinned
    slots.into_iter().for_each(|slot| pool.unpin(slot));
    assert_eq!(pool.reservable(1), 8 + 2);
}

#[test]
fn a_layer_at_its_floor_loses_nothing_to_others() {
    let mut pool = pool(vec![SIX; 2], vec![20], Policy::Lru);
    fill(&mut pool, 0, 0..12); // 4 above its floor
    fill(&mut pool, 1, 0..8);
    for expert in 8..40 {
        fill(&mut pool, 1, expert..expert + 1);
        assert!(pool.resident(0) >= 8);
    }
    assert_eq!((pool.resident(0), pool.resident(1)), (8, 12));
    assert_eq!(pool.counters()[0].evictions, 4);
    let left = (0..SIX.experts).filter(|&expert| pool.peek(record(0, expert)) != Lookup::Absent);
    assert!(left.eq(4..12));
}

#[test]
fn records_of_this_step_go_last() {
    for policy in Policy::ALL {
        let layer = LayerSpec { floor: 2, ..SIX };
        let mut pool = pool(vec![layer], vec![3], policy);
        pool.begin_step();
        fill(&mut pool, 0, 0..3);
        pool.begin_step();
        for expert in [0, 2] {
            let Lookup::Resident(slot) = pool.request(record(0, expert)) else { unreachable!() };
            pool.unpin(slot);
        }
        let evicted: Vec<_> = (3..6)
            .map(|expert| pool.reserve(record(0, expert)).unwrap().evicted.unwrap().expert)
            .collect();
        assert_eq!(evicted[0], 1, "{policy}");
        assert!(evicted[1..] == [0, 2] || evicted[1..] == [2, 0], "{policy}");
        assert_eq!(pool.reserve(record(0, 6)), None, "{policy}");
    }
}

#[test]
fn classes_do_not_mix() {
    let small = LayerSpec { floor: 2, ..SIX };
    let large = LayerSpec { class: 1, floor: 2, record_bytes: 1_000, ..SIX };
    // Layer 1 is alone in its class.
    let mut pool = pool(vec![small, large, small], vec![6, 4], Policy::Lru);
    fill(&mut pool, 1, 0..4);
    fill(&mut pool, 0, 0..4);
    fill(&mut pool, 2, 0..2);
    for (layer, experts, expected) in [(0, 4, 0), (1, 4, 1), (2, 2, 0)] {
        let class_of = |expert| match pool.peek(record(layer, expert)) {
            Lookup::Resident(slot) => slot.class,
            other => panic!("{other:?}"),
        };
        assert!((0..experts).all(|expert| class_of(expert) == expected));
    }
    assert_eq!(pool.resident_bytes(), 4 * 1_000 + 6 * 100);
    assert_eq!(pool.reserve(record(1, 9)).unwrap().evicted, Some(record(1, 0)));
    assert_eq!(pool.reserve(record(2, 9)).unwrap().evicted, Some(record(0, 0)));
    assert_eq!(Pool::least_slots(&[small, large, small], 2), [4, 2]);
}

#[test]
fn a_floor_is_at_most_the_experts() {
    let few = LayerSpec { experts: 3, ..SIX };
    assert_eq!(Pool::least_slots(&[few, SIX], 1), [11]);
    let mut pool = pool(vec![few, SIX], vec![11], Policy::Lru);
    fill(&mut pool, 1, 0..8);
    fill(&mut pool, 0, 0..3);
    assert_eq!((pool.resident(0), pool.resident(1)), (3, 8));
}

#[test]
fn floors_that_do_not_fit_are_refused_with_the_least() {
    let config = Config { layers: vec![SIX; 6], slots: vec![47], policy: Policy::Lru, seed: 0 };
    let least_bytes_total = 48 * 100;
    let expected =
        Error::FloorsDoNotFit { class: 0, slots: 47, least_slots: 48, least_bytes_total };
    assert_eq!(Pool::new(config).unwrap_err(), expected);
}

#[test]
fn one_load_serves_several_contexts() {
    let mut pool = pool(vec![SIX], vec![8], Policy::Lru);
    assert_eq!(pool.request(record(0, 0)), Lookup::Absent);
    let slot = pool.reserve(record(0, 0)).unwrap().slot;
    assert_eq!(pool.request(record(0, 0)), Lookup::Loading(slot));
    assert_eq!(pool.resident(0), 0);
    pool.commit(slot);
    assert_eq!(pool.request(record(0, 0)), Lookup::Resident(slot));
    let counters = pool.counters()[0];
    assert_eq!((counters.requests, counters.faults), (3, 1));
    assert_eq!((counters.hits, counters.hits_in_flight), (1, 1));
    assert_eq!(counters.bytes_faulted, 100);
    assert_eq!(pool.uses(0)[..2], [3, 0]);
    for held in (0..3).rev() {
        assert_eq!(pool.clear(), 0);
        pool.unpin(slot);
        assert_eq!(pool.clear(), u32::from(held == 0));
    }
}

#[test]
fn a_failed_load_never_leaves_a_stranger_under_a_waiters_pin() {
    let mut pool = pool(vec![LayerSpec { floor: 2, ..SIX }], vec![2], Policy::Lru);
    let failed = pool.reserve(record(0, 0)).unwrap().slot;
    assert_eq!(pool.request(record(0, 0)), Lookup::Loading(failed));
    pool.abandon(failed);
    assert_eq!(pool.peek(record(0, 0)), Lookup::Absent);
    assert_eq!((pool.record_in(failed), pool.reservable(0)), (None, 1));

    let other = load(&mut pool, record(0, 0));
    assert_ne!(other, failed);
    assert_eq!(pool.reserve(record(0, 1)), None);
    pool.unpin(failed);
    assert_eq!(pool.reserve(record(0, 1)).unwrap().slot, failed);
    // Nothing of the failed load was counted as arrived.
    assert_eq!((total(&pool).bytes_faulted, total(&pool).first_touches), (100, 1));

    // With nobody waiting, the slot is free at once.
    pool.abandon(failed);
    assert_eq!(pool.reserve(record(0, 2)).unwrap().slot, failed);
}

#[test]
fn streamed_records_take_no_slot() {
    let mut pool = pool(vec![SIX], vec![8], Policy::Lru);
    for _ in 0..2 {
        assert_eq!(pool.request(record(0, 5)), Lookup::Absent);
        pool.stream(record(0, 5));
    }
    let counters = pool.counters()[0];
    assert_eq!((counters.faults, counters.bytes_faulted, counters.first_touches), (2, 200, 1));
    assert_eq!((pool.resident(0), pool.reservable(0)), (0, 8));
}

#[test]
fn the_highest_slots_go_out_of_use_when_nobody_has_them_pinned() {
    let mut pool = pool(vec![LayerSpec { floor: 2, ..SIX }; 2], vec![10], Policy::Lru);
    fill(&mut pool, 0, 0..5); // slots 0-4
    let pinned = load(&mut pool, record(1, 0)); // slot 5
    let failing = pool.reserve(record(1, 1)).unwrap().slot;
    assert_eq!(pool.request(record(1, 1)), Lookup::Loading(failing));
    assert_eq!((pinned.index, failing.index), (5, 6));

    pool.resize(&[4], &[2, 2]).unwrap();
    assert_eq!((pool.slots(0), pool.end(0)), (4, 7));
    assert_eq!((pool.resident(0), pool.counters()[0].evictions), (4, 1));
    // What is still there is found, and what loads may arrive, or not.
    assert_eq!(pool.request(record(1, 0)), Lookup::Resident(pinned));
    pool.abandon(failing);
    assert_eq!(pool.end(0), 7);
    pool.unpin(failing);
    assert_eq!(pool.end(0), 6);
    pool.unpin(pinned);
    assert_eq!((pool.end(0), pool.resident(1)), (6, 1));
    pool.unpin(pinned);
    assert_eq!((pool.end(0), pool.resident(1), pool.counters()[1].evictions), (4, 0, 1));
    // The layer that has lost all gets its floor back from the one that has more.
    assert_eq!(pool.reservable(1), 2);
    fill(&mut pool, 1, 0..4);
    assert_eq!((pool.resident(0), pool.resident(1)), (2, 2));
}

#[test]
fn slots_come_into_use_again() {
    let mut pool = pool(vec![LayerSpec { floor: 2, ..SIX }], vec![4], Policy::Lru);
    let slots: Vec<_> = (0..4).map(|expert| load(&mut pool, record(0, expert))).collect();
    pool.resize(&[2], &[2]).unwrap();
    assert_eq!((pool.slots(0), pool.end(0), pool.reservable(0)), (2, 4, 0));
    // More than there are records: a slot for each of them.
    pool.resize(&[1_000], &[2]).unwrap();
    assert_eq!((pool.slots(0), pool.end(0), pool.reservable(0)), (64, 64, 60));
    slots.into_iter().for_each(|slot| pool.unpin(slot));
    fill(&mut pool, 0, 4..64);
    assert_eq!((pool.resident(0), total(&pool).evictions), (64, 0));
}

#[test]
fn a_pool_does_not_shrink_below_its_floors() {
    let mut pool = pool(vec![SIX; 6], vec![60], Policy::Lru);
    fill(&mut pool, 0, 0..20);
    let least_bytes_total = 48 * 100;
    let expected =
        Error::FloorsDoNotFit { class: 0, slots: 47, least_slots: 48, least_bytes_total };
    assert_eq!(pool.resize(&[47], &[8; 6]), Err(expected));
    assert_eq!((pool.slots(0), pool.resident(0)), (60, 20));
    // Floors may change with the size.
    pool.resize(&[47], &[7; 6]).unwrap();
    assert_eq!(pool.slots(0), 47);
}

/// Mistakes of the caller, which must not pass silently.
mod mistakes {
    use super::*;

    fn one() -> (Pool, Slot) {
        let mut pool = pool(vec![SIX], vec![8], Policy::Lru);
        let slot = pool.reserve(record(0, 0)).unwrap().slot;
        (pool, slot)
    }

    #[test]
    #[should_panic(expected = "which has a slot")]
    fn reserving_twice() {
        let (mut pool, _) = one();
        pool.reserve(record(0, 0));
    }

    #[test]
    #[should_panic(expected = "not loading")]
    fn committing_twice() {
        let (mut pool, slot) = one();
        pool.commit(slot);
        pool.commit(slot);
    }

    #[test]
    #[should_panic(expected = "not loading")]
    fn abandoning_a_resident() {
        let (mut pool, slot) = one();
        pool.commit(slot);
        pool.abandon(slot);
    }

    #[test]
    #[should_panic(expected = "neither committed nor abandoned")]
    fn unpinning_a_load() {
        let (mut pool, slot) = one();
        pool.unpin(slot);
    }

    #[test]
    #[should_panic(expected = "not pinned")]
    fn unpinning_too_often() {
        let (mut pool, slot) = one();
        pool.commit(slot);
        pool.unpin(slot);
        pool.unpin(slot);
    }

    #[test]
    #[should_panic(expected = "the layer has 64 experts")]
    fn asking_for_an_expert_that_is_not_there() {
        let (pool, _) = one();
        let _ = pool.peek(record(0, 64));
    }
}

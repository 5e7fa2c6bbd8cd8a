//! The one-pass curves against the runtime's own pool, and the optimum against a search of all choices.

use std::collections::HashSet;

use proptest::prelude::*;
use tierstream_eval::sim::{
    Counting, Curve, Eviction, PoolKind, Predictor, Setup, Size, Start, Tier, curve, replay,
};
use tierstream_eval::{Header, Phase, Token, Trace};
use tierstream_pool::Policy;

/// Decoded tokens of a few experts with favourites, after a prompt in one batch.
fn trace(layers: u32, experts: u32, used: u32, prompt: u32, seeds: &[u64]) -> Trace {
    let mut trace = Trace::new(Header::uniform(layers, experts, used)).unwrap();
    for (position, &seed) in (0..).zip(seeds) {
        let (phase, batch) = match position < prompt {
            true => (Phase::Prefill, 0),
            false => (Phase::Decode, position),
        };
        let mut state = seed;
        let mut row = Vec::new();
        for _ in 0..layers {
            let begin = row.len();
            while row.len() < begin + used as usize {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let (a, b) = (state >> 33, state >> 13 & 0xffff);
                let expert = ((a % u64::from(experts)) * (b % u64::from(experts) + 1)
                    / u64::from(experts)) as u16;
                if !row[begin..].contains(&expert) {
                    row.push(expert);
                }
            }
        }
        let token = Token { prompt: 0, position, batch, id: None, phase, domain: 0 };
        trace.push(token, &row, &[]).unwrap();
    }
    trace
}

fn setup(eviction: Eviction) -> Setup {
    Setup { eviction, ..Setup::default() }
}

fn hits(curve: &Curve) -> Vec<u64> {
    curve.points.iter().map(|point| point.hits).collect()
}

fn shapes() -> impl Strategy<Value = (u32, u32, u32, Vec<u64>)> {
    (1u32..4, 2u32..24).prop_flat_map(|(layers, experts)| {
        let seeds = prop::collection::vec(any::<u64>(), 0..60);
        (Just(layers), Just(experts), 1..=experts.min(5), seeds)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

    /// For every size at once, what the pool does one by one.
    #[test]
    fn one_pass_is_the_pool((layers, experts, used, seeds) in shapes(), fill in any::<bool>()) {
        let trace = trace(layers, experts, used, 0, &seeds);
        let sizes: Vec<u32> = (used..=experts + 1).collect();
        let policies =
            [Policy::Lru, Policy::LFU, Policy::Lfu { half_life: 1 }, Policy::LeastStale, Policy::Fifo, Policy::Random];
        for policy in policies {
            let counting = if fill { Counting::Fill } else { Counting::Strict };
            let setup = Setup { counting, seed: 5, ..setup(Eviction::Online(policy)) };
            let at_once: Vec<Size> = sizes.iter().map(|&slots| Size::Slots(slots)).collect();
            let at_once = hits(&curve(&trace, &setup, &at_once).unwrap());
            let each = sizes.iter().map(|&slots| {
                let outcome = replay(&trace, &setup, &vec![slots; layers as usize]).unwrap();
                outcome.hits_total() + if fill { outcome.fills } else { 0 }
            });
            prop_assert_eq!(at_once, each.collect::<Vec<_>>(), "{}", policy);
        }
    }

    /// One layer in a pool for all layers, which is simulated otherwise, is a pool for each layer.
    #[test]
    fn one_pass_is_the_search_for_the_last_use((_, experts, used, seeds) in shapes()) {
        let trace = trace(1, experts, used, 0, &seeds);
        let sizes: Vec<Size> = (used..=experts).map(Size::Slots).collect();
        for eviction in [Eviction::Belady, Eviction::BeladyLeave, Eviction::Online(Policy::Lru)] {
            let per_layer = setup(eviction);
            let global = Setup { pool: PoolKind::Global, ..per_layer };
            let (a, b) = (curve(&trace, &per_layer, &sizes), curve(&trace, &global, &sizes));
            prop_assert_eq!(hits(&a.unwrap()), hits(&b.unwrap()), "{}", eviction);
        }
    }

    #[test]
    fn belady_is_the_best_of_all_choices(used in 1u32..3, seeds in prop::collection::vec(any::<u64>(), 1..9)) {
        let trace = trace(1, 5, used, 0, &seeds);
        for slots in used..4 {
            let sizes = [Size::Slots(slots)];
            let belady = hits(&curve(&trace, &setup(Eviction::Belady), &sizes).unwrap())[0];
            prop_assert_eq!(belady, best(&trace, slots as usize, true));
            let leave = hits(&curve(&trace, &setup(Eviction::BeladyLeave), &sizes).unwrap())[0];
            prop_assert_eq!(leave, best(&trace, slots as usize, false));
        }
    }

    #[test]
    fn no_policy_beats_belady((layers, experts, used, seeds) in shapes()) {
        let trace = trace(layers, experts, used, 0, &seeds);
        let sizes: Vec<Size> = (used..=experts).map(Size::Slots).collect();
        for pool in [PoolKind::PerLayer, PoolKind::Global] {
            let of = |eviction| hits(&curve(&trace, &Setup { pool, ..setup(eviction) }, &sizes).unwrap());
            let (belady, leave) = (of(Eviction::Belady), of(Eviction::BeladyLeave));
            for policy in Policy::ALL {
                let online = of(Eviction::Online(policy));
                prop_assert!(online.iter().zip(&belady).all(|(a, b)| a <= b), "{}", policy);
            }
            prop_assert!(belady.iter().zip(&leave).all(|(a, b)| a <= b));
            prop_assert!(leave.is_sorted() && belady.is_sorted());
        }
    }

    /// Where all records have one size, a budget of bytes is one of slots.
    #[test]
    fn bytes_are_slots((layers, experts, used, seeds) in shapes()) {
        let mut trace = trace(layers, experts, used, seeds.len() as u32 / 3, &seeds);
        let mut header = trace.header().clone();
        header.layers.iter_mut().for_each(|layer| layer.record_bytes = 10);
        trace.set_header(header).unwrap();
        for policy in [Policy::Lru, Policy::LFU, Policy::Fifo] {
            for slots in experts..=experts + 2 {
                let bytes = Size::Bytes(u64::from(slots * layers) * 10 + 9);
                let setup = Setup {
                    pool: PoolKind::Global,
                    start: Start::Warm,
                    ..setup(Eviction::Online(policy))
                };
                let both = curve(&trace, &setup, &[bytes, Size::Slots(slots)]).unwrap();
                prop_assert_eq!(both.points[0].hits, both.points[1].hits, "{}", policy);
            }
        }
    }
}

/// The most hits that any choice of records to keep gives, of a trace with one layer.
fn best(trace: &Trace, slots: usize, stays: bool) -> u64 {
    let mut states = vec![(HashSet::<u16>::new(), 0)];
    for token in 0..trace.len() {
        let step: HashSet<u16> = trace.experts(token, 0).iter().copied().collect();
        let mut next: Vec<(HashSet<u16>, u64)> = Vec::new();
        for (held, hits) in states {
            let hits = hits + step.intersection(&held).count() as u64;
            let all: Vec<u16> = held.union(&step).copied().collect();
            for mask in 0u32..1 << all.len() {
                let kept: HashSet<u16> =
                    (0..all.len()).filter(|bit| mask >> bit & 1 == 1).map(|bit| all[bit]).collect();
                if kept.len() > slots || (stays && !step.is_subset(&kept)) {
                    continue;
                }
                match next.iter_mut().find(|(set, _)| *set == kept) {
                    Some((_, best)) => *best = hits.max(*best),
                    None => next.push((kept, hits)),
                }
            }
        }
        states = next;
    }
    states.into_iter().map(|(_, hits)| hits).max().unwrap_or(0)
}

fn seeds(count: u64) -> Vec<u64> {
    (1..=count).map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15)).collect()
}

#[test]
fn a_pool_for_one_step_has_no_choice() {
    let trace = trace(2, 16, 4, 0, &seeds(50));
    let at = |eviction| curve(&trace, &setup(eviction), &[Size::Rho(1.0)]).unwrap().points[0];
    let lru = at(Eviction::Online(Policy::Lru));
    assert_eq!((lru.rho, lru.slots_per_layer, lru.requests), (1.0, 4.0, 400));
    for policy in Policy::ALL {
        assert_eq!(at(Eviction::Online(policy)).hits, lru.hits, "{policy}");
    }
    assert_eq!(at(Eviction::Belady).hits, lru.hits);
    assert!(at(Eviction::BeladyLeave).hits > lru.hits);
}

#[test]
fn less_than_a_step_is_streamed_or_refused() {
    let trace = trace(1, 16, 4, 0, &seeds(50));
    let at = |eviction| curve(&trace, &setup(eviction), &[Size::Slots(2)]);
    let lru = at(Eviction::Online(Policy::Lru)).unwrap().points[0];
    assert!(lru.hits > 0 && lru.hits < 100);
    let error = at(Eviction::Belady).unwrap_err().to_string();
    assert!(error.contains("belady-leave does not"), "{error}");
    assert!(at(Eviction::BeladyLeave).is_ok());
    let none = curve(&trace, &setup(Eviction::Online(Policy::Lru)), &[Size::Slots(0)]).unwrap();
    assert_eq!(none.points[0].hits, 0);
}

#[test]
fn a_warm_start_counts_decoded_tokens_alone() {
    let trace = trace(2, 16, 4, 10, &seeds(30));
    let sizes = [Size::Rho(2.0), Size::Slots(16)];
    let cold = curve(&trace, &setup(Eviction::Online(Policy::Lru)), &sizes).unwrap();
    let warm = Setup { start: Start::Warm, ..cold.setup };
    let warm = curve(&trace, &warm, &sizes).unwrap();
    assert_eq!((cold.tokens, warm.tokens), (20, 20));
    assert!(warm.points[0].requests == 160 && warm.points[1].hits > cold.points[1].hits);
    let prefill = Setup { phase: Phase::Prefill, ..cold.setup };
    let prefill = curve(&trace, &prefill, &sizes).unwrap();
    assert_eq!(prefill.tokens, 10);
    // One batch: each of its experts is asked for once, and none was there.
    assert_eq!(prefill.points[0].hits, 0);
}

#[test]
fn reading_ahead_helps_as_much_as_is_guessed() {
    let trace = trace(4, 32, 4, 0, &seeds(200));
    let outcome = |predictor, budget| {
        let ahead = Some((predictor, budget));
        let setup = Setup { ahead, ..setup(Eviction::Online(Policy::Lru)) };
        replay(&trace, &setup, &[12; 4]).unwrap()
    };
    let none = replay(&trace, &setup(Eviction::Online(Policy::Lru)), &[12; 4]).unwrap();
    assert_eq!(none.ahead.reads, 0);
    let all = outcome(Predictor::Oracle { recall: 1.0 }, 8);
    assert_eq!(all.ahead.reads, all.ahead.used);
    // All but the first layer, of which nobody guesses.
    assert_eq!(all.hits[1..], [800; 3]);
    assert!((none.hits[0] as i64 - all.hits[0] as i64).abs() < 40);
    let half = outcome(Predictor::Oracle { recall: 0.5 }, 8);
    assert!(half.ahead.used < half.ahead.reads && half.hits_total() > none.hits_total());
    let narrow = outcome(Predictor::Oracle { recall: 1.0 }, 1);
    assert!(narrow.ahead.reads <= 600 && narrow.hits_total() < all.hits_total());
    for predictor in [Predictor::Previous, Predictor::Following] {
        let outcome = outcome(predictor, 4);
        assert!(outcome.ahead.used <= outcome.ahead.reads, "{predictor}");
        assert_eq!(outcome.requests, 3_200);
    }
}

#[test]
fn what_the_upper_pool_lacks_is_asked_for_below() {
    let trace = trace(3, 16, 4, 0, &seeds(100));
    let below = Some(Tier { slots_per_layer: 10, policy: Policy::Lru });
    let setup = Setup { below, ..setup(Eviction::Online(Policy::Lru)) };
    let outcome = replay(&trace, &setup, &[6; 3]).unwrap();
    assert_eq!(outcome.below.requests, outcome.requests - outcome.hits_total());
    assert!(outcome.below.hits > 0 && outcome.below.hits < outcome.below.requests);
}

#[test]
fn shapes_at_the_edge() {
    let rates = |trace: &Trace, sizes: &[Size]| {
        Policy::ALL.map(|policy| {
            let curve = curve(trace, &setup(Eviction::Online(policy)), sizes).unwrap();
            curve.points[0].hit_rate()
        })
    };
    let empty = trace(3, 8, 2, 0, &[]);
    assert_eq!(rates(&empty, &[Size::Rho(1.0)]), [None; 8]);
    let one = trace(1, 8, 2, 0, &seeds(1));
    assert_eq!(rates(&one, &[Size::Rho(4.0)]), [Some(0.0); 8]);
    let all = trace(2, 4, 4, 0, &seeds(10));
    assert_eq!(rates(&all, &[Size::Rho(1.0)]), [Some(0.9); 8]);
    let many = trace(1, 1000, 8, 0, &seeds(300));
    for rate in rates(&many, &[Size::Rho(4.0)]) {
        assert!(rate.unwrap() > 0.0 && rate.unwrap() < 0.5, "{rate:?}");
    }
    let belady = curve(&many, &setup(Eviction::Belady), &[Size::Rho(4.0)]).unwrap();
    assert!(belady.points[0].hit_rate() > rates(&many, &[Size::Rho(4.0)])[0]);
    let floors = Setup { pool: PoolKind::Floor(2), ..setup(Eviction::Online(Policy::Lru)) };
    let error = curve(&one, &floors, &[Size::Slots(1)]).unwrap_err().to_string();
    assert!(error.contains("floors"), "{error}");
    let bytes = curve(&one, &setup(Eviction::Online(Policy::Lru)), &[Size::Bytes(100)]);
    assert!(bytes.unwrap_err().to_string().contains("size of records"));
}

/// Records of one size: bytes are slots, however often uses are rescaled.
#[test]
fn bytes_of_equal_records_are_slots() {
    let seeds: Vec<u64> = (0..500u64).map(|n| n.wrapping_mul(0x9E37_79B9_7F4A_7C15)).collect();
    let plain = trace(3, 16, 2, 0, &seeds);
    let mut header = plain.header().clone();
    header.layers.iter_mut().for_each(|layer| layer.record_bytes = 1000);
    let mut trace = Trace::new(header).unwrap();
    for (index, token) in plain.tokens().iter().enumerate() {
        trace.push(*token, plain.row(index), &[]).unwrap();
    }
    for policy in [Policy::Lru, Policy::Lfu { half_life: 1 }, Policy::LFU] {
        let of = |size| hits(&curve(&trace, &setup(Eviction::Online(policy)), &[size]).unwrap());
        assert_eq!(of(Size::Bytes(3 * 6 * 1000)), of(Size::Slots(6)), "{policy}");
    }
}

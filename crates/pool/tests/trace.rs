//! A recorded routing trace: the pool against caches of a few lines, and against each other.

mod common;

use common::step;
use tierstream_pool::{Config, LayerSpec, Policy, Pool};

const TRACE: &str = include_str!("data/demo-300.txt");
const LAYERS: usize = 6;
const TOP_K: u32 = 8;

/// Tokens of layers of expert ids.
fn trace() -> Vec<Vec<Vec<u32>>> {
    let ids = |layer: &str| layer.split(',').map(|id| id.parse().unwrap()).collect();
    TRACE.lines().map(|token| token.split(';').map(ids).collect()).collect()
}

fn pool(slots: u32, floor: u32, policy: Policy) -> Pool {
    let layer = LayerSpec { class: 0, experts: 64, floor, record_bytes: 1 };
    Pool::new(Config { layers: vec![layer; LAYERS], slots: vec![slots], policy, seed: 3 }).unwrap()
}

/// Hits per layer over the whole trace.
fn replay(mut pool: Pool) -> Vec<usize> {
    let mut hits = vec![0; LAYERS];
    for token in trace() {
        for (layer, experts) in token.iter().enumerate() {
            hits[layer] += step(&mut pool, layer as u32, experts);
        }
    }
    for (hits, counters) in hits.iter().zip(pool.counters()) {
        assert_eq!(*hits as u64, counters.hits);
    }
    hits
}

/// A list of at most `slots` keys, most recent last.
struct Reference {
    keys: Vec<(usize, u32)>,
    slots: usize,
}

impl Reference {
    fn step(&mut self, layer: usize, experts: &[u32]) -> usize {
        let hits = experts.iter().filter(|&&expert| self.keys.contains(&(layer, expert))).count();
        // Those with the lowest numbers, which come first in the trace, stay the longest.
        for &expert in experts.iter().rev() {
            self.keys.retain(|&key| key != (layer, expert));
            self.keys.push((layer, expert));
        }
        let excess = self.keys.len().saturating_sub(self.slots);
        self.keys.drain(..excess);
        hits
    }
}

#[test]
fn the_trace_is_what_it_should_be() {
    let trace = trace();
    assert_eq!(trace.len(), 300);
    for experts in trace.iter().inspect(|token| assert_eq!(token.len(), LAYERS)).flatten() {
        assert_eq!(experts.len(), TOP_K as usize);
        assert!(experts.is_sorted_by(|a, b| a < b) && experts[7] < 64);
    }
}

#[test]
fn with_nothing_above_the_floors_it_is_one_lru_per_layer() {
    for slots in [8, 16, 27, 32] {
        let mut references: Vec<_> =
            (0..LAYERS).map(|_| Reference { keys: vec![], slots }).collect();
        let mut expected = vec![0; LAYERS];
        for token in trace() {
            for (layer, experts) in token.iter().enumerate() {
                expected[layer] += references[layer].step(layer, experts);
            }
        }
        let per_layer = slots as u32;
        assert_eq!(replay(pool(per_layer * LAYERS as u32, per_layer, Policy::Lru)), expected);
    }
}

#[test]
fn with_floors_of_zero_it_is_one_global_lru() {
    for slots in [40, 96, 192] {
        let mut reference = Reference { keys: vec![], slots };
        let mut expected = vec![0; LAYERS];
        for token in trace() {
            for (layer, experts) in token.iter().enumerate() {
                expected[layer] += reference.step(layer, experts);
            }
        }
        assert_eq!(replay(pool(slots as u32, 0, Policy::Lru)), expected);
        assert_eq!(expected.iter().sum::<usize>() == 0, slots == 40, "below one token cycle");
    }
}

#[test]
fn floors_help_a_small_pool_and_cost_a_large_one_little() {
    let hits = |slots, floor| replay(pool(slots, floor, Policy::Lru)).iter().sum::<usize>() as f64;
    // Of 300 tokens, each with 48 requests.
    assert!(hits(48, 8) > 4_000.0 && hits(40, 0) == 0.0);
    assert!(hits(96, 16) > 1.05 * hits(96, 0));
    assert!(hits(288, 48) > 0.99 * hits(288, 0));
}

/// Who was used last tells something, and how often tells more.
#[test]
fn policies_are_worth_what_they_know() {
    let hits = |policy| replay(pool(144, TOP_K, policy)).iter().sum::<usize>() as f64;
    assert!(hits(Policy::Lru) > 1.05 * hits(Policy::Random));
    for policy in [Policy::LFU, Policy::Lfru] {
        assert!(hits(policy) > 1.05 * hits(Policy::Lru), "{policy}");
    }
}

#[test]
fn the_seed_decides_the_random_policy() {
    let hits = |seed| {
        let layers = vec![LayerSpec { class: 0, experts: 64, floor: 8, record_bytes: 1 }; LAYERS];
        let config = Config { layers, slots: vec![144], policy: Policy::Random, seed };
        replay(Pool::new(config).unwrap())
    };
    assert_eq!(hits(1), hits(1));
    assert_ne!(hits(1), hits(2));
}

/// Below a token cycle, where LRU over all layers hits nothing.
#[test]
fn who_knows_of_layers_needs_no_floors() {
    let hits = |policy| replay(pool(40, 0, policy)).iter().sum::<usize>();
    assert_eq!(hits(Policy::Lru), 0);
    assert!(hits(Policy::LeastStale) > 2_000, "{}", hits(Policy::LeastStale));
    for policy in [Policy::Slru, Policy::S3Fifo, Policy::LeastStale] {
        let hits = |slots| replay(pool(slots, 8, policy)).iter().sum::<usize>();
        assert!(hits(96) > hits(48) && hits(192) > hits(96), "{policy}");
    }
}

//! What a request costs: replays a synthetic trace of 48 layers, 128 experts, top-8 under every
//! policy and prints nanoseconds per request, everything included (request, reserve, commit, unpin),
//! and how far the slots of a layer lie apart at the end: slots from its lowest to its highest, per
//! slot that it holds (1 is the best). The floor of every layer is a number, by default the top-k,
//! or "even" for an even share of the slots.
//!
//! ```text
//! cargo run --release -p tierstream-pool --example replay [tokens] [slots] [floor]
//! ```

use std::time::Instant;

use tierstream_pool::{Config, LayerCounters, LayerSpec, Lookup, Policy, Pool, Record};

const LAYERS: u32 = 48;
const EXPERTS: u32 = 128;
const TOP_K: u32 = 8;

fn main() {
    let mut arguments = std::env::args().skip(1);
    let mut number = |default: u32| {
        arguments.next().map_or(default, |text| text.parse().expect("tokens and slots are numbers"))
    };
    let (tokens, slots) = (number(20_000), number(LAYERS * EXPERTS * 2 / 5));
    let floors = match std::env::args().nth(3).as_deref() {
        Some("even") => Pool::even_shares(&[EXPERTS; LAYERS as usize], slots),
        Some(floor) => {
            vec![floor.parse().expect("a floor is a number or \"even\""); LAYERS as usize]
        }
        None => vec![TOP_K; LAYERS as usize],
    };
    let trace = trace(tokens);
    println!("{tokens} tokens, {slots} slots of {}", LAYERS * EXPERTS);
    println!("policy    hits %  ns/request  us/token  span");
    for policy in Policy::ALL {
        let layer = |&floor| LayerSpec { class: 0, experts: EXPERTS, floor, record_bytes: 1 };
        let layers = floors.iter().map(layer).collect();
        let config = Config { layers, slots: vec![slots], policy, seed: 1 };
        let mut pool = Pool::new(config).expect("the floors fit");
        let start = Instant::now();
        replay(&mut pool, &trace);
        let spent = start.elapsed().as_nanos() as f64;
        let total: LayerCounters = pool.counters().iter().copied().sum();
        println!(
            "{policy:<8}  {:6.2}  {:10.1}  {:8.1}  {:4.1}",
            100.0 * total.hit_rate(),
            spent / total.requests as f64,
            spent / 1_000.0 / f64::from(tokens),
            spread(&pool),
        );
    }
}

/// Slots in the spans of all layers per resident record.
fn spread(pool: &Pool) -> f64 {
    let span = |layer| {
        let held = || (0..EXPERTS).filter_map(move |expert| at(pool, Record { layer, expert }));
        Some(held().max()? - held().min()? + 1)
    };
    let slots: u32 = (0..LAYERS).filter_map(span).sum();
    let held: u32 = (0..LAYERS).map(|layer| pool.resident(layer)).sum();
    f64::from(slots) / f64::from(held)
}

fn at(pool: &Pool, record: Record) -> Option<u32> {
    match pool.peek(record) {
        Lookup::Resident(slot) | Lookup::Loading(slot) => Some(slot.index),
        Lookup::Absent => None,
    }
}

fn replay(pool: &mut Pool, trace: &[u8]) {
    let mut pinned = Vec::with_capacity(TOP_K as usize);
    let mut missing = Vec::with_capacity(TOP_K as usize);
    for (layer, experts) in (0..LAYERS).cycle().zip(trace.chunks(TOP_K as usize)) {
        pool.begin_step();
        for &expert in experts {
            let record = Record { layer, expert: expert.into() };
            match pool.request(record) {
                Lookup::Resident(slot) | Lookup::Loading(slot) => pinned.push(slot),
                Lookup::Absent => missing.push(record),
            }
        }
        for record in missing.drain(..) {
            let slot = pool.reserve(record).expect("the floor covers the top-k").slot;
            pool.commit(slot);
            pinned.push(slot);
        }
        pinned.drain(..).for_each(|slot| pool.unpin(slot));
    }
}

/// Expert ids, token by token and layer by layer: two of five repeat from the token before, the
/// others are drawn with a bias towards a few favourites that drift over time.
fn trace(tokens: u32) -> Vec<u8> {
    let mut state = 1u64;
    let mut random = move |bound: u32| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (((state >> 32) * u64::from(bound)) >> 32) as u32
    };
    let row = (LAYERS * TOP_K) as usize;
    let mut trace: Vec<u8> = Vec::with_capacity(row * tokens as usize);
    for token in 0..tokens {
        for layer in 0..LAYERS {
            let begin = trace.len();
            while trace.len() < begin + TOP_K as usize {
                let expert = if token > 0 && random(5) < 2 {
                    trace[begin - row + random(TOP_K) as usize]
                } else {
                    let rank = random(EXPERTS) * random(EXPERTS) / EXPERTS;
                    ((rank + layer * 31 + token / 500) % EXPERTS) as u8
                };
                if !trace[begin..].contains(&expert) {
                    trace.push(expert);
                }
            }
        }
    }
    trace
}

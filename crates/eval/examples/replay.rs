//! How long a trace takes: a synthetic one of 48 layers, 128 experts, top-8, with so many tokens, over
//! 16 capacities of each policy.
//!
//! ```text
//! cargo run --release -p tierstream-eval --example replay [tokens] [policy]...
//! ```

use std::time::Instant;

use tierstream_eval::sim::{Eviction, Setup, Size, curve};
use tierstream_eval::{Header, Phase, Token, Trace};

const LAYERS: u32 = 48;
const EXPERTS: u32 = 128;
const USED: u32 = 8;
const POLICIES: [&str; 6] = ["lru", "lfu", "fifo", "random", "least-stale", "belady"];

fn main() {
    let mut arguments = std::env::args().skip(1);
    let tokens = arguments.next().map_or(1_000_000, |n| n.parse().expect("tokens are a number"));
    let named: Vec<String> = arguments.collect();
    let policies = if named.is_empty() { POLICIES.map(String::from).to_vec() } else { named };
    let start = Instant::now();
    let trace = trace(tokens);
    println!("{tokens} tokens made in {:.1} s", start.elapsed().as_secs_f64());
    let sizes: Vec<Size> = (1..=16).map(|eighths| Size::Slots(eighths * EXPERTS / 16)).collect();
    let start = Instant::now();
    for policy in policies {
        let eviction: Eviction = policy.parse().expect("a policy");
        let begin = Instant::now();
        let curve = curve(&trace, &Setup { eviction, ..Setup::default() }, &sizes);
        let rates = curve.expect("pools of these sizes can be made").points;
        let rates = rates.iter().map(|p| format!("{:.1}", 100.0 * p.hit_rate().unwrap_or(0.0)));
        println!(
            "{policy:<8} {:6.2} s  {}",
            begin.elapsed().as_secs_f64(),
            rates.collect::<Vec<_>>().join(" ")
        );
    }
    println!("{:.1} s in all", start.elapsed().as_secs_f64());
}

/// Two of five experts repeat from the token before, the others are drawn with a bias towards a few
/// favourites that drift over time.
fn trace(tokens: u32) -> Trace {
    let mut state = 1u64;
    let mut random = move |bound: u32| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (((state >> 32) * u64::from(bound)) >> 32) as u32
    };
    let mut trace = Trace::new(Header::uniform(LAYERS, EXPERTS, USED)).expect("within the limits");
    let mut row: Vec<u16> = Vec::new();
    for position in 0..tokens {
        let last = std::mem::take(&mut row);
        for layer in 0..LAYERS {
            let begin = row.len();
            while row.len() < begin + USED as usize {
                let expert = if position > 0 && random(5) < 2 {
                    last[begin + random(USED) as usize]
                } else {
                    let rank = random(EXPERTS) * random(EXPERTS) / EXPERTS;
                    ((rank + layer * 31 + position / 500) % EXPERTS) as u16
                };
                if !row[begin..].contains(&expert) {
                    row.push(expert);
                }
            }
        }
        let token = Token {
            prompt: 0,
            position,
            batch: position,
            id: None,
            phase: Phase::Decode,
            domain: 0,
        };
        trace.push(token, &row, &[]).expect("a row of the model's shape");
    }
    trace
}

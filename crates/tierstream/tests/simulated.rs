//! The simulator says what the runtime does: with the same trace, pool and policy both count the same
//! requests and hits, layer by layer.

use std::path::{Path, PathBuf};

use tierstream::ggml::{BatchRouting, Replay};
use tierstream::size::PoolShare;
use tierstream::{Engine, Keep, Options, Policy, Prefetch};
use tierstream_eval::plan::layout;
use tierstream_eval::sim::replay;
use tierstream_eval::{Header, Phase, Token, Trace};

const LAYERS: u32 = 6;
const EXPERTS: u32 = 64;
const USED: u32 = 8;

/// Room for what one token uses, an even share for each layer, and one pool for all.
const SHARES: [f64; 3] = [0.125, 0.4, 0.8];

/// Decoded in each run.
const TOKENS: u32 = 150;

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/novelist-moe-31m-q4_0.gguf")
}

fn engine(share: f64, policy: Policy) -> Engine {
    let options = Options {
        experts: Some(PoolShare::Share(share)),
        policy,
        prefetch: Prefetch::Off,
        preload: false,
        threads: Some(1),
        ctx: Some(1024),
        ..Options::default()
    };
    Engine::load(&demo(), options, &mut |_| true).unwrap()
}

/// Tokens that stay with some experts for a while, of which each layer has its own.
fn local(tokens: u32) -> Trace {
    let mut trace = Trace::new(Header::uniform(LAYERS, EXPERTS, USED)).unwrap();
    let mut state = 1u64;
    let mut draw = |below: u32| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u32 % below
    };
    let mut row: Vec<u16> = (0..LAYERS).flat_map(|_| 0..USED as u16).collect();
    for position in 0..tokens {
        for layer in row.chunks_mut(USED as usize) {
            for _ in 0..3 {
                let new = draw(EXPERTS) as u16;
                if !layer.contains(&new) {
                    layer[draw(USED) as usize] = new;
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
        trace.push(token, &row, &[]).unwrap();
    }
    trace
}

#[test]
fn replayed_traces() {
    let trace = local(TOKENS);
    let token = |at: usize| {
        let layer = |l| trace.experts(at, l).iter().map(|&expert| expert.into()).collect();
        (0..LAYERS as usize).map(layer).collect()
    };
    let recorded = Replay::new((0..TOKENS as usize).map(token).collect());
    for policy in Policy::ALL {
        for share in SHARES {
            let mut engine = engine(share, policy);
            engine.context().replay(Some(recorded.clone()));
            for token in 0..TOKENS {
                engine.context().decode(&[token.cast_signed()], Keep::Last, |_, _| {}).unwrap();
            }
            check(&engine, &trace, share, policy);
        }
    }
}

/// Tokens of a real router, one by one.
#[test]
fn a_run_and_its_own_trace() {
    for policy in Policy::ALL {
        for share in SHARES {
            let mut engine = engine(share, policy);
            engine.context().record_routing(true).unwrap();
            let text = "It was a cold evening in November, and the old gentleman sat by the fire. "
                .repeat(8);
            let tokens = engine.model().vocab().tokenize(&text, true, false).unwrap();
            for token in tokens {
                engine.context().decode(&[token], Keep::Last, |_, _| {}).unwrap();
            }
            let mut trace = Trace::new(Header::uniform(LAYERS, EXPERTS, USED)).unwrap();
            for batch in engine.context().take_routing().unwrap() {
                push(&mut trace, &batch);
            }
            check(&engine, &trace, share, policy);
        }
    }
}

fn push(trace: &mut Trace, batch: &BatchRouting) {
    let [at] = batch.tokens[..] else { panic!("{:?}", batch.tokens) };
    let mut row = Vec::new();
    for layer in &batch.layers {
        let (experts, _) = layer.of(0).unwrap();
        row.extend(experts.iter().map(|&expert| u16::try_from(expert).unwrap()));
    }
    let (position, phase) = (at.position, Phase::Decode);
    let token = Token { prompt: 0, position, batch: position, id: None, phase, domain: 0 };
    trace.push(token, &row, &[]).unwrap();
}

fn check(engine: &Engine, trace: &Trace, share: f64, policy: Policy) {
    let slots = (f64::from(LAYERS * EXPERTS) * share).ceil() as u64;
    let (setup, slots) = layout(&trace.header().layers, slots, policy);
    let expected = replay(trace, &setup, &slots).unwrap();
    let counters = engine.model().layer_counters();
    let hits: Vec<u64> = counters.iter().map(|(_, counters)| counters.hits).collect();
    let what = format!("{policy} at {share}");
    assert_eq!(hits, expected.hits, "{what}");
    let requests: u64 = counters.iter().map(|(_, counters)| counters.requests).sum();
    let faults: u64 = counters.iter().map(|(_, counters)| counters.faults).sum();
    assert_eq!((requests, faults), (expected.requests, requests - expected.hits_total()), "{what}");
}

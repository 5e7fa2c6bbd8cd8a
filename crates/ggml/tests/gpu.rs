//! The executor for GPUs, over the stand-in: experts in memory of a device, which is mapped as it is
//! used, is full of NaNs before, and kills whoever touches what is not mapped. The kernels are those
//! of the CPU, so the output is that of the resident model, bit for bit.

mod common;

use std::path::Path;
use std::sync::Arc;

use common::{
    Room, Run, Synth, assert_same_bits, attach, demo, faulty, load_on_stand_in, reader, stock,
};
use tierstream_cuda::standin::{Config, Fault, StandIn};
use tierstream_ggml::{Error, LayerUse, Model, PoolOptions, PoolSize, Replay};
use tierstream_io::Reader;
use tierstream_io::wrap::{Action, Rule};
use tierstream_pool::Policy;
use tierstream_synth::{Arch, Quant, Spec, TensorType};

const ROOMS: [Room; 4] = [Room::Preloaded, Room::Share(1.0), Room::Share(0.4), Room::Floor(0)];

fn stand_in() -> StandIn {
    StandIn::new(Config::default()).unwrap()
}

fn streamed(path: &Path, room: Room) -> Model {
    let model = load_on_stand_in(path, &stand_in(), reader());
    assert!(model.is_streamed() && model.resident_blocks().is_empty());
    attach(&model, room, Policy::Lru);
    model
}

fn check(path: &Path, generate: usize) {
    let reference_model = stock(path);
    let vocab = reference_model.vocab().len();
    for (prompt, n_batch) in [(12, 1), (80, 64), (200, 512)] {
        let run = Run::new(&reference_model, prompt, generate, n_batch);
        let reference = run.logits(&reference_model);
        for room in ROOMS {
            let what = format!("batch {n_batch}, {room:?}");
            let model = streamed(path, room);
            assert_same_bits(&reference, &run.logits(&model), vocab, &what);
            let c = model.expert_counters();
            assert!(c.requests > 0 && c.requests == c.hits + c.faults, "{what}: {c:?}");
            let layers = model.layer_uses();
            let sum = |of: fn(&LayerUse) -> u64| layers.iter().map(of).sum::<u64>();
            assert_eq!(sum(|l| l.from_vram), c.hits, "{what}");
            assert_eq!(sum(|l| l.from_ram + l.from_drive), c.faults, "{what}");
            match room {
                Room::Preloaded => assert_eq!(c.bytes_read, model.expert_bytes(), "{what}: {c:?}"),
                Room::Share(1.0) => assert!(c.faults > 0 && c.evictions == 0, "{what}: {c:?}"),
                _ => assert!(c.faults > c.first_touches, "{what}: records come again: {c:?}"),
            }
        }
    }
}

fn check_synth(spec: &Spec) {
    check(&Synth::new(spec).path, 12);
}

#[test]
fn demo_model() {
    check(&demo(), 32);
}

#[test]
fn qwen3moe_q4_k_m_of_several_size_classes() {
    check_synth(&Spec::new(Arch::Qwen3Moe).quant(Quant::Q4_K_M));
}

#[test]
fn gpt_oss_mxfp4() {
    check_synth(&Spec::new(Arch::GptOss));
}

#[test]
fn deepseek2_q8_0() {
    check_synth(&Spec::new(Arch::DeepSeek2).quant(TensorType::Q8_0));
}

#[test]
fn hy_v3_fused() {
    check_synth(&Spec::new(Arch::HyV3));
}

/// Two contexts of one model at the same time, one with prompts, one with single tokens.
#[test]
fn contexts_share_slots_and_the_area() {
    let synth = Synth::qwen();
    let reference_model = stock(&synth.path);
    let vocab = reference_model.vocab().len();
    let runs = [(60, 4, 32), (6, 40, 1), (90, 2, 90)]
        .map(|(prompt, n, batch)| Run::new(&reference_model, prompt, n, batch));
    let expected: Vec<_> = runs.iter().map(|run| run.logits(&reference_model)).collect();
    let model = streamed(&synth.path, Room::Share(0.4));
    common::watched("contexts on one device", || {
        std::thread::scope(|s| {
            for (run, expected) in runs.iter().zip(&expected) {
                let model = &model;
                s.spawn(move || {
                    for round in 0..3 {
                        let what = format!("prompt {}, round {round}", run.prompt.len());
                        assert_same_bits(expected, &run.logits(model), vocab, &what);
                    }
                });
            }
        });
    });
}

/// Records that come from a pool in host memory, of all records and of very few, which take turns
/// in its slots when a layer is staged.
#[test]
fn three_tiers() {
    for spec in [
        Spec::new(Arch::Qwen3Moe).quant(Quant::Q4_K_M),
        Spec::new(Arch::Mixtral).quant(TensorType::F16),
    ] {
        let synth = Synth::new(&spec);
        let reference_model = stock(&synth.path);
        let vocab = reference_model.vocab().len();
        for (prompt, n_batch) in [(12, 1), (80, 40)] {
            let run = Run::new(&reference_model, prompt, 16, n_batch);
            let reference = run.logits(&reference_model);
            for (above, below, preload, staged) in [
                (0.4, 1.0, true, 2),
                (0.4, 1.0, true, 1),
                (0.4, 1.0, false, 2),
                (0.3, 0.6, true, 2),
                (0.3, 0.6, true, 1),
            ] {
                let what = format!("batch {n_batch}, {above} over {below}, {preload}, {staged}");
                let device = stand_in();
                let model = load_on_stand_in(&synth.path, &device, reader());
                let pool = PoolOptions {
                    size: PoolSize::Share(above),
                    policy: Policy::Lru,
                    seed: 1,
                    preload,
                    below: Some(PoolSize::Share(below)),
                    staged,
                };
                model.attach_pool(&pool, &mut |_| true).unwrap();
                assert!(device.pinned_bytes() > model.pool_below_bytes().unwrap().0, "{what}");
                assert_same_bits(&reference, &run.logits(&model), vocab, &what);
                let c = model.expert_counters();
                let in_vain = c.read_ahead - c.read_ahead_used;
                assert_eq!(c.read_ahead > 0, n_batch > 1 && staged > 1, "{what}: {c:?}");
                assert!(0 < c.ram_hits && c.ram_hits <= c.faults + in_vain, "{what}: {c:?}");
                let all = model.expert_bytes();
                match (below, preload) {
                    (1.0, true) => {
                        assert_eq!((c.bytes_read, c.ram_hits), (all, c.faults + in_vain), "{what}")
                    }
                    (1.0, false) => assert!(c.bytes_read <= all, "{what}: {c:?}"),
                    _ => assert!(c.ram_hits < c.faults + in_vain, "{what}: {c:?}"),
                }
                drop(model);
                assert_eq!(device.pinned_bytes(), 0);
            }
        }
    }
}

/// Recorded routing takes the place of the router's for single tokens, round and round.
#[test]
fn replayed_routing_decides_what_is_moved() {
    let synth = Synth::qwen();
    let model = streamed(&synth.path, Room::Share(0.5));
    let run = Run::new(&model, 4, 0, 1);
    let layers = 6;
    let of = |first: u32| vec![(first..first + 8).collect::<Vec<u32>>(); layers];
    let mut context = run.context(&model);
    context.replay(Some(Replay::new(vec![of(0), of(8)])));
    run.logits_in(&mut context).unwrap();
    let c = model.expert_counters();
    let records = 8 * layers as u64;
    assert_eq!((c.requests, c.faults, c.first_touches), (4 * records, 2 * records, 2 * records));
    for layer in model.layer_uses() {
        // Two tokens each.
        let twice: Vec<u32> = (0..64).map(|expert| if expert < 16 { 2 } else { 0 }).collect();
        assert_eq!(layer.uses, twice);
        assert_eq!((layer.from_vram, layer.from_ram, layer.from_drive), (16, 0, 16));
    }
    // Of another model.
    context.replay(Some(Replay::new(vec![vec![vec![64; 8]; layers]])));
    context.clear();
    let error = run.logits_in(&mut context).map(drop).unwrap_err();
    assert!(matches!(error, Error::Replay { layer: 0, .. }), "{error:?}");
}

/// The smallest pools that work, one above the other.
#[test]
fn two_floors() {
    let synth = Synth::qwen();
    let reference_model = stock(&synth.path);
    let run = Run::new(&reference_model, 60, 8, 24);
    let reference = run.logits(&reference_model);
    let model = load_on_stand_in(&synth.path, &stand_in(), reader());
    let pool = PoolOptions {
        size: PoolSize::Bytes(model.least_pool_bytes()),
        policy: Policy::Lru,
        seed: 1,
        preload: true,
        below: Some(PoolSize::Bytes(model.below_bytes().0)),
        staged: 2,
    };
    model.attach_pool(&pool, &mut |_| true).unwrap();
    let logits = run.logits(&model);
    assert_same_bits(&reference, &logits, reference_model.vocab().len(), "floors");
}

/// The pool takes the device's memory as it fills, and gives all of it back.
#[test]
fn memory_is_taken_as_it_is_used() {
    let synth = Synth::qwen();
    let device = stand_in();
    let free = || device.device().memory().unwrap().free_bytes;
    let before = free();
    let model = load_on_stand_in(&synth.path, &device, reader());
    attach(&model, Room::Share(1.0), Policy::Lru);
    let loaded = free();
    assert!(model.vram_bytes() == Some(0) && loaded < before, "the dense weights are there");
    let run = Run::new(&model, 3, 0, 1);
    run.logits(&model);
    let taken = model.vram_bytes().unwrap();
    assert!(taken > 0 && free() == loaded - taken);
    drop(model);
    assert_eq!((free(), device.pinned_bytes()), (before, 0));
}

/// Memory that cannot be mapped, a copy that fails, a read that fails: the decode says so, and
/// the next one is right.
#[test]
fn what_goes_wrong_is_told_and_leaves_no_trace() {
    let synth = Synth::qwen();
    let reference_model = stock(&synth.path);
    let vocab = reference_model.vocab().len();
    for n_batch in [1, 32] {
        let run = Run::new(&reference_model, 40, 4, n_batch);
        let reference = run.logits(&reference_model);
        // Of a batch's first layer some 190 copies come over the bus, and then those that are kept.
        let copies = [7, 190, 200, 215, 230, 400].map(|after| (Fault::CopyRefused, after));
        let all = [(Fault::MapRefused, 0)].into_iter().chain(copies);
        for (fault, after) in all {
            let device = stand_in();
            let model = load_on_stand_in(&synth.path, &device, reader());
            attach(&model, Room::Share(0.4), Policy::Lru);
            let mut context = run.context(&model);
            device.inject(fault, after);
            let what = format!("batch {n_batch}, {fault:?} after {after}");
            let error = run.logits_in(&mut context).map(drop).expect_err(&what);
            assert!(matches!(error, Error::Gpu(_)), "{what}: {error:?}");
            context.clear();
            assert_same_bits(&reference, &run.logits_in(&mut context).unwrap(), vocab, &what);
        }
        let loading = reader();
        load_on_stand_in(&synth.path, &stand_in(), loading.clone());
        let loading = loading.stats().reads;
        for nth in [loading + 3, loading + 30] {
            let rule = Rule::all(Action::Errno(libc::EIO)).nth(nth..nth + 1);
            let model = load_on_stand_in(&synth.path, &stand_in(), faulty(vec![rule]));
            attach(&model, Room::Share(0.4), Policy::Lru);
            let mut context = run.context(&model);
            let what = format!("batch {n_batch}, read {nth}");
            let error = run.logits_in(&mut context).map(drop).expect_err(&what);
            assert!(matches!(error, Error::Io(_)), "{what}: {error:?}");
            context.clear();
            assert_same_bits(&reference, &run.logits_in(&mut context).unwrap(), vocab, &what);
        }
    }
}

/// Nobody waits for a buffer of the ring that is given back only when another one has come.
#[test]
fn rings_of_few_buffers() {
    let synth = Synth::qwen();
    let reference = stock(&synth.path);
    let run = Run::new(&reference, 40, 8, 16);
    let (expected, vocab) = (run.logits(&reference), reference.vocab().len());
    for buffers in [1, 2, 3, 4, 5, 6, 9] {
        let config =
            tierstream_io::Config { ring_bytes: buffers * (256 << 10), ..common::config() };
        let reader = Arc::new(Reader::new(config).unwrap());
        let device = StandIn::new(Config { memory_bytes: 256 << 20, ..Config::default() }).unwrap();
        let model = load_on_stand_in(&synth.path, &device, reader);
        attach(&model, Room::Share(0.25), Policy::Lru);
        let logits = common::watched("a small ring", || run.logits(&model));
        assert_same_bits(&expected, &logits, vocab, &format!("{buffers} buffers"));
    }
}

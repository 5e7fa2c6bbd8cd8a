//! Experts that the processor computes from the pool in host memory, beside a GPU: over the stand-in,
//! where both have the same kernels, so that the output is that of the resident model, bit for bit.

mod common;

use std::path::Path;

use common::{
    Room, Run, Synth, assert_same_bits, attach, demo, faulty, load_on_stand_in, reader, stock,
};
use tierstream_cuda::standin::{Config, Fault, StandIn};
use tierstream_ggml::{
    Error, ExpertCounters, Miss, Model, PoolOptions, PoolSize, Prefetch, Replay,
};
use tierstream_io::wrap::{Action, Rule};
use tierstream_pool::Policy;
use tierstream_synth::{Arch, Quant, Spec, TensorType};

/// Shares of all experts in the GPU's pool and in the one below; the least that works if that is more.
const POOLS: [(f64, f64); 4] = [(0.5, 1.0), (0.2, 1.0), (0.3, 0.5), (0.0, 0.0)];

fn stand_in() -> StandIn {
    StandIn::new(Config::default()).unwrap()
}

fn tiered(path: &Path, device: &StandIn, (above, below): (f64, f64)) -> Model {
    let model = load_on_stand_in(path, device, reader());
    attach_tiered(&model, (above, below));
    model
}

fn attach_tiered(model: &Model, (above, below): (f64, f64)) {
    // Small models need more than a small share.
    let size = |share: f64, least: u64| match PoolSize::Share(share) {
        size if model.pool_bytes_of(size).is_ok() => size,
        _ => PoolSize::Bytes(least),
    };
    let pool = PoolOptions {
        size: size(above, model.least_pool_bytes()),
        policy: Policy::Lru,
        seed: 1,
        preload: true,
        below: Some(size(below, model.below_bytes().0)),
        staged: 1,
    };
    model.attach_pool(&pool, &mut |_| true).unwrap();
}

fn check_counters(c: &ExpertCounters, what: &str) {
    assert!(c.requests > 0 && c.requests == c.hits + c.faults, "{what}: {c:?}");
    assert!(c.computed > 0, "{what}: {c:?}");
    assert!(c.hits > 0, "what is needed often comes to slots: {what}: {c:?}");
}

fn check(path: &Path, generate: usize) {
    let reference_model = stock(path);
    let vocab = reference_model.vocab().len();
    for (prompt, n_batch, n_threads) in [(12, 1, 1), (50, 40, 2)] {
        let run = Run::new(&reference_model, prompt, generate, n_batch);
        let reference = run.logits(&reference_model);
        let run = Run { miss: Miss::Compute, n_threads, ..run };
        for pools in POOLS {
            let what = format!("batch {n_batch}, {pools:?}");
            let device = stand_in();
            let model = tiered(path, &device, pools);
            assert_same_bits(&reference, &run.logits(&model), vocab, &what);
            let c = model.expert_counters();
            check_counters(&c, &what);
            if n_batch == 1 {
                assert_eq!(c.computed, c.faults, "{what}: {c:?}");
            }
            drop(model);
            assert_eq!(device.pinned_bytes(), 0, "{what}");
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
fn qwen3moe_seven_experts_one_used() {
    check_synth(&Spec::new(Arch::Qwen3Moe).experts(7, 1).quant(TensorType::Q8_0));
}

#[test]
fn olmoe_q8_0() {
    check_synth(&Spec::new(Arch::Olmoe).quant(TensorType::Q8_0));
}

/// Biases beside the experts.
#[test]
fn gpt_oss_mxfp4() {
    check_synth(&Spec::new(Arch::GptOss));
}

#[test]
fn deepseek2_q8_0() {
    check_synth(&Spec::new(Arch::DeepSeek2).quant(TensorType::Q8_0));
}

/// One matmul for gate and up, cut in two by views.
#[test]
fn hy_v3_fused() {
    check_synth(&Spec::new(Arch::HyV3));
}

/// The input is weighted before the experts: a row for each of them.
#[test]
fn llama4_bf16() {
    check_synth(&Spec::new(Arch::Llama4).quant(TensorType::BF16));
}

#[test]
fn mixtral_f16() {
    check_synth(&Spec::new(Arch::Mixtral).quant(TensorType::F16));
}

/// Both ways are tried, and whichever is taken the bits are the same here. (In the smallest pools
/// hardly anything is copied without a read, so that there is nothing to decide by.)
#[test]
fn auto_tries_both() {
    let synth = Synth::qwen();
    let reference_model = stock(&synth.path);
    let run = Run::new(&reference_model, 12, 24, 1);
    let reference = run.logits(&reference_model);
    for pools in [(0.5, 1.0), (0.2, 1.0), (0.3, 0.6)] {
        let what = format!("{pools:?}");
        let model = tiered(&synth.path, &stand_in(), pools);
        let run = Run { miss: Miss::Auto, ..run.clone() };
        assert_same_bits(&reference, &run.logits(&model), reference_model.vocab().len(), &what);
        let c = model.expert_counters();
        assert!(0 < c.computed && c.computed < c.faults, "{what}: {c:?}");
    }
}

/// What is guessed is brought beside what is computed; what has not come in time is computed too.
#[test]
fn guesses_come_beside_what_is_computed() {
    let synth = Synth::qwen();
    let reference_model = stock(&synth.path);
    let run = Run::new(&reference_model, 24, 24, 1);
    let reference = run.logits(&reference_model);
    for (prefetch, miss) in [
        (Prefetch::Lookahead, Miss::Compute),
        (Prefetch::Lag, Miss::Compute),
        (Prefetch::Auto, Miss::Compute),
        (Prefetch::Lookahead, Miss::Auto),
    ] {
        let mut sum = ExpertCounters::default();
        for pools in POOLS {
            let what = format!("{prefetch}, {miss}, {pools:?}");
            let device = stand_in();
            let model = tiered(&synth.path, &device, pools);
            let run = Run { prefetch, miss, ..run.clone() };
            assert_same_bits(&reference, &run.logits(&model), reference_model.vocab().len(), &what);
            let c = model.expert_counters();
            if miss == Miss::Compute {
                check_counters(&c, &what);
            }
            sum.computed += c.computed;
            sum.read_ahead += c.read_ahead;
            sum.read_ahead_used += c.read_ahead_used;
            model.clear_pool();
            assert_eq!((model.pool_bytes().1, model.pool_below_bytes().unwrap().1), (0, 0));
            drop(model);
            assert_eq!(device.pinned_bytes(), 0, "{what}");
        }
        assert!(sum.computed > 0, "{prefetch}, {miss}: {sum:?}");
        if prefetch == Prefetch::Lookahead {
            assert!(0 < sum.read_ahead_used && sum.read_ahead_used <= sum.read_ahead, "{sum:?}");
        }
    }
}

/// Bytes that came to the GPU are those of records that came there.
#[test]
fn what_is_computed_is_not_brought() {
    let synth = Synth::qwen();
    let reference_model = stock(&synth.path);
    let run = Run { miss: Miss::Compute, ..Run::new(&reference_model, 12, 12, 1) };
    let model = tiered(&synth.path, &stand_in(), (0.3, 1.0));
    run.logits(&model);
    let c = model.expert_counters();
    let record_bytes = model.whole_pool_bytes() / (6 * 64);
    let brought = c.bytes_brought / record_bytes;
    assert!(0 < brought && brought < c.computed, "{brought}, {c:?}");
    let resident = model.pool_bytes().1 / record_bytes;
    assert_eq!(brought, resident + c.evictions, "{c:?}");
}

/// Without a pool below, there is nothing to compute from: records are brought as ever.
#[test]
fn without_a_pool_below_all_is_copied() {
    let synth = Synth::qwen();
    let reference_model = stock(&synth.path);
    let run = Run::new(&reference_model, 12, 8, 1);
    let reference = run.logits(&reference_model);
    for room in [Room::Share(0.4), Room::Share(1.0), Room::Preloaded] {
        let model = load_on_stand_in(&synth.path, &stand_in(), reader());
        attach(&model, room, Policy::Lru);
        let run = Run { miss: Miss::Compute, ..run.clone() };
        let what = format!("{room:?}");
        assert_same_bits(&reference, &run.logits(&model), reference_model.vocab().len(), &what);
        assert_eq!(model.expert_counters().computed, 0, "{what}");
    }
}

/// Recorded routing takes the place of the router's, and what it moves is computed just as well.
#[test]
fn replayed_routing() {
    let synth = Synth::qwen();
    let layers = 6;
    let of = |first: u32| vec![(first..first + 8).collect::<Vec<u32>>(); layers];
    let logits = |miss| {
        let model = tiered(&synth.path, &stand_in(), (0.3, 1.0));
        let run = Run { miss, ..Run::new(&model, 12, 0, 1) };
        let mut context = run.context(&model);
        context.replay(Some(Replay::new(vec![of(0), of(8), of(20)])));
        let logits = run.logits_in(&mut context).unwrap();
        (logits, model.expert_counters(), model.vocab().len())
    };
    let (copied, c, vocab) = logits(Miss::Copy);
    assert_eq!((c.computed, c.first_touches), (0, 3 * 8 * layers as u64));
    let (computed, c, _) = logits(Miss::Compute);
    assert_same_bits(&copied, &computed, vocab, "replayed");
    // Nothing is known of any record at first.
    assert!(c.computed >= 3 * 8 * layers as u64 && c.computed == c.faults, "{c:?}");
    assert_eq!((c.requests, c.first_touches), (12 * 8 * layers as u64, 3 * 8 * layers as u64));
}

/// Records that are on their way to slots, or in use below, are in nobody's way for long: contexts of
/// one model, with the smallest pools that work.
#[test]
fn contexts_share_both_pools() {
    let synth = Synth::qwen();
    let reference_model = stock(&synth.path);
    let vocab = reference_model.vocab().len();
    let runs = [
        (20, 30, 1, Miss::Compute, Prefetch::Off),
        (6, 40, 1, Miss::Auto, Prefetch::Off),
        (60, 8, 32, Miss::Compute, Prefetch::Lookahead),
        (9, 40, 1, Miss::Compute, Prefetch::Lookahead),
        (12, 40, 1, Miss::Copy, Prefetch::Lookahead),
    ];
    let runs = runs.map(|(prompt, n, batch, miss, prefetch)| {
        let run = Run::new(&reference_model, prompt, n, batch);
        (Run { miss, prefetch, ..run.clone() }, run)
    });
    let expected: Vec<_> = runs.iter().map(|(_, run)| run.logits(&reference_model)).collect();
    let runs = runs.map(|(run, _)| run);
    for pools in [(0.4, 1.0), (0.3, 0.4), (0.0, 0.0)] {
        let model = tiered(&synth.path, &stand_in(), pools);
        common::watched("contexts on one device", || {
            std::thread::scope(|s| {
                for (run, expected) in runs.iter().zip(&expected) {
                    let model = &model;
                    s.spawn(move || {
                        for round in 0..3 {
                            let what = format!("{pools:?}, {:?}, round {round}", run.miss);
                            assert_same_bits(expected, &run.logits(model), vocab, &what);
                        }
                    });
                }
            });
        });
    }
}

/// Copies that fail, memory that cannot be mapped, a pool that shrinks meanwhile: what goes wrong is
/// told, and the next decode is right.
#[test]
fn what_goes_wrong_leaves_no_trace() {
    let synth = Synth::qwen();
    let reference_model = stock(&synth.path);
    let vocab = reference_model.vocab().len();
    let run = Run { miss: Miss::Compute, ..Run::new(&reference_model, 30, 4, 1) };
    let reference = run.logits(&reference_model);
    for (fault, after) in [0, 1, 7, 100]
        .map(|after| (Fault::CopyRefused, after))
        .into_iter()
        .chain([(Fault::MapRefused, 0), (Fault::MapRefused, 3)])
    {
        let device = stand_in();
        let model = tiered(&synth.path, &device, (0.4, 1.0));
        let mut context = run.context(&model);
        device.inject(fault, after);
        let what = format!("{fault:?} after {after}");
        let error = run.logits_in(&mut context).map(drop).expect_err(&what);
        assert!(matches!(error, Error::Gpu(_)), "{what}: {error:?}");
        context.clear();
        assert_same_bits(&reference, &run.logits_in(&mut context).unwrap(), vocab, &what);
        // No slot is held by anybody.
        let least = PoolSize::Bytes(model.least_pool_bytes());
        model.resize_pool(least).unwrap();
        context.clear();
        assert_same_bits(&reference, &run.logits_in(&mut context).unwrap(), vocab, &what);
        drop(context);
        model.clear_pool();
        assert_eq!((model.pool_bytes().1, model.pool_below_bytes().unwrap().1), (0, 0), "{what}");
    }
}

/// Reads into the pool below that fail.
#[test]
fn reads_that_fail() {
    let synth = Synth::qwen();
    let reference_model = stock(&synth.path);
    let run = Run { miss: Miss::Compute, ..Run::new(&reference_model, 30, 4, 1) };
    let reference = run.logits(&reference_model);
    let loading = reader();
    load_on_stand_in(&synth.path, &stand_in(), loading.clone());
    let loading = loading.stats().reads;
    for nth in [loading + 3, loading + 30] {
        let rule = Rule::all(Action::Errno(libc::EIO)).nth(nth..nth + 1);
        let model = load_on_stand_in(&synth.path, &stand_in(), faulty(vec![rule]));
        attach_tiered(&model, (0.4, 0.5));
        let mut context = run.context(&model);
        let what = format!("read {nth}");
        let error = run.logits_in(&mut context).map(drop).expect_err(&what);
        assert!(matches!(error, Error::Io(_)), "{what}: {error:?}");
        context.clear();
        let logits = run.logits_in(&mut context).unwrap();
        assert_same_bits(&reference, &logits, reference_model.vocab().len(), &what);
    }
}

//! Reading ahead for single tokens on a GPU, over the stand-in, which computes and copies no sooner
//! than somebody waits: whatever is guessed, rightly or not, the output is that of the resident model,
//! bit for bit, and nothing stays held.

mod common;

use std::path::Path;

use common::{Room, Run, Synth, assert_same_bits, attach, demo, load_on_stand_in, reader, stock};
use tierstream_cuda::standin::{Config, StandIn};
use tierstream_ggml::{ExpertCounters, Model, PoolOptions, PoolSize, Prefetch};
use tierstream_pool::Policy;
use tierstream_synth::{Arch, Quant, Spec, TensorType};

fn stand_in() -> StandIn {
    StandIn::new(Config::default()).unwrap()
}

fn three_tiers(model: &Model, above: f64, below: f64, preload: bool) {
    let pool = PoolOptions {
        size: PoolSize::Share(above),
        policy: Policy::Lru,
        seed: 1,
        preload,
        below: Some(PoolSize::Share(below)),
        staged: 2,
    };
    model.attach_pool(&pool, &mut |_| true).unwrap();
}

/// Nothing of the pools is held: all records can be forgotten.
fn assert_nothing_held(model: &Model, what: &str) {
    model.clear_pool();
    assert_eq!(model.pool_bytes().1, 0, "{what}: slots are held");
    if let Some((_, resident)) = model.pool_below_bytes() {
        assert_eq!(resident, 0, "{what}: slots below are held");
    }
}

/// Pools of two sizes from the drive, and three over pools in host memory.
fn pools() -> [(&'static str, fn(&Model)); 5] {
    [
        ("half", |model| attach(model, Room::Share(0.5), Policy::Lru)),
        ("the smallest", |model| attach(model, Room::Floor(0), Policy::Lru)),
        ("half over all", |model| three_tiers(model, 0.5, 1.0, true)),
        ("half over what comes", |model| three_tiers(model, 0.5, 1.0, false)),
        ("half over three quarters", |model| three_tiers(model, 0.5, 0.75, true)),
    ]
}

/// Sums over all runs.
fn check(path: &Path, prefetch: Prefetch) -> ExpertCounters {
    let reference_model = stock(path);
    let vocab = reference_model.vocab().len();
    let mut sum = ExpertCounters::default();
    for (prompt, n_batch) in [(24, 1), (40, 16)] {
        let run = Run::new(&reference_model, prompt, 24, n_batch);
        let reference = run.logits(&reference_model);
        let run = Run { prefetch, ..run };
        for (name, pool) in pools() {
            let what = format!("{prefetch}, batch {n_batch}, {name}");
            let device = stand_in();
            let model = load_on_stand_in(path, &device, reader());
            pool(&model);
            assert_same_bits(&reference, &run.logits(&model), vocab, &what);
            let c = model.expert_counters();
            assert!(c.requests > 0 && c.requests == c.hits + c.faults, "{what}: {c:?}");
            assert!(c.read_ahead_used <= c.read_ahead, "{what}: {c:?}");
            if n_batch == 1 {
                sum.read_ahead += c.read_ahead;
                sum.read_ahead_used += c.read_ahead_used;
            }
            assert_nothing_held(&model, &what);
            drop(model);
            assert_eq!(device.pinned_bytes(), 0, "{what}");
        }
    }
    sum
}

/// Guesses of routers, some of them wrong.
fn check_lookahead(path: &Path) {
    let c = check(path, Prefetch::Lookahead);
    assert!(0 < c.read_ahead_used && c.read_ahead_used < c.read_ahead, "{c:?}");
}

fn check_synth(spec: &Spec) {
    check_lookahead(&Synth::new(spec).path);
}

#[test]
fn demo_model() {
    check_lookahead(&demo());
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

#[test]
fn gpt_oss_mxfp4() {
    check_synth(&Spec::new(Arch::GptOss));
}

#[test]
fn deepseek2_f16() {
    check_synth(&Spec::new(Arch::DeepSeek2).quant(TensorType::F16));
}

#[test]
fn deepseek2_fused_q4_k_m() {
    let mut spec = Spec::new(Arch::DeepSeek2).quant(Quant::Q4_K_M);
    spec.fused_gate_up = true;
    check_synth(&spec);
}

#[test]
fn llama4_bf16() {
    check_synth(&Spec::new(Arch::Llama4).quant(TensorType::BF16));
}

#[test]
fn mixtral_q5_k() {
    check_synth(&Spec::new(Arch::Mixtral).quant(TensorType::Q5_K));
}

#[test]
fn hy_v3_fused_q6_k() {
    check_synth(&Spec::new(Arch::HyV3).quant(TensorType::Q6_K));
}

/// What the last token needed is read where the pool cannot hold a token's records.
#[test]
fn lag() {
    check(&Synth::qwen().path, Prefetch::Lag);
}

/// Enough tokens for trials with and without, and what comes after.
#[test]
fn auto_goes_on_and_off() {
    let synth = Synth::qwen();
    let reference_model = stock(&synth.path);
    let run = Run::new(&reference_model, 100, 10, 1);
    let reference = run.logits(&reference_model);
    let run = Run { prefetch: Prefetch::Auto, ..run };
    let model = load_on_stand_in(&synth.path, &stand_in(), reader());
    three_tiers(&model, 0.5, 1.0, true);
    let logits = run.logits(&model);
    assert_same_bits(&reference, &logits, reference_model.vocab().len(), "auto");
    assert!(model.expert_counters().read_ahead > 0);
    assert_nothing_held(&model, "auto");
}

//! Streamed output equals the resident run of stock llama.cpp, bit for bit: every row of logits of
//! prompt and generation.

mod common;

use std::path::Path;

use common::{Room, Run, Synth, assert_same_bits, demo, reader, stock, streamed_with};
use tierstream_ggml::{Keep, LayerUse, Model, Prefetch};
use tierstream_pool::Policy;
use tierstream_synth::{Arch, Quant, Spec, TensorType};

const ROOMS: [Room; 5] =
    [Room::Preloaded, Room::Share(1.0), Room::Share(0.5), Room::Share(0.25), Room::Floor(0)];
const POLICIES: [Policy; 3] = [Policy::Lru, Policy::Lfu { half_life: 64 }, Policy::Random];

/// Prompts and batches of most cases; a batch of one token is too slow for a long prompt.
const SHORT: [(usize, u32); 3] = [(12, 1), (80, 64), (96, 512)];
/// A full batch of 512 tokens and a rest.
const LONG: [(usize, u32); 3] = [(16, 1), (130, 64), (530, 512)];

/// Every pool size with every batch; policies so that each meets each room and each batch. `turn`
/// shifts which.
fn check(path: &Path, runs: [(usize, u32); 3], generate: usize, turn: usize) {
    let reference_model = stock(path);
    assert!(!reference_model.is_streamed());
    let vocab = reference_model.vocab().len();
    for (b, (prompt, n_batch)) in runs.into_iter().enumerate() {
        let run = Run::new(&reference_model, prompt, generate, n_batch);
        let run = Run { prefetch: Prefetch::Lookahead, ..run };
        let reference = run.logits(&reference_model);
        assert!(reference.iter().all(|x| x.is_finite()), "the model says something");
        for (r, room) in ROOMS.into_iter().enumerate() {
            let policy = POLICIES[(r + b + turn) % 3];
            let what = format!("batch {n_batch}, {room:?}, {policy:?}");
            let model = streamed_with(path, room, policy, reader());
            let logits = run.logits(&model);
            assert_same_bits(&reference, &logits, vocab, &what);
            check_counters(&model, room, &what);
        }
    }
}

/// That the run was what it claims to be.
fn check_counters(model: &Model, room: Room, what: &str) {
    let c = model.expert_counters();
    let (budget, resident) = model.pool_bytes();
    assert!(c.requests > 0 && c.requests == c.hits + c.faults, "{what}: {c:?}");
    assert!(resident <= budget, "{what}");
    let layers = model.layer_uses();
    let sum = |of: fn(&LayerUse) -> u64| layers.iter().map(of).sum::<u64>();
    let found = (sum(|l| l.from_vram), sum(|l| l.from_ram), sum(|l| l.from_drive));
    assert_eq!(found, (0, c.hits, c.faults), "{what}");
    let asked = sum(|l| l.uses.iter().copied().map(u64::from).sum());
    // Nobody looks at the routing while all records are in place.
    let seen = if room == Room::Preloaded { 0 } else { c.requests };
    assert_eq!(asked, seen, "{what}");
    match room {
        Room::Preloaded => assert_eq!(c.bytes_read, model.expert_bytes(), "{what}: {c:?}"),
        Room::Share(1.0) => assert!(c.faults > 0 && c.evictions == 0, "{what}: {c:?}"),
        Room::Floor(_) => {
            assert!(c.faults + c.read_ahead > c.first_touches, "{what}: records come again: {c:?}");
        }
        Room::Share(_) => assert!(c.faults + c.read_ahead >= c.first_touches, "{what}: {c:?}"),
    }
}

fn check_synth(spec: &Spec, runs: [(usize, u32); 3], turn: usize) {
    let model = Synth::new(spec);
    check(&model.path, runs, 12, turn);
}

#[test]
fn demo_model() {
    check(&demo(), [(16, 1), (96, 64), (530, 512)], 32, 0);
}

#[test]
fn qwen3moe_q4_0_long() {
    check_synth(&Spec::new(Arch::Qwen3Moe), LONG, 1);
}

#[test]
fn qwen3moe_q4_k_m_of_several_size_classes() {
    check_synth(&Spec::new(Arch::Qwen3Moe).quant(Quant::Q4_K_M), SHORT, 2);
}

#[test]
fn qwen3moe_seven_experts_one_used() {
    check_synth(&Spec::new(Arch::Qwen3Moe).experts(7, 1).quant(TensorType::Q8_0), SHORT, 0);
}

#[test]
fn olmoe_q8_0() {
    check_synth(&Spec::new(Arch::Olmoe).quant(TensorType::Q8_0), SHORT, 1);
}

/// Parts of a record that are read in place, and of no whole blocks: each expert of a layer is off
/// the drive's blocks by another number of bytes.
#[test]
fn qwen3moe_large_odd_parts() {
    let mut spec = Spec::new(Arch::Qwen3Moe).experts(12, 3).width(544).quant(TensorType::Q8_0);
    spec.n_ff_exp = 288;
    let records = spec.plan().records();
    let part_bytes = 544 * 288 / 32 * 34;
    assert!(records.iter().all(|&(_, bytes)| bytes == 3 * part_bytes), "{records:?}");
    assert!(part_bytes > 64 << 10 && part_bytes % 512 != 0);
    check_synth(&spec, SHORT, 0);
}

#[test]
fn olmoe_split_into_files() {
    let mut spec = Spec::new(Arch::Olmoe);
    spec.split_bytes = Some(1 << 20);
    spec.split_empty_first = true;
    check_synth(&spec, SHORT, 2);
}

#[test]
fn gpt_oss_mxfp4_long() {
    check_synth(&Spec::new(Arch::GptOss), LONG, 0);
}

#[test]
fn deepseek2_f16() {
    check_synth(&Spec::new(Arch::DeepSeek2).quant(TensorType::F16), SHORT, 1);
}

#[test]
fn deepseek2_fused_q4_k_m() {
    let mut spec = Spec::new(Arch::DeepSeek2).quant(Quant::Q4_K_M);
    spec.fused_gate_up = true;
    check_synth(&spec, SHORT, 2);
}

#[test]
fn llama4_bf16() {
    check_synth(&Spec::new(Arch::Llama4).quant(TensorType::BF16), SHORT, 0);
}

#[test]
fn mixtral_f32() {
    check_synth(&Spec::new(Arch::Mixtral).quant(TensorType::F32), SHORT, 1);
}

#[test]
fn mixtral_q5_k() {
    check_synth(&Spec::new(Arch::Mixtral).quant(TensorType::Q5_K), SHORT, 2);
}

#[test]
fn hy_v3_fused_q6_k() {
    check_synth(&Spec::new(Arch::HyV3).quant(TensorType::Q6_K), SHORT, 0);
}

/// Records are read on the next layer's router's guess, some of them for nothing: with softmax,
/// sigmoid and biases, and with groups of experts.
#[test]
fn read_ahead() {
    for arch in [Arch::Qwen3Moe, Arch::GptOss, Arch::Llama4, Arch::DeepSeek2] {
        let synth = Synth::new(&Spec::new(arch));
        let reference_model = stock(&synth.path);
        for n_batch in [1, 4] {
            let run = Run::new(&reference_model, 24, 24, n_batch);
            let run = Run { prefetch: Prefetch::Lookahead, ..run };
            let reference = run.logits(&reference_model);
            let model = streamed_with(&synth.path, Room::Share(0.5), Policy::Lru, reader());
            let logits = run.logits(&model);
            let what = format!("{arch:?}, batch {n_batch}");
            assert_same_bits(&reference, &logits, reference_model.vocab().len(), &what);
            let c = model.expert_counters();
            assert!(0 < c.read_ahead_used && c.read_ahead_used < c.read_ahead, "{what}: {c:?}");
        }
    }
}

/// Threads that share the rows of a record: mixed K-quants, and MXFP4 with biases.
#[test]
fn two_threads() {
    let specs = [
        Spec::new(Arch::Qwen3Moe).quant(Quant::Q4_K_M),
        Spec::new(Arch::DeepSeek2).quant(Quant::Q4_K_M),
        Spec::new(Arch::GptOss),
    ];
    for spec in specs {
        let synth = Synth::new(&spec);
        let reference_model = stock(&synth.path);
        for (prompt, n_batch) in [(6, 1), (40, 16), (80, 64)] {
            let run = Run::new(&reference_model, prompt, 8, n_batch);
            let run = Run { n_threads: 2, prefetch: Prefetch::Auto, ..run };
            let reference = run.logits(&reference_model);
            for room in [Room::Preloaded, Room::Share(0.25), Room::Floor(0)] {
                let what = format!("{:?}, batch {n_batch}, {room:?}", spec.arch);
                let model = streamed_with(&synth.path, room, Policy::Lru, reader());
                let logits = run.logits(&model);
                assert_same_bits(&reference, &logits, reference_model.vocab().len(), &what);
                check_counters(&model, room, &what);
            }
        }
    }
}

/// The last layer of a batch without kept rows has no tokens.
#[test]
fn last_row_only() {
    let synth = Synth::qwen();
    let last = |model: &Model| {
        let run = Run::new(model, 70, 0, 32);
        let mut context = run.context(model);
        let mut rows = Vec::new();
        context.decode(&run.prompt, Keep::Last, |i, row| rows.push((i, row.to_vec()))).unwrap();
        assert_eq!(rows.len(), 1);
        assert_eq!(rows[0].0, 69);
        rows.remove(0).1
    };
    let reference = stock(&synth.path);
    let expected = last(&reference);
    for room in ROOMS {
        let model = streamed_with(&synth.path, room, Policy::Lru, reader());
        let what = format!("{room:?}");
        assert_same_bits(&expected, &last(&model), reference.vocab().len(), &what);
    }
}

/// Rewinding and emptying pool and context leaves no trace in later output.
#[test]
fn forgetting_tokens_and_records() {
    let synth = Synth::qwen();
    let reference_model = stock(&synth.path);
    let run = Run { n_threads: 2, ..Run::new(&reference_model, 40, 8, 16) };
    let reference = run.logits(&reference_model);
    let vocab = reference_model.vocab().len();
    for room in ROOMS {
        let model = streamed_with(&synth.path, room, Policy::Lru, reader());
        let mut context = run.context(&model);
        for round in 0..3 {
            let logits = run.logits_in(&mut context).unwrap();
            assert_same_bits(&reference, &logits, vocab, &format!("{room:?}, round {round}"));
            match round {
                0 => context.clear(),
                _ => assert!(context.forget_from(0)),
            }
            assert_eq!(context.position(), 0);
            model.clear_pool();
            assert_eq!(model.pool_bytes().1, 0);
        }
    }
}

//! Reading ahead for single tokens on a GPU, over the stand-in, which computes and copies no sooner
//! than somebody waits: whatever is guessed, rightly or not, the output is that of the resident model,
//! bit for bit, and nothing stays held.

mod common;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::{
    Room, Run, Synth, assert_same_bits, attach, demo, faulty, load_on_stand_in, reader, stock,
    watched,
};
use tierstream_cuda::standin::{Config, Fault, StandIn};
use tierstream_ggml::{Error, ExpertCounters, Keep, Miss, Model, PoolOptions, PoolSize, Prefetch};
use tierstream_io::wrap::{Action, Rule};
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

/// What a pool is called, and what makes it.
type Pool = (&'static str, fn(&Model));

/// Pools from the drive, and over pools in host memory.
fn pools() -> [Pool; 6] {
    [
        ("half, at random", |model| attach(model, Room::Share(0.5), Policy::Random)),
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
            let mut context = run.context(&model);
            assert_eq!(context.unguessed_blocks(), [], "{what}");
            assert_same_bits(&reference, &run.logits_in(&mut context).unwrap(), vocab, &what);
            let c = model.expert_counters();
            assert!(c.requests > 0 && c.requests == c.hits + c.faults, "{what}: {c:?}");
            assert!(c.read_ahead_used <= c.read_ahead, "{what}: {c:?}");
            if n_batch == 1 {
                sum.read_ahead += c.read_ahead;
                sum.read_ahead_used += c.read_ahead_used;
            }
            assert_nothing_held(&model, &what);
            drop(context);
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

#[test]
fn lag() {
    check(&Synth::qwen().path, Prefetch::Lag);
}

/// A pool keeps what the last token needed, unless something comes between: here it is emptied.
#[test]
fn lag_reads_what_the_last_token_needed() {
    let synth = Synth::qwen();
    let reference_model = stock(&synth.path);
    let run = Run::new(&reference_model, 16, 0, 1);
    let reference = run.logits(&reference_model);
    let run = Run { prefetch: Prefetch::Lag, ..run };
    let model = load_on_stand_in(&synth.path, &stand_in(), reader());
    three_tiers(&model, 0.5, 1.0, true);
    let mut context = run.context(&model);
    let mut logits = Vec::new();
    for &token in &run.prompt {
        model.clear_pool();
        context.decode(&[token], Keep::All, |_, row| logits.extend_from_slice(row)).unwrap();
    }
    assert_same_bits(&reference, &logits, reference_model.vocab().len(), "lag");
    let c = model.expert_counters();
    // All layers but the first, all tokens but the first, 8 each.
    assert_eq!(c.read_ahead, 5 * 15 * 8, "{c:?}");
    assert!(0 < c.read_ahead_used && c.read_ahead_used < c.read_ahead, "{c:?}");
}

/// Contexts that wait for what others read ahead, above and below.
#[test]
fn contexts_share_what_is_read_ahead() {
    let synth = Synth::qwen();
    let reference_model = stock(&synth.path);
    let vocab = reference_model.vocab().len();
    let runs = [(60, 4, 32), (6, 40, 1), (9, 40, 1), (90, 2, 90)]
        .map(|(prompt, n, batch)| Run::new(&reference_model, prompt, n, batch));
    let expected: Vec<_> = runs.iter().map(|run| run.logits(&reference_model)).collect();
    let runs = runs.map(|run| Run { prefetch: Prefetch::Lookahead, ..run });
    for (above, below) in [(0.5, 1.0), (0.4, 0.5), (0.4, 0.3)] {
        let device = stand_in();
        let model = load_on_stand_in(&synth.path, &device, reader());
        three_tiers(&model, above, below, false);
        watched("contexts that read ahead", || {
            std::thread::scope(|s| {
                for (run, expected) in runs.iter().zip(&expected) {
                    let model = &model;
                    s.spawn(move || {
                        for round in 0..4 {
                            let what = format!("prompt {}, round {round}", run.prompt.len());
                            assert_same_bits(expected, &run.logits(model), vocab, &what);
                        }
                    });
                }
            });
        });
        assert!(model.expert_counters().read_ahead_used > 0);
        assert_nothing_held(&model, "contexts");
    }
}

/// How many of some requests have failed.
#[derive(Debug, Default)]
struct Outcomes {
    failed: usize,
    served: usize,
}

impl Outcomes {
    /// A run between `fail`, after which something fails once, and `calm`: it may be what was read for nobody, or
    /// nothing, if the run did not come that far. Afterwards nothing is held, and the next run in the
    /// same context is right.
    fn of(
        &mut self,
        model: &Model,
        run: &Run,
        reference: &[f32],
        (fail, calm): (impl Fn(), impl Fn()),
        what: &str,
    ) {
        let vocab = model.vocab().len();
        let mut context = run.context(model);
        fail();
        match run.logits_in(&mut context) {
            Ok(logits) => {
                self.served += 1;
                assert_same_bits(reference, &logits, vocab, what);
            }
            Err(error) => {
                self.failed += 1;
                assert!(matches!(error, Error::Io(_) | Error::Gpu(_)), "{what}: {error:?}");
            }
        }
        calm();
        assert_nothing_held(model, what);
        context.clear();
        assert_same_bits(reference, &run.logits_in(&mut context).unwrap(), vocab, what);
    }
}

/// Reads and copies that fail: only who needs what they bring is told.
#[test]
fn what_goes_wrong_ahead_is_told_to_who_needs_it() {
    let synth = Synth::qwen();
    let reference_model = stock(&synth.path);
    let run = Run::new(&reference_model, 24, 8, 1);
    let reference = run.logits(&reference_model);
    let run = Run { prefetch: Prefetch::Lookahead, ..run };
    let pools: [Pool; 2] = [
        ("half", |model| attach(model, Room::Share(0.5), Policy::Lru)),
        ("half over three quarters", |model| three_tiers(model, 0.5, 0.75, false)),
    ];
    let ways = [(pools[0], Miss::Copy), (pools[1], Miss::Copy), (pools[1], Miss::Compute)];
    for ((name, pool), miss) in ways {
        let (run, name) = (Run { miss, ..run.clone() }, format!("{name}, {miss}"));
        let reader = reader();
        let model = load_on_stand_in(&synth.path, &stand_in(), reader.clone());
        pool(&model);
        let first = reader.stats().reads;
        run.logits(&model);
        let reads = reader.stats().reads - first;
        let (mut read, mut copied) = (Outcomes::default(), Outcomes::default());
        for part in 0..24 {
            let nth = first + reads * part / 25;
            let switch = Arc::new(AtomicBool::new(true));
            let rule = Rule::all(Action::Errno(libc::EIO)).nth(nth..nth + 1);
            let reader = faulty(vec![rule.switch(switch.clone())]);
            let model = load_on_stand_in(&synth.path, &stand_in(), reader);
            pool(&model);
            let what = format!("{name}, read {nth}");
            let calm = || switch.store(false, Ordering::Relaxed);
            read.of(&model, &run, &reference, (|| (), calm), &what);
            for fault in [Fault::CopyRefused, Fault::MapRefused] {
                let device = stand_in();
                let model = load_on_stand_in(&synth.path, &device, common::reader());
                pool(&model);
                let after = if fault == Fault::CopyRefused { 53 * part } else { part / 4 };
                let what = format!("{name}, {fault:?} after {after}");
                let fail = || device.inject(fault, after);
                copied.of(&model, &run, &reference, (fail, || device.calm()), &what);
            }
        }
        for outcomes in [read, copied] {
            assert!(outcomes.failed > 0 && outcomes.served > 0, "{name}: {outcomes:?}");
        }
    }
}

/// A read that takes long and is for nobody does not hold up a request that is cancelled.
#[test]
fn cancelling_gives_up_what_is_read_ahead() {
    let synth = Synth::qwen();
    let reference_model = stock(&synth.path);
    let run = Run::new(&reference_model, 40, 0, 1);
    let reference = run.logits(&reference_model);
    let run = Run { prefetch: Prefetch::Lookahead, ..run };
    for millis in [5, 20, 60] {
        let model = load_on_stand_in(&synth.path, &stand_in(), reader());
        three_tiers(&model, 0.5, 0.6, false);
        let mut context = run.context(&model);
        let cancel = context.cancel_handle();
        watched("a request that is cancelled", || {
            std::thread::scope(|s| {
                s.spawn(|| {
                    std::thread::sleep(Duration::from_millis(millis));
                    cancel.cancel();
                });
                match run.logits_in(&mut context) {
                    Ok(logits) => assert_eq!(logits.len(), reference.len()),
                    Err(error) => assert!(matches!(error, Error::Cancelled), "{error:?}"),
                }
            });
        });
        assert_nothing_held(&model, "cancelled");
        cancel.reset();
        context.clear();
        let logits = run.logits_in(&mut context).unwrap();
        assert_same_bits(&reference, &logits, reference_model.vocab().len(), "afterwards");
    }
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

//! Several contexts of one model decode at the same time through one pool: each exact, none stuck.

mod common;

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};

use common::{
    Room, Run, Synth, assert_same_bits, faulty, load_with, reader, reads_of_a_load, stock,
    streamed, streamed_with, tokens, watched,
};
use tierstream_ggml::{Context, ContextOptions, Error, Keep, Model, Prefetch, Weights};
use tierstream_io::wrap::{Action, Rule};
use tierstream_pool::Policy;
use tierstream_synth::{Arch, Quant, Spec};

const EIO: i32 = 5;

/// Different prompts in different batches, and what stock llama.cpp makes of them.
struct Case {
    synth: Synth,
    runs: Vec<(Run, Vec<f32>)>,
    vocab: u32,
}

impl Case {
    fn new(spec: &Spec, contexts: usize) -> Self {
        let synth = Synth::new(spec);
        let model = stock(&synth.path);
        let vocab = model.vocab().len();
        let runs = (0..contexts)
            .map(|i| {
                let n_batch = [16, 1, 40][i % 3];
                let prompt = tokens(vocab, 30 + 7 * i, 100 + i as u64);
                let run = Run { prefetch: Prefetch::Auto, ..Run::new(&model, 0, 12, n_batch) };
                let run = Run { prompt, ..run };
                let reference = run.logits(&model);
                (run, reference)
            })
            .collect();
        Self { synth, runs, vocab }
    }

    fn qwen(contexts: usize) -> Self {
        Self::new(&Spec::new(Arch::Qwen3Moe), contexts)
    }

    /// Every run in a thread and a context of its own, `rounds` times, all at once.
    fn check(&self, model: &Model, rounds: usize, what: &str) {
        let start = Barrier::new(self.runs.len());
        watched(what, || {
            std::thread::scope(|s| {
                for (index, (run, reference)) in self.runs.iter().enumerate() {
                    let start = &start;
                    s.spawn(move || {
                        let mut context = run.context(model);
                        start.wait();
                        for round in 0..rounds {
                            context.clear();
                            let logits = run.logits_in(&mut context).unwrap();
                            let what = format!("{what}, context {index}, round {round}");
                            assert_same_bits(reference, &logits, self.vocab, &what);
                        }
                    });
                }
            });
        });
    }
}

fn record_bytes(model: &Model) -> u64 {
    model.expert_bytes() / (6 * 64)
}

#[test]
fn two_and_three_contexts_in_pools_of_all_sizes() {
    for contexts in [2, 3] {
        let case = Case::qwen(contexts);
        let record = record_bytes(&load_with(&case.synth.path, Weights::Streamed, reader()));
        let rooms = [
            Room::Floor(0),
            Room::Floor(record),
            Room::Floor(6 * record),
            Room::Share(0.5),
            Room::Share(1.0),
            Room::Preloaded,
        ];
        for room in rooms {
            let model = streamed(&case.synth.path, room);
            case.check(&model, 2, &format!("{contexts} contexts, {room:?}"));
        }
    }
}

#[test]
fn several_size_classes_with_one_slot_per_layer() {
    let spec = Spec::new(Arch::Qwen3Moe).experts(7, 1).quant(Quant::Q4_K_M);
    let case = Case::new(&spec, 3);
    for policy in [Policy::Lru, Policy::Random] {
        let model = streamed_with(&case.synth.path, Room::Floor(0), policy, reader());
        case.check(&model, 3, &format!("one slot, {policy:?}"));
    }
}

/// One context meets failing reads again and again, the others do not notice: what a failed load
/// leaves behind is nobody's hit.
#[test]
fn failures_of_one_context_do_not_harm_the_others() {
    let case = Case::qwen(3);
    for room in [Room::Floor(0), Room::Share(0.25)] {
        let loaded = reads_of_a_load(&case.synth.path);
        let rule = |i: u64| Rule::all(Action::Errno(EIO)).nth(loaded + i * 97..loaded + i * 97 + 2);
        let rules = (0..40u64).map(rule).collect();
        let model = streamed_with(&case.synth.path, room, Policy::Lru, faulty(rules));
        let errors = std::sync::atomic::AtomicUsize::new(0);
        watched("failing reads", || {
            std::thread::scope(|s| {
                for (run, reference) in &case.runs {
                    let (case, model, errors) = (&case, &model, &errors);
                    s.spawn(move || {
                        let mut context = run.context(model);
                        loop {
                            match run.logits_in(&mut context) {
                                Ok(logits) => {
                                    let what = format!("{room:?}");
                                    return assert_same_bits(reference, &logits, case.vocab, &what);
                                }
                                Err(Error::Io(tierstream_io::Error::Read { .. })) => {
                                    errors.fetch_add(1, Ordering::Relaxed);
                                    context.clear();
                                }
                                Err(other) => panic!("{other:?}"),
                            }
                        }
                    });
                }
            });
        });
        assert!(errors.into_inner() > 3, "reads did fail");
        model.clear_pool();
        assert_eq!(model.pool_bytes().1, 0, "no failed load has left a pin");
    }
}

/// Emptying the pool takes nothing away from those who compute with it.
#[test]
fn clearing_the_pool_while_contexts_decode() {
    let case = Case::qwen(2);
    for room in [Room::Preloaded, Room::Share(0.5), Room::Floor(0)] {
        for round in 0..3 {
            let model = streamed(&case.synth.path, room);
            let done = AtomicBool::new(false);
            std::thread::scope(|s| {
                s.spawn(|| {
                    while !done.load(Ordering::Acquire) {
                        model.clear_pool();
                        std::thread::yield_now();
                    }
                });
                case.check(&model, 1, &format!("clearing, {room:?}, round {round}"));
                done.store(true, Ordering::Release);
            });
        }
    }
}

#[test]
fn cancelling_one_context_leaves_the_others_alone() {
    let case = Case::qwen(2);
    let model = streamed(&case.synth.path, Room::Floor(0));
    let (run, _) = &case.runs[0];
    let mut victim = run.context(&model);
    let cancel = victim.cancel_handle();
    let done = AtomicBool::new(false);
    watched("cancelling one of three", || {
        std::thread::scope(|s| {
            s.spawn(|| {
                while !done.load(Ordering::Acquire) {
                    victim.clear();
                    match run.logits_in(&mut victim) {
                        Ok(logits) => {
                            assert_same_bits(&case.runs[0].1, &logits, case.vocab, "victim")
                        }
                        Err(Error::Cancelled) => {}
                        Err(other) => panic!("{other:?}"),
                    }
                }
            });
            s.spawn(|| {
                while !done.load(Ordering::Acquire) {
                    cancel.cancel();
                    std::thread::yield_now();
                    cancel.reset();
                    std::thread::yield_now();
                }
            });
            case.check(&model, 3, "beside a cancelled one");
            done.store(true, Ordering::Release);
        });
    });
}

/// Contexts that are made at the same time do not take each other's backend.
#[test]
fn contexts_made_at_the_same_time() {
    let case = Case::qwen(3);
    let model = streamed(&case.synth.path, Room::Share(0.25));
    let start = Barrier::new(3);
    watched("making contexts", || {
        std::thread::scope(|s| {
            for (run, reference) in &case.runs {
                let (start, model) = (&start, &model);
                s.spawn(move || {
                    for _ in 0..10 {
                        start.wait();
                        drop(run.context(model));
                    }
                    start.wait();
                    let logits = run.logits(model);
                    assert_same_bits(reference, &logits, case.vocab, "made at the same time");
                });
            }
        });
    });
}

#[test]
fn impossible_contexts_are_refused() {
    let synth = Synth::qwen();
    let plain = ContextOptions::default();
    for model in [stock(&synth.path), streamed(&synth.path, Room::Floor(0))] {
        for options in [
            ContextOptions { n_ctx: 0, ..plain },
            ContextOptions { n_batch: 0, ..plain },
            ContextOptions { n_seq: 0, ..plain },
            ContextOptions { n_seq: 257, ..plain },
            ContextOptions { n_ctx: 1 << 20, n_seq: 17, ..plain },
            ContextOptions { n_threads: 0, ..plain },
            ContextOptions { n_threads: 513, ..plain },
            ContextOptions { n_threads: u32::MAX, ..plain },
            ContextOptions { n_ctx: u32::MAX, ..plain },
            ContextOptions { n_ctx: u32::MAX - 255, ..plain },
            ContextOptions { n_ctx: (1 << 24) + 1, ..plain },
        ] {
            let error = Context::new(model.clone(), &options).unwrap_err();
            assert!(matches!(error, Error::Context { .. }), "{options:?}: {error:?}");
        }
        // And the model still works.
        Run::new(&model, 4, 1, 4).logits(&model);
    }
}

#[test]
fn a_context_that_keeps_the_last_row_computes_the_same_in_less_memory() {
    let synth = Synth::qwen();
    for model in [stock(&synth.path), streamed(&synth.path, Room::Floor(0))] {
        let prompt = tokens(model.vocab().len(), 40, 5);
        let context = |keep| {
            let options =
                ContextOptions { n_ctx: 256, n_batch: 16, keep, ..ContextOptions::default() };
            Context::new(model.clone(), &options).unwrap()
        };
        let (mut all, mut last) = (context(Keep::All), context(Keep::Last));
        assert!(last.compute_bytes() < all.compute_bytes());
        let mut rows = Vec::new();
        all.decode(&prompt, Keep::All, |_, row| rows = row.to_vec()).unwrap();
        let error = last.decode(&prompt, Keep::All, |_, _| panic!("no row")).unwrap_err();
        assert!(matches!(error, Error::Batch(_)), "{error:?}");
        last.decode(&prompt, Keep::Last, |_, row| {
            assert_same_bits(&rows, row, model.vocab().len(), "the last row");
        })
        .unwrap();
        // One row is one, whichever is asked for.
        last.decode(&prompt[..1], Keep::All, |_, row| rows = row.to_vec()).unwrap();
        all.decode(&prompt[..1], Keep::All, |_, row| {
            assert_same_bits(&rows, row, model.vocab().len(), "the next row");
        })
        .unwrap();
    }
}

#[test]
fn resident_records_that_lie_far_apart_are_multiplied_in_parts() {
    let synth = Synth::qwen();
    let reference = stock(&synth.path);
    // Most of the slots are shared, so that records leave their layer's region.
    let model = streamed(&synth.path, Room::Share(0.75));
    let vocab = reference.vocab().len();
    Run { n_batch: 1, ..Run::new(&reference, 250, 0, 1) }.logits(&model);
    // A batch of few records, which are there already. There is room for a window of one layer's
    // experts when all of its tokens come at once.
    let prompt = vec![7; 60];
    let run = Run { prompt, ..Run::new(&reference, 0, 0, 1) };
    run.logits(&model);
    let before = model.expert_counters();
    let run = Run { n_batch: 60, ..run };
    assert_same_bits(&run.logits(&reference), &run.logits(&model), vocab, "in parts");
    let used = model.expert_counters().since(&before);
    assert!(used.hits > 10 * used.faults, "{used:?}");
}

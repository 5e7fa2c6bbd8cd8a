//! Single tokens computed as a whole, over the stand-in: its streams are threads, so that the GPU goes
//! on by itself from gate to gate, and waits at those where experts are missing. The output is that
//! of the resident model, bit for bit, and the pool goes the same way as layer by layer.

mod common;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use common::{Room, Run, Synth, assert_same_bits, attach, demo, faulty, load_on_stand_in, watched};
use tierstream_cuda::standin::{Config, Fault, StandIn};
use tierstream_ggml::{
    Context, Error, Execution, ExpertCounters, Keep, Model, PoolOptions, PoolSize, Replay,
};
use tierstream_io::Reader;
use tierstream_io::wrap::{Action, Rule};
use tierstream_pool::Policy;
use tierstream_synth::{Arch, Quant, Spec, TensorType};

/// Tokens that are computed layer by layer at first, with some to spare: llama.cpp builds its first
/// graphs anew.
const FIRST: u64 = 4;

/// One test at a time: who makes or frees a model has others compute layer by layer meanwhile.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn stand_in() -> StandIn {
    StandIn::new(Config::default()).unwrap()
}

fn streamed(path: &Path, room: Room, reader: Arc<Reader>) -> (StandIn, Model) {
    let device = stand_in();
    let model = load_on_stand_in(path, &device, reader);
    attach(&model, room, Policy::Lru);
    (device, model)
}

/// A run of single tokens, and the bits that it must give.
struct Case {
    path: PathBuf,
    run: Run,
    expected: Vec<f32>,
    vocab: u32,
    _synth: Option<Synth>,
}

impl Case {
    fn new(path: &Path) -> Self {
        let model = common::stock(path);
        let run = Run::new(&model, 20, 40, 1);
        let (expected, vocab) = (run.logits(&model), model.vocab().len());
        Self { path: path.to_owned(), run, expected, vocab, _synth: None }
    }

    fn of(spec: &Spec) -> Self {
        let synth = Synth::new(spec);
        let mut case = Self::new(&synth.path);
        case._synth = Some(synth);
        case
    }

    fn tokens(&self) -> u64 {
        (self.run.prompt.len() + self.run.generate) as u64
    }

    fn check_in(&self, context: &mut Context, what: &str) {
        let logits = self.run.logits_in(context).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_same_bits(&self.expected, &logits, self.vocab, what);
    }

    /// Whatever fails is told, and all is well again.
    fn fails_and_recovers(&self, context: &mut Context, what: &str) -> Error {
        let error = watched(what, || self.run.logits_in(context).map(drop).expect_err(what));
        context.clear();
        watched(what, || self.check_in(context, what));
        error
    }
}

fn in_either_way(case: &Case, make: impl Fn() -> (StandIn, Model), what: &str) {
    let counted: Vec<ExpertCounters> = [Execution::Auto, Execution::Host]
        .into_iter()
        .map(|execution| {
            let (_device, model) = make();
            let run = Run { execution, ..case.run.clone() };
            let mut context = run.context(&model);
            let what = format!("{what}, {execution}");
            watched(&what, || case.check_in(&mut context, &what));
            let whole = context.whole_tokens();
            match execution {
                Execution::Auto => assert!(whole >= case.tokens() - FIRST, "{what}: {whole}"),
                Execution::Host => assert_eq!(whole, 0, "{what}"),
            }
            model.expert_counters()
        })
        .collect();
    assert_eq!(counted[0], counted[1], "{what}: the pool goes the same way");
}

fn check(case: &Case) {
    for room in [Room::Share(1.0), Room::Share(0.4), Room::Floor(0)] {
        let make = || streamed(&case.path, room, common::reader());
        in_either_way(case, make, &format!("{room:?}"));
    }
}

#[test]
fn demo_model() {
    let _turn = turn();
    check(&Case::new(&demo()));
}

#[test]
fn qwen3moe_q4_k_m_of_several_size_classes() {
    let _turn = turn();
    check(&Case::of(&Spec::new(Arch::Qwen3Moe).quant(Quant::Q4_K_M)));
}

#[test]
fn gpt_oss_mxfp4() {
    let _turn = turn();
    check(&Case::of(&Spec::new(Arch::GptOss)));
}

#[test]
fn deepseek2_q8_0() {
    let _turn = turn();
    check(&Case::of(&Spec::new(Arch::DeepSeek2).quant(TensorType::Q8_0)));
}

#[test]
fn hy_v3_fused() {
    let _turn = turn();
    check(&Case::of(&Spec::new(Arch::HyV3)));
}

/// From a pool in host memory that holds all, or less.
#[test]
fn three_tiers() {
    let _turn = turn();
    let case = Case::of(&Spec::new(Arch::Qwen3Moe).quant(Quant::Q4_K_M));
    for (above, below) in [(0.4, 1.0), (0.3, 0.6)] {
        let make = || {
            let device = stand_in();
            let model = load_on_stand_in(&case.path, &device, common::reader());
            let pool = PoolOptions {
                size: PoolSize::Share(above),
                policy: Policy::LFU,
                seed: 1,
                preload: true,
                below: Some(PoolSize::Share(below)),
                staged: 2,
            };
            model.attach_pool(&pool, &mut |_| true).unwrap();
            (device, model)
        };
        in_either_way(&case, make, &format!("{above} over {below}"));
    }
}

#[test]
fn recorded_routing_is_given_to_the_gates() {
    let _turn = turn();
    let case = Case::of(&Spec::new(Arch::Qwen3Moe));
    let of = |first: u32| vec![(first..first + 8).collect::<Vec<u32>>(); 6];
    let counted: Vec<_> = [Execution::Auto, Execution::Host]
        .into_iter()
        .map(|execution| {
            let (_device, model) = streamed(&case.path, Room::Share(0.5), common::reader());
            let run = Run { execution, ..case.run.clone() };
            let mut context = run.context(&model);
            context.replay(Some(Replay::new(vec![of(0), of(8), of(24)])));
            let logits = run.logits_in(&mut context).unwrap();
            let is_whole = execution == Execution::Auto;
            assert_eq!(context.whole_tokens() > 0, is_whole);
            let c = model.expert_counters();
            assert_eq!((c.requests, c.faults), (8 * 6 * case.tokens(), 3 * 8 * 6), "{c:?}");
            // Routing of another model, and then the routers' own again.
            context.replay(Some(Replay::new(vec![vec![vec![64; 8]; 6]])));
            context.clear();
            let error = run.logits_in(&mut context).map(drop).unwrap_err();
            assert!(matches!(error, Error::Replay { layer: 0, .. }), "{error:?}");
            context.replay(None);
            context.clear();
            case.check_in(&mut context, "without it");
            logits
        })
        .collect();
    assert_same_bits(&counted[0], &counted[1], case.vocab, "replayed");
}

/// Copies and launches that are refused, reads that fail: the GPU goes on to the end of the token,
/// which is nobody's, and the next one is right.
#[test]
fn what_goes_wrong_is_told_and_leaves_no_trace() {
    let _turn = turn();
    let case = Case::of(&Spec::new(Arch::Qwen3Moe));
    let mut in_the_midst = 0;
    for (fault, after) in [
        (Fault::CaptureRefused, 0),
        (Fault::LaunchRefused, 0),
        (Fault::LaunchRefused, 9),
        (Fault::CopyRefused, 900),
        (Fault::CopyRefused, 1200),
        (Fault::CopyRefused, 1501),
    ] {
        let (device, model) = streamed(&case.path, Room::Share(0.3), common::reader());
        let mut context = case.run.context(&model);
        device.inject(fault, after);
        let what = format!("{fault:?} after {after}");
        let error = case.fails_and_recovers(&mut context, &what);
        assert!(matches!(error, Error::Gpu(_)), "{what}: {error:?}");
        in_the_midst += u64::from(context.whole_tokens() > 0);
    }
    assert_eq!(in_the_midst, 6);
    let reader = common::reader();
    let (_device, model) = streamed(&case.path, Room::Share(0.3), reader.clone());
    case.run.logits(&model);
    let reads = reader.stats().reads;
    for nth in [reads * 2 / 3, reads * 3 / 4, reads - 2] {
        let rule = Rule::all(Action::Errno(libc::EIO)).nth(nth..nth + 1);
        let (_device, model) = streamed(&case.path, Room::Share(0.3), faulty(vec![rule]));
        let mut context = case.run.context(&model);
        let what = format!("read {nth} of {reads}");
        let error = case.fails_and_recovers(&mut context, &what);
        assert!(matches!(error, Error::Io(_)), "{what}: {error:?}");
    }
}

/// A read that takes longer than the GPU waits: the token is computed again, layer by layer, and so
/// are all that follow.
#[test]
fn a_gate_that_gives_up_costs_time_and_nothing_else() {
    let _turn = turn();
    let case = Case::of(&Spec::new(Arch::Qwen3Moe));
    let reader = common::reader();
    let (_device, model) = streamed(&case.path, Room::Share(0.3), reader.clone());
    case.run.logits(&model);
    let nth = reader.stats().reads * 2 / 3;
    let rule = Rule::all(Action::Delay(Duration::from_secs(3))).nth(nth..nth + 1);
    let (_device, model) = streamed(&case.path, Room::Share(0.3), faulty(vec![rule]));
    let mut context = case.run.context(&model);
    watched("a slow read", || case.check_in(&mut context, "a slow read"));
    let whole = context.whole_tokens();
    assert!(whole > 0 && whole < case.tokens() - FIRST, "{whole}");
    context.clear();
    case.check_in(&mut context, "afterwards");
    assert_eq!(context.whole_tokens(), whole);
}

/// A prompt between tokens, and another context at the same time.
#[test]
fn tokens_come_between_other_graphs() {
    let _turn = turn();
    let case = Case::of(&Spec::new(Arch::Qwen3Moe));
    let stock = common::stock(&case.path);
    let prompts = Run::new(&stock, 90, 6, 32);
    let expected = prompts.logits(&stock);
    let (_device, model) = streamed(&case.path, Room::Share(0.4), common::reader());
    let mut context = case.run.context(&model);
    case.check_in(&mut context, "before");
    let before = context.whole_tokens();
    assert_same_bits(&expected, &prompts.logits(&model), case.vocab, "a prompt between");
    context.clear();
    case.check_in(&mut context, "after");
    assert!(context.whole_tokens() >= before + case.tokens() - FIRST);
    let mut cancelled = case.run.context(&model);
    let cancel = cancelled.cancel_handle();
    watched("two contexts and one that is cancelled", || {
        std::thread::scope(|s| {
            s.spawn(|| {
                for round in 0..4 {
                    let what = format!("a prompt beside, {round}");
                    assert_same_bits(&expected, &prompts.logits(&model), case.vocab, &what);
                    cancel.cancel();
                }
            });
            s.spawn(|| {
                // Until it is cancelled.
                while cancelled.decode(&case.run.prompt[..1], Keep::All, |_, _| ()).is_ok() {
                    if cancelled.position() + 1 >= 256 {
                        cancelled.clear();
                    }
                }
            });
            for round in 0..4 {
                context.clear();
                case.check_in(&mut context, &format!("round {round}"));
            }
        });
    });
    cancel.reset();
    cancelled.clear();
    case.check_in(&mut cancelled, "after it was cancelled");
}

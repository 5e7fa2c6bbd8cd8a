//! Weights are read by us, to host memory and to that of a GPU (over the stand-in): llama.cpp reads
//! nothing of them, the output is that of the model that llama.cpp loads itself, and what goes wrong
//! is told.

mod common;

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use common::{Room, Run, Synth, assert_same_bits, attach, demo, faulty, go_on, load_with, reader};
use tierstream_cuda::standin::{Config, Fault, StandIn};
use tierstream_ggml::{Error, Gpu, Model, Placement, Result, Weights};
use tierstream_io::Reader;
use tierstream_io::wrap::{Action, Rule};
use tierstream_pool::Policy;
use tierstream_synth::{Arch, Quant, Spec, TensorType};

fn stand_in() -> StandIn {
    StandIn::new(Config::default()).unwrap()
}

/// Where a model goes.
#[derive(Debug, Clone)]
enum Where {
    Host,
    Gpu(StandIn),
}

impl Where {
    fn both() -> [Where; 2] {
        [Where::Host, Where::Gpu(stand_in())]
    }

    fn placement(&self) -> Placement {
        match self {
            Where::Host => Placement::Cpu,
            Where::Gpu(device) => Placement::Gpu(Gpu::stand_in(device).unwrap()),
        }
    }

    /// Loads a model whose header is read, and tells how far it is.
    fn load(
        &self,
        file: &tierstream_gguf::Model,
        reader: Arc<Reader>,
        progress: &mut dyn FnMut(f32) -> bool,
    ) -> Result<Model> {
        self.load_as(Weights::Streamed, file, reader, progress)
    }

    fn load_as(
        &self,
        weights: Weights,
        file: &tierstream_gguf::Model,
        reader: Arc<Reader>,
        progress: &mut dyn FnMut(f32) -> bool,
    ) -> Result<Model> {
        Model::load(file, weights, &self.placement(), reader, progress)
    }

    /// Nothing of a load is left.
    #[track_caller]
    fn assert_given_back(&self, what: &str) {
        let Where::Gpu(device) = self else { return };
        let memory = device.device().memory().unwrap();
        let left = (memory.total_bytes - memory.free_bytes, device.pinned_bytes());
        assert_eq!(left, (0, 0), "{what}");
    }
}

/// What llama.cpp makes of a model by itself, with the same kernels: those for layouts of their own
/// for a dense model in host memory.
fn reference(path: &Path, at: &Where) -> Model {
    let file = tierstream_gguf::Model::open(path).unwrap();
    let dense = tierstream_gguf::Experts::group(&file).unwrap().is_empty();
    let repack = dense && matches!(at, Where::Host);
    load_with(path, Weights::Stock { mmap: !repack, repack, cpu_experts: false }, reader())
}

/// Bytes that this thread has read, as llama.cpp does; the reader has threads of its own.
fn read_here() -> u64 {
    let text = fs::read_to_string("/proc/thread-self/io").unwrap();
    text.lines().find_map(|l| l.strip_prefix("rchar: ")).unwrap().trim().parse().unwrap()
}

/// Loads, checks who has read what, and that the output is that of stock llama.cpp.
fn check(path: &Path, what: &str) {
    for at in Where::both() {
        for weights in [Weights::Streamed, Weights::Resident] {
            check_as(weights, &at, path, &format!("{at:?}, {weights:?}, {what}"));
        }
    }
}

fn check_as(weights: Weights, at: &Where, path: &Path, what: &str) {
    let file = tierstream_gguf::Model::open(path).unwrap();
    let experts = tierstream_gguf::Experts::group(&file).unwrap();
    let reader = reader();
    let before = read_here();
    let mut told = Vec::new();
    let model = at.load_as(weights, &file, reader.clone(), &mut |done| {
        told.push(done);
        true
    });
    let model = model.unwrap();
    let read = read_here() - before;
    // llama.cpp: the headers.
    let headers: u64 = file.files().iter().map(|f| f.data_offset).sum();
    let most = 3 * headers + (300 << 10);
    assert!(read <= most, "{what}: {read} of {most} bytes");
    // We: everything but the experts that are streamed, once, and what lies between neighbours. Embeddings that are the
    // output's weights too are in both memories.
    let embeddings = file.tensor("token_embd.weight").unwrap().len;
    let is_tied = file.tensor("output.weight").is_none();
    let tied = if is_tied && model.gpu().is_some() { embeddings } else { 0 };
    let streams = weights == Weights::Streamed && !experts.is_empty();
    let streamed = if streams { experts.expert_bytes() } else { 0 };
    let ours = file.tensor_bytes() - streamed + tied;
    let most = ours + file.tensors().len() as u64 * file.alignment();
    let wanted = reader.stats().bytes_wanted;
    assert!((ours..most).contains(&wanted), "{what}: {wanted} bytes instead of {ours}");
    assert!(told.is_sorted() && told.last() == Some(&1.0), "{what}: {told:?}");
    assert_eq!(model.is_streamed(), streams, "{what}");
    assert!(!streams || model.resident_blocks().is_empty(), "{what}");
    // A resident model needs no reads any more, and tells how it was read.
    assert_eq!(model.read_status().map(|s| s.engine), Some(reader.status().engine), "{what}");
    drop(reader);
    if let Where::Gpu(device) = at {
        assert!(model.gpu().is_some());
        assert_eq!(device.pinned_bytes() > 0, model.is_streamed(), "{what}");
    }
    if model.is_streamed() {
        attach(&model, Room::Preloaded, Policy::Lru);
    }
    let reference_model = reference(path, at);
    for (prompt, n_batch) in [(12, 1), (80, 64)] {
        let run = Run::new(&reference_model, prompt, 8, n_batch);
        let reference = run.logits(&reference_model);
        let vocab = reference_model.vocab().len();
        assert_same_bits(&reference, &run.logits(&model), vocab, what);
    }
    drop(model);
    at.assert_given_back(what);
}

fn check_synth(spec: &Spec) {
    check(&Synth::new(spec).path, &format!("{spec:?}"));
}

#[test]
fn dense_models() {
    check_synth(&Spec::new(Arch::Llama));
    for dense_type in [TensorType::Q8_0, TensorType::F16, TensorType::Q4_0, TensorType::Q4_K] {
        let mut spec = Spec::new(Arch::Llama);
        spec.dense_type = dense_type;
        check_synth(&spec);
    }
}

#[test]
fn models_with_experts() {
    check(&demo(), "demo");
    check_synth(&Spec::new(Arch::Qwen3Moe).quant(Quant::Q4_K_M));
    check_synth(&Spec::new(Arch::GptOss));
    check_synth(&Spec::new(Arch::DeepSeek2).quant(TensorType::Q8_0));
}

#[test]
fn split_models() {
    for (arch, split_empty_first) in [(Arch::Llama, false), (Arch::Qwen3Moe, true)] {
        let mut spec = Spec::new(arch);
        (spec.split_bytes, spec.split_empty_first) = (Some(1 << 20), split_empty_first);
        let synth = Synth::new(&spec);
        let file = tierstream_gguf::Model::open(&synth.path).unwrap();
        assert!(file.files().len() > 2);
        check(&synth.path, &format!("{arch:?} in {} files", file.files().len()));
    }
}

/// Whatever goes wrong is told as what it is, all memory comes back, and the next load is right.
#[test]
fn what_goes_wrong_is_told_and_leaves_nothing() {
    let mut layouts = Spec::new(Arch::Llama);
    layouts.dense_type = TensorType::Q4_0;
    for spec in [Spec::new(Arch::Llama), layouts, Spec::new(Arch::Qwen3Moe)] {
        let synth = Synth::new(&spec);
        let file = tierstream_gguf::Model::open(&synth.path).unwrap();
        for at in Where::both() {
            let reference_model = reference(&synth.path, &at);
            let run = Run::new(&reference_model, 20, 2, 32);
            let reference = run.logits(&reference_model);
            let check_next = |what: &str| {
                at.assert_given_back(what);
                let model = at.load(&file, reader(), &mut go_on).unwrap();
                if model.is_streamed() {
                    attach(&model, Room::Share(0.5), Policy::Lru);
                }
                let vocab = reference_model.vocab().len();
                assert_same_bits(&reference, &run.logits(&model), vocab, what);
            };
            if let Where::Gpu(device) = &at {
                for (fault, after) in [
                    (Fault::OutOfMemory, 0),
                    (Fault::PinRefused, 0),
                    (Fault::CopyRefused, 0),
                    (Fault::CopyRefused, 5),
                ] {
                    let what = format!("{:?}, {fault:?} after {after}", spec.arch);
                    device.inject(fault, after);
                    let error = at.load(&file, reader(), &mut go_on).map(drop).unwrap_err();
                    match fault {
                        Fault::OutOfMemory => {
                            let is_right = matches!(error, Error::WeightsTooLarge { .. });
                            assert!(is_right, "{what}: {error:?}");
                        }
                        Fault::PinRefused => {
                            let is_right = matches!(error, Error::OutOfGpuMemory(_));
                            assert!(is_right, "{what}: {error:?}");
                        }
                        _ => assert!(matches!(error, Error::Gpu(_)), "{what}: {error:?}"),
                    }
                    check_next(&what);
                }
            }
            for nth in [0, 3] {
                let rule = Rule::all(Action::Errno(libc::EIO)).nth(nth..nth + 1);
                let what = format!("{at:?}, {:?}, read {nth}", spec.arch);
                let error = at.load(&file, faulty(vec![rule]), &mut go_on).map(drop).unwrap_err();
                let is_right = matches!(error, Error::Io(tierstream_io::Error::Read { .. }));
                assert!(is_right, "{what}: {error:?}");
                check_next(&what);
            }
        }
    }
}

/// A device that is lost in the middle: the process lives, and other devices work.
#[test]
fn a_lost_device_is_told() {
    let synth = Synth::new(&Spec::new(Arch::Llama));
    let file = tierstream_gguf::Model::open(&synth.path).unwrap();
    for after in [0, 4] {
        let device = stand_in();
        device.inject(Fault::CopyLost, after);
        let at = Where::Gpu(device);
        let error = at.load(&file, reader(), &mut go_on).map(drop).unwrap_err();
        assert!(matches!(error, Error::Gpu(tierstream_cuda::Error::Lost { .. })), "{error:?}");
    }
    check(&synth.path, "after others were lost");
}

/// Progress that says no, or panics, at any time.
#[test]
fn loads_that_are_stopped() {
    let mut layouts = Spec::new(Arch::Llama);
    layouts.dense_type = TensorType::Q4_0;
    for spec in [layouts, Spec::new(Arch::Qwen3Moe)] {
        let synth = Synth::new(&spec);
        let file = tierstream_gguf::Model::open(&synth.path).unwrap();
        for at in Where::both() {
            let slow = || faulty(vec![Rule::all(Action::Delay(Duration::from_millis(60)))]);
            let mut calls = 0;
            let counted = at.load(&file, slow(), &mut |_| {
                calls += 1;
                true
            });
            drop(counted.unwrap());
            assert!(calls > 2, "{calls}");
            for stop in 1..=3 {
                for panics in [false, true] {
                    let mut call = 0;
                    let stopped = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                        let progress = &mut |done: f32| {
                            call += 1;
                            let now = call == stop || done == 1.0;
                            assert!(!(now && panics), "on purpose");
                            !now
                        };
                        at.load(&file, slow(), progress).map(drop)
                    }));
                    match stopped {
                        Ok(stopped) => {
                            let is_right = matches!(stopped, Err(Error::Cancelled));
                            assert!(!panics && is_right, "{stopped:?}");
                        }
                        Err(_) => assert!(panics),
                    }
                    at.assert_given_back(&format!("call {stop}, {panics}"));
                }
            }
        }
    }
}

/// Written to while the reads are under way.
#[test]
fn files_that_change_meanwhile_are_refused() {
    let synth = Synth::new(&Spec::new(Arch::Llama));
    for at in Where::both() {
        let file = tierstream_gguf::Model::open(&synth.path).unwrap();
        let slow = faulty(vec![Rule::all(Action::Delay(Duration::from_millis(60)))]);
        let mut touched = 0;
        let error = at.load(&file, slow, &mut |_| {
            // By now llama.cpp is through with the file.
            if touched == 0 {
                let handle = fs::File::options().append(true).open(&synth.path).unwrap();
                handle.set_modified(SystemTime::now() + Duration::from_secs(5)).unwrap();
                touched += 1;
            }
            true
        });
        let error = error.map(drop).unwrap_err();
        assert_eq!(touched, 1);
        assert!(matches!(error, Error::Io(tierstream_io::Error::Changed { .. })), "{error:?}");
        at.assert_given_back("changed");
    }
}

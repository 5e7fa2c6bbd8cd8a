//! Loading to the memory of a GPU, over the stand-in: llama.cpp reads nothing of what goes there,
//! the output is that of the model that llama.cpp loads itself, and what goes wrong is told.

mod common;

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use common::{Room, Run, Synth, assert_same_bits, attach, demo, faulty, go_on, reader, stock};
use tierstream_cuda::standin::{Config, Fault, StandIn};
use tierstream_ggml::{Error, Gpu, Model, Placement, Result, Weights};
use tierstream_io::Reader;
use tierstream_io::wrap::{Action, Rule};
use tierstream_pool::Policy;
use tierstream_synth::{Arch, Quant, Spec, TensorType};

fn stand_in() -> StandIn {
    StandIn::new(Config::default()).unwrap()
}

/// Loads a model whose header is read, and tells how far it is.
fn load(
    file: &tierstream_gguf::Model,
    device: &StandIn,
    reader: Arc<Reader>,
    progress: &mut dyn FnMut(f32) -> bool,
) -> Result<Model> {
    let gpu = Placement::Gpu(Gpu::stand_in(device.device()).unwrap());
    Model::load(file, Weights::Streamed, &gpu, reader, progress)
}

/// Bytes that this thread has read, as llama.cpp does; the reader has threads of its own.
fn read_here() -> u64 {
    let text = fs::read_to_string("/proc/thread-self/io").unwrap();
    text.lines().find_map(|l| l.strip_prefix("rchar: ")).unwrap().trim().parse().unwrap()
}

/// Nothing of a load is left.
#[track_caller]
fn assert_given_back(device: &StandIn, what: &str) {
    let memory = device.device().memory().unwrap();
    let left = (memory.total_bytes - memory.free_bytes, device.pinned_bytes());
    assert_eq!(left, (0, 0), "{what}");
}

/// Loads, checks who has read what, and that the output is that of stock llama.cpp.
fn check(path: &Path, what: &str) {
    let file = tierstream_gguf::Model::open(path).unwrap();
    let experts = tierstream_gguf::Experts::group(&file).unwrap();
    let (device, reader) = (stand_in(), reader());
    let before = read_here();
    let mut told = Vec::new();
    let model = load(&file, &device, reader.clone(), &mut |done| {
        told.push(done);
        true
    });
    let model = model.unwrap();
    let read = read_here() - before;
    // llama.cpp: the headers, and the embeddings, which are in host memory.
    let embeddings = file.tensor("token_embd.weight").unwrap().len;
    let headers: u64 = file.files().iter().map(|f| f.data_offset).sum();
    let most = embeddings + 3 * headers + (300 << 10);
    assert!(read >= embeddings && read <= most, "{what}: {read} of {most} bytes");
    // We: everything else but the experts, once.
    let tied = if file.tensor("output.weight").is_none() { embeddings } else { 0 };
    let ours = file.tensor_bytes() - experts.expert_bytes() - embeddings + tied;
    assert_eq!(reader.stats().bytes_wanted, ours, "{what}");
    assert!(told.is_sorted() && told.last() == Some(&1.0), "{what}: {told:?}");
    assert_eq!(model.is_streamed(), !experts.is_empty(), "{what}");
    assert!(model.resident_blocks().is_empty(), "{what}");
    // A dense model needs no reads any more, and tells how it was read.
    assert_eq!(model.read_status().map(|s| s.engine), Some(reader.status().engine), "{what}");
    assert!(model.gpu().is_some());
    drop(reader);
    assert_eq!(device.pinned_bytes() > 0, model.is_streamed(), "{what}");
    if model.is_streamed() {
        attach(&model, Room::Preloaded, Policy::Lru);
    }
    let reference_model = stock(path);
    for (prompt, n_batch) in [(12, 1), (80, 64)] {
        let run = Run::new(&reference_model, prompt, 8, n_batch);
        let reference = run.logits(&reference_model);
        let vocab = reference_model.vocab().len();
        assert_same_bits(&reference, &run.logits(&model), vocab, what);
    }
    drop(model);
    assert_given_back(&device, what);
}

fn check_synth(spec: &Spec) {
    check(&Synth::new(spec).path, &format!("{spec:?}"));
}

#[test]
fn dense_models() {
    check_synth(&Spec::new(Arch::Llama));
    for dense_type in [TensorType::Q8_0, TensorType::F16, TensorType::Q4_K] {
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

/// Whatever goes wrong is told as what it is, all memory comes back, and the next load of the same
/// device is right.
#[test]
fn what_goes_wrong_is_told_and_leaves_nothing() {
    for spec in [Spec::new(Arch::Llama), Spec::new(Arch::Qwen3Moe)] {
        let synth = Synth::new(&spec);
        let file = tierstream_gguf::Model::open(&synth.path).unwrap();
        let reference_model = stock(&synth.path);
        let run = Run::new(&reference_model, 20, 2, 32);
        let reference = run.logits(&reference_model);
        let device = stand_in();
        let check_next = |what: &str| {
            assert_given_back(&device, what);
            let model = load(&file, &device, reader(), &mut go_on).unwrap();
            if model.is_streamed() {
                attach(&model, Room::Share(0.5), Policy::Lru);
            }
            let vocab = reference_model.vocab().len();
            assert_same_bits(&reference, &run.logits(&model), vocab, what);
        };
        for (fault, after) in [
            (Fault::OutOfMemory, 0),
            (Fault::PinRefused, 0),
            (Fault::CopyRefused, 0),
            (Fault::CopyRefused, 5),
        ] {
            let what = format!("{:?}, {fault:?} after {after}", spec.arch);
            device.inject(fault, after);
            let error = load(&file, &device, reader(), &mut go_on).map(drop).unwrap_err();
            match fault {
                Fault::OutOfMemory => {
                    assert!(matches!(error, Error::WeightsTooLarge { .. }), "{what}: {error:?}");
                }
                Fault::PinRefused => {
                    assert!(matches!(error, Error::OutOfGpuMemory(_)), "{what}: {error:?}");
                }
                _ => assert!(matches!(error, Error::Gpu(_)), "{what}: {error:?}"),
            }
            check_next(&what);
        }
        for nth in [0, 3] {
            let rule = Rule::all(Action::Errno(libc::EIO)).nth(nth..nth + 1);
            let what = format!("{:?}, read {nth}", spec.arch);
            let error = load(&file, &device, faulty(vec![rule]), &mut go_on).map(drop).unwrap_err();
            assert!(
                matches!(error, Error::Io(tierstream_io::Error::Read { .. })),
                "{what}: {error:?}"
            );
            check_next(&what);
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
        let error = load(&file, &device, reader(), &mut go_on).map(drop).unwrap_err();
        assert!(matches!(error, Error::Gpu(tierstream_cuda::Error::Lost { .. })), "{error:?}");
    }
    check(&synth.path, "after others were lost");
}

/// Progress that says no, or panics, at any time.
#[test]
fn loads_that_are_stopped() {
    let synth = Synth::qwen();
    let file = tierstream_gguf::Model::open(&synth.path).unwrap();
    let device = stand_in();
    let slow = || faulty(vec![Rule::all(Action::Delay(Duration::from_millis(30)))]);
    let mut calls = 0;
    let counted = load(&file, &device, slow(), &mut |_| {
        calls += 1;
        true
    });
    drop(counted.unwrap());
    assert!(calls > 2, "{calls}");
    for stop in 1..=3 {
        for panics in [false, true] {
            let mut call = 0;
            let stopped = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                load(&file, &device, slow(), &mut |done| {
                    call += 1;
                    let now = call == stop || done == 1.0;
                    assert!(!(now && panics), "on purpose");
                    !now
                })
                .map(drop)
            }));
            match stopped {
                Ok(stopped) => {
                    assert!(!panics && matches!(stopped, Err(Error::Cancelled)), "{stopped:?}");
                }
                Err(_) => assert!(panics),
            }
            assert_given_back(&device, &format!("call {stop}, {panics}"));
        }
    }
}

/// Written to while the reads are under way.
#[test]
fn files_that_change_meanwhile_are_refused() {
    let synth = Synth::new(&Spec::new(Arch::Llama));
    let file = tierstream_gguf::Model::open(&synth.path).unwrap();
    let device = stand_in();
    let slow = faulty(vec![Rule::all(Action::Delay(Duration::from_millis(60)))]);
    let mut touched = 0;
    let error = load(&file, &device, slow, &mut |done| {
        // llama.cpp tells the first; by then it has opened the file, whose name is looked at later.
        if done > 0.0 && touched == 0 {
            let handle = fs::File::options().append(true).open(&synth.path).unwrap();
            handle.set_modified(SystemTime::now() + Duration::from_secs(5)).unwrap();
            touched += 1;
        }
        true
    });
    let error = error.map(drop).unwrap_err();
    assert_eq!(touched, 1);
    assert!(matches!(error, Error::Io(tierstream_io::Error::Changed { .. })), "{error:?}");
    assert_given_back(&device, "changed");
}

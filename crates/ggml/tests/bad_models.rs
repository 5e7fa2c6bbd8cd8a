//! Models whose metadata or tensors make no sense: an error or output, never the end of the
//! process without a word. llama.cpp checks much of this with `GGML_ASSERT`, which aborts; so each
//! model is loaded and run in a child process, which is this very test program.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use common::{Room, STOCK, attach, go_on};
use tierstream_ggml::{Context, ContextOptions, Error, Keep, Model, Placement, Weights};
use tierstream_gguf::write::{TensorSpec, encode};
use tierstream_gguf::{Array, Metadata, Strings, TensorType, Value};
use tierstream_io::{Config, Reader};
use tierstream_pool::Policy;
use tierstream_synth::{Arch, Spec};

/// In the child: the architecture, the case to begin with, and a folder, which a child that ends in
/// the middle of its work cannot remove.
const ARCH: &str = "TIERSTREAM_BAD_MODEL_ARCH";
const FROM: &str = "TIERSTREAM_BAD_MODEL_FROM";
const DIR: &str = "TIERSTREAM_BAD_MODEL_DIR";

/// Address space of a child: what is absurdly large fails to be allocated, and what is not takes
/// no long time to be filled.
const CHILD_BYTES_MAX: u64 = 2 << 30;

/// What the child prints before it ends with status 1, because llama.cpp gave up.
const GAVE_UP: &str = "gave up";

/// The only case, in the debug format of a [`Change`], that is not seen to be bad from the header:
/// how many nodes the graph of so many experts has is known to the code of its architecture alone.
const NOT_FORESEEN: &str = r#"[Set("qwen3moe.expert_used_count", U32(64))]"#;

/// What is changed in a good model.
#[derive(Debug, Clone)]
enum Change {
    Set(String, Value),
    Remove(String),
    Drop(String),
    Shape(String, Vec<u64>),
    Type(String, TensorType),
    /// Every 16 bits of a tensor's data become this.
    Fill(String, u16),
}

/// A model to be changed.
struct Good {
    metadata: BTreeMap<String, Value>,
    tensors: Vec<(TensorSpec, Arc<[u8]>)>,
}

impl Good {
    fn read(path: &Path) -> Self {
        let model = tierstream_gguf::Model::open(path).unwrap();
        let bytes = fs::read(path).unwrap();
        let metadata = model.metadata().iter().map(|(k, v)| (k.to_owned(), v.clone())).collect();
        let tensors = model
            .tensors()
            .iter()
            .map(|t| {
                let data = &bytes[t.offset as usize..t.end() as usize];
                (TensorSpec::new(t.name.clone(), t.ty, t.dims.to_vec()), data.into())
            })
            .collect();
        Self { metadata, tensors }
    }

    /// Writes the changed model, unless our own reader's rules forbid even to write it.
    fn write(&self, changes: &[Change], path: &Path) -> bool {
        let mut metadata = self.metadata.clone();
        let mut tensors = self.tensors.clone();
        for change in changes {
            match change {
                Change::Set(key, value) => {
                    metadata.insert(key.clone(), value.clone());
                }
                Change::Remove(key) => {
                    metadata.remove(key);
                }
                Change::Drop(name) => tensors.retain(|(t, _)| t.name != *name),
                Change::Shape(name, dims) => of(&mut tensors, name).0.dims.clone_from(dims),
                Change::Type(name, ty) => of(&mut tensors, name).0.ty = *ty,
                Change::Fill(name, word) => {
                    let data = Arc::make_mut(&mut of(&mut tensors, name).1);
                    data.chunks_exact_mut(2).for_each(|c| c.copy_from_slice(&word.to_le_bytes()));
                }
            }
        }
        let mut all = Metadata::new();
        metadata.into_iter().for_each(|(k, v)| {
            all.insert(k, v);
        });
        let specs: Vec<_> = tensors.iter().map(|(t, _)| t.clone()).collect();
        let Ok((bytes, header)) = encode(&all, &specs) else { return false };
        if header.file_len() > 64 << 20 {
            return false;
        }
        fs::write(path, bytes).unwrap();
        let file = fs::File::options().write(true).open(path).unwrap();
        for (t, (_, data)) in header.tensors().iter().zip(&tensors) {
            let n = data.len().min(t.len as usize);
            file.write_all_at(&data[..n], t.offset).unwrap();
        }
        file.set_len(header.file_len()).unwrap();
        true
    }
}

fn of<'a>(
    tensors: &'a mut [(TensorSpec, Arc<[u8]>)],
    name: &str,
) -> &'a mut (TensorSpec, Arc<[u8]>) {
    tensors.iter_mut().find(|(t, _)| t.name == name).unwrap()
}

/// Every change that is tried with an architecture.
fn cases(good: &Good, arch: Arch) -> Vec<Vec<Change>> {
    let mut all = Vec::new();
    let prefix = format!("{}.", arch.gguf_name());
    for (key, value) in good.metadata.iter().filter(|(k, _)| k.starts_with(&prefix)) {
        all.push(vec![Change::Remove(key.clone())]);
        let values: Vec<Value> = match value {
            Value::U32(n) => {
                let mut values =
                    [0, 1, 2, 3, 7, 64, 511, 513, 1025, 1 << 20, 1 << 31, u32::MAX].to_vec();
                values.extend([n - 1, n + 1, n * 2, n / 2]);
                let mut values: Vec<Value> = values.into_iter().map(Value::U32).collect();
                values.push(Value::I32(-1));
                values.push(Value::Str("many".into()));
                values.push(Value::Array(Array::U32(vec![*n; 3])));
                values.push(Value::Array(Array::I32(vec![0; 4])));
                values.push(Value::Array(Array::I32(vec![-1; 8])));
                values.push(Value::Array(Array::U32(vec![*n; 600])));
                values
            }
            Value::F32(_) => {
                [0.0, -1.0, 1e-30, 1e30, f32::NAN, f32::INFINITY].map(Value::F32).to_vec()
            }
            Value::Bool(b) => vec![Value::Bool(!b), Value::U32(7)],
            Value::Str(_) => vec![Value::Str("nonsense".into()), Value::Str(String::new())],
            _ => Vec::new(),
        };
        all.extend(values.into_iter().map(|v| vec![Change::Set(key.clone(), v)]));
    }
    let extra = |suffix: &str, value: Value| vec![Change::Set(format!("{prefix}{suffix}"), value)];
    for n in [0, 1, 2, 3, 5, 32, 64, 1000, u32::MAX] {
        for suffix in [
            "expert_group_count",
            "nextn_predict_layers",
            "attention.sliding_window",
            "attention.sliding_window_pattern",
            "rope.scaling.original_context_length",
            "embedding_length_out",
            "pooling_type",
            "attention.key_length_swa",
            "rope.dimension_count_swa",
            "attention.layer_norm_rms_epsilon",
            "leading_dense_block_count",
            "expert_shared_count",
            "expert_gating_func",
            "interleave_moe_layer_step",
            "attention.q_lora_rank",
            "classifier.output_labels",
        ] {
            all.push(extra(suffix, Value::U32(n)));
        }
        let groups = |used| {
            let mut groups = extra("expert_group_count", Value::U32(n));
            groups.extend(extra("expert_group_used_count", Value::U32(used)));
            groups
        };
        all.extend([0, 1, 2, 3, n].map(groups));
    }
    for text in ["linear", "yarn", "longrope", "nonsense", "none", ""] {
        all.push(extra("rope.scaling.type", Value::Str(text.into())));
    }
    for x in [0.0, -1.0, f32::NAN, f32::INFINITY, 1e-40] {
        for suffix in [
            "rope.scaling.factor",
            "rope.scaling.attn_factor",
            "expert_weights_scale",
            "rope.freq_base",
        ] {
            all.push(extra(suffix, Value::F32(x)));
        }
    }
    all.push(extra("attention.causal", Value::Bool(false)));
    if arch == Arch::Qwen3Moe {
        // Every third: 3 and the 4 stages of a tokenizer have no common divisor.
        all.extend(vocabularies().into_iter().step_by(3));
    }
    all.push(vec![Change::Set("general.architecture".into(), Value::Str("nonsense".into()))]);
    for other in ["clip", "bert", "t5", "mamba", "rwkv7", "wavtokenizer-dec", "llama", "jamba"] {
        all.push(vec![Change::Set("general.architecture".into(), Value::Str(other.into()))]);
    }
    all.push(vec![Change::Set("general.file_type".into(), Value::U32(u32::MAX))]);
    all.push(vec![Change::Set("general.quantization_version".into(), Value::U32(0))]);
    // The second layer has every kind of tensor but those of dense layers.
    let named = good.tensors.iter().map(|(t, _)| t);
    for t in named.filter(|t| !t.name.starts_with("blk.") || t.name.starts_with("blk.1.")) {
        all.push(vec![Change::Drop(t.name.clone())]);
        let mut dims = t.dims.clone();
        dims.reverse();
        all.push(vec![Change::Shape(t.name.clone(), dims)]);
        for dim in 0..t.dims.len() {
            for to in [1, t.dims[dim] / 2, t.dims[dim] + 32, 32] {
                let mut dims = t.dims.clone();
                dims[dim] = to.max(1);
                all.push(vec![Change::Shape(t.name.clone(), dims)]);
            }
        }
        let mut dims = t.dims.clone();
        dims.push(2);
        all.push(vec![Change::Shape(t.name.clone(), dims)]);
        for ty in [
            TensorType::F32,
            TensorType::F16,
            TensorType::I32,
            TensorType::I8,
            TensorType::F64,
            TensorType::Q8_0,
            TensorType::Q1_0,
            TensorType::NVFP4,
            TensorType::Q8_1,
            TensorType::Q8_K,
        ] {
            all.push(vec![Change::Type(t.name.clone(), ty)]);
        }
        // Not a number, infinity, and the largest bits, in scales, weights and norms.
        for word in [0x7FFF, 0x7C00, 0xFFFF, 0x7F80] {
            all.push(vec![Change::Fill(t.name.clone(), word)]);
        }
    }
    if arch == Arch::Qwen3Moe {
        return all;
    }
    // Most has no ties to the architecture. Every case is some architecture's.
    let others = [Arch::GptOss, Arch::DeepSeek2, Arch::Llama4, Arch::Mixtral];
    let at = others.iter().position(|&o| o == arch).unwrap();
    let mut all: Vec<_> = all.into_iter().skip(at).step_by(others.len()).collect();
    // Far wider than the model, and not too wide to be allocated.
    all.push(extra("attention.key_length", Value::U32(1 << 16)));
    all
}

/// Tokenizers in place of none.
fn vocabularies() -> Vec<Vec<Change>> {
    let strings = |n: usize, text: &dyn Fn(usize) -> String| {
        let mut strings = Strings::default();
        (0..n).for_each(|i| strings.push(text(i)));
        Value::Array(Array::Str(strings))
    };
    let key = |key: &str, value: Value| Change::Set(format!("tokenizer.ggml.{key}"), value);
    let mut all = Vec::new();
    for model in ["llama", "gpt2", "bert", "t5", "rwkv", "plamo2", "nonsense", "none", ""] {
        let model = || key("model", Value::Str(model.into()));
        all.push(vec![model()]);
        for n in [1, 1024] {
            for text in [
                &(|i| format!("t{i}")) as &dyn Fn(usize) -> String,
                &|_| "same".into(),
                &|_| String::new(),
                &|i| if i < 256 { format!("<0x{i:02X}>") } else { format!("t{i}") },
            ] {
                let mut tokens = vec![model(), key("tokens", strings(n, text))];
                all.push(tokens.clone());
                tokens.push(key("merges", strings(3, &|i| ["t1 t2", "nonsense", " "][i].into())));
                tokens.push(key("scores", Value::Array(Array::F32(vec![0.0; n / 2]))));
                tokens.push(key("token_type", Value::Array(Array::I32(vec![-7; n / 2]))));
                all.push(tokens.clone());
                tokens.push(key("pre", Value::Str("default".into())));
                tokens.push(key("bos_token_id", Value::U32(u32::MAX)));
                tokens.push(key("eos_token_id", Value::U32(1024)));
                tokens.push(key("add_bos_token", Value::Bool(true)));
                tokens.push(key("add_eos_token", Value::Bool(true)));
                all.push(tokens.clone());
                tokens.push(key("scores", Value::Array(Array::F32(vec![f32::NAN; n]))));
                tokens.push(key("token_type", Value::Array(Array::I32(vec![1; n]))));
                tokens.push(key("precompiled_charsmap", Value::Array(Array::U8(vec![0xFF; 5]))));
                all.push(tokens);
            }
        }
    }
    all
}

/// Loads and runs a model as far as it goes.
fn use_model(path: &Path) -> Result<(), Error> {
    let file = tierstream_gguf::Model::open(path)?;
    // Small: its memory is faulted in for each case.
    let reader = Config { ring_bytes: 64 << 10, buffer_bytes: 16 << 10, ..Config::default() };
    let reader = Arc::new(Reader::new(reader)?);
    for weights in [Weights::Streamed, STOCK] {
        let model = Model::load(&file, weights, &Placement::Cpu, reader.clone(), &mut go_on)?;
        if model.is_streamed() {
            attach(&model, Room::Floor(0), Policy::Lru);
        }
        let options = ContextOptions { n_ctx: 256, n_batch: 8, ..ContextOptions::default() };
        let mut context = Context::new(model.clone(), &options)?;
        let vocab = model.vocab().len();
        if vocab == 0 {
            return Ok(());
        }
        let tokens = common::tokens(vocab, 12, 1);
        context.decode(&tokens, Keep::All, |_, _| ())?;
        context.decode(&tokens[..1], Keep::All, |_, _| ())?;
        let vocab = model.vocab();
        if let Ok(tokens) = vocab.tokenize("Hello, world \u{1F30D}\n", true, true) {
            tokens.into_iter().for_each(|t| drop(vocab.piece(t)));
        }
        let _ = vocab.is_end(tokens[0]);
    }
    Ok(())
}

fn arch() -> Arch {
    std::env::var(ARCH).unwrap().parse().unwrap()
}

/// The good model. Its experts are small, because each case writes them.
fn spec(arch: Arch) -> Spec {
    let mut spec = Spec::new(arch);
    spec.n_ff_exp = 32;
    spec
}

/// A folder in memory where there is one with room: what was just written to a drive has to reach
/// it before it can be read past the page cache, and each case would wait for that.
fn folder() -> tempfile::TempDir {
    let memory = c"/dev/shm";
    // SAFETY: an all-zero `statvfs` is one, and the call fills it.
    let room = unsafe {
        let mut stat: libc::statvfs = std::mem::zeroed();
        let told = libc::statvfs(memory.as_ptr(), &raw mut stat) == 0;
        if told { stat.f_bavail * stat.f_bsize } else { 0 }
    };
    let in_memory = (room > 1 << 30).then(|| tempfile::tempdir_in("/dev/shm").ok()).flatten();
    in_memory.unwrap_or_else(|| tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap())
}

#[test]
#[ignore = "the child process of the other tests"]
fn child() {
    let from: usize = std::env::var(FROM).unwrap().parse().unwrap();
    tierstream_ggml::on_abort(|message| {
        println!("{GAVE_UP} {message}");
        // SAFETY: ends the process.
        unsafe { libc::_exit(1) };
    });
    let limit = libc::rlimit { rlim_cur: CHILD_BYTES_MAX, rlim_max: CHILD_BYTES_MAX };
    // SAFETY: a plain system call.
    unsafe { libc::setrlimit(libc::RLIMIT_AS, &raw const limit) };
    let path = Path::new(&std::env::var_os(DIR).unwrap()).join("bad.gguf");
    spec(arch()).write(&path).unwrap();
    let good = Good::read(&path);
    use_model(&path).unwrap();
    println!(); // ends the line that the test harness has begun
    for (index, changes) in cases(&good, arch()).iter().enumerate().skip(from) {
        if good.write(changes, &path) {
            println!("case {index} {:.200}", format!("{changes:?}"));
            let result = common::watched("a bad model", || use_model(&path));
            println!("done {index} {result:?}");
        }
    }
}

/// Runs all cases of an architecture; a child that dies is followed by one that goes on after the
/// case that killed it.
fn check(arch: Arch) {
    let dir = folder();
    let mut from = 0;
    let mut crashes = Vec::new();
    let mut done = 0;
    loop {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "child", "--nocapture", "--test-threads=1"])
            .env(ARCH, arch.name())
            .env(FROM, from.to_string())
            .env(DIR, dir.path())
            .env("RUST_BACKTRACE", "0")
            .env("GGML_NO_BACKTRACE", "1")
            .output()
            .unwrap();
        let out = String::from_utf8_lossy(&child.stdout);
        done += out.lines().filter(|l| l.starts_with("done ")).count();
        if std::env::var_os("TIERSTREAM_BAD_MODEL_SHOW").is_some() {
            out.lines().for_each(|l| println!("{l}"));
        }
        if child.status.success() {
            break;
        }
        let last = out.lines().rfind(|l| l.starts_with("case ")).expect("a case was begun");
        let err = String::from_utf8_lossy(&child.stderr);
        let err: Vec<&str> = err
            .lines()
            .filter(|l| !l.is_empty() && !l.contains("libggml") && !l.starts_with("note:"))
            .collect();
        let err = err[err.len().saturating_sub(3)..].join(" | ");
        let gave_up = out.lines().next_back().is_some_and(|l| l.starts_with(GAVE_UP));
        if gave_up && child.status.code() == Some(1) && last.ends_with(NOT_FORESEEN) {
            done += 1;
        } else {
            let said = if gave_up { GAVE_UP } else { "" };
            crashes.push(format!("{last}: {} {said}: {err}", child.status));
        }
        from = last.split(' ').nth(1).unwrap().parse::<usize>().unwrap() + 1;
    }
    assert!(done > 200, "{done} cases");
    assert!(crashes.is_empty(), "{} crashes of {done}:\n{}", crashes.len(), crashes.join("\n"));
}

#[test]
fn qwen3moe() {
    check(Arch::Qwen3Moe);
}

#[test]
fn gpt_oss() {
    check(Arch::GptOss);
}

#[test]
fn deepseek2() {
    check(Arch::DeepSeek2);
}

#[test]
fn llama4() {
    check(Arch::Llama4);
}

#[test]
fn mixtral() {
    check(Arch::Mixtral);
}

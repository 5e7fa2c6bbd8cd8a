//! What llama.cpp would answer with `abort()`: checked before it sees the model.
//!
//! llama.cpp returns most complaints about a file as errors, but checks some of what it reads with
//! `GGML_ASSERT`, which ends the process. The rules here are those asserts, of llama-model.cpp
//! (`load_hparams`), llama-vocab.cpp and ggml's CPU operations, as far as metadata and the
//! tensors' types tell. They hold for every architecture unless a name is given.

use std::collections::HashSet;

use tierstream_gguf::{Array, Model, Tensor, TensorType, Value};

use crate::error::{Error, Result};

/// `LLAMA_MAX_LAYERS` and `LLAMA_MAX_EXPERTS` (llama-hparams.h).
const LAYERS_MAX: u32 = 512;
const EXPERTS_MAX: u32 = 1024;

/// Of `llama_expert_gating_func_type` (llama-hparams.h).
const GATING_MAX: u32 = 4;

/// Names of `rope.scaling.type` (`LLAMA_ROPE_SCALING_TYPES`, llama-model.cpp).
const ROPE_SCALINGS: [&str; 4] = ["none", "linear", "yarn", "longrope"];

/// Architectures whose graph asserts that positions rotate whole heads (`n_embd_head == n_rot`).
const WHOLE_HEADS_ROTATE: [&str; 13] = [
    "llama4",
    "qwen2",
    "qwen2moe",
    "qwen3",
    "qwen3moe",
    "olmo2",
    "olmoe",
    "dots1",
    "grok",
    "hunyuan-moe",
    "ernie4_5-moe",
    "hy_v3",
    "dbrx",
];

/// Fails with [`Error::Unusable`] or [`Error::Gguf`] on a model that would abort llama.cpp.
pub(crate) fn check(model: &Model) -> Result<()> {
    model.check_ggml()?;
    let checks = [
        check_layers,
        check_experts,
        check_window,
        check_rope,
        check_caches,
        check_norms,
        check_vocabulary,
    ];
    let unusable = |reason| Error::Unusable { path: model.files()[0].path.clone(), reason };
    for check in checks {
        check(model)?.map_err(unusable)?;
    }
    model.tensors().iter().try_for_each(check_type).map_err(unusable)
}

/// The outer error is one of the file's format, the inner a sentence.
type Verdict = Result<Result<(), String>>;

fn verdict(checks: impl IntoIterator<Item = (bool, String)>) -> Verdict {
    Ok(checks.into_iter().find(|(holds, _)| !holds).map_or(Ok(()), |(_, reason)| Err(reason)))
}

fn check_layers(model: &Model) -> Verdict {
    let layers = model.block_count()?;
    let next_token = model.arch_u32("nextn_predict_layers")?.unwrap_or(0);
    let n = layers.unwrap_or(1); // llama.cpp itself complains when the key is missing
    verdict([
        (
            (1..=LAYERS_MAX).contains(&n),
            format!("it has {n} layers; 1 to {LAYERS_MAX} are possible"),
        ),
        (next_token < n.max(1), format!("{next_token} of its {n} layers predict further tokens")),
    ])
}

fn check_experts(model: &Model) -> Verdict {
    let experts = model.expert_count()?.unwrap_or(0);
    let groups = model.arch_u32("expert_group_count")?.unwrap_or(0);
    let groups_used = model.arch_u32("expert_group_used_count")?.unwrap_or(0);
    let gating = model.arch_u32("expert_gating_func")?.unwrap_or(0);
    let layers = model.block_count()?.unwrap_or(1).min(LAYERS_MAX);
    let used = match model.metadata().get(&model.arch_key("expert_used_count")) {
        Some(Value::Array(per_layer)) => (0..per_layer.len().min(layers as usize))
            .filter_map(|layer| per_layer.integer(layer))
            .max()
            .unwrap_or(0),
        _ => model.expert_used_count(0)?.unwrap_or(0).into(),
    };
    let count = experts.into();
    let in_groups = groups > 1;
    verdict([
        (experts <= EXPERTS_MAX, format!("it has {experts} experts; {EXPERTS_MAX} are possible")),
        (used <= count, format!("a token uses {used} of its {experts} experts")),
        (gating <= GATING_MAX, format!("its router has the unknown gating function {gating}")),
        (experts == 0 || used > 0, "no token uses any of its experts".to_owned()),
        (groups < experts.max(1), format!("its {experts} experts form {groups} groups")),
        (
            !in_groups || experts.is_multiple_of(groups),
            format!("its {experts} experts do not form {groups} equal groups"),
        ),
        (
            !in_groups || (1..groups).contains(&groups_used),
            format!("a token uses {groups_used} of {groups} groups of experts"),
        ),
    ])
}

/// llama.cpp adds the batch to the window in 32 bits, and allocates by what comes out.
fn check_window(model: &Model) -> Verdict {
    let key = model.arch_key("attention.sliding_window");
    let window = model.metadata().get(&key).and_then(Value::integer);
    let tokens = window.unwrap_or(0);
    // Its graph scales attention by position, with a scale that only a window sets.
    let needs_one = model.architecture() == "llama4" && model.expert_count()?.unwrap_or(0) > 0;
    verdict([
        (
            tokens < 1 << 31,
            format!("its attention window of {tokens} tokens is longer than any context"),
        ),
        (!needs_one || window != Some(0), "its attention window holds no tokens".to_owned()),
    ])
}

fn check_rope(model: &Model) -> Verdict {
    let key = model.arch_key("rope.scaling.type");
    let scaling = match model.metadata().get(&key) {
        Some(Value::Str(name)) => name.as_str(),
        _ => "none",
    };
    let scaling = (
        ROPE_SCALINGS.contains(&scaling),
        format!("{scaling:?} is no kind of rope scaling; there are {}", ROPE_SCALINGS.join(", ")),
    );
    let Heads { count, key: head, rotated, rotated_swa, .. } = Heads::of(model)?;
    let whole = WHOLE_HEADS_ROTATE.contains(&model.architecture());
    verdict([
        scaling,
        (
            rotated % 2 == 0
                && (rotated <= head || count <= 0)
                && (!whole || rotated == head && rotated_swa == head),
            format!("positions rotate {rotated} of the {head} numbers in a head"),
        ),
    ])
}

/// Lengths of attention heads, in numbers.
struct Heads {
    /// How many there are; 0 if that is not told.
    count: i128,
    key: i128,
    value: i128,
    key_swa: i128,
    value_swa: i128,
    /// Of the key, what positions rotate.
    rotated: i128,
    rotated_swa: i128,
}

impl Heads {
    /// As llama.cpp fills in what the file leaves out (llama-model.cpp, `load_hparams`).
    fn of(model: &Model) -> Result<Self> {
        let count = match model.metadata().get(&model.arch_key("attention.head_count")) {
            Some(Value::Array(per_layer)) => per_layer.integer(0).unwrap_or(0),
            Some(other) => other.integer().unwrap_or(0),
            None => 0,
        };
        let width = i128::from(model.arch_u32("embedding_length")?.unwrap_or(0));
        let even = if count > 0 { width / count } else { 0 };
        let length = |suffix, default| -> Result<i128> {
            Ok(model.arch_u32(suffix)?.map_or(default, i128::from))
        };
        let key = length("attention.key_length", even)?;
        let value = length("attention.value_length", even)?;
        let rotated = length("rope.dimension_count", key)?;
        Ok(Self {
            count,
            key,
            value,
            key_swa: length("attention.key_length_swa", key)?,
            value_swa: length("attention.value_length_swa", value)?,
            rotated,
            rotated_swa: length("rope.dimension_count_swa", rotated)?,
        })
    }
}

/// The rows that a graph puts into the KV cache are as long as the cache's.
fn check_caches(model: &Model) -> Verdict {
    let heads = Heads::of(model)?;
    let Heads { key, value, key_swa, value_swa, rotated, .. } = heads;
    match model.architecture() {
        // Shapes its weights by what is rotated.
        "gpt-oss" => verdict([(
            [key, value, key_swa, value_swa].iter().all(|&length| length == rotated),
            format!(
                "its heads have {key} and {value} numbers ({key_swa} and {value_swa} in a window), \
                 of which positions rotate {rotated}"
            ),
        )]),
        "deepseek2" => {
            let whole = model.arch_u32("attention.key_length_mla")?.map(i128::from);
            let cached = i128::from(model.arch_u32("attention.kv_lora_rank")?.unwrap_or(0));
            let kv_heads = model.metadata().get(&model.arch_key("attention.head_count_kv"));
            let kv_heads = kv_heads.and_then(Value::integer).unwrap_or(heads.count);
            let key_whole = whole.unwrap_or(key);
            verdict([
                (
                    key_whole > rotated,
                    format!("positions rotate all of the {key_whole} numbers in a head"),
                ),
                (
                    whole.is_none() || kv_heads == 1,
                    format!("its compressed cache has {kv_heads} heads"),
                ),
                (
                    whole.is_none() || key == cached + rotated,
                    format!("its compressed cache has {key} numbers, not {cached} and {rotated}"),
                ),
            ])
        }
        _ => verdict([]),
    }
}

/// Norms add this to a sum of squares.
fn check_norms(model: &Model) -> Verdict {
    let names = ["attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"];
    verdict(names.map(|name| {
        let epsilon = match model.metadata().get(&model.arch_key(name)) {
            Some(&Value::F32(epsilon)) => epsilon,
            _ => 0.0,
        };
        (epsilon.is_finite() && epsilon >= 0.0, format!("{name} is {epsilon}"))
    }))
}

fn check_vocabulary(model: &Model) -> Verdict {
    let metadata = model.metadata();
    let kind = match metadata.get("tokenizer.ggml.model") {
        Some(Value::Str(kind)) => kind.as_str(),
        _ => "",
    };
    let Some(Value::Array(Array::Str(tokens))) = metadata.get("tokenizer.ggml.tokens") else {
        return verdict([]);
    };
    let mut seen = HashSet::with_capacity(tokens.len());
    // llama.cpp gives empty ones names of their own.
    let twice = tokens.iter().filter(|t| !t.is_empty()).find(|t| !seen.insert(*t));
    verdict([
        (
            matches!(kind, "no_vocab" | "none") || twice.is_none(),
            format!("its token {:?} appears twice", String::from_utf8_lossy(twice.unwrap_or(b""))),
        ),
        (
            kind != "llama"
                || (0..=255).all(|byte: u8| {
                    seen.contains(format!("<0x{byte:02X}>").as_bytes())
                        || seen.contains(&[byte][..])
                }),
            "its tokenizer has no token for some bytes".to_owned(),
        ),
    ])
}

/// ggml has no multiplication for some types, and no norms and biases but F32.
fn check_type(tensor: &Tensor) -> Result<(), String> {
    let small = ["norm.weight", "attn_sinks.weight", ".bias"];
    let small = small.iter().any(|end| tensor.name.ends_with(end));
    let matrix = tensor.name.ends_with(".weight") && tensor.dims.len() > 1;
    let fits = match tensor.ty {
        TensorType::F32 => true,
        _ if small => false,
        // Tables of token or expert numbers.
        TensorType::I32 => !has_arithmetic(&tensor.name),
        TensorType::I8
        | TensorType::I16
        | TensorType::I64
        | TensorType::F64
        | TensorType::Q8_1
        | TensorType::Q8_K => !matrix,
        _ => true,
    };
    if fits {
        return Ok(());
    }
    Err(format!(
        "llama.cpp cannot compute with the type {} of the tensor {:?}",
        tensor.ty, tensor.name
    ))
}

/// Whether a tensor is of a kind that every architecture multiplies with.
fn has_arithmetic(name: &str) -> bool {
    ["attn_", "ffn_gate", "ffn_up", "ffn_down", "output", "token_embd", "_exps.", "_shexp."]
        .iter()
        .any(|part| name.contains(part))
        && !name.contains("tid2eid")
}

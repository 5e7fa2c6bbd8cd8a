//! The model architectures: one file each, with its default shape, its metadata and its tensors.

mod deepseek2;
mod gpt_oss;
mod hy_v3;
mod llama;
mod llama4;
mod mixtral;
mod olmoe;
mod qwen3moe;

use std::fmt;
use std::str::FromStr;

use crate::error::Result;
use crate::plan::{ArchMetadata, Builder};
use crate::spec::Spec;

/// A model architecture that the generator knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Arch {
    /// `qwen3moe`: softmax router over all experts, q and k norms.
    Qwen3Moe,
    /// `olmoe`: router weights are not normalised; norms over whole q and k.
    Olmoe,
    /// `gpt-oss`: MXFP4 experts with biases, attention sinks, every other layer windowed.
    GptOss,
    /// `deepseek2`: compressed attention (MLA), leading dense layers, shared experts, group
    /// routing with a selection bias.
    DeepSeek2,
    /// `llama4`: every n-th layer is MoE, one expert of sigmoid weight beside a shared one,
    /// chunked attention.
    Llama4,
    /// `llama` with experts, as Mixtral has them.
    Mixtral,
    /// `hy_v3`: sigmoid router with a selection bias, one shared expert, and gate and up fused
    /// into `ffn_gate_up_exps`.
    HyV3,
    /// `llama` without experts.
    Llama,
}

/// What differs between architectures in what a [`Spec`] may ask for.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Abilities {
    /// Leading dense layers.
    pub(crate) dense_lead: bool,
    /// MoE only in every n-th layer.
    pub(crate) moe_step: bool,
    /// `ffn_gate_up_exps` in place of gate and up.
    pub(crate) fused: bool,
    /// Largest number of shared experts, and whether there must be that many.
    pub(crate) shared: (u32, bool),
}

impl Arch {
    /// Every architecture.
    pub const ALL: [Self; 8] = [
        Self::Qwen3Moe,
        Self::Olmoe,
        Self::GptOss,
        Self::DeepSeek2,
        Self::Llama4,
        Self::Mixtral,
        Self::HyV3,
        Self::Llama,
    ];

    /// The name used here and on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Mixtral => "mixtral",
            other => other.gguf_name(),
        }
    }

    /// `general.architecture` in the file.
    #[must_use]
    pub fn gguf_name(self) -> &'static str {
        match self {
            Self::Qwen3Moe => "qwen3moe",
            Self::Olmoe => "olmoe",
            Self::GptOss => "gpt-oss",
            Self::DeepSeek2 => "deepseek2",
            Self::Llama4 => "llama4",
            Self::HyV3 => "hy_v3",
            Self::Mixtral | Self::Llama => "llama",
        }
    }

    /// Whether layers of this architecture have routed experts.
    #[must_use]
    pub fn is_moe(self) -> bool {
        self != Self::Llama
    }

    pub(crate) fn defaults(self) -> Spec {
        match self {
            Self::Qwen3Moe => qwen3moe::defaults(),
            Self::Olmoe => olmoe::defaults(),
            Self::GptOss => gpt_oss::defaults(),
            Self::DeepSeek2 => deepseek2::defaults(),
            Self::Llama4 => llama4::defaults(),
            Self::Mixtral => mixtral::defaults(),
            Self::HyV3 => hy_v3::defaults(),
            Self::Llama => llama::defaults(),
        }
    }

    pub(crate) fn abilities(self) -> Abilities {
        match self {
            Self::DeepSeek2 => deepseek2::ABILITIES,
            Self::Llama4 => llama4::ABILITIES,
            Self::HyV3 => hy_v3::ABILITIES,
            _ => Abilities::default(),
        }
    }

    /// What only this architecture demands of a shape.
    pub(crate) fn check(self, spec: &Spec) -> Result<()> {
        match self {
            Self::Olmoe => olmoe::check(spec),
            Self::DeepSeek2 => deepseek2::check(spec),
            _ => Ok(()),
        }
    }

    pub(crate) fn metadata(self, spec: &Spec, m: &mut ArchMetadata) {
        common_metadata(spec, m);
        match self {
            Self::Qwen3Moe => qwen3moe::metadata(spec, m),
            Self::Olmoe => olmoe::metadata(spec, m),
            Self::GptOss => gpt_oss::metadata(spec, m),
            Self::DeepSeek2 => deepseek2::metadata(spec, m),
            Self::Llama4 => llama4::metadata(spec, m),
            Self::Mixtral => mixtral::metadata(spec, m),
            Self::HyV3 => hy_v3::metadata(spec, m),
            Self::Llama => llama::metadata(spec, m),
        }
    }

    /// The tensors of layer `il`.
    pub(crate) fn layer(self, spec: &Spec, il: u32, b: &mut Builder<'_>) {
        match self {
            Self::Qwen3Moe => qwen3moe::layer(spec, il, b),
            Self::Olmoe => olmoe::layer(spec, il, b),
            Self::GptOss => gpt_oss::layer(spec, il, b),
            Self::DeepSeek2 => deepseek2::layer(spec, il, b),
            Self::Llama4 => llama4::layer(spec, il, b),
            Self::Mixtral => mixtral::layer(spec, il, b),
            Self::HyV3 => hy_v3::layer(spec, il, b),
            Self::Llama => llama::layer(spec, il, b),
        }
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Arch {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let plain = |s: &str| s.to_ascii_lowercase().replace(['-', '_'], "");
        Self::ALL.into_iter().find(|a| plain(a.name()) == plain(s)).ok_or_else(|| {
            let names: Vec<_> = Self::ALL.iter().map(|a| a.name()).collect();
            format!("unknown architecture `{s}`; known: {}", names.join(", "))
        })
    }
}

/// Keys that every architecture has; `vocab_size` stands in for a tokenizer.
fn common_metadata(spec: &Spec, m: &mut ArchMetadata) {
    m.u32("vocab_size", spec.vocab);
    m.u32("context_length", spec.ctx);
    m.u32("embedding_length", spec.n_embd);
    m.u32("block_count", spec.n_layer);
    m.f32("attention.layer_norm_rms_epsilon", 1e-6);
    m.u32("attention.head_count", spec.n_head);
    if spec.arch.is_moe() {
        m.u32("expert_count", spec.n_expert);
        m.u32("expert_used_count", spec.n_used);
        if spec.n_group > 1 {
            m.u32("expert_group_count", spec.n_group);
            m.u32("expert_group_used_count", spec.n_group_used);
        }
    }
}

/// Keys of grouped-query attention where heads of q, k and v have one length.
fn gqa_metadata(spec: &Spec, m: &mut ArchMetadata, rope_base: f32) {
    m.u32("attention.head_count_kv", spec.n_head_kv);
    m.u32("attention.key_length", spec.head_dim);
    m.u32("attention.value_length", spec.head_dim);
    m.u32("rope.dimension_count", spec.head_dim);
    m.f32("rope.freq_base", rope_base);
}

/// The shape that the small defaults share.
fn small(arch: Arch) -> Spec {
    Spec {
        arch,
        n_layer: 4,
        n_embd: 256,
        n_head: 8,
        n_head_kv: 2,
        head_dim: 32,
        n_ff: 512,
        n_ff_exp: 96,
        n_expert: 32,
        n_used: 4,
        n_shared: 0,
        n_dense_lead: 0,
        moe_step: 1,
        n_group: 1,
        n_group_used: 1,
        vocab: 1024,
        ctx: 4096,
        swa: 0,
        mla: crate::Mla { q_lora: 0, kv_lora: 0, rope: 0, value: 0 },
        fused_gate_up: false,
        gate_type: crate::TensorType::Q4_0,
        up_type: crate::TensorType::Q4_0,
        down_type: crate::TensorType::Q4_0,
        down_mix: None,
        dense_type: crate::TensorType::Q8_0,
        seed: 0,
        alignment: crate::gguf::DEFAULT_ALIGNMENT,
        split_bytes: None,
        split_empty_first: false,
    }
}

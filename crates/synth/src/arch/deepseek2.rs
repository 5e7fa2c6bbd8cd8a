//! DeepSeek V2 and V3 (`src/models/deepseek2.cpp` of llama.cpp): attention over a compressed
//! cache (MLA), leading dense layers, shared experts, group routing with a selection bias.

use super::{Abilities, Arch, small};
use crate::error::{Error, Result};
use crate::plan::{ArchMetadata, Builder};
use crate::spec::{Mla, Spec};

pub(super) const ABILITIES: Abilities =
    Abilities { dense_lead: true, moe_step: false, fused: true, shared: (64, false) };

/// Sigmoid, as DeepSeek V3 (`llama_expert_gating_func_type`).
const GATING_SIGMOID: u32 = 2;

pub(super) fn defaults() -> Spec {
    Spec {
        n_layer: 5,
        n_head: 4,
        n_head_kv: 1,
        head_dim: 64,
        mla: Mla { q_lora: 128, kv_lora: 128, rope: 32, value: 64 },
        n_shared: 1,
        n_dense_lead: 1,
        n_group: 4,
        n_group_used: 2,
        ..small(Arch::DeepSeek2)
    }
}

pub(super) fn check(spec: &Spec) -> Result<()> {
    if matches!(spec.n_layer, 26 | 27) {
        let why = "llama.cpp takes deepseek2 of 26 or 27 layers for a variant without q_lora";
        return Err(Error::Spec { field: "n_layer", value: spec.n_layer.into(), why: why.into() });
    }
    if spec.n_shared == 0 {
        let why = "deepseek2 always has shared experts".into();
        return Err(Error::Spec { field: "n_shared", value: 0, why });
    }
    for (field, value) in [
        ("mla.q_lora", spec.mla.q_lora),
        ("mla.kv_lora", spec.mla.kv_lora),
        ("mla.rope", spec.mla.rope),
        ("mla.value", spec.mla.value),
    ] {
        if !(32..=1 << 16).contains(&value) || !value.is_multiple_of(32) {
            let why = "must be a multiple of 32, up to 65536".into();
            return Err(Error::Spec { field, value: value.into(), why });
        }
    }
    if spec.head_dim <= spec.mla.rope {
        let why = format!("must be larger than its part with positions ({})", spec.mla.rope);
        return Err(Error::Spec { field: "head_dim", value: spec.head_dim.into(), why });
    }
    Ok(())
}

pub(super) fn metadata(spec: &Spec, m: &mut ArchMetadata) {
    let Mla { q_lora, kv_lora, rope, value } = spec.mla;
    // The cache holds one head of the compressed values and the shared positions.
    m.u32("attention.head_count_kv", 1);
    m.u32("attention.q_lora_rank", q_lora);
    m.u32("attention.kv_lora_rank", kv_lora);
    m.u32("attention.key_length", kv_lora + rope);
    m.u32("attention.value_length", kv_lora);
    m.u32("attention.key_length_mla", spec.head_dim);
    m.u32("attention.value_length_mla", value);
    m.u32("rope.dimension_count", rope);
    m.f32("rope.freq_base", 10_000.0);
    m.u32("feed_forward_length", spec.n_ff);
    m.u32("leading_dense_block_count", spec.n_dense_lead);
    m.u32("expert_feed_forward_length", spec.n_ff_exp);
    m.u32("expert_shared_count", spec.n_shared);
    m.f32("expert_weights_scale", 2.5);
    m.bool("expert_weights_norm", true);
    m.u32("expert_gating_func", GATING_SIGMOID);
}

pub(super) fn layer(spec: &Spec, il: u32, b: &mut Builder<'_>) {
    let Mla { q_lora, kv_lora, rope, value } = spec.mla;
    b.norm(format!("blk.{il}.attn_norm.weight"), spec.n_embd);
    b.matrix(format!("blk.{il}.attn_q_a.weight"), &[spec.n_embd, q_lora]);
    b.norm(format!("blk.{il}.attn_q_a_norm.weight"), q_lora);
    b.matrix(format!("blk.{il}.attn_q_b.weight"), &[q_lora, spec.n_head * spec.head_dim]);
    b.matrix(format!("blk.{il}.attn_kv_a_mqa.weight"), &[spec.n_embd, kv_lora + rope]);
    b.norm(format!("blk.{il}.attn_kv_a_norm.weight"), kv_lora);
    b.matrix(format!("blk.{il}.attn_k_b.weight"), &[spec.head_dim - rope, kv_lora, spec.n_head]);
    b.matrix(format!("blk.{il}.attn_v_b.weight"), &[kv_lora, value, spec.n_head]);
    b.matrix(format!("blk.{il}.attn_output.weight"), &[spec.n_head * value, spec.n_embd]);
    b.norm(format!("blk.{il}.ffn_norm.weight"), spec.n_embd);
    if spec.is_moe_layer(il) {
        b.router(il);
        b.bias(format!("blk.{il}.exp_probs_b.bias"), spec.n_expert);
        b.experts(il);
        b.ffn(il, "_shexp", spec.n_ff_exp * spec.n_shared);
    } else {
        b.ffn(il, "", spec.n_ff);
    }
}

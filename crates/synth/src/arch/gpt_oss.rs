//! gpt-oss (`src/models/openai-moe.cpp` of llama.cpp): biases everywhere, attention sinks, every
//! other layer with a sliding window.

use super::{Arch, gqa_metadata, small};
use crate::plan::{ArchMetadata, Builder};
use crate::spec::Spec;
use crate::types::TensorType;

pub(super) fn defaults() -> Spec {
    Spec {
        n_head_kv: 2,
        head_dim: 64,
        n_ff_exp: 160,
        swa: 128,
        gate_type: TensorType::MXFP4,
        up_type: TensorType::MXFP4,
        down_type: TensorType::MXFP4,
        ..small(Arch::GptOss)
    }
}

pub(super) fn metadata(spec: &Spec, m: &mut ArchMetadata) {
    gqa_metadata(spec, m, 150_000.0);
    m.u32("feed_forward_length", spec.n_ff_exp);
    m.u32("expert_feed_forward_length", spec.n_ff_exp);
    m.u32("attention.sliding_window", spec.swa);
    m.str("rope.scaling.type", "yarn");
    m.f32("rope.scaling.factor", 32.0);
    m.u32("rope.scaling.original_context_length", spec.ctx / 32);
}

pub(super) fn layer(spec: &Spec, il: u32, b: &mut Builder<'_>) {
    let (q, kv) = (spec.n_head * spec.head_dim, spec.n_head_kv * spec.head_dim);
    b.norm(format!("blk.{il}.attn_norm.weight"), spec.n_embd);
    b.attention(il);
    b.bias(format!("blk.{il}.attn_q.bias"), q);
    b.bias(format!("blk.{il}.attn_k.bias"), kv);
    b.bias(format!("blk.{il}.attn_v.bias"), kv);
    b.bias(format!("blk.{il}.attn_output.bias"), spec.n_embd);
    b.bias(format!("blk.{il}.attn_sinks.weight"), spec.n_head);
    b.norm(format!("blk.{il}.post_attention_norm.weight"), spec.n_embd);
    b.router(il);
    b.bias(format!("blk.{il}.ffn_gate_inp.bias"), spec.n_expert);
    b.experts(il);
    b.expert_biases(il);
}

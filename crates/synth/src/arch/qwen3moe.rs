//! Qwen3 MoE (`src/models/qwen3moe.cpp` of llama.cpp).

use super::{Arch, gqa_metadata, small};
use crate::plan::{ArchMetadata, Builder};
use crate::spec::Spec;

pub(super) fn defaults() -> Spec {
    Spec { n_layer: 6, n_expert: 64, n_used: 8, ..small(Arch::Qwen3Moe) }
}

pub(super) fn metadata(spec: &Spec, m: &mut ArchMetadata) {
    gqa_metadata(spec, m, 1_000_000.0);
    m.u32("feed_forward_length", spec.n_ff);
    m.u32("expert_feed_forward_length", spec.n_ff_exp);
}

pub(super) fn layer(spec: &Spec, il: u32, b: &mut Builder<'_>) {
    b.norm(format!("blk.{il}.attn_norm.weight"), spec.n_embd);
    b.attention(il);
    b.norm(format!("blk.{il}.attn_q_norm.weight"), spec.head_dim);
    b.norm(format!("blk.{il}.attn_k_norm.weight"), spec.head_dim);
    b.norm(format!("blk.{il}.ffn_norm.weight"), spec.n_embd);
    b.router(il);
    b.experts(il);
}

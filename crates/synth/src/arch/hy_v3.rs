//! HY V3 (`src/models/hy-v3.cpp` of llama.cpp): sigmoid router with a selection bias, one shared
//! expert, and one tensor for gate and up (`ffn_gate_up_exps`).

use super::{Abilities, Arch, gqa_metadata, small};
use crate::plan::{ArchMetadata, Builder};
use crate::spec::Spec;

pub(super) const ABILITIES: Abilities =
    Abilities { dense_lead: true, moe_step: false, fused: true, shared: (1, true) };

/// `llama_expert_gating_func_type`.
const GATING_SIGMOID: u32 = 2;

pub(super) fn defaults() -> Spec {
    Spec { n_layer: 5, n_shared: 1, n_dense_lead: 1, fused_gate_up: true, ..small(Arch::HyV3) }
}

pub(super) fn metadata(spec: &Spec, m: &mut ArchMetadata) {
    gqa_metadata(spec, m, 10_000.0);
    m.u32("feed_forward_length", spec.n_ff);
    m.u32("expert_feed_forward_length", spec.n_ff_exp);
    m.u32("expert_shared_feed_forward_length", spec.n_ff_exp);
    m.u32("leading_dense_block_count", spec.n_dense_lead);
    m.u32("expert_gating_func", GATING_SIGMOID);
    m.bool("expert_weights_norm", true);
    m.f32("expert_weights_scale", 1.5);
}

pub(super) fn layer(spec: &Spec, il: u32, b: &mut Builder<'_>) {
    b.norm(format!("blk.{il}.attn_norm.weight"), spec.n_embd);
    b.attention(il);
    b.norm(format!("blk.{il}.attn_q_norm.weight"), spec.head_dim);
    b.norm(format!("blk.{il}.attn_k_norm.weight"), spec.head_dim);
    b.norm(format!("blk.{il}.ffn_norm.weight"), spec.n_embd);
    if spec.is_moe_layer(il) {
        b.router(il);
        // Without the `.bias` that other architectures have.
        b.bias(format!("blk.{il}.exp_probs_b"), spec.n_expert);
        b.experts(il);
        b.ffn(il, "_shexp", spec.n_ff_exp);
    } else {
        b.ffn(il, "", spec.n_ff);
    }
}

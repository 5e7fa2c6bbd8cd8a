//! Llama 4 (`src/models/llama4.cpp` of llama.cpp): every `moe_step`-th layer is MoE, with a
//! shared expert; three layers of four have chunked attention, the fourth has no positions.

use super::{Abilities, Arch, gqa_metadata, small};
use crate::plan::{ArchMetadata, Builder};
use crate::spec::Spec;

pub(super) const ABILITIES: Abilities =
    Abilities { dense_lead: false, moe_step: true, fused: false, shared: (1, true) };

pub(super) fn defaults() -> Spec {
    Spec {
        n_layer: 8,
        n_ff_exp: 352,
        n_expert: 16,
        n_used: 1,
        n_shared: 1,
        moe_step: 2,
        ..small(Arch::Llama4)
    }
}

pub(super) fn metadata(spec: &Spec, m: &mut ArchMetadata) {
    gqa_metadata(spec, m, 500_000.0);
    m.u32("feed_forward_length", spec.n_ff);
    m.u32("expert_feed_forward_length", spec.n_ff_exp);
    m.u32("interleave_moe_layer_step", spec.moe_step);
}

pub(super) fn layer(spec: &Spec, il: u32, b: &mut Builder<'_>) {
    b.norm(format!("blk.{il}.attn_norm.weight"), spec.n_embd);
    b.attention(il);
    b.norm(format!("blk.{il}.ffn_norm.weight"), spec.n_embd);
    if spec.is_moe_layer(il) {
        b.router(il);
        b.experts(il);
        b.ffn(il, "_shexp", spec.n_ff_exp);
    } else {
        b.ffn(il, "", spec.n_ff);
    }
}

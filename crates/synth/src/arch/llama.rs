//! Llama without experts (`src/models/llama.cpp` of llama.cpp).

use super::{Arch, gqa_metadata, small};
use crate::plan::{ArchMetadata, Builder};
use crate::spec::Spec;

pub(super) fn defaults() -> Spec {
    Spec { n_expert: 0, n_used: 0, n_layer: 6, ..small(Arch::Llama) }
}

pub(super) fn metadata(spec: &Spec, m: &mut ArchMetadata) {
    gqa_metadata(spec, m, 10_000.0);
    m.u32("feed_forward_length", spec.n_ff);
}

pub(super) fn layer(spec: &Spec, il: u32, b: &mut Builder<'_>) {
    b.norm(format!("blk.{il}.attn_norm.weight"), spec.n_embd);
    b.attention(il);
    b.norm(format!("blk.{il}.ffn_norm.weight"), spec.n_embd);
    b.ffn(il, "", spec.n_ff);
}

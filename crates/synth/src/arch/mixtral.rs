//! Mixtral: the `llama` architecture with experts (`src/models/llama.cpp` of llama.cpp). Experts
//! take their width from `feed_forward_length`.

use super::{Arch, gqa_metadata, small};
use crate::plan::{ArchMetadata, Builder};
use crate::spec::Spec;

pub(super) fn defaults() -> Spec {
    Spec { n_ff_exp: 480, n_expert: 8, n_used: 2, ..small(Arch::Mixtral) }
}

pub(super) fn metadata(spec: &Spec, m: &mut ArchMetadata) {
    gqa_metadata(spec, m, 1_000_000.0);
    m.u32("feed_forward_length", spec.n_ff_exp);
}

pub(super) fn layer(spec: &Spec, il: u32, b: &mut Builder<'_>) {
    b.norm(format!("blk.{il}.attn_norm.weight"), spec.n_embd);
    b.attention(il);
    b.norm(format!("blk.{il}.ffn_norm.weight"), spec.n_embd);
    b.router(il);
    b.experts(il);
}

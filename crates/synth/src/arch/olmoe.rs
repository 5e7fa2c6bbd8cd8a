//! OLMoE (`src/models/olmoe.cpp` of llama.cpp). Experts take their width from
//! `feed_forward_length`.

use super::{Arch, gqa_metadata, small};
use crate::error::{Error, Result};
use crate::plan::{ArchMetadata, Builder};
use crate::spec::Spec;
use crate::types::TensorType;

pub(super) fn defaults() -> Spec {
    Spec {
        n_head_kv: 8,
        n_expert: 64,
        n_used: 8,
        gate_type: TensorType::Q8_0,
        up_type: TensorType::Q8_0,
        down_type: TensorType::Q8_0,
        ..small(Arch::Olmoe)
    }
}

/// Q is as wide as the embedding, and the k norm is too.
pub(super) fn check(spec: &Spec) -> Result<()> {
    if spec.n_head * spec.head_dim != spec.n_embd {
        let why = format!("n_embd / n_head must be head_dim ({})", spec.head_dim);
        return Err(Error::Spec { field: "n_embd", value: spec.n_embd.into(), why });
    }
    if spec.n_head_kv != spec.n_head {
        let why = format!("olmoe wants as many as n_head ({})", spec.n_head);
        return Err(Error::Spec { field: "n_head_kv", value: spec.n_head_kv.into(), why });
    }
    Ok(())
}

pub(super) fn metadata(spec: &Spec, m: &mut ArchMetadata) {
    gqa_metadata(spec, m, 10_000.0);
    m.u32("feed_forward_length", spec.n_ff_exp);
}

pub(super) fn layer(spec: &Spec, il: u32, b: &mut Builder<'_>) {
    b.norm(format!("blk.{il}.attn_norm.weight"), spec.n_embd);
    b.attention(il);
    b.norm(format!("blk.{il}.attn_q_norm.weight"), spec.n_embd);
    b.norm(format!("blk.{il}.attn_k_norm.weight"), spec.n_embd);
    b.norm(format!("blk.{il}.ffn_norm.weight"), spec.n_embd);
    b.router(il);
    b.experts(il);
}

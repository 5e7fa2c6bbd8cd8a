//! The shape of a model: what can be chosen, and what llama.cpp would refuse.

use std::path::Path;

use crate::arch::Arch;
use crate::error::{Error, Result};
use crate::plan::{ArchMetadata, Builder, Plan};
use crate::types::{Quant, TensorType};
use crate::write::{self, Written};

/// `LLAMA_MAX_LAYERS` and `LLAMA_MAX_EXPERTS` of llama.cpp (`src/llama-hparams.h`).
const MAX_LAYERS: u32 = 512;
const MAX_EXPERTS: u32 = 1024;

/// [`Spec::scale_to`] rather takes fewer experts than fewer layers with experts.
const SCALED_MOE_LAYERS_MIN: u32 = 4;

/// [`Spec::scale_to`] adds experts, not layers, from here on.
const SCALED_LAYERS_MAX: u32 = 128;

/// Dimensions of DeepSeek's compressed attention; all zero elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mla {
    /// Rank of the compressed q.
    pub q_lora: u32,
    /// Rank of the compressed k and v.
    pub kv_lora: u32,
    /// The part of a head of q and k that carries positions.
    pub rope: u32,
    /// Length of a head of v.
    pub value: u32,
}

/// A model to be written. Start from [`Spec::new`] or [`Spec::big`], then set fields; what does
/// not fit together is an error from [`Spec::write`].
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Spec {
    /// Architecture.
    pub arch: Arch,
    /// Layers.
    pub n_layer: u32,
    /// Width of the residual stream.
    pub n_embd: u32,
    /// Heads of q.
    pub n_head: u32,
    /// Heads of k and v.
    pub n_head_kv: u32,
    /// Length of a head (deepseek2: of q and k).
    pub head_dim: u32,
    /// Hidden width of dense layers.
    pub n_ff: u32,
    /// Hidden width of one routed expert.
    pub n_ff_exp: u32,
    /// Routed experts per MoE layer; 0 in a dense model.
    pub n_expert: u32,
    /// Routed experts per token.
    pub n_used: u32,
    /// Shared experts (deepseek2 any number, llama4 and hy_v3 one).
    pub n_shared: u32,
    /// Leading layers without experts (deepseek2, hy_v3).
    pub n_dense_lead: u32,
    /// Every `moe_step`-th layer has experts (llama4).
    pub moe_step: u32,
    /// Groups of experts for group routing; 1 for none.
    pub n_group: u32,
    /// Groups that a token may choose from.
    pub n_group_used: u32,
    /// Tokens; there is no tokenizer (`no_vocab`).
    pub vocab: u32,
    /// Trained context length.
    pub ctx: u32,
    /// Sliding window in tokens (gpt-oss).
    pub swa: u32,
    /// Compressed attention (deepseek2).
    pub mla: Mla,
    /// One tensor `ffn_gate_up_exps` in place of two (hy_v3, deepseek2).
    pub fused_gate_up: bool,
    /// Type of the experts' gate, or of the fused gate and up.
    pub gate_type: TensorType,
    /// Type of the experts' up.
    pub up_type: TensorType,
    /// Type of the experts' down.
    pub down_type: TensorType,
    /// Type of the experts' down in the layers that Q4_K_M would give more bits.
    pub down_mix: Option<TensorType>,
    /// Type of all other matrices; those whose rows do not fit its blocks get Q8_0 or F16.
    /// Norms, biases and the router are F32.
    pub dense_type: TensorType,
    /// Decides all weights, together with the tensors' names.
    pub seed: u64,
    /// `general.alignment`: where tensors may start. A power of two from 32.
    pub alignment: u32,
    /// Start a new file before tensor data would exceed this many bytes.
    pub split_bytes: Option<u64>,
    /// With `split_bytes`: keep the first file free of tensors.
    pub split_empty_first: bool,
}

impl Spec {
    /// The small default of an architecture: a few megabytes that decode in milliseconds. Bytes of
    /// an expert record are no multiple of 4096.
    #[must_use]
    pub fn new(arch: Arch) -> Self {
        arch.defaults()
    }

    /// Shapes as large models have them, with expert records of 1 to 3 MB in Q4_0: about 1 GB.
    /// [`Spec::scale_to`] brings it to a size.
    #[must_use]
    pub fn big(arch: Arch) -> Self {
        let small = Self::new(arch);
        let few_experts = small.n_expert <= 16;
        let dense = !arch.is_moe();
        let spec = Self {
            n_layer: if few_experts { 24 } else { 12 },
            head_dim: 2 * small.head_dim,
            vocab: 4096,
            // 736 and 1760 are multiples of 32 and make slices that end off a 4096 boundary.
            n_ff: if dense { 5632 } else { 2560 },
            n_ff_exp: if few_experts { 1760 } else { 736 },
            n_expert: if few_experts { small.n_expert } else { 64 },
            mla: Mla {
                q_lora: 3 * small.mla.q_lora,
                kv_lora: 2 * small.mla.kv_lora,
                rope: 2 * small.mla.rope,
                value: 2 * small.mla.value,
            },
            ..small
        };
        Self {
            n_layer: spec.n_layer.next_multiple_of(spec.moe_step),
            ..spec.width(if dense { 2048 } else { 1024 })
        }
    }

    /// Sets the width of the residual stream and scales the number of heads with it.
    #[must_use]
    pub fn width(self, n_embd: u32) -> Self {
        let all_heads = self.n_head == self.n_head_kv;
        // Only olmoe ties the two widths to each other.
        let n_head = match self.arch {
            Arch::Olmoe => n_embd / self.head_dim.max(1),
            Arch::GptOss | Arch::DeepSeek2 => (2 * n_embd / self.head_dim.max(1)).min(16),
            _ => (n_embd / self.head_dim.max(1)).next_multiple_of(self.n_head_kv.max(1)),
        };
        let n_head_kv = if all_heads { n_head } else { self.n_head_kv };
        Self { n_embd, n_head, n_head_kv, ..self }
    }

    /// Sets the number of experts and how many a token uses. Group routing is dropped where it
    /// does not fit these numbers.
    #[must_use]
    pub fn experts(self, n_expert: u32, n_used: u32) -> Self {
        let mut spec = Self { n_expert, n_used, ..self };
        if spec.check_groups().is_err() {
            (spec.n_group, spec.n_group_used) = (1, 1);
        }
        spec
    }

    /// Sets the types of the routed experts (of all matrices in a dense model), and rounds
    /// `n_ff_exp` up to what their blocks need.
    #[must_use]
    pub fn quant(self, quant: impl Into<Quant>) -> Self {
        let (ty, down_mix) = match quant.into() {
            Quant::Uniform(ty) => (ty, None),
            Quant::Q4_K_M => (TensorType::Q4_K, Some(TensorType::Q6_K)),
        };
        Self {
            gate_type: ty,
            up_type: ty,
            down_type: ty,
            down_mix,
            dense_type: if self.arch.is_moe() { self.dense_type } else { ty },
            n_ff_exp: self.n_ff_exp.next_multiple_of(ty.block_len() as u32),
            ..self
        }
    }

    /// Changes the number of layers, then of experts, so that the model has about `bytes` bytes
    /// and no more, as far as the other numbers allow.
    #[must_use]
    pub fn scale_to(self, bytes: u64) -> Self {
        let with_layers = |n_layer| Self { n_layer, ..self.clone() };
        let step = self.moe_step.max(1);
        let least = self.n_dense_lead.next_multiple_of(step) + SCALED_MOE_LAYERS_MIN * step;
        let mut spec = (least..=SCALED_LAYERS_MAX)
            .step_by(step as usize)
            .map(with_layers)
            .filter(|s| s.arch.check(s).is_ok())
            .take_while(|s| s.plan().bytes() <= bytes)
            .last()
            .unwrap_or_else(|| with_layers(least));
        if spec.arch.is_moe() {
            // Size is a straight line over the number of experts.
            let step = u64::from(self.n_group.max(1));
            let size = |n| Self { n_expert: n, ..spec.clone() }.plan().bytes();
            let (at_step, at_two) = (size(step as u32), size(2 * step as u32));
            let per_step = at_two - at_step;
            let steps = 1 + bytes.saturating_sub(at_step) / per_step.max(1);
            let fewest = self.n_used.max(2 * self.n_group).max(1);
            let fewest =
                (self.n_used * self.n_group).div_ceil(self.n_group_used.max(1)).max(fewest);
            let fewest = u64::from(fewest).next_multiple_of(step);
            let most = u64::from(MAX_EXPERTS) / step * step;
            spec.n_expert = (steps * step).clamp(fewest.min(most), most) as u32;
        }
        spec
    }

    /// Whether layer `il` has routed experts.
    #[must_use]
    pub fn is_moe_layer(&self, il: u32) -> bool {
        self.n_expert > 0 && il >= self.n_dense_lead && (il + 1).is_multiple_of(self.moe_step)
    }

    /// Type of the experts' down in layer `il`.
    #[must_use]
    pub fn down_type_of(&self, il: u32) -> TensorType {
        match self.down_mix {
            Some(ty) if more_bits(il, self.n_layer) => ty,
            _ => self.down_type,
        }
    }

    /// All tensors in file order.
    #[must_use]
    pub fn plan(&self) -> Plan {
        let mut b = Builder::new(self);
        b.embedding();
        for il in 0..self.n_layer {
            self.arch.layer(self, il, &mut b);
        }
        b.output();
        b.finish()
    }

    /// Writes the model to `path`, or to `NAME-00001-of-0000N.gguf` and so on beside it where
    /// the spec splits it. Files that exist are overwritten.
    ///
    /// # Errors
    ///
    /// [`Error::Spec`] where llama.cpp would not load this shape, [`Error::Io`] from the disk.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<Written> {
        self.validate()?;
        write::write(self, path.as_ref())
    }

    pub(crate) fn metadata(&self) -> ArchMetadata {
        let mut m = ArchMetadata::new(self.arch.gguf_name());
        self.arch.metadata(self, &mut m);
        m
    }

    /// Checks that llama.cpp would load this shape.
    ///
    /// # Errors
    ///
    /// [`Error::Spec`] with the first field that does not fit.
    pub fn validate(&self) -> Result<()> {
        check("n_layer", self.n_layer, (1..=MAX_LAYERS).contains(&self.n_layer), "1 to 512")?;
        // Limits far above any model, so that no product of two can overflow.
        for (field, n, most) in [
            ("n_embd", self.n_embd, 1 << 16),
            ("n_head", self.n_head, 1 << 10),
            ("n_head_kv", self.n_head_kv, 1 << 10),
            ("head_dim", self.head_dim, 1 << 12),
            ("n_ff", self.n_ff, 1 << 20),
            ("vocab", self.vocab, 1 << 24),
        ] {
            check(field, n, (1..=most).contains(&n), &format!("must be 1 to {most}"))?;
        }
        check("n_embd", self.n_embd, self.n_embd.is_multiple_of(32), "must be a multiple of 32")?;
        let whole = self.n_head.is_multiple_of(self.n_head_kv);
        check("n_head", self.n_head, whole, "must be a multiple of n_head_kv")?;
        check("head_dim", self.head_dim, self.head_dim.is_multiple_of(2), "must be even")?;
        check("ctx", self.ctx, self.ctx >= 32, "must be at least 32")?;
        // ggml asserts that mapped tensors lie on 32 bytes.
        let fits = self.alignment.is_power_of_two() && self.alignment >= 32;
        check("alignment", self.alignment, fits, "must be a power of two from 32")?;
        if self.split_bytes == Some(0) {
            check("split_bytes", 0, false, "must be positive")?;
        }
        if self.arch.is_moe() {
            self.validate_moe()?;
        } else {
            check("n_expert", self.n_expert, self.n_expert == 0, "this architecture has none")?;
            check("n_used", self.n_used, self.n_used == 0, "this architecture has none")?;
        }
        self.arch.check(self)
    }

    fn validate_moe(&self) -> Result<()> {
        let abilities = self.arch.abilities();
        let none = "this architecture has none";
        let in_range = (1..=MAX_EXPERTS).contains(&self.n_expert);
        check("n_expert", self.n_expert, in_range, "must be 1 to 1024")?;
        let in_range = (1..=self.n_expert).contains(&self.n_used);
        check("n_used", self.n_used, in_range, "must be 1 to n_expert")?;
        self.check_groups()?;

        let lead_fits = self.n_dense_lead == 0 || abilities.dense_lead;
        check("n_dense_lead", self.n_dense_lead, lead_fits, none)?;
        let lead_fits = self.n_dense_lead < self.n_layer;
        check("n_dense_lead", self.n_dense_lead, lead_fits, "must be less than n_layer")?;
        let step_fits = self.moe_step == 1 || abilities.moe_step;
        check("moe_step", self.moe_step, step_fits, "must be 1 in this architecture")?;
        let step_fits = (1..=self.n_layer).contains(&self.moe_step);
        check("moe_step", self.moe_step, step_fits, "must be 1 to n_layer")?;

        let (most, exactly) = abilities.shared;
        let shared_fits = self.n_shared <= most && (!exactly || self.n_shared == most);
        check("n_shared", self.n_shared, shared_fits, "does not fit this architecture")?;

        let in_range = (1..=1 << 20).contains(&self.n_ff_exp);
        check("n_ff_exp", self.n_ff_exp, in_range, "must be 1 to 1048576")?;
        let mut types = vec![("n_embd", self.n_embd, self.gate_type)];
        types.push(("n_embd", self.n_embd, self.up_type));
        types.push(("n_ff_exp", self.n_ff_exp, self.down_type));
        types.extend(self.down_mix.map(|ty| ("n_ff_exp", self.n_ff_exp, ty)));
        for (field, n, ty) in types {
            let whole = u64::from(n) % ty.block_len() == 0;
            check(field, n, whole, &format!("{ty} wants a multiple of {}", ty.block_len()))?;
        }
        let fused = u32::from(self.fused_gate_up);
        check("fused_gate_up", fused, fused == 0 || abilities.fused, none)?;
        let one_type = self.gate_type == self.up_type;
        check("fused_gate_up", fused, fused == 0 || one_type, "gate and up must have one type")
    }

    /// llama.cpp ranks groups by their two best experts, and gives experts of other groups a
    /// score of minus infinity: there must be enough within the groups that are used.
    fn check_groups(&self) -> Result<()> {
        let (n, used) = (self.n_group, self.n_group_used);
        check("n_group", n, n > 0, "must be at least 1")?;
        if n == 1 {
            return Ok(());
        }
        check("n_group", n, self.n_expert.is_multiple_of(n), "n_expert must be a multiple of it")?;
        let size = self.n_expert / n;
        check("n_group", n, size >= 2, "a group must have two experts at least")?;
        check("n_group_used", used, (1..n).contains(&used), "must be 1 to n_group - 1")?;
        check("n_group_used", used, used * size >= self.n_used, "too few experts for n_used")
    }
}

fn check(field: &'static str, value: u32, holds: bool, why: &str) -> Result<()> {
    if holds {
        return Ok(());
    }
    Err(Error::Spec { field, value: value.into(), why: why.into() })
}

/// `use_more_bits` of llama.cpp's quantiser (`src/llama-quant.cpp`).
fn more_bits(il: u32, n_layer: u32) -> bool {
    il < n_layer / 8 || il >= 7 * n_layer / 8 || (il - n_layer / 8) % 3 == 2
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(spec: Spec) -> &'static str {
        match spec.validate() {
            Err(Error::Spec { field, .. }) => field,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn defaults_are_valid_and_small() {
        for arch in Arch::ALL {
            let spec = Spec::new(arch);
            spec.validate().unwrap();
            let bytes = spec.plan().bytes();
            assert!((1 << 20..30 << 20).contains(&bytes), "{arch}: {bytes}");
        }
    }

    #[test]
    fn records_and_slices_of_the_defaults_are_no_multiples_of_a_page() {
        for arch in Arch::ALL.into_iter().filter(|a| a.is_moe()) {
            for spec in [Spec::new(arch), Spec::big(arch)] {
                let plan = spec.plan();
                let slices = plan.tensors.iter().filter(|t| t.name.contains("_exps.weight"));
                let mut sizes = slices.map(|t| t.bytes() / u64::from(plan.n_expert));
                assert!(sizes.any(|s| s % 4096 != 0), "{arch}: slices");
                assert!(plan.records().iter().all(|(_, s)| s % 4096 != 0), "{arch}: records");
            }
        }
    }

    #[test]
    fn big_models_are_valid_with_records_of_0_5_to_3_5_mb() {
        for arch in Arch::ALL {
            let spec = Spec::big(arch);
            spec.validate().unwrap();
            for (_, bytes) in spec.plan().records() {
                assert!((500_000..3_500_000).contains(&bytes), "{arch}: {bytes}");
            }
        }
    }

    #[test]
    fn every_quant_fits_every_default() {
        for arch in Arch::ALL {
            for ty in TensorType::ALL {
                Spec::new(arch).quant(ty).validate().unwrap();
            }
            Spec::new(arch).quant(Quant::Q4_K_M).validate().unwrap();
        }
    }

    #[test]
    fn q4_k_m_mixes_types_over_layers() {
        for arch in Arch::ALL.into_iter().filter(|a| a.is_moe()) {
            let spec = Spec::new(arch).quant(Quant::Q4_K_M);
            let types: Vec<_> = (0..spec.n_layer)
                .filter(|il| spec.is_moe_layer(*il))
                .map(|il| spec.down_type_of(il))
                .collect();
            assert!(
                types.contains(&TensorType::Q4_K) && types.contains(&TensorType::Q6_K),
                "{arch}"
            );
        }
    }

    #[test]
    fn scaling_meets_the_size() {
        for arch in Arch::ALL {
            for bytes in [300 << 20, 1 << 30, 2 << 30] {
                let spec = Spec::big(arch).scale_to(bytes);
                spec.validate().unwrap();
                let got = spec.plan().bytes();
                assert!(got <= bytes && got > bytes / 100 * 85, "{arch}: {got} of {bytes}");
            }
        }
    }

    #[test]
    fn odd_expert_counts() {
        for arch in Arch::ALL.into_iter().filter(|a| a.is_moe()) {
            Spec::new(arch).experts(7, 1).validate().unwrap();
        }
    }

    #[test]
    fn misfits_are_named() {
        let spec = Spec::new(Arch::Qwen3Moe);
        assert_eq!(refused(Spec { n_used: 65, ..spec.clone() }), "n_used");
        assert_eq!(refused(Spec { n_dense_lead: 1, ..spec.clone() }), "n_dense_lead");
        assert_eq!(refused(Spec { fused_gate_up: true, ..spec.clone() }), "fused_gate_up");
        assert_eq!(refused(Spec { n_ff_exp: 100, ..spec.clone() }), "n_ff_exp");
        assert_eq!(refused(Spec { alignment: 48, ..spec.clone() }), "alignment");
        assert_eq!(refused(Spec { alignment: 16, ..spec.clone() }), "alignment");
        assert_eq!(refused(Spec { n_group: 3, ..spec.clone() }), "n_group");
        assert_eq!(refused(Spec { n_head: 7, ..spec }), "n_head");
        assert_eq!(refused(Spec { n_layer: 27, ..Spec::new(Arch::DeepSeek2) }), "n_layer");
        assert_eq!(refused(Spec { n_shared: 0, ..Spec::new(Arch::Llama4) }), "n_shared");
        assert_eq!(refused(Spec { n_head_kv: 4, ..Spec::new(Arch::Olmoe) }), "n_head_kv");
    }
}

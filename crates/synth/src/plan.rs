//! What a model is made of: its tensors in file order, before a byte is written.

use crate::gguf::{Metadata, Value};
use crate::spec::Spec;
use crate::types::TensorType;

/// What a tensor is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Role {
    /// Needed for every token: attention, norms, router, shared experts, embeddings.
    Dense,
    /// One slice per routed expert (the last dimension) of this layer.
    Expert {
        /// The layer, counted from 0.
        layer: u32,
    },
}

/// One tensor of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    /// The name in the file.
    pub name: String,
    /// Dimensions as GGUF stores them: the row length first.
    pub dims: Vec<u64>,
    /// Storage type.
    pub ty: TensorType,
    /// What it is for.
    pub role: Role,
    pub(crate) mean: f32,
    pub(crate) std: f32,
}

impl Tensor {
    /// Bytes of its data, without padding.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.ty.bytes(self.dims.iter().product())
    }
}

/// The tensors of a model in file order.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Plan {
    /// All tensors.
    pub tensors: Vec<Tensor>,
    /// Routed experts per MoE layer.
    pub n_expert: u32,
}

impl Plan {
    /// Bytes of all tensors, without headers and padding.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.tensors.iter().map(Tensor::bytes).sum()
    }

    /// Bytes of all routed experts.
    #[must_use]
    pub fn expert_bytes(&self) -> u64 {
        self.tensors.iter().filter(|t| t.role != Role::Dense).map(Tensor::bytes).sum()
    }

    /// The MoE layers in order, each with the bytes of one of its expert records.
    #[must_use]
    pub fn records(&self) -> Vec<(u32, u64)> {
        let mut records: Vec<(u32, u64)> = Vec::new();
        for tensor in &self.tensors {
            let Role::Expert { layer } = tensor.role else { continue };
            let bytes = tensor.bytes() / u64::from(self.n_expert);
            match records.last_mut() {
                Some((last, sum)) if *last == layer => *sum += bytes,
                _ => records.push((layer, bytes)),
            }
        }
        records
    }
}

/// Collects tensors and metadata; the architectures drive it.
pub(crate) struct Builder<'a> {
    spec: &'a Spec,
    tensors: Vec<Tensor>,
}

impl<'a> Builder<'a> {
    pub(crate) fn new(spec: &'a Spec) -> Self {
        Self { spec, tensors: Vec::new() }
    }

    pub(crate) fn finish(self) -> Plan {
        Plan { tensors: self.tensors, n_expert: self.spec.n_expert }
    }

    fn push(
        &mut self,
        name: String,
        dims: &[u32],
        ty: TensorType,
        role: Role,
        (mean, std): (f32, f32),
    ) {
        let dims = dims.iter().map(|d| u64::from(*d)).collect();
        self.tensors.push(Tensor { name, dims, ty, role, mean, std });
    }

    /// A dense matrix, or a stack of them, whose outputs have the spread of its inputs.
    pub(crate) fn matrix(&mut self, name: impl Into<String>, dims: &[u32]) {
        let ty = fitting(self.spec.dense_type, dims[0]);
        self.push(name.into(), dims, ty, Role::Dense, (0.0, unit_gain(dims[0])));
    }

    /// The token embedding: rows of spread 1.
    pub(crate) fn embedding(&mut self) {
        let dims = [self.spec.n_embd, self.spec.vocab];
        let ty = fitting(self.spec.dense_type, dims[0]);
        self.push("token_embd.weight".into(), &dims, ty, Role::Dense, (0.0, 1.0));
    }

    /// Final norm and output matrix; logits get a spread of about 2.
    pub(crate) fn output(&mut self) {
        let spec = self.spec;
        self.norm("output_norm.weight", spec.n_embd);
        let ty = fitting(spec.dense_type, spec.n_embd);
        let std = 2.0 * unit_gain(spec.n_embd);
        let dims = [spec.n_embd, spec.vocab];
        self.push("output.weight".into(), &dims, ty, Role::Dense, (0.0, std));
    }

    /// Norm weights around 1.
    pub(crate) fn norm(&mut self, name: impl Into<String>, n: u32) {
        self.push(name.into(), &[n], TensorType::F32, Role::Dense, (1.0, 0.1));
    }

    /// A small F32 vector around 0: biases, sinks.
    pub(crate) fn bias(&mut self, name: impl Into<String>, n: u32) {
        self.push(name.into(), &[n], TensorType::F32, Role::Dense, (0.0, 0.2));
    }

    /// The router: F32, with logits of spread 2 so that the top experts stand out.
    pub(crate) fn router(&mut self, layer: u32) {
        let dims = [self.spec.n_embd, self.spec.n_expert];
        let name = format!("blk.{layer}.ffn_gate_inp.weight");
        let std = 2.0 * unit_gain(dims[0]);
        self.push(name, &dims, TensorType::F32, Role::Dense, (0.0, std));
    }

    /// Gate, up and down of all routed experts of a layer, fused where the spec says so.
    pub(crate) fn experts(&mut self, layer: u32) {
        let s = self.spec;
        if s.fused_gate_up {
            self.expert(layer, "gate_up", s.n_embd, 2 * s.n_ff_exp, s.gate_type);
        } else {
            self.expert(layer, "gate", s.n_embd, s.n_ff_exp, s.gate_type);
            self.expert(layer, "up", s.n_embd, s.n_ff_exp, s.up_type);
        }
        self.expert(layer, "down", s.n_ff_exp, s.n_embd, s.down_type_of(layer));
    }

    fn expert(&mut self, layer: u32, which: &str, n_in: u32, n_out: u32, ty: TensorType) {
        let name = format!("blk.{layer}.ffn_{which}_exps.weight");
        let dims = [n_in, n_out, self.spec.n_expert];
        self.push(name, &dims, ty, Role::Expert { layer }, (0.0, unit_gain(n_in)));
    }

    /// F32 biases of all routed experts of a layer.
    pub(crate) fn expert_biases(&mut self, layer: u32) {
        let s = self.spec;
        for (which, n_out) in [("gate", s.n_ff_exp), ("up", s.n_ff_exp), ("down", s.n_embd)] {
            let name = format!("blk.{layer}.ffn_{which}_exps.bias");
            let dims = [n_out, s.n_expert];
            self.push(name, &dims, TensorType::F32, Role::Expert { layer }, (0.0, 0.2));
        }
    }

    /// A dense SwiGLU block: `ffn_gate`, `ffn_up`, `ffn_down` plus `suffix`.
    pub(crate) fn ffn(&mut self, layer: u32, suffix: &str, n_ff: u32) {
        let n_embd = self.spec.n_embd;
        self.matrix(format!("blk.{layer}.ffn_gate{suffix}.weight"), &[n_embd, n_ff]);
        self.matrix(format!("blk.{layer}.ffn_up{suffix}.weight"), &[n_embd, n_ff]);
        self.matrix(format!("blk.{layer}.ffn_down{suffix}.weight"), &[n_ff, n_embd]);
    }

    /// Separate Q, K, V and output matrices of grouped-query attention.
    pub(crate) fn attention(&mut self, layer: u32) {
        let s = self.spec;
        let (q, kv) = (s.n_head * s.head_dim, s.n_head_kv * s.head_dim);
        self.matrix(format!("blk.{layer}.attn_q.weight"), &[s.n_embd, q]);
        self.matrix(format!("blk.{layer}.attn_k.weight"), &[s.n_embd, kv]);
        self.matrix(format!("blk.{layer}.attn_v.weight"), &[s.n_embd, kv]);
        self.matrix(format!("blk.{layer}.attn_output.weight"), &[q, s.n_embd]);
    }
}

/// 1 / sqrt(n): the spread of weights that hands a vector of `n` values on at its own spread.
fn unit_gain(n_in: u32) -> f32 {
    1.0 / (n_in as f32).sqrt()
}

/// `wanted` where rows of `n_in` values can have it, else Q8_0 or F16, as quantisers fall back.
fn fitting(wanted: TensorType, n_in: u32) -> TensorType {
    [wanted, TensorType::Q8_0]
        .into_iter()
        .find(|t| u64::from(n_in) % t.block_len() == 0)
        .unwrap_or(TensorType::F16)
}

/// Metadata under the architecture's prefix.
pub(crate) struct ArchMetadata {
    prefix: &'static str,
    pub(crate) all: Metadata,
}

impl ArchMetadata {
    pub(crate) fn new(prefix: &'static str) -> Self {
        Self { prefix, all: Metadata::default() }
    }

    pub(crate) fn u32(&mut self, key: &str, value: u32) {
        self.put(key, Value::U32(value));
    }

    pub(crate) fn f32(&mut self, key: &str, value: f32) {
        self.put(key, Value::F32(value));
    }

    pub(crate) fn bool(&mut self, key: &str, value: bool) {
        self.put(key, Value::Bool(value));
    }

    pub(crate) fn str(&mut self, key: &str, value: &str) {
        self.put(key, Value::Str(value.into()));
    }

    fn put(&mut self, key: &str, value: Value) {
        self.all.push(format!("{}.{key}", self.prefix), value);
    }
}

//! Mixture-of-experts layers: which byte ranges make up one expert's record.
//!
//! A layer keeps one matrix of all its experts in one tensor, experts outermost (`ne = [in, out,
//! experts]`), so that an expert's share is one contiguous range. A record is those ranges of one
//! expert in one layer: gate, up, down, or a fused gate-and-up. Tensors are found by the names that
//! llama.cpp gives them (`src/llama-arch.cpp`):
//! `blk.N.ffn_{gate,up,gate_up,down}_{exps,chexps}.{weight,bias,scale,input_scale}`. Shared experts
//! (`_shexp`) run for every token and belong to the dense tensors.

use std::collections::BTreeMap;
use std::fmt;

use crate::Result;
use crate::error::{Error, ErrorKind};
use crate::model::Model;
use crate::tensor::{Extent, Tensor};
use crate::tensor_type::TensorType;

/// Which matrix of an expert. The order is that of the parts in a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PartKind {
    /// `ffn_gate_exps`.
    Gate,
    /// `ffn_up_exps`.
    Up,
    /// `ffn_gate_up_exps`: gate and up in one matrix.
    GateUp,
    /// `ffn_down_exps`.
    Down,
}

impl PartKind {
    /// As in tensor names: `gate`, `up`, `gate_up`, `down`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gate => "gate",
            Self::Up => "up",
            Self::GateUp => "gate_up",
            Self::Down => "down",
        }
    }
}

impl fmt::Display for PartKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Which of the two sets of experts that a layer can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// `_exps`: the experts that the router picks.
    Routed,
    /// `_chexps`: chunk experts, each belonging to a group of routed experts and used when one of
    /// them is.
    Chunk,
}

/// One matrix of all experts of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Which matrix.
    pub kind: PartKind,
    /// Index into [`Model::tensors`].
    pub tensor: usize,
    /// Index into [`Model::files`].
    pub file: usize,
    /// Where expert 0 begins, from the start of the file.
    pub offset: u64,
    /// Bytes from the start of one expert to the next's.
    pub stride: u64,
    /// Bytes of one expert.
    pub bytes_per_expert: u64,
}

/// What a small tensor of experts holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SmallRole {
    /// `.bias`, `[out, experts]`, added to the product.
    Bias,
    /// `.scale`, `[experts]`, multiplied with the product.
    Scale,
    /// `.input_scale`, `[experts]`, multiplied with the input.
    InputScale,
}

/// A bias or scale of all experts of a layer. They are a few KiB, so they count as dense and stay
/// resident.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SmallPart {
    /// The matrix it goes with.
    pub kind: PartKind,
    /// What it holds.
    pub role: SmallRole,
    /// Index into [`Model::tensors`].
    pub tensor: usize,
    /// The whole tensor's bytes; each expert's follow those of the one before.
    pub extent: Extent,
    /// Bytes of one expert.
    pub bytes_per_expert: u64,
}

/// The experts of one layer. A layer with chunk experts too has two of these.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MoeLayer {
    /// The layer's number in the model: the N of `blk.N`.
    pub layer: u32,
    /// Which set of experts.
    pub family: Family,
    /// How many experts there are, at least 1.
    pub experts: u32,
    /// How many of them a token uses (k), 1 to `experts`. For chunk experts the most that it can
    /// use.
    pub used: u32,
    /// True for a layer that only predicts further tokens (the last
    /// `<architecture>.nextn_predict_layers`): it is not part of an ordinary token's way and not
    /// counted in [`Experts::token_cycle_bytes`].
    pub next_token: bool,
    /// The matrices that make up a record, in the order of [`PartKind`]; never empty.
    pub parts: Vec<Part>,
    /// Biases and scales, by kind and role.
    pub small: Vec<SmallPart>,
    /// Bytes of one record: the sum of its parts.
    pub record_bytes: u64,
    /// Index into [`Experts::size_classes`].
    pub class: usize,
}

impl MoeLayer {
    /// Whether its experts are those that a router picks for every token: what streams.
    pub fn is_streamed(&self) -> bool {
        self.family == Family::Routed && !self.next_token
    }
}

/// Layers whose records are interchangeable: the same parts of the same types and shapes, apart
/// from the number of experts. One pool of slots can serve them all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SizeClass {
    /// Bytes of one record.
    pub record_bytes: u64,
    /// Indices into [`Experts::layers`], ascending.
    pub layers: Vec<usize>,
}

/// All experts of a model. Empty for a dense model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Experts {
    layers: Vec<MoeLayer>,
    classes: Vec<SizeClass>,
    dense_bytes: u64,
}

/// What makes two layers of one class.
type ClassKey = Vec<(PartKind, TensorType, u64, u64)>;

#[derive(Default)]
struct Group {
    parts: Vec<Part>,
    small: Vec<SmallPart>,
}

impl Experts {
    /// Finds the experts of `model`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::ExpertShape`], [`ErrorKind::ExpertCount`] and
    /// [`ErrorKind::ExpertWeightsMissing`] for expert tensors that do not fit together;
    /// [`ErrorKind::MissingKey`] or [`ErrorKind::OutOfRange`] if `<architecture>.expert_used_count`
    /// is missing or not in `1..=experts` for a layer with experts.
    pub fn group(model: &Model) -> Result<Self> {
        let mut groups: BTreeMap<(u32, Family), Group> = BTreeMap::new();
        for (index, tensor) in model.tensors().iter().enumerate() {
            let Some(name) = ExpertName::parse(&tensor.name) else {
                continue;
            };
            let group = groups.entry((name.layer, name.family)).or_default();
            let kind = name.kind;
            let in_tensor = |kind: ErrorKind| in_tensor(model, tensor, kind.into());
            let bytes_per_expert = bytes_per_expert(tensor, name.role).map_err(in_tensor)?;
            match name.role {
                None => group.parts.push(Part {
                    kind,
                    tensor: index,
                    file: tensor.file,
                    offset: tensor.offset,
                    stride: tensor.stride.unwrap_or(bytes_per_expert),
                    bytes_per_expert,
                }),
                Some(role) => group.small.push(SmallPart {
                    kind,
                    role,
                    tensor: index,
                    // Only weights lie apart; see `Model::relocated`.
                    extent: Extent { file: tensor.file, offset: tensor.offset, len: tensor.len },
                    bytes_per_expert,
                }),
            }
        }

        let mut layers = Vec::with_capacity(groups.len());
        let mut classes: Vec<SizeClass> = Vec::new();
        let mut class_of: BTreeMap<ClassKey, usize> = BTreeMap::new();
        let mut dense_bytes = model.tensor_bytes();
        for ((layer, family), group) in groups {
            let mut layer = moe_layer(model, layer, family, group)?;
            dense_bytes -= u64::from(layer.experts) * layer.record_bytes;
            layer.class = *class_of.entry(class_key(model, &layer)).or_insert_with(|| {
                classes.push(SizeClass { record_bytes: layer.record_bytes, layers: Vec::new() });
                classes.len() - 1
            });
            classes[layer.class].layers.push(layers.len());
            layers.push(layer);
        }
        Ok(Self { layers, classes, dense_bytes })
    }

    /// The layers with experts, by number, routed before chunk experts.
    pub fn layers(&self) -> &[MoeLayer] {
        &self.layers
    }

    /// The size classes, in the order of their first layers.
    pub fn size_classes(&self) -> &[SizeClass] {
        &self.classes
    }

    /// True for a model without experts.
    pub fn is_empty(&self) -> bool {
        self.layers.is_empty()
    }

    /// The byte ranges of one record, in the order of [`MoeLayer::parts`]; `layer` is an index into
    /// [`layers`](Self::layers), not the layer's number. `None` if there is no such layer or
    /// expert.
    pub fn record(
        &self,
        layer: usize,
        expert: u32,
    ) -> Option<impl ExactSizeIterator<Item = Extent> + '_> {
        let layer = self.layers.get(layer).filter(|layer| expert < layer.experts)?;
        Some(layer.parts.iter().map(move |part| part.expert(expert)))
    }

    /// Bytes of one record of the layer at this index into [`layers`](Self::layers).
    pub fn record_bytes(&self, layer: usize) -> Option<u64> {
        self.layers.get(layer).map(|layer| layer.record_bytes)
    }

    /// The token cycle T: bytes of all records that one token uses, the sum over layers of k times
    /// the record. Layers that only predict further tokens are left out.
    pub fn token_cycle_bytes(&self) -> u64 {
        let layers = self.layers.iter().filter(|layer| !layer.next_token);
        layers.map(|layer| u64::from(layer.used) * layer.record_bytes).sum()
    }

    /// Bytes of all records of the model.
    pub fn expert_bytes(&self) -> u64 {
        self.layers.iter().map(|layer| u64::from(layer.experts) * layer.record_bytes).sum()
    }

    /// Bytes of all other tensors, the biases and scales of experts among them, without padding.
    pub fn dense_bytes(&self) -> u64 {
        self.dense_bytes
    }
}

impl Part {
    /// The bytes of expert `expert`, which must be below [`MoeLayer::experts`].
    pub fn expert(&self, expert: u32) -> Extent {
        let offset = self.offset + u64::from(expert) * self.stride;
        Extent { file: self.file, offset, len: self.bytes_per_expert }
    }
}

/// The parts of an expert tensor's name.
struct ExpertName {
    layer: u32,
    kind: PartKind,
    family: Family,
    /// `None` for the weight itself.
    role: Option<SmallRole>,
}

impl ExpertName {
    fn parse(name: &str) -> Option<Self> {
        let (number, rest) = name.strip_prefix("blk.")?.split_once(".ffn_")?;
        // "blk.07" is no layer of llama.cpp, and would make two tensors one part of one layer.
        let canonical = number == "0" || (!number.starts_with(['0', '+']) && !number.is_empty());
        let layer = number.parse().ok().filter(|_| canonical)?;
        let (stem, role) = rest.split_once('.')?;
        let role = match role {
            "weight" => None,
            "bias" => Some(SmallRole::Bias),
            "scale" => Some(SmallRole::Scale),
            "input_scale" => Some(SmallRole::InputScale),
            _ => return None,
        };
        let (kind, family) = match stem.strip_suffix("_exps") {
            Some(kind) => (kind, Family::Routed),
            None => (stem.strip_suffix("_chexps")?, Family::Chunk),
        };
        let kind = match kind {
            "gate" => PartKind::Gate,
            "up" => PartKind::Up,
            "gate_up" => PartKind::GateUp,
            "down" => PartKind::Down,
            _ => return None,
        };
        Some(Self { layer, kind, family, role })
    }
}

/// Bytes of one expert in a tensor that holds all of a layer's, experts in the last dimension.
fn bytes_per_expert(
    tensor: &Tensor,
    role: Option<SmallRole>,
) -> std::result::Result<u64, ErrorKind> {
    let (dims, expected) = match role {
        None => (3, "[in, out, experts]"),
        Some(SmallRole::Bias) => (2, "[out, experts]"),
        Some(SmallRole::Scale | SmallRole::InputScale) => (1, "[experts]"),
    };
    let experts = tensor.dims.last().copied().filter(|_| tensor.dims.len() == dims);
    // A quantised tensor of one dimension is cut inside a block.
    match experts.filter(|experts| {
        tensor.len.is_multiple_of(*experts) && (dims > 1 || !tensor.ty.is_quantized())
    }) {
        Some(experts) => Ok(tensor.len / experts),
        None => Err(ErrorKind::ExpertShape { dims: tensor.dims.to_vec(), expected }),
    }
}

fn moe_layer(model: &Model, layer: u32, family: Family, group: Group) -> Result<MoeLayer> {
    let Group { mut parts, mut small } = group;
    parts.sort_by_key(|part| part.kind);
    small.sort_by_key(|small| (small.kind, small.role));
    let fail = |tensor: usize, kind: ErrorKind| {
        Err(in_tensor(model, &model.tensors()[tensor], kind.into()))
    };

    let Some(first) = parts.first() else {
        // A group has at least one tensor, and this one has no weights.
        return fail(small[0].tensor, ErrorKind::ExpertWeightsMissing);
    };
    let count_of = |tensor: usize| model.tensors()[tensor].dims.last().copied().unwrap_or(1);
    let expected = count_of(first.tensor);
    let tensors =
        parts.iter().map(|part| part.tensor).chain(small.iter().map(|small| small.tensor));
    for tensor in tensors {
        let found = count_of(tensor);
        if found != expected {
            return fail(tensor, ErrorKind::ExpertCount { expected, found });
        }
    }
    if let Some(stray) = small.iter().find(|small| parts.iter().all(|part| part.kind != small.kind))
    {
        return fail(stray.tensor, ErrorKind::ExpertWeightsMissing);
    }
    let Ok(experts) = u32::try_from(expected) else {
        let (what, limit) = ("the number of experts", u32::MAX.into());
        return fail(first.tensor, ErrorKind::Limit { what, value: expected, limit });
    };
    // Parts are tensors of the model, whose sizes together fit.
    let record_bytes = parts.iter().map(|part| part.bytes_per_expert).sum();
    let used = used(model, layer, family, experts)?;
    let next_token = is_next_token_layer(model, layer)?;
    Ok(MoeLayer { layer, family, experts, used, next_token, parts, small, record_bytes, class: 0 })
}

/// k for a layer, checked against its number of experts.
fn used(model: &Model, layer: u32, family: Family, experts: u32) -> Result<u32> {
    let fail = |kind: ErrorKind| {
        let error = Error::from(kind).in_key(&model.arch_key("expert_used_count"));
        Err(model.in_first_file(error))
    };
    let Some(used) = model.expert_used_count(layer)? else {
        return fail(ErrorKind::MissingKey);
    };
    // Chunk experts are fewer: every routed expert uses the one of its group.
    let most = if family == Family::Chunk { used } else { experts };
    if used == 0 || used > most {
        let allowed = format!("1..={experts}, the experts of layer {layer}");
        return fail(ErrorKind::OutOfRange { value: used.into(), allowed });
    }
    Ok(used.min(experts))
}

fn is_next_token_layer(model: &Model, layer: u32) -> Result<bool> {
    let (Some(blocks), Some(next_token)) =
        (model.block_count()?, model.arch_u32("nextn_predict_layers")?)
    else {
        return Ok(false);
    };
    Ok(next_token > 0 && layer >= blocks.saturating_sub(next_token))
}

fn class_key(model: &Model, layer: &MoeLayer) -> ClassKey {
    let key = |part: &Part| {
        let tensor = &model.tensors()[part.tensor];
        (part.kind, tensor.ty, tensor.dims.ne(0), tensor.dims.ne(1))
    };
    layer.parts.iter().map(key).collect()
}

fn in_tensor(model: &Model, tensor: &Tensor, error: Error) -> Error {
    error.in_tensor(&tensor.name).in_file(&model.files()[tensor.file].path)
}

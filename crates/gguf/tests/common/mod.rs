//! Small files for the tests, well-formed and not.

#![allow(dead_code, reason = "each test binary uses its own part")]

use tierstream_gguf::write::{TensorSpec, encode};
use tierstream_gguf::{Metadata, TensorType};

/// Metadata of a small model with experts.
pub(crate) fn metadata() -> Metadata {
    let mut metadata = Metadata::new();
    metadata.insert("general.architecture", "toy");
    metadata.insert("toy.block_count", 2u32);
    metadata.insert("toy.expert_count", 4u32);
    metadata.insert("toy.expert_used_count", 2u32);
    metadata
}

/// One dense tensor, and two layers of four experts with gate, up and down.
pub(crate) fn tensors() -> Vec<TensorSpec> {
    let mut tensors = vec![TensorSpec::new("token_embd.weight", TensorType::F32, [8, 3])];
    for layer in 0..2 {
        for (kind, dims) in [("down", [32, 8, 4]), ("gate", [64, 2, 4]), ("up", [64, 2, 4])] {
            tensors.push(TensorSpec::new(
                format!("blk.{layer}.ffn_{kind}_exps.weight"),
                TensorType::Q4_0,
                dims,
            ));
        }
    }
    tensors
}

/// A whole file: the header, and zeros for data.
pub(crate) fn file(metadata: &Metadata, tensors: &[TensorSpec]) -> Vec<u8> {
    let (mut bytes, header) =
        encode(metadata, tensors).expect("the tests' own files are well-formed");
    bytes.resize(header.file_len() as usize, 0);
    bytes
}

/// A header put together field by field, to break any rule.
#[derive(Clone, Default)]
pub(crate) struct Raw {
    pub(crate) pairs: Vec<Vec<u8>>,
    pub(crate) tensors: Vec<Vec<u8>>,
    pub(crate) data_bytes: usize,
}

pub(crate) fn string(text: impl AsRef<[u8]>) -> Vec<u8> {
    let text = text.as_ref();
    [&(text.len() as u64).to_le_bytes(), text].concat()
}

impl Raw {
    /// A pair of this key, type number and encoded value.
    pub(crate) fn pair(mut self, key: impl AsRef<[u8]>, ty: u32, value: impl AsRef<[u8]>) -> Self {
        self.pairs.push([&string(key)[..], &ty.to_le_bytes(), value.as_ref()].concat());
        self
    }

    pub(crate) fn tensor(
        mut self,
        name: impl AsRef<[u8]>,
        dims: &[u64],
        ty: u32,
        offset: u64,
    ) -> Self {
        let dim_bytes: Vec<u8> = dims.iter().flat_map(|dim| dim.to_le_bytes()).collect();
        let count = (dims.len() as u32).to_le_bytes();
        self.tensors.push(
            [&string(name)[..], &count, &dim_bytes, &ty.to_le_bytes(), &offset.to_le_bytes()]
                .concat(),
        );
        self
    }

    pub(crate) fn data(mut self, bytes: usize) -> Self {
        self.data_bytes = bytes;
        self
    }

    /// The file, its data aligned to 32 bytes.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = counts(3, self.tensors.len() as u64, self.pairs.len() as u64);
        bytes.extend(self.pairs.concat());
        bytes.extend(self.tensors.concat());
        bytes.resize(bytes.len().next_multiple_of(32) + self.data_bytes, 0);
        bytes
    }
}

/// The fixed start of a file.
pub(crate) fn counts(version: u32, tensors: u64, pairs: u64) -> Vec<u8> {
    [&b"GGUF"[..], &version.to_le_bytes(), &tensors.to_le_bytes(), &pairs.to_le_bytes()].concat()
}

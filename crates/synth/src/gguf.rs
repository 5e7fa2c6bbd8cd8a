//! Writes GGUF version 3 headers (specification: `docs/gguf.md` of the ggml repository).

use crate::plan::Tensor;

const MAGIC: &[u8; 4] = b"GGUF";
const VERSION: u32 = 3;

/// The alignment that a file without `general.alignment` has.
pub(crate) const DEFAULT_ALIGNMENT: u32 = 32;

/// A metadata value, of the kinds that the generator needs.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    U16(u16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    Str(String),
}

/// Metadata in the order in which it is written.
#[derive(Debug, Clone, Default)]
pub(crate) struct Metadata(Vec<(String, Value)>);

impl Metadata {
    /// Adds one pair; a key is written once, the caller sees to that.
    pub(crate) fn push(&mut self, key: impl Into<String>, value: Value) {
        self.0.push((key.into(), value));
    }

    /// Adds all pairs of `other`.
    pub(crate) fn extend(&mut self, other: Self) {
        self.0.extend(other.0);
    }
}

/// `n` rounded up to a multiple of `alignment`.
pub(crate) fn align_up(n: u64, alignment: u32) -> u64 {
    n.next_multiple_of(u64::from(alignment))
}

/// The header of one file: everything before its data section, padded to `alignment`.
///
/// The data section must hold `tensors` in this order, each padded to `alignment`.
pub(crate) fn header(metadata: &Metadata, tensors: &[Tensor], alignment: u32) -> Vec<u8> {
    let mut out = Vec::with_capacity(4096 + 96 * tensors.len());
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&(tensors.len() as u64).to_le_bytes());
    out.extend_from_slice(&(metadata.0.len() as u64).to_le_bytes());
    for (key, value) in &metadata.0 {
        put_str(&mut out, key);
        put_value(&mut out, value);
    }
    let mut offset = 0_u64;
    for tensor in tensors {
        put_str(&mut out, &tensor.name);
        out.extend_from_slice(&(tensor.dims.len() as u32).to_le_bytes());
        for dim in &tensor.dims {
            out.extend_from_slice(&dim.to_le_bytes());
        }
        out.extend_from_slice(&tensor.ty.id().to_le_bytes());
        out.extend_from_slice(&offset.to_le_bytes());
        offset += align_up(tensor.bytes(), alignment);
    }
    out.resize(align_up(out.len() as u64, alignment) as usize, 0);
    out
}

fn put_str(out: &mut Vec<u8>, s: &str) {
    out.extend_from_slice(&(s.len() as u64).to_le_bytes());
    out.extend_from_slice(s.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    // `gguf_metadata_value_type`.
    let id: u32 = match value {
        Value::U16(_) => 2,
        Value::U32(_) => 4,
        Value::I32(_) => 5,
        Value::F32(_) => 6,
        Value::Bool(_) => 7,
        Value::Str(_) => 8,
    };
    out.extend_from_slice(&id.to_le_bytes());
    match value {
        Value::U16(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::U32(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::I32(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::F32(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::Bool(v) => out.push(u8::from(*v)),
        Value::Str(v) => put_str(out, v),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_bytes() {
        let mut metadata = Metadata::default();
        metadata.push("a", Value::U32(7));
        let bytes = header(&metadata, &[], 32);
        let mut expected = b"GGUF\x03\0\0\0".to_vec();
        expected.extend_from_slice(&[0; 8]);
        expected.extend_from_slice(&[1, 0, 0, 0, 0, 0, 0, 0]);
        expected.extend_from_slice(&[1, 0, 0, 0, 0, 0, 0, 0, b'a']);
        expected.extend_from_slice(&[4, 0, 0, 0, 7, 0, 0, 0]);
        expected.resize(64, 0);
        assert_eq!(bytes, expected);
    }
}

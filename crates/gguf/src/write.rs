//! Makes GGUF headers: for packed copies of models and for the files that tests need.

use crate::Result;
use crate::error::{Error, ErrorKind};
use crate::header::{DEFAULT_ALIGNMENT, Header, KEY_ALIGNMENT, MAGIC};
use crate::limits;
use crate::tensor::Dims;
use crate::tensor_type::TensorType;
use crate::value::{Array, Metadata, Value};

/// The version that is written; the current one (GGUF specification).
const VERSION: u32 = 3;

/// A tensor to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// At most 63 bytes, unique.
    pub name: String,
    /// How its elements are stored.
    pub ty: TensorType,
    /// Innermost dimension first, one to four, none of them zero.
    pub dims: Vec<u64>,
}

impl TensorSpec {
    /// A tensor of this name, type and shape.
    pub fn new(name: impl Into<String>, ty: TensorType, dims: impl Into<Vec<u64>>) -> Self {
        Self { name: name.into(), ty, dims: dims.into() }
    }
}

/// Encodes the header of a file with this metadata and these tensors, whose data follow each other
/// in the given order, each padded to `general.alignment` (32 bytes where the metadata has no such
/// key).
///
/// Returns the header's bytes, up to and with the padding before the data, and the header as
/// [`Header::read`] will read it back once the file is complete: `tensors()` says where each
/// tensor's data must go, `file_len()` how long the file must be. Bytes between tensors are zero.
///
/// # Errors
///
/// Whatever [`Header::read`] would refuse: what this function writes, the reader takes.
pub fn encode(metadata: &Metadata, tensors: &[TensorSpec]) -> Result<(Vec<u8>, Header)> {
    let alignment = u64::from(metadata.u32(KEY_ALIGNMENT)?.unwrap_or(DEFAULT_ALIGNMENT));
    // What is no power of two or beyond the limit is refused below, by the reader.
    let alignment = alignment.clamp(1, limits::MAX_ALIGNMENT);
    let mut bytes = Vec::new();
    bytes.extend(MAGIC);
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend((tensors.len() as u64).to_le_bytes());
    bytes.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata.iter() {
        put_string(&mut bytes, key.as_bytes());
        put_value(&mut bytes, value);
    }
    let mut data_bytes: u64 = 0;
    for tensor in tensors {
        let in_tensor = |error: Error| error.in_tensor(&tensor.name);
        put_string(&mut bytes, tensor.name.as_bytes());
        let dims = Dims::new(&tensor.dims).map_err(in_tensor)?;
        bytes.extend((dims.len() as u32).to_le_bytes());
        dims.iter().for_each(|dim| bytes.extend(dim.to_le_bytes()));
        bytes.extend(tensor.ty.id().to_le_bytes());
        bytes.extend(data_bytes.to_le_bytes());
        data_bytes = dims
            .bytes(tensor.ty)
            .map_err(in_tensor)?
            .checked_next_multiple_of(alignment)
            .and_then(|padded| data_bytes.checked_add(padded))
            .ok_or_else(|| {
                in_tensor(ErrorKind::ShapeOverflow { dims: tensor.dims.clone() }.into())
            })?;
    }
    bytes.resize(bytes.len().next_multiple_of(alignment as usize), 0);
    let file_len = (bytes.len() as u64).saturating_add(data_bytes);
    let header = Header::parse(bytes.as_slice(), file_len)?;
    Ok((bytes, header))
}

fn put_string(out: &mut Vec<u8>, string: &[u8]) {
    out.extend((string.len() as u64).to_le_bytes());
    out.extend(string);
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    out.extend(value.value_type().id().to_le_bytes());
    match value {
        Value::U8(value) => out.push(*value),
        Value::I8(value) => out.extend(value.to_le_bytes()),
        Value::U16(value) => out.extend(value.to_le_bytes()),
        Value::I16(value) => out.extend(value.to_le_bytes()),
        Value::U32(value) => out.extend(value.to_le_bytes()),
        Value::I32(value) => out.extend(value.to_le_bytes()),
        Value::F32(value) => out.extend(value.to_le_bytes()),
        Value::Bool(value) => out.push(u8::from(*value)),
        Value::Str(value) => put_string(out, value.as_bytes()),
        Value::Array(array) => put_array(out, array),
        Value::U64(value) => out.extend(value.to_le_bytes()),
        Value::I64(value) => out.extend(value.to_le_bytes()),
        Value::F64(value) => out.extend(value.to_le_bytes()),
    }
}

fn put_array(out: &mut Vec<u8>, array: &Array) {
    out.extend(array.element_type().id().to_le_bytes());
    out.extend((array.len() as u64).to_le_bytes());
    match array {
        Array::U8(items) => out.extend(items),
        Array::I8(items) => out.extend(items.iter().flat_map(|item| item.to_le_bytes())),
        Array::U16(items) => out.extend(items.iter().flat_map(|item| item.to_le_bytes())),
        Array::I16(items) => out.extend(items.iter().flat_map(|item| item.to_le_bytes())),
        Array::U32(items) => out.extend(items.iter().flat_map(|item| item.to_le_bytes())),
        Array::I32(items) => out.extend(items.iter().flat_map(|item| item.to_le_bytes())),
        Array::F32(items) => out.extend(items.iter().flat_map(|item| item.to_le_bytes())),
        Array::Bool(items) => out.extend(items.iter().map(|item| u8::from(*item))),
        Array::Str(items) => items.iter().for_each(|item| put_string(out, item)),
        Array::Nested(items) => items.iter().for_each(|item| put_array(out, item)),
        Array::U64(items) => out.extend(items.iter().flat_map(|item| item.to_le_bytes())),
        Array::I64(items) => out.extend(items.iter().flat_map(|item| item.to_le_bytes())),
        Array::F64(items) => out.extend(items.iter().flat_map(|item| item.to_le_bytes())),
    }
}

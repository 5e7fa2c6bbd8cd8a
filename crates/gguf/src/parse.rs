//! The fields of a header, in file order. The checks that need the whole header are in `header`.

use std::io::Read;

use crate::Result;
use crate::cursor::Cursor;
use crate::error::{Error, ErrorKind};
use crate::limits;
use crate::tensor::Dims;
use crate::tensor_type::TensorType;
use crate::value::{Array, Metadata, Strings, Value, ValueType};

/// Bytes of a string's length, the least that a string takes.
const STRING_BYTES_MIN: u64 = 8;
/// Bytes of a key's length, a key of one byte, a type, and a value of one byte.
const PAIR_BYTES_MIN: u64 = STRING_BYTES_MIN + 1 + 4 + 1;
/// Bytes of a name's length, a count of dimensions, a type and an offset.
const TENSOR_BYTES_MIN: u64 = STRING_BYTES_MIN + 4 + 4 + 8;
/// Bytes of an inner array's element type and length.
const ARRAY_BYTES_MIN: u64 = 4 + 8;

/// A place in the header where a string stands.
struct StringField {
    what: &'static str,
    /// The name of its length, for messages.
    length: &'static str,
    max_bytes: u64,
}

const KEY: StringField = StringField {
    what: "a metadata key",
    length: "the length of a metadata key in bytes",
    max_bytes: limits::MAX_KEY_BYTES,
};
const TENSOR_NAME: StringField = StringField {
    what: "a tensor name",
    length: "the length of a tensor name in bytes",
    max_bytes: limits::MAX_TENSOR_NAME_BYTES,
};
const STRING_VALUE: StringField = StringField {
    what: "a string value",
    length: "the length of a string in bytes",
    max_bytes: limits::MAX_STRING_BYTES,
};
const ARRAY_STRING: StringField = StringField { what: "a string of an array", ..STRING_VALUE };

/// The fixed start of a file, after the magic.
pub(crate) struct Counts {
    pub(crate) version: u32,
    pub(crate) tensors: u64,
    pub(crate) pairs: u64,
}

/// A tensor as the table describes it; `offset` counts from the start of the data section.
pub(crate) struct TensorRow {
    pub(crate) name: String,
    pub(crate) ty: TensorType,
    pub(crate) dims: Dims,
    pub(crate) offset: u64,
    pub(crate) len: u64,
    /// Where the row stands in the file.
    pub(crate) at: u64,
}

pub(crate) fn counts<R: Read>(cursor: &mut Cursor<R>) -> Result<Counts> {
    let at = cursor.pos();
    let version = cursor.u32("the version")?;
    match version {
        2 | 3 => {}
        // As ggml does: a small number in the other byte order has its low half clear.
        _ if version != 0 && version & 0xffff == 0 => {
            return Err(Error::from(ErrorKind::BigEndian).at(at));
        }
        _ => return Err(Error::from(ErrorKind::Version(version)).at(at)),
    }
    let at = cursor.pos();
    let tensors = cursor.u64("the number of tensors")?;
    bound("the number of tensors", tensors, limits::MAX_TENSORS).map_err(|error| error.at(at))?;
    let at = cursor.pos();
    let pairs = cursor.u64("the number of metadata pairs")?;
    bound("the number of metadata pairs", pairs, limits::MAX_METADATA_PAIRS)
        .map_err(|error| error.at(at))?;
    cursor.expect(pairs, PAIR_BYTES_MIN, "the metadata")?;
    cursor.expect(tensors, TENSOR_BYTES_MIN, "the tensor table")?;
    Ok(Counts { version, tensors, pairs })
}

pub(crate) fn metadata<R: Read>(cursor: &mut Cursor<R>, count: u64) -> Result<Metadata> {
    let mut pairs = Vec::new();
    let mut offsets = Vec::new();
    for _ in 0..count {
        let at = cursor.pos();
        let key = text(cursor, &KEY).map_err(|error| error.at(at))?;
        if key.is_empty() {
            return Err(Error::from(ErrorKind::EmptyKey).at(at));
        }
        let at_value = cursor.pos();
        let value = value(cursor).map_err(|error| error.at(at_value).in_key(&key))?;
        pairs.push((key, value));
        offsets.push(at);
    }
    Metadata::from_pairs(pairs)
        .map_err(|(second, key)| Error::from(ErrorKind::Duplicate).at(offsets[second]).in_key(&key))
}

fn value<R: Read>(cursor: &mut Cursor<R>) -> Result<Value> {
    const WHAT: &str = "a metadata value";
    Ok(match value_type(cursor)? {
        ValueType::U8 => Value::U8(u8::from_le_bytes(cursor.array(WHAT)?)),
        ValueType::I8 => Value::I8(i8::from_le_bytes(cursor.array(WHAT)?)),
        ValueType::U16 => Value::U16(u16::from_le_bytes(cursor.array(WHAT)?)),
        ValueType::I16 => Value::I16(i16::from_le_bytes(cursor.array(WHAT)?)),
        ValueType::U32 => Value::U32(cursor.u32(WHAT)?),
        ValueType::I32 => Value::I32(i32::from_le_bytes(cursor.array(WHAT)?)),
        ValueType::F32 => Value::F32(f32::from_le_bytes(cursor.array(WHAT)?)),
        ValueType::Bool => {
            let at = cursor.pos();
            Value::Bool(boolean(cursor.array(WHAT)?).map_err(|error| error.at(at))?)
        }
        ValueType::Str => Value::Str(text(cursor, &STRING_VALUE)?),
        ValueType::Array => Value::Array(array(cursor, 1)?),
        ValueType::U64 => Value::U64(cursor.u64(WHAT)?),
        ValueType::I64 => Value::I64(i64::from_le_bytes(cursor.array(WHAT)?)),
        ValueType::F64 => Value::F64(f64::from_le_bytes(cursor.array(WHAT)?)),
    })
}

/// Reads an array, `depth` levels deep: 1 for one that is a pair's value.
fn array<R: Read>(cursor: &mut Cursor<R>, depth: u32) -> Result<Array> {
    const WHAT: &str = "a metadata array";
    let at = cursor.pos();
    bound("the nesting of arrays", depth.into(), limits::MAX_ARRAY_DEPTH.into())
        .map_err(|error| error.at(at))?;
    let element_type = value_type(cursor)?;
    let at = cursor.pos();
    let count = cursor.u64("an array's length")?;
    bound("the number of array elements", count, limits::MAX_ARRAY_ELEMENTS)
        .map_err(|error| error.at(at))?;
    Ok(match element_type {
        ValueType::U8 => {
            Array::U8(cursor.items(count, WHAT, |bytes| Ok(u8::from_le_bytes(bytes)))?)
        }
        ValueType::I8 => {
            Array::I8(cursor.items(count, WHAT, |bytes| Ok(i8::from_le_bytes(bytes)))?)
        }
        ValueType::U16 => {
            Array::U16(cursor.items(count, WHAT, |bytes| Ok(u16::from_le_bytes(bytes)))?)
        }
        ValueType::I16 => {
            Array::I16(cursor.items(count, WHAT, |bytes| Ok(i16::from_le_bytes(bytes)))?)
        }
        ValueType::U32 => {
            Array::U32(cursor.items(count, WHAT, |bytes| Ok(u32::from_le_bytes(bytes)))?)
        }
        ValueType::I32 => {
            Array::I32(cursor.items(count, WHAT, |bytes| Ok(i32::from_le_bytes(bytes)))?)
        }
        ValueType::F32 => {
            Array::F32(cursor.items(count, WHAT, |bytes| Ok(f32::from_le_bytes(bytes)))?)
        }
        ValueType::Bool => Array::Bool(cursor.items(count, WHAT, boolean)?),
        ValueType::U64 => {
            Array::U64(cursor.items(count, WHAT, |bytes| Ok(u64::from_le_bytes(bytes)))?)
        }
        ValueType::I64 => {
            Array::I64(cursor.items(count, WHAT, |bytes| Ok(i64::from_le_bytes(bytes)))?)
        }
        ValueType::F64 => {
            Array::F64(cursor.items(count, WHAT, |bytes| Ok(f64::from_le_bytes(bytes)))?)
        }
        ValueType::Str => {
            cursor.expect(count, STRING_BYTES_MIN, WHAT)?;
            let mut strings = Strings::default();
            for _ in 0..count {
                string(cursor, &ARRAY_STRING, strings.buffer())?;
                strings.end_string();
            }
            Array::Str(strings)
        }
        ValueType::Array => {
            cursor.expect(count, ARRAY_BYTES_MIN, WHAT)?;
            let mut arrays = Vec::new();
            for _ in 0..count {
                arrays.push(array(cursor, depth + 1)?);
            }
            Array::Nested(arrays)
        }
    })
}

pub(crate) fn tensor<R: Read>(cursor: &mut Cursor<R>) -> Result<TensorRow> {
    let at = cursor.pos();
    let name = text(cursor, &TENSOR_NAME).map_err(|error| error.at(at))?;
    let (ty, dims, offset) = shape(cursor).map_err(|error| error.in_tensor(&name))?;
    let len = dims.bytes(ty).map_err(|error| error.at(at).in_tensor(&name))?;
    Ok(TensorRow { name, ty, dims, offset, len, at })
}

fn shape<R: Read>(cursor: &mut Cursor<R>) -> Result<(TensorType, Dims, u64)> {
    let at_shape = cursor.pos();
    let count = cursor.u32("a tensor's number of dimensions")?;
    bound("the number of dimensions", count.into(), limits::MAX_DIMS.into())
        .map_err(|error| error.at(at_shape))?;
    let dims = cursor
        .items(count.into(), "a tensor's dimensions", |bytes| Ok(u64::from_le_bytes(bytes)))?;
    let dims = Dims::new(&dims).map_err(|error| error.at(at_shape))?;
    let at_type = cursor.pos();
    let ty =
        TensorType::from_id(cursor.u32("a tensor's type")?).map_err(|error| error.at(at_type))?;
    let offset = cursor.u64("a tensor's offset")?;
    Ok((ty, dims, offset))
}

fn value_type<R: Read>(cursor: &mut Cursor<R>) -> Result<ValueType> {
    let at = cursor.pos();
    let id = cursor.u32("a metadata value's type")?;
    ValueType::from_id(id).ok_or_else(|| Error::from(ErrorKind::UnknownValueType { id }).at(at))
}

/// "Anything else is invalid": GGUF specification, `GGUF_METADATA_VALUE_TYPE_BOOL`.
fn boolean([byte]: [u8; 1]) -> Result<bool> {
    match byte {
        0 => Ok(false),
        1 => Ok(true),
        value => Err(ErrorKind::InvalidBool { value }.into()),
    }
}

/// A string that must be UTF-8 and, because C code reads it too, without NUL.
fn text<R: Read>(cursor: &mut Cursor<R>, field: &StringField) -> Result<String> {
    let what = field.what;
    let mut bytes = Vec::new();
    let at = cursor.pos();
    string(cursor, field, &mut bytes)?;
    let text =
        String::from_utf8(bytes).map_err(|_| Error::from(ErrorKind::NotUtf8 { what }).at(at))?;
    if text.contains('\0') {
        return Err(Error::from(ErrorKind::InteriorNul { what }).at(at));
    }
    Ok(text)
}

fn string<R: Read>(cursor: &mut Cursor<R>, field: &StringField, into: &mut Vec<u8>) -> Result<()> {
    let at = cursor.pos();
    let len = cursor.u64(field.what)?;
    // A length beyond the file is the commoner damage, and the clearer message.
    cursor.expect(len, 1, field.what)?;
    bound(field.length, len, field.max_bytes).map_err(|error| error.at(at))?;
    cursor.append(len, into, field.what)
}

fn bound(what: &'static str, value: u64, limit: u64) -> Result<()> {
    if value > limit {
        return Err(ErrorKind::Limit { what, value, limit }.into());
    }
    Ok(())
}

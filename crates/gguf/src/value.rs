//! Metadata: typed values under dotted keys, in the order of the file.

use std::fmt;

use crate::Result;
use crate::error::{Error, ErrorKind};

macro_rules! value_types {
    ($($variant:ident = $id:literal, $name:literal;)*) => {
        /// The type of a metadata value (`gguf_metadata_value_type`, GGUF specification).
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum ValueType {
            $(#[doc = concat!("Type ", $id, ": ", $name, ".")] $variant = $id,)*
        }

        impl ValueType {
            /// The type with this number in files.
            pub fn from_id(id: u32) -> Option<Self> {
                match id {
                    $($id => Some(Self::$variant),)*
                    _ => None,
                }
            }

            /// The number in files.
            pub fn id(self) -> u32 {
                self as u32
            }
        }

        impl fmt::Display for ValueType {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Self::$variant => $name,)* })
            }
        }
    };
}

value_types! {
    U8 = 0, "u8";
    I8 = 1, "i8";
    U16 = 2, "u16";
    I16 = 3, "i16";
    U32 = 4, "u32";
    I32 = 5, "i32";
    F32 = 6, "f32";
    Bool = 7, "bool";
    Str = 8, "a string";
    Array = 9, "an array";
    U64 = 10, "u64";
    I64 = 11, "i64";
    F64 = 12, "f64";
}

/// One metadata value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// 8 bits, unsigned.
    U8(u8),
    /// 8 bits, signed.
    I8(i8),
    /// 16 bits, unsigned.
    U16(u16),
    /// 16 bits, signed.
    I16(i16),
    /// 32 bits, unsigned.
    U32(u32),
    /// 32 bits, signed.
    I32(i32),
    /// 32-bit float. NaN is a value like any other.
    F32(f32),
    /// True or false.
    Bool(bool),
    /// UTF-8 without a NUL inside.
    Str(String),
    /// Values of one type.
    Array(Array),
    /// 64 bits, unsigned.
    U64(u64),
    /// 64 bits, signed.
    I64(i64),
    /// 64-bit float. NaN is a value like any other.
    F64(f64),
}

/// A metadata array: values of one type, held without a tag for each.
#[derive(Clone, Debug, PartialEq)]
pub enum Array {
    /// 8 bits, unsigned.
    U8(Vec<u8>),
    /// 8 bits, signed.
    I8(Vec<i8>),
    /// 16 bits, unsigned.
    U16(Vec<u16>),
    /// 16 bits, signed.
    I16(Vec<i16>),
    /// 32 bits, unsigned.
    U32(Vec<u32>),
    /// 32 bits, signed.
    I32(Vec<i32>),
    /// 32-bit floats.
    F32(Vec<f32>),
    /// True or false.
    Bool(Vec<bool>),
    /// Strings.
    Str(Strings),
    /// Arrays within the array; ggml's own reader refuses them.
    Nested(Vec<Array>),
    /// 64 bits, unsigned.
    U64(Vec<u64>),
    /// 64 bits, signed.
    I64(Vec<i64>),
    /// 64-bit floats.
    F64(Vec<f64>),
}

/// The strings of an array, kept end to end: a vocabulary costs its own bytes and one word per
/// token.
///
/// Elements are bytes and not `str`, because vocabularies in circulation hold tokens that are parts
/// of UTF-8 sequences; they may also contain NUL.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Strings {
    bytes: Vec<u8>,
    /// For each string, one past its last byte in `bytes`.
    ends: Vec<usize>,
}

impl Strings {
    /// How many strings there are.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The string at `index`, or `None` past the end.
    pub fn get(&self, index: usize) -> Option<&[u8]> {
        let end = *self.ends.get(index)?;
        let start = index.checked_sub(1).map_or(0, |before| self.ends[before]);
        Some(&self.bytes[start..end])
    }

    /// All strings in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &[u8]> {
        (0..self.len()).map(|index| self.get(index).unwrap_or_default())
    }

    /// Appends a string.
    pub fn push(&mut self, string: impl AsRef<[u8]>) {
        self.bytes.extend_from_slice(string.as_ref());
        self.end_string();
    }

    /// Where the reader puts the bytes of the next string, to be closed by `end_string`.
    pub(crate) fn buffer(&mut self) -> &mut Vec<u8> {
        &mut self.bytes
    }

    pub(crate) fn end_string(&mut self) {
        self.ends.push(self.bytes.len());
    }
}

impl<S: AsRef<[u8]>> FromIterator<S> for Strings {
    fn from_iter<I: IntoIterator<Item = S>>(strings: I) -> Self {
        let mut all = Self::default();
        strings.into_iter().for_each(|string| all.push(string));
        all
    }
}

impl Array {
    /// The type of the elements.
    pub fn element_type(&self) -> ValueType {
        match self {
            Self::U8(_) => ValueType::U8,
            Self::I8(_) => ValueType::I8,
            Self::U16(_) => ValueType::U16,
            Self::I16(_) => ValueType::I16,
            Self::U32(_) => ValueType::U32,
            Self::I32(_) => ValueType::I32,
            Self::F32(_) => ValueType::F32,
            Self::Bool(_) => ValueType::Bool,
            Self::Str(_) => ValueType::Str,
            Self::Nested(_) => ValueType::Array,
            Self::U64(_) => ValueType::U64,
            Self::I64(_) => ValueType::I64,
            Self::F64(_) => ValueType::F64,
        }
    }

    /// How many elements there are.
    pub fn len(&self) -> usize {
        match self {
            Self::U8(items) => items.len(),
            Self::I8(items) => items.len(),
            Self::U16(items) => items.len(),
            Self::I16(items) => items.len(),
            Self::U32(items) => items.len(),
            Self::I32(items) => items.len(),
            Self::F32(items) => items.len(),
            Self::Bool(items) => items.len(),
            Self::Str(items) => items.len(),
            Self::Nested(items) => items.len(),
            Self::U64(items) => items.len(),
            Self::I64(items) => items.len(),
            Self::F64(items) => items.len(),
        }
    }

    /// True if there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The element at `index` as a whole number; `None` past the end or for elements that are no
    /// integers.
    pub fn integer(&self, index: usize) -> Option<i128> {
        match self {
            Self::U8(items) => items.get(index).map(|item| (*item).into()),
            Self::I8(items) => items.get(index).map(|item| (*item).into()),
            Self::U16(items) => items.get(index).map(|item| (*item).into()),
            Self::I16(items) => items.get(index).map(|item| (*item).into()),
            Self::U32(items) => items.get(index).map(|item| (*item).into()),
            Self::I32(items) => items.get(index).map(|item| (*item).into()),
            Self::U64(items) => items.get(index).map(|item| (*item).into()),
            Self::I64(items) => items.get(index).map(|item| (*item).into()),
            Self::F32(_) | Self::F64(_) | Self::Bool(_) | Self::Str(_) | Self::Nested(_) => None,
        }
    }
}

impl Value {
    /// The type of this value.
    pub fn value_type(&self) -> ValueType {
        match self {
            Self::U8(_) => ValueType::U8,
            Self::I8(_) => ValueType::I8,
            Self::U16(_) => ValueType::U16,
            Self::I16(_) => ValueType::I16,
            Self::U32(_) => ValueType::U32,
            Self::I32(_) => ValueType::I32,
            Self::F32(_) => ValueType::F32,
            Self::Bool(_) => ValueType::Bool,
            Self::Str(_) => ValueType::Str,
            Self::Array(_) => ValueType::Array,
            Self::U64(_) => ValueType::U64,
            Self::I64(_) => ValueType::I64,
            Self::F64(_) => ValueType::F64,
        }
    }

    /// The value as a whole number, from any of the eight integer types.
    pub fn integer(&self) -> Option<i128> {
        match *self {
            Self::U8(value) => Some(value.into()),
            Self::I8(value) => Some(value.into()),
            Self::U16(value) => Some(value.into()),
            Self::I16(value) => Some(value.into()),
            Self::U32(value) => Some(value.into()),
            Self::I32(value) => Some(value.into()),
            Self::U64(value) => Some(value.into()),
            Self::I64(value) => Some(value.into()),
            _ => None,
        }
    }
}

macro_rules! value_from {
    ($($from:ty => $variant:ident),* $(,)?) => {
        $(impl From<$from> for Value {
            fn from(value: $from) -> Self {
                Self::$variant(value.into())
            }
        })*
    };
}

macro_rules! array_from {
    ($($from:ty => $variant:ident),* $(,)?) => {
        $(impl From<$from> for Array {
            fn from(items: $from) -> Self {
                Self::$variant(items)
            }
        }
        impl From<$from> for Value {
            fn from(items: $from) -> Self {
                Self::Array(Array::$variant(items))
            }
        })*
    };
}

value_from! {
    u8 => U8, i8 => I8, u16 => U16, i16 => I16, u32 => U32, i32 => I32, u64 => U64, i64 => I64,
    f32 => F32, f64 => F64, bool => Bool, &str => Str, String => Str, Array => Array,
}
array_from! {
    Vec<u8> => U8, Vec<i8> => I8, Vec<u16> => U16, Vec<i16> => I16, Vec<u32> => U32,
    Vec<i32> => I32, Vec<u64> => U64, Vec<i64> => I64, Vec<f32> => F32, Vec<f64> => F64,
    Vec<bool> => Bool, Strings => Str,
}

/// A file's metadata: unique keys in file order, found by name in logarithmic time.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metadata {
    pairs: Vec<(String, Value)>,
    /// Indices into `pairs`, sorted by key. A hash map would keep every key twice.
    by_key: Vec<u32>,
}

impl Metadata {
    /// No metadata; fill it with [`insert`](Self::insert).
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes pairs in file order. On a repeated key: the index of the second pair, and the key.
    pub(crate) fn from_pairs(
        mut pairs: Vec<(String, Value)>,
    ) -> std::result::Result<Self, (usize, String)> {
        let mut by_key: Vec<u32> = (0..pairs.len() as u32).collect();
        let key = |index: u32| pairs[index as usize].0.as_str();
        by_key.sort_by(|a, b| key(*a).cmp(key(*b)));
        let repeated = by_key.windows(2).find(|pair| key(pair[0]) == key(pair[1]));
        match repeated.map(|pair| pair[1] as usize) {
            Some(second) => Err((second, pairs.swap_remove(second).0)),
            None => Ok(Self { pairs, by_key }),
        }
    }

    /// Appends a pair, or gives an existing key a new value in its old place. Returns the value
    /// that was replaced.
    pub fn insert(&mut self, key: impl Into<String>, value: impl Into<Value>) -> Option<Value> {
        let (key, value) = (key.into(), value.into());
        match self.find(&key) {
            Ok(found) => {
                let pair = &mut self.pairs[self.by_key[found] as usize];
                Some(std::mem::replace(&mut pair.1, value))
            }
            Err(place) => {
                self.by_key.insert(place, self.pairs.len() as u32);
                self.pairs.push((key, value));
                None
            }
        }
    }

    fn find(&self, key: &str) -> std::result::Result<usize, usize> {
        self.by_key.binary_search_by(|index| self.pairs[*index as usize].0.as_str().cmp(key))
    }

    /// How many pairs there are.
    pub fn len(&self) -> usize {
        self.pairs.len()
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.pairs.is_empty()
    }

    /// All pairs, in file order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Value)> {
        self.pairs.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// The value under `key`, whatever its type.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.find(key).ok().map(|found| &self.pairs[self.by_key[found] as usize].1)
    }

    /// The value under `key`, whatever its type.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::MissingKey`].
    pub fn require(&self, key: &str) -> Result<&Value> {
        self.get(key).ok_or_else(|| Error::from(ErrorKind::MissingKey).in_key(key))
    }

    /// A whole number of any integer type that is not negative; `None` if the key is not there.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::WrongType`], [`ErrorKind::OutOfRange`].
    pub fn u64(&self, key: &str) -> Result<Option<u64>> {
        self.narrow(key, u64::MAX.into()).map(|value| value.map(|value| value as u64))
    }

    /// As [`u64`](Self::u64), below 2^32.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::WrongType`], [`ErrorKind::OutOfRange`].
    pub fn u32(&self, key: &str) -> Result<Option<u32>> {
        self.narrow(key, u32::MAX.into()).map(|value| value.map(|value| value as u32))
    }

    fn narrow(&self, key: &str, max: i128) -> Result<Option<i128>> {
        let Some(value) = self.typed(key, "an integer", Value::integer)? else {
            return Ok(None);
        };
        if (0..=max).contains(&value) {
            return Ok(Some(value));
        }
        Err(Error::from(ErrorKind::OutOfRange { value, allowed: format!("0..={max}") }).in_key(key))
    }

    /// A float of either width; `None` if the key is not there.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::WrongType`].
    pub fn f64(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a float", |value| match *value {
            Value::F32(value) => Some(value.into()),
            Value::F64(value) => Some(value),
            _ => None,
        })
    }

    /// A boolean; `None` if the key is not there.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::WrongType`].
    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "a bool", |value| match *value {
            Value::Bool(value) => Some(value),
            _ => None,
        })
    }

    /// A string; `None` if the key is not there.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::WrongType`].
    pub fn str(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", |value| match value {
            Value::Str(value) => Some(value.as_str()),
            _ => None,
        })
    }

    /// An array of any element type; `None` if the key is not there.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::WrongType`].
    pub fn array(&self, key: &str) -> Result<Option<&Array>> {
        self.typed(key, "an array", |value| match value {
            Value::Array(value) => Some(value),
            _ => None,
        })
    }

    /// An array of strings; `None` if the key is not there.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::WrongType`].
    pub fn strings(&self, key: &str) -> Result<Option<&Strings>> {
        self.typed(key, "an array of strings", |value| match value {
            Value::Array(Array::Str(value)) => Some(value),
            _ => None,
        })
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &'static str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match convert(value) {
            Some(converted) => Ok(Some(converted)),
            None => {
                let found = value.value_type();
                Err(Error::from(ErrorKind::WrongType { expected, found }).in_key(key))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_keep_their_order_and_are_found() {
        let mut metadata = Metadata::new();
        for key in ["z", "a", "m"] {
            assert_eq!(metadata.insert(key, key), None);
        }
        assert_eq!(metadata.insert("a", 7u32), Some(Value::Str("a".into())));
        let keys: Vec<&str> = metadata.iter().map(|(key, _)| key).collect();
        assert_eq!(keys, ["z", "a", "m"]);
        assert_eq!(metadata.u64("a").unwrap(), Some(7));
        assert_eq!(metadata.str("m").unwrap(), Some("m"));
        assert_eq!(metadata.u64("missing").unwrap(), None);
        assert!(matches!(metadata.require("missing").unwrap_err().kind(), ErrorKind::MissingKey));
    }

    #[test]
    fn getters_refuse_other_types_and_ranges() {
        let mut metadata = Metadata::new();
        metadata.insert("neg", -1i8);
        metadata.insert("big", u64::MAX);
        metadata.insert("str", "x");
        metadata.insert("ints", vec![1i32, -2]);
        assert!(matches!(
            metadata.u64("neg").unwrap_err().kind(),
            ErrorKind::OutOfRange { value: -1, .. }
        ));
        assert_eq!(metadata.u64("big").unwrap(), Some(u64::MAX));
        assert!(metadata.u32("big").is_err());
        let wrong = metadata.u64("str").unwrap_err();
        assert_eq!(wrong.to_string(), "metadata key \"str\": must be an integer, is a string");
        assert!(metadata.bool("str").is_err() && metadata.f64("str").is_err());
        assert!(metadata.strings("ints").is_err() && metadata.str("ints").is_err());
        assert_eq!(metadata.array("ints").unwrap().unwrap().integer(1), Some(-2));
        assert_eq!(metadata.array("ints").unwrap().unwrap().integer(2), None);
    }

    #[test]
    fn strings_are_found_by_index() {
        let strings: Strings = ["", "ab", "", "c"].iter().collect();
        assert_eq!(strings.len(), 4);
        let all: Vec<&[u8]> = strings.iter().collect();
        assert_eq!(all, [&b""[..], b"ab", b"", b"c"]);
        assert_eq!(strings.get(4), None);
    }
}

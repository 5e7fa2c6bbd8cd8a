//! The JSON of headers and indices, bounded while it is read.
//!
//! With serde_json, since the crate `safetensors` wants the whole file in memory as one slice, keeps
//! the last of two tensors of one name without a word, and does not bound their number.

use std::fmt;

use serde::Deserialize;
use serde::de::{
    DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor,
};

use crate::Result;
use crate::dtype::Dtype;
use crate::error::{Error, ErrorKind};
use crate::limits;

/// A tensor as the header has it: nothing of it is checked but its form.
#[derive(Debug)]
pub(crate) struct RawTensor {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<u64>,
    /// First byte and one past the last, in the data.
    pub(crate) data_offsets: (u64, u64),
}

/// A header as it is written.
#[derive(Debug, Default)]
pub(crate) struct RawHeader {
    pub(crate) tensors: Vec<RawTensor>,
    pub(crate) metadata: Option<Vec<(String, String)>>,
}

/// Reads a header. `at` is its first byte in the file.
pub(crate) fn header(bytes: &[u8], at: u64) -> Result<RawHeader> {
    let mut header = RawHeader::default();
    read(bytes, at, |state, deserializer| {
        deserializer.deserialize_map(HeaderVisitor { state, header: &mut header })
    })?;
    Ok(header)
}

/// Reads an index: names of tensors, and names of the files that they are in.
pub(crate) fn index(bytes: &[u8]) -> Result<Vec<(String, String)>> {
    let mut map = None;
    read(bytes, 0, |state, deserializer| {
        deserializer.deserialize_map(IndexVisitor { state, map: &mut map })
    })?;
    let message = || "there is no `weight_map`, so this is no index of a checkpoint".to_owned();
    map.ok_or_else(|| ErrorKind::Json { message: message() }.into())
}

/// What a visitor knows better than the JSON reader that it fails.
#[derive(Default)]
struct State {
    tensor: Option<String>,
    refusal: Option<ErrorKind>,
}

impl State {
    fn refuse<E: serde::de::Error>(&mut self, kind: ErrorKind) -> E {
        self.refusal = Some(kind);
        E::custom("")
    }

    /// Counts one more of something that is limited.
    fn count<E: serde::de::Error>(
        &mut self,
        what: &'static str,
        have: usize,
        limit: usize,
    ) -> std::result::Result<(), E> {
        if have < limit {
            return Ok(());
        }
        let (value, limit) = (have as u64 + 1, limit as u64);
        Err(self.refuse(ErrorKind::Limit { what, value, limit }))
    }

    fn name<E: serde::de::Error>(&mut self, name: &str) -> std::result::Result<(), E> {
        let (value, limit) = (name.len(), limits::MAX_NAME_BYTES);
        if value <= limit {
            return Ok(());
        }
        let what = "the length of a tensor's name in bytes";
        let (value, limit) = (value as u64, limit as u64);
        Err(self.refuse(ErrorKind::Limit { what, value, limit }))
    }
}

type Reader<'a> = serde_json::Deserializer<serde_json::de::StrRead<'a>>;

fn read(
    bytes: &[u8],
    at: u64,
    visit: impl FnOnce(&mut State, &mut Reader<'_>) -> serde_json::Result<()>,
) -> Result<()> {
    let text = std::str::from_utf8(bytes).map_err(|error| {
        Error::from(ErrorKind::NotUtf8 { offset: at + error.valid_up_to() as u64 })
    })?;
    let mut state = State::default();
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let visited = visit(&mut state, &mut deserializer);
    let ended = visited.and_then(|()| {
        state.tensor = None;
        deserializer.end()
    });
    ended.map_err(|error| {
        let kind = state.refusal.unwrap_or_else(|| ErrorKind::Json { message: printable(&error) });
        match &state.tensor {
            Some(name) => Error::from(kind).in_tensor(name),
            None => kind.into(),
        }
    })
}

/// What the JSON reader says, which may hold strings of the file.
fn printable(error: &serde_json::Error) -> String {
    shorten(&error.to_string()).chars().flat_map(escape).collect()
}

fn escape(c: char) -> impl Iterator<Item = char> {
    let (plain, escaped) =
        if c.is_control() { (None, Some(c.escape_default())) } else { (Some(c), None) };
    plain.into_iter().chain(escaped.into_iter().flatten())
}

/// At most 200 bytes of a string that a message is to have.
pub(crate) fn shorten(text: &str) -> &str {
    &text[..text.floor_char_boundary(200)]
}

struct HeaderVisitor<'a> {
    state: &'a mut State,
    header: &'a mut RawHeader,
}

impl<'de> Visitor<'de> for HeaderVisitor<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<(), A::Error> {
        let Self { state, header } = self;
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                if header.metadata.is_some() {
                    return Err(state.refuse(ErrorKind::DuplicateMetadata { key: name }));
                }
                header.metadata = Some(map.next_value_seed(PairsSeed {
                    state,
                    what: "the number of metadata pairs",
                    limit: limits::MAX_METADATA_PAIRS,
                    of_tensors: false,
                })?);
                continue;
            }
            state.name(&name)?;
            state.count("the number of tensors", header.tensors.len(), limits::MAX_TENSORS)?;
            state.tensor = Some(name);
            let (dtype, shape, data_offsets) = map.next_value_seed(TensorSeed(state))?;
            let name = state.tensor.take().unwrap_or_default();
            header.tensors.push(RawTensor { name, dtype, shape, data_offsets });
        }
        Ok(())
    }
}

/// A tensor's entry. The package passes over keys that the format does not have; what they might
/// say of the bytes is not known, so they are refused.
struct TensorSeed<'a>(&'a mut State);

type Entry = (Dtype, Vec<u64>, (u64, u64));

impl<'de> DeserializeSeed<'de> for TensorSeed<'_> {
    type Value = Entry;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> std::result::Result<Entry, D::Error> {
        from.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for TensorSeed<'_> {
    type Value = Entry;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with dtype, shape and data_offsets")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Entry, A::Error> {
        #[derive(Deserialize)]
        #[serde(field_identifier, rename_all = "snake_case")]
        enum Key {
            Dtype,
            Shape,
            DataOffsets,
        }
        let twice = A::Error::duplicate_field;
        let (mut dtype, mut shape, mut data_offsets) = (None, None, None);
        while let Some(key) = map.next_key::<Key>()? {
            match key {
                Key::Dtype if dtype.is_some() => return Err(twice("dtype")),
                Key::Shape if shape.is_some() => return Err(twice("shape")),
                Key::DataOffsets if data_offsets.is_some() => return Err(twice("data_offsets")),
                Key::Dtype => dtype = Some(map.next_value_seed(DtypeSeed(self.0))?),
                Key::Shape => shape = Some(map.next_value_seed(ShapeSeed(self.0))?),
                Key::DataOffsets => data_offsets = Some(map.next_value()?),
            }
        }
        let missing = A::Error::missing_field;
        Ok((
            dtype.ok_or_else(|| missing("dtype"))?,
            shape.ok_or_else(|| missing("shape"))?,
            data_offsets.ok_or_else(|| missing("data_offsets"))?,
        ))
    }
}

struct DtypeSeed<'a>(&'a mut State);

impl<'de> DeserializeSeed<'de> for DtypeSeed<'_> {
    type Value = Dtype;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> std::result::Result<Dtype, D::Error> {
        from.deserialize_str(self)
    }
}

impl Visitor<'_> for DtypeSeed<'_> {
    type Value = Dtype;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the name of a type")
    }

    fn visit_str<E: serde::de::Error>(self, name: &str) -> std::result::Result<Dtype, E> {
        Dtype::from_name(name).ok_or_else(|| {
            self.0.refuse(ErrorKind::UnknownDtype { name: shorten(name).to_owned() })
        })
    }
}

struct ShapeSeed<'a>(&'a mut State);

impl<'de> DeserializeSeed<'de> for ShapeSeed<'_> {
    type Value = Vec<u64>;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> std::result::Result<Vec<u64>, D::Error> {
        from.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for ShapeSeed<'_> {
    type Value = Vec<u64>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of dimensions")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<Vec<u64>, A::Error> {
        let mut shape = Vec::new();
        while let Some(dim) = seq.next_element()? {
            self.0.count("the number of dimensions", shape.len(), limits::MAX_DIMS)?;
            shape.push(dim);
        }
        Ok(shape)
    }
}

/// An object of strings, or `null`, which is none.
struct PairsSeed<'a> {
    state: &'a mut State,
    what: &'static str,
    limit: usize,
    /// Its keys are names of tensors.
    of_tensors: bool,
}

impl<'de> DeserializeSeed<'de> for PairsSeed<'_> {
    type Value = Vec<(String, String)>;

    fn deserialize<D: Deserializer<'de>>(
        self,
        from: D,
    ) -> std::result::Result<Self::Value, D::Error> {
        from.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for PairsSeed<'_> {
    type Value = Vec<(String, String)>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of strings")
    }

    fn visit_unit<E>(self) -> std::result::Result<Self::Value, E> {
        Ok(Vec::new())
    }

    fn visit_map<A: MapAccess<'de>>(
        self,
        mut map: A,
    ) -> std::result::Result<Self::Value, A::Error> {
        let Self { state, what, limit, of_tensors } = self;
        let mut pairs = Vec::new();
        while let Some(key) = map.next_key::<String>()? {
            state.count(what, pairs.len(), limit)?;
            if of_tensors {
                state.name(&key)?;
                state.tensor = Some(key);
                let value = map.next_value()?;
                pairs.push((state.tensor.take().unwrap_or_default(), value));
            } else {
                pairs.push((key, map.next_value()?));
            }
        }
        Ok(pairs)
    }
}

struct IndexVisitor<'a> {
    state: &'a mut State,
    map: &'a mut Option<Vec<(String, String)>>,
}

impl<'de> Visitor<'de> for IndexVisitor<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with `weight_map`")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<(), A::Error> {
        let Self { state, map: weight_map } = self;
        while let Some(key) = map.next_key::<String>()? {
            // Beside it there is `metadata`, whose `total_size` is often wrong.
            if key != "weight_map" {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            if weight_map.is_some() {
                return Err(A::Error::duplicate_field("weight_map"));
            }
            *weight_map = Some(map.next_value_seed(PairsSeed {
                state,
                what: "the number of tensors",
                limit: limits::MAX_TENSORS,
                of_tensors: true,
            })?);
        }
        Ok(())
    }
}

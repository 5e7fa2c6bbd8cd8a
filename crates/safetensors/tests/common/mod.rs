//! A writer of safetensors files that shares nothing with the reader, and engines to load with.

#![allow(dead_code)] // each file of tests uses a part

#[path = "../../../io/tests/support/skip.rs"]
mod skip;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use tierstream_io::{Config, EngineKind, Reader};

pub(crate) use self::skip::skip;

/// The engines that bring bytes.
pub(crate) const READING: [EngineKind; 3] =
    [EngineKind::Uring, EngineKind::Pread, EngineKind::Buffered];

/// A reader, unless it is to run on an io_uring that the kernel refuses.
pub(crate) fn start(config: Config) -> Option<Arc<Reader>> {
    match Reader::new(config) {
        Err(tierstream_io::Error::Engine { engine: "uring", source }) => {
            skip(format_args!("no io_uring: {source}"));
            None
        }
        other => Some(Arc::new(other.unwrap())),
    }
}

/// A folder on a drive: the system's for temporary files may lie in memory.
pub(crate) fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(Path::new(env!("CARGO_TARGET_TMPDIR"))).unwrap()
}

/// Deterministic, so that a failure repeats.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> =
            (0..len.div_ceil(8)).flat_map(|_| self.below(u64::MAX).to_le_bytes()).collect();
        bytes.truncate(len);
        bytes
    }
}

/// A tensor to be written.
#[derive(Debug, Clone)]
pub(crate) struct Raw {
    pub(crate) name: String,
    pub(crate) dtype: &'static str,
    pub(crate) shape: Vec<u64>,
    pub(crate) bytes: Vec<u8>,
}

impl Raw {
    /// Of type `U8`.
    pub(crate) fn bytes(name: &str, bytes: Vec<u8>) -> Self {
        Self { name: name.to_owned(), dtype: "U8", shape: vec![bytes.len() as u64], bytes }
    }
}

/// A file of this JSON and this data.
pub(crate) fn raw(json: impl AsRef<[u8]>, data: &[u8]) -> Vec<u8> {
    let json = json.as_ref();
    [&(json.len() as u64).to_le_bytes()[..], json, data].concat()
}

/// A file whose data are `tensors` in this order; in its header they have the order of `listed`.
pub(crate) fn file(
    tensors: &[Raw],
    listed: &[usize],
    metadata: Option<&BTreeMap<String, String>>,
    padding: usize,
) -> Vec<u8> {
    let mut entries = Vec::new();
    let mut data = Vec::new();
    for tensor in tensors {
        let begin = data.len();
        data.extend(&tensor.bytes);
        entries.push(format!(
            "{}:{{\"dtype\":\"{}\",\"shape\":{:?},\"data_offsets\":[{begin},{}]}}",
            quoted(&tensor.name),
            tensor.dtype,
            tensor.shape,
            data.len(),
        ));
    }
    let mut parts: Vec<String> = listed.iter().map(|at| entries[*at].clone()).collect();
    if let Some(metadata) = metadata {
        let pair = |(key, value): (&String, &String)| format!("{}:{}", quoted(key), quoted(value));
        let pairs: Vec<String> = metadata.iter().map(pair).collect();
        parts.insert(parts.len() / 2, format!("\"__metadata__\":{{{}}}", pairs.join(",")));
    }
    raw(format!("{{{}}}{}", parts.join(","), " ".repeat(padding)), &data)
}

/// The same, listed in the order of the data.
pub(crate) fn plain(tensors: &[Raw]) -> Vec<u8> {
    let listed: Vec<usize> = (0..tensors.len()).collect();
    file(tensors, &listed, None, 0)
}

/// An index that names these tensors and their files.
pub(crate) fn index<'a>(map: impl IntoIterator<Item = (&'a str, &'a str)>) -> String {
    let pair = |(tensor, file)| format!("{}:{}", quoted(tensor), quoted(file));
    let pairs: Vec<String> = map.into_iter().map(pair).collect();
    format!("{{\"metadata\":{{\"total_size\":0}},\"weight_map\":{{{}}}}}", pairs.join(","))
}

/// A JSON string with everything but letters and digits escaped.
pub(crate) fn quoted(text: &str) -> String {
    let mut quoted = String::from('"');
    for unit in text.encode_utf16() {
        match u8::try_from(unit) {
            Ok(byte) if byte.is_ascii_alphanumeric() => quoted.push(byte.into()),
            _ => quoted += &format!("\\u{unit:04x}"),
        }
    }
    quoted + "\""
}

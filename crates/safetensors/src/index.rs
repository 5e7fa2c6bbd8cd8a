//! The index of a sharded checkpoint: which tensor is in which file.

use std::io::Read;

use crate::Result;
use crate::error::{Error, ErrorKind};
use crate::json;
use crate::limits::{MAX_FILES, MAX_INDEX_BYTES};

/// The `weight_map` of a `model.safetensors.index.json`.
#[derive(Debug)]
pub struct Index {
    /// Names of the files, sorted; each is a plain name of a file beside the index.
    files: Vec<String>,
    /// Names of tensors, sorted and unique, each with its place in `files`.
    tensors: Vec<(String, usize)>,
}

impl Index {
    /// Reads an index of at most [`MAX_INDEX_BYTES`].
    pub(crate) fn read(reader: impl Read) -> Result<Self> {
        let mut bytes = Vec::new();
        let read = reader.take(MAX_INDEX_BYTES + 1).read_to_end(&mut bytes);
        read.map_err(|source| Error::io("read the index", source))?;
        let (value, limit) = (bytes.len() as u64, MAX_INDEX_BYTES);
        if value > limit {
            let what = "the length of the index in bytes";
            return Err(ErrorKind::Limit { what, value, limit }.into());
        }
        Self::from_bytes(&bytes)
    }

    /// Reads an index in memory.
    ///
    /// # Errors
    /// The kinds of [`ErrorKind`] that concern an index, without a path.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let mut map = json::index(bytes)?;
        map.sort();
        if let Some(pair) = map.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            return Err(Error::from(ErrorKind::Duplicate).in_tensor(&pair[0].0));
        }
        if let Some((tensor, name)) = map.iter().find(|(_, name)| !is_plain(name)) {
            let name = json::shorten(name).to_owned();
            return Err(Error::from(ErrorKind::ShardName { name }).in_tensor(tensor));
        }
        let mut files: Vec<&str> = map.iter().map(|(_, name)| name.as_str()).collect();
        files.sort_unstable();
        files.dedup();
        let files: Vec<String> = files.into_iter().map(str::to_owned).collect();
        if files.len() > MAX_FILES {
            let (what, value) = ("the number of files", files.len() as u64);
            return Err(ErrorKind::Limit { what, value, limit: MAX_FILES as u64 }.into());
        }
        let place = |name: &String| files.binary_search(name).unwrap_or_default();
        let tensors = map.into_iter().map(|(tensor, name)| (tensor, place(&name))).collect();
        Ok(Self { files, tensors })
    }

    /// Names of the files, sorted.
    pub fn files(&self) -> &[String] {
        &self.files
    }

    /// Names of the tensors, sorted, each with its place in [`Index::files`].
    pub fn tensors(&self) -> &[(String, usize)] {
        &self.tensors
    }

    /// Which file has a tensor.
    pub(crate) fn file_of(&self, tensor: &str) -> Option<usize> {
        let found = self.tensors.binary_search_by(|(name, _)| name.as_str().cmp(tensor));
        found.ok().map(|at| self.tensors[at].1)
    }
}

/// Whether a name leads to an entry of its own folder on any system, and to nothing else.
fn is_plain(name: &str) -> bool {
    // Of Windows are `\`, and `:`, which names a drive or a stream.
    let bad = |c: char| matches!(c, '/' | '\\' | ':') || c.is_control();
    !name.is_empty() && name.len() <= 255 && name != "." && name != ".." && !name.contains(bad)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_in_the_folder() {
        for name in ["model-00001-of-00002.safetensors", "a", "..a", "a..b", "é.safetensors"] {
            assert!(is_plain(name), "{name:?}");
        }
        let long = "a".repeat(256);
        for name in [
            "",
            ".",
            "..",
            "/etc/passwd",
            "../a",
            "a/../b",
            "a/b",
            "a\\b",
            "..\\a",
            "C:a",
            "a\0",
            "a\n",
            &long,
        ] {
            assert!(!is_plain(name), "{name:?}");
        }
    }
}

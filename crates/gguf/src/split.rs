//! File names of split models: `<name>-00001-of-00003.gguf`.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

/// The file of part `part` (from 1) of a model of `count` files, given the path of its part
/// `of_part`; `None` if that path is not named as such a part. The pattern is that of
/// `llama_split_path` (llama.cpp, `src/llama.cpp`).
pub(crate) fn sibling(path: &Path, of_part: u64, part: u64, count: u64) -> Option<PathBuf> {
    let name = path.file_name()?;
    let suffix = suffix(of_part, count);
    let encoded = name.as_encoded_bytes();
    if encoded.len() <= suffix.len() || !encoded.ends_with(suffix.as_bytes()) {
        return None;
    }
    let mut sibling = prefix(name, suffix.len())?;
    sibling.push(self::suffix(part, count));
    Some(path.with_file_name(sibling))
}

fn suffix(part: u64, count: u64) -> String {
    format!("-{part:05}-of-{count:05}.gguf")
}

/// `name` without its last `cut` bytes.
fn prefix(name: &OsStr, cut: usize) -> Option<OsString> {
    #[cfg(unix)]
    {
        use std::os::unix::ffi::{OsStrExt, OsStringExt};
        let bytes = name.as_bytes();
        Some(OsString::from_vec(bytes[..bytes.len().checked_sub(cut)?].to_vec()))
    }
    #[cfg(not(unix))]
    {
        let text = name.to_str()?;
        text.get(..text.len().checked_sub(cut)?).map(OsString::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn siblings_follow_the_pattern() {
        let path = Path::new("/m/a b-00002-of-00003.gguf");
        assert_eq!(sibling(path, 2, 1, 3), Some(PathBuf::from("/m/a b-00001-of-00003.gguf")));
        assert_eq!(sibling(path, 2, 3, 3), Some(PathBuf::from("/m/a b-00003-of-00003.gguf")));
        assert_eq!(sibling(path, 1, 2, 3), None);
        assert_eq!(sibling(path, 2, 1, 4), None);
        assert_eq!(sibling(Path::new("renamed.gguf"), 1, 2, 3), None);
        assert_eq!(sibling(Path::new("-00001-of-00003.gguf"), 1, 2, 3), None);
        assert_eq!(sibling(Path::new(".."), 1, 2, 3), None);
    }

    #[cfg(unix)]
    #[test]
    fn names_need_not_be_utf8() {
        use std::os::unix::ffi::OsStrExt;
        let path = Path::new(OsStr::from_bytes(b"\xff-00001-of-00002.gguf"));
        let second = Path::new(OsStr::from_bytes(b"\xff-00002-of-00002.gguf"));
        assert_eq!(sibling(path, 1, 2, 2).as_deref(), Some(second));
    }
}

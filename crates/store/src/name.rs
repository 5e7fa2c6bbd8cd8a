//! Names of models, as users write them: `[host/][owner/]model[:tag][@digest]`, or the name of a file.

use crate::error::{Error, Result};
use crate::limits;

/// A name in its parts. It is compared with what there is, and never made a path of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Query<'a> {
    /// As it was given, without a scheme.
    pub(crate) text: &'a str,
    /// What stands before the tag.
    pub(crate) path: &'a str,
    /// Ollama's tag, or the quantisation.
    pub(crate) tag: Option<&'a str>,
    /// Hexadecimal digits, at least 12.
    pub(crate) digest: Option<&'a str>,
}

/// Hosts that are the Hugging Face hub.
pub(crate) const HUB: [&str; 2] = ["hf.co", "huggingface.co"];

/// Digits of a digest that say which one is meant: as many as `ollama list` shows.
const DIGEST_DIGITS_MIN: usize = 12;

impl<'a> Query<'a> {
    pub(crate) fn parse(name: &'a str) -> Result<Self> {
        let wrong = |what| Error::Name { name: shown(name), what };
        let text = name.strip_prefix("https://").or_else(|| name.strip_prefix("http://"));
        let text = text.unwrap_or(name);
        if text.is_empty() {
            return Err(wrong("it is empty"));
        }
        if text.len() > limits::MAX_NAME_BYTES {
            return Err(wrong("it is too long"));
        }
        if text.chars().any(char::is_control) {
            return Err(wrong("it has control characters"));
        }
        let (path, digest) = match text.rsplit_once('@') {
            Some((path, digest)) => {
                let digits = digest.strip_prefix("sha256:").unwrap_or(digest);
                let digits = digits.strip_prefix("sha256-").unwrap_or(digits);
                let is_digest = (DIGEST_DIGITS_MIN..=64).contains(&digits.len())
                    && digits.bytes().all(|b| b.is_ascii_hexdigit());
                (path, Some(digits).filter(|_| is_digest))
            }
            None => (text, None),
        };
        // A file may have an @ in its name.
        let path = if digest.is_some() { path } else { text };
        let tag = path.rfind(':').filter(|colon| !path[*colon..].contains('/'));
        let (path, tag) = tag.map_or((path, None), |at| (&path[..at], Some(&path[at + 1..])));
        if path.split('/').any(|part| matches!(part, "" | "." | "..")) {
            return Err(wrong("it is a path, and no such file is there"));
        }
        Ok(Self { text, path, tag, digest })
    }

    /// The parts of the path.
    pub(crate) fn parts(&self) -> Vec<&'a str> {
        self.path.split('/').collect()
    }

    /// The same without the Hugging Face hub's host.
    pub(crate) fn parts_in_hub(&self) -> Vec<&'a str> {
        let mut parts = self.parts();
        if parts.len() > 2 && HUB.iter().any(|hub| same(hub, parts[0])) {
            parts.remove(0);
        }
        parts
    }

    /// The tag, if it says anything.
    pub(crate) fn quant(&self) -> Option<&'a str> {
        self.tag.filter(|tag| !same(tag, "latest"))
    }
}

/// Whether two names are the same: stores do not mind the case.
pub(crate) fn same(a: &str, b: &str) -> bool {
    a.eq_ignore_ascii_case(b)
}

/// As much of a name as an error tells.
pub(crate) fn shown(name: &str) -> String {
    name.chars().take(100).collect()
}

/// The names in `all` that are nearly `name`, the nearest first.
pub(crate) fn nearest<'a>(name: &str, all: impl Iterator<Item = &'a str>) -> Vec<String> {
    // To compare takes the product of the lengths.
    if name.len() > limits::MAX_NEAR_BYTES {
        return Vec::new();
    }
    let name = name.to_ascii_lowercase();
    let far = (name.chars().count() / 3).max(1);
    let distance = |other: &str| {
        let other = other.to_ascii_lowercase();
        if name.len() > 2 && other.contains(&name) {
            return 1;
        }
        // Owner, host or tag may be what is missing.
        let ends = [Some(other.as_str()), other.rsplit('/').next(), other.split(':').next()];
        let ends = ends.into_iter().flatten().filter(|end| end.len().abs_diff(name.len()) <= far);
        ends.map(|end| strsim::damerau_levenshtein(&name, end)).min().unwrap_or(usize::MAX)
    };
    let mut near: Vec<(usize, &str)> = all.map(|other| (distance(other), other)).collect();
    near.retain(|(distance, _)| *distance <= far);
    near.sort_unstable();
    near.dedup();
    near.into_iter().take(3).map(|(_, name)| name.to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_parts() {
        let of = |name| {
            let Query { path, tag, digest, .. } = Query::parse(name).unwrap();
            (path, tag, digest)
        };
        assert_eq!(of("qwen3"), ("qwen3", None, None));
        assert_eq!(of("qwen3:30b"), ("qwen3", Some("30b"), None));
        assert_eq!(of("hf.co/a/b:Q4_K_M"), ("hf.co/a/b", Some("Q4_K_M"), None));
        assert_eq!(of("localhost:5000/a/b"), ("localhost:5000/a/b", None, None));
        assert_eq!(of("a@sha256:0123456789ab"), ("a", None, Some("0123456789ab")));
        assert_eq!(of("a:b@0123456789AB"), ("a", Some("b"), Some("0123456789AB")));
        assert_eq!(of("a@b.gguf"), ("a@b.gguf", None, None));
        assert_eq!(of("https://ollama.com/a/b"), ("ollama.com/a/b", None, None));
    }

    #[test]
    fn texts_that_are_no_names() {
        let long = "a".repeat(limits::MAX_NAME_BYTES + 1);
        for name in
            ["", "https://", "../a", "a/../b", "/a", "a/", "a//b", "./a", ":b", "a\n", &long]
        {
            assert!(matches!(Query::parse(name), Err(Error::Name { .. })), "{name}");
        }
    }

    #[test]
    fn the_hub_is_a_host_among_others() {
        let parts = |name| Query::parse(name).unwrap().parts_in_hub();
        assert_eq!(parts("HF.co/a/b:Q4"), ["a", "b"]);
        assert_eq!(parts("huggingface.co/a/b"), ["a", "b"]);
        assert_eq!(parts("hf.co/a"), ["hf.co", "a"]);
        assert_eq!(parts("a/b/c"), ["a", "b", "c"]);
    }

    #[test]
    fn the_nearest_names_come_first() {
        let all = ["qwen3:30b", "qwen2.5:7b", "llama3:latest", "unsloth/Qwen3-30B-A3B-GGUF:Q4_K_M"];
        let near = |name| nearest(name, all.into_iter());
        assert_eq!(near("qwen3:3b"), ["qwen3:30b"]);
        assert_eq!(near("qwen3"), ["qwen3:30b", "unsloth/Qwen3-30B-A3B-GGUF:Q4_K_M"]);
        assert_eq!(near("lama3"), ["llama3:latest"]);
        assert_eq!(near("QWEN3-30b-a3b-gguf:q4_k_m"), ["unsloth/Qwen3-30B-A3B-GGUF:Q4_K_M"]);
        assert_eq!(near("mixtral"), [""; 0]);
    }
}

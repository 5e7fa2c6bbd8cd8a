//! Where the stores are, as the environment of the process says.

use std::path::PathBuf;
use std::{env, fmt};

use crate::disk;
use crate::error::Result;
use crate::limits;

/// What decides where stores are looked for. A variable that is empty is one that is not set.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Environment {
    /// The user's home: `HOME`.
    pub home: Option<PathBuf>,
    /// `XDG_CACHE_HOME`.
    pub xdg_cache_home: Option<PathBuf>,
    /// `OLLAMA_MODELS`: then Ollama's models are nowhere else.
    pub ollama_models: Option<PathBuf>,
    /// Where Ollama keeps models when the system runs it.
    pub ollama_service: Option<PathBuf>,
    /// `HF_HUB_CACHE`.
    pub hf_hub_cache: Option<PathBuf>,
    /// `HUGGINGFACE_HUB_CACHE`, the older name of it.
    pub huggingface_hub_cache: Option<PathBuf>,
    /// `HF_HOME`.
    pub hf_home: Option<PathBuf>,
    /// `HF_ENDPOINT`: where the hub is, if not at its own address.
    pub hf_endpoint: Option<String>,
    /// `HF_TOKEN`, or `HUGGING_FACE_HUB_TOKEN`, the older name of it.
    pub hf_token: Option<Secret>,
    /// `HF_TOKEN_PATH`.
    pub hf_token_path: Option<PathBuf>,
    /// `HF_HUB_OFFLINE`: nothing may be fetched.
    pub hf_hub_offline: bool,
    /// `LLAMA_CACHE`.
    pub llama_cache: Option<PathBuf>,
    /// `TIERSTREAM_MODELS`: folders of models, separated by colons.
    pub folders: Vec<PathBuf>,
}

/// Where Ollama's installer for Linux makes the home of the service's user.
const OLLAMA_SERVICE: &str = "/usr/share/ollama/.ollama/models";

impl Environment {
    /// That of this process.
    pub fn of_process() -> Self {
        let var = |name| env::var_os(name).filter(|v| !v.is_empty());
        let path = |name| var(name).map(PathBuf::from);
        let text = |name| var(name).and_then(|value| value.into_string().ok());
        let folders = var("TIERSTREAM_MODELS");
        let folders = folders.iter().flat_map(env::split_paths);
        Self {
            home: path("HOME"),
            xdg_cache_home: path("XDG_CACHE_HOME"),
            ollama_models: path("OLLAMA_MODELS"),
            ollama_service: Some(OLLAMA_SERVICE.into()),
            hf_hub_cache: path("HF_HUB_CACHE"),
            huggingface_hub_cache: path("HUGGINGFACE_HUB_CACHE"),
            hf_home: path("HF_HOME"),
            hf_endpoint: text("HF_ENDPOINT"),
            hf_token: text("HF_TOKEN").or_else(|| text("HUGGING_FACE_HUB_TOKEN")).map(Secret::new),
            hf_token_path: path("HF_TOKEN_PATH"),
            hf_hub_offline: text("HF_HUB_OFFLINE").is_some_and(|text| is_true(&text)),
            llama_cache: path("LLAMA_CACHE"),
            folders: folders.filter(|folder| folder.as_os_str() != "").collect(),
        }
    }

    /// Where the cache of the Hugging Face hub is, by the rules of `huggingface_hub`.
    pub fn hub_cache(&self) -> Option<PathBuf> {
        let named = self.hf_hub_cache.clone().or_else(|| self.huggingface_hub_cache.clone());
        named.or_else(|| Some(self.hub_home()?.join("hub")))
    }

    /// The user's token for the hub: what the environment says, or what the file has that
    /// `huggingface_hub` logs in with.
    ///
    /// # Errors
    /// The file is there and cannot be read.
    pub fn hub_token(&self) -> Result<Option<Secret>> {
        let given = |secret: Secret| Some(secret).filter(|secret| !secret.0.is_empty());
        if let Some(token) = self.hf_token.clone().and_then(given) {
            return Ok(Some(token));
        }
        let in_home = || Some(self.hub_home()?.join("token"));
        let Some(path) = self.hf_token_path.clone().or_else(in_home) else { return Ok(None) };
        if disk::len(&path)?.is_none() {
            return Ok(None);
        }
        let text = disk::read(&path, limits::MAX_SMALL_FILE_BYTES)?;
        let text = String::from_utf8(text).map_err(|_| disk::damaged(&path, "it is no text"))?;
        Ok(given(Secret::new(text)))
    }

    /// The folder of all that the hub's programs keep.
    fn hub_home(&self) -> Option<PathBuf> {
        self.hf_home.clone().or_else(|| self.in_cache("huggingface"))
    }

    /// `path` below the home.
    pub(crate) fn at_home(&self, path: &str) -> Option<PathBuf> {
        self.home.as_ref().map(|home| home.join(path))
    }

    /// `path` below the folder of caches.
    pub(crate) fn in_cache(&self, path: &str) -> Option<PathBuf> {
        let cache = self.xdg_cache_home.clone().or_else(|| self.at_home(".cache"))?;
        Some(cache.join(path))
    }
}

/// A flag, as `huggingface_hub` reads one.
fn is_true(text: &str) -> bool {
    ["1", "ON", "YES", "TRUE"].iter().any(|word| text.eq_ignore_ascii_case(word))
}

/// A text that is shown to nobody.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Without the white space around it, which files end with.
    pub fn new(text: impl AsRef<str>) -> Self {
        Self(text.as_ref().trim().to_owned())
    }

    /// The text.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_is_where_the_environment_says() {
        let path = |text: &str| Some(PathBuf::from(text));
        let mut e = Environment::default();
        assert_eq!(e.hub_cache(), None);
        e.home = path("/h");
        assert_eq!(e.hub_cache(), path("/h/.cache/huggingface/hub"));
        e.xdg_cache_home = path("/x");
        assert_eq!(e.hub_cache(), path("/x/huggingface/hub"));
        e.hf_home = path("/f");
        assert_eq!(e.hub_cache(), path("/f/hub"));
        e.huggingface_hub_cache = path("/o");
        assert_eq!(e.hub_cache(), path("/o"));
        e.hf_hub_cache = path("/c");
        assert_eq!(e.hub_cache(), path("/c"));
    }

    #[test]
    fn the_token_is_the_environments_or_the_files() {
        let dir = tempfile::tempdir().unwrap();
        let mut e = Environment { hf_home: Some(dir.path().into()), ..Default::default() };
        let token = |e: &Environment| e.hub_token().unwrap().map(|t| t.reveal().to_owned());
        assert_eq!(token(&e), None);
        std::fs::write(dir.path().join("token"), " one\n").unwrap();
        assert_eq!(token(&e).as_deref(), Some("one"));
        std::fs::write(dir.path().join("other"), "two").unwrap();
        e.hf_token_path = Some(dir.path().join("other"));
        assert_eq!(token(&e).as_deref(), Some("two"));
        e.hf_token = Some(Secret::new("three"));
        assert_eq!(token(&e).as_deref(), Some("three"));
        assert!(!format!("{e:?}").contains("three"));
        e.hf_token = None;
        e.hf_token_path = Some(dir.path().into());
        assert!(e.hub_token().is_err());
    }

    #[test]
    fn flags_are_words() {
        assert!(["1", "on", "Yes", "TRUE"].into_iter().all(is_true));
        assert!(!["0", "", "off", "no"].into_iter().any(is_true));
    }
}

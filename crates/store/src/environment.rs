//! Where the stores are, as the environment of the process says.

use std::env;
use std::path::PathBuf;

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
            llama_cache: path("LLAMA_CACHE"),
            folders: folders.filter(|folder| folder.as_os_str() != "").collect(),
        }
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

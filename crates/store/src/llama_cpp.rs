//! llama.cpp's cache: now a cache of the Hugging Face hub, formerly a folder of files that are named
//! `owner_repo_file.gguf`, with a `manifest=owner=repo=tag.json` for each that came from there.

use std::path::{Path, PathBuf};

use crate::disk::{self, Below, Left};
use crate::environment::Environment;
use crate::error::Result;
use crate::file::{self, UNFINISHED};
use crate::hub;
use crate::source::{Entry, Source};
use crate::store::{Model, Tool};

#[derive(Debug)]
pub(crate) struct LlamaCpp {
    root: PathBuf,
}

/// Where it is (`fs_get_cache_directory`, `common/common.cpp`).
pub(crate) fn root(environment: &Environment) -> Option<PathBuf> {
    environment.llama_cache.clone().or_else(|| environment.in_cache("llama.cpp"))
}

impl LlamaCpp {
    pub(crate) fn new(root: PathBuf) -> Self {
        Self { root }
    }
}

impl Source for LlamaCpp {
    fn tool(&self) -> Tool {
        Tool::LlamaCpp
    }

    fn root(&self) -> &Path {
        &self.root
    }

    fn entries(&self) -> Result<Vec<Entry>> {
        let mut left = Left::new();
        let all = disk::entries(&self.root, &mut left)?;
        let repos: Vec<_> = all.iter().filter_map(|entry| of_manifest(&entry.name)).collect();
        let is_model =
            |name: &str| file::is_model_file(name.strip_suffix(UNFINISHED).unwrap_or(name));
        let files = all.into_iter().filter(|entry| is_model(&entry.name) && !entry.path.is_dir());
        let named = files.map(|entry| {
            let of = repos.iter().filter_map(|(owner, repo)| {
                let file = entry.name.strip_prefix(&format!("{owner}_{repo}_"))?;
                Some(vec![owner.clone(), repo.clone(), file.to_owned()])
            });
            // The longest names: one repository's may begin with another's.
            let names = of.min_by_key(|names| names[2].len());
            Below { names: names.unwrap_or_else(|| vec![entry.name]), path: entry.path }
        });
        let models = file::models(named.collect(), &|names| match names {
            [owner, repo, _] => (Some(owner.clone()), Some(repo.clone()), 2),
            _ => (None, None, 0),
        });
        let mut entries = file::entries(models, &self.root);
        entries.extend(hub::entries(&self.root, &mut left)?);
        Ok(entries)
    }

    fn model(&self, entry: &Entry) -> Result<Model> {
        hub::model(entry, self.tool(), &self.root)
    }
}

/// The repository that a manifest's name tells.
fn of_manifest(name: &str) -> Option<(String, String)> {
    let mut parts = name.strip_prefix("manifest=")?.strip_suffix(".json")?.split('=');
    let (owner, repo) = (parts.next()?, parts.next()?);
    (!owner.is_empty() && !repo.is_empty()).then(|| (owner.to_owned(), repo.to_owned()))
}

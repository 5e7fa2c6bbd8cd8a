//! The cache of the Hugging Face hub: `models--owner--repo/snapshots/<commit>/file`, links to blobs
//! beside them. llama.cpp keeps its models there, too.
//!
//! Of a repository the snapshot is taken that `refs/main` names, as llama.cpp does; where there is no such
//! reference that of the first other one, else the snapshot that was written last.

use std::path::{Path, PathBuf};

use crate::disk::{self, Below, Left};
use crate::error::{Error, Result};
use crate::file;
use crate::folder::of_file;
use crate::limits;
use crate::source::{Entry, Source, What};
use crate::store::{Model, Tool};

/// How the cache ends the name of a blob that is not there as a whole.
const INCOMPLETE: &str = ".incomplete";

#[derive(Debug)]
pub(crate) struct Hub {
    root: PathBuf,
}

impl Hub {
    pub(crate) fn new(root: PathBuf) -> Self {
        Self { root }
    }
}

impl Source for Hub {
    fn tool(&self) -> Tool {
        Tool::HuggingFace
    }

    fn root(&self) -> &Path {
        &self.root
    }

    fn entries(&self) -> Result<Vec<Entry>> {
        entries(&self.root, &mut Left::new())
    }

    fn model(&self, entry: &Entry) -> Result<Model> {
        model(entry, self.tool(), &self.root)
    }
}

/// The models in a cache.
pub(crate) fn entries(root: &Path, left: &mut Left) -> Result<Vec<Entry>> {
    let (mut files, mut without) = (Vec::new(), Vec::new());
    for folder in disk::entries(root, left)? {
        let Some((owner, repo)) = repository(&folder.name) else { continue };
        let (mut found, is_unfinished) = match files_of(&folder.path, left) {
            // As folders in other stores.
            Err(Error::Unreadable { .. }) => continue,
            found => found?,
        };
        if found.is_empty() {
            let name = owner.iter().chain([&repo]).cloned().collect::<Vec<_>>().join("/");
            let what = What::Repository { owner, repo, is_unfinished };
            without.push(Entry { name, path: folder.path, what });
            continue;
        }
        // So that files of several repositories are named apart.
        for Below { names, .. } in &mut found {
            names.splice(0..0, owner.iter().chain([&repo]).cloned());
        }
        let skip = owner.iter().count() + 1;
        files.extend(file::models(found, &|_| (owner.clone(), Some(repo.clone()), skip)));
    }
    let mut entries = file::entries(files, root);
    entries.append(&mut without);
    Ok(entries)
}

/// The model of an entry of the cache at `root`.
pub(crate) fn model(entry: &Entry, tool: Tool, root: &Path) -> Result<Model> {
    let (name, path) = (entry.name.clone(), entry.path.clone());
    match entry.what {
        What::Repository { is_unfinished: true, .. } => {
            Err(Error::Partial { name, path, what: "its download is unfinished".to_owned() })
        }
        What::Repository { .. } => {
            Err(Error::NoGguf { name, path, what: "the cache has other files of it" })
        }
        _ => of_file(entry, tool, Some(root)),
    }
}

/// Of `models--owner--repo` the two; old models have no owner.
fn repository(folder: &str) -> Option<(Option<String>, String)> {
    let id = folder.strip_prefix("models--")?;
    let (owner, repo) = id.split_once("--").map_or((None, id), |(o, r)| (Some(o), r));
    let is_part = |part: &str| {
        let is_kept = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
        !part.is_empty() && !part.starts_with('.') && part.bytes().all(is_kept)
    };
    let is_whole = owner.is_none_or(is_part) && is_part(repo);
    is_whole.then(|| (owner.map(str::to_owned), repo.to_owned()))
}

/// The model files of a repository; where there are none, whether one has begun to be loaded.
fn files_of(folder: &Path, left: &mut Left) -> Result<(Vec<Below>, bool)> {
    let found = match snapshot(folder, left)? {
        Some(snapshot) => disk::walk(&snapshot, left, &file::is_model_file)?,
        None => Vec::new(),
    };
    if !found.is_empty() {
        return Ok((found, false));
    }
    let blobs = disk::entries(&folder.join("blobs"), left)?;
    Ok((found, blobs.iter().any(|blob| blob.name.ends_with(INCOMPLETE))))
}

/// The snapshot of a repository that is used.
fn snapshot(folder: &Path, left: &mut Left) -> Result<Option<PathBuf>> {
    let snapshots = folder.join("snapshots");
    let mut references = disk::entries(&folder.join("refs"), left)?;
    references.sort_by_key(|reference| reference.name != "main");
    for reference in references {
        let Ok(text) = disk::read(&reference.path, limits::MAX_SMALL_FILE_BYTES) else { continue };
        let commit = String::from_utf8(text).unwrap_or_default();
        let snapshot = snapshots.join(commit.trim());
        if is_commit(commit.trim()) && snapshot.is_dir() {
            return Ok(Some(snapshot));
        }
    }
    let mut all = disk::entries(&snapshots, left)?;
    all.retain(|snapshot| is_commit(&snapshot.name));
    Ok(all.into_iter().map(|s| s.path).max_by_key(|path| (disk::modified(path), path.clone())))
}

fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|b| b.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_repositories() {
        let own = |o: &str, r: &str| Some((Some(o.to_owned()), r.to_owned()));
        assert_eq!(repository("models--o--r-GGUF"), own("o", "r-GGUF"));
        assert_eq!(repository("models--gpt2"), Some((None, "gpt2".to_owned())));
        for other in ["datasets--o--r", "models--", "models--o--", "models--o--..", "models--a b"] {
            assert_eq!(repository(other), None, "{other}");
        }
    }
}

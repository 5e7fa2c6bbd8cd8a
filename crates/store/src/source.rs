//! What every store is to the others: names, and models behind them.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::error::Result;
use crate::file::{self, File};
use crate::name::Query;
use crate::ollama;
use crate::store::{Model, Tool};

/// One program's store.
pub(crate) trait Source: fmt::Debug + Send + Sync {
    /// Whose it is.
    fn tool(&self) -> Tool;

    /// Where it is.
    fn root(&self) -> &Path;

    /// All names that it has; none if there is no such store.
    fn entries(&self) -> Result<Vec<Entry>>;

    /// The model of an entry. Looks at the lengths of its files.
    fn model(&self, entry: &Entry) -> Result<Model>;

    /// Looks closer at the model that a name means: at what its file begins with.
    fn check(&self, _: &Entry, _: &Query<'_>, model: &Model) -> Result<()> {
        file::check(&model.path)
    }
}

/// A name in a store.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    /// What finds it.
    pub(crate) name: String,
    /// The manifest, file or folder.
    pub(crate) path: PathBuf,
    pub(crate) what: What,
}

/// What a name stands for.
#[derive(Debug, Clone)]
pub(crate) enum What {
    /// A manifest of Ollama's.
    Manifest(ollama::Name),
    /// A file, or the files of a split model.
    File(File),
    /// A repository of which no GGUF is there.
    Repository { owner: Option<String>, repo: String, is_unfinished: bool },
}

/// How well a name says what is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Match {
    /// As its store has it, though it may leave the quantisation open.
    Whole,
    /// By a part of its name: the repository without the owner, or the file.
    Part,
}

impl Entry {
    pub(crate) fn matches(&self, query: &Query<'_>) -> Option<Match> {
        match &self.what {
            What::Manifest(name) => name.matches(query).then_some(Match::Whole),
            What::File(_) if self.name == query.text => Some(Match::Whole),
            What::File(file) => file.matches(query),
            What::Repository { owner, repo, .. } => {
                let found = file::is_repo(owner.as_deref(), repo, query);
                found.filter(|_| query.digest.is_none())
            }
        }
    }

    /// The file that it is, if it is one.
    pub(crate) fn file(&self) -> Option<&File> {
        match &self.what {
            What::File(file) => Some(file),
            _ => None,
        }
    }

    /// Whether it is one of the models that the store has.
    pub(crate) fn is_listed(&self) -> bool {
        !matches!(self.what, What::Repository { is_unfinished: false, .. })
    }
}

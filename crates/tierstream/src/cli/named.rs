//! From what a user calls a model to its file: a path, `demo`, or a name in a store.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io::ErrorKind;
use std::path::{Component, Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use tierstream::demo;
use tierstream_store::{Environment, Error, HubName, Layers, Model, Store, Tool};

use super::output::{self, Failure};

/// A model's file.
#[derive(Debug, Clone)]
pub(crate) struct Named {
    pub(crate) path: PathBuf,
    /// The model of a store, where it was found by its name.
    stored: Option<Model>,
}

impl Named {
    /// The file that `model` names. What a name turned out to be is told, once.
    pub(crate) fn find(model: &Path) -> anyhow::Result<Self> {
        static FOUND: Mutex<BTreeMap<PathBuf, Named>> = Mutex::new(BTreeMap::new());
        let mut found = FOUND.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(named) = found.get(model) {
            return Ok(named.clone());
        }
        let named = look_for(model)?;
        found.insert(model.to_owned(), named.clone());
        Ok(named)
    }

    /// Whether it was found in a store by its name.
    pub(crate) fn is_stored(&self) -> bool {
        self.stored.is_some()
    }

    /// What its name brings along beside the weights.
    pub(crate) fn layers(&self) -> Layers {
        self.stored.as_ref().map(|model| model.layers.clone()).unwrap_or_default()
    }

    /// Where files that are made of the model go by default: beside it, and for another program's into
    /// the current folder.
    pub(crate) fn folder(&self) -> &Path {
        let beside = self.path.parent().filter(|folder| *folder != Path::new(""));
        match &self.stored {
            Some(model) if model.tool != Tool::Folder => Path::new("."),
            _ => beside.unwrap_or(Path::new(".")),
        }
    }

    /// A path with the name that such files begin with.
    pub(crate) fn title(&self) -> PathBuf {
        match &self.stored {
            // Its files are named after checksums.
            Some(Model { name, tool: Tool::Ollama, .. }) => {
                PathBuf::from(format!("{}.gguf", name.replace(['/', ':'], "-")))
            }
            _ => self.path.clone(),
        }
    }
}

fn look_for(model: &Path) -> anyhow::Result<Named> {
    let at = |path: PathBuf| Named { path, stored: None };
    if model == Path::new("demo") || model == Path::new("demo:latest") {
        return Ok(at(the_demo()?));
    }
    let is_name = model.to_str().filter(|_| !is_path(model) && model.symlink_metadata().is_err());
    let Some(name) = is_name else { return Ok(at(model.to_owned())) };
    let model = find(name)?;
    output::note(format!("{} ({}) is {}", model.name, model.tool, model.path.display()));
    if !model.layers.adapters.is_empty() {
        output::note("it runs without its adapter (LoRA), which is not supported");
    }
    Ok(Named { path: model.path.clone(), stored: Some(model) })
}

/// The model of that name in a store.
fn find(name: &str) -> anyhow::Result<Model> {
    let environment = Environment::of_process();
    let found = Store::new(&environment).find(name);
    if found.is_err() {
        missing_folders(&environment).iter().for_each(output::note);
    }
    found.map_err(|error| not_found(name, error))
}

/// Folders that the user names for models, and that are not there.
pub(crate) fn missing_folders(environment: &Environment) -> Vec<String> {
    let ollama = environment.ollama_models.iter().map(|path| ("OLLAMA_MODELS", path));
    let own = environment.folders.iter().map(|path| ("TIERSTREAM_MODELS", path));
    let is_missing = |path: &Path| match path.metadata() {
        Ok(there) => !there.is_dir(),
        Err(error) => error.kind() == ErrorKind::NotFound,
    };
    let missing = ollama.chain(own).filter(|(_, path)| is_missing(path));
    missing.map(|(name, path)| format!("{name}: there is no folder {}", path.display())).collect()
}

/// Stores that could not be searched: which, why, and what to do about it.
pub(crate) fn unsearched(store: &Store) -> Vec<String> {
    let told = |error: Error| {
        let hint = error.hint().map_or(String::new(), |hint| format!("; {hint}"));
        format!("a store could not be searched: {:#}{hint}", anyhow::Error::from(error))
    };
    store.list().unreadable.into_iter().map(told).collect()
}

/// With a hint of the hub, if the name can be one of its.
fn not_found(name: &str, error: Error) -> anyhow::Error {
    let Error::NotFound { nearest, .. } = &error else { return error.into() };
    if HubName::parse(name).is_err() {
        return error.into();
    }
    let pull = format!("`tierstream pull {name}` fetches it from the Hugging Face hub");
    let hint = match error.hint().filter(|_| !nearest.is_empty()) {
        Some(hint) => format!("{hint}; or {pull}"),
        None => format!("{pull}; `tierstream list` tells what is on this machine"),
    };
    Failure::error(error, hint)
}

/// Whether it can be nothing but a path.
fn is_path(model: &Path) -> bool {
    let first = model.components().next();
    matches!(first, None | Some(Component::RootDir | Component::CurDir | Component::ParentDir))
        || first == Some(Component::Normal(OsStr::new("~")))
}

fn the_demo() -> anyhow::Result<PathBuf> {
    let demo = demo::file().map_err(|error| {
        let hint = "set TIERSTREAM_CACHE to a folder that can be written";
        Failure::error(format!("cannot write the demo model: {error}"), hint)
    })?;
    if let Some(why) = &demo.refused {
        output::note(format!("cannot write {why}; the demo model is {}", demo.path.display()));
    }
    Ok(demo.path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_told_from_names() {
        for path in ["/a", "./a", "../a", "~/a", ""] {
            assert!(is_path(Path::new(path)), "{path}");
        }
        for name in ["a", "a:b", "a/b", "hf.co/a/b:c", "a.gguf", "~a"] {
            assert!(!is_path(Path::new(name)), "{name}");
        }
    }
}

//! All stores as one.

use std::collections::HashSet;
use std::fmt;
use std::fs;
use std::path::PathBuf;

use crate::environment::Environment;
use crate::error::{Error, Result};
use crate::folder::Folder;
use crate::hub::Hub;
use crate::llama_cpp::{self, LlamaCpp};
use crate::lm_studio::{self, LmStudio};
use crate::name::{self, Query};
use crate::ollama::{self, Ollama};
use crate::source::{Entry, Match, Source, What};

/// The program that a store belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Tool {
    /// A folder that the user has named for models.
    Folder,
    /// Ollama.
    Ollama,
    /// The cache of the Hugging Face hub.
    HuggingFace,
    /// LM Studio.
    LmStudio,
    /// llama.cpp.
    LlamaCpp,
}

impl Tool {
    /// For programs: `ollama`, `hugging_face`, ...
    pub fn id(self) -> &'static str {
        match self {
            Tool::Folder => "folder",
            Tool::Ollama => "ollama",
            Tool::HuggingFace => "hugging_face",
            Tool::LmStudio => "lm_studio",
            Tool::LlamaCpp => "llama_cpp",
        }
    }
}

impl fmt::Display for Tool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Tool::Folder => "folder",
            Tool::Ollama => "Ollama",
            Tool::HuggingFace => "Hugging Face",
            Tool::LmStudio => "LM Studio",
            Tool::LlamaCpp => "llama.cpp",
        })
    }
}

/// A model that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Model {
    /// A name that finds it again, and says what was left open of the one that was given.
    pub name: String,
    /// Whose it is.
    pub tool: Tool,
    /// The GGUF, or a packed model; of a split one the first file.
    pub path: PathBuf,
    /// Bytes of all its files.
    pub bytes: u64,
    /// What else belongs to it.
    pub layers: Layers,
}

/// The files of a model beside its weights, as Ollama has them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Layers {
    /// LoRAs, GGUFs.
    pub adapters: Vec<PathBuf>,
    /// For images, GGUFs.
    pub projectors: Vec<PathBuf>,
    /// Chat template, of Go's package text/template.
    pub template: Option<PathBuf>,
    /// System prompt.
    pub system: Option<PathBuf>,
    /// Sampling, a JSON object.
    pub params: Option<PathBuf>,
}

/// A name that a store has.
#[derive(Debug)]
pub struct Listed {
    /// The name.
    pub name: String,
    /// Whose it is.
    pub tool: Tool,
    /// Its manifest or file.
    pub path: PathBuf,
    /// The model, or why it cannot be used. Its file's header was not looked at.
    pub model: Result<Model>,
}

/// All that there is.
#[derive(Debug, Default)]
pub struct Listing {
    /// Names, store by store, each in order.
    pub models: Vec<Listed>,
    /// Stores that could not be read.
    pub unreadable: Vec<Error>,
}

/// The stores of this machine.
#[derive(Debug)]
pub struct Store {
    sources: Vec<Box<dyn Source>>,
}

impl Store {
    /// Those that the environment tells of, in the order in which they are asked: the user's folders,
    /// Ollama's (the user's, then the service's), the Hugging Face cache, LM Studio's, llama.cpp's.
    /// Nothing is read but LM Studio's settings.
    pub fn new(environment: &Environment) -> Self {
        let e = environment;
        let mut store = Self { sources: Vec::new() };
        let mut seen = HashSet::new();
        let folders = e.folders.iter().cloned().map(Folder::new);
        folders.for_each(|folder| store.add(&mut seen, folder));
        ollama::roots(e).into_iter().for_each(|root| store.add(&mut seen, Ollama::new(root)));
        e.hub_cache().into_iter().for_each(|root| store.add(&mut seen, Hub::new(root)));
        let lm_studio = lm_studio::roots(e).into_iter().map(LmStudio::new);
        lm_studio.for_each(|folder| store.add(&mut seen, folder));
        let llama_cpp = llama_cpp::root(e);
        llama_cpp.into_iter().for_each(|root| store.add(&mut seen, LlamaCpp::new(root)));
        store
    }

    /// A folder is the store of one program.
    fn add(&mut self, seen: &mut HashSet<PathBuf>, source: impl Source + 'static) {
        let root = source.root();
        if seen.insert(fs::canonicalize(root).unwrap_or_else(|_| root.to_owned())) {
            self.sources.push(Box::new(source));
        }
    }

    /// The model of this name, from the first store that has it: there, and its file begins as one does.
    ///
    /// A name is Ollama's (`qwen3:30b`, `hf.co/owner/repo:Q4_K_M`), that of a repository with or without
    /// a quantisation (`owner/repo:Q4_K_M`), or that of a file as it is listed. Where no store has that,
    /// a part of a name will do: the repository without its owner, or the file with or without its
    /// ending. Without a quantisation, Q4_K_M is taken where there are several.
    ///
    /// # Errors
    /// All of [`Error`].
    pub fn find(&self, name: &str) -> Result<Model> {
        let query = Query::parse(name)?;
        let (mut stores, mut unreadable, mut failed) = (Vec::new(), None, None);
        for source in &self.sources {
            match source.entries() {
                Ok(entries) => stores.push((source, entries)),
                Err(error) => drop(unreadable.get_or_insert(error)),
            }
        }
        for how in [Match::Whole, Match::Part] {
            for (source, entries) in &stores {
                let Some(entry) = pick(&query, how, entries)? else { continue };
                let model = source.model(entry);
                match model.and_then(|m| source.check(entry, &query, &m).map(|()| m)) {
                    Ok(model) => return Ok(model),
                    // Another store may have all of it.
                    Err(error) => drop(failed.get_or_insert(error)),
                }
            }
        }
        let entries = stores.iter().flat_map(|(_, entries)| entries);
        let names = entries.filter(|entry| entry.is_listed()).map(|entry| entry.name.as_str());
        Err(failed.unwrap_or_else(|| Error::NotFound {
            name: name.to_owned(),
            nearest: name::nearest(query.text, names),
            unreadable: unreadable.map(Box::new),
        }))
    }

    /// All names that there are. Looks at the lengths of files, and at Ollama's manifests.
    pub fn list(&self) -> Listing {
        let mut listing = Listing::default();
        for source in &self.sources {
            let mut entries = match source.entries() {
                Ok(entries) => entries,
                Err(error) => {
                    listing.unreadable.push(error);
                    continue;
                }
            };
            entries.sort_by(|a, b| a.name.cmp(&b.name));
            listing.models.extend(entries.into_iter().filter(Entry::is_listed).map(|entry| {
                Listed {
                    model: source.model(&entry),
                    name: entry.name,
                    tool: source.tool(),
                    path: entry.path,
                }
            }));
        }
        listing
    }
}

/// Which of the entries the name means; none if it means none.
fn pick<'a>(query: &Query<'_>, how: Match, entries: &'a [Entry]) -> Result<Option<&'a Entry>> {
    let meant = |entry: &&Entry| entry.matches(query) == Some(how);
    let mut found: Vec<&Entry> = entries.iter().filter(meant).collect();
    let mut prefer = |is: &dyn Fn(&Entry) -> bool| {
        if found.len() > 1 && found.iter().any(|entry| is(entry)) {
            found.retain(|entry| is(entry));
        }
    };
    // Manifests that differ in case.
    prefer(&|entry| entry.name == query.text);
    prefer(&|entry| !matches!(entry.what, What::Repository { .. }));
    prefer(&|entry| entry.file().is_none_or(|file| !file.is_packed));
    if query.quant().is_none() {
        let usual = |quant: &String| name::same(quant, "Q4_K_M");
        prefer(&|entry| entry.file().and_then(|file| file.quant.as_ref()).is_some_and(usual));
    }
    match found[..] {
        [] => Ok(None),
        [entry] => Ok(Some(entry)),
        [entry, ..] if found.iter().all(|e| matches!(e.what, What::Manifest(_))) => Ok(Some(entry)),
        _ => Err(Error::Ambiguous {
            name: query.text.to_owned(),
            candidates: found.iter().map(|entry| entry.name.clone()).collect(),
        }),
    }
}

//! A folder of models: GGUFs and packed ones, at any depth.

use std::path::{Path, PathBuf};

use crate::disk::{self, Left};
use crate::error::Result;
use crate::file;
use crate::source::{Entry, Source, What};
use crate::store::{Model, Tool};

#[derive(Debug)]
pub(crate) struct Folder {
    root: PathBuf,
}

impl Folder {
    pub(crate) fn new(root: PathBuf) -> Self {
        Self { root }
    }
}

impl Source for Folder {
    fn tool(&self) -> Tool {
        Tool::Folder
    }

    fn root(&self) -> &Path {
        &self.root
    }

    fn entries(&self) -> Result<Vec<Entry>> {
        let files = disk::walk(&self.root, &mut Left::new(), &file::is_model_file)?;
        let models = file::models(files, &|_| (None, None, 0));
        Ok(file::entries(models, &self.root))
    }

    fn model(&self, entry: &Entry) -> Result<Model> {
        of_file(entry, self.tool(), None)
    }
}

/// The model of an entry that is a file.
pub(crate) fn of_file(entry: &Entry, tool: Tool, within: Option<&Path>) -> Result<Model> {
    match &entry.what {
        What::File(file) => file.model(entry, tool, within),
        _ => Err(disk::damaged(&entry.path, "it is no file")),
    }
}

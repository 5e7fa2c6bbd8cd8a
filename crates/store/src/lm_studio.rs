//! LM Studio's models: `publisher/model/file.gguf` below a folder that its settings name.

use std::path::{Path, PathBuf};

use crate::disk::{self, Left};
use crate::environment::Environment;
use crate::error::Result;
use crate::file;
use crate::folder::of_file;
use crate::limits;
use crate::source::{Entry, Source};
use crate::store::{Model, Tool};

/// Names its home, in the user's home.
const POINTER: &str = ".lmstudio-home-pointer";

/// Its homes, the newer one first.
const HOMES: [&str; 2] = [".lmstudio", ".cache/lm-studio"];

#[derive(Debug)]
pub(crate) struct LmStudio {
    root: PathBuf,
}

/// The folders of its models: the one in the settings, and those that it takes without.
pub(crate) fn roots(environment: &Environment) -> Vec<PathBuf> {
    let small = |path: &Path| disk::read(path, limits::MAX_SMALL_FILE_BYTES).ok();
    let pointed = environment.at_home(POINTER).and_then(|path| small(&path));
    let pointed = pointed.and_then(|text| String::from_utf8(text).ok());
    let pointed = pointed.map(|text| PathBuf::from(text.trim())).filter(|path| path.is_absolute());
    let usual = HOMES.iter().filter_map(|home| environment.at_home(home));
    let homes: Vec<PathBuf> = pointed.into_iter().chain(usual).collect();
    let set = |home: &PathBuf| {
        let settings: serde_json::Value =
            serde_json::from_slice(&small(&home.join("settings.json"))?).ok()?;
        let folder = PathBuf::from(settings.get("downloadsFolder")?.as_str()?);
        folder.is_absolute().then_some(folder)
    };
    homes.iter().filter_map(set).chain(homes.iter().map(|home| home.join("models"))).collect()
}

impl LmStudio {
    pub(crate) fn new(root: PathBuf) -> Self {
        Self { root }
    }
}

impl Source for LmStudio {
    fn tool(&self) -> Tool {
        Tool::LmStudio
    }

    fn root(&self) -> &Path {
        &self.root
    }

    fn entries(&self) -> Result<Vec<Entry>> {
        let files = disk::walk(&self.root, &mut Left::new(), &file::is_model_file)?;
        let models = file::models(files, &|names| match names {
            [publisher, model, _, ..] => (Some(publisher.clone()), Some(model.clone()), 2),
            _ => (None, None, 0),
        });
        Ok(file::entries(models, &self.root))
    }

    fn model(&self, entry: &Entry) -> Result<Model> {
        // `lms import --symbolic-link` links to files elsewhere.
        of_file(entry, self.tool(), None)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn the_settings_and_the_pointer_name_folders() {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path();
        let environment = Environment { home: Some(home.into()), ..Environment::default() };
        let usual = [home.join(".lmstudio/models"), home.join(".cache/lm-studio/models")];
        assert_eq!(roots(&environment), usual);
        fs::create_dir(home.join(".lmstudio")).unwrap();
        let settings = home.join(".lmstudio/settings.json");
        for (text, is_taken) in [
            (r#"{"downloadsFolder": "/big/models"}"#, true),
            (r#"{"downloadsFolder": "models"}"#, false),
            (r#"{"downloadsFolder": 1}"#, false),
            ("[", false),
        ] {
            fs::write(&settings, text).unwrap();
            let first = roots(&environment)[0].clone();
            assert_eq!(first == Path::new("/big/models"), is_taken, "{text}");
        }
        fs::write(home.join(POINTER), "/elsewhere\n").unwrap();
        assert_eq!(roots(&environment)[0], Path::new("/elsewhere/models"));
    }
}

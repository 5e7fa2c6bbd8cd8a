//! Names of models in the Hugging Face hub: `[hf.co/]owner/repo[:quant]`, and which files of a repository
//! such a name means.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::disk::Below;
use crate::error::{Error, Result};
use crate::file::{self, File};
use crate::limits;
use crate::name::{self, HUB, same};
use crate::source::What;

/// A model of the hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubName {
    owner: String,
    repo: String,
    which: Which,
}

/// Which of a repository's models.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Which {
    /// The usual one.
    Usual,
    /// That of this quantisation.
    Quant(String),
    /// That of this file, or with this one among its files.
    File(String),
}

/// The quantisation that is meant when none is named.
const USUAL: &str = "Q4_K_M";

/// Bytes of an owner or a repository: as the hub has it.
const PART_BYTES_MAX: usize = 96;

impl HubName {
    /// Reads `[hf.co/|huggingface.co/|hf://]owner/repo[:quant|:file.gguf|/file.gguf]`.
    ///
    /// # Errors
    /// [`Error::HubName`]: it is something else.
    pub fn parse(text: &str) -> Result<Self> {
        let wrong = |what| Error::HubName { name: name::shown(text), what };
        let other = "it is not owner/repo, or owner/repo:quantisation";
        if text.len() > limits::MAX_NAME_BYTES {
            return Err(wrong("it is too long"));
        }
        let is_cut = |rest: &&str| !rest.is_empty();
        let schemes = ["hf://", "https://", "http://"];
        let rest = schemes.iter().find_map(|scheme| text.strip_prefix(scheme)).unwrap_or(text);
        let of_host = rest.split_once('/').filter(|(host, _)| HUB.iter().any(|h| same(h, host)));
        let rest = of_host.map_or(rest, |(_, rest)| rest);
        if of_host.is_none() && rest.len() < text.len() && !text.starts_with("hf://") {
            return Err(wrong(other));
        }
        let (path, tag) = rest.split_once(':').map_or((rest, None), |(p, t)| (p, Some(t)));
        let (owner, rest) = path.split_once('/').ok_or_else(|| wrong(other))?;
        let (repo, file) = rest.split_once('/').map_or((rest, None), |(r, f)| (r, Some(f)));
        if !is_part(owner) || !is_part(repo) || file::is_model_file(repo) {
            return Err(wrong(other));
        }
        let which = match (file, tag.filter(is_cut)) {
            (None, None) if tag.is_some() => return Err(wrong("it ends in a colon")),
            (None, None) => Which::Usual,
            (None, Some(tag)) if same(tag, "latest") => Which::Usual,
            (None, Some(tag)) if file::is_model_file(tag) => Which::File(tag.to_owned()),
            (None, Some(tag)) if is_word(tag) => Which::Quant(tag.to_owned()),
            (Some(file), None) if tag.is_none() && file::is_model_file(file) => {
                Which::File(file.to_owned())
            }
            _ => return Err(wrong(other)),
        };
        match &which {
            Which::File(path) if !is_path(path) => Err(wrong("it has no file's name")),
            _ => Ok(Self { owner: owner.to_owned(), repo: repo.to_owned(), which }),
        }
    }

    /// Who the repository belongs to.
    pub fn owner(&self) -> &str {
        &self.owner
    }

    /// The repository's own name.
    pub fn repo(&self) -> &str {
        &self.repo
    }

    /// Which model of it.
    pub fn which(&self) -> &Which {
        &self.which
    }

    /// The model that is meant, of a repository that has these files: all of its parts in their order.
    /// Without a quantisation that is the one of Q4_K_M, else the first.
    ///
    /// # Errors
    /// - [`Error::NotInRepository`]: there is none.
    /// - [`Error::Ambiguous`]: the quantisation is that of several.
    /// - [`Error::Partial`]: not all of its parts are there.
    pub fn choose(&self, files: &[String]) -> Result<Vec<String>> {
        let below = files.iter().filter(|path| file::is_model_file(path)).map(|path| {
            let names = [&self.owner, &self.repo].into_iter().map(String::as_str);
            let names = names.chain(path.split('/')).map(str::to_owned).collect();
            Below { names, path: PathBuf::from(path) }
        });
        let owner = |_: &[String]| (Some(self.owner.clone()), Some(self.repo.clone()), 2);
        let mut entries = file::entries(file::models(below.collect(), &owner), Path::new(""));
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        let models: Vec<(&str, &File)> = entries
            .iter()
            .filter_map(|entry| match &entry.what {
                What::File(file) => Some((entry.name.as_str(), file)),
                _ => None,
            })
            .collect();
        let (name, file) = self.pick(&models)?;
        if let Some(number) = (1..=file.count).find(|number| !file.parts.contains_key(number)) {
            let what = format!("the repository has no part {number} of {}", file.count);
            let path = PathBuf::from(&file.relative);
            return Err(Error::Partial { name: name.to_owned(), path, what });
        }
        Ok(file.parts.values().map(|path| path.display().to_string()).collect())
    }

    fn pick<'a>(&self, models: &[(&'a str, &'a File)]) -> Result<(&'a str, &'a File)> {
        let of_quant = |quant: &str| {
            let all = models.iter().filter(|(_, file)| file.has_quant(quant)).copied();
            plainest(all.collect())
        };
        let (what, found) = match &self.which {
            Which::File(path) => {
                let is_it = |(_, file): &&(&str, &File)| {
                    let is_path = |of: &str| {
                        same(of, path) || of.rsplit('/').next().is_some_and(|name| same(name, path))
                    };
                    file.parts.values().any(|part| part.to_str().is_some_and(is_path))
                };
                (path.clone(), models.iter().filter(is_it).copied().collect())
            }
            Which::Quant(quant) => (quant.clone(), of_quant(quant)),
            Which::Usual => {
                let usual = of_quant(USUAL);
                let first = || models.iter().take(1).copied().collect();
                ("model file".to_owned(), if usual.is_empty() { first() } else { usual })
            }
        };
        match (&found[..], &self.which) {
            ([model], _) | ([model, ..], Which::Usual) => Ok(*model),
            ([], _) => Err(Error::NotInRepository {
                repo: format!("{}/{}", self.owner, self.repo),
                what,
                models: models.iter().map(|(name, _)| (*name).to_owned()).collect(),
            }),
            (several, _) => Err(Error::Ambiguous {
                name: self.to_string(),
                candidates: several.iter().map(|(name, _)| (*name).to_owned()).collect(),
            }),
        }
    }
}

impl fmt::Display for HubName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.owner, self.repo)?;
        match &self.which {
            Which::Usual => Ok(()),
            Which::Quant(tag) => write!(f, ":{tag}"),
            Which::File(path) => write!(f, "/{path}"),
        }
    }
}

/// Of `m-Q4_K_M` and `m-UD-Q4_K_M` the first: those with the fewest words in their names.
fn plainest<'a>(mut all: Vec<(&'a str, &'a File)>) -> Vec<(&'a str, &'a File)> {
    let words = |file: &File| file.stem.split(['-', '.']).count();
    let fewest = all.iter().map(|(_, file)| words(file)).min();
    all.retain(|(_, file)| Some(words(file)) == fewest);
    all
}

/// The owner or the name of a repository. The cache joins them with `--`.
fn is_part(part: &str) -> bool {
    let is_kept = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    let is_edge = |b: Option<&u8>| b.is_some_and(|b| !matches!(b, b'-' | b'.'));
    let bytes = part.as_bytes();
    part.len() <= PART_BYTES_MAX
        && bytes.iter().copied().all(is_kept)
        && is_edge(bytes.first())
        && is_edge(bytes.last())
        && !part.contains("--")
        && !part.contains("..")
}

fn is_word(tag: &str) -> bool {
    tag.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}

fn is_path(path: &str) -> bool {
    let is_name =
        |name: &str| !matches!(name, "" | "." | "..") && !name.chars().any(char::is_control);
    path.split('/').all(is_name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_parts() {
        let of = |text| {
            let name = HubName::parse(text).unwrap();
            (format!("{}/{}", name.owner, name.repo), name.which)
        };
        let quant = |text: &str| Which::Quant(text.to_owned());
        let file = |text: &str| Which::File(text.to_owned());
        let repo = || "o/R-GGUF".to_owned();
        for (text, which) in [
            ("o/R-GGUF", Which::Usual),
            ("hf.co/o/R-GGUF", Which::Usual),
            ("HuggingFace.co/o/R-GGUF:latest", Which::Usual),
            ("https://huggingface.co/o/R-GGUF", Which::Usual),
            ("hf://o/R-GGUF:UD-Q4_K_XL", quant("UD-Q4_K_XL")),
            ("hf://hf.co/o/R-GGUF:q8_0", quant("q8_0")),
            ("o/R-GGUF:m.gguf", file("m.gguf")),
            ("o/R-GGUF:d/m.gguf", file("d/m.gguf")),
            ("o/R-GGUF/d/m.GGUF", file("d/m.GGUF")),
        ] {
            assert_eq!(of(text), (repo(), which), "{text}");
        }
    }

    #[test]
    fn other_names_are_refused() {
        let long = format!("o/{}", "r".repeat(97));
        for text in [
            "",
            "qwen3:30b",
            "library/qwen3/x",
            "registry.ollama.ai/library/qwen3",
            "https://ollama.com/library/qwen3",
            "/o/r",
            "o/",
            "o/r:",
            "o/r:a b",
            "o/r/f",
            "o/r/f.gguf:Q4",
            "o/r:../m.gguf",
            "o/r//m.gguf",
            "o/..",
            "../r",
            "o--p/r",
            "o/r..s",
            "-o/r",
            "models/m.gguf",
            "o/r\n",
            "o/r:d/\u{7}.gguf",
            &long,
        ] {
            assert!(matches!(HubName::parse(text), Err(Error::HubName { .. })), "{text}");
        }
    }

    fn choose(name: &str, files: &[&str]) -> Result<Vec<String>> {
        let files: Vec<String> = files.iter().map(|&file| file.to_owned()).collect();
        HubName::parse(name).unwrap().choose(&files)
    }

    const FILES: [&str; 9] = [
        "README.md",
        "m-IQ4_XS.gguf",
        "m-Q4_K_M.gguf",
        "m-UD-Q4_K_M.gguf",
        "Q8_0/m-Q8_0-00002-of-00002.gguf",
        "Q8_0/m-Q8_0-00001-of-00002.gguf",
        "m-F16-00001-of-00002.gguf",
        "mmproj-m-Q4_K_M.gguf",
        "m.imatrix.gguf",
    ];

    #[test]
    fn the_usual_model_is_chosen() {
        assert_eq!(choose("o/r", &FILES).unwrap(), ["m-Q4_K_M.gguf"]);
        assert_eq!(choose("o/r", &["b-Q8_0.gguf", "a-Q6_K.gguf"]).unwrap(), ["a-Q6_K.gguf"]);
        assert_eq!(choose("o/r", &["plain.gguf"]).unwrap(), ["plain.gguf"]);
    }

    #[test]
    fn quantisations_and_files_are_chosen() {
        assert_eq!(choose("o/r:iq4_xs", &FILES).unwrap(), ["m-IQ4_XS.gguf"]);
        assert_eq!(choose("o/r:Q4_K_M", &FILES).unwrap(), ["m-Q4_K_M.gguf"]);
        assert_eq!(choose("o/r:UD-Q4_K_M", &FILES).unwrap(), ["m-UD-Q4_K_M.gguf"]);
        let both = ["Q8_0/m-Q8_0-00001-of-00002.gguf", "Q8_0/m-Q8_0-00002-of-00002.gguf"];
        for name in ["o/r:Q8_0", "o/r:m-Q8_0-00002-of-00002.gguf", &format!("o/r/{}", both[0])] {
            assert_eq!(choose(name, &FILES).unwrap(), both, "{name}");
        }
    }

    #[test]
    fn what_is_not_there_is_told_with_what_is() {
        let error = choose("o/r:Q2_K", &FILES).unwrap_err();
        let text = error.to_string();
        assert!(text.starts_with("the repository o/r has no Q2_K; it has "), "{text}");
        assert!(text.contains("o/r:IQ4_XS") && !text.contains("mmproj"), "{text}");
        let error = choose("o/r", &["README.md"]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the repository o/r has no model file; it has no GGUF at all"
        );
        let error = choose("o/r:F16", &FILES).unwrap_err();
        assert!(matches!(error, Error::Partial { .. }), "{error}");
        let error = choose("o/r:Q4_0", &["a-Q4_0.gguf", "b-Q4_0.gguf"]).unwrap_err();
        assert!(matches!(&error, Error::Ambiguous { candidates, .. } if candidates.len() == 2));
    }
}

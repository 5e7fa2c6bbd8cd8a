//! Models as files in folders, and what they are called.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::disk::{self, Below};
use crate::error::{Error, Result};
use crate::limits;
use crate::name::{Query, same};
use crate::source::{Entry, Match, What};
use crate::store::{Layers, Model, Tool};

/// How llama.cpp ends the name of a file that it has not loaded as a whole.
pub(crate) const UNFINISHED: &str = ".downloadInProgress";

/// Whether a file of this name may be a model: a GGUF that is no part beside one, or a packed model.
pub fn is_model_file(name: &str) -> bool {
    // As llama.cpp has them (`gguf_filename_is_model`, `common/download.cpp`).
    const BESIDE: [&str; 6] = ["mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-"];
    let name = name.to_ascii_lowercase();
    let is_gguf = name.ends_with(".gguf") && !BESIDE.iter().any(|word| name.contains(word));
    is_gguf || name.ends_with(".tspack")
}

/// A model in a file, or in several.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct File {
    /// The repository that it is from, where that is known.
    pub(crate) owner: Option<String>,
    pub(crate) repo: Option<String>,
    /// Below the repository, or the root: folders, and the name of the (first) file.
    pub(crate) relative: String,
    /// The name without ending and number.
    pub(crate) stem: String,
    /// The last word of the stem: `Q4_K_M`.
    pub(crate) quant: Option<String>,
    pub(crate) is_packed: bool,
    /// The files that are there, by number.
    pub(crate) parts: BTreeMap<u32, PathBuf>,
    /// How many there should be.
    pub(crate) count: u32,
    is_unfinished: bool,
}

/// Where a file is from, by the names from the root to it: the repository, and how many of the names
/// stand for it.
pub(crate) type Origin<'a> = &'a dyn Fn(&[String]) -> (Option<String>, Option<String>, usize);

/// The models that these files are.
pub(crate) fn models(files: Vec<Below>, origin: Origin<'_>) -> Vec<File> {
    let mut all: BTreeMap<(Vec<String>, String, u32), File> = BTreeMap::new();
    for Below { names, path } in files {
        let (owner, repo, skip) = origin(&names);
        let Some((name, folders)) = names[skip..].split_last() else { continue };
        let is_unfinished = name.ends_with(UNFINISHED);
        let name = name.strip_suffix(UNFINISHED).unwrap_or(name);
        let Some((whole, ending)) = name.rsplit_once('.') else { continue };
        let (stem, number, count) = split_name(whole);
        let key = (names[..names.len() - 1].to_vec(), format!("{stem}.{ending}"), count);
        let relative = folders.iter().map(String::as_str).chain([name]).collect::<Vec<_>>();
        let file = all.entry(key).or_insert_with(|| File {
            owner,
            repo,
            relative: relative.join("/"),
            stem: stem.to_owned(),
            quant: quant(stem),
            is_packed: same(ending, "tspack"),
            parts: BTreeMap::new(),
            count,
            is_unfinished: false,
        });
        match is_unfinished {
            true => file.is_unfinished = true,
            false => drop(file.parts.insert(number, path)),
        }
    }
    for file in all.values_mut() {
        // Where the whole file is there, too, that one is meant.
        let have = u32::try_from(file.parts.len()).unwrap_or(u32::MAX);
        file.is_unfinished &= have < file.count;
    }
    all.into_values().collect()
}

/// Entries with the shortest names that tell them apart.
pub(crate) fn entries(files: Vec<File>, root: &Path) -> Vec<Entry> {
    let mut times: BTreeMap<String, usize> = BTreeMap::new();
    for file in &files {
        *times.entry(file.short_name().to_ascii_lowercase()).or_default() += 1;
    }
    let entry = |file: File| {
        let short = file.short_name();
        let is_alone = times[&short.to_ascii_lowercase()] == 1;
        let first = file.parts.values().next().cloned();
        Entry {
            name: if is_alone { short } else { file.long_name() },
            path: first.unwrap_or_else(|| root.join(&file.relative)),
            what: What::File(file),
        }
    };
    files.into_iter().map(entry).collect()
}

/// Whether a name means the repository, and how.
pub(crate) fn is_repo(owner: Option<&str>, repo: &str, query: &Query<'_>) -> Option<Match> {
    match (owner, &query.parts_in_hub()[..]) {
        (Some(owner), [a, b]) if same(owner, a) && same(repo, b) => Some(Match::Whole),
        (None, [b]) if same(repo, b) => Some(Match::Whole),
        (Some(_), [b]) if same(repo, b) => Some(Match::Part),
        _ => None,
    }
}

/// Looks at what the file begins with: a GGUF, or a packed model.
pub(crate) fn check(path: &Path) -> Result<()> {
    let mut head = [0; 4];
    let is_file = fs::metadata(path).is_ok_and(|file| file.is_file());
    let read = is_file && fs::File::open(path).is_ok_and(|mut f| f.read_exact(&mut head).is_ok());
    let is_gguf = read && head == *b"GGUF";
    if !is_gguf && !tierstream_pack::is_packed(path) {
        // The reader tells what it is instead.
        tierstream_gguf::Model::open(path)?;
    }
    Ok(())
}

impl File {
    pub(crate) fn matches(&self, query: &Query<'_>) -> Option<Match> {
        if query.digest.is_some() {
            return None;
        }
        let parts = query.parts_in_hub();
        if query.tag.is_none() && same(&self.long_name(), &parts.join("/")) {
            return Some(Match::Whole);
        }
        let is_meant = query.quant().is_none_or(|tag| self.has_quant(tag));
        let repo = self.repo.as_ref();
        if let Some(found) = repo.and_then(|repo| is_repo(self.owner.as_deref(), repo, query)) {
            return is_meant.then_some(found);
        }
        let [name] = parts[..] else { return None };
        let file_name = self.relative.rsplit('/').next().unwrap_or_default();
        let is_whole = query.tag.is_none() && (same(file_name, name) || same(&self.stem, name));
        (is_whole || is_meant && same(self.base(), name)).then_some(Match::Part)
    }

    /// Whether the name ends with `tag`, which may have several words: `UD-Q4_K_XL`.
    pub(crate) fn has_quant(&self, tag: &str) -> bool {
        let Some(at) = self.stem.len().checked_sub(tag.len()) else { return false };
        let is_word = at == 0 || matches!(self.stem.as_bytes()[at - 1], b'-' | b'.');
        is_word && self.stem.is_char_boundary(at) && same(&self.stem[at..], tag)
    }

    /// The stem without the quantisation.
    fn base(&self) -> &str {
        let cut = self.quant.as_ref().map_or(0, |quant| quant.len() + 1);
        &self.stem[..self.stem.len() - cut]
    }

    fn short_name(&self) -> String {
        match (&self.owner, &self.repo, &self.quant) {
            (Some(owner), Some(repo), Some(quant)) if !self.is_packed => {
                format!("{owner}/{repo}:{quant}")
            }
            _ if self.is_packed || self.repo.is_some() => self.long_name(),
            _ => self.stem.clone(),
        }
    }

    fn long_name(&self) -> String {
        let parts = [self.owner.as_deref(), self.repo.as_deref(), Some(&self.relative)];
        parts.into_iter().flatten().collect::<Vec<_>>().join("/")
    }

    /// The model, with all its files, none of them outside of `within`.
    pub(crate) fn model(&self, entry: &Entry, tool: Tool, within: Option<&Path>) -> Result<Model> {
        let partial = |path: &Path, what: String| Error::Partial {
            name: entry.name.clone(),
            path: path.to_owned(),
            what,
        };
        if self.is_unfinished {
            return Err(partial(&entry.path, "its download is unfinished".to_owned()));
        }
        let mut bytes = 0u64;
        for number in 1..=self.count {
            let Some(path) = self.parts.get(&number) else {
                let what = format!("part {number} of {} is missing", self.count);
                return Err(partial(&entry.path, what));
            };
            let len =
                within.map_or_else(|| disk::len(path), |root| disk::len_within(path, root))?;
            let gone = || partial(path, "the file that it links to is not there".to_owned());
            bytes = bytes.saturating_add(len.ok_or_else(gone)?);
            disk::check_readable(path)?;
        }
        let first = self.parts.get(&1).unwrap_or(&entry.path).clone();
        let layers = Layers::default();
        Ok(Model { name: entry.name.clone(), tool, path: first, bytes, layers })
    }
}

/// Of `model-00001-of-00003` the name, the number, and how many there are; of another name itself.
fn split_name(whole: &str) -> (&str, u32, u32) {
    let number = |text: &str| {
        let is_number = text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
        text.parse().ok().filter(|_| is_number)
    };
    let parse = || {
        let (rest, count) = whole.rsplit_once("-of-")?;
        let (stem, nth) = rest.rsplit_once('-')?;
        let (nth, count): (u32, u32) = (number(nth)?, number(count)?);
        let is_part = (1..=count).contains(&nth) && count <= limits::MAX_SPLIT_FILES;
        is_part.then_some((stem, nth, count))
    };
    parse().unwrap_or((whole, 1, 1))
}

/// What a name ends with, if it looks like a quantisation: as llama.cpp has it (`get_gguf_split_info`),
/// but with a digit in it.
fn quant(stem: &str) -> Option<String> {
    let at = stem.rfind(['-', '.'])?;
    let word = &stem[at + 1..];
    let is_word = word.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    let is_kind = ["q", "iq", "tq", "f", "bf", "fp", "mxfp", "nvfp"].iter().any(|kind| {
        let begins = word.get(..kind.len()).is_some_and(|head| same(head, kind));
        begins && word.as_bytes().get(kind.len()).is_some_and(u8::is_ascii_digit)
    });
    (is_word && is_kind).then(|| word.to_ascii_uppercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn below(paths: &[&str]) -> Vec<Below> {
        let names = |path: &str| path.split('/').map(str::to_owned).collect();
        paths.iter().map(|path| Below { names: names(path), path: path.into() }).collect()
    }

    fn in_repo(names: &[String]) -> (Option<String>, Option<String>, usize) {
        match names {
            [owner, repo, _, ..] => (Some(owner.clone()), Some(repo.clone()), 2),
            _ => (None, None, 0),
        }
    }

    fn named(paths: &[&str]) -> Vec<Entry> {
        entries(models(below(paths), &in_repo), Path::new(""))
    }

    fn names(entries: &[Entry]) -> Vec<&str> {
        entries.iter().map(|entry| entry.name.as_str()).collect()
    }

    #[test]
    fn names_tell_models_apart() {
        let all = named(&[
            "o/r/m-Q4_K_M.gguf",
            "o/r/m-UD-Q4_K_M.gguf",
            "o/r/m-Q8_0.gguf",
            "o/r/m-Q8_0.tspack",
            "p/r/m.gguf",
            "plain-f16.gguf",
            "x/plain-f16.gguf",
            "x/other.gguf",
        ]);
        let expected = [
            "o/r/m-Q4_K_M.gguf",
            "o/r/m-Q8_0.tspack",
            "o/r/m-UD-Q4_K_M.gguf",
            "o/r:Q8_0",
            "other",
            "p/r/m.gguf",
            "plain-f16.gguf",
            "x/plain-f16.gguf",
        ];
        let mut found = names(&all);
        found.sort_unstable();
        assert_eq!(found, expected);
        // Each name finds its model, and no other.
        for entry in &all {
            let query = Query::parse(&entry.name).unwrap();
            let found: Vec<_> =
                all.iter().filter(|other| other.matches(&query).is_some()).collect();
            if !entry.name.starts_with("o/r:") {
                assert!(found.iter().any(|other| other.name == entry.name), "{}", entry.name);
            }
        }
    }

    #[test]
    fn files_have_several_names() {
        let all = named(&["o/r-GGUF/dir/m-UD-Q4_K_XL.gguf", "k-q8_0.gguf"]);
        let finds = |name: &str| {
            let query = Query::parse(name).unwrap();
            names(&all)
                .into_iter()
                .zip(&all)
                .filter(|(_, e)| e.matches(&query).is_some())
                .map(|(n, _)| n)
                .collect::<Vec<_>>()
        };
        for name in [
            "o/r-gguf",
            "O/R-GGUF:Q4_K_XL",
            "hf.co/o/r-GGUF:ud-q4_k_xl",
            "r-GGUF",
            "r-GGUF:latest",
            "m-UD-Q4_K_XL",
            "m-ud-q4_k_xl.gguf",
            "m-UD",
            "o/r-GGUF/dir/m-UD-Q4_K_XL.gguf",
        ] {
            assert_eq!(finds(name), ["o/r-GGUF:Q4_K_XL"], "{name}");
        }
        for name in ["k-q8_0", "k-Q8_0.gguf", "k", "k:Q8_0", "k:latest"] {
            assert_eq!(finds(name), ["k-q8_0"], "{name}");
        }
        for name in ["o/r-GGUF:K_XL", "o/r-GGUF:Q4_K", "x/r-GGUF", "k:Q4_0", "m", "k@0123456789ab"]
        {
            assert_eq!(finds(name), [""; 0], "{name}");
        }
    }

    #[test]
    fn split_models_are_one() {
        let all = models(
            below(&[
                "m-Q4_0-00001-of-00002.gguf",
                "m-Q4_0-00002-of-00002.gguf",
                "n-00002-of-00003.gguf",
                "o-00004-of-00003.gguf",
                "p-1-of-2.gguf",
            ]),
            &in_repo,
        );
        let told: Vec<_> = all.iter().map(|f| (f.stem.as_str(), f.parts.len(), f.count)).collect();
        let expected =
            [("m-Q4_0", 2, 2), ("n", 1, 3), ("o-00004-of-00003", 1, 1), ("p-1-of-2", 1, 1)];
        assert_eq!(told, expected);
        assert_eq!(all[0].quant.as_deref(), Some("Q4_0"));
    }

    #[test]
    fn quantisations_end_names() {
        for (stem, expected) in [
            ("m-Q4_K_M", Some("Q4_K_M")),
            ("m.iq2_xxs", Some("IQ2_XXS")),
            ("m-MXFP4_MOE", Some("MXFP4_MOE")),
            ("m-bf16", Some("BF16")),
            ("Qwen3-30B-A3B", None),
            ("m-instruct", None),
            ("m-quite", None),
            ("Q4_0", None),
        ] {
            assert_eq!(quant(stem).as_deref(), expected, "{stem}");
        }
    }

    #[test]
    fn parts_beside_models_are_none() {
        for name in ["m.gguf", "M.GGUF", "m.tspack"] {
            assert!(is_model_file(name), "{name}");
        }
        for name in
            ["m.bin", "mmproj-m.gguf", "m-imatrix.gguf", "m.gguf.part", "gguf", "mtp-m.gguf"]
        {
            assert!(!is_model_file(name), "{name}");
        }
    }
}

//! Ollama's store: `manifests/<host>/<namespace>/<model>/<tag>`, and blobs named after their SHA-256.
//!
//! Newer versions write `manifests-v2`, where a name is a link to its manifest, which is a blob; there
//! the host of their own registry is called otherwise (`manifest/paths.go`). A manifest may be a list of
//! several, one for each program that runs them.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use sha2::{Digest, Sha256};
use tierstream_gguf::ErrorKind;

use crate::disk::{self, Left};
use crate::environment::Environment;
use crate::error::{Error, Result};
use crate::limits;
use crate::name::{Query, same};
use crate::source::{Entry, Source, What};
use crate::store::{Layers, Model, Tool};

/// Folders of manifests: what is in the first one is newer.
const MANIFESTS: [&str; 2] = ["manifests-v2", "manifests"];

/// What a name has where it does not say (`types/model/name.go`).
const HOST: &str = "registry.ollama.ai";
const NAMESPACE: &str = "library";
const TAG: &str = "latest";

/// [`HOST`] in the newer folder.
const HOST_V2: &str = "ollama.com";

/// How the media types of layers begin.
const IMAGE: &str = "application/vnd.ollama.image.";

/// The programs whose manifest is taken out of a list, the first first; none is a program's own.
const RUNNERS: [&str; 3] = ["ollama", "llamacpp", ""];

#[derive(Debug)]
pub(crate) struct Ollama {
    root: PathBuf,
}

/// The one that is named, or the user's and that of the system's service.
pub(crate) fn roots(environment: &Environment) -> Vec<PathBuf> {
    if let Some(named) = &environment.ollama_models {
        return vec![named.clone()];
    }
    let own = environment.at_home(".ollama/models");
    own.into_iter().chain(environment.ollama_service.clone()).collect()
}

impl Ollama {
    pub(crate) fn new(root: PathBuf) -> Self {
        Self { root }
    }

    fn read(&self, name: &str, path: &Path) -> Result<(Manifest, [u8; 32])> {
        let bytes = self.read_own(path)?;
        let digest = Sha256::digest(&bytes).into();
        let manifest = parse(&bytes).map_err(|what| disk::damaged(path, what))?;
        let Some(list) = manifest.manifests.filter(|list| !list.is_empty()) else {
            return Ok((Manifest { manifests: None, ..manifest }, digest));
        };
        let of = |runner: &str| {
            let mut list = list.iter();
            list.find(|m| same(m.runner.as_deref().unwrap_or_default(), runner))
        };
        let Some(chosen) = RUNNERS.into_iter().find_map(of) else {
            let what = "its weights are for another program";
            return Err(Error::NoGguf { name: name.to_owned(), path: path.to_owned(), what });
        };
        let Some(reference) = chosen.digest.as_deref().filter(|_| chosen.layers.is_none()) else {
            return Ok((chosen.clone(), digest));
        };
        let blob = blob(&self.root, reference).map_err(|what| disk::damaged(path, what))?;
        let child = parse(&self.read_own(&blob)?).map_err(|what| disk::damaged(&blob, what))?;
        Ok((Manifest { manifests: None, ..child }, digest))
    }

    /// A manifest: a file of the store, or a link to one of its blobs.
    fn read_own(&self, path: &Path) -> Result<Vec<u8>> {
        let len = match disk::len_within(path, &self.root) {
            // The folder of blobs may be a link, as to another drive.
            Err(Error::Outside { .. }) => disk::len_within(path, &self.root.join("blobs"))?,
            len => len?,
        };
        if len.is_none() {
            return Err(disk::damaged(path, "it links to a manifest that is not there"));
        }
        disk::read(path, limits::MAX_MANIFEST_BYTES)
    }

    /// The blob of a layer, with all of its bytes.
    fn whole(&self, name: &str, manifest: &Path, layer: &Layer) -> Result<PathBuf> {
        let path = blob(&self.root, &layer.digest).map_err(|what| disk::damaged(manifest, what))?;
        let partial =
            |what: String| Error::Partial { name: name.to_owned(), path: path.clone(), what };
        let folder = self.root.join("blobs");
        match disk::len_within(&path, &folder) {
            Ok(Some(len)) if len == layer.size => disk::check_readable(&path).map(|()| path),
            Ok(Some(len)) => Err(partial(format!("a file of {} bytes has {len}", layer.size))),
            Ok(None) if is_begun(&path) => Err(partial("its download is unfinished".to_owned())),
            Ok(None) => Err(partial("a file of it is missing".to_owned())),
            Err(error) => Err(error),
        }
    }
}

impl Source for Ollama {
    fn tool(&self) -> Tool {
        Tool::Ollama
    }

    fn root(&self) -> &Path {
        &self.root
    }

    fn entries(&self) -> Result<Vec<Entry>> {
        let mut left = Left::new();
        let (mut entries, mut seen) = (Vec::new(), HashSet::new());
        for folder in MANIFESTS {
            let mut level = vec![(self.root.join(folder), Vec::new())];
            for _ in 0..4 {
                let mut next = Vec::new();
                for (path, names) in level {
                    for entry in disk::entries(&path, &mut left)? {
                        let names: Vec<String> = [&names[..], &[entry.name]].concat();
                        next.push((entry.path, names));
                    }
                }
                level = next;
            }
            for (path, names) in level {
                let Some(name) = Name::of_path(&names).filter(|_| !path.is_dir()) else { continue };
                // In both folders, or with both names of the host.
                if seen.insert(name.clone()) {
                    entries.push(Entry { name: name.short(), path, what: What::Manifest(name) });
                }
            }
        }
        Ok(entries)
    }

    fn model(&self, entry: &Entry) -> Result<Model> {
        let Entry { name, path, .. } = entry;
        let (manifest, _) = self.read(name, path)?;
        let mut weights = Vec::new();
        let (mut layers, mut tensors) = (Layers::default(), 0);
        let blob = |layer: &Layer| {
            blob(&self.root, &layer.digest).map_err(|what| disk::damaged(path, what))
        };
        for layer in manifest.layers.iter().flatten() {
            match layer.media_type.strip_prefix(IMAGE).unwrap_or_default() {
                "model" => weights.push(layer),
                "tensor" => tensors += 1,
                "adapter" => layers.adapters.push(blob(layer)?),
                "projector" => layers.projectors.push(blob(layer)?),
                "template" => layers.template = Some(blob(layer)?),
                "system" => layers.system = Some(blob(layer)?),
                "params" => layers.params = Some(blob(layer)?),
                _ => {}
            }
        }
        let (name, manifest) = (name.clone(), path.clone());
        match weights[..] {
            [] if tensors > 0 => Err(Error::TensorBlobs { name, path: manifest, tensors }),
            [] => Err(Error::NoGguf { name, path: manifest, what: "Ollama has no weights of it" }),
            [layer] => {
                let path = self.whole(&name, &manifest, layer)?;
                Ok(Model { name, tool: self.tool(), path, bytes: layer.size, layers })
            }
            _ => Err(Error::Split { name, path: manifest }),
        }
    }

    fn check(&self, entry: &Entry, query: &Query<'_>, model: &Model) -> Result<()> {
        if let Some(digits) = query.digest {
            let (_, digest) = self.read(&entry.name, &entry.path)?;
            let found: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
            if !found.starts_with(&digits.to_ascii_lowercase()) {
                let (name, path) = (query.text.to_owned(), entry.path.clone());
                return Err(Error::Digest { name, path, found });
            }
        }
        // A blob's name does not tell that it is a part; its header does.
        tierstream_gguf::Model::open(&model.path).map_err(|error| match error.kind() {
            ErrorKind::SplitFileName { .. }
            | ErrorKind::NotFirstPart { .. }
            | ErrorKind::MissingPart { .. } => {
                Error::Split { name: model.name.clone(), path: model.path.clone() }
            }
            _ => Error::NotGguf(error),
        })?;
        Ok(())
    }
}

/// A name with all of its parts.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Name {
    host: String,
    namespace: String,
    model: String,
    tag: String,
}

impl Name {
    /// Of what stands between the folder of manifests and a manifest.
    fn of_path(names: &[String]) -> Option<Self> {
        let [host, namespace, model, tag] = names else { return None };
        Self::of([host, namespace, model, tag])
    }

    /// What a name means in Ollama; none if it can be none of Ollama's.
    fn of_query(query: &Query<'_>) -> Option<Self> {
        let tag = query.tag.unwrap_or(TAG);
        match query.parts()[..] {
            [model] => Self::of([HOST, NAMESPACE, model, tag]),
            [namespace, model] => Self::of([HOST, namespace, model, tag]),
            [host, namespace, model] => Self::of([host, namespace, model, tag]),
            _ => None,
        }
    }

    fn of([host, namespace, model, tag]: [&str; 4]) -> Option<Self> {
        let is_part = |part: &str, most: usize, more: &[u8]| {
            let is_word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
            (1..=most).contains(&part.len())
                && part.bytes().enumerate().all(|(at, b)| is_word(b) || at > 0 && more.contains(&b))
        };
        let is_name = is_part(host, 350, b"-.:")
            && is_part(namespace, 80, b"-")
            && is_part(model, 80, b"-.")
            && is_part(tag, 80, b"-.");
        let host = if same(host, HOST_V2) { HOST } else { host };
        let [host, namespace, model, tag] = [host, namespace, model, tag].map(str::to_owned);
        is_name.then_some(Self { host, namespace, model, tag })
    }

    pub(crate) fn matches(&self, query: &Query<'_>) -> bool {
        Self::of_query(query).is_some_and(|name| {
            same(&self.host, &name.host)
                && same(&self.namespace, &name.namespace)
                && same(&self.model, &name.model)
                && same(&self.tag, &name.tag)
        })
    }

    /// As Ollama shows it.
    fn short(&self) -> String {
        let Self { host, namespace, model, tag } = self;
        match (same(host, HOST), same(namespace, NAMESPACE)) {
            (true, true) => format!("{model}:{tag}"),
            (true, false) => format!("{namespace}/{model}:{tag}"),
            _ => format!("{host}/{namespace}/{model}:{tag}"),
        }
    }
}

/// What a model is made of, as far as it is used here.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Manifest {
    layers: Option<Vec<Layer>>,
    /// In a list: the program that it is for.
    runner: Option<String>,
    /// In a list: where it is kept, if not here.
    digest: Option<String>,
    manifests: Option<Vec<Manifest>>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Layer {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: u64,
}

impl Manifest {
    fn layers_in_all(&self) -> usize {
        let below = self.manifests.iter().flatten().map(Self::layers_in_all).sum::<usize>();
        below.saturating_add(self.layers.as_ref().map_or(0, Vec::len))
    }
}

fn parse(bytes: &[u8]) -> Result<Manifest, String> {
    let wrong = |e: serde_json::Error| format!("the manifest is not as it should be: {e}");
    let manifest: Manifest = serde_json::from_slice(bytes).map_err(wrong)?;
    if manifest.layers_in_all() > limits::MAX_LAYERS {
        return Err(format!("the manifest has more than {} layers", limits::MAX_LAYERS));
    }
    Ok(manifest)
}

/// Where a blob is: in the store, whatever the digest says.
fn blob(root: &Path, digest: &str) -> Result<PathBuf, String> {
    let digits = digest.strip_prefix("sha256").and_then(|rest| rest.strip_prefix([':', '-']));
    let is_digest = |d: &&str| d.len() == 64 && d.bytes().all(|b| b.is_ascii_hexdigit());
    let digits = digits.filter(is_digest).ok_or("the manifest has a digest that is no SHA-256")?;
    Ok(root.join("blobs").join(format!("sha256-{}", digits.to_ascii_lowercase())))
}

/// Whether Ollama has begun to load the blob.
fn is_begun(blob: &Path) -> bool {
    let mut name = blob.as_os_str().to_owned();
    name.push("-partial");
    Path::new(&name).exists()
}

/// Where the blobs of any bytes as a manifest lie; for the fuzzer.
#[doc(hidden)]
pub fn blob_paths(bytes: &[u8], root: &Path) -> Result<Vec<PathBuf>, String> {
    fn add(manifest: &Manifest, root: &Path, all: &mut Vec<PathBuf>) -> Result<(), String> {
        let digests = manifest.layers.iter().flatten().map(|layer| &layer.digest);
        for digest in digests.chain(&manifest.digest) {
            all.push(blob(root, digest)?);
        }
        manifest.manifests.iter().flatten().try_for_each(|child| add(child, root, all))
    }
    let mut all = Vec::new();
    add(&parse(bytes)?, root, &mut all)?;
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_ollamas_defaults() {
        let of = |name| Name::of_query(&Query::parse(name).unwrap()).map(|name| name.short());
        let shown = |name: &str| Some(name.to_owned());
        assert_eq!(of("qwen3"), shown("qwen3:latest"));
        assert_eq!(of("library/qwen3:30b"), shown("qwen3:30b"));
        assert_eq!(of("registry.ollama.ai/library/qwen3:30b"), shown("qwen3:30b"));
        assert_eq!(of("https://ollama.com/library/qwen3:30b"), shown("qwen3:30b"));
        assert_eq!(of("me/mine"), shown("me/mine:latest"));
        assert_eq!(of("hf.co/o/r-GGUF:Q4_K_M"), shown("hf.co/o/r-GGUF:Q4_K_M"));
        assert_eq!(of("localhost:5000/o/r"), shown("localhost:5000/o/r:latest"));
        for other in ["a/b/c/d", "-a", "o.o/m", "a:.b", "a b", "ü", "a:b c"] {
            assert_eq!(of(other), None, "{other}");
        }
        assert_eq!(of(&"a".repeat(81)), None);
    }

    #[test]
    fn names_are_the_same_in_any_case() {
        let name = Name::of([HOST, NAMESPACE, "Qwen3", "30B"]).unwrap();
        let matches = |text| name.matches(&Query::parse(text).unwrap());
        assert!(matches("qwen3:30b") && matches("LIBRARY/QWEN3:30B"));
        assert!(
            !matches("qwen3") && !matches("o/qwen3:30b") && !matches("hf.co/library/qwen3:30b")
        );
    }

    #[test]
    fn digests_lead_to_blobs_and_nowhere_else() {
        let root = Path::new("/s");
        let digits = "aB".repeat(32);
        let expected = root.join("blobs").join(format!("sha256-{}", "ab".repeat(32)));
        for digest in [format!("sha256:{digits}"), format!("sha256-{digits}")] {
            assert_eq!(blob(root, &digest).unwrap(), expected);
        }
        let short = &digits[1..];
        for digest in [
            String::new(),
            digits.clone(),
            format!("sha256:{short}"),
            format!("sha256:{digits}0"),
            format!("sha256:{short}/"),
            format!("sha256:../{}", &digits[3..]),
            format!("md5:{digits}"),
            format!("/etc/sha256:{digits}"),
            format!("sha256:{digits}\0"),
        ] {
            assert!(blob(root, &digest).is_err(), "{digest}");
        }
    }

    #[test]
    fn manifests_that_are_none() {
        let bad = [
            "",
            "[]x",
            "7",
            r#"{"layers": 7}"#,
            r#"{"layers": [{"digest": "x"}]}"#,
            r#"{"layers": [{"digest": "x", "size": -1}]}"#,
            r#"{"layers": [{"digest": null, "size": 1}]}"#,
        ];
        for text in bad {
            assert!(parse(text.as_bytes()).is_err(), "{text}");
        }
        let deep = r#"{"manifests":["#.repeat(1000);
        assert!(parse(deep.as_bytes()).is_err());
        let layer = r#"{"digest":"","size":0},"#;
        let many = layer.repeat(limits::MAX_LAYERS + 1);
        let text = format!(r#"{{"layers":[{}]}}"#, many.trim_end_matches(','));
        assert!(parse(text.as_bytes()).unwrap_err().contains("more than"));
        for text in ["{}", r#"{"layers": null}"#, r#"{"config": {}, "layers": []}"#] {
            assert!(parse(text.as_bytes()).is_ok(), "{text}");
        }
    }
}

//! Stores in temporary folders, as the programs make them.

#![allow(dead_code, reason = "each test file uses a part")]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use tempfile::TempDir;
use tierstream_gguf::write::{TensorSpec, encode};
use tierstream_gguf::{Metadata, TensorType};
use tierstream_store::{Environment, Store};

pub(crate) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A small GGUF; its name makes it another one.
pub(crate) fn gguf(name: &str) -> Vec<u8> {
    gguf_with(name, |_| {})
}

pub(crate) fn gguf_with(name: &str, more: impl FnOnce(&mut Metadata)) -> Vec<u8> {
    let mut metadata = Metadata::new();
    metadata.insert("general.architecture", "toy");
    metadata.insert("general.name", name);
    more(&mut metadata);
    let tensors = [TensorSpec::new("output.weight", TensorType::F32, vec![8])];
    let (mut bytes, header) = encode(&metadata, &tensors).unwrap();
    bytes.resize(usize::try_from(header.file_len()).unwrap(), 0);
    bytes
}

pub(crate) struct Machine {
    dir: TempDir,
    pub(crate) environment: Environment,
}

impl Machine {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let environment = Environment { home: Some(dir.path().into()), ..Environment::default() };
        Self { dir, environment }
    }

    pub(crate) fn store(&self) -> Store {
        Store::new(&self.environment)
    }

    pub(crate) fn home(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn write(&self, path: &str, bytes: &[u8]) -> PathBuf {
        write(&self.home().join(path), bytes)
    }

    pub(crate) fn ollama(&self) -> Ollama {
        Ollama { root: self.home().join(".ollama/models") }
    }

    /// A file of the main snapshot of a repository in the Hugging Face cache, as a link to its blob.
    pub(crate) fn hub_file(&self, repo: &str, file: &str, bytes: &[u8]) -> PathBuf {
        let folder = self.hub(repo);
        fs::create_dir_all(folder.join("refs")).unwrap();
        fs::write(folder.join("refs/main"), COMMIT).unwrap();
        let blob = write(&folder.join("blobs").join(hex(bytes)), bytes);
        let link = folder.join("snapshots").join(COMMIT).join(file);
        fs::create_dir_all(link.parent().unwrap()).unwrap();
        let up = "../".repeat(2 + file.matches('/').count());
        symlink(format!("{up}blobs/{}", blob.file_name().unwrap().to_str().unwrap()), &link)
            .unwrap();
        link
    }

    pub(crate) fn hub(&self, repo: &str) -> PathBuf {
        let folder = format!("models--{}", repo.replace('/', "--"));
        self.home().join(".cache/huggingface/hub").join(folder)
    }
}

pub(crate) struct Ollama {
    pub(crate) root: PathBuf,
}

impl Ollama {
    /// Writes a blob; gives its layer.
    pub(crate) fn layer(&self, kind: &str, bytes: &[u8]) -> String {
        write(&self.blob(bytes), bytes);
        layer(kind, bytes)
    }

    pub(crate) fn blob(&self, bytes: &[u8]) -> PathBuf {
        self.root.join("blobs").join(format!("sha256-{}", hex(bytes)))
    }

    /// Writes a manifest under a full name.
    pub(crate) fn manifest(&self, name: &str, layers: &[String]) -> PathBuf {
        self.manifest_text(name, &manifest(layers))
    }

    pub(crate) fn manifest_text(&self, name: &str, text: &str) -> PathBuf {
        write(&self.root.join("manifests").join(name), text.as_bytes())
    }

    /// As newer versions do it.
    pub(crate) fn manifest_v2(&self, name: &str, layers: &[String]) -> PathBuf {
        let text = manifest(layers);
        let blob = write(&self.blob(text.as_bytes()), text.as_bytes());
        let link = self.root.join("manifests-v2").join(name);
        fs::create_dir_all(link.parent().unwrap()).unwrap();
        let up = "../".repeat(name.matches('/').count() + 1);
        symlink(format!("{up}blobs/{}", blob.file_name().unwrap().to_str().unwrap()), &link)
            .unwrap();
        link
    }

    /// A model of one blob; gives its path.
    pub(crate) fn model(&self, name: &str) -> PathBuf {
        let bytes = gguf(name);
        self.manifest(name, &[self.layer("model", &bytes)]);
        self.blob(&bytes)
    }
}

pub(crate) fn layer(kind: &str, bytes: &[u8]) -> String {
    let kind = format!("application/vnd.ollama.image.{kind}");
    let (digest, size) = (hex(bytes), bytes.len());
    format!(r#"{{"mediaType": "{kind}", "digest": "sha256:{digest}", "size": {size}}}"#)
}

pub(crate) fn manifest(layers: &[String]) -> String {
    format!(
        r#"{{"schemaVersion": 2, "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
        "config": {}, "layers": [{}]}}"#,
        layer("config", b"{}"),
        layers.join(",")
    )
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(crate) fn write(path: &Path, bytes: &[u8]) -> PathBuf {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, bytes).unwrap();
    path.to_owned()
}

/// The names that there are, with `!` before those that cannot be used.
pub(crate) fn listed(store: &Store) -> Vec<String> {
    let listing = store.list();
    assert!(listing.unreadable.is_empty(), "{listing:?}");
    let name = |m: tierstream_store::Listed| match m.model {
        Ok(model) => {
            assert_eq!(model.name, m.name);
            m.name
        }
        Err(_) => format!("!{}", m.name),
    };
    listing.models.into_iter().map(name).collect()
}

//! The stores of other programs, as those make them, for the program to find models in.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;
use sha2::{Digest, Sha256};
use tierstream_synth::{Arch, Spec};

use crate::support::{demo, sorted, stderr, stdout, tierstream};

/// A machine with models of every program.
pub(crate) struct Stores {
    dir: tempfile::TempDir,
}

impl Stores {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let stores = Self { dir };
        stores.fill_ollama();
        stores.fill_others();
        stores
    }

    pub(crate) fn dir(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    fn write(&self, path: &str, bytes: &[u8]) -> PathBuf {
        let path = self.dir(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, bytes).unwrap();
        path
    }

    /// A layer of a model of Ollama's, whose blob is there.
    fn layer(&self, kind: &str, bytes: &[u8]) -> Value {
        let digest = hex(bytes);
        self.write(&format!("home/.ollama/models/blobs/sha256-{digest}"), bytes);
        let kind = format!("application/vnd.ollama.image.{kind}");
        serde_json::json!({"mediaType": kind, "digest": format!("sha256:{digest}"), "size": bytes.len()})
    }

    fn manifest(&self, name: &str, layers: &[Value]) {
        let text = sorted(serde_json::json!({"schemaVersion": 2, "layers": layers})).to_string();
        let path = "home/.ollama/models/manifests/registry.ollama.ai/library";
        self.write(&format!("{path}/{name}"), text.as_bytes());
    }

    /// Another name of Ollama's for the demo model, with these layers (kind, text).
    pub(crate) fn add_name(&self, name: &str, layers: &[(&str, &str)]) {
        let mut all = vec![self.layer("model", &fs::read(demo()).unwrap())];
        all.extend(layers.iter().map(|(kind, text)| self.layer(kind, text.as_bytes())));
        self.manifest(&name.replace(':', "/"), &all);
    }

    /// One whole model, one partial, one split, and one that has a blob for each tensor.
    fn fill_ollama(&self) {
        self.add_name("novelist:31m", &[("template", "{{ .Prompt }}")]);
        self.add_name("novelist:lora", &[("adapter", "lora")]);
        let mut partial = self.layer("model", b"partial");
        partial["size"] = 1000.into();
        self.manifest("partial/latest", &[partial]);
        self.manifest("split/latest", &[self.layer("model", b"one"), self.layer("model", b"two")]);
        let tensors = [self.layer("tensor", b"one"), self.layer("tensor", b"two")];
        self.manifest("tensors/latest", &tensors);
        let mut hostile = self.layer("model", b"hostile");
        hostile["digest"] = "sha256:../../../../secret.gguf".into();
        self.manifest("hostile/latest", &[hostile]);
        self.write("home/secret.gguf", b"GGUF");
    }

    fn fill_others(&self) {
        let written = self.dir("dense.gguf");
        Spec::new(Arch::Llama).write(&written).unwrap();
        let dense = fs::read(&written).unwrap();
        fs::remove_file(written).unwrap();
        let hub = "home/.cache/huggingface/hub/models--o--dense-GGUF";
        let commit = "0123456789abcdef0123456789abcdef01234567";
        self.write(&format!("{hub}/refs/main"), commit.as_bytes());
        let blob = hex(&dense);
        self.write(&format!("{hub}/blobs/{blob}"), &dense);
        let snapshot = self.dir(hub).join("snapshots").join(commit);
        fs::create_dir_all(&snapshot).unwrap();
        for quant in ["F32", "BF16"] {
            let link = snapshot.join(format!("dense-{quant}.gguf"));
            symlink(format!("../../blobs/{blob}"), link).unwrap();
        }
        self.write(
            "home/.lmstudio/models/me/mine/mine-Q4_0.gguf",
            b"This is no model, but a text.\n",
        );
        self.write("home/.cache/llama.cpp/cached.gguf", &dense);
        fs::create_dir_all(self.dir("models/packed")).unwrap();
        let packed = self.dir("models/packed/bundle.tspack");
        let args = ["pack".into(), demo(), "-o".into(), packed];
        assert!(tierstream().args(args).output().unwrap().status.success());
    }

    /// The program on this machine, in an empty folder.
    pub(crate) fn command(&self) -> Command {
        let mut command = tierstream();
        for name in ["OLLAMA_MODELS", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME"] {
            command.env_remove(name);
        }
        let current = self.dir("current");
        fs::create_dir_all(&current).unwrap();
        command
            .env("HOME", self.dir("home"))
            .env("XDG_CACHE_HOME", self.dir("home/.cache"))
            .env("TIERSTREAM_MODELS", self.dir("models"))
            // So that a service of this machine is not asked.
            .env("OLLAMA_MODELS", self.dir("home/.ollama/models"))
            .env_remove("LLAMA_CACHE")
            .current_dir(current);
        command
    }

    pub(crate) fn output(&self, args: &[&str]) -> Output {
        self.command().args(args).output().unwrap()
    }

    pub(crate) fn json(&self, args: &[&str]) -> Value {
        let output = self.output(&[args, &["--json"]].concat());
        assert!(output.status.success(), "{args:?}: {}", stderr(&output));
        sorted(serde_json::from_str(stdout(&output)).expect("one JSON value and nothing else"))
    }

    /// `text` without where the test's folder is, and with short checksums.
    pub(crate) fn without_folders(&self, text: &str) -> String {
        let text = text.replace(self.dir.path().to_str().unwrap(), "DIR");
        let mut parts = text.split("sha256-");
        let first = parts.next().unwrap().to_owned();
        parts.fold(first, |all, part| format!("{all}sha256-{}...{}", &part[..8], &part[64..]))
    }

    /// All files, with their lengths and when they were written to.
    pub(crate) fn state(&self) -> Vec<(PathBuf, u64, std::time::SystemTime)> {
        fn add(path: &Path, all: &mut Vec<(PathBuf, u64, std::time::SystemTime)>) {
            let found = fs::symlink_metadata(path).unwrap();
            all.push((path.to_owned(), found.len(), found.modified().unwrap()));
            if found.is_dir() {
                fs::read_dir(path).unwrap().for_each(|entry| add(&entry.unwrap().path(), all));
            }
        }
        let mut all = Vec::new();
        ["home", "models"].iter().for_each(|folder| add(&self.dir(folder), &mut all));
        all.sort();
        all
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

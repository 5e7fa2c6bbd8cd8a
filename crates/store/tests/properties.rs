//! What must hold for every name and every manifest: nothing leads out of a store, and nothing panics.

mod common;

use std::path::Path;

use common::{Machine, gguf, layer, manifest};
use proptest::prelude::*;
use tierstream_store::{HubName, Which, blob_paths};

/// Texts that could become a path.
fn hostile() -> impl Strategy<Value = String> {
    let word = prop_oneof![
        "[a-zA-Z0-9._:@/\\\\-]{0,12}",
        Just("..".to_owned()),
        Just("/".to_owned()),
        Just("outside".to_owned()),
        Just("outside.gguf".to_owned()),
        Just("inside".to_owned()),
        Just("models".to_owned()),
        Just("library".to_owned()),
        Just("sha256:".to_owned()),
        Just("\0".to_owned()),
        any::<String>(),
    ];
    prop::collection::vec(word, 0..8).prop_map(|words| words.concat())
}

fn digest() -> impl Strategy<Value = String> {
    prop_oneof![hostile(), "sha256[:-][0-9a-fA-F]{64}", "sha256:[0-9a-f./]{64}", "[0-9a-f]{64}"]
}

/// A machine with a model in each store and one outside of all.
fn machine() -> Machine {
    let mut machine = Machine::new();
    machine.environment.folders = vec![machine.home().join("models")];
    machine.write("outside.gguf", &gguf("outside"));
    machine.write("models/inside.gguf", &gguf("inside"));
    machine.write(".lmstudio/models/o/r/inside.gguf", &gguf("inside"));
    machine.write(".cache/llama.cpp/inside.gguf", &gguf("inside"));
    machine.hub_file("o/r", "inside.gguf", &gguf("inside"));
    machine.ollama().model("registry.ollama.ai/library/inside/latest");
    machine
}

fn is_inside(home: &Path, path: &Path) -> bool {
    let path = path.canonicalize().unwrap();
    let stores = ["models", ".lmstudio/models", ".cache", ".ollama/models"];
    stores.iter().any(|store| path.starts_with(home.join(store).canonicalize().unwrap()))
}

#[test]
fn no_name_leads_out_of_the_stores() {
    let machine = machine();
    let store = machine.store();
    let config = ProptestConfig { cases: 512, failure_persistence: None, ..Default::default() };
    proptest!(config, |(name in hostile())| {
        match store.find(&name) {
            Ok(model) => prop_assert!(is_inside(machine.home(), &model.path), "{:?}", model),
            Err(error) => {
                let _ = (error.to_string(), error.hint());
            }
        }
    });
}

#[test]
fn names_of_the_hub_are_parts_of_paths_and_addresses() {
    let part = |part: &str| {
        let is_kept = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        part.chars().all(is_kept) && !part.starts_with('.') && !part.is_empty()
    };
    let name = prop_oneof![
        hostile(),
        "(hf://|https://)?(hf.co/|Huggingface.co/)?[a-zA-Z0-9._-]{1,5}/[a-zA-Z0-9._-]{1,5}(:[a-zA-Z0-9._/-]{0,9}(.gguf)?)?",
    ];
    let config = ProptestConfig { cases: 2048, failure_persistence: None, ..Default::default() };
    proptest!(config, |(text in name, files in prop::collection::vec(hostile(), 0..4))| {
        let Ok(name) = HubName::parse(&text) else { return Ok(()) };
        prop_assert!(part(name.owner()) && part(name.repo()), "{:?}", name);
        if let Which::File(path) = name.which() {
            prop_assert!(path.split('/').all(|part| !matches!(part, "" | "." | "..")), "{}", path);
        }
        // What it is shown as is the same name.
        prop_assert_eq!(HubName::parse(&name.to_string()).unwrap(), name.clone());
        if let Ok(chosen) = name.choose(&files) {
            prop_assert!(!chosen.is_empty() && chosen.iter().all(|file| files.contains(file)));
        }
    });
}

#[test]
fn no_manifest_leads_out_of_the_store() {
    let root = Path::new("/store");
    let blobs = root.join("blobs");
    let config = ProptestConfig { failure_persistence: None, ..Default::default() };
    proptest!(config, |(digests in prop::collection::vec(digest(), 0..4), nested in any::<bool>())| {
        let text = |digest: &String| serde_json::to_string(digest).unwrap();
        let layers: Vec<String> =
            digests.iter().map(|d| format!(r#"{{"digest": {}, "size": 1}}"#, text(d))).collect();
        let mut json = manifest(&layers);
        if nested {
            json = format!(r#"{{"manifests": [{json}]}}"#);
        }
        if let Ok(paths) = blob_paths(json.as_bytes(), root) {
            prop_assert_eq!(paths.len(), digests.len());
            for path in paths {
                prop_assert_eq!(path.parent(), Some(blobs.as_path()));
                let name = path.file_name().unwrap().to_str().unwrap();
                prop_assert!(name.len() == 71 && name.starts_with("sha256-"));
            }
        }
    });
}

#[test]
fn no_text_as_a_manifest_panics() {
    let machine = machine();
    let whole = manifest(&[layer("model", &gguf("inside"))]);
    let config = ProptestConfig { cases: 128, failure_persistence: None, ..Default::default() };
    proptest!(config, |(at in 0..whole.len(), byte in any::<u8>(), cut in any::<bool>())| {
        let mut bytes = whole.clone().into_bytes();
        bytes[at] = byte;
        bytes.truncate(if cut { at } else { bytes.len() });
        let path = machine.home().join(".ollama/models/manifests/registry.ollama.ai/library/m/1");
        common::write(&path, &bytes);
        if let Ok(model) = machine.store().find("m:1") {
            prop_assert!(is_inside(machine.home(), &model.path));
        }
    });
}

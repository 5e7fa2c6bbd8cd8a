//! Ollama's store: whole models, and those that are not.

mod common;

use std::fs;
use std::os::unix::fs::symlink;

use common::{Machine, gguf, gguf_with, hex, layer, listed, manifest, write};
use tierstream_store::{Error, Tool};

const QWEN: &str = "registry.ollama.ai/library/qwen3/30b";

#[test]
fn a_whole_model_is_found_by_its_names() {
    let machine = Machine::new();
    let ollama = machine.ollama();
    let bytes = gguf("qwen3");
    let layers = [
        ollama.layer("model", &bytes),
        ollama.layer("template", b"{{ .Prompt }}"),
        ollama.layer("system", b"Be brief."),
        ollama.layer("params", b"{\"temperature\": 0.6}"),
        ollama.layer("projector", &gguf("eyes")),
        ollama.layer("adapter", &gguf("lora")),
        ollama.layer("license", b"free"),
    ];
    ollama.manifest(QWEN, &layers);
    let store = machine.store();
    for name in ["qwen3:30b", "QWEN3:30B", "library/qwen3:30b", "ollama.com/library/qwen3:30b"] {
        let model = store.find(name).unwrap();
        assert_eq!((model.name.as_str(), model.tool), ("qwen3:30b", Tool::Ollama));
        assert_eq!((&model.path, model.bytes), (&ollama.blob(&bytes), bytes.len() as u64));
        let layers = model.layers;
        assert_eq!(layers.template, Some(ollama.blob(b"{{ .Prompt }}")));
        assert_eq!(layers.system, Some(ollama.blob(b"Be brief.")));
        assert_eq!(layers.params, Some(ollama.blob(b"{\"temperature\": 0.6}")));
        assert_eq!(layers.projectors, [ollama.blob(&gguf("eyes"))]);
        assert_eq!(layers.adapters, [ollama.blob(&gguf("lora"))]);
    }
    assert_eq!(listed(&store), ["qwen3:30b"]);
}

#[test]
fn a_name_without_a_tag_is_the_latest() {
    let machine = Machine::new();
    machine.ollama().model(QWEN);
    let Err(Error::NotFound { nearest, .. }) = machine.store().find("qwen3") else { panic!() };
    assert_eq!(nearest, ["qwen3:30b"]);
    let latest = machine.ollama().model("registry.ollama.ai/library/qwen3/latest");
    assert_eq!(machine.store().find("qwen3").unwrap().path, latest);
    let hub = machine.ollama().model("hf.co/o/r-GGUF/Q4_K_M");
    assert_eq!(machine.store().find("hf.co/o/r-gguf:q4_k_m").unwrap().path, hub);
}

#[test]
fn a_digest_says_which_version_of_a_name() {
    let machine = Machine::new();
    let ollama = machine.ollama();
    let layers = [ollama.layer("model", &gguf("m"))];
    let path = ollama.manifest(QWEN, &layers);
    let digest = hex(manifest(&layers).as_bytes());
    let store = machine.store();
    for digest in [&digest[..12], &digest, &digest.to_uppercase()] {
        assert!(store.find(&format!("qwen3:30b@{digest}")).is_ok());
        assert!(store.find(&format!("qwen3:30b@sha256:{digest}")).is_ok());
    }
    let other = format!("qwen3:30b@sha256:{}", hex(b"other"));
    let Err(Error::Digest { found, path: told, .. }) = store.find(&other) else { panic!() };
    assert_eq!((found, told), (digest, path));
}

#[test]
fn newer_stores_link_manifests_to_blobs() {
    let machine = Machine::new();
    let ollama = machine.ollama();
    let (old, new) = (gguf("old"), gguf("new"));
    ollama.manifest(QWEN, &[ollama.layer("model", &old)]);
    ollama.manifest_v2("ollama.com/library/qwen3/30b", &[ollama.layer("model", &new)]);
    let store = machine.store();
    assert_eq!(store.find("qwen3:30b").unwrap().path, ollama.blob(&new));
    assert_eq!(listed(&store), ["qwen3:30b"]);
    // A link to anything else is not read.
    let secret = machine.write("secret", manifest(&[ollama.layer("model", &new)]).as_bytes());
    symlink(secret, ollama.root.join("manifests-v2/ollama.com/library/qwen3/bad")).unwrap();
    assert!(matches!(store.find("qwen3:bad"), Err(Error::Outside { .. })));
    symlink("nowhere", ollama.root.join("manifests-v2/ollama.com/library/qwen3/none")).unwrap();
    assert!(matches!(store.find("qwen3:none"), Err(Error::Damaged { .. })));
}

#[test]
fn a_list_of_manifests_has_one_for_us() {
    let machine = Machine::new();
    let ollama = machine.ollama();
    let bytes = gguf("m");
    let child = manifest(&[ollama.layer("model", &bytes)]);
    write(&ollama.blob(child.as_bytes()), child.as_bytes());
    let reference =
        format!(r#"{{"digest": "sha256:{}", "runner": "llamacpp"}}"#, hex(child.as_bytes()));
    let other = r#"{"runner": "mlx", "layers": []}"#;
    let list = |all: &[&str]| format!(r#"{{"manifests": [{}]}}"#, all.join(","));
    ollama.manifest_text("registry.ollama.ai/library/m/inline", &list(&[other, &child]));
    ollama.manifest_text("registry.ollama.ai/library/m/kept", &list(&[other, &reference]));
    ollama.manifest_text("registry.ollama.ai/library/m/none", &list(&[other]));
    let store = machine.store();
    for name in ["m:inline", "m:kept"] {
        assert_eq!(store.find(name).unwrap().path, ollama.blob(&bytes), "{name}");
    }
    assert!(matches!(store.find("m:none"), Err(Error::NoGguf { .. })));
}

#[test]
fn models_that_are_not_whole_are_told_as_such() {
    let machine = Machine::new();
    let ollama = machine.ollama();
    let name = |tag: &str| format!("registry.ollama.ai/library/m/{tag}");
    let (gone, begun, short) = (gguf("gone"), gguf("begun"), gguf("short"));
    ollama.manifest(&name("gone"), &[layer("model", &gone)]);
    ollama.manifest(&name("begun"), &[layer("model", &begun)]);
    write(
        &ollama
            .blob(&begun)
            .with_extension("")
            .with_file_name(format!("sha256-{}-partial", hex(&begun))),
        b"GG",
    );
    ollama.manifest(&name("short"), &[ollama.layer("model", &short)]);
    write(&ollama.blob(&short), &short[..10]);
    let part = gguf_with("part", |metadata| {
        metadata.insert("split.no", 0u16);
        metadata.insert("split.count", 2u16);
        metadata.insert("split.tensors.count", 2i32);
    });
    ollama.manifest(&name("part"), &[ollama.layer("model", &part)]);
    let two = [ollama.layer("model", &gguf("1")), ollama.layer("model", &gguf("2"))];
    ollama.manifest(&name("two"), &two);
    let tensors =
        [ollama.layer("tensor", b"1"), ollama.layer("tensor", b"2"), layer("json", b"{}")];
    ollama.manifest(&name("tensors"), &tensors);
    ollama.manifest(&name("cloud"), &[]);
    ollama.manifest(&name("text"), &[ollama.layer("model", b"This is no model.")]);
    let store = machine.store();
    let error = |tag: &str| {
        let error = store.find(&format!("m:{tag}")).unwrap_err();
        let (text, hint) = (error.to_string(), error.hint());
        assert!(hint.is_some() || tag == "text", "{text}");
        (error, text)
    };
    for (tag, why) in [
        ("gone", "a file of it is missing"),
        ("begun", "its download is unfinished"),
        ("short", &format!("a file of {} bytes has 10", short.len())),
    ] {
        let (error, text) = error(tag);
        assert!(matches!(error, Error::Partial { .. }) && text.ends_with(why), "{text}");
    }
    assert!(matches!(error("part").0, Error::Split { .. }));
    assert!(matches!(error("two").0, Error::Split { .. }));
    assert!(matches!(error("tensors").0, Error::TensorBlobs { tensors: 2, .. }));
    assert!(matches!(error("cloud").0, Error::NoGguf { .. }));
    let (text, told) = error("text");
    assert!(matches!(text, Error::NotGguf(_)) && told.contains("begins with"), "{told}");
    let expected =
        ["!m:begun", "!m:cloud", "!m:gone", "m:part", "!m:short", "!m:tensors", "m:text", "!m:two"];
    assert_eq!(listed(&store), expected);
}

#[test]
fn hostile_manifests_are_refused() {
    let machine = Machine::new();
    let ollama = machine.ollama();
    let outside = machine.write("outside.gguf", &gguf("outside"));
    let name = |tag: usize| format!("registry.ollama.ai/library/m/{tag}");
    let digits = "0".repeat(64);
    let digests = [
        "../../../../outside.gguf".to_owned(),
        format!("sha256:../../../../outside.gguf{}", &digits[27..]),
        format!("sha256:{}", outside.display()),
        outside.display().to_string(),
        "sha256:".to_owned(),
        format!("sha256:{digits}/../../outside.gguf"),
    ];
    for (tag, digest) in digests.iter().enumerate() {
        let size = fs::metadata(&outside).unwrap().len();
        let kind = "application/vnd.ollama.image.model";
        let layer = format!(r#"{{"mediaType": "{kind}", "digest": "{digest}", "size": {size}}}"#);
        ollama.manifest(&name(tag), &[layer]);
        let error = machine.store().find(&format!("m:{tag}")).unwrap_err();
        assert!(matches!(error, Error::Damaged { .. }), "{digest}: {error}");
    }
    // A blob that is a link out of the store.
    fs::create_dir(ollama.root.join("blobs")).unwrap();
    let bytes = gguf("linked");
    ollama.manifest(&name(10), &[layer("model", &bytes)]);
    symlink(machine.write("linked.gguf", &bytes), ollama.blob(&bytes)).unwrap();
    let error = machine.store().find("m:10").unwrap_err();
    let Error::Outside { target, .. } = &error else { panic!("{error}") };
    assert!(error.hint().unwrap().contains(target.to_str().unwrap()));
    // What is no file is not opened.
    ollama.manifest(&name(11), &[layer("model", b"folder")]);
    fs::create_dir(ollama.blob(b"folder")).unwrap();
    assert!(matches!(machine.store().find("m:11"), Err(Error::Damaged { .. })));
    // A manifest that would fill the memory.
    let path = ollama.manifest(&name(12), &[]);
    fs::File::options().write(true).open(path).unwrap().set_len(1 << 40).unwrap();
    assert!(matches!(machine.store().find("m:12"), Err(Error::Limit { .. })));
    ollama.manifest_text(&name(13), "{");
    assert!(matches!(machine.store().find("m:13"), Err(Error::Damaged { .. })));
}

#[test]
fn the_users_store_comes_before_the_services() {
    let mut machine = Machine::new();
    let service = common::Ollama { root: machine.home().join("service") };
    machine.environment.ollama_service = Some(service.root.clone());
    let (own, other) =
        (machine.ollama().model(QWEN), service.model("registry.ollama.ai/o/m/latest"));
    service.manifest(QWEN, &[layer("model", b"not there")]);
    let store = machine.store();
    assert_eq!(store.find("qwen3:30b").unwrap().path, own);
    assert_eq!(store.find("o/m").unwrap().path, other);
    // What is whole in one of them is found.
    let path = own.clone();
    fs::remove_file(own).unwrap();
    assert!(
        matches!(machine.store().find("qwen3:30b"), Err(Error::Partial { path: p, .. }) if p == path)
    );
    service.model(QWEN);
    assert!(machine.store().find("qwen3:30b").unwrap().path.starts_with(&service.root));
    // OLLAMA_MODELS stands for both.
    machine.environment.ollama_models = Some(machine.ollama().root);
    assert_eq!(listed(&machine.store()), ["!qwen3:30b"]);
}

#[test]
fn a_store_on_another_drive_is_one() {
    let machine = Machine::new();
    let elsewhere = machine.home().join("big");
    fs::create_dir_all(machine.home().join(".ollama/models")).unwrap();
    fs::create_dir(&elsewhere).unwrap();
    symlink(&elsewhere, machine.home().join(".ollama/models/blobs")).unwrap();
    machine.ollama().model(QWEN);
    assert!(machine.store().find("qwen3:30b").is_ok());
    let v2 = [machine.ollama().layer("model", &gguf("v2"))];
    let link = machine.ollama().manifest_v2("ollama.com/library/v/2", &v2);
    assert!(fs::metadata(link).is_ok());
    assert!(machine.store().find("v:2").is_ok());
}

//! The stores that keep models as files: the Hugging Face cache, LM Studio, llama.cpp, folders.

mod common;

use std::fs;
use std::os::unix::fs::symlink;

use common::{COMMIT, Machine, gguf, listed, write};
use tierstream_store::{Error, Tool};

#[test]
fn the_hugging_face_cache_has_repositories() {
    let machine = Machine::new();
    let q4 = machine.hub_file("o/r-GGUF", "r-Q4_K_M.gguf", &gguf("q4"));
    let q8 = machine.hub_file("o/r-GGUF", "r-Q8_0.gguf", &gguf("q8"));
    machine.hub_file("o/r-GGUF", "mmproj-r-f16.gguf", &gguf("eyes"));
    machine.hub_file("o/r-GGUF", "README.md", b"text");
    let deep = machine.hub_file("p/only", "dir/only-UD-Q2_K_XL.gguf", &gguf("deep"));
    let store = machine.store();
    assert_eq!(listed(&store), ["o/r-GGUF:Q4_K_M", "o/r-GGUF:Q8_0", "p/only:Q2_K_XL"]);
    for (name, path) in [
        ("o/r-gguf:Q8_0", &q8),
        ("hf.co/o/r-GGUF:q4_k_m", &q4),
        ("o/r-GGUF", &q4),
        ("r-GGUF", &q4),
        ("o/r-GGUF/r-Q8_0.gguf", &q8),
        ("p/only", &deep),
        ("p/only:UD-Q2_K_XL", &deep),
        ("only-UD-Q2_K_XL.gguf", &deep),
    ] {
        let model = store.find(name).unwrap();
        assert_eq!((&model.path, model.tool), (path, Tool::HuggingFace), "{name}");
    }
    let Err(Error::NotFound { nearest, .. }) = store.find("o/r-GGUF:Q8_1") else { panic!() };
    assert_eq!(nearest[0], "o/r-GGUF:Q8_0");
}

#[test]
fn several_quantisations_are_ambiguous() {
    let machine = Machine::new();
    machine.hub_file("o/r", "r-Q5_K_M.gguf", &gguf("q5"));
    machine.hub_file("o/r", "r-Q8_0.gguf", &gguf("q8"));
    let store = machine.store();
    let error = store.find("o/r").unwrap_err();
    assert_eq!(error.to_string(), "\"o/r\" can mean o/r:Q5_K_M or o/r:Q8_0");
    let Error::Ambiguous { candidates, .. } = error else { panic!() };
    candidates.iter().for_each(|name| assert_eq!(&store.find(name).unwrap().name, name));
}

#[test]
fn references_choose_the_snapshot() {
    let machine = Machine::new();
    let main = machine.hub_file("o/r", "r-Q8_0.gguf", &gguf("main"));
    let folder = machine.hub("o/r");
    let other = "f".repeat(40);
    let old = write(&folder.join("snapshots").join(&other).join("r-Q8_0.gguf"), &gguf("old"));
    let found = || machine.store().find("o/r").unwrap().path;
    assert_eq!(found(), main);
    let reference = folder.join("refs/main");
    for (text, path) in [(other.as_str(), &old), (COMMIT, &main), ("../../..", &main), ("", &main)]
    {
        fs::write(&reference, text).unwrap();
        if text.len() < 40 {
            // Left to the snapshot that was written last.
            let times = fs::FileTimes::new().set_modified(std::time::SystemTime::UNIX_EPOCH);
            let folder = fs::File::open(old.parent().unwrap()).unwrap();
            folder.set_times(times).unwrap();
        }
        assert_eq!(&found(), path, "{text:?}");
    }
    fs::write(folder.join("refs/v1"), &other).unwrap();
    assert_eq!(found(), old);
}

#[test]
fn the_cache_is_not_left() {
    let machine = Machine::new();
    let outside = machine.write("outside.gguf", &gguf("outside"));
    let snapshot = machine.hub_file("o/r", "r-Q8_0.gguf", &gguf("r"));
    symlink(&outside, snapshot.with_file_name("r-Q4_0.gguf")).unwrap();
    let error = machine.store().find("o/r:Q4_0").unwrap_err();
    assert!(matches!(&error, Error::Outside { target, .. } if target.ends_with("outside.gguf")));
    let folder = machine.write("folder/r-Q2_K.gguf", &gguf("folder"));
    symlink(folder.parent().unwrap(), snapshot.with_file_name("dir")).unwrap();
    assert!(matches!(machine.store().find("o/r:Q2_K"), Err(Error::Outside { .. })));
    symlink("../../blobs/none", snapshot.with_file_name("r-Q6_K.gguf")).unwrap();
    assert!(matches!(machine.store().find("o/r:Q6_K"), Err(Error::Partial { .. })));
    assert_eq!(listed(&machine.store()), ["!o/r:Q2_K", "!o/r:Q4_0", "!o/r:Q6_K", "o/r:Q8_0"]);
}

#[test]
fn repositories_without_a_gguf_say_so() {
    let machine = Machine::new();
    machine.hub_file("o/safe", "model.safetensors", b"weights");
    let begun = machine.hub("o/begun-GGUF");
    write(&begun.join("blobs/0123.incomplete"), b"GG");
    let store = machine.store();
    assert!(matches!(store.find("o/safe"), Err(Error::NoGguf { .. })));
    let error = store.find("o/begun-GGUF:Q4_0");
    assert!(matches!(error, Err(Error::Partial { .. })), "{error:?}");
    assert_eq!(listed(&store), ["!o/begun-GGUF"]);
    // Where another store has one, that is it.
    let path = machine.write(".lmstudio/models/o/safe/safe-Q4_0.gguf", &gguf("safe"));
    assert_eq!(machine.store().find("o/safe").unwrap().path, path);
}

#[test]
fn split_models_need_all_files() {
    let machine = Machine::new();
    let part = |n: u32| format!("Q4_0/r-Q4_0-0000{n}-of-00003.gguf");
    let bytes = gguf("part");
    let first = machine.hub_file("o/r", &part(1), &bytes);
    machine.hub_file("o/r", &part(3), &[&bytes[..], b"3"].concat());
    let error = machine.store().find("o/r:Q4_0").unwrap_err();
    assert!(error.to_string().ends_with("part 2 of 3 is missing"), "{error}");
    machine.hub_file("o/r", &part(2), &[&bytes[..], b"2"].concat());
    let model = machine.store().find("o/r:Q4_0").unwrap();
    assert_eq!((model.path, model.bytes), (first, 3 * bytes.len() as u64 + 2));
    assert_eq!(listed(&machine.store()), ["o/r:Q4_0"]);
}

#[test]
fn lm_studio_has_publishers() {
    let machine = Machine::new();
    let elsewhere = machine.write("big/o/r-GGUF/r-Q4_K_M.gguf", &gguf("set"));
    let settings = format!(r#"{{"downloadsFolder": "{}"}}"#, machine.home().join("big").display());
    machine.write(".lmstudio/settings.json", settings.as_bytes());
    let linked = machine.home().join(".lmstudio/models/me/mine/mine-Q8_0.gguf");
    fs::create_dir_all(linked.parent().unwrap()).unwrap();
    symlink(machine.write("mine-Q8_0.gguf", &gguf("mine")), &linked).unwrap();
    let store = machine.store();
    let model = store.find("o/r-GGUF").unwrap();
    assert_eq!((model.path, model.tool), (elsewhere, Tool::LmStudio));
    assert_eq!(store.find("me/mine:Q8_0").unwrap().path, linked);
    assert_eq!(listed(&store), ["o/r-GGUF:Q4_K_M", "me/mine:Q8_0"]);
}

#[test]
fn llama_cpp_has_flat_files_and_a_hub() {
    let mut machine = Machine::new();
    let flat = machine.write(".cache/llama.cpp/o_r-GGUF_r-Q4_0.gguf", &gguf("flat"));
    machine.write(".cache/llama.cpp/manifest=o=r-GGUF=Q4_0.json", b"{}");
    machine.write(".cache/llama.cpp/manifest=o=r=latest.json", b"{}");
    let plain = machine.write(".cache/llama.cpp/plain.gguf", &gguf("plain"));
    machine.write(".cache/llama.cpp/o_r-GGUF_r-Q8_0.gguf.downloadInProgress", b"GG");
    let store = machine.store();
    assert_eq!(store.find("o/r-GGUF:Q4_0").unwrap().path, flat);
    assert_eq!(store.find("plain").unwrap().path, plain);
    assert!(matches!(store.find("o/r-GGUF:Q8_0"), Err(Error::Partial { .. })));
    assert_eq!(listed(&store), ["o/r-GGUF:Q4_0", "!o/r-GGUF:Q8_0", "plain"]);
    // Newer versions keep the other layout there.
    machine.hub_file("o/new", "new-Q4_0.gguf", &gguf("new"));
    let hub = machine.home().join(".cache/huggingface/hub");
    machine.environment.hf_home = Some(machine.home().join("none"));
    machine.environment.llama_cache = Some(hub);
    let model = machine.store().find("o/new").unwrap();
    assert_eq!(model.tool, Tool::LlamaCpp);
}

#[test]
fn folders_have_files_and_packed_models() {
    let mut machine = Machine::new();
    let root = machine.home().join("models");
    machine.environment.folders = vec![root.clone(), root.join("../models")];
    let path = machine.write("models/m-Q4_0.gguf", &gguf("m"));
    let magic = tierstream_pack::MAGIC;
    let packed = machine.write("models/sub/m-Q4_0.tspack", &[&magic[..], &[0; 64]].concat());
    machine.write("models/other.gguf", b"This is no model.");
    machine.write("models/note.txt", b"text");
    let store = machine.store();
    assert_eq!(listed(&store), ["m-Q4_0", "other", "sub/m-Q4_0.tspack"]);
    for name in ["m-Q4_0", "m-q4_0.gguf", "m", "m:Q4_0"] {
        assert_eq!(store.find(name).unwrap().path, path, "{name}");
    }
    for name in ["m-Q4_0.tspack", "sub/m-Q4_0.tspack"] {
        assert_eq!(store.find(name).unwrap().path, packed, "{name}");
    }
    let error = store.find("other").unwrap_err();
    assert!(matches!(error, Error::NotGguf(_)), "{error}");
    machine.write("models/x/same.gguf", &gguf("x"));
    machine.write("models/y/same.gguf", &gguf("y"));
    let Err(Error::Ambiguous { candidates, .. }) = machine.store().find("same") else { panic!() };
    assert_eq!(candidates, ["x/same.gguf", "y/same.gguf"]);
    assert!(machine.store().find("y/same.gguf").is_ok());
}

#[test]
fn every_listed_name_finds_its_model() {
    let mut machine = Machine::new();
    machine.environment.folders = vec![machine.home().join("models")];
    let files = [
        "models/m.gguf",
        "models/m-Q8_0.gguf",
        "models/r.gguf",
        "models/sub/m.gguf",
        "models/sub/M-q8_0.gguf",
        "models/sub/a:b.gguf",
        "models/a@0123456789ab.gguf",
        "models/s-00001-of-00001.gguf",
        ".lmstudio/models/p/r/r-Q8_0.gguf",
        ".lmstudio/models/p/r/r-UD-Q8_0.gguf",
        ".lmstudio/models/p/r.v2/r.gguf",
        ".lmstudio/models/lone.gguf",
    ];
    for file in files {
        machine.write(file, &gguf(file));
    }
    for file in ["r-Q4_K_M.gguf", "r-Q4_K_S.gguf", "Q2_K/r-Q2_K.gguf", "plain.gguf"] {
        machine.hub_file("o/r", file, &gguf(file));
        machine.hub_file("gpt2", file, &gguf(file));
    }
    let store = machine.store();
    let listing = store.list().models;
    assert_eq!(listing.len(), files.len() + 8, "{listing:?}");
    for listed in listing {
        assert_eq!(store.find(&listed.name).unwrap().path, listed.path, "{}", listed.name);
    }
}

#[test]
fn whole_names_come_before_parts_of_names() {
    let mut machine = Machine::new();
    machine.environment.folders = vec![machine.home().join("models")];
    for quant in ["Q5_0", "Q8_0"] {
        machine.write(&format!("models/qwen3-{quant}.gguf"), &gguf(quant));
    }
    assert!(matches!(machine.store().find("qwen3"), Err(Error::Ambiguous { .. })));
    let latest = machine.ollama().model("registry.ollama.ai/library/qwen3/latest");
    assert_eq!(machine.store().find("qwen3").unwrap().path, latest);
    assert!(machine.store().find("qwen3:Q5_0").unwrap().path.ends_with("qwen3-Q5_0.gguf"));
    // A repository without a GGUF does not stand in the way of one of the same name.
    machine.hub_file("o/model", "model.safetensors", b"weights");
    let path = machine.hub_file("p/model", "model-Q8_0.gguf", &gguf("p"));
    assert_eq!(machine.store().find("model").unwrap().path, path);
}

#[test]
fn a_machine_without_stores_has_no_models() {
    let machine = Machine::new();
    assert_eq!(listed(&machine.store()), [""; 0]);
    let error = machine.store().find("qwen3").unwrap_err();
    assert!(error.hint().unwrap().starts_with("check the path"), "{error}");
}

//! `tierstream pack`, and what runs of what it makes.

use std::fs;
use std::path::{Path, PathBuf};

use tierstream::gguf;
use tierstream_synth::{Arch, Spec};

use crate::support::{PROMPT, demo, json, output, signal, stderr, stdout, tierstream};

fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// The demo model, packed into `dir`.
fn packed(dir: &Path, flags: &[&str]) -> PathBuf {
    let (model, target) = (demo(), dir.join("demo.tspack"));
    let args = ["pack", model.to_str().unwrap(), "-o", target.to_str().unwrap()];
    let output = output(args.iter().chain(flags));
    assert!(output.status.success(), "{output:?}");
    assert!(stdout(&output).starts_with("packed "), "{output:?}");
    // There is no terminal to show progress on.
    assert_eq!(stderr(&output), "");
    target
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let name = |entry: std::io::Result<fs::DirEntry>| entry.unwrap().file_name();
    let mut names: Vec<_> = entries.map(|e| name(e).into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_packed_model_says_what_the_model_says() {
    let dir = folder();
    let run = |model: &Path| {
        let model = model.to_str().unwrap();
        let flags = ["-n", "24", "--temp", "0", "-t", "1", "--experts", "25%"];
        json(&["run", model, PROMPT].iter().chain(&flags).copied().collect::<Vec<_>>())
    };
    let expected = run(&demo());
    for flags in [&[][..], &["--experts-only"]] {
        let target = packed(dir.path(), flags);
        assert_eq!(names(dir.path()), ["demo.tspack"]);
        let got = run(&target);
        assert_eq!(got["tokens"], expected["tokens"]);
        assert_eq!(got["experts"]["faults"], expected["experts"]["faults"]);
        fs::remove_file(target).unwrap();
    }
}

#[test]
fn the_answer_as_json() {
    let dir = folder();
    let model = demo();
    let model = model.to_str().unwrap();
    let answer = json(&["pack", model, "-o", dir.path().to_str().unwrap()]);
    let file = dir.path().join("novelist-moe-31m-q4_0.tspack");
    assert_eq!(answer["model"], model);
    assert_eq!(answer["file"], file.to_str().unwrap());
    assert_eq!(answer["records"], 384);
    assert_eq!(answer["file_bytes"], fs::metadata(&file).unwrap().len());
    assert_eq!(answer["resumed_bytes"], 0);
    assert!(answer["written_bytes"].as_u64() < answer["file_bytes"].as_u64());
    // `show` has told it.
    let packing = &json(&["show", model])["packing"];
    assert_eq!(packing["file_bytes"], answer["file_bytes"]);
    assert_eq!(packing["reads_per_record"], 3.0);
    let shown = json(&["show", file.to_str().unwrap()]);
    assert_eq!(shown["packed"]["originals"][0], "novelist-moe-31m-q4_0.gguf");
    assert_eq!(shown["packed"]["experts_only"], false);
    assert!(shown["packing"].is_null());
    assert_eq!(shown["file_bytes"], answer["file_bytes"]);
}

#[test]
fn verify_looks_at_the_checksums() {
    for flags in [&[][..], &["--experts-only"]] {
        let dir = folder();
        look_at_the_checksums(&packed(dir.path(), flags));
    }
}

fn look_at_the_checksums(target: &Path) {
    let args = ["verify", target.to_str().unwrap(), "--tokens", "4", "-t", "1"];
    let outcome = json(&args);
    assert_eq!(outcome["identical"], true);
    assert_eq!(outcome["checksums"]["records"], 384);
    let mut bytes = fs::read(target).unwrap();
    let last = bytes.len() - 5000;
    bytes[last] ^= 1;
    fs::write(target, bytes).unwrap();
    let output = output(args);
    assert_eq!(output.status.code(), Some(1));
    let told = stderr(&output);
    assert!(told.contains("expert 63 of the tensor \"blk.5.ffn_"), "{told}");
    assert!(told.contains("checksum") && told.contains("hint: "), "{told}");
}

#[test]
fn what_was_killed_goes_on() {
    let dir = folder();
    let mut spec = Spec::new(Arch::Olmoe);
    spec.n_layer = 24;
    let model = spec.write(dir.path().join("model.gguf")).unwrap().files.remove(0);
    let target = dir.path().join("model.tspack");
    let pack = || {
        let mut command = tierstream();
        command.arg("pack").arg(&model);
        command
    };
    let mut child = pack().spawn().unwrap();
    while !dir.path().join("model.tspack.journal").exists() && !target.exists() {
        std::thread::yield_now();
    }
    signal(&child, rustix::process::Signal::KILL);
    child.wait().unwrap();
    if !target.exists() {
        let output = pack().output().unwrap();
        assert!(output.status.success(), "{output:?}");
    }
    assert_eq!(names(dir.path()), ["model.gguf", "model.tspack"]);
    let verified = json(&["verify", target.to_str().unwrap(), "--tokens", "2", "-t", "1"]);
    assert_eq!(verified["identical"], true);
}

#[test]
fn what_cannot_be_packed_is_told() {
    let dir = folder();
    let target = packed(dir.path(), &[]);
    let target = target.to_str().unwrap();
    let dense =
        Spec::new(Arch::Llama).write(dir.path().join("dense.gguf")).unwrap().files.remove(0);
    let dense = dense.to_str().unwrap();
    let nowhere = dir.path().join("no/such/x.tspack");
    for (args, what) in [
        (&["pack", "demo", "-o", target][..], "the file exists"),
        (&["pack", target], "is packed already"),
        (&["pack", dense, "--experts-only"], "the model has no experts"),
        (&["pack", "demo", "-o", nowhere.to_str().unwrap()], "cannot"),
        (&["bench", "decode", target, "--against", "stock"], "cannot load a packed model"),
        (&["bench", "prefill", target, "--against", "stock"], "cannot load a packed model"),
    ] {
        let output = output(args);
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        assert!(stderr(&output).contains(what), "{output:?}");
    }
    assert_eq!(names(dir.path()), ["demo.tspack", "dense.gguf"]);
}

#[test]
fn a_pack_of_experts_needs_the_model() {
    let dir = folder();
    let copy = dir.path().join("model.gguf");
    fs::copy(demo(), &copy).unwrap();
    let run_with = |flags: &[&str]| {
        let target = dir.path().join("packs/model.tspack");
        let args = ["run", target.to_str().unwrap(), PROMPT, "-n", "2", "-t", "1"];
        output([&args, flags].concat())
    };
    let run = || run_with(&[]);
    fs::create_dir(dir.path().join("packs")).unwrap();
    let packs = dir.path().join("packs");
    let packed =
        output(["pack", copy.to_str().unwrap(), "--experts-only", "-o", packs.to_str().unwrap()]);
    assert!(packed.status.success(), "{packed:?}");
    assert!(run().status.success());
    let bytes = fs::read(&copy).unwrap();
    let mut other = bytes.clone();
    // In the name of the architecture.
    other[60] ^= 1;
    for (content, what) in
        [(&other[..], "another header"), (&bytes[..bytes.len() - 1], "bytes now")]
    {
        fs::write(&copy, content).unwrap();
        assert!(stderr(&run()).contains(what), "{:?}", run());
    }
    // Other weights behind the same header: those that the pack lacks are compared.
    let model = gguf::Model::open(demo()).unwrap();
    for (tensor, is_needed) in [("token_embd.weight", true), ("blk.3.ffn_up_exps.weight", false)] {
        let tensor = model.tensor(tensor).unwrap();
        let mut other = bytes.clone();
        other[(tensor.offset + tensor.len / 2) as usize] ^= 1;
        fs::write(&copy, &other).unwrap();
        for flags in [&[][..], &["--experts", "25%"]] {
            let output = run_with(flags);
            assert_eq!(output.status.success(), !is_needed, "{output:?}");
            let told = stderr(&output).contains("the checksum that the packed file has for it");
            assert_eq!(told, is_needed, "{output:?}");
        }
    }
    fs::remove_file(&copy).unwrap();
    assert!(stderr(&run()).contains("../model.gguf"), "{:?}", run());
}

#[test]
fn what_would_fail_in_the_end_or_cost_the_model_is_refused() {
    let dir = folder();
    let copy = dir.path().join("model.gguf");
    fs::copy(demo(), &copy).unwrap();
    let model = copy.to_str().unwrap();
    let missing = format!("{}/new/", dir.path().display());
    for (target, what, hint) in [
        (model, "is the model that is to be packed", "name another file"),
        (&missing, "there is no folder", "mkdir -p"),
    ] {
        let output = output(["pack", model, "-o", target]);
        assert_eq!(output.status.code(), Some(1));
        let told = stderr(&output);
        assert!(told.contains(what) && told.contains(hint), "{told}");
    }
    assert_eq!(names(dir.path()), ["model.gguf"]);
    let told = stderr(&output(["pack", model, "-o", "/proc/x.tspack"])).to_owned();
    assert!(told.contains("hint: ") && told.contains("with -o"), "{told}");
}

//! `--verify-weights`: the first load records, later ones compare, and damage is told with its place.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;

use serde_json::Value;
use sha2::{Digest, Sha256};
use tierstream::gguf;

use crate::support::{PROMPT, demo, stderr, stdout, tierstream};

/// A folder with a copy of the demo model, and a cache folder.
struct Case {
    dir: tempfile::TempDir,
    model: PathBuf,
}

impl Case {
    fn new() -> Self {
        Self::named("model.gguf")
    }

    fn named(name: &str) -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let model = dir.path().join(name);
        fs::copy(demo(), &model).unwrap();
        Self { model, dir }
    }

    fn cache(&self) -> PathBuf {
        self.dir.path().join("cache")
    }

    fn output(&self, verb: &str, model: &Path, flags: &[&str]) -> Output {
        let mut command = tierstream();
        command.env("TIERSTREAM_CACHE", self.cache()).arg(verb).arg(model).args(flags);
        command.output().unwrap()
    }

    /// `run` of a model, with a quarter of its experts.
    fn run(&self, model: &Path, flags: &[&str]) -> Output {
        let fixed = [PROMPT, "-n", "8", "-t", "1", "--temp", "0", "--seed", "1"];
        let pool = ["--experts", "25%", "--verify-weights"];
        self.output("run", model, &[&fixed[..], &pool, flags].concat())
    }

    fn json(&self, model: &Path) -> Value {
        let output = self.run(model, &["--json"]);
        assert!(output.status.success(), "{output:?}");
        serde_json::from_str(stdout(&output)).unwrap()
    }

    /// The records in the cache.
    fn records(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.cache().join("weights"));
        entries.map_or(Vec::new(), |entries| entries.map(|e| e.unwrap().path()).collect())
    }
}

/// Damages a byte of a tensor's share: a model's expert, or the whole.
fn damage(path: &Path, tensor: &str, expert: usize, experts: u64) -> u64 {
    let model = tierstream::pack::open(path).unwrap();
    let tensor = model.tensor(tensor).unwrap();
    let share = tensor.len / experts;
    let at = tensor.offset + expert as u64 * tensor.stride.unwrap_or(share) + share / 2;
    let mut bytes = fs::read(path).unwrap();
    bytes[at as usize] ^= 0x10;
    fs::write(path, bytes).unwrap();
    at
}

#[test]
fn the_first_load_records_and_the_second_compares() {
    let case = Case::new();
    let output = case.run(&case.model, &["--verbose"]);
    assert!(output.status.success(), "{output:?}");
    let told = stderr(&output);
    assert!(told.contains("note: there was nothing to compare the weights with"), "{told}");
    assert!(told.contains("verified: ") && told.contains("reading all of it first"), "{told}");
    let [record] = &case.records()[..] else { panic!("{:?}", case.records()) };
    let text = fs::read_to_string(record).unwrap();
    assert!(text.starts_with("tierstream checksums, version 1, "), "{text}");

    let answer = case.json(&case.model);
    let verified = &answer["verified"];
    assert_eq!(
        (&verified["against"], &verified["record"]),
        (&"record".into(), &record.to_str().into())
    );
    assert!(
        verified["first_read_s"].is_null() && verified["recorded"].as_u64() > Some(1_700_000_000)
    );
    let model = gguf::Model::open(&case.model).unwrap();
    let experts = gguf::Experts::group(&model).unwrap();
    // Of the experts, those that were read; all else once.
    let read = answer["experts"]["bytes_read"].as_u64().unwrap();
    assert_eq!(verified["bytes"].as_u64().unwrap(), experts.dense_bytes() + read);
    let output = case.run(&case.model, &["--verbose"]);
    let told = stderr(&output);
    assert!(
        told.contains("have the checksums recorded on 20") && !told.contains("note:"),
        "{told}"
    );
    // Without the flag, nothing is told, nor compared.
    let output = case.output("run", &case.model, &[PROMPT, "-n", "1", "--json"]);
    let answer: Value = serde_json::from_str(stdout(&output)).unwrap();
    assert!(answer["verified"].is_null());
}

#[test]
fn damaged_weights_are_named_with_file_and_bytes() {
    for (tensor, expert, experts) in [
        ("token_embd.weight", 0, 1),
        ("blk.3.attn_q.weight", 0, 1),
        ("blk.2.ffn_down_exps.weight", 7, 64),
    ] {
        let case = Case::new();
        case.json(&case.model);
        let at = damage(&case.model, tensor, expert, experts);
        // With all experts, so that the one is read.
        let all = ["--verify-weights", "-t", "1", "-n", "1", PROMPT];
        let output = case.output("run", &case.model, &all);
        assert_eq!(output.status.code(), Some(1), "{tensor}: {output:?}");
        let told = stderr(&output);
        let begins = format!("error: {}: damaged weights: ", case.model.display());
        assert!(told.starts_with(&begins), "{told}");
        let bytes = told.split_once("(bytes ").unwrap().1.split_once(')').unwrap().0;
        let (first, last) = bytes.split_once(" to ").unwrap();
        assert!((first.parse::<u64>().unwrap()..=last.parse().unwrap()).contains(&at), "{told}");
        assert!(told.contains(&format!("tensor {tensor} (bytes ")), "{told}");
        assert_eq!(told.contains(&format!("expert {expert} of block 2, ")), experts > 1, "{told}");
        assert!(told.contains(" does not have the checksum recorded on 20"), "{told}");
        let hint = told.split_once("\nhint: ").unwrap().1;
        assert!(hint.contains(case.records()[0].to_str().unwrap()), "{told}");
        // Nobody asks for what nobody wants to know.
        assert!(case.output("run", &case.model, &all[1..]).status.success());
        // What is as it should be is recorded anew when the record is gone.
        fs::remove_file(&case.records()[0]).unwrap();
        assert_eq!(case.json(&case.model)["verified"]["against"], "first_load");
    }
}

#[test]
fn a_packed_model_is_compared_with_its_own_checksums() {
    for flags in [&[][..], &["--experts-only"]] {
        compare_packed(flags);
    }
}

fn compare_packed(flags: &[&str]) {
    let case = Case::new();
    let target = case.dir.path().join("model.tspack");
    let to = ["-o", target.to_str().unwrap()];
    let packed = case.output("pack", &case.model, &[&to, flags].concat());
    assert!(packed.status.success(), "{packed:?}");
    let verified = &case.json(&target)["verified"];
    assert_eq!(verified["against"], "pack");
    assert!(verified["record"].is_null() && verified["first_read_bytes"].is_null());
    assert!(case.records().is_empty());
    damage(&target, "blk.1.ffn_gate_exps.weight", 9, 64);
    let output = case.output("run", &target, &["--verify-weights", "-t", "1", "-n", "1", PROMPT]);
    let told = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{told}");
    let names = "expert 9 of block 1, tensor blk.1.ffn_gate_exps.weight (bytes ";
    assert!(told.contains(names) && told.contains("that the packed file has for it"), "{told}");
}

#[test]
fn a_blob_is_compared_with_its_name_first() {
    let digest = Sha256::digest(fs::read(demo()).unwrap());
    let name: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    let case = Case::named(&format!("sha256-{name}"));
    assert_eq!(case.json(&case.model)["verified"]["against"], "sha256");
    assert_eq!(case.json(&case.model)["verified"]["against"], "record");

    let case = Case::named(&format!("sha256-{name}"));
    damage(&case.model, "blk.3.attn_q.weight", 0, 1);
    let output = case.run(&case.model, &[]);
    let told = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(told.contains("does not have the SHA-256 that its name says"), "{told}");
    assert!(told.contains("hint: ") && case.records().is_empty(), "{told}");
}

#[test]
fn a_record_that_is_damaged_or_cannot_be_written_is_told() {
    let case = Case::new();
    case.json(&case.model);
    let record = &case.records()[0];
    let whole = fs::read_to_string(record).unwrap();
    for (text, told_of) in [
        (whole.replacen("\"recorded\": 1", "\"recorded\": 2", 1), "is damaged"),
        (whole.replacen("version 1", "version 7", 1), "of version 7 are not supported"),
        (String::new(), "is damaged"),
    ] {
        fs::write(record, text).unwrap();
        let output = case.run(&case.model, &[]);
        let told = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{told}");
        assert!(told.contains(told_of) && told.contains("hint: "), "{told}");
        assert!(told.contains(record.to_str().unwrap()), "{told}");
    }
    fs::remove_dir_all(case.cache()).unwrap();
    fs::write(case.cache(), "no folder").unwrap();
    let output = case.run(&case.model, &[]);
    let told = stderr(&output);
    assert!(output.status.success(), "{told}");
    assert!(told.contains("note: the weights' checksums cannot be recorded"), "{told}");
}

#[test]
fn other_verbs_take_it_too() {
    let case = Case::new();
    let flags = ["--verify-weights", "--experts", "25%", "-t", "1", "--json"];
    let verify = case.output("verify", &case.model, &[&flags[..], &["--tokens", "2"]].concat());
    assert!(verify.status.success(), "{verify:?}");
    assert_eq!(case.records().len(), 1);
    let turns = ["-n", "2", "--warmup", "1", "--repeats", "1"];
    let mut bench = tierstream();
    bench.env("TIERSTREAM_CACHE", case.cache()).args(["bench", "decode"]).arg(&case.model);
    let bench = bench.args(flags).args(turns).output().unwrap();
    assert!(bench.status.success(), "{bench:?}");
    let shown = case.output("show", &case.model, &["--verify-weights"]);
    assert!(stderr(&shown).contains("--verify-weights has no effect"), "{shown:?}");

    // Experts are read again and again there.
    damage(&case.model, "blk.0.ffn_up_exps.weight", 3, 64);
    let flags = [&["--verify-weights", "-t", "1"][..], &["--tokens", "16"]].concat();
    let verify = case.output("verify", &case.model, &flags);
    let told = stderr(&verify);
    assert_eq!(verify.status.code(), Some(1), "{verify:?}");
    assert!(told.contains("expert 3 of block 0, tensor blk.0.ffn_up_exps.weight"), "{told}");
}

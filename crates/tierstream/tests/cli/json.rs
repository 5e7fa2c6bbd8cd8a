//! The objects of `--json` keep their shape, and `docs/json.md` tells of every field.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::Value;

use crate::stores::Stores;
use crate::support::{PROMPT, json, output, stderr, stdout};

/// Fields that may be null on another machine.
const NULLABLE: &[&str] = &[
    "cgroup_left_bytes",
    "rotational",
    "mem_align",
    "offset_align",
    "reason",
    "over_limit",
    "emptied",
];

/// `value` with types for values, but for the fields in `keep`; one element for an array.
fn shape(value: &Value, name: &str, keep: &[&str]) -> Value {
    let type_ = |name: &str| Value::from(format!("<{name}>"));
    match value {
        _ if keep.contains(&name) => value.clone(),
        _ if NULLABLE.contains(&name) => type_("value or null"),
        Value::Object(fields) => {
            fields.iter().map(|(k, v)| (k.clone(), shape(v, k, keep))).collect()
        }
        Value::Array(items) => items.iter().take(1).map(|v| shape(v, name, keep)).collect(),
        Value::Null => Value::Null,
        Value::Bool(_) => type_("bool"),
        Value::Number(_) => type_("number"),
        Value::String(_) => type_("string"),
    }
}

fn names(value: &Value, all: &mut BTreeSet<String>) {
    match value {
        Value::Object(fields) => fields.iter().for_each(|(name, value)| {
            // Types of tensors are names in the file's words.
            if !name.chars().any(|c| c.is_uppercase()) {
                all.insert(name.clone());
            }
            names(value, all);
        }),
        Value::Array(items) => items.iter().for_each(|item| names(item, all)),
        _ => {}
    }
}

fn run() -> Value {
    json(&["run", "demo", PROMPT, "-n", "6", "--seed", "0", "--experts", "50%"])
}

fn show() -> Value {
    json(&["show", "demo", "--ram", "1GiB"])
}

fn doctor() -> Value {
    json(&["doctor", "demo"])
}

fn verify() -> Value {
    json(&["verify", "demo", "--tokens", "24"])
}

fn bench() -> Value {
    let args = ["bench", "decode", "demo", "--experts", "100%,25%", "--against", "stock"];
    json(&[&args[..], &["--repeats", "1", "-n", "4", "--warmup", "2"]].concat())
}

fn bench_load() -> Value {
    json(&["bench", "load", "demo", "--warm", "--against", "mmap,direct", "--rounds", "2"])
}

fn bench_io() -> Value {
    let args = ["bench", "io", "demo", "--engines", "pread,buffered", "--blocks", "64KiB"];
    json(&[&args[..], &["--depths", "1,2", "--rounds", "2", "--seconds", "1"]].concat())
}

#[test]
fn verify_object() {
    let object = verify();
    let keep = ["identical", "max_abs_diff", "first_difference"];
    insta::assert_json_snapshot!(shape(&object, "", &keep));
    assert!(object["experts"]["faults"].as_u64() > Some(0));
    let percent = object["experts_percent"].as_f64().unwrap();
    assert!((25.0..26.0).contains(&percent), "{percent}");
}

#[test]
fn bench_object() {
    let object = bench();
    insta::assert_json_snapshot!(shape(&object, "", &["experts", "experts_percent", "name", "to"]));
    let rows = object["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 2);
    assert_eq!(rows[1]["experts"], "25%");
}

#[test]
fn prefill_object() {
    let args = ["bench", "prefill", "demo", "--experts", "25%", "--against", "stock"];
    let object = json(&[&args[..], &["--repeats", "1", "--tokens", "20,40"]].concat());
    insta::assert_json_snapshot!(shape(&object, "", &["experts_percent", "prompt_tokens", "peer"]));
    let rows = object["rows"].as_array().unwrap();
    let bytes = |row: usize, name: &str| rows[row][name].as_u64().unwrap();
    assert!(bytes(0, "bytes_brought") > 0);
    assert_eq!(bytes(0, "bytes_brought"), bytes(0, "bytes_read"));
    assert_eq!((rows.len(), bytes(1, "bytes_brought")), (4, 0));
}

#[test]
fn bench_load_object() {
    let mut object = bench_load();
    let methods = |array: &str| -> Vec<String> {
        let all = object[array].as_array().unwrap().iter();
        all.map(|m| m["method"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(methods("rows"), ["raw", "tierstream", "mmap", "direct"]);
    let measured = methods("rounds");
    for round in measured.chunks(4) {
        assert_eq!(BTreeSet::from_iter(round).len(), 4, "{measured:?}");
    }
    assert_eq!(measured.len(), 8);
    for array in ["rows", "rounds"] {
        object[array].as_array_mut().unwrap().retain(|m| m["method"] == "tierstream");
    }
    insta::assert_json_snapshot!(shape(&object, "", &["method", "cold", "emptied", "round"]));
}

#[test]
fn bench_io_object() {
    let object = bench_io();
    insta::assert_json_snapshot!(shape(&object, "", &["order", "engine", "block_bytes", "depth"]));
    let rows = object["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 8);
    // A record of the demo model's experts.
    assert_eq!(object["record_bytes"], 41_472);
    assert!(object["bytes_read"].as_u64().unwrap() >= 8 * 2 * 16 * 41_472);
}

#[test]
fn a_bench_tells_what_the_pools_hold() {
    let args = ["bench", "decode", "demo", "--experts", "33%,1GiB", "--repeats", "1", "-n", "2"];
    let object = json(&[&args[..], &["--warmup", "0"]].concat());
    let held = |row: usize| object["rows"][row]["experts_percent"].as_f64().unwrap();
    // Whole records of the 384, and no more than there are.
    assert!((held(0) - 100.0 * 127.0 / 384.0).abs() < 1e-9, "{object}");
    assert_eq!(held(1), 100.0);
}

#[test]
fn run_object() {
    let keep = ["stop", "total_bytes", "budget_bytes"];
    insta::assert_json_snapshot!(shape(&run(), "", &keep));
}

#[test]
fn run_numbers_agree() {
    let object = run();
    let experts = &object["experts"];
    let n = |name: &str| experts[name].as_u64().unwrap();
    assert_eq!(n("requests"), n("hits") + n("faults"));
    assert_eq!(n("bytes_read"), n("faults") * 41_472);
    assert!(n("faults") > 0 && n("resident_bytes") <= n("budget_bytes"));
    assert_eq!(object["tokens"].as_array().unwrap().len(), 6);
    assert!(object["tok_s"].as_f64().unwrap() > 0.0);
    assert!(object["peak_rss_bytes"].as_u64().unwrap() > 10 << 20);
}

#[test]
fn show_object() {
    let mut object = show();
    object["model"] = "PATH".into();
    // Measured, in part; `tests/memory.rs` holds them against runs.
    object["ram_bytes_min_estimate"] = "BYTES".into();
    for budget in object["budgets"].as_array_mut().unwrap() {
        budget["ram_bytes_estimate"] = "BYTES".into();
    }
    // Of the drive's blocks.
    object["packing"]["vain_bytes_per_record"] = "BYTES".into();
    insta::assert_json_snapshot!(object);
}

#[test]
fn doctor_object() {
    let mut object = doctor();
    // Of the machine that the tests run on; the fields have a test of their own.
    object["gpu"]["devices"] = Value::Array(Vec::new());
    insta::assert_json_snapshot!(shape(&object, "", &[]));
}

#[test]
fn error_object() {
    let output = output(["show", "/no/such/model.gguf", "--json"]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(stderr(&output), "");
    insta::assert_snapshot!(stdout(&output));
}

fn list() -> Value {
    Stores::new().json(&["list"])
}

/// Of each source a whole model and a broken one, where there are such.
#[test]
fn list_object() {
    let stores = Stores::new();
    let object = stores.json(&["list"]);
    let text = serde_json::to_string_pretty(&object).unwrap();
    insta::assert_snapshot!(stores.without_folders(&text));
}

fn pack() -> Value {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    json(&["pack", "demo", "-o", dir.path().to_str().unwrap()])
}

#[test]
fn every_field_is_documented() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/json.md");
    let text = std::fs::read_to_string(path).unwrap();
    let mut all = BTreeSet::new();
    let objects =
        [run(), show(), doctor(), verify(), bench(), bench_load(), bench_io(), pack(), list()];
    objects.iter().for_each(|object| names(object, &mut all));
    let missing: Vec<&String> =
        all.iter().filter(|name| !text.contains(&format!("`{name}`"))).collect();
    assert!(missing.is_empty(), "docs/json.md does not tell of {missing:?}");
}

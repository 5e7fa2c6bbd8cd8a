//! `tierstream plan`.

use std::path::Path;

use tierstream_synth::{Arch, Spec};

use crate::eval::{shape, trace, undocumented};
use crate::support::{json, output, stderr, stdout};

fn numbers(object: &serde_json::Value, name: &str) -> Vec<f64> {
    let predictions = object["predictions"].as_array().unwrap();
    predictions.iter().map(|p| p[name].as_f64().unwrap()).collect()
}

#[test]
fn the_demo_model_by_the_curves_of_others() {
    let object = json(&["plan", "demo", "-t", "1"]);
    insta::assert_json_snapshot!(shape(&object));
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/json.md");
    let mut missing = Vec::new();
    undocumented(&object, &std::fs::read_to_string(path).unwrap(), &mut missing);
    assert!(missing.is_empty(), "docs/json.md does not tell of {missing:?}");
    assert_eq!(object["curve"]["source"], "bundled");
    // The larger a pool is, the more of it hits, up to all.
    let hits = numbers(&object, "hit_rate");
    assert!(hits.len() > 4 && hits.is_sorted() && hits[0] < 0.6, "{hits:?}");
    assert_eq!(hits.last(), Some(&1.0));
    let [low, mid, high] = ["tok_s_low", "tok_s", "tok_s_high"].map(|name| numbers(&object, name));
    for ((low, mid), high) in low.iter().zip(&mid).zip(&high) {
        assert!(0.0 < *low && low < mid && mid < high, "{object}");
    }
    // As many were missing as was wanted.
    let faults = object["measured"]["faults"].as_array().unwrap();
    let faults: Vec<f64> = faults.iter().map(|f| f["faults"].as_f64().unwrap()).collect();
    assert_eq!(faults, [1.0, 4.0, 8.0]);
}

#[test]
fn sizes_that_are_asked_for_are_told_of() {
    let object = json(&["plan", "demo", "-t", "1", "--experts", "50%,100%"]);
    let pools = numbers(&object, "pool_bytes");
    assert!((pools[0] / pools[1] - 0.5).abs() < 0.01, "{pools:?}");
    assert_eq!(object["predictions"][1]["placement"], "resident_ram");
}

#[test]
fn a_trace_of_another_model_is_an_error() {
    let refused = output(["plan", "demo", "--trace", &trace("olmoe.parquet")]);
    assert_eq!(refused.status.code(), Some(1));
    let told = "the trace is of another model: it has 16 MoE layers with 8 of 64 experts";
    assert!(stderr(&refused).contains(told), "{refused:?}");
}

#[test]
fn what_cannot_run_is_the_error_of_run() {
    for args in [&["plan", "demo"][..], &["run", "demo", "Once"]] {
        let refused = output([args, &["--ram", "1MiB", "-t", "1"]].concat());
        assert_eq!(refused.status.code(), Some(1), "{refused:?}");
        let told = "1.0 MiB is too little memory for this model: it needs at least";
        assert!(stderr(&refused).contains(told), "{refused:?}");
        assert!(stderr(&refused).contains("hint: give it --ram"), "{refused:?}");
    }
}

#[test]
fn of_a_dense_model_no_speed_is_predicted() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("dense.gguf");
    Spec::new(Arch::Llama).write(&path).unwrap();
    let path = path.to_str().unwrap();
    let object = json(&["plan", path]);
    assert_eq!(object["verdict"], "resident");
    assert_eq!(object["predictions"].as_array().unwrap().len(), 0);
    let told = output(["plan", path, "--ram", "1MiB"]);
    assert!(stdout(&told).starts_with("Do not run it here"), "{told:?}");
    assert!(stdout(&told).contains("A smaller quantisation"), "{told:?}");
}

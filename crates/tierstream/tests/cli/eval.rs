//! `tierstream eval`.

use std::path::Path;

use serde_json::Value;

use crate::support::{json, output, stderr, stdout};

/// A public trace of the simulator's own tests.
pub(crate) fn trace(name: &str) -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../eval/tests/data");
    folder.join(name).to_str().unwrap().to_owned()
}

fn rate(object: &Value, curve: usize, point: usize) -> f64 {
    object["curves"][curve]["points"][point]["hit_rate"].as_f64().unwrap()
}

/// `value` with types for values, and one element for an array.
pub(crate) fn shape(value: &Value) -> Value {
    match value {
        Value::Object(fields) => fields.iter().map(|(k, v)| (k.clone(), shape(v))).collect(),
        Value::Array(items) => items.iter().take(1).map(shape).collect(),
        Value::Null => Value::Null,
        Value::Bool(_) => "<bool>".into(),
        Value::Number(_) => "<number>".into(),
        Value::String(_) => "<string>".into(),
    }
}

pub(crate) fn undocumented(value: &Value, text: &str, missing: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                let window = name.parse::<f64>().is_ok();
                if !window && !text.contains(&format!("`{name}`")) {
                    missing.push(name.clone());
                }
                undocumented(value, text, missing);
            }
        }
        Value::Array(items) => items.iter().for_each(|item| undocumented(item, text, missing)),
        _ => {}
    }
}

#[test]
fn objects_keep_their_shape_and_are_documented() {
    let metrics = json(&["eval", "metrics", &trace("gptoss.parquet")]);
    let simulated = json(&["eval", "simulate", &trace("olmoe.parquet"), "--ahead", "previous"]);
    let compared = json(&["eval", "compare", &trace("gptoss.parquet"), &trace("olmoe.parquet")]);
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/json.md");
    let text = std::fs::read_to_string(path).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("page.html");
    let args = ["eval", "report", &trace("olmoe.parquet"), "-o", page.to_str().unwrap()];
    let reported = json(&args);
    for object in [&metrics, &simulated, &compared, &reported] {
        let mut missing = Vec::new();
        undocumented(object, &text, &mut missing);
        assert!(missing.is_empty(), "docs/json.md does not tell of {missing:?}");
    }
    insta::assert_json_snapshot!("eval_metrics", shape(&metrics));
    insta::assert_json_snapshot!("eval_simulate", shape(&simulated));
    insta::assert_json_snapshot!("eval_compare", shape(&compared));
    assert_eq!(compared["same_shape"], false);
}

#[test]
fn published_numbers_come_out() {
    let args = ["eval", "simulate", &trace("olmoe.parquet"), "--policy", "lru,belady-leave,belady"];
    let object = json(&[&args[..], &["--pool", "per_layer", "--rho", "1,2,4"]].concat());
    for (curve, rates) in [[0.434, 0.595, 0.792], [0.590, 0.757, 0.904]].iter().enumerate() {
        for (point, published) in rates.iter().enumerate() {
            let ours = rate(&object, curve, point);
            assert!((ours - published).abs() < 0.006, "{ours} is not {published}");
        }
    }
    assert_eq!(rate(&object, 2, 0), rate(&object, 0, 0));
    let args = ["eval", "simulate", &trace("gptoss.parquet"), "--pool", "global"];
    let object = json(&[&args[..], &["--bytes", "1000MiB,6000MiB", "--start", "warm"]].concat());
    assert!((rate(&object, 0, 0) - 0.177).abs() < 0.002, "{object}");
}

#[test]
fn text_is_for_people() {
    let metrics = output(["eval", "metrics", &trace("olmoe.parquet")]);
    assert!(stdout(&metrics).contains("used by the token before: 43.5 %"), "{metrics:?}");
    let simulated = output(["eval", "simulate", &trace("qwen.parquet"), "--policy", "lru,lfu"]);
    insta::assert_snapshot!(stdout(&simulated));
}

#[test]
fn a_page_is_written_whole_or_not_at_all() {
    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("page.html");
    let page = page.to_str().unwrap();
    let object = json(&["eval", "report", &trace("olmoe.parquet"), "-o", page]);
    let written = std::fs::read_to_string(page).unwrap();
    assert_eq!(object["file_bytes"].as_u64(), Some(written.len() as u64));
    assert_eq!(object["traces"], serde_json::json!([trace("olmoe.parquet")]));
    assert!(written.starts_with("<!DOCTYPE html>") && written.ends_with("</html>\n"));
    let command = format!("tierstream eval report {} --phase decode", trace("olmoe.parquet"));
    assert!(written.contains(&command), "{command}");

    let printed = output(["eval", "report", &trace("olmoe.parquet"), "-o", "-", "--seed", "1"]);
    assert!(stdout(&printed).contains("--seed 1"), "{printed:?}");
    let refused = output(["eval", "report", "t.parquet", "-o", "-", "--json"]);
    assert!(stdout(&refused).contains("leave --json away"), "{refused:?}");

    let args = ["eval", "report", &trace("olmoe.parquet"), "--phase", "prefill", "-o", page];
    let refused = output(args);
    assert!(stderr(&refused).contains("hint: --phase decode"), "{refused:?}");
    assert_eq!(std::fs::read_to_string(page).unwrap(), written);
    let args = ["eval", "report", &trace("olmoe.parquet"), "-o", page, "--plan", page];
    let refused = output(args);
    assert!(stderr(&refused).contains("no answer of plan --json"), "{refused:?}");
    assert!(stderr(&refused).contains("hint: tierstream plan"), "{refused:?}");
    let missing = format!("{page}/page.html");
    let refused = output(["eval", "report", &trace("olmoe.parquet"), "-o", &missing]);
    assert!(stderr(&refused).contains("cannot write"), "{refused:?}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn squeeze_runs_the_grid_and_finds_the_knee() {
    let sizes = ["eval", "squeeze", "demo", "--experts", "25%,100%,0.1%"];
    let args = [&sizes[..], &["--repeats", "1", "-n", "4", "--warmup", "2", "-t", "1"]].concat();
    let object = json(&args);
    let rows = object["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 2, "one token has no room in 0.1 %");
    assert!(rows[0]["faults_per_token"].as_f64() > rows[1]["faults_per_token"].as_f64());
    let knee = &object["knee"];
    assert!(["25%", "100%"].contains(&knee["experts"].as_str().unwrap()), "{knee}");
    assert!(knee["of_best"].as_f64().unwrap() >= 0.95, "{knee}");
    assert_eq!(knee["hurts"], Value::Array(Vec::new()), "of one turn");
    insta::assert_json_snapshot!("eval_squeeze", shape(&object));
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/json.md");
    let mut missing = Vec::new();
    undocumented(&object, &std::fs::read_to_string(path).unwrap(), &mut missing);
    assert!(missing.is_empty(), "docs/json.md does not tell of {missing:?}");
    let refused = output(["eval", "squeeze", "demo", "--experts", "0.1%"]);
    assert!(stderr(&refused).contains("hint: they take"), "{refused:?}");
}

#[test]
fn what_cannot_be_is_told_with_a_hint() {
    let refused = output(["eval", "metrics", &trace("olmoe.parquet"), "--phase", "prefill"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(stderr(&refused).contains("there are no prompt tokens"), "{refused:?}");
    assert!(stderr(&refused).contains("hint: --phase decode"), "{refused:?}");
    let refused = output(["eval", "simulate", &trace("olmoe.parquet"), "--bytes", "1GiB"]);
    assert!(stderr(&refused).contains("does not tell the size of records"), "{refused:?}");
    let args = ["eval", "simulate", &trace("olmoe.parquet"), "--policy", "belady", "--slots", "4"];
    assert!(stderr(&output(args)).contains("belady-leave does not"));
    for flags in [["--policy", "opt"], ["--pool", "some"], ["--rho", "-1"], ["--ahead", "x"]] {
        let args = [&["eval", "simulate", "t.parquet"][..], &flags[..]].concat();
        assert_eq!(output(&args).status.code(), Some(2), "{flags:?}");
    }
}

/// The same trace, pool and policy: what `bench decode` counts is what `eval simulate` says.
#[test]
fn runs_count_what_is_simulated() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(
        path("sea.txt"),
        "The sea was calm that night, and the captain slept. ".repeat(12),
    )
    .unwrap();
    let t = path("t.parquet");
    json(&["trace", "demo", "--text", &path("sea.txt"), "-o", &t, "--tokens", "96", "-t", "1"]);
    // 32 and 48 slots a layer: shared out evenly, and one pool of which each layer is sure of 8.
    for (share, pool, slots) in [("50%", "shares", "32"), ("75%", "floor:8", "48")] {
        for policy in ["lru", "lfu"] {
            let ran = json(&[
                "bench",
                "decode",
                "demo",
                "--routing",
                &t,
                "--experts",
                share,
                "--policy",
                policy,
                "-n",
                "96",
                "--warmup",
                "0",
                "--repeats",
                "1",
                "-t",
                "1",
            ]);
            let simulated = json(&[
                "eval", "simulate", &t, "--policy", policy, "--pool", pool, "--slots", slots,
            ]);
            let point = &simulated["curves"][0]["points"][0];
            let row = &ran["rows"][0];
            assert_eq!(row["hit_rate"], point["hit_rate"], "{policy} {share}: {point}");
            let of = |name: &str| point[name].as_u64().unwrap();
            let faults = row["faults_per_token"].as_f64().unwrap() * 96.0;
            assert_eq!(faults.round() as u64, of("requests") - of("hits"), "{policy} {share}");
        }
    }
}

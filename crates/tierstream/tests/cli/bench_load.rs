//! `bench load` with what a machine may have or lack.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::support::{demo, json, output, stderr, stdout};

/// A folder on a drive, where temporary folders may be in memory.
fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// What stands in for Python: it has `versions`, and is given the script, the package, the
/// memory to touch, and the file.
fn stand_in(dir: &Path, versions: &str) -> PathBuf {
    let path = dir.join("python");
    // A header of safetensors begins with its length and a brace.
    let text = format!(
        r#"#!/bin/sh
[ "$1" = -c ] || exit 3
if [ "$3" = versions ]; then echo '{versions}'; exit; fi
[ "$(head -c 9 "$5" | tail -c 1)" = '{{' ] || {{ echo "no safetensors: $5" >&2; exit 4; }}
echo '{{"seconds": 2, "cpu_s": 1, "bytes": 4000000000, "ready_rss_bytes": 5, "peak_rss_bytes": 7}}'
"#
    );
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

fn row<'v>(object: &'v Value, method: &str) -> &'v Value {
    let rows = object["rows"].as_array().unwrap();
    rows.iter().find(|row| row["method"] == method).unwrap_or(&Value::Null)
}

#[test]
fn packages_of_python_read_a_copy_that_leaves_nothing_behind() {
    let dir = folder();
    let python = stand_in(dir.path(), r#"{"fastsafetensors": "9.8.7", "safetensors": null}"#);
    let temp = dir.path().join("temp");
    fs::create_dir(&temp).unwrap();
    let (python, temp) = (python.to_str().unwrap(), temp.to_str().unwrap());
    let args = ["bench", "load", "demo", "--warm", "--rounds", "1", "--python", python];
    let more = ["--temp", temp, "--against", "fastsafetensors"];
    let object = json(&[&args[..], &more].concat());
    let theirs = row(&object, "fastsafetensors");
    assert_eq!(theirs["version"], "9.8.7");
    assert_eq!((&theirs["gbps_median"], &theirs["cpu_s_per_gb"]), (&2.0.into(), &0.25.into()));
    assert_eq!(theirs["first_token_s_median"], Value::Null);
    assert_eq!(fs::read_dir(temp).unwrap().count(), 0);

    // One that is not installed, and one that nobody has heard of.
    for (package, name) in [("safetensors", "safetensors"), ("runai", "runai-model-streamer")] {
        let output = output([&args[..], &["--against", package]].concat());
        assert_eq!(output.status.code(), Some(1));
        let text = stderr(&output);
        assert!(text.contains(&format!("has no package {name}\nhint: scripts/")), "{text}");
    }
}

#[test]
fn without_a_python_nothing_is_measured() {
    let args = ["bench", "load", "demo", "--against", "runai", "--python", "/no/such/python"];
    let output = output(args);
    assert_eq!((output.status.code(), stdout(&output)), (Some(1), ""));
    let text = stderr(&output);
    assert!(
        text.starts_with("error: there is no Python at /no/such/python\nhint: scripts/"),
        "{text}"
    );
}

#[test]
fn a_safetensors_checkpoint_is_none_of_llama_cpps() {
    let dir = folder();
    let path = dir.path().join("model.safetensors");
    let data = vec![7; 3 << 20];
    let header =
        format!(r#"{{"a":{{"dtype":"U8","shape":[{0}],"data_offsets":[0,{0}]}}}}"#, data.len());
    let len = (header.len() as u64).to_le_bytes();
    fs::write(&path, [&len[..], header.as_bytes(), &data].concat()).unwrap();
    for model in [&path, dir.path()] {
        let model = model.to_str().unwrap();
        let args = ["bench", "load", model, "--against", "mmap", "--rounds", "1", "--json"];
        let output = output(args);
        assert!(output.status.success(), "{output:?}");
        assert!(stderr(&output).contains("mmap is llama.cpp's, which cannot load"), "{output:?}");
        let object: Value = serde_json::from_str(stdout(&output)).unwrap();
        let rows = object["rows"].as_array().unwrap();
        assert_eq!((rows.len(), &rows[1]["bytes"]), (2, &data.len().into()));
        assert_eq!(rows[1]["first_token_s_median"], Value::Null);
    }
}

#[test]
fn cold_is_cold_and_warm_is_warm() {
    let dir = folder();
    let model = dir.path().join("model.gguf");
    fs::copy(demo(), &model).unwrap();
    let model = model.to_str().unwrap();
    let measured = |flag: &str| json(&["bench", "load", model, "--rounds", "1", flag]);
    let warm = measured("--warm");
    assert_eq!((&row(&warm, "raw")["cache"], &warm["emptied"]), (&"warm".into(), &Value::Null));
    let cold = measured("--cold");
    // Where nothing lies on a drive, it says that.
    let on_drive = cold["raw_io"]["direct"] == true;
    let expected = if on_drive { "cold" } else { "partly" };
    assert_eq!(row(&cold, "tierstream")["cache"], expected, "{cold}");
    assert!(["drop_caches", "fadvise"].contains(&cold["emptied"].as_str().unwrap()), "{cold}");
}

#[test]
fn several_models_share_their_rounds() {
    let dir = folder();
    let other = dir.path().join("other.gguf");
    fs::copy(demo(), &other).unwrap();
    let other = other.to_str().unwrap();
    let object = json(&["bench", "load", "demo", other, "--warm", "--rounds", "1"]);
    let rows = object["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 4);
    assert_eq!((&rows[2]["model"], &rows[2]["method"]), (&other.into(), &"raw".into()));
    assert_eq!(object["models"].as_array().unwrap().len(), 2);
}

#[test]
fn packed_models_are_loaded_by_us_alone() {
    let dir = folder();
    let model = demo();
    for flag in [None, Some("--experts-only")] {
        let target = dir.path().join(format!("{}.tspack", flag.is_some()));
        let (model, target) = (model.to_str().unwrap(), target.to_str().unwrap());
        let packed = output(["pack", model, "-o", target].into_iter().chain(flag));
        assert!(packed.status.success(), "{packed:?}");
        let args = ["bench", "load", target, "--warm", "--rounds", "1", "--against", "mmap"];
        let output = output(args);
        assert!(stderr(&output).contains("which is packed: left out"), "{output:?}");
        // It was just written, so the page cache has it, but for what others' memory took.
        let stdout = stdout(&output);
        let (_, cached) = stdout.split_once("what the page cache had: up to ").unwrap();
        let cached: f64 = cached.split_once(" %").unwrap().0.parse().unwrap();
        assert!((90.0..=100.0).contains(&cached), "{stdout}");
    }
}

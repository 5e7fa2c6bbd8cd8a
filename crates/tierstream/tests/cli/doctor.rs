//! `tierstream doctor`.

use std::fs;

use crate::support::{json, output, stderr, stdout};

#[test]
fn a_folder_is_measured_and_left_as_it_was() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let object = json(&["doctor", dir.path().to_str().unwrap()]);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    if object["drive"]["skipped"].is_null() {
        let depths: Vec<_> =
            object["drive"]["reads"].as_array().unwrap().iter().map(|r| &r["depth"]).collect();
        assert_eq!(depths, [1, 8]);
        if object["drive"]["limit_gbps"].is_number() {
            // It is remembered. Others may have measured this drive meanwhile.
            let again = json(&["doctor", dir.path().to_str().unwrap(), "--no-measure"]);
            assert!(again["drive"]["limit_gbps"].as_f64().unwrap() > 0.0, "{again}");
        }
    } else {
        // A drive that is too full to measure.
        assert!(object["drive"]["skipped"].as_str().unwrap().contains("free"), "{object}");
    }
}

#[test]
fn a_file_is_looked_at_without_measuring() {
    let output = output(["doctor", "demo", "--no-measure"]);
    assert!(output.status.success(), "{output:?}");
    for name in [
        "system:",
        "processor:",
        "features:",
        "memory:",
        "NUMA nodes:",
        "GPU:",
        "io_uring:",
        "filesystem:",
        "direct reads:",
        "auto reads:",
    ] {
        assert!(stdout(&output).contains(name), "{name}: {}", stdout(&output));
    }
    assert!(stdout(&output).contains("not measured: --no-measure"));
    assert!(stdout(&output).contains("computes on:  CPU"));
    assert_eq!(stderr(&output), "");
}

#[test]
fn nothing_there_is_an_error() {
    let output = output(["doctor", "/no/such/folder"]);
    assert_eq!(output.status.code(), Some(1));
    let expected = "error: cannot read /no/such/folder: No such file or directory (os error 2)\n";
    assert_eq!(stderr(&output), expected);
}

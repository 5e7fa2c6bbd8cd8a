//! Budgets are hard: the process stays within `--ram`, measured by the kernel.

use std::path::{Path, PathBuf};
use std::process::Command;

use tierstream_synth::{Arch, Quant, Spec};

const GIB: u64 = 1 << 30;

/// What the promise leaves for the allocator and the kernel's own accounting.
const SLACK_BYTES: u64 = 64 << 20;

fn model(dir: &Path) -> (PathBuf, u64) {
    let spec = Spec::big(Arch::Qwen3Moe).quant(Quant::Q4_K_M).scale_to(GIB);
    let path = dir.join("one-gib.gguf");
    let written = spec.write(&path).expect("the temp folder has room for 1 GiB");
    (path, written.bytes)
}

fn run(args: &[&str]) -> serde_json::Value {
    let out = Command::new(env!("CARGO_BIN_EXE_tierstream"))
        .args(args)
        .output()
        .expect("the program starts");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).expect("one JSON object")
}

#[test]
fn half_of_the_model_is_enough_and_is_kept_to() {
    let dir = tempfile::tempdir().expect("a temp folder");
    let (path, bytes) = model(dir.path());
    let ram = bytes / 2;
    let ids: Vec<String> = (0..300).map(|i| (i * 7 % 1000).to_string()).collect();
    let report = run(&[
        "run",
        path.to_str().expect("UTF-8"),
        "--prompt-tokens",
        &ids.join(","),
        "-n",
        "32",
        "--ram",
        &ram.to_string(),
        "--json",
    ]);
    let peak = report["peak_rss_bytes"].as_u64().expect("a number");
    assert!(peak <= ram + SLACK_BYTES, "peak {peak} of a budget of {ram}");
    // The budget is used, too: a pool that is far too small would pass the line above.
    let pool = report["experts"]["budget_bytes"].as_u64().expect("a number");
    assert!(pool > ram / 2, "a pool of {pool} in a budget of {ram}");
    assert!(report["experts"]["faults"].as_u64() > Some(0));
    assert_eq!(report["tokens"].as_array().map(Vec::len), Some(32));
}

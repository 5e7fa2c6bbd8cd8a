//! `tierstream show`.

use std::fs;

use tierstream_synth::{Arch, Spec};

use crate::support::{demo, json, output, stdout};

fn shown(args: &[&str]) -> String {
    let output = output(args);
    assert!(output.status.success(), "{output:?}");
    let mut lines = stdout(&output).lines();
    let first = lines.next().unwrap();
    assert!(first.starts_with("model: "), "{first}");
    lines.collect::<Vec<_>>().join("\n")
}

/// With what is measured, in part, left out: `tests/memory.rs` holds that against runs.
fn settings() -> insta::Settings {
    let mut settings = insta::Settings::clone_current();
    settings.add_filter(r"(?m)^([0-9-].* %.*\d\.\d\d) +\d+\.\d+ MiB", "$1  RAM");
    settings
        .add_filter(r"(--ram that works: about|From about|memory in all:) +\d+\.\d MiB", "$1 RAM");
    settings
}

#[test]
fn what_is_in_the_demo_model() {
    let args = ["show", "demo", "--experts", "10%", "--ram", "140MiB", "--ctx", "512"];
    settings().bind(|| insta::assert_snapshot!(shown(&args)));
}

#[test]
fn a_budget_holds_what_it_leaves_beside_the_rest() {
    let of = |ram: &str| json(&["show", "demo", "--ram", ram])["budgets"][4].clone();
    assert_eq!((&of("8MiB")["pool_bytes"], &of("8MiB")["enough"]), (&0.into(), &false.into()));
    assert_eq!(of("1GiB")["experts_percent"], 100.0);
}

#[test]
fn what_is_in_other_models() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("model.gguf");
    let path = path.to_str().unwrap();
    let mut all = String::new();
    for arch in [Arch::Llama, Arch::DeepSeek2, Arch::GptOss] {
        let written = Spec::new(arch).write(path).unwrap();
        all.push_str(&format!("{}\n\n", shown(&["show", path])));
        let object = json(&["show", path]);
        assert_eq!(object["file_bytes"], written.bytes);
        // The latter with biases.
        assert!(object["expert_bytes"].as_u64().unwrap() <= written.expert_bytes);
    }
    settings().bind(|| insta::assert_snapshot!(all));
}

#[test]
fn a_model_of_several_files_is_one() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut spec = Spec::new(Arch::Olmoe);
    let whole = spec.write(dir.path().join("whole.gguf")).unwrap();
    spec.split_bytes = Some(whole.bytes / 3);
    let split = spec.write(dir.path().join("split.gguf")).unwrap();
    assert!(split.files.len() > 2);
    let of = |path: &std::path::Path| json(&["show", path.to_str().unwrap()]);
    let (mut whole, mut parts) = (of(&whole.files[0]), of(&split.files[0]));
    for budget in [&mut whole, &mut parts].into_iter().flat_map(|o| o["budgets"].as_array_mut()) {
        for row in budget {
            row["ram_bytes_estimate"].take(); // measured, in part
        }
    }
    assert_eq!(parts["files"], split.files.len());
    for key in ["expert_bytes", "dense_bytes", "record_bytes", "token_cycle_bytes", "budgets"] {
        assert_eq!(whole[key], parts[key], "{key}");
    }
}

#[test]
fn only_the_header_is_read() {
    // Tensor data that is one big hole takes no time, and no room.
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("model.gguf");
    fs::copy(demo(), &path).unwrap();
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(1 << 20).unwrap();
    file.set_len(fs::metadata(demo()).unwrap().len()).unwrap();
    let (hole, whole) = (json(&["show", path.to_str().unwrap()]), json(&["show", "demo"]));
    assert_eq!(hole["token_cycle_bytes"], whole["token_cycle_bytes"]);
}

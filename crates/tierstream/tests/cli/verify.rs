//! `tierstream verify`.

use tierstream_synth::{Arch, Spec};

use crate::support::{json, output, stderr, stdout};

#[test]
fn the_streamed_demo_equals_the_resident_one() {
    let output = output(["verify", "demo", "--experts", "25%", "--tokens", "24"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(stdout(&output).starts_with("identical: "), "{output:?}");
    assert!(stdout(&output).ends_with("\nlargest difference: 0e0\n"), "{output:?}");
    assert!(stderr(&output).contains("experts requested, "), "{output:?}");
}

#[test]
fn models_without_a_tokenizer_and_dense_ones() {
    let dir = tempfile::tempdir().unwrap();
    for (arch, streams) in [(Arch::Qwen3Moe, true), (Arch::Llama, false)] {
        let path = dir.path().join("synth.gguf");
        Spec::new(arch).write(&path).unwrap();
        let object = json(&["verify", path.to_str().unwrap(), "--tokens", "8"]);
        assert_eq!(object["identical"], true, "{object}");
        assert_eq!(object["tokens"], 128 + 8);
        assert_eq!(object["experts"]["requests"].as_u64() > Some(0), streams, "{object}");
    }
}

//! `tierstream verify`.

use std::fs;

use tierstream_synth::{Arch, Quant, Spec};

use crate::support::{PROMPT, Terminal, demo, json, output, stderr, stdout};

/// The longest of all comparisons: a prompt, and 512 tokens after it. Like the others on one thread:
/// several wait for each other by spinning, which is slow where other tests want the processors.
#[test]
fn the_streamed_demo_equals_the_resident_one() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let prompt = dir.path().join("prompt");
    fs::write(&prompt, PROMPT.repeat(30)).unwrap();
    let args =
        ["verify", "demo", "--experts", "25%", "--tokens", "512", "-t", "1", "--prompt-file"];
    let output = output(args.into_iter().chain(prompt.to_str()));
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let lines: Vec<&str> = stdout(&output).lines().collect();
    let [identical, difference, pool] = lines[..] else { panic!("{output:?}") };
    let counts = identical.strip_prefix("identical: ").and_then(|s| s.strip_suffix(" tokens"));
    let (same, all) = counts.and_then(|s| s.split_once('/')).expect(identical);
    assert!(same == all && same.parse::<usize>().unwrap() >= 512 + 200, "{identical}");
    assert_eq!(difference, "largest difference: 0e0");
    assert!(pool.starts_with("pool: 3.8 MiB, 25."), "{pool}");
    // No bar where there is no terminal.
    assert_eq!(stderr(&output), "");
}

/// Records of two sizes, of blocks of 256 numbers.
#[test]
fn a_mix_of_k_quants() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("synth.gguf");
    Spec::new(Arch::Qwen3Moe).quant(Quant::Q4_K_M).write(&path).unwrap();
    let path = path.to_str().unwrap();
    let object = json(&["verify", path, "--experts", "25%", "--tokens", "512", "-t", "1"]);
    assert_eq!(object["identical"], true, "{object}");
    assert_eq!(object["tokens"], 128 + 512);
    assert!(object["experts"]["faults"].as_u64() > Some(10_000), "{object}");
}

#[test]
fn models_without_a_tokenizer_and_dense_ones() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    for (arch, streams) in [(Arch::Qwen3Moe, true), (Arch::Llama, false)] {
        let path = dir.path().join("synth.gguf");
        Spec::new(arch).write(&path).unwrap();
        let object = json(&["verify", path.to_str().unwrap(), "--tokens", "8"]);
        assert_eq!(object["identical"], true, "{object}");
        assert_eq!(object["tokens"], 128 + 8);
        assert_eq!(object["experts"]["requests"].as_u64() > Some(0), streams, "{object}");
        assert_eq!(object["experts_percent"].is_number(), streams, "{object}");
    }
}

/// Where a quarter of the experts is less than one token uses, it is those.
#[test]
fn without_a_size_the_pool_works_for_every_model() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("synth.gguf");
    for (experts, used, percent) in [(8, 5, 62.5), (7, 3, 300.0 / 7.0), (16, 1, 25.0)] {
        Spec::new(Arch::Qwen3Moe).experts(experts, used).write(&path).unwrap();
        let object = json(&["verify", path.to_str().unwrap(), "--tokens", "8", "-t", "1"]);
        assert_eq!(object["identical"], true, "{object}");
        let got = object["experts_percent"].as_f64().unwrap();
        // Slots are a little larger than records.
        assert!((percent..percent * 1.05).contains(&got), "{got} for {percent}: {object}");
    }
}

#[test]
fn a_terminal_gets_a_bar() {
    let cache = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    // More than anybody waits for.
    let args =
        ["verify", demo().to_str().unwrap(), "--tokens", "100000", "-t", "1"].map(String::from);
    let mut terminal = Terminal::new(cache.path(), args);
    terminal.wait_for("comparing");
    terminal.wait_for("%");
    terminal.child.kill().unwrap();
    terminal.exit();
}

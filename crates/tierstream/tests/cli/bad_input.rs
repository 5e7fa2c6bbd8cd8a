//! What is no model, or not within the limits, is an error that says what and why: never a panic.

use std::fs;
use std::path::Path;

use tierstream::size::Bytes;
use tierstream_synth::{Arch, Spec};

use crate::support::{demo, fed, json, output, stderr, stdout, tierstream};

/// The error of `tierstream ARGS`, with the folder of the test left out.
fn error(args: &[&str], dir: &Path) -> String {
    let output = output(args);
    assert_eq!(output.status.code(), Some(1), "{args:?}: {output:?}");
    assert_eq!(stdout(&output), "", "{args:?}");
    stderr(&output).replace(dir.to_str().unwrap(), "DIR")
}

#[test]
fn files_that_are_no_model() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let whole = fs::read(demo()).unwrap();
    let file = |name: &str, bytes: &[u8]| fs::write(dir.path().join(name), bytes).unwrap();
    fs::create_dir(dir.path().join("folder")).unwrap();
    file("empty", b"");
    file("text", b"This is no model, but a text.\n");
    file("cut-in-header", &whole[..1000]);
    file("cut-in-data", &whole[..whole.len() - 1000]);
    let mut all = String::new();
    for name in ["folder", "empty", "text", "cut-in-header", "cut-in-data", "missing"] {
        let path = dir.path().join(name);
        let path = path.to_str().unwrap();
        let run = error(&["run", path, "Hello"], dir.path());
        assert_eq!(run, error(&["show", path], dir.path()));
        assert!(run.contains("DIR"), "{run}");
        all.push_str(&run);
        let output = output(["run", path, "Hello", "--json"]);
        assert_eq!(output.status.code(), Some(1));
        let object: serde_json::Value = serde_json::from_str(stdout(&output)).unwrap();
        let told = object["error"].as_str().unwrap().replace(dir.path().to_str().unwrap(), "DIR");
        assert!(run.starts_with(&format!("error: {told}\n")), "{object}");
        assert_eq!(run.contains("\nhint: "), object["hint"].is_string());
        assert_eq!(stderr(&output), "");
    }
    insta::assert_snapshot!(all);
}

#[test]
fn budgets_that_are_too_small() {
    let demo = demo();
    let demo = demo.to_str().unwrap();
    let floor = json(&["show", demo])["pool_bytes_min"].as_u64().unwrap();
    for experts in ["1%", "0", "1MiB"] {
        let text = error(&["run", demo, "Hello", "--experts", experts], Path::new("/-"));
        assert!(text.contains(&Bytes(floor).to_string()), "{text}");
        let hint = text.lines().find_map(|l| l.strip_prefix("hint: give it --experts ")).unwrap();
        let helped = output(["run", demo, "Hello", "-n", "2", "--experts", hint]);
        assert!(helped.status.success(), "{}", stderr(&helped));
    }
    let text = error(&["run", demo, "Hello", "--ram", "1MiB"], Path::new("/-"));
    assert!(text.starts_with("error: 1.0 MiB is too little memory for this model"), "{text}");
    assert!(text.contains("\nhint: give it --ram "), "{text}");
}

#[test]
fn prompts_that_are_none() {
    let demo = demo();
    let demo = demo.to_str().unwrap();
    for input in ["", "\n", "\r\n"] {
        let output = fed(&["run", demo], input.as_bytes());
        assert_eq!(output.status.code(), Some(1));
        assert!(stderr(&output).starts_with("error: the prompt is empty\nhint: "), "{output:?}");
    }
    let output = fed(&["run", demo, "-"], b"abc\xff");
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("no UTF-8 text (at byte 3)"), "{output:?}");
    let long = "word ".repeat(3000);
    let output = fed(&["run", demo], long.as_bytes());
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("of a context of 1024\nhint: a larger --ctx"), "{output:?}");
    let text = error(&["run", demo, "--prompt-tokens", "1,8192"], Path::new("/-"));
    assert_eq!(text, "error: token 8192 is none of the model's\nhint: its tokens are 0 to 8191\n");
}

#[test]
fn flags_that_are_none() {
    for args in [
        &["run", "demo", "--no-such-flag"][..],
        &["run", "demo", "--experts", "101%"],
        &["run", "demo", "--experts", "50%,25%"],
        &["verify", "demo", "--experts", "50%,25%"],
        &["bench", "decode", "demo", "--experts", "50%,"],
        &["bench", "decode", "demo", "--repeats", "0"],
        &["bench", "prefill", "demo", "--tokens", "0"],
        &["bench", "load", "demo", "--cold", "--warm"],
        &["bench", "load", "demo", "--against", "stock"],
        &["bench", "io", "demo", "--blocks", "1000B"],
        &["bench", "io", "demo", "--engines", "noop"],
        &["run", "demo", "--temp", "nan"],
        &["run", "demo", "--prompt-tokens", "1,x"],
        &["run", "demo", "-n", "0"],
        &["run", "demo", "Hello", "--io", "floppy"],
        &["dance"],
    ] {
        let output = output(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert_eq!(stdout(&output), "");
        assert!(stderr(&output).starts_with("error: "), "{output:?}");
    }
}

#[test]
fn recorded_routing_has_no_router_to_ask() {
    let recorded = ["bench", "decode", "demo", "--gpu", "0", "--routing", "trace.csv"];
    for how in ["auto", "lookahead"] {
        let text = error(&[&recorded[..], &["--prefetch", how]].concat(), Path::new("/-"));
        assert!(text.contains("\nhint: with --routing, --prefetch takes lag or off"), "{text}");
    }
}

#[test]
fn a_file_without_permission() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("secret.gguf");
    fs::copy(demo(), &path).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o000)).unwrap();
    let output = output(["show", path.to_str().unwrap()]);
    if fs::File::open(&path).is_ok() {
        // Root reads everything; then so does the program.
        assert!(output.status.success(), "{output:?}");
        return;
    }
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("Permission denied"), "{output:?}");
    assert!(stderr(&output).contains("secret.gguf"), "{output:?}");
}

#[test]
fn a_cache_that_cannot_be_written() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let file = dir.path().join("file");
    fs::write(&file, b"").unwrap();
    let output = tierstream()
        .args(["run", "demo", "Hello"])
        .env("TIERSTREAM_CACHE", file.join("cache"))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).starts_with("error: cannot write the demo model: "), "{output:?}");
    assert!(stderr(&output).contains("\nhint: set TIERSTREAM_CACHE to a folder"), "{output:?}");
    // The usual folder is not insisted on.
    for (name, value) in
        [("HOME", file.as_path()), ("XDG_CACHE_HOME", &file), ("HOME", "".as_ref())]
    {
        let temporary = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let output = tierstream()
            .args(["run", "demo", "Hello", "-n", "2"])
            .env_remove("TIERSTREAM_CACHE")
            .env_remove("XDG_CACHE_HOME")
            .env("TMPDIR", temporary.path())
            .env(name, value)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        let [entry] = &fs::read_dir(temporary.path()).unwrap().collect::<Vec<_>>()[..] else {
            panic!("one folder: {output:?}");
        };
        let folder = entry.as_ref().unwrap().path();
        assert!(folder.file_name().unwrap().to_str().unwrap().starts_with("tierstream-"));
        let told = stderr(&output).contains(&format!("; the demo model is {}", folder.display()));
        assert_eq!(told, !value.as_os_str().is_empty(), "{output:?}");
    }
}

/// What llama.cpp answers with `abort()` and no check of ours foresees: so many experts per token
/// that its graph has too many nodes.
#[test]
fn llama_cpp_giving_up_is_an_error_as_any_other() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("synth.gguf");
    Spec::new(Arch::Qwen3Moe).experts(64, 64).write(&path).unwrap();
    let args = ["run", path.to_str().unwrap(), "--prompt-tokens", "1,2,3", "-n", "2"];
    let plain = output(args);
    assert_eq!(plain.status.code(), Some(1), "{plain:?}");
    assert_eq!(stdout(&plain), "");
    let lines: Vec<&str> = stderr(&plain).lines().collect();
    let [error, hint] = lines[..] else { panic!("no backtrace: {plain:?}") };
    let message = error.strip_prefix("error: ").expect(error);
    assert!(
        message.starts_with("llama.cpp gave up: ") && message.contains("GGML_ASSERT"),
        "{error}"
    );
    let hint = hint.strip_prefix("hint: ").expect(hint);
    let object = output(args.iter().chain(&["--json"]));
    assert_eq!(object.status.code(), Some(1), "{object:?}");
    assert_eq!(stderr(&object), "");
    let object: serde_json::Value =
        serde_json::from_str(stdout(&object)).expect("one whole object");
    assert_eq!(object, serde_json::json!({ "error": message, "hint": hint }));
}

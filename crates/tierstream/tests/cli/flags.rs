//! Values that flags do not take, and those that they take with a word about it.

use std::process::Command;

use crate::support::{PROMPT, demo, json, output, stderr, tierstream};

#[test]
fn values_that_are_refused() {
    let mut all = String::new();
    for (flag, values) in [
        ("--seed", &["-1", "x", "4294967296"][..]),
        ("--ram", &["-8GiB", "8", "8XB"]),
        ("--experts", &["25", "200%", "-5%", "half"]),
        ("--miss", &["move"]),
        ("--io", &["mmap", "noop", ""]),
        ("--temp", &["-1", "hot"]),
        ("-n", &["-5", "0"]),
        ("--ctx", &["-1", "20000000"]),
        ("--threads", &["-2", "0"]),
        ("--batch", &["-1"]),
        ("--top-k", &["-1"]),
        ("--top-p", &["-0.5"]),
        ("--min-p", &["2"]),
        ("--repeat-penalty", &["0", "-1", "x"]),
        ("--stop", &[""]),
        ("--prompt-tokens", &["-1", "1,-2", "1,x"]),
    ] {
        for value in values {
            let output = output(["run", "demo", flag, value]);
            assert_eq!(output.status.code(), Some(2), "{flag} {value}: {output:?}");
            all.push_str(stderr(&output).lines().next().unwrap());
            all.push('\n');
        }
    }
    insta::assert_snapshot!(all);
}

/// What is said about a run of the demo model that works.
fn notes(args: &[&str]) -> Vec<String> {
    let output = output([&["run", "demo", PROMPT, "-n", "2"], args].concat());
    assert!(output.status.success(), "{output:?}");
    stderr(&output).lines().filter_map(|l| l.strip_prefix("note: ")).map(str::to_owned).collect()
}

#[test]
fn values_that_do_not_do_what_one_may_think() {
    let usual = notes(&[]);
    let added = |args: &[&str]| -> Vec<String> {
        notes(args).into_iter().filter(|n| !usual.contains(n)).collect()
    };
    assert_eq!(
        added(&["--ctx", "2000"]),
        ["this model was trained with a context of 1024 tokens: what it writes beyond them, up \
             to --ctx 2000, may make no sense"]
    );
    assert!(added(&["--ctx", "1024"]).is_empty());
    assert_eq!(
        added(&["--experts", "9999TiB"]),
        ["--experts 9999.00 TiB: all experts of this model fit, 15.2 MiB"]
    );
    assert!(added(&["--experts", "100%"]).is_empty());
    let [beyond] = &added(&["--ram", "9999TiB"])[..] else { panic!("one note") };
    assert!(beyond.starts_with("--ram 9999.00 TiB: there are "), "{beyond}");
    assert_eq!(added(&["--io", "buffered"]), ["reading through the page cache, as asked"]);
}

#[test]
fn every_way_to_read_says_the_same() {
    let of = |io: &str| {
        let args =
            ["run", "demo", PROMPT, "-n", "8", "--temp", "0", "--experts", "25%", "--io", io];
        json(&args)
    };
    let auto = of("auto");
    for io in ["direct", "buffered", "uring", "pread"] {
        let args = ["run", "demo", PROMPT, "-n", "1", "--io", io];
        if io == "uring" && !output(args).status.success() {
            // The kernel, or a sandbox, refuses it.
            continue;
        }
        let object = of(io);
        assert_eq!(object["text"], auto["text"], "{io}");
        let path = &object["io"];
        assert!(path["load_bytes"].as_u64().unwrap() > 1 << 20, "{io}: {path}");
        assert!(path["load_gbps"].as_f64().unwrap() > 0.0, "{io}: {path}");
        // So short a load tells nothing of the drive.
        assert!(path["limit_gbps"].is_null() && path["limit_share"].is_null(), "{io}: {path}");
        match io {
            "direct" => assert_ne!(path["engine"], "buffered"),
            _ => assert_eq!(path["engine"], io),
        }
        if io == "buffered" {
            assert_eq!(path["direct"], false);
            assert_eq!(path["reason"], "reading through the page cache, as asked");
        }
    }
}

/// There is no drive below a file in memory: it is copied from there by several threads, and that is told.
#[test]
fn a_model_in_memory_is_read_there() {
    let Ok(dir) = tempfile::tempdir_in("/dev/shm") else { return };
    let path = dir.path().join("model.gguf");
    std::fs::copy(demo(), &path).unwrap();
    let path = path.to_str().unwrap();
    let doctor = json(&["doctor", path, "--no-measure"]);
    if doctor["storage"]["filesystem"]["kind"] != "tmpfs" {
        return;
    }
    let reads = &doctor["storage"]["reads"];
    assert_eq!((&reads["direct"], &reads["probe"]), (&false.into(), &serde_json::Value::Null));
    let args = |model| ["run", model, PROMPT, "-n", "8", "--temp", "0", "--experts", "25%"];
    let (here, there) = (json(&args(path)), json(&args("demo")));
    assert_eq!(here["text"], there["text"]);
    assert_eq!((&here["io"]["engine"], &here["io"]["direct"]), (&"buffered".into(), &false.into()));
    let reason = here["io"]["reason"].as_str().unwrap();
    assert!(
        reason.ends_with("it lies in memory (tmpfs), there is no drive to read from"),
        "{reason}"
    );
    assert!(here["experts"]["faults"].as_u64().unwrap() > 0);
}

#[test]
fn misses_are_those_of_a_gpu() {
    for how in ["compute", "auto"] {
        let refused = output(["run", "demo", PROMPT, "--miss", how]);
        assert_eq!(refused.status.code(), Some(1), "{refused:?}");
        assert!(stderr(&refused).contains(&format!("--miss {how} is for --gpu")), "{refused:?}");
    }
    assert!(output(["run", "demo", PROMPT, "-n", "2", "--miss", "copy"]).status.success());
}

#[test]
fn cufile_is_for_gpus() {
    let none = "--io cufile: it reads to a GPU, and none is to be used";
    for args in [&["run", "demo", PROMPT][..], &["pack", "demo", "-o", "/no/such/folder"]] {
        let refused = output(args.iter().chain(&["--io", "cufile"]));
        assert_eq!(refused.status.code(), Some(1), "{refused:?}");
        assert!(stderr(&refused).contains(none), "{refused:?}");
        assert!(stderr(&refused).contains("hint: --io auto"), "{refused:?}");
    }
    // Before all weights are read to be hashed.
    let refused = output(["run", "demo", PROMPT, "--io", "cufile", "--verify-weights"]);
    let what = "--io cufile reads past host memory, where --verify-weights has weights hashed";
    assert!(stderr(&refused).starts_with(&format!("error: {what}")), "{refused:?}");
}

#[test]
fn a_system_prompt_needs_a_template() {
    let refused = output(["run", "demo", PROMPT, "--system", "Be brief."]);
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    assert!(stderr(&refused).contains("this model has no chat template"), "{refused:?}");
    assert!(stderr(&refused).contains("\nhint: write it at the beginning of the prompt"));
    for with in ["--raw", "--prompt-tokens=1"] {
        let refused = output(["run", "demo", with, "--system", "Be brief."]);
        assert_eq!(refused.status.code(), Some(2), "{with}: {refused:?}");
    }
}

#[test]
fn a_context_that_memory_has_no_room_for() {
    // Of address space, 2 GB; the KV cache alone wants 6.
    let output = Command::new("sh")
        .args(["-c", "ulimit -v 2000000; exec \"$@\"", "sh"])
        .arg(tierstream().get_program())
        .arg("run")
        .arg(demo())
        .args(["Hello", "-n", "2", "--ctx", "4000000"])
        .stdin(std::process::Stdio::null())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(stderr(&output).contains("\nhint: a smaller --ctx needs less memory"), "{output:?}");
}

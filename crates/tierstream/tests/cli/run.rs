//! `tierstream run` with pipes.

use std::fs::File;

use tierstream_synth::{Arch, Spec};

use crate::support::{
    PROMPT, demo, demo_with, endless, fed, first_byte, json, output, stderr, stdout, tierstream,
};

const VERIFY: [&str; 4] = ["verify", "demo", "--tokens", "2"];

const BENCH: [&str; 11] =
    ["bench", "decode", "demo", "--experts", "50%", "--repeats", "1", "-n", "2", "--warmup", "1"];

#[test]
fn text_goes_to_stdout_and_all_else_to_stderr() {
    let args = ["run", "demo", PROMPT, "-n", "24", "--temp", "0", "--experts", "50%"];
    let plain = output(args);
    assert!(plain.status.success(), "{plain:?}");
    assert!(stdout(&plain).trim().len() > 24, "{plain:?}");
    let lines: Vec<&str> = stderr(&plain).lines().filter(|l| !l.starts_with("note: ")).collect();
    let [summary] = lines[..] else { panic!("one line on stderr: {lines:?}") };
    assert!(summary.starts_with("24 tokens, "), "{summary}");
    for part in ["tok/s", "hit rate", "read from the drive ("] {
        assert!(summary.contains(part), "{part}: {summary}");
    }
    // A pipe gives the same text as an argument, and JSON the same as text.
    let piped = fed(&["run", "demo", "-n", "24", "--temp", "0"], format!("{PROMPT}\n").as_bytes());
    assert_eq!(stdout(&piped), stdout(&plain));
    let object = json(&args);
    assert_eq!(format!("{}\n", object["text"].as_str().unwrap()), stdout(&plain));
    assert_eq!(object["tokens"].as_array().unwrap().len(), 24);
}

#[test]
fn verbose_prints_ollamas_timings_and_ours() {
    let output =
        output(["run", "demo", PROMPT, "-n", "16", "--seed", "7", "--experts", "25%", "-v"]);
    let settings = {
        let mut settings = insta::Settings::clone_current();
        // Spaces too, since a longer number leaves fewer.
        settings.add_filter(r"(?m)^note: .*\n", "");
        settings.add_filter(r"[0-9][0-9.]*(ms|µs|s| tokens/s| tok/s| [KMG]iB| B| %)", "N$1");
        settings.add_filter(r"(?m)^seed: ( +)7$", "seed: ${1}SEED");
        settings.add_filter(r"\((\d+ of )?\d[\d.]*( per token)?\)", "(N)");
        settings.add_filter(r"faults: ( +)\d+", "faults: ${1}N");
        settings.add_filter(r"(uring|pread), (direct|through the page cache)( \(.*\)$)?", "PATH");
        settings.add_filter(r"\(all of it was in the page cache\)", "(PATH)");
        settings.add_filter(r" (MiB|KiB|GiB|B)\b", " UNIT");
        settings.add_filter(r"[0-9.]+ GB/s", "N GB/s");
        settings.add_filter(r"N(ms|µs|s)\b", "TIME");
        settings
    };
    settings.bind(|| insta::assert_snapshot!(stderr(&output)));
}

#[test]
fn a_stop_text_ends_the_text_before_it() {
    let args = ["run", "demo", PROMPT, "-n", "24", "--temp", "0", "-t", "1"];
    let whole = json(&args);
    let text = whole["text"].as_str().unwrap();
    // From the middle of a word on, so that it spans tokens.
    let stop = &text[text.len() / 2..text.len() / 2 + 12];
    let kept = &text[..text.find(stop).unwrap()];
    let args = [&args[..], &["--stop", "not in it", "--stop", stop]].concat();
    let cut = json(&args);
    assert_eq!(cut["text"], kept);
    assert_eq!(cut["stop"], "stop_text");
    assert!(cut["tokens"].as_array().unwrap().len() < 24);
    let plain = output(&args);
    assert_eq!(stdout(&plain), format!("{kept}\n"));
    assert!(!stderr(&plain).contains("stopped"), "{plain:?}");
}

#[test]
fn a_repeat_penalty_makes_tokens_repeat_less() {
    let distinct = |penalty: &str| {
        let args = ["run", "demo", PROMPT, "-n", "48", "--temp", "0", "-t", "1"];
        let made = json(&[&args[..], &["--repeat-penalty", penalty]].concat());
        let tokens = made["tokens"].as_array().unwrap().clone();
        let ids = tokens.iter().map(|t| t.as_i64().unwrap());
        (ids.collect::<std::collections::BTreeSet<_>>().len(), tokens)
    };
    let usual = json(&["run", "demo", PROMPT, "-n", "48", "--temp", "0", "-t", "1"]);
    let ((off, tokens), (on, _)) = (distinct("1"), distinct("100"));
    assert_eq!(usual["tokens"].as_array(), Some(&tokens));
    // Among the last 64 are all.
    assert!(off < 48 && on == 48, "{off} {on}");
    // Those of the prompt too.
    let prompt: Vec<String> = tokens.iter().map(ToString::to_string).collect();
    let of_prompt = |penalty: &str| {
        let ids = prompt.join(",");
        let args = ["run", "demo", "--prompt-tokens", &ids, "-n", "8", "--temp", "0", "-t", "1"];
        let made = json(&[&args[..], &["--repeat-penalty", penalty]].concat());
        made["tokens"].as_array().unwrap().iter().filter(|t| tokens.contains(t)).count()
    };
    assert!(of_prompt("1") > 0 && of_prompt("100") == 0);
}

#[test]
fn output_is_utf8_whatever_the_model_draws() {
    // Flat sampling draws tokens that are parts of characters.
    let wild =
        ["--temp", "9", "--top-k", "0", "--top-p", "1", "--min-p", "0", "-n", "200", "--seed", "0"];
    let args: Vec<&str> = ["run", "demo", PROMPT].into_iter().chain(wild).collect();
    let plain = output(&args);
    assert!(plain.status.success());
    let text = stdout(&plain);
    assert!(!text.is_ascii(), "the test needs characters of several bytes");
    assert_eq!(format!("{}\n", json(&args)["text"].as_str().unwrap()), text);
}

#[test]
fn models_without_a_tokenizer_take_and_give_ids() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("synth.gguf");
    Spec::new(Arch::Qwen3Moe).write(&path).unwrap();
    let path = path.to_str().unwrap();
    let args = ["run", path, "--prompt-tokens", "1,2,3", "-n", "5", "--temp", "0"];
    let plain = output(args);
    let ids: Vec<i64> = stdout(&plain).split(' ').map(|n| n.trim().parse().unwrap()).collect();
    let object = json(&args);
    let tokens: Vec<i64> =
        object["tokens"].as_array().unwrap().iter().map(|n| n.as_i64().unwrap()).collect();
    assert_eq!((ids.len(), &ids), (5, &tokens));
    assert_eq!(object["prompt_tokens"], 3);
    let refused = output(["run", path, "Hello"]);
    assert_eq!(refused.status.code(), Some(1));
    let told = "error: this model has no tokenizer\n\
                hint: give it token ids: --prompt-tokens 1,2,3\n";
    assert_eq!(stderr(&refused), told);
    // Before anything is loaded, which this pool is too small for.
    let refused = output(["run", path, "Hello", "--experts", "0%"]);
    assert_eq!(stderr(&refused), told);
}

#[test]
fn what_is_piped_in_stands_before_the_prompt() {
    let demo = demo();
    let demo = demo.to_str().unwrap();
    let args = ["-n", "8", "--temp", "0"];
    let joined = output([&["run", demo, "It was a cold evening"][..], &args].concat());
    assert!(joined.status.success(), "{joined:?}");
    let beside = fed(&[&["run", demo, "a cold evening"][..], &args].concat(), b"It was\n");
    assert_eq!(stdout(&beside), stdout(&joined));
    let dash = fed(&[&["run", demo, "-"][..], &args].concat(), b"It was a cold evening\n");
    assert_eq!(stdout(&dash), stdout(&joined));
    // Nothing is piped in; then nothing is added.
    let alone = output([&["run", demo, "It was"][..], &args].concat());
    let empty = fed(&[&["run", demo, "It was"][..], &args].concat(), b"");
    assert_eq!(stdout(&alone), stdout(&empty));
}

#[test]
fn a_run_can_be_repeated_with_its_seed() {
    let run = |seed: &[&str]| json(&[&["run", "demo", PROMPT, "-n", "24"], seed].concat());
    let (one, other) = (run(&[]), run(&[]));
    assert_ne!(one["seed"], other["seed"]);
    let again = run(&["--seed", &one["seed"].to_string()]);
    assert_eq!(again["seed"], one["seed"]);
    assert_eq!(again["tokens"], one["tokens"]);
}

#[test]
fn dense_models_run_and_say_that_nothing_streams() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("dense.gguf");
    Spec::new(Arch::Llama).write(&path).unwrap();
    let path = path.to_str().unwrap();
    let args = ["run", path, "--prompt-tokens", "1,2,3", "-n", "5"];
    let plain = output(args);
    assert!(plain.status.success(), "{plain:?}");
    assert!(stderr(&plain).contains("note: this model is dense"), "{plain:?}");
    assert!(stderr(&plain).contains(", nothing streamed"), "{plain:?}");
    let object = json(&args);
    assert_eq!(object["experts"]["requests"], 0);
    assert!(object["io"]["engine"].is_string(), "{object}");

    let note = "note: --experts has no effect: this model has none\n";
    assert!(!stderr(&plain).contains(note), "{plain:?}");
    let with = output([&args[..], &["--experts", "50%"]].concat());
    assert!(with.status.success() && stderr(&with).contains(note), "{with:?}");

    let small = output([&args[..], &["--ram", "1MiB"]].concat());
    assert_eq!(small.status.code(), Some(1), "{small:?}");
    let refusal = stderr(&small).lines().find(|l| l.starts_with("error: ")).unwrap();
    assert!(refusal.contains("is too little memory for this model: it needs at least "));
    assert!(refusal.ends_with(" MiB"), "{refusal}");
}

#[test]
fn the_least_budget_is_named_and_works() {
    for more in [&[][..], &["--ctx", "8192"]] {
        let run = |ram: &str| {
            output([&["run", "demo", PROMPT, "-n", "4", "-t", "1", "--ram", ram], more].concat())
        };
        let refused = run("1MiB");
        let named = stderr(&refused).split_once("hint: give it --ram ").expect("a hint").1;
        let named = named.split_once(',').unwrap().0;
        for _ in 0..4 {
            let ran = run(named);
            assert!(ran.status.success(), "{named}: {ran:?}");
        }
    }
}

#[test]
fn bench_of_a_dense_model_has_one_row() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("dense.gguf");
    Spec::new(Arch::Llama).write(&path).unwrap();
    let path = path.to_str().unwrap();
    let args = ["bench", "decode", path, "--repeats", "1", "-n", "2", "--warmup", "1", "-t", "1"];
    let measured = output([&args[..], &["--json"]].concat());
    assert!(measured.status.success(), "{measured:?}");
    let object: serde_json::Value = serde_json::from_str(stdout(&measured)).unwrap();
    assert_eq!(object["rows"].as_array().unwrap().len(), 1, "{object}");
    assert!(stderr(&measured).contains("note: this model has no experts"), "{measured:?}");
    assert!(!stderr(&measured).contains("--experts"), "{measured:?}");
}

#[test]
fn prompts_go_through_the_chat_template() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n\
                    {% endfor %}<|im_start|>assistant\n";
    let path = demo_with(dir.path(), "tokenizer.chat_template", template);
    let path = path.to_str().unwrap();
    let count = |extra: &[&str]| {
        let args = [&["run", path, "Hello", "-n", "2"], extra].concat();
        json(&args)["prompt_tokens"].as_u64().unwrap()
    };
    assert!(count(&[]) > count(&["--raw"]) + 10);
    assert_eq!(count(&["--raw"]), 1);
    assert_eq!(json(&["show", path])["chat_template"], true);
    for template in ["{{ raise_exception('No.') }}", "{% for %}"] {
        let path = demo_with(dir.path(), "tokenizer.chat_template", template);
        let output = output(["run", path.to_str().unwrap(), "Hello"]);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(stderr(&output).contains("\nhint: --raw gives"), "{output:?}");
    }
}

#[test]
fn what_a_model_thinks_is_told_from_its_answer() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let template = "{% for m in messages %}{{ m.content }}\n{% endfor %}\
                    {% if enable_thinking %}<think>{% endif %}";
    let path = demo_with(dir.path(), "tokenizer.chat_template", template);
    let path = path.to_str().unwrap();
    let run = |more: &[&str]| {
        let args = [&["run", path, PROMPT, "-n", "12", "--temp", "0", "-t", "1"], more].concat();
        (output(args.clone()), json(&args))
    };
    // It never comes to an end of it.
    let (shown, object) = run(&[]);
    let thought = object["thinking"].as_str().unwrap();
    assert!(!thought.trim().is_empty() && object["text"] == "", "{object}");
    assert_eq!(stdout(&shown).trim_end(), format!("Thinking...\n{thought}").trim_end());
    assert_eq!(run(&["--think"]).1["thinking"], thought);
    let (shown, object) = run(&["--hide-thinking"]);
    assert_eq!((stdout(&shown), &object["thinking"]), ("\n", &thought.into()));
    let (shown, object) = run(&["--think=false"]);
    assert!(object["thinking"].is_null(), "{object}");
    assert_eq!(stdout(&shown), format!("{}\n", object["text"].as_str().unwrap()));
    assert!(object["text"].as_str().unwrap().trim().len() > 12, "{object}");
    let refused = output(["run", "demo", PROMPT, "--think"]);
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    assert!(stderr(&refused).contains("error: this model's chat template knows no thinking"));
    assert!(output(["run", "demo", PROMPT, "--think=false", "-n", "1"]).status.success());
}

#[test]
fn a_closed_pipe_ends_the_program_without_a_word() {
    let mut child = endless(&[]);
    first_byte(&mut child);
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(stderr(&output).lines().all(|l| l.starts_with("note: ")), "{output:?}");
    for args in [
        &["show", "demo"][..],
        &["man"],
        &["completions", "bash"],
        &["show", "demo", "--json"],
        &VERIFY,
        &[&VERIFY[..], &["--json"]].concat(),
        &BENCH,
        &[&BENCH[..], &["--json"]].concat(),
    ] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = tierstream().args(args).stdout(writer).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{args:?}: {output:?}");
        let verb = ["verify", "bench"].contains(&args[0]);
        assert!(verb || stderr(&output).is_empty(), "{args:?}: {output:?}");
        assert!(!stderr(&output).contains("error"), "{args:?}: {output:?}");
    }
}

#[test]
fn a_full_disk_is_an_error() {
    let full = || File::options().write(true).open("/dev/full").unwrap();
    let run = ["run", "demo", "Hello", "-n", "2"];
    for args in [
        &run[..],
        &[&run[..], &["--json"]].concat(),
        &["show", "demo"],
        &["show", "demo", "--json"],
        &["man"],
        &VERIFY,
        &BENCH,
    ] {
        let output = tierstream().args(args).stdout(full()).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{args:?}: {output:?}");
        let told = "error: cannot write to standard output: No space left on device";
        assert!(stderr(&output).contains(told), "{args:?}: {output:?}");
    }
}

//! `tierstream list`, and models by their names.

use std::fs;
use std::path::Path;

use crate::stores::Stores;
use crate::support::{PROMPT, demo, stderr, stdout};

/// Where a whole model of Ollama's is.
fn blob(stores: &Stores) -> String {
    let digest = crate::stores::hex(&fs::read(demo()).unwrap());
    let path = format!("home/.ollama/models/blobs/sha256-{digest}");
    stores.dir(&path).to_str().unwrap().to_owned()
}

#[test]
fn what_is_on_the_machine() {
    let stores = Stores::new();
    let output = stores.output(&["list"]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(stderr(&output), "");
    // The columns are as wide as the test's folder makes them, which is in the last one.
    insta::assert_snapshot!(stores.without_folders(stdout(&output)));
    assert_eq!(stores.output(&["ls"]).stdout, output.stdout);
}

#[test]
fn a_machine_without_models() {
    let stores = Stores::new();
    fs::remove_dir_all(stores.dir("home")).unwrap();
    fs::remove_dir_all(stores.dir("models")).unwrap();
    let output = stores.output(&["list"]);
    assert!(output.status.success() && stdout(&output).is_empty(), "{output:?}");
    assert!(stderr(&output).contains("TIERSTREAM_MODELS names folders"), "{output:?}");
}

#[test]
fn folders_that_are_named_and_not_there_are_told() {
    let stores = Stores::new();
    let output = |args: &[&str]| {
        let mut command = stores.command();
        command.env("OLLAMA_MODELS", "/nowhere/ollama");
        command.env("TIERSTREAM_MODELS", "/nowhere/mine").args(args).output().unwrap()
    };
    let wanted = [
        "OLLAMA_MODELS: there is no folder /nowhere/ollama",
        "TIERSTREAM_MODELS: there is no folder /nowhere/mine",
    ];
    for args in [&["list"][..], &["show", "novelist:31m"]] {
        let told = output(args);
        for line in wanted {
            assert!(stderr(&told).contains(&format!("note: {line}\n")), "{told:?}");
        }
    }
    let object: serde_json::Value =
        serde_json::from_slice(&output(&["list", "--json"]).stdout).unwrap();
    let errors: Vec<_> = object["unreadable"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| e["error"].as_str().unwrap())
        .collect();
    assert_eq!(errors, wanted);
    // What is found is found without a word.
    let found = output(&["show", "o/dense-GGUF:BF16"]);
    assert!(found.status.success() && !stderr(&found).contains("there is no folder"), "{found:?}");
}

#[test]
fn every_command_takes_names() {
    let stores = Stores::new();
    let (before, path) = (stores.state(), blob(&stores));
    let note = format!("note: novelist:31m (Ollama) is {path}\n");
    let turns = ["--repeats", "2", "-n", "2", "--warmup", "0", "--experts", "50%"];
    let commands: [&[&str]; 5] = [
        &["run", "novelist:31m", PROMPT, "-n", "2", "--temp", "0"],
        &["show", "NOVELIST:31m"],
        &["verify", "library/novelist:31m", "--tokens", "2", "--prompt-limit", "8"],
        &[&["bench", "decode", "novelist:31m"], &turns[..]].concat(),
        &["pack", "novelist:31m"],
    ];
    for args in commands {
        let output = stores.output(args);
        assert!(output.status.success(), "{args:?}: {output:?}");
        assert_eq!(stderr(&output).matches("note: novelist").count(), 1, "{args:?}: {output:?}");
        assert!(stderr(&output).contains(&note), "{args:?}: {output:?}");
    }
    assert_eq!(stores.json(&["show", "novelist:31m"])["model"], path);
    // What is made of a model does not go where another program has it.
    assert!(stores.state() == before, "{:?}", stores.state());
    assert!(stores.dir("current/novelist-31m.tspack").exists());
    for (name, end) in [
        ("o/dense-GGUF:BF16", "dense-BF16.gguf"),
        ("cached", "cached.gguf"),
        ("bundle.tspack", "packed/bundle.tspack"),
    ] {
        let object = stores.json(&["show", name]);
        assert!(object["model"].as_str().unwrap().ends_with(end), "{object}");
    }
}

#[test]
fn names_run_as_their_files_do() {
    let stores = Stores::new();
    let run = |model: &str| stores.json(&["run", model, PROMPT, "-n", "8", "--temp", "0"]);
    assert_eq!(run("novelist:31m")["text"], run("demo")["text"]);
    let adapted = stores.output(&["run", "novelist:lora", PROMPT, "-n", "2"]);
    assert!(stderr(&adapted).contains("note: it runs without its adapter"), "{adapted:?}");
}

#[test]
fn names_bring_template_system_prompt_and_parameters_along() {
    let stores = Stores::new();
    let template = "{{ if .System }}{{ .System }} {{ end }}{{ .Prompt }} a cold";
    let params = r#"{"temperature": 0, "num_predict": 9, "seed": 3, "num_ctx": 64, "top_k": 7}"#;
    let layers = [("template", template), ("system", "It was so."), ("params", params)];
    stores.add_name("own:1", &layers);
    let run = |args: &[&str]| stores.json(&[&["run"], args, &["-t", "1"]].concat());
    let plain =
        |prompt: &str, n: &str| run(&["demo", prompt, "--temp", "0", "-n", n])["tokens"].clone();
    let own = run(&["own:1", "It was"]);
    assert_eq!(own["tokens"], plain("It was so. It was a cold", "9"));
    assert_eq!((&own["seed"], &own["stop"]), (&3.into(), &"length".into()), "{own}");
    // Flags win.
    let told = run(&["own:1", "It was", "--system", "Then", "-n", "5", "--seed", "4"]);
    assert_eq!(told["tokens"], plain("Then It was a cold", "5"));
    assert_eq!(told["seed"], 4);
    let raw = run(&["own:1", "It was", "--raw", "-n", "4"]);
    assert_eq!(raw["tokens"], plain("It was", "4"));
    let long = "It was a cold evening. ".repeat(12);
    let refused = stores.output(&["run", "own:1", &long]);
    assert!(stderr(&refused).contains("64"), "{refused:?}");
    assert_eq!(
        run(&["own:1", &long, "--ctx", "512", "-n", "1"])["tokens"].as_array().unwrap().len(),
        1
    );

    let text = own["text"].as_str().unwrap();
    let stop = &text[text.len() / 2..text.len() / 2 + 6];
    let params =
        serde_json::json!({"temperature": 0, "num_predict": 9, "stop": [stop]}).to_string();
    stores.add_name("own:2", &[layers[0], layers[1], ("params", &params)]);
    let stopped = run(&["own:2", "It was"]);
    assert_eq!(
        (&stopped["stop"], &stopped["text"]),
        (&"stop_text".into(), &text[..text.find(stop).unwrap()].into())
    );
    assert_eq!(run(&["own:2", "It was", "--stop", "not in it"])["text"], text);

    let params = r#"{"temperature": -1}"#;
    stores.add_name("own:3", &[("params", params)]);
    let refused = stores.output(&["run", "own:3", "It was"]);
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    assert!(stderr(&refused).contains("error: temperature is -1"), "{refused:?}");
    assert!(stores.output(&["run", "own:3", "It was", "--temp", "0", "-n", "1"]).status.success());
}

#[test]
fn a_path_that_is_there_wins() {
    let stores = Stores::new();
    let args = ["show", "novelist:31m"];
    assert!(stores.output(&args).status.success());
    fs::write(stores.dir("current/novelist:31m"), "This is another file.").unwrap();
    let output = stores.output(&args);
    assert!(!output.status.success(), "{output:?}");
    assert!(stderr(&output).starts_with("error: novelist:31m: not a GGUF file"), "{output:?}");
    // What can only be a path is no name.
    for path in ["./novelist:32m", "/novelist:31m", "../novelist:31m"] {
        let output = stores.output(&["show", path]);
        assert!(stderr(&output).contains("cannot open the file"), "{path}: {output:?}");
    }
}

#[test]
fn names_that_lead_to_no_model() {
    let stores = Stores::new();
    let mut all = String::new();
    for name in [
        "novelist",
        "novelist:13m",
        "o/dense-GGUF",
        "partial",
        "split",
        "tensors",
        "hostile",
        "mine",
        "novelist:31m@0123456789ab",
        "../secret.gguf",
        "x/../../secret.gguf",
        "nothing-like-it",
        "no\nname",
    ] {
        let output = stores.output(&["run", name, PROMPT]);
        assert_eq!(output.status.code(), Some(1), "{name}: {output:?}");
        assert_eq!(stdout(&output), "", "{name}");
        let object = stores.output(&["show", name, "--json"]);
        let object: serde_json::Value = serde_json::from_str(stdout(&object)).unwrap();
        assert!(object["error"].is_string(), "{object}");
        all.push_str(&format!("{name:?}\n{}\n", stores.without_folders(stderr(&output))));
    }
    insta::assert_snapshot!(all);
}

#[test]
fn packing_a_models_file_by_its_path_stays_beside_it() {
    let stores = Stores::new();
    let file = stores.dir("models/own.gguf");
    fs::copy(demo(), &file).unwrap();
    for (model, packed) in [("own", "models/own.tspack"), ("cached", "current/cached.tspack")] {
        let output = stores.output(&["pack", model]);
        assert!(output.status.success(), "{output:?}");
        assert!(Path::new(&stores.dir(packed)).exists(), "{packed}");
    }
}

//! `tierstream pull`, from a hub on this machine.

use std::fs;
use std::process::{Command, Stdio};

use rustix::process::Signal;

use crate::hub::{Act, Host, Hub};
use crate::stores::Stores;
use crate::support::{PROMPT, demo, json, signal, stderr, stdout};

const FILE: &str = "novelist-Q4_0.gguf";

fn site() -> (Hub, Stores) {
    (Hub::start(&[(FILE, fs::read(demo()).unwrap())]), Stores::new())
}

/// The program on a machine with this hub, and with a cache that is empty.
fn command(hub: &Hub, stores: &Stores, args: &[&str]) -> Command {
    let mut command = stores.command();
    for name in ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HUB_OFFLINE"] {
        command.env_remove(name);
    }
    command.env("HF_ENDPOINT", &hub.url).env("HF_HUB_CACHE", stores.dir("hub")).args(args);
    command
}

#[test]
fn a_model_that_was_fetched_runs_by_its_name() {
    let (hub, stores) = site();
    let output = |args: &[&str]| command(&hub, &stores, args).output().unwrap();
    let missing = output(&["run", "o/r-GGUF", PROMPT]);
    let hint = "hint: `tierstream pull o/r-GGUF` fetches it from the Hugging Face hub";
    assert!(stderr(&missing).contains(hint), "{missing:?}");

    let pulled = output(&["pull", "hf.co/o/r-GGUF:q4_0"]);
    assert!(pulled.status.success(), "{pulled:?}");
    assert!(stdout(&pulled).starts_with("fetched o/r-GGUF:Q4_0, "), "{pulled:?}");
    assert_eq!(stderr(&pulled), "");
    let again = output(&["pull", "o/r-GGUF"]);
    assert!(stdout(&again).starts_with("o/r-GGUF:Q4_0 was there already, "), "{again:?}");

    assert!(stdout(&output(&["list"])).contains("\no/r-GGUF:Q4_0  "));
    let args = ["-n", "4", "--temp", "0", "--json"];
    let run = output(&[&["run", "o/r-GGUF", PROMPT][..], &args].concat());
    let run: serde_json::Value = serde_json::from_str(stdout(&run)).unwrap();
    assert_eq!(run["text"], json(&[&["run", "demo", PROMPT][..], &args[..4]].concat())["text"]);
}

#[test]
fn the_answer_as_json() {
    let (hub, stores) = site();
    let output = command(&hub, &stores, &["pull", "o/r-GGUF", "--json"]).output().unwrap();
    let answer: serde_json::Value = serde_json::from_str(stdout(&output)).unwrap();
    let bytes = fs::metadata(demo()).unwrap().len();
    assert_eq!(answer["name"], "o/r-GGUF:Q4_0");
    assert!(answer["file"].as_str().unwrap().ends_with(FILE));
    assert_eq!(answer["file_bytes"], bytes);
    assert_eq!(answer["fetched_bytes"], bytes);
    let measured = [&answer["total_s"], &answer["fetch_gbps"]];
    assert!(measured.iter().all(|x| x.as_f64().unwrap() > 0.0), "{answer}");
    assert_eq!(answer.as_object().unwrap().len(), 6);
}

#[test]
fn ctrl_c_leaves_what_has_come() {
    let (hub, stores) = site();
    hub.rule(|request| match request.host {
        Host::Store => Act::Hold(1_000_000),
        Host::Hub => Act::Serve,
    });
    for (asked, code) in [(Signal::INT, 130), (Signal::TERM, 143)] {
        hub.seen();
        let mut command = command(&hub, &stores, &["pull", "o/r-GGUF"]);
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        hub.wait_for_bytes();
        signal(&child, asked);
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        let hint =
            "error: stopped\nhint: what has come stays, and the same command goes on from there\n";
        assert_eq!(stderr(&output), hint);
        assert_eq!(stdout(&output), "");
    }
    hub.rule(|_| Act::Serve);
    let output = command(&hub, &stores, &["pull", "o/r-GGUF"]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn what_cannot_be_fetched() {
    let (hub, stores) = site();
    let refused = |args: &[&str]| {
        let output = command(&hub, &stores, args).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        stderr(&output).to_owned()
    };
    let other = refused(&["pull", "qwen3:30b"]);
    assert!(other.starts_with("error: \"qwen3:30b\" is no name of a model of the"), "{other}");
    assert!(
        other.contains("\nhint: names are like owner/repo:Q4_K_M; a model of Ollama's"),
        "{other}"
    );
    let quant = refused(&["pull", "o/r-GGUF:Q8_0"]);
    assert!(
        quant.contains("has no Q8_0; it has o/r-GGUF:Q4_0\nhint: name one of these"),
        "{quant}"
    );
    let none = refused(&["pull", "o/other"]);
    assert!(none.contains("the hub has no repository o/other"), "{none}");
    let bytes = fs::read(demo()).unwrap().len() as u64 - 1;
    hub.rule(move |request| match request.host {
        Host::Store => Act::Length(bytes),
        Host::Hub => Act::Serve,
    });
    let length = refused(&["pull", "o/r-GGUF"]);
    assert!(length.contains(&bytes.to_string()), "{length}");
}

//! `tierstream serve`: its flags, its settings, its memory, its end.

use std::fs;
use std::net::TcpListener;
use std::thread;

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::server::Server;
use crate::support::{PROMPT, json as told, output, signal, stderr, tierstream};

const MIB: u64 = 1 << 20;

/// What is generated for [`PROMPT`], without sampling.
fn generate(server: &Server, tokens: u32) -> Value {
    let options = json!({"temperature": 0, "num_predict": tokens});
    let body = json!({"model": "demo", "prompt": PROMPT, "raw": true, "stream": false, "options": options});
    body_of(&server.post("/api/generate", &body))
}

fn body_of(answer: &str) -> Value {
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
    assert!(head.starts_with("HTTP/1.1 200"), "{answer}");
    serde_json::from_str(body).expect("JSON")
}

#[test]
fn it_says_what_run_says() {
    let server = Server::start(&["--experts", "25%"]);
    let ran = told(&["run", "demo", PROMPT, "-n", "24", "--temp", "0", "--experts", "25%"]);
    let answer = generate(&server, 24);
    assert_eq!(answer["response"], ran["text"]);
    assert_eq!(answer["eval_count"], 24);
}

#[test]
fn it_ends_when_it_is_told_to() {
    for kind in [Signal::INT, Signal::TERM] {
        let mut server = Server::start(&[]);
        generate(&server, 2);
        signal(&server.child, kind);
        assert_eq!(server.child.wait().unwrap().code(), Some(0), "{kind:?}");
    }
}

#[test]
fn an_address_that_is_taken() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let host = taken.local_addr().unwrap().to_string();
    let output = output(["serve", "--host", &host]);
    assert_eq!(output.status.code(), Some(1));
    let text = stderr(&output);
    assert!(text.contains(&host) && text.contains("hint: another program listens there"), "{text}");
}

#[test]
fn keys_are_asked_for() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let file = folder.path().join("keys");
    fs::write(&file, "# old\nfirst\nsecond\n").unwrap();
    let server = Server::start(&["--api-keys", file.to_str().unwrap()]);
    let body = json!({"model": "demo", "prompt": "a", "raw": true, "options": {"num_predict": 1}});
    let ask = |more| server.post_with("/api/generate", &body, more);
    assert!(ask("").starts_with("HTTP/1.1 401"));
    assert!(ask("Authorization: Bearer third\r\n").starts_with("HTTP/1.1 401"));
    assert!(ask("Authorization: Bearer second\r\n").starts_with("HTTP/1.1 200"));
    assert!(ask("Authorization: Bearer # old\r\n").starts_with("HTTP/1.1 401"));
    // Our own clients read the file in the same way.
    let told = server.client(&["ps", "--api-keys", file.to_str().unwrap()]);
    assert!(told.status.success(), "{told:?}");
    fs::write(&file, " \n").unwrap();
    let output = output(["serve", "--host", "127.0.0.1:0", "--api-keys", file.to_str().unwrap()]);
    assert!(stderr(&output).contains("has no key"), "{output:?}");
}

/// A flag wins over the environment, and that over the file.
#[test]
fn settings_in_a_file() {
    let write = |server: &mut std::process::Command, text: &str| {
        let home = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap().keep();
        fs::create_dir_all(home.join("tierstream")).unwrap();
        fs::write(home.join("tierstream/serve.toml"), text).unwrap();
        server.env("XDG_CONFIG_HOME", &home);
    };
    // How long a model stays, in the words of `ps`: for ever only by the file.
    let expires = |server: &Server| {
        generate(server, 1);
        let told = server.json(&["ps"])["models"][0]["expires_s"].clone();
        told.as_f64().map(|seconds| (seconds / 60.0).round())
    };
    let file = "keep-alive = -1\nprompt-cache = \"1MiB\"\n";
    let of_file = Server::start_with(&[], |command| write(command, file));
    assert_eq!(expires(&of_file), None);
    let of_environment = Server::start_with(&[], |command| {
        write(command, file);
        command.env("OLLAMA_KEEP_ALIVE", "10m");
    });
    assert_eq!(expires(&of_environment), Some(10.0));
    let of_flag = Server::start_with(&["--keep-alive", "20m"], |command| {
        write(command, file);
        command.env("OLLAMA_KEEP_ALIVE", "10m");
    });
    assert_eq!(expires(&of_flag), Some(20.0));
}

#[test]
fn settings_that_are_refused() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let file = folder.path().join("serve.toml");
    let mut all = String::new();
    for text in [
        "paralel = 1",
        "ram = \"much\"",
        "parallel = 0",
        "parallel = [",
        "ram = {size = 1}",
        "config = \"other.toml\"",
    ] {
        fs::write(&file, text).unwrap();
        let output = tierstream().arg("serve").env("TIERSTREAM_CONFIG", &file).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{text}: {output:?}");
        all.push_str(&stderr(&output).replace(file.to_str().unwrap(), "FILE"));
    }
    insta::assert_snapshot!(all);
    let missing = output(["serve", "--config", "/nowhere/serve.toml"]);
    assert!(stderr(&missing).starts_with("error: cannot read /nowhere/serve.toml"), "{missing:?}");
}

/// Models, contexts, kept prompts and connections.
#[test]
fn the_budget_holds_for_all_of_it() {
    let ram = 160;
    let flags = ["--ram", &format!("{ram}MiB"), "--parallel", "4", "--prompt-cache", "8MiB"];
    let server = Server::start(&flags);
    thread::scope(|scope| {
        for client in 0..16 {
            let server = &server;
            scope.spawn(move || {
                let prompt = format!("Chapter {client}. {}", PROMPT.repeat(8));
                let options = json!({"num_predict": 16, "seed": client});
                let body =
                    json!({"model": "demo", "prompt": prompt, "raw": true, "options": options});
                let answer = server.post("/api/generate", &body);
                assert!(answer.contains("\"done\":true"), "{answer}");
            });
        }
    });
    let status = fs::read_to_string(format!("/proc/{}/status", server.child.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let peak: u64 = line.split_whitespace().next().unwrap().parse().unwrap();
    assert!(peak << 10 <= ram * MIB, "a peak of {} MiB", peak >> 10);
}

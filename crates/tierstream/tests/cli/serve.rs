//! `tierstream serve`: its flags, its settings, its memory, its end.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::thread;

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::server::Server;
use crate::stores::Stores;
use crate::support::{PROMPT, json as told, output, signal, stderr, stdout, tierstream};

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

/// A server whose messages can be read, and an answer that does not end by itself.
fn busy() -> (Server, TcpStream) {
    busy_with(|_| ())
}

/// With what `prepare` does to its command.
fn busy_with(prepare: impl FnOnce(&mut Command)) -> (Server, TcpStream) {
    let server = Server::start_as(&["--ctx", "200000"], |command| {
        prepare(command);
        command.stderr(Stdio::piped());
    });
    let options = json!({"temperature": 0});
    let body = json!({"model": "demo", "prompt": PROMPT, "raw": true, "options": options});
    let mut answer = server.begin("/api/generate", &body);
    let mut read = String::new();
    while !read.contains("response") {
        let mut byte = [0];
        answer.read_exact(&mut byte).unwrap();
        read.push(char::from(byte[0]));
    }
    (server, answer)
}

#[test]
fn a_busy_server_says_that_it_stops() {
    let (server, mut answer) = busy();
    let told = server.told();
    let mut rest = String::new();
    answer.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("the server is stopping"), "{rest}");
    assert!(told.contains("stopping: answers have 3 s to end; Ctrl-C again"), "{told}");
}

#[test]
fn a_second_signal_ends_a_busy_server_at_once() {
    let (mut server, _answer) = busy();
    signal(&server.child, Signal::INT);
    let mut told = BufReader::new(server.child.stderr.take().unwrap()).lines();
    assert!(told.any(|line| line.unwrap().starts_with("stopping: ")));
    signal(&server.child, Signal::INT);
    assert_eq!(server.child.wait().unwrap().code(), Some(1));
}

#[test]
fn a_signal_that_is_ignored_stays_so() {
    // As `nohup` does it.
    let (mut server, _answer) = busy_with(|command| {
        let mut shell = Command::new("sh");
        shell.args(["-c", "trap '' HUP; exec \"$@\"", "sh"]).arg(command.get_program());
        shell.args(command.get_args()).stdin(Stdio::null()).stdout(Stdio::piped());
        shell.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
        *command = shell;
    });
    signal(&server.child, Signal::HUP);
    signal(&server.child, Signal::TERM);
    // A second signal would have ended it at once.
    assert_eq!(server.child.wait().unwrap().code(), Some(0));
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
        "parallel = 300",
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

/// A number of Ollama's that is 0 is as usual.
#[test]
fn variables_of_ollamas_mean_what_they_mean_to_it() {
    let server = Server::start_as(&[], |command| {
        for name in ["NUM_PARALLEL", "MAX_LOADED_MODELS", "MAX_QUEUE"] {
            command.env(format!("OLLAMA_{name}"), "0");
        }
        command.env("OLLAMA_CONTEXT_LENGTH", " \"320\"");
    });
    generate(&server, 1);
    assert_eq!(server.json(&["ps"])["models"][0]["ctx"], 320);
    for (name, value) in [("OLLAMA_CONTEXT_LENGTH", "many"), ("OLLAMA_NUM_PARALLEL", "-1")] {
        let output = tierstream().arg("serve").env(name, value).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        let tip = format!("tip: it may be from the environment: {name}={value}");
        assert!(stderr(&output).contains(&tip), "{output:?}");
    }
}

#[test]
fn names_of_stores_are_looked_for_when_it_starts() {
    let stores = Stores::new();
    let server = Server::start_with(&["novelist:31m"], |command| {
        for (name, value) in stores.command().get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command.stderr(Stdio::piped());
    });
    let load = json!({ "model": "novelist:31m" });
    assert!(server.post("/api/generate", &load).contains("\"load\""));
    let told = server.told();
    assert!(told.contains("note: loaded novelist:31m in "), "{told}");
    for (name, wrong) in [("nothing-like-it", "no model"), ("novelist:lora", "has a LoRA")] {
        let output = stores.output(&["serve", name, "--host", "127.0.0.1:0"]);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(stderr(&output).contains(wrong), "{output:?}");
    }
}

#[test]
fn a_port_is_a_part_of_the_address() {
    for args in [&["serve", "--port", "8080"][..], &["ps", "--port=8080"]] {
        let output = output(args);
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        let text = stderr(&output);
        assert!(text.contains("unexpected argument '--port"), "{text}");
        assert!(text.contains("tip: the port belongs to the address: --host :8080"), "{text}");
    }
    let help = output(["serve", "--help"]);
    assert!(!stdout(&help).contains("--port") && stdout(&help).contains("for all models together"));
}

/// The prompts that are kept are a share of it by default.
#[test]
fn the_least_budget_is_named_and_works() {
    let ask = |ram: &str| {
        let server = Server::start(&["--ram", ram]);
        let body = json!({"model": "demo", "prompt": PROMPT, "raw": true, "stream": false,
            "options": {"num_predict": 4}});
        server.post("/api/generate", &body)
    };
    let refused = ask("32MiB");
    assert!(refused.contains("32.0 MiB is too little memory for this model"), "{refused}");
    let named = refused.split_once("give it --ram ").and_then(|(_, rest)| rest.split_once(','));
    let named = named.unwrap_or_else(|| panic!("{refused}")).0;
    for _ in 0..4 {
        let answer = ask(named);
        assert!(answer.starts_with("HTTP/1.1 200 "), "{named}: {answer}");
    }
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

/// A folder that cannot be read whoever asks: a link to itself.
#[test]
fn stores_that_cannot_be_searched_are_told() {
    let stores = Stores::new();
    let models = stores.dir("unread");
    fs::create_dir(&models).unwrap();
    std::os::unix::fs::symlink("manifests", models.join("manifests")).unwrap();
    let server = Server::start_with(&[], |command| {
        command.env("OLLAMA_MODELS", &models).stderr(Stdio::piped());
    });
    let answer = server.post("/api/show", &json!({"model": "nowhere:1b"}));
    assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
    assert!(answer.contains("a store could not be searched"), "{answer}");
    assert!(!answer.contains("unread"), "{answer}");
    let told = server.told();
    let folder = models.join("manifests");
    let line = format!("note: a store could not be searched: {}: ", folder.display());
    assert!(told.contains(&line), "{told}");
}

#[test]
fn routing_of_requests_is_recorded_without_their_tokens() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let folder = dir.path().join("traces");
    let mut server = Server::start(&["--trace", folder.to_str().unwrap(), "--experts", "25%"]);
    let first = generate(&server, 5);
    // The same prompt is there already, but for its last token.
    generate(&server, 5);
    let files =
        || fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect::<Vec<_>>();
    let [part] = &files()[..] else { panic!("{:?}", files()) };
    assert!(part.to_str().unwrap().ends_with("-1.parquet.part"), "{part:?}");
    signal(&server.child, Signal::TERM);
    assert_eq!(server.child.wait().unwrap().code(), Some(0));
    let [file] = &files()[..] else { panic!("{:?}", files()) };
    let exported = output(["trace", "export", file.to_str().unwrap(), "-"]);
    let lines: Vec<Value> =
        stdout(&exported).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines[0]["header"]["source"], "tierstream serve --trace");
    let lines = &lines[1..];
    let of = |prompt: u64, phase: &str| {
        lines.iter().filter(|line| line["prompt"] == prompt && line["phase"] == phase).count()
            as u64
    };
    let prompt = first["prompt_eval_count"].as_u64().unwrap();
    // The last token of an answer is not computed any more.
    assert_eq!([of(0, "prefill"), of(0, "decode")], [prompt, 4]);
    assert_eq!([of(1, "prefill"), of(1, "decode")], [1, 4]);
    assert_eq!(lines.len() as u64, prompt + 9);
    assert!(lines.iter().all(|line| line["id"].is_null()), "no ids: {}", lines[0]);
}

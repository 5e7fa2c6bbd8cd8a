//! `tierstream ps` and `tierstream stop`, of a server that runs.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;

use serde_json::{Value, json};

use crate::server::Server;
use crate::support::{stderr, stdout, tierstream};

#[test]
fn what_is_loaded_is_told_and_stopped() {
    let server = Server::start(&[]);
    let none = server.client(&["ps"]);
    assert!(none.status.success() && stdout(&none).is_empty(), "{none:?}");
    assert_eq!(stderr(&none), "note: no model is loaded\n");

    let load = json!({ "model": "demo", "keep_alive": -1 });
    assert!(server.post("/api/generate", &load).contains("\"load\""));
    let told = server.json(&["ps"]);
    let demo = &told["models"][0];
    assert_eq!(told["url"], format!("http://{}", server.host));
    assert_eq!((&demo["name"], &demo["ctx"]), (&"demo".into(), &512.into()), "{told}");
    assert_eq!((&demo["gpu_bytes"], &demo["expires_s"]), (&0.into(), &Value::Null), "{told}");
    assert!(demo["memory_bytes"].as_u64().unwrap() > 1 << 20, "{told}");
    assert!(demo["expires_at"].is_string(), "{told}");
    let table = server.client(&["ps"]);
    let lines: Vec<_> = stdout(&table).lines().map(|l| l.split("  ").next().unwrap()).collect();
    assert_eq!(lines, ["NAME", "demo"], "{table:?}");
    assert!(stdout(&table).trim_end().ends_with("stays"), "{table:?}");

    let stopped = server.client(&["stop", "demo"]);
    assert!(stopped.status.success(), "{stopped:?}");
    assert_eq!(stdout(&stopped), "stopped demo\n");
    assert_eq!(server.json(&["ps"])["models"], json!([]));
    let again = server.client(&["stop", "demo"]);
    assert!(again.status.success() && stdout(&again).is_empty(), "{again:?}");
    assert_eq!(stderr(&again), "note: it was not loaded\n");
    assert_eq!(server.json(&["stop", "demo"]), json!({ "model": "demo", "stopped": [] }));

    let other = server.client(&["stop", "nothing-like-it"]);
    assert_eq!(other.status.code(), Some(1), "{other:?}");
    assert!(stderr(&other).contains("\nhint: `tierstream ps` tells"), "{other:?}");
}

/// What is told of a model's memory is what it was loaded with, whatever was loaded before.
#[test]
fn a_model_takes_the_same_memory_each_time() {
    let server = Server::start(&["--experts", "50%"]);
    let sizes: Vec<_> = (0..4)
        .map(|_| {
            let body = json!({"model": "demo", "prompt": "It was", "options": {"num_predict": 4}});
            server.post("/api/generate", &body);
            let before = server.json(&["ps"])["models"][0]["memory_bytes"].as_u64().unwrap();
            server.post("/api/generate", &body);
            assert_eq!(server.json(&["ps"])["models"][0]["memory_bytes"], before);
            server.json(&["stop", "demo"]);
            before
        })
        .collect();
    assert!(sizes[0] > 0 && sizes.iter().all(|size| *size == sizes[0]), "{sizes:?}");
}

#[test]
fn keys_are_those_of_the_server() {
    let dir = tempfile::tempdir().unwrap();
    let keys = dir.path().join("keys");
    fs::write(&keys, "one\ntwo\n").unwrap();
    let keys = keys.to_str().unwrap();
    let server = Server::start(&["--api-keys", keys]);
    let refused = server.client(&["ps"]);
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    assert!(stderr(&refused).contains("\nhint: --api-keys has the keys"), "{refused:?}");
    assert!(server.client(&["ps", "--api-keys", keys]).status.success());
}

#[test]
fn nobody_or_somebody_else_listens() {
    // Nobody has a port that was given back just now.
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    for args in [&["ps", "--host", &free][..], &["stop", "demo", "--host", &free]] {
        let output = tierstream().args(args).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let text = format!("error: nothing listens on {free}\nhint: `tierstream serve` starts");
        assert!(stderr(&output).starts_with(&text), "{output:?}");
    }
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let host = other.local_addr().unwrap().to_string();
    let answer = std::thread::spawn(move || {
        let (mut stream, _) = other.accept().unwrap();
        let mut line = String::new();
        BufReader::new(stream.try_clone().unwrap()).read_line(&mut line).unwrap();
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nHello").unwrap();
    });
    let output = tierstream().args(["ps", "--host", &host]).output().unwrap();
    answer.join().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(
        stderr(&output).starts_with(&format!("error: what listens on {host} is no")),
        "{output:?}"
    );
}

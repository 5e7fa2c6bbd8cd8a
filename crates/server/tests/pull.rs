//! `/api/pull`, from a hub on this machine.

#[path = "../../pull/tests/support/mod.rs"]
mod hub;
mod support;

use std::sync::Arc;

use axum::http::StatusCode;
use hub::{Act, Host, Hub, sha256};
use serde_json::{Value, json};
use support::{Fixture, read_until, write_model};
use tempfile::TempDir;
use tierstream_pull::{Options, Puller};
use tierstream_script::Script;
use tierstream_server::Settings;
use tierstream_store::Environment;

struct Site {
    hub: Arc<Hub>,
    bytes: Vec<u8>,
    folder: TempDir,
}

impl Site {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("written.gguf");
        write_model(&path, None);
        let mut bytes = std::fs::read(path).expect("it was written");
        bytes.resize(100_000, 7);
        let hub = Arc::new(Hub::start(&[("m-Q4_K_M.gguf", bytes.clone())]));
        Self { hub, bytes, folder }
    }

    fn fixture(&self) -> Fixture {
        let environment = Environment {
            hf_hub_cache: Some(self.folder.path().join("hub")),
            hf_endpoint: Some(self.hub.url.clone()),
            ..Environment::default()
        };
        let puller = Puller::new(&environment, Options::default()).expect("a hub and a cache");
        let settings = Settings { puller: Some(Arc::new(puller)), ..Settings::default() };
        Fixture::beside(&environment, &self.folder, Script::default(), settings)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_is_fetched_and_found() {
    let site = Site::new();
    let fixture = site.fixture();
    let lines = fixture.lines("/api/pull", json!({ "model": "hf.co/o/r-GGUF" })).await;
    let digest = sha256(&site.bytes);
    let statuses: Vec<&str> = lines.iter().map(|l| l["status"].as_str().expect("one")).collect();
    let pulling = format!("pulling {}", &digest[..12]);
    let mut seen = statuses.clone();
    seen.dedup();
    let expected =
        ["pulling manifest", &pulling, "verifying sha256 digest", "writing manifest", "success"];
    assert_eq!(seen, expected);
    let last = lines.iter().rfind(|line| line["status"] == pulling).expect("there is one");
    let whole = json!({
        "status": pulling,
        "digest": format!("sha256:{digest}"),
        "total": 100_000,
        "completed": 100_000,
    });
    assert_eq!(*last, whole);
    let (_, tags) = fixture.get("/api/tags").await;
    let models = tags["models"].as_array().expect("a list");
    assert!(models.iter().any(|model| model["name"] == "o/r-GGUF:Q4_K_M"), "{tags}");
    let (status, shown) = fixture.post("/api/show", json!({ "model": "o/r-GGUF" })).await;
    assert_eq!((status, &shown["details"]["family"]), (StatusCode::OK, &json!("llama")));
    // The older name of the field, and one answer; nothing is left to fetch.
    site.hub.sent_bytes();
    let body = json!({ "name": "o/r-GGUF:q4_k_m", "stream": false });
    let answer = fixture.post("/api/pull", body).await;
    assert_eq!(answer, (StatusCode::OK, json!({ "status": "success" })));
    assert_eq!(site.hub.sent_bytes(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn names_and_failures_are_told() {
    let site = Site::new();
    let fixture = site.fixture();
    let pull = |model: &str, stream: bool| {
        fixture.post("/api/pull", json!({ "model": model, "stream": stream }))
    };
    for name in ["qwen3:30b", "registry.ollama.ai/library/qwen3", "../x", ""] {
        for stream in [true, false] {
            let (status, answer) = pull(name, stream).await;
            assert_eq!(status, StatusCode::BAD_REQUEST, "{name}: {answer}");
            let error = answer["error"].as_str().expect("one");
            assert!(name.is_empty() || error.contains("`ollama pull`"), "{error}");
        }
    }
    for (name, why) in [("o/other", "no repository o/other"), ("o/r-GGUF:Q8_0", "has no Q8_0")] {
        let (status, answer) = pull(name, false).await;
        assert_eq!(status, StatusCode::NOT_FOUND, "{answer}");
        assert!(answer["error"].as_str().is_some_and(|error| error.contains(why)), "{answer}");
        let lines = fixture.lines("/api/pull", json!({ "model": name })).await;
        assert_eq!(lines[0], json!({ "status": "pulling manifest" }));
        assert_eq!((lines.len(), &lines[1]), (2, &answer));
    }
    site.hub.rule(|request| match request.host {
        Host::Store => Act::Corrupt,
        Host::Hub => Act::Serve,
    });
    let (status, answer) = pull("o/r-GGUF", false).await;
    assert_eq!(status, StatusCode::BAD_GATEWAY, "{answer}");
    let none = Fixture::new(Script::default());
    let (status, _) = none.post("/api/pull", json!({ "model": "o/r-GGUF" })).await;
    assert_eq!(status, StatusCode::NOT_IMPLEMENTED);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_ends_its_pull() {
    let site = Site::new();
    site.hub.rule(|request| match request.host {
        Host::Store => Act::Hold(50_000),
        Host::Hub => Act::Serve,
    });
    let listening = site.fixture().listen().await;
    for stream in [true, false] {
        let body: Value = json!({ "model": "o/r-GGUF", "stream": stream });
        let mut client = listening.begin("/api/pull", &body).await;
        let hub = site.hub.clone();
        match stream {
            true => drop(read_until(&mut client, "\"completed\":").await),
            false => wait(move || hub.wait_for_bytes()).await,
        }
        drop(client);
        let hub = site.hub.clone();
        wait(move || hub.wait_until_left()).await;
        site.hub.seen();
    }
}

/// Waits on a thread for that.
async fn wait(until: impl FnOnce() + Send + 'static) {
    tokio::task::spawn_blocking(until).await.expect("it ends");
}

//! Names of models: several for the same weights, as Ollama has them.

mod support;

use std::collections::HashSet;
use std::fs;

use axum::http::StatusCode;
use serde_json::{Value, json};
use support::{Fixture, TEMPLATE, write_model};
use tempfile::TempDir;
use tierstream_script::Script;
use tierstream_server::Settings;
use tierstream_store::Environment;

/// A store of Ollama's, in which names have these layers beside the same weights.
fn store(names: &[(&str, &[(&str, &str)])]) -> (TempDir, Environment) {
    let folder = tempfile::tempdir().expect("a folder");
    let blobs = folder.path().join("blobs");
    fs::create_dir_all(&blobs).expect("ours");
    let path = |n: usize| blobs.join(format!("sha256-{n:064x}"));
    write_model(&path(0), Some(TEMPLATE));
    let layer = |n: usize, kind: &str| {
        let size = path(n).metadata().expect("written").len();
        let kind = format!("application/vnd.ollama.image.{kind}");
        json!({"mediaType": kind, "digest": format!("sha256:{n:064x}"), "size": size})
    };
    let mut n = 0;
    for (name, layers) in names {
        let mut all = vec![layer(0, "model")];
        for (kind, text) in *layers {
            n += 1;
            fs::write(path(n), text).expect("ours");
            all.push(layer(n, kind));
        }
        let manifest = folder.path().join(format!("manifests/localhost/library/{name}"));
        fs::create_dir_all(&manifest).expect("ours");
        fs::write(manifest.join("latest"), json!({"layers": all}).to_string()).expect("ours");
    }
    let environment =
        Environment { ollama_models: Some(folder.path().into()), ..Environment::default() };
    (folder, environment)
}

fn server(folder: &TempDir, environment: &Environment, engine: &Script) -> Fixture {
    Fixture::beside(environment, folder, engine.clone(), Settings::default())
}

async fn ask(fixture: &Fixture, name: &str) -> (StatusCode, Value) {
    let model = format!("localhost/library/{name}");
    let messages = json!([{"role": "user", "content": "Hi"}]);
    fixture.post("/api/chat", json!({"model": model, "messages": messages, "stream": false})).await
}

/// Each name has its own system prompt and parameters, whichever was asked for first, and the weights are loaded
/// once.
#[tokio::test]
async fn names_of_the_same_weights_are_told_apart() {
    let names: [(&str, &[(&str, &str)]); 2] = [
        ("mario", &[("system", "SAY[It is me, Mario]YAS"), ("params", "{\"num_predict\": 5}")]),
        ("plain", &[]),
    ];
    for order in [["mario", "plain"], ["plain", "mario"]] {
        let (folder, environment) = store(&names);
        let engine = Script::default();
        let fixture = server(&folder, &environment, &engine);
        for name in [order, order].concat() {
            let (status, answer) = ask(&fixture, name).await;
            assert_eq!(status, StatusCode::OK, "{answer}");
            let expected = if name == "mario" { "It is" } else { "You said: Hi" };
            assert_eq!(answer["message"]["content"], expected, "{order:?}");
            assert_eq!(answer["model"], format!("localhost/library/{name}"));
        }
        assert_eq!(engine.loads.lock().expect("no panic").len(), 1);
        // Programs take them for different models by their digests.
        let (_, tags) = fixture.get("/api/tags").await;
        let all = tags["models"].as_array().expect("models");
        let digests: HashSet<_> = all.iter().map(|model| model["digest"].to_string()).collect();
        assert_eq!(digests.len(), all.len());
    }
}

/// A client that has sent no stop texts does not hear of any.
#[tokio::test]
async fn stop_texts_of_a_model_are_not_those_of_a_client() {
    let (folder, environment) =
        store(&[("stops", &[("params", "{\"stop\": [\"Mario\", \"END\"]}")])]);
    let fixture = server(&folder, &environment, &Script::default());
    let tools = json!([{"name": "jump", "input_schema": {"type": "object"}}]);
    let ask = async |said: &str, stops: Value| {
        let messages = json!([{"role": "user", "content": format!("SAY[{said}]YAS")}]);
        let body = json!({"model": "localhost/library/stops", "max_tokens": 99, "messages": messages,
            "tools": tools, "stop_sequences": stops});
        let (status, answer) = fixture.post("/v1/messages", body).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        (answer["stop_reason"].clone(), answer["stop_sequence"].clone())
    };
    let call = "<tool~_call>{\"name\": \"jump\", \"arguments\": {}}</tool~_call>END";
    assert_eq!(ask("Me, Mario.", Value::Null).await, (json!("end_turn"), Value::Null));
    assert_eq!(ask(call, Value::Null).await, (json!("tool_use"), Value::Null));
    let own = json!("Mario");
    assert_eq!(ask("Me, Mario.", json!([own])).await, (json!("stop_sequence"), own));
}

#[tokio::test]
async fn a_lora_is_refused_and_not_passed_over() {
    let (folder, environment) = store(&[("tuned", &[("adapter", "GGUF")])]);
    let engine = Script::default();
    let fixture = server(&folder, &environment, &engine);
    let (status, answer) = ask(&fixture, "tuned").await;
    assert_eq!(status, StatusCode::NOT_IMPLEMENTED, "{answer}");
    assert!(answer["error"].as_str().expect("why").contains("LoRA"), "{answer}");
    // Before its weights are read.
    assert!(engine.loads.lock().expect("no panic").is_empty());
}

/// What cannot be read is told, and nothing is answered without it.
#[tokio::test]
async fn layers_that_are_damaged_are_told() {
    let params = "{\"temperature\": ";
    let (folder, environment) =
        store(&[("params", &[("params", params)]), ("system", &[("system", "SAY[x]YAS")])]);
    let system = folder.path().join(format!("blobs/sha256-{:064x}", 2));
    fs::write(system, [0xff; 9]).expect("ours");
    let fixture = server(&folder, &environment, &Script::default());
    for (name, expected) in [("params", "parameters"), ("system", "UTF-8")] {
        let (status, answer) = ask(&fixture, name).await;
        assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR, "{answer}");
        assert!(answer["error"].as_str().expect("why").contains(expected), "{answer}");
    }
}

//! What a request may take: memory for its body, and time.

mod support;

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{Request, StatusCode, header};
use futures_util::{StreamExt, stream};
use serde_json::{Value, json};
use support::{Fixture, from};
use tierstream_script::{Gate, Script};
use tierstream_server::Settings;
use tokio::sync::oneshot;
use tower::ServiceExt;

const PATHS: [&str; 6] = [
    "/api/chat",
    "/api/embed",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/messages",
    "/tokenize",
];

fn request(path: &str, body: Body) -> Request<Body> {
    Request::post(path).header(header::HOST, "localhost").body(body).expect("valid")
}

fn chat(text: &str) -> Value {
    json!({"model": "one", "messages": [{"role": "user", "content": text}], "stream": false})
}

/// A body whose end comes when it is let: the first channel tells that all before it was read.
fn held(first: &str, rest: &str) -> (Body, oneshot::Receiver<()>, oneshot::Sender<()>) {
    let (first, rest) = (Bytes::from(first.to_owned()), Bytes::from(rest.to_owned()));
    let (read, is_read) = oneshot::channel();
    let (go, goes) = oneshot::channel();
    let last = async move {
        read.send(()).expect("somebody waits for it");
        drop(goes.await);
        rest
    };
    let pieces = stream::once(async { first }).chain(stream::once(last));
    (Body::from_stream(pieces.map(Ok::<_, std::io::Error>)), is_read, go)
}

async fn wait_until_reached(gate: &Arc<Gate>) {
    let gate = gate.clone();
    tokio::task::spawn_blocking(move || gate.wait_until_reached()).await.expect("it is reached");
}

#[tokio::test]
async fn a_body_that_is_too_large_is_refused_before_it_is_read() {
    let settings = Settings { body_bytes_max: 100, ..Settings::default() };
    let fixture = Fixture::with(Script::default(), settings);
    for path in PATHS {
        let (status, answer) = fixture.send(request(path, Body::from("x".repeat(101)))).await;
        assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE, "{answer}");
        // The size is not known before it has come.
        let (body, is_read, _go) = held(&"x".repeat(101), "");
        let (status, answer) = fixture.send(request(path, body)).await;
        assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE, "{answer}");
        assert!(is_read.await.is_err(), "nothing more was asked for");
    }
    let (status, _) = fixture.send(request("/api/chat", Body::from(" ".repeat(100)))).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn bodies_that_come_at_the_same_time_share_memory() {
    let settings = Settings { bodies_bytes_max: 64 << 10, ..Settings::default() };
    let fixture = Fixture::with(Script::default(), settings);
    let text = chat(&format!("SAY[abc]YAS{}", "x".repeat(7 << 10))).to_string();
    let (first, second) = text.split_at(text.len() - 10);
    let (one, one_is_read, one_goes) = held(first, second);
    let (two, two_is_read, two_goes) = held(first, second);
    let others = async {
        one_is_read.await.expect("it is read");
        two_is_read.await.expect("it is read");
        for path in PATHS {
            let request = request(path, Body::from(text.clone()));
            let refused = fixture.router.clone().oneshot(request).await.expect("an answer");
            assert_eq!(refused.status(), StatusCode::SERVICE_UNAVAILABLE);
            assert!(refused.headers().contains_key(header::RETRY_AFTER));
            assert_eq!(refused.headers()[header::CONNECTION], "close");
        }
        one_goes.send(()).expect("it waits");
        two_goes.send(()).expect("it waits");
    };
    // Of peers of which none may have all.
    let sent = [(one, 1), (two, 2)]
        .map(|(body, n)| fixture.send(from([10, 0, 0, n], request("/api/chat", body))));
    let (answers, ()) = tokio::join!(futures_util::future::join_all(sent), others);
    for (status, answer) in answers {
        // Too long for the context, but read.
        assert_eq!(status, StatusCode::BAD_REQUEST, "{answer}");
    }
    let (status, answer) = fixture.post("/api/chat", chat("SAY[abc]YAS")).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
}

/// Values take more memory than their text says.
#[tokio::test]
async fn a_body_of_many_values_is_refused() {
    let settings = Settings { bodies_bytes_max: 64 << 10, ..Settings::default() };
    let fixture = Fixture::with(Script::default(), settings);
    let values = |n| json!({"model": "one", "prompt": vec![1; n], "max_tokens": 1});
    let (status, answer) = fixture.post("/v1/completions", values(100)).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    let (status, answer) = fixture.post("/v1/completions", values(1000)).await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE, "{answer}");
}

/// What an answer repeats of a request has memory beside it, and may not be more than there ever is.
#[tokio::test]
async fn an_answer_that_would_repeat_too_much_is_refused() {
    let settings = Settings { bodies_bytes_max: 64 << 10, ..Settings::default() };
    let fixture = Fixture::with(Script::default(), settings);
    let long = |n: usize| json!({"model": "one", "input": "SAY[abc]YAS", "instructions": "x".repeat(n << 10)});
    let (status, answer) = fixture.post("/v1/responses", long(2)).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    let (status, answer) = fixture.post("/v1/responses", long(6)).await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE, "{answer}");
}

/// As JSON they take many times what the text does, and are not made before somebody takes them.
#[tokio::test]
async fn tokens_of_a_long_text_come_in_parts() {
    let fixture = Fixture::new(Script::default());
    for with_pieces in [false, true] {
        let body =
            json!({"model": "one", "content": "a".repeat(1 << 20), "with_pieces": with_pieces});
        let request = support::post("/tokenize", &body);
        let answer = fixture.router.clone().oneshot(request).await.expect("an answer");
        let mut parts = answer.into_body().into_data_stream();
        let mut all = 0;
        while let Some(part) = parts.next().await {
            let bytes = part.expect("a part").len();
            assert!(bytes < 1 << 18, "{bytes}");
            all += bytes;
        }
        assert!(all > 3 << 20, "{all}");
    }
}

#[tokio::test]
async fn memory_is_held_until_a_request_is_tokens() {
    let (load_gate, gate) = (Arc::<Gate>::default(), Arc::<Gate>::default());
    let engine = Script {
        gate: Some(gate.clone()),
        load_gate: Some(load_gate.clone()),
        ..Script::default()
    };
    let settings = Settings { bodies_bytes_max: 23 << 10, ..Settings::default() };
    let fixture = Fixture::with(engine, settings);
    let body = || chat(&format!("{} SAY[abc]YAS", "x".repeat(2 << 10)));
    let third = async {
        wait_until_reached(&load_gate).await;
        let (status, answer) = fixture.post("/api/chat", body()).await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{answer}");
        load_gate.open(u64::MAX);
        wait_until_reached(&gate).await;
        let opened = async {
            while fixture.metric("llamacpp:requests_deferred").await < 1.0 {
                tokio::task::yield_now().await;
            }
            gate.open(u64::MAX);
        };
        tokio::join!(fixture.post("/api/chat", body()), opened).0
    };
    let (first, third) = tokio::join!(fixture.post("/api/chat", body()), third);
    for (status, answer) in [first, third] {
        assert_eq!((status, &answer["message"]["content"]), (StatusCode::OK, &json!("abc")));
    }
}

/// Texts that wait for long, to be computed one after the other, are tokens by then.
#[tokio::test]
async fn memory_is_not_held_while_inputs_are_computed() {
    // As JSON, these take many times what they do as tokens.
    let long = vec![97; 200];
    for (path, body) in [
        ("/v1/embeddings", json!({"model": "one", "input": [long, long]})),
        ("/v1/completions", json!({"model": "one", "prompt": [long, long], "max_tokens": 1})),
    ] {
        let gate = Arc::<Gate>::default();
        let settings = Settings { bodies_bytes_max: 96 << 10, ..Settings::default() };
        let engine = Script { gate: Some(gate.clone()), ..Script::default() };
        let fixture = Fixture::with(engine, settings);
        let second = async {
            wait_until_reached(&gate).await;
            let answer = fixture.post(path, body.clone());
            let opened = async {
                while fixture.metric("llamacpp:requests_deferred").await < 1.0 {
                    tokio::task::yield_now().await;
                }
                gate.open(u64::MAX);
            };
            tokio::join!(answer, opened).0
        };
        let (first, second) = tokio::join!(fixture.post(path, body.clone()), second);
        assert_eq!([first.0, second.0], [StatusCode::OK; 2], "{} {}", first.1, second.1);
    }
}

#[tokio::test]
async fn a_peer_leaves_others_memory() {
    let settings = Settings { bodies_bytes_max: 64 << 10, ..Settings::default() };
    let fixture = Fixture::with(Script { ctx: 8192, ..Script::default() }, settings);
    let text = chat(&format!("SAY[abc]YAS{}", "x".repeat(4 << 10))).to_string();
    let (first, rest) = text.split_at(text.len() - 10);
    let (one, one_is_read, one_goes) = held(first, rest);
    let (two, two_is_read, two_goes) = held(first, rest);
    let others = async {
        one_is_read.await.expect("it is read");
        two_is_read.await.expect("it is read");
        let send =
            |n| fixture.send(from([10, 0, 0, n], request("/api/chat", Body::from(text.clone()))));
        let statuses = [send(1).await.0, send(2).await.0];
        one_goes.send(()).expect("it waits");
        two_goes.send(()).expect("it waits");
        statuses
    };
    let sent = [one, two].map(|body| fixture.send(from([10, 0, 0, 1], request("/api/chat", body))));
    let (answers, statuses) = tokio::join!(futures_util::future::join_all(sent), others);
    assert_eq!(statuses, [StatusCode::SERVICE_UNAVAILABLE, StatusCode::OK]);
    assert!(answers.iter().all(|(status, _)| *status == StatusCode::OK), "{answers:?}");
}

/// However often a piece of it comes.
#[tokio::test(start_paused = true)]
async fn a_body_has_a_minute() {
    let fixture = Fixture::new(Script::default());
    for path in PATHS {
        let pieces = stream::repeat(()).then(|()| async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            Ok::<_, std::io::Error>(" ")
        });
        let (status, answer) = fixture.send(request(path, Body::from_stream(pieces))).await;
        assert_eq!(status, StatusCode::REQUEST_TIMEOUT, "{answer}");
    }
}

/// Loading is a part of it. There is no time at all here.
#[tokio::test]
async fn a_deadline_holds_while_a_model_is_loaded() {
    let gate = Arc::<Gate>::default();
    let engine = Script { load_gate: Some(gate.clone()), ..Script::default() };
    let settings = Settings { deadline: Duration::ZERO, ..Settings::default() };
    let fixture = Fixture::with(engine, settings);
    let input = json!({"model": "one", "input": "a", "content": "a"});
    let message = json!({"model": "one", "max_tokens": 1, "messages": chat("a")["messages"]});
    for (path, body) in [
        ("/api/chat", chat("a")),
        ("/api/chat", json!({"model": "one", "messages": []})),
        ("/api/embed", input.clone()),
        ("/v1/chat/completions", chat("a")),
        ("/v1/responses", input.clone()),
        ("/v1/messages", message.clone()),
        ("/v1/messages/count_tokens", message),
        ("/tokenize", input),
    ] {
        let (status, answer) = fixture.post(path, body).await;
        assert_eq!(status, StatusCode::GATEWAY_TIMEOUT, "{path}: {answer}");
    }
    // Or the load would never end.
    gate.open(u64::MAX);
}

/// However fast the next token comes.
#[tokio::test]
async fn a_deadline_holds_while_tokens_come() {
    let fixture = Fixture::new(Script::default());
    let mut body = chat(&format!("SAY[{}]YAS", "a".repeat(100)));
    body["stream"] = true.into();
    let request = support::post("/api/chat", &body);
    let answer = fixture.router.clone().oneshot(request).await.expect("an answer");
    let mut lines = answer.into_body().into_data_stream();
    assert!(lines.next().await.is_some());
    while fixture.metric("llamacpp:requests_processing").await > 0.0 {
        tokio::task::yield_now().await;
    }
    // All tokens are there, and nobody waits for anything.
    tokio::time::pause();
    tokio::time::advance(Settings::default().deadline).await;
    let mut rest = Vec::new();
    while let Some(line) = lines.next().await {
        rest.push(serde_json::from_slice::<Value>(&line.expect("a line")).expect("JSON"));
    }
    assert_eq!(rest, [json!({"error": "that took longer than the server allows"})]);
}

//! Several requests at once: their turns, their ends, and what they do to each other.

mod support;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::http::{StatusCode, header};
use serde_json::{Value, json};
use support::{Fixture, TRAINED, from, read_until, send};
use tierstream_script::{FAILS, Gate, MODEL_BYTES, PANICS, Script, TOKEN_BYTES};
use tierstream_server::{PromptCache, Settings};
use tokio::io::AsyncReadExt;
use tokio::net::TcpSocket;
use tower::ServiceExt;

fn chat(model: &str, text: &str) -> Value {
    json!({"model": model, "messages": [{"role": "user", "content": text}], "stream": false})
}

fn streamed(text: &str) -> Value {
    json!({"model": "one", "messages": [{"role": "user", "content": text}]})
}

async fn wait_until_reached(gate: &Arc<Gate>) {
    let gate = gate.clone();
    tokio::task::spawn_blocking(move || gate.wait_until_reached()).await.expect("it is reached");
}

async fn wait_until_deferred(fixture: &Fixture, requests: f64) {
    while fixture.metric("llamacpp:requests_deferred").await < requests {
        tokio::task::yield_now().await;
    }
}

fn content(answer: &Value) -> &str {
    answer["message"]["content"].as_str().unwrap_or_default()
}

#[tokio::test]
async fn what_was_computed_before_is_not_computed_again() {
    let fixture = Fixture::new(Script::default());
    let (_, first) = fixture.post("/api/chat", chat("one", "SAY[abc]YAS")).await;
    assert_eq!(content(&first), "abc");
    let cached = fixture.metric("tierstream_prompt_tokens_cached_total").await;
    let more = json!({"model": "one", "stream": false, "messages": [
        {"role": "user", "content": "SAY[abc]YAS"},
        {"role": "assistant", "content": "abc"},
        {"role": "user", "content": "SAY[d]YAS"},
    ]});
    let (_, second) = fixture.post("/api/chat", more).await;
    assert_eq!(content(&second), "d");
    let known = first["prompt_eval_count"].as_f64().expect("a number") + 3.0;
    assert!(fixture.metric("tierstream_prompt_tokens_cached_total").await >= cached + known);
}

#[tokio::test]
async fn requests_that_come_together_are_computed_together() {
    let gate = Arc::new(Gate::default());
    let fixture =
        Fixture::new(Script { sequences: 4, gate: Some(gate.clone()), ..Script::default() });
    let said: Vec<String> = (0..4).map(|i| format!("{i}").repeat(20)).collect();
    let asked =
        said.iter().map(|text| fixture.post("/api/chat", chat("one", &format!("SAY[{text}]YAS"))));
    let opened = async {
        // One waits in the first step, and the others for a sequence.
        while fixture.metric("llamacpp:requests_processing").await
            + fixture.metric("llamacpp:requests_deferred").await
            < 4.0
        {
            tokio::task::yield_now().await;
        }
        gate.open(u64::MAX);
    };
    let (answers, ()) = tokio::join!(futures_util::future::join_all(asked), opened);
    for ((status, answer), said) in answers.iter().zip(&said) {
        assert_eq!((*status, content(answer)), (StatusCode::OK, said.as_str()));
    }
    let steps = fixture.metric("llamacpp:n_decode_total").await;
    let sequences = fixture.metric("tierstream_busy_slots_total").await;
    assert!(sequences > 1.5 * steps, "{sequences} in {steps}");
}

#[tokio::test]
async fn a_request_that_fails_harms_no_other() {
    let gate = Arc::new(Gate::default());
    let fixture =
        Fixture::new(Script { sequences: 3, gate: Some(gate.clone()), ..Script::default() });
    let long = "x".repeat(200);
    let good = fixture.post("/api/chat", chat("one", &format!("SAY[{long}]YAS")));
    let bad = fixture.post("/api/chat", chat("one", FAILS));
    // Fails when it is written, in the midst of the others' steps.
    let halfway = fixture.post("/api/chat", chat("one", "SAY[abc FAIL~ NOW d]YAS"));
    gate.open(u64::MAX);
    let ((good_status, good), (bad_status, bad), (halfway_status, _)) =
        tokio::join!(good, bad, halfway);
    assert_eq!((good_status, content(&good)), (StatusCode::OK, long.as_str()));
    assert_eq!(bad_status, StatusCode::INTERNAL_SERVER_ERROR);
    assert_eq!(bad["error"], "the script says so");
    assert_eq!(halfway_status, StatusCode::INTERNAL_SERVER_ERROR);
    // The sequence that failed is as good as new.
    let (status, answer) = fixture.post("/api/chat", chat("one", "SAY[abc]YAS")).await;
    assert_eq!((status, content(&answer)), (StatusCode::OK, "abc"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_leaves_ends_what_is_computed_for_it() {
    let gate = Arc::new(Gate::default());
    let mut fixture = Fixture::new(Script { gate: Some(gate.clone()), ..Script::default() });
    let listening = fixture.listen().await;
    let mut leaving = listening.begin("/api/chat", &streamed("SAY[abcdef]YAS")).await;
    gate.open(3);
    read_until(&mut leaving, "\"c\"").await;
    tokio::task::block_in_place(|| gate.wait_until_reached());
    drop(leaving);
    // The step that waits is ended, and the one sequence that there is free for the next.
    tokio::task::block_in_place(|| gate.wait_until_stopped(1));
    gate.open(u64::MAX);
    let mut next = listening.begin("/api/chat", &streamed("SAY[xyz]YAS")).await;
    read_until(&mut next, "\"done\":true").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_leaves_before_its_turn_gets_none() {
    let gate = Arc::new(Gate::default());
    let mut fixture = Fixture::new(Script { gate: Some(gate.clone()), ..Script::default() });
    let listening = fixture.listen().await;
    let mut first = listening.begin("/api/chat", &streamed("SAY[abc]YAS")).await;
    tokio::task::block_in_place(|| gate.wait_until_reached());
    let waiting = listening.begin("/api/chat", &streamed("SAY[never]YAS")).await;
    while fixture.metric("llamacpp:requests_deferred").await < 1.0 {
        tokio::task::yield_now().await;
    }
    drop(waiting);
    while fixture.metric("llamacpp:requests_deferred").await > 0.0 {
        tokio::task::yield_now().await;
    }
    gate.open(u64::MAX);
    read_until(&mut first, "\"done\":true").await;
    let mut last = listening.begin("/api/chat", &streamed("SAY[xyz]YAS")).await;
    read_until(&mut last, "\"done\":true").await;
    // Three letters and an end for each of the two.
    assert_eq!(fixture.metric("llamacpp:tokens_predicted_total").await, 6.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_queue_refuses_more() {
    let gate = Arc::new(Gate::default());
    let settings = Settings { queue_max: 1, ..Settings::default() };
    let mut fixture =
        Fixture::with(Script { gate: Some(gate.clone()), ..Script::default() }, settings);
    let listening = fixture.listen().await;
    let mut first = listening.begin("/api/chat", &streamed("SAY[a]YAS")).await;
    tokio::task::block_in_place(|| gate.wait_until_reached());
    let mut second = listening.begin("/api/chat", &streamed("SAY[b]YAS")).await;
    while fixture.metric("llamacpp:requests_deferred").await < 1.0 {
        tokio::task::yield_now().await;
    }
    let mut third = listening.begin("/api/chat", &streamed("SAY[c]YAS")).await;
    let refused = read_until(&mut third, "\r\n\r\n").await.to_lowercase();
    assert!(
        refused.starts_with("http/1.1 503") && refused.contains("\r\nretry-after: "),
        "{refused}"
    );
    gate.open(u64::MAX);
    read_until(&mut first, "\"done\":true").await;
    read_until(&mut second, "\"done\":true").await;
}

/// Before anything else is computed.
#[tokio::test]
async fn who_hears_of_an_end_may_ask_again() {
    let gate = Arc::new(Gate::default());
    let engine = Script { gate: Some(gate.clone()), sequences: 2, ..Script::default() };
    let fixture = Fixture::with(engine, Settings { queue_max: 0, ..Settings::default() });
    let long = fixture.post("/api/chat", chat("one", "SAY[abcdef]YAS"));
    let others = async {
        wait_until_reached(&gate).await;
        let mut one_letter = chat("one", "SAY[x]YAS");
        one_letter["options"] = json!({"num_predict": 1});
        let opened = async {
            wait_until_deferred(&fixture, 1.0).await;
            // The long one's prompt and a letter, and the other prompt, which gives a letter.
            gate.open(3);
        };
        let (first, ()) = tokio::join!(fixture.post("/api/chat", one_letter), opened);
        let mut second = std::pin::pin!(fixture.post("/api/chat", chat("one", "SAY[y]YAS")));
        tokio::select! {
            refused = &mut second => panic!("{refused:?}"),
            () = wait_until_deferred(&fixture, 1.0) => gate.open(u64::MAX),
        }
        [first, second.await]
    };
    let (long, [first, second]) = tokio::join!(long, others);
    for ((status, answer), said) in [(long, "abcdef"), (first, "x"), (second, "y")] {
        assert_eq!((status, content(&answer)), (StatusCode::OK, said));
    }
}

/// Nobody waits for all that another one has asked for.
#[tokio::test]
async fn peers_take_turns() {
    let gate = Arc::new(Gate::default());
    let fixture = Fixture::new(Script { gate: Some(gate.clone()), ..Script::default() });
    let send = |n| {
        let request = support::post("/api/chat", &chat("one", "SAY[a]YAS"));
        tokio::spawn(fixture.router.clone().oneshot(from([10, 0, 0, n], request)))
    };
    let first = send(1);
    wait_until_reached(&gate).await;
    let [second, third, fourth] = [1; 3].map(send);
    wait_until_deferred(&fixture, 3.0).await;
    let other = send(2);
    wait_until_deferred(&fixture, 4.0).await;
    // A prompt and a letter are two steps: three requests are answered.
    gate.open(6);
    let others = async { tokio::join!(second, third) };
    tokio::select! {
        answer = other => {
            let answer = answer.expect("no panic").expect("an answer");
            assert_eq!(answer.status(), StatusCode::OK);
        }
        _ = others => panic!("it waits for all of another one's"),
    }
    gate.open(u64::MAX);
    for request in [first, fourth] {
        assert_eq!(request.await.expect("no panic").expect("an answer").status(), StatusCode::OK);
    }
}

#[tokio::test]
async fn a_peer_has_half_of_the_queue() {
    let gate = Arc::new(Gate::default());
    let engine = Script { gate: Some(gate.clone()), ..Script::default() };
    let fixture = Fixture::with(engine, Settings { queue_max: 4, ..Settings::default() });
    let send = |n| {
        let request = support::post("/api/chat", &chat("one", "SAY[a]YAS"));
        tokio::spawn(fixture.router.clone().oneshot(from([10, 0, 0, n], request)))
    };
    let first = send(1);
    wait_until_reached(&gate).await;
    let waiting = [1; 2].map(send);
    wait_until_deferred(&fixture, 2.0).await;
    let refused = tokio::select! {
        answer = send(1) => answer.expect("no panic").expect("an answer"),
        () = wait_until_deferred(&fixture, 3.0) => panic!("it waits"),
    };
    let others = [2; 2].map(send);
    wait_until_deferred(&fixture, 4.0).await;
    gate.open(u64::MAX);
    assert_eq!(refused.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert!(refused.headers().contains_key(header::RETRY_AFTER));
    for request in [first].into_iter().chain(waiting).chain(others) {
        assert_eq!(request.await.expect("no panic").expect("an answer").status(), StatusCode::OK);
    }
}

/// Inputs of a request share the steps that there are, and keep their order.
#[tokio::test]
async fn inputs_are_computed_several_at_a_time() {
    let gate = Arc::new(Gate::default());
    let engine = Script { gate: Some(gate.clone()), sequences: 2, ..Script::default() };
    // What does not fit the queue waits for its own, and is not refused.
    let fixture = Fixture::with(engine, Settings { queue_max: 0, ..Settings::default() });
    let body = json!({"model": "one", "input": ["a", "ee", "i", "oo", "u"]});
    let several = async {
        while fixture.metric("llamacpp:requests_processing").await
            + fixture.metric("llamacpp:requests_deferred").await
            < 2.0
        {
            tokio::task::yield_now().await;
        }
        gate.open(u64::MAX);
    };
    let ((status, answer), ()) = tokio::join!(fixture.post("/v1/embeddings", body), several);
    assert_eq!(status, StatusCode::OK, "{answer}");
    let largest = |data: &Value| {
        let numbers = data["embedding"].as_array().expect("an embedding").iter();
        numbers.map(|x| x.as_f64().expect("a number")).position(|x| x == 1.0)
    };
    let order: Vec<_> = answer["data"].as_array().expect("data").iter().map(largest).collect();
    assert_eq!(order, (0..5).map(Some).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_does_not_read_stalls_no_other() {
    const TOKENS: usize = 4_000;
    let mut fixture = Fixture::new(Script { sequences: 2, ctx: 60_000, ..Script::default() });
    // Between the server and the client there is room for a small part of the answer.
    let listening_socket = TcpSocket::new_v4().expect("a socket");
    listening_socket.set_send_buffer_size(4096).expect("it can be set");
    let between = listening_socket.send_buffer_size().expect("known");
    listening_socket.bind(SocketAddr::from(([127, 0, 0, 1], 0))).expect("a port");
    let listening = fixture.listen_at(listening_socket.listen(64).expect("it listens"));
    let deaf = TcpSocket::new_v4().expect("a socket");
    deaf.set_recv_buffer_size(16384).expect("it can be set");
    let between = between + deaf.recv_buffer_size().expect("known");
    let mut deaf = deaf.connect(listening.address).await.expect("it listens");
    let long = "z".repeat(TOKENS);
    send(&mut deaf, "/api/chat", &streamed(&format!("SAY[{long}]YAS"))).await;
    // All of it is there to be sent.
    deaf.readable().await.expect("something has come");
    while fixture.metric("llamacpp:tokens_predicted_total").await < TOKENS as f64 {
        tokio::task::yield_now().await;
    }
    for _ in 0..20 {
        let mut other = listening.begin("/api/chat", &streamed("SAY[abc]YAS")).await;
        read_until(&mut other, "\"done\":true").await;
    }
    let answer = read_until(&mut deaf, "\"done\":true").await;
    assert!(answer.len() > 10 * between as usize, "{} bytes over {between}", answer.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_stops_ends_answers_and_says_so() {
    let gate = Arc::new(Gate::default());
    let settings = Settings { grace: Duration::from_millis(1), ..Settings::default() };
    let engine = Script { gate: Some(gate.clone()), sequences: 1, ..Script::default() };
    let mut fixture = Fixture::with(engine, settings);
    let listening = fixture.listen().await;
    let mut client = listening.begin("/api/chat", &streamed("SAY[abc]YAS")).await;
    gate.open(2);
    read_until(&mut client, "\"b\"").await;
    // One waits behind it, whose answer has not begun.
    let mut waiting = listening.begin("/api/chat", &chat("one", "SAY[abc]YAS")).await;
    while fixture.metric("llamacpp:requests_deferred").await < 1.0 {
        tokio::task::yield_now().await;
    }
    listening.stop.send(()).expect("it listens");
    listening.task.await.expect("it ends").expect("well");
    let mut rest = String::new();
    client.read_to_string(&mut rest).await.expect("the end");
    assert!(rest.contains("the server is stopping"), "{rest}");
    assert!(!rest.contains("\"done\":true"), "{rest}");
    let mut answer = String::new();
    waiting.read_to_string(&mut answer).await.expect("the end");
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    assert!(answer.contains("the server is stopping"), "{answer}");
}

#[tokio::test]
async fn a_deadline_ends_an_answer() {
    let gate = Arc::new(Gate::default());
    let settings = Settings { deadline: Duration::from_millis(1), ..Settings::default() };
    let fixture = Fixture::with(Script { gate: Some(gate), ..Script::default() }, settings);
    let (status, answer) = fixture.post("/api/chat", chat("one", "SAY[abc]YAS")).await;
    assert_eq!(status, StatusCode::GATEWAY_TIMEOUT, "{answer}");
    // The gate is shut: a step that was begun is stopped, or never begun.
    while fixture.metric("llamacpp:requests_processing").await > 0.0 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_model_makes_room_for_another() {
    let engine = Script { room_bytes: MODEL_BYTES, ..Script::default() };
    let loads = engine.loads.clone();
    let settings = Settings { models_max: 2, ..Settings::default() };
    let fixture = Fixture::with(engine, settings);
    for model in ["one", "two", "one"] {
        let (status, answer) = fixture.post("/api/chat", chat(model, "SAY[abc]YAS")).await;
        assert_eq!((status, content(&answer)), (StatusCode::OK, "abc"));
        let (_, loaded) = fixture.get("/api/ps").await;
        let names: Vec<_> = loaded["models"]
            .as_array()
            .expect("models")
            .iter()
            .map(|m| m["name"].clone())
            .collect();
        assert_eq!(names, [model]);
    }
    let wanted = ["one", "two", "one"].map(|model| fixture.path(model));
    assert_eq!(*loads.lock().expect("not poisoned"), wanted);
}

/// It is refused, and nobody else pays for it.
#[tokio::test]
async fn a_model_that_cannot_be_loaded_takes_no_other_ones_place() {
    let room_bytes = MODEL_BYTES + 1000 * TOKEN_BYTES;
    let engine = Script { room_bytes, ..Script::default() };
    let loads = engine.loads.clone();
    let fixture = Fixture::with(engine, Settings { models_max: 1, ..Settings::default() });
    let with_ctx = |model: &str, ctx: u64| {
        let mut request = chat(model, "SAY[abc]YAS");
        request["options"] = json!({ "num_ctx": ctx });
        fixture.post("/api/chat", request)
    };
    assert_eq!(with_ctx("one", 300).await.0, StatusCode::OK);
    // Neither another one's place, nor its own with less context.
    for model in ["two", "one"] {
        let (status, answer) = with_ctx(model, 100_000).await;
        assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR);
        assert_eq!(answer["error"], "there is no room for this model");
    }
    assert_eq!(fixture.get("/api/ps").await.1["models"][0]["context_length"], 300);
    assert_eq!(loads.lock().expect("not poisoned").len(), 1);
}

#[tokio::test]
async fn the_usual_context_comes_back() {
    let fixture = Fixture::new(Script { ctx: 512, ..Script::default() });
    let ctx = async |wanted: Option<u64>| {
        let mut request = chat("one", "SAY[abc]YAS");
        request["options"] = json!({ "num_ctx": wanted });
        assert_eq!(fixture.post("/api/chat", request).await.0, StatusCode::OK);
        fixture.get("/api/ps").await.1["models"][0]["context_length"].clone()
    };
    let trained = u64::from(TRAINED);
    let asked = [(None, 512), (Some(300), 300), (None, 512), (Some(512), 512)];
    for (wanted, given) in asked.into_iter().chain([(Some(1 << 30), trained), (None, 512)]) {
        assert_eq!(ctx(wanted).await, given);
    }
}

/// For that no model is loaded again.
#[tokio::test]
async fn tokens_are_counted_whatever_the_context() {
    let engine = Script { ctx: 512, ..Script::default() };
    let fixture = Fixture::new(engine.clone());
    let mut request = chat("one", "SAY[abc]YAS");
    request["options"] = json!({"num_ctx": 300});
    assert_eq!(fixture.post("/api/chat", request).await.0, StatusCode::OK);
    let (status, answer) =
        fixture.post("/v1/messages/count_tokens", chat("one", "SAY[abc]YAS")).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    assert_eq!(fixture.get("/api/ps").await.1["models"][0]["context_length"], 300);
    assert_eq!(engine.loads.lock().expect("no panic").len(), 1);
}

/// Waits until there are requests that this counts.
async fn wait_for(fixture: &Fixture, gauge: &str) {
    while fixture.metric(gauge).await < 1.0 {
        tokio::task::yield_now().await;
    }
}

/// What `second` gives, begun when a request is computed; when it waits for its model, the gate is opened.
async fn begun_meanwhile<T>(fixture: &Fixture, gate: &Gate, second: impl Future<Output = T>) -> T {
    wait_for(fixture, "llamacpp:requests_processing").await;
    let open = async {
        wait_for(fixture, "tierstream_requests_waiting_for_model").await;
        gate.open(u64::MAX);
    };
    tokio::join!(second, open).0
}

/// It goes when its requests are done.
#[tokio::test]
async fn a_model_in_use_is_waited_for() {
    let gate = Arc::new(Gate::default());
    let engine = Script { gate: Some(gate.clone()), sequences: 2, ..Script::default() };
    let loads = engine.loads.clone();
    let fixture = Fixture::with(engine, Settings { models_max: 1, ..Settings::default() });
    let first = fixture.post("/api/chat", chat("one", "SAY[abc]YAS"));
    let second = fixture.post("/api/chat", chat("two", "SAY[xyz]YAS"));
    let (first, second) = tokio::join!(first, begun_meanwhile(&fixture, &gate, second));
    for ((status, answer), expected) in [(first, "abc"), (second, "xyz")] {
        assert_eq!((status, content(&answer)), (StatusCode::OK, expected));
    }
    let wanted = ["one", "two"].map(|model| fixture.path(model));
    assert_eq!(*loads.lock().expect("not poisoned"), wanted);
}

/// All of them are answered by one load of their model.
#[tokio::test]
async fn prompts_of_a_request_keep_their_model() {
    let gate = Arc::new(Gate::default());
    let engine = Script { gate: Some(gate.clone()), sequences: 2, ..Script::default() };
    let loads = engine.loads.clone();
    let fixture = Fixture::with(engine, Settings { models_max: 1, ..Settings::default() });
    let prompts = json!({"model": "one", "prompt": ["abc", "xyz"], "max_tokens": 2});
    let first = fixture.post("/v1/completions", prompts);
    let second = fixture.post("/api/chat", chat("two", "SAY[xyz]YAS"));
    let (first, second) = tokio::join!(first, begun_meanwhile(&fixture, &gate, second));
    assert_eq!((first.0, second.0), (StatusCode::OK, StatusCode::OK), "{first:?} {second:?}");
    assert_eq!(first.1["choices"].as_array().map(Vec::len), Some(2));
    let wanted = ["one", "two"].map(|model| fixture.path(model));
    assert_eq!(*loads.lock().expect("not poisoned"), wanted);
}

/// Of those that are in use, the first to be done goes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_model_that_is_idle_makes_room() {
    let gate = Arc::new(Gate::default());
    let engine = Script { gate: Some(gate.clone()), ..Script::default() };
    let settings = Settings { models_max: 2, ..Settings::default() };
    let mut fixture = Fixture::with(engine, settings);
    let listening = fixture.listen().await;
    let mut long = listening.begin("/api/chat", &streamed("SAY[abc]YAS")).await;
    tokio::task::block_in_place(|| gate.wait_until_reached());
    let leaving = listening.begin("/api/chat", &chat("two", "SAY[abc]YAS")).await;
    while fixture.metric("llamacpp:requests_processing").await < 2.0 {
        tokio::task::yield_now().await;
    }
    let third = fixture.post("/api/generate", json!({"model": "spare"}));
    let leave = async {
        wait_for(&fixture, "tierstream_requests_waiting_for_model").await;
        drop(leaving);
    };
    let ((status, answer), ()) = tokio::join!(third, leave);
    assert_eq!((status, &answer["done_reason"]), (StatusCode::OK, &json!("load")));
    gate.open(u64::MAX);
    read_until(&mut long, "\"done\":true").await;
}

/// They are answered before the model goes for another one that was asked for before them.
#[tokio::test]
async fn those_that_wait_for_a_model_get_it_when_it_is_loaded() {
    let gate = Arc::new(Gate::default());
    let engine = Script { load_gate: Some(gate.clone()), ..Script::default() };
    let loads = engine.loads.clone();
    let fixture = Fixture::with(engine, Settings { models_max: 1, ..Settings::default() });
    let ask = async |model, waiting| {
        while fixture.metric("tierstream_requests_waiting_for_model").await < waiting {
            tokio::task::yield_now().await;
        }
        fixture.post("/api/chat", chat(model, "SAY[abc]YAS")).await.0
    };
    let open = async {
        while fixture.metric("tierstream_requests_waiting_for_model").await < 3.0 {
            tokio::task::yield_now().await;
        }
        gate.open(u64::MAX);
    };
    let (first, other, last, ()) =
        tokio::join!(ask("one", 0.0), ask("two", 1.0), ask("one", 2.0), open);
    assert_eq!([first, other, last], [StatusCode::OK; 3]);
    let wanted = ["one", "two"].map(|model| fixture.path(model));
    assert_eq!(*loads.lock().expect("not poisoned"), wanted);
}

/// It is an error for those that wanted as much, and not for who takes the model as it is.
#[tokio::test]
async fn a_context_without_room_fails_nobody_else() {
    let gate = Arc::new(Gate::default());
    let room_bytes = MODEL_BYTES + 1000 * TOKEN_BYTES;
    let engine = Script { load_gate: Some(gate.clone()), room_bytes, ..Script::default() };
    let fixture = Fixture::with(engine, Settings { models_max: 1, ..Settings::default() });
    let waiting = async |n: f64| {
        while fixture.metric("tierstream_requests_waiting_for_model").await < n {
            tokio::task::yield_now().await;
        }
    };
    let first = fixture.post("/api/generate", json!({"model": "two"}));
    let large = async {
        waiting(1.0).await;
        let options = json!({"num_ctx": 100_000});
        fixture.post("/api/generate", json!({"model": "one", "options": options})).await.0
    };
    let any = async {
        waiting(2.0).await;
        fixture.post("/tokenize", json!({"model": "one", "content": "abc"})).await
    };
    let open = async {
        waiting(3.0).await;
        gate.open(u64::MAX);
    };
    let (_, large, (status, answer), ()) = tokio::join!(first, large, any, open);
    assert_eq!(large, StatusCode::INTERNAL_SERVER_ERROR);
    assert_eq!((status, answer), (StatusCode::OK, json!({"tokens": [97, 98, 99]})));
}

/// What is unloaded has its memory until it is gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_that_is_going_is_waited_for() {
    let unload_gate = Arc::new(Gate::default());
    let engine = Script {
        room_bytes: MODEL_BYTES,
        unload_gate: Some(unload_gate.clone()),
        ..Script::default()
    };
    let fixture = Fixture::new(engine);
    let load = json!({"model": "one"});
    assert_eq!(fixture.post("/api/generate", load).await.0, StatusCode::OK);
    let unload = fixture.post("/api/generate", json!({"model": "one", "keep_alive": 0}));
    let other = async {
        wait_until_reached(&unload_gate).await;
        let open = async {
            wait_for(&fixture, "tierstream_requests_waiting_for_model").await;
            unload_gate.open(u64::MAX);
        };
        tokio::join!(fixture.post("/api/generate", json!({"model": "two"})), open).0
    };
    let ((unloaded, _), (loaded, answer)) = tokio::join!(unload, other);
    assert_eq!((unloaded, loaded), (StatusCode::OK, StatusCode::OK), "{answer}");
}

/// Nobody's chat is shortened because somebody else wanted less.
#[tokio::test]
async fn a_request_gets_its_context_while_another_has_less() {
    let gate = Arc::new(Gate::default());
    let engine = Script { gate: Some(gate.clone()), sequences: 2, ..Script::default() };
    let loads = engine.loads.clone();
    let fixture = Fixture::new(engine);
    let with_ctx = |ctx: u64| {
        let mut request = chat("one", "SAY[abc]YAS");
        request["options"] = json!({ "num_ctx": ctx });
        fixture.post("/api/chat", request)
    };
    let long = format!("{}SAY[xyz]YAS", "a".repeat(600));
    let second = fixture.post("/v1/chat/completions", chat("one", &long));
    let second = begun_meanwhile(&fixture, &gate, second);
    let (first, (status, answer)) = tokio::join!(with_ctx(300), second);
    assert_eq!((first.0, status), (StatusCode::OK, StatusCode::OK), "{answer}");
    assert_eq!(answer["choices"][0]["message"]["content"], "xyz");
    assert_eq!(loads.lock().expect("not poisoned").len(), 2);
}

/// As with Ollama: most clients cannot say it.
#[tokio::test]
async fn a_time_to_stay_holds_until_another_one_is_said() {
    let fixture = Fixture::new(Script::default());
    let stays = async || {
        let (_, loaded) = fixture.get("/api/ps").await;
        loaded["models"][0]["expires_at"].as_str().expect("a time").to_owned()
    };
    fixture.post("/api/generate", json!({"model": "one", "keep_alive": -1})).await;
    let for_ever = stays().await;
    assert!(for_ever.starts_with("21"), "{for_ever}");
    fixture.post("/v1/chat/completions", chat("one", "SAY[abc]YAS")).await;
    assert!(stays().await.starts_with("21"));
    fixture.post("/api/generate", json!({"model": "one", "keep_alive": "5m"})).await;
    assert!(!stays().await.starts_with("21"));
}

/// The model that nobody waits for any more is not loaded to its end.
#[tokio::test(flavor = "multi_thread")]
async fn a_load_that_nobody_waits_for_is_stopped() {
    let gate = Arc::new(Gate::default());
    let engine = Script { load_gate: Some(gate.clone()), ..Script::default() };
    let mut fixture = Fixture::new(engine.clone());
    let listening = fixture.listen().await;
    let leaving = listening.begin("/api/chat", &streamed("SAY[abc]YAS")).await;
    tokio::task::block_in_place(|| gate.wait_until_reached());
    drop(leaving);
    tokio::task::block_in_place(|| gate.wait_until_stopped(1));
    assert!(engine.loads.lock().expect("no panic").is_empty());
}

/// It goes on for who else waits for the model, although the client that it was begun for has left.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_load_that_others_wait_for_goes_on() {
    let gate = Arc::new(Gate::default());
    let engine = Script { load_gate: Some(gate.clone()), ..Script::default() };
    let mut fixture = Fixture::new(engine.clone());
    let listening = fixture.listen().await;
    let leaving = listening.begin("/api/chat", &streamed("SAY[abc]YAS")).await;
    tokio::task::block_in_place(|| gate.wait_until_reached());
    let mut other = listening.begin("/api/chat", &streamed("SAY[abc]YAS")).await;
    let waiting = async |n: f64| {
        while fixture.metric("tierstream_requests_waiting_for_model").await != n {
            tokio::task::yield_now().await;
        }
    };
    waiting(2.0).await;
    drop(leaving);
    waiting(1.0).await;
    gate.open(1);
    read_until(&mut other, "\"done\":true").await;
    assert_eq!(gate.stopped(), 0);
}

#[tokio::test]
async fn models_are_loaded_and_unloaded_by_their_clients() {
    let fixture = Fixture::new(Script::default());
    let (_, answer) =
        fixture.post("/api/generate", json!({"model": "one", "keep_alive": "10m"})).await;
    assert_eq!((&answer["done_reason"], &answer["response"]), (&json!("load"), &json!("")));
    assert_eq!(fixture.get("/api/ps").await.1["models"][0]["model"], "one");
    let (_, answer) =
        fixture.post("/api/chat", json!({"model": "one", "messages": [], "keep_alive": 0})).await;
    assert_eq!(answer["done_reason"], "unload");
    assert_eq!(fixture.get("/api/ps").await.1, json!({"models": []}));
}

fn with_prompts(prompts: PromptCache) -> Settings {
    Settings { prompts, ..Settings::default() }
}

/// A long conversation, in which the model says `said` next.
fn conversation(about: &str, said: &str) -> Value {
    json!({"model": "one", "stream": false, "messages": [
        {"role": "user", "content": format!("SAY[{about}]YAS") + &about.repeat(50)},
        {"role": "assistant", "content": about},
        {"role": "user", "content": format!("SAY[{said}]YAS")},
    ]})
}

/// Asks, and returns the tokens that were not computed again.
async fn cached(fixture: &Fixture, about: &str, said: &str) -> f64 {
    let name = "tierstream_prompt_tokens_cached_total";
    let before = fixture.metric(name).await;
    let (status, answer) = fixture.post("/api/chat", conversation(about, said)).await;
    assert_eq!((status, content(&answer)), (StatusCode::OK, said));
    fixture.metric(name).await - before
}

#[tokio::test]
async fn prompts_that_lost_their_sequence_come_back() {
    let without = Fixture::new(Script::default());
    let prompts = PromptCache { ram_bytes: 1 << 20, ..PromptCache::default() };
    let with = Fixture::with(Script::default(), with_prompts(prompts));
    for (fixture, comes_back) in [(&without, false), (&with, true)] {
        cached(fixture, "apples", "a").await;
        // Takes the only sequence.
        cached(fixture, "pears", "b").await;
        let again = cached(fixture, "apples", "c").await;
        assert_eq!(again > 300.0, comes_back, "{again}");
        assert_eq!(fixture.metric("tierstream_prompt_cache_bytes").await > 0.0, comes_back);
        // The other one has been kept meanwhile, and what goes on from there is right.
        let again = cached(fixture, "pears", "d").await;
        assert_eq!(again > 250.0, comes_back, "{again}");
    }
}

#[tokio::test]
async fn prompts_outlive_the_model_and_the_server() {
    let folder = tempfile::tempdir().expect("a folder");
    let prompts = PromptCache {
        ram_bytes: 1 << 20,
        folder: Some(folder.path().join("prompts")),
        folder_bytes: 1 << 20,
    };
    let models = tempfile::tempdir().expect("a folder");
    let settings = || with_prompts(prompts.clone());
    let first = Fixture::within(&models, Script::default(), settings());
    cached(&first, "apples", "a").await;
    let unload = json!({"model": "one", "keep_alive": 0});
    first.post("/api/generate", unload.clone()).await;
    assert!(cached(&first, "apples", "b").await > 300.0);
    first.post("/api/generate", unload).await;
    let second = Fixture::within(&models, Script::default(), settings());
    assert!(cached(&second, "apples", "c").await > 300.0);
    // Another context is another model.
    let small = Fixture::within(&models, Script { ctx: 2048, ..Script::default() }, settings());
    assert!(cached(&small, "apples", "d").await < 300.0);
}

/// Whatever happens to a model's thread: who waits is told, and the next request has the model loaded again.
#[tokio::test]
async fn a_model_that_has_ended_is_loaded_again() {
    let engine = Script::default();
    let fixture = Fixture::new(engine.clone());
    let (status, answer) = fixture.post("/api/chat", chat("one", PANICS)).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{answer}");
    let (status, answer) = fixture.post("/api/chat", chat("one", "SAY[abc]YAS")).await;
    assert_eq!((status, content(&answer)), (StatusCode::OK, "abc"));
    assert_eq!(engine.loads.lock().expect("no panic").len(), 2);
    let (_, loaded) = fixture.get("/api/ps").await;
    assert_eq!(loaded["models"].as_array().map(Vec::len), Some(1));
}

/// A load that its client has left is in nobody else's way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_leaves_while_its_model_is_loaded() {
    let gate = Arc::new(Gate::default());
    let engine = Script { load_gate: Some(gate.clone()), ..Script::default() };
    let mut fixture = Fixture::new(engine.clone());
    let listening = fixture.listen().await;
    let leaving = listening.begin("/api/chat", &streamed("SAY[abc]YAS")).await;
    tokio::task::block_in_place(|| gate.wait_until_reached());
    drop(leaving);
    let mut next = listening.begin("/api/chat", &streamed("SAY[xyz]YAS")).await;
    gate.open(u64::MAX);
    read_until(&mut next, "\"done\":true").await;
    assert_eq!(engine.loads.lock().expect("no panic").len(), 1);
}

/// The oldest messages go, as few as must, and with an answer the results of the tools that it called; the system's
/// stay.
#[tokio::test]
async fn a_chat_that_is_too_long_loses_its_beginning() {
    let fixture = Fixture::new(Script { ctx: 600, ..Script::default() });
    let mut messages = vec![json!({"role": "system", "content": "Be brief."})];
    for i in 0..3000 {
        messages.push(json!({"role": "user", "content": format!("question {i:04}")}));
        messages.push(json!({"role": "tool", "content": format!("result {i:04}")}));
    }
    messages.push(json!({"role": "user", "content": "SAY[yes]YAS"}));
    let ask = |messages: &[Value]| json!({"model": "one", "messages": messages, "stream": false});
    let (status, answer) = fixture.post("/api/chat", ask(&messages)).await;
    assert_eq!((status, content(&answer)), (StatusCode::OK, "yes"), "{answer}");
    // As long as what stays by hand, of which one more question and its result would be too long.
    let tokens = answer["prompt_eval_count"].as_u64().expect("a number");
    let kept = |n: usize| [&messages[..1], &messages[messages.len() - 1 - 2 * n..]].concat();
    let n = (1..20).rev().find(|n| {
        let length: usize = kept(*n)
            .iter()
            .map(|m| {
                m["content"].as_str().map_or(0, str::len)
                    + m["role"].as_str().map_or(0, str::len)
                    + 4
            })
            .sum();
        length + "\u{1}assistant\n".len() < 600
    });
    let fresh = Fixture::new(Script { ctx: 600, ..Script::default() });
    let (_, by_hand) = fresh.post("/api/chat", ask(&kept(n.expect("some")))).await;
    assert_eq!(by_hand["prompt_eval_count"], tokens);
    // Where that may not be, it is an error.
    let mut whole = ask(&messages);
    whole["truncate"] = false.into();
    let (status, _) = fixture.post("/api/chat", whole).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
}

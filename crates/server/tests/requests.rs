//! Requests that mean something else than they seem to, or that cannot be answered: what is said to them.

mod support;

use axum::http::StatusCode;
use serde_json::{Value, json};
use support::{Fixture, TEMPLATE, write_model};
use tierstream_script::Script;

fn user(text: &str) -> Value {
    json!([{"role": "user", "content": text}])
}

/// What a request is refused with.
async fn refusal(fixture: &Fixture, path: &str, body: Value) -> String {
    let (status, answer) = fixture.post(path, body.clone()).await;
    assert_eq!(status, StatusCode::BAD_REQUEST, "{path} {body}: {answer}");
    let message = &answer["error"]["message"];
    message.as_str().or_else(|| answer["error"].as_str()).expect("a message").to_owned()
}

#[tokio::test]
async fn an_answer_has_a_token_at_least() {
    let fixture = Fixture::new(Script::default());
    for tokens in [0, -2] {
        for (path, name) in [
            ("/v1/chat/completions", "max_tokens"),
            ("/v1/chat/completions", "max_completion_tokens"),
            ("/v1/completions", "max_tokens"),
            ("/v1/responses", "max_output_tokens"),
            ("/v1/messages", "max_tokens"),
        ] {
            let body = json!({"model": "one", "messages": user("a"), "prompt": "a", "input": "a", name: tokens});
            let why = refusal(&fixture, path, body).await;
            assert!(why.starts_with(name), "{why}");
        }
    }
    // Ollama's way to say that there is no limit.
    for tokens in [-1, -2] {
        let body = json!({"model": "one", "messages": user("SAY[abc]YAS"), "stream": false,
            "options": {"num_predict": tokens}});
        let (_, answer) = fixture.post("/api/chat", body).await;
        assert_eq!(
            (&answer["message"]["content"], &answer["done_reason"]),
            (&json!("abc"), &json!("stop"))
        );
    }
}

/// As clients of llama.cpp's server and LM Studio's say it.
#[tokio::test]
async fn minus_one_is_no_limit() {
    let fixture = Fixture::new(Script::default());
    let body =
        json!({"model": "one", "messages": user("SAY[abc]YAS"), "prompt": "a", "max_tokens": -1});
    let (status, answer) = fixture.post("/v1/chat/completions", body.clone()).await;
    assert_eq!((status, &answer["choices"][0]["finish_reason"]), (StatusCode::OK, &json!("stop")));
    assert_eq!(answer["choices"][0]["message"]["content"], "abc");
    let (status, answer) = fixture.post("/v1/completions", body).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
}

#[tokio::test]
async fn what_says_nothing_is_refused() {
    let fixture = Fixture::new(Script::default());
    for prompt in [json!([]), json!([[]]), json!([[1, 2], []])] {
        let body = json!({"model": "one", "prompt": prompt, "max_tokens": 1});
        let why = refusal(&fixture, "/v1/completions", body).await;
        assert!(why.contains("prompt"), "{why}");
    }
    for role in ["user", "system", "tool"] {
        let body = json!({"model": "one", "messages": [{"role": role}]});
        let why = refusal(&fixture, "/v1/chat/completions", body).await;
        assert!(why.contains("content"), "{why}");
    }
    // Who calls tools may say nothing beside.
    let call = json!({"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}});
    let messages = json!([
        {"role": "user", "content": "SAY[abc]YAS"},
        {"role": "assistant", "content": null, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": ""},
    ]);
    let body = json!({"model": "one", "messages": messages});
    let (status, answer) = fixture.post("/v1/chat/completions", body).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
}

#[tokio::test]
async fn a_role_that_the_template_passes_over_is_named() {
    let fixture = Fixture::new(Script::default());
    let known = TEMPLATE
        .replace("{%- for m in messages %}", "{%- for m in messages if m.role == 'user' %}");
    write_model(&fixture.path("two"), Some(&known));
    let messages = json!([{"role": "wizard", "content": "SAY[abc]YAS"}]);
    let both =
        json!([{"role": "wizard", "content": "Hm."}, {"role": "user", "content": "SAY[abc]YAS"}]);
    for path in ["/api/chat", "/v1/chat/completions", "/v1/messages"] {
        for messages in [&messages, &both] {
            let body =
                json!({"model": "two", "max_tokens": 9, "stream": false, "messages": messages});
            let why = refusal(&fixture, path, body.clone()).await;
            assert!(why.contains("role \"wizard\""), "{why}");
            // Another template knows it.
            let body =
                json!({"model": "one", "max_tokens": 9, "stream": false, "messages": messages});
            assert_eq!(fixture.post(path, body).await.0, StatusCode::OK);
        }
    }
}

#[tokio::test]
async fn a_prompt_has_no_logprobs() {
    let fixture = Fixture::new(Script::default());
    let body = json!({"model": "one", "prompt": "a", "max_tokens": 2, "echo": true});
    let (_, answer) = fixture.post("/v1/completions", body.clone()).await;
    assert_eq!(answer["choices"][0]["text"], "abc");
    let mut tokens = body.clone();
    tokens["prompt"] = json!([97]);
    let (_, answer) = fixture.post("/v1/completions", tokens.clone()).await;
    assert_eq!(answer["choices"][0]["text"], "abc");
    tokens["prompt"] = json!([70_000]);
    assert!(refusal(&fixture, "/v1/completions", tokens).await.contains("70000"));
    let mut with_logprobs = body;
    with_logprobs["logprobs"] = 1.into();
    assert!(refusal(&fixture, "/v1/completions", with_logprobs).await.contains("echo"));
}

/// One line each, in which nothing is of the reader's own workings.
#[tokio::test]
async fn a_form_that_cannot_be_used_is_told_in_a_sentence() {
    let fixture = Fixture::new(Script::default());
    let schema = json!({"type": "object", "properties": {"a": {"type": "nonsense"}}});
    let format = json!({"type": "json_schema", "json_schema": {"name": "a", "schema": schema}});
    let tool = json!([{"type": "function", "function": {"name": "f", "parameters": schema}}]);
    for (given, word) in [
        (json!({"grammar": "root ::= \"a\" | \"b\""}), "GBNF"),
        (json!({"grammar": "start: nothing"}), "nothing"),
        (json!({"grammar": "start: ("}), "Lark"),
        (json!({"response_format": format}), "nonsense"),
        (json!({"tools": tool, "tool_choice": "required"}), "nonsense"),
    ] {
        let mut body = json!({"model": "one", "messages": user("a")});
        body.as_object_mut().expect("one").extend(given.as_object().expect("one").clone());
        let why = refusal(&fixture, "/v1/chat/completions", body).await;
        assert!(why.contains(word) && why.len() < 150 && !why.contains('\n'), "{why}");
    }
    let body = json!({"model": "one", "messages": user("a"), "format": schema});
    assert!(refusal(&fixture, "/api/chat", body).await.contains("nonsense"));
}

#[tokio::test]
async fn a_model_that_is_there_is_pulled() {
    let fixture = Fixture::new(Script::default());
    for (stream, name) in [(false, "one"), (false, "one:latest"), (true, "one")] {
        let (status, answer) =
            fixture.post("/api/pull", json!({"model": name, "stream": stream})).await;
        assert_eq!((status, answer), (StatusCode::OK, json!({"status": "success"})));
    }
    let why = refusal(&fixture, "/api/pull", json!({"model": "three", "stream": false})).await;
    assert!(why.contains("`ollama pull`"), "{why}");
}

#[tokio::test]
async fn a_model_that_is_not_there_is_no_file_either() {
    let fixture = Fixture::new(Script::default());
    for path in ["/api/chat", "/v1/chat/completions", "/api/show"] {
        let (status, answer) =
            fixture.post(path, json!({"model": "three", "messages": user("a")})).await;
        let text = answer.to_string();
        assert_eq!(status, StatusCode::NOT_FOUND, "{text}");
        assert!(text.contains("there is no model") && !text.contains("file"), "{text}");
    }
}

/// What would run on Anthropic's machines is not offered to the model.
#[tokio::test]
async fn tools_of_anthropics_machines_are_left_out() {
    let fixture = Fixture::new(Script::default());
    let search = json!({"type": "web_search_20250305", "name": "web_search", "max_uses": 5});
    let own = json!({"type": "custom", "name": "look_up", "input_schema": {"type": "object"}});
    let nameless = json!({"type": "mcp_toolset", "mcp_server_name": "files"});
    let plain = json!({"name": "look_up", "input_schema": {"type": "object"}});
    let tokens = async |tools: Value| {
        let body = json!({"model": "one", "messages": user("a"), "tools": tools});
        let (status, answer) = fixture.post("/v1/messages/count_tokens", body).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        answer["input_tokens"].as_u64().expect("a number")
    };
    assert_eq!(tokens(json!([search, nameless])).await, tokens(json!([])).await);
    assert_eq!(tokens(json!([search, own])).await, tokens(json!([plain])).await);
    assert!(tokens(json!([own])).await > tokens(json!([])).await);
    for (tools, choice) in [
        (json!([search]), json!({"type": "any"})),
        (json!([search]), json!({"type": "tool", "name": "web_search"})),
        (json!([search, own]), json!({"type": "tool", "name": "web_search"})),
    ] {
        let body = json!({"model": "one", "messages": user("a"), "max_tokens": 9,
            "tools": tools, "tool_choice": choice});
        let (status, answer) = fixture.post("/v1/messages", body).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{answer}");
        assert!(
            answer["error"]["message"].as_str().expect("why").contains("tool_choice"),
            "{answer}"
        );
    }
}

/// Clients of most dialects name the call alone.
#[tokio::test]
async fn results_have_the_names_of_their_tools() {
    let fixture = Fixture::new(Script::default());
    let named = TEMPLATE.replace("{{ m.content }}", "{{ m.name or '' }}{{ m.content }}");
    write_model(&fixture.path("two"), Some(&named));
    let function = json!({"name": "look_up", "arguments": {}});
    let text = json!({"name": "look_up", "arguments": "{}"});
    let calls = |function: &Value| json!({"role": "assistant", "content": "", "tool_calls": [{"id": "7", "type": "function", "function": function}]});
    let result = json!({"role": "tool", "tool_call_id": "7", "content": " has found it"});
    let (call, output) = (
        json!({"type": "function_call", "call_id": "7", "name": "look_up", "arguments": "{}"}),
        json!({"type": "function_call_output", "call_id": "7", "output": " has found it"}),
    );
    let block = json!({"type": "tool_use", "id": "7", "name": "look_up", "input": {}});
    let of_block = json!({"type": "tool_result", "tool_use_id": "7", "content": " has found it"});
    for (path, messages, said) in [
        ("/api/chat", json!([calls(&function), result]), "/message/content"),
        ("/v1/chat/completions", json!([calls(&text), result]), "/choices/0/message/content"),
        ("/v1/responses", json!([call, output]), "/output/0/content/0/text"),
        (
            "/v1/messages",
            json!([{"role": "assistant", "content": [block]}, {"role": "user", "content": [of_block]}]),
            "/content/0/text",
        ),
    ] {
        let body = json!({"model": "two", "messages": messages, "input": messages, "max_tokens": 99, "stream": false});
        let (status, answer) = fixture.post(path, body).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        let said = answer.pointer(said);
        assert_eq!(said, Some(&json!("You said: look_up has found it")), "{path}: {answer}");
    }
}

#[tokio::test]
async fn thoughts_are_counted() {
    let fixture = Fixture::new(Script::default());
    let usage = async |text: &str| {
        let (status, answer) =
            fixture.post("/v1/responses", json!({"model": "one", "input": text})).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        answer["usage"].clone()
    };
    let thoughtful = usage("SAY[<think>hmm</think>abc]YAS").await;
    assert_eq!(thoughtful["output_tokens_details"]["reasoning_tokens"], 3, "{thoughtful}");
    let plain = usage("SAY[abc]YAS").await;
    assert_eq!(plain["output_tokens_details"]["reasoning_tokens"], 0, "{plain}");
}

/// However long a text is.
#[tokio::test]
async fn all_tokens_of_a_text_are_told() {
    let fixture = Fixture::new(Script::default());
    for n in [0, 1, 4096, 10_000] {
        let body = |pieces| json!({"model": "one", "content": "ä".repeat(n / 2) + &"a".repeat(n % 2), "with_pieces": pieces});
        let ids: Vec<u8> = "ä".repeat(n / 2).bytes().chain("a".repeat(n % 2).bytes()).collect();
        let piece = |id: &u8| match id {
            b'a' => json!({"id": 97, "piece": "a"}),
            id => json!({"id": id, "piece": [id]}),
        };
        let pieces: Vec<Value> = ids.iter().map(piece).collect();
        for (with_pieces, expected) in [(false, json!(ids)), (true, json!(pieces))] {
            let (status, answer) = fixture.post("/tokenize", body(with_pieces)).await;
            assert_eq!(status, StatusCode::OK);
            assert!(answer == json!({ "tokens": expected }), "{n}");
        }
    }
}

/// As other routes take it.
#[tokio::test]
async fn props_take_names_with_their_tag() {
    let fixture = Fixture::new(Script::default());
    let loads = json!({"model": "one:latest", "messages": user("SAY[a]YAS"), "stream": false});
    assert_eq!(fixture.post("/api/chat", loads).await.0, StatusCode::OK);
    for (name, expected) in [
        ("one", StatusCode::OK),
        ("one:latest", StatusCode::OK),
        ("one:other", StatusCode::NOT_FOUND),
        ("two:latest", StatusCode::NOT_FOUND),
    ] {
        assert_eq!(fixture.get(&format!("/props?model={name}")).await.0, expected, "{name}");
    }
}

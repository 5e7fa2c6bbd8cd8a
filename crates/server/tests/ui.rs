//! The page, and the state behind it.

mod support;

use axum::body::Body;
use axum::http::{HeaderMap, Request, StatusCode, header};
use serde_json::{Value, json};
use support::Fixture;
use tierstream_script::{DRIVE_RATE, MODEL_BYTES, Script};
use tierstream_server::Settings;
use tower::ServiceExt;

const FILES: [(&str, &str); 7] = [
    ("/ui", "text/html; charset=utf-8"),
    ("/ui/style.css", "text/css; charset=utf-8"),
    ("/ui/app.js", "text/javascript; charset=utf-8"),
    ("/ui/chat.js", "text/javascript; charset=utf-8"),
    ("/ui/common.js", "text/javascript; charset=utf-8"),
    ("/ui/experts.js", "text/javascript; charset=utf-8"),
    ("/ui/icon.svg", "image/svg+xml"),
];

async fn get(
    fixture: &Fixture,
    path: &str,
    headers: &[(&str, &str)],
) -> (StatusCode, HeaderMap, String) {
    let mut request = Request::get(path);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let request = request.body(Body::empty()).expect("valid");
    let response = fixture.router.clone().oneshot(request).await.expect("routers do not fail");
    let (parts, body) = response.into_parts();
    let body = axum::body::to_bytes(body, 1 << 20).await.expect("a body");
    (parts.status, parts.headers, String::from_utf8(body.to_vec()).expect("text"))
}

async fn state(fixture: &Fixture) -> Value {
    let (status, state) = fixture.get("/ui/state").await;
    assert_eq!(status, StatusCode::OK, "{state}");
    state
}

async fn chat(fixture: &Fixture, text: &str) {
    let body =
        json!({"model": "one", "messages": [{"role": "user", "content": text}], "stream": false});
    let (status, answer) = fixture.post("/api/chat", body).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
}

#[tokio::test]
async fn the_page_is_served_with_its_types_and_a_strict_policy() {
    let fixture = Fixture::new(Script::default());
    for (path, kind) in FILES {
        let (status, headers, body) = get(&fixture, path, &[("host", "localhost")]).await;
        assert_eq!(status, StatusCode::OK, "{path}");
        assert_eq!(headers[header::CONTENT_TYPE], kind, "{path}");
        assert_eq!(headers[header::X_CONTENT_TYPE_OPTIONS], "nosniff", "{path}");
        let policy = headers[header::CONTENT_SECURITY_POLICY].to_str().expect("text");
        assert!(policy.starts_with("default-src 'none'; script-src 'self'; "), "{policy}");
        assert!(!policy.contains("unsafe"), "{policy}");
        assert!(!body.is_empty(), "{path}");
    }
    let (status, headers, _) = get(&fixture, "/ui/", &[("host", "localhost")]).await;
    assert_eq!(
        (status, &headers[header::LOCATION]),
        (StatusCode::PERMANENT_REDIRECT, &"../ui".parse().expect("valid"))
    );
}

/// All that the page refers to is there, and is the server's own.
#[tokio::test]
async fn nothing_is_fetched_from_elsewhere() {
    let fixture = Fixture::new(Script::default());
    for (path, _) in FILES {
        let (_, _, body) = get(&fixture, path, &[("host", "localhost")]).await;
        let foreign = body.replace("http://www.w3.org/2000/svg", "");
        assert!(!foreign.contains("http://") && !foreign.contains("https://"), "{path}");
        assert!(!body.contains("<style") && !body.contains(" style=\""), "{path}");
        assert!(!body.contains("innerHTML"), "{path}");
        let marks = ["src=\"", "href=\"", "from \"./"];
        for mark in marks {
            for rest in body.split(mark).skip(1) {
                let name = rest.split('"').next().expect("a part").trim_start_matches("ui/");
                if !name.starts_with('#') {
                    assert!(
                        FILES.iter().any(|file| file.0 == format!("/ui/{name}")),
                        "{path}: {name}"
                    );
                }
            }
        }
    }
}

#[tokio::test]
async fn the_state_of_nothing() {
    let fixture = Fixture::new(Script::default());
    let state = state(&fixture).await;
    assert_eq!(state["models"], json!([]));
    assert!(state["time"].is_f64() && state["run"].is_u64() && state["version"].is_string());
}

#[tokio::test]
async fn the_state_of_a_model() {
    let fixture = Fixture::new(Script { sequences: 3, ..Script::default() });
    chat(&fixture, "SAY[hello]YAS").await;
    let mut state = state(&fixture).await;
    let model = &mut state["models"][0];
    let rests = model["rests_seconds"].as_f64().expect("a number");
    assert!(rests > 0.0 && rests <= 300.0, "{rests}");
    let layers = model["layers"].take();
    for changing in ["load_seconds", "rests_seconds", "tokens", "drive"] {
        model[changing].take();
    }
    assert_eq!(
        *model,
        json!({
            "name": "one", "load": 0, "architecture": "llama", "parameters": "0.0K",
            "quantization": "unknown", "context_tokens": 4096, "load_seconds": null,
            "rests_seconds": null, "ram_bytes": MODEL_BYTES, "vram_bytes": 0,
            "sequences": {"all": 3, "busy": 0, "waiting": 0}, "tokens": null,
            "expert_bytes": 6 << 20,
            "pools": [{"tier": "ram", "bytes": 3 << 20, "filled_bytes": 3 << 20}],
            "drive": null, "gpu": null, "evictions": 0, "layers": null, "notes": [],
        })
    );
    let layers = layers.as_array().expect("a list");
    assert_eq!(layers.len(), 6);
    for (block, layer) in (1..).zip(layers) {
        assert_eq!((&layer["block"], &layer["vram"]), (&json!(block), &json!(0)));
        let uses = layer["uses"].as_array().expect("a list");
        let used: u64 = uses.iter().map(|n| n.as_u64().expect("a number")).sum();
        assert_eq!((uses.len(), used), (16, number(&layer["ram"]) + number(&layer["drive"])));
    }
}

fn number(value: &Value) -> u64 {
    value.as_u64().expect("a number")
}

#[tokio::test]
async fn counts_grow_while_a_chat_is_answered() {
    let fixture = Fixture::new(Script::default());
    chat(&fixture, "SAY[a]YAS").await;
    let before = state(&fixture).await["models"][0].take();
    chat(&fixture, &format!("SAY[{}]YAS", "words ".repeat(20))).await;
    let after = state(&fixture).await["models"][0].take();
    assert_eq!(before["load"], after["load"]);
    // 120 tokens were drawn and the end; the last one is not computed.
    let grown = |pointer: &str| {
        number(after.pointer(pointer).expect(pointer))
            - number(before.pointer(pointer).expect(pointer))
    };
    assert_eq!(grown("/tokens/written"), 120);
    assert!(grown("/tokens/prompt") > 120);
    assert!(grown("/drive/bytes") > 0);
    assert_eq!(after["drive"]["limit_bytes_per_second"], json!(DRIVE_RATE));
    let computed = grown("/tokens/written") + grown("/tokens/prompt");
    for layer in 0..6 {
        let uses: u64 = (0..16).map(|e| grown(&format!("/layers/{layer}/uses/{e}"))).sum();
        assert_eq!(uses, 2 * computed, "two experts of a layer for each token");
    }
}

#[tokio::test]
async fn a_model_that_is_loaded_again_begins_anew() {
    let fixture = Fixture::new(Script::default());
    chat(&fixture, "SAY[a]YAS").await;
    let before = state(&fixture).await["models"][0].take();
    fixture.post("/api/generate", json!({"model": "one", "keep_alive": 0})).await;
    assert_eq!(state(&fixture).await["models"], json!([]));
    chat(&fixture, "SAY[a]YAS").await;
    let after = state(&fixture).await["models"][0].take();
    assert_ne!(before["load"], after["load"]);
    assert_eq!(before["tokens"], after["tokens"]);
}

#[tokio::test]
async fn the_guard_stands_before_the_state() {
    let settings = Settings { api_keys: vec!["secret".into()], ..Settings::default() };
    let fixture = Fixture::with(Script::default(), settings);
    let asked = async |path: &str, headers: &[(&str, &str)]| get(&fixture, path, headers).await.0;
    let local = ("host", "localhost");
    // The page tells nothing, and asks for the key.
    assert_eq!(asked("/ui", &[local]).await, StatusCode::OK);
    assert_eq!(asked("/ui/app.js", &[local]).await, StatusCode::OK);
    assert_eq!(asked("/ui/state", &[local]).await, StatusCode::UNAUTHORIZED);
    assert_eq!(asked("/ui/elsewhere", &[local]).await, StatusCode::UNAUTHORIZED);
    let key = |key| ("authorization", key);
    assert_eq!(asked("/ui/state", &[local, key("Bearer wrong")]).await, StatusCode::UNAUTHORIZED);
    assert_eq!(asked("/ui/state", &[local, key("Bearer secret")]).await, StatusCode::OK);
    // Names that lead here from elsewhere, and pages of others.
    for path in ["/ui", "/ui/state"] {
        let foreign = [("host", "example.com"), key("Bearer secret")];
        assert_eq!(asked(path, &foreign).await, StatusCode::FORBIDDEN, "{path}");
        let page = [local, ("origin", "https://example.com"), key("Bearer secret")];
        assert_eq!(asked(path, &page).await, StatusCode::FORBIDDEN, "{path}");
    }
}

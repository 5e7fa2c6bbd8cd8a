//! Who may ask, and what those are told who may not.

mod support;

use std::net::SocketAddr;

use axum::body::Body;
use axum::http::{HeaderMap, Method, Request, StatusCode, header};
use support::Fixture;
use tierstream_script::Script;
use tierstream_server::Settings;
use tower::ServiceExt;

/// The status and the head of an answer to a request with these headers.
async fn ask(
    fixture: &Fixture,
    method: Method,
    path: &str,
    headers: &[(header::HeaderName, &str)],
) -> (StatusCode, HeaderMap) {
    let mut request = Request::builder().method(method).uri(path);
    for (name, value) in headers {
        request = request.header(name, *value);
    }
    let request = request.body(Body::empty()).expect("valid");
    let response = fixture.router.clone().oneshot(request).await.expect("routers do not fail");
    (response.status(), response.headers().clone())
}

fn listens(address: [u8; 4], api_keys: &[&str]) -> Fixture {
    let settings = Settings {
        listens: SocketAddr::from((address, 11434)),
        api_keys: api_keys.iter().map(|&key| key.to_owned()).collect(),
        origins: vec!["https://chat.example".into()],
        ..Settings::default()
    };
    Fixture::with(Script::default(), settings)
}

/// A page whose name was made to lead here, after it was loaded, has its own name as host and origin.
#[tokio::test]
async fn pages_of_foreign_names_are_refused_wherever_it_listens() {
    for address in [[127, 0, 0, 1], [0, 0, 0, 0]] {
        let fixture = listens(address, &[]);
        for (host, expected) in [
            ("evil.example", StatusCode::FORBIDDEN),
            ("localhost", StatusCode::OK),
            ("192.168.1.7:11434", StatusCode::OK),
            ("box", StatusCode::OK),
            ("box.local:11434", StatusCode::OK),
        ] {
            let origin = format!("http://{host}");
            let headers = [(header::HOST, host), (header::ORIGIN, origin.as_str())];
            let (status, _) = ask(&fixture, Method::GET, "/api/tags", &headers).await;
            assert_eq!(status, expected, "{host} at {address:?}");
        }
    }
    // Who has a key may call it what they like.
    let fixture = listens([0, 0, 0, 0], &["key"]);
    let headers = [
        (header::HOST, "chat.example:11434"),
        (header::ORIGIN, "http://chat.example:11434"),
        (header::AUTHORIZATION, "Bearer key"),
    ];
    assert_eq!(ask(&fixture, Method::GET, "/api/tags", &headers).await.0, StatusCode::OK);
}

/// The headers that a page may send are named, a key among them, and it can read why it was refused.
#[tokio::test]
async fn pages_are_told_what_they_may_send() {
    let fixture = listens([127, 0, 0, 1], &["key"]);
    let page = [(header::HOST, "localhost"), (header::ORIGIN, "https://chat.example")];
    let asks = (header::ACCESS_CONTROL_REQUEST_HEADERS, "authorization,content-type");
    let method = (header::ACCESS_CONTROL_REQUEST_METHOD, "POST");
    let preflight = [&page[..], &[asks, method]].concat();
    let (status, told) = ask(&fixture, Method::OPTIONS, "/v1/chat/completions", &preflight).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(told[header::ACCESS_CONTROL_ALLOW_ORIGIN], "https://chat.example");
    assert_eq!(told[header::ACCESS_CONTROL_ALLOW_HEADERS], "authorization,content-type");
    let (status, told) = ask(&fixture, Method::GET, "/v1/models", &page).await;
    assert_eq!(status, StatusCode::UNAUTHORIZED);
    assert_eq!(told[header::ACCESS_CONTROL_ALLOW_ORIGIN], "https://chat.example");
    // Others are told nothing.
    let foreign = [(header::HOST, "localhost"), (header::ORIGIN, "https://evil.example")];
    let (status, told) = ask(&fixture, Method::GET, "/v1/models", &foreign).await;
    assert_eq!(status, StatusCode::FORBIDDEN);
    assert!(!told.contains_key(header::ACCESS_CONTROL_ALLOW_ORIGIN));
}

/// What needs no key is little.
#[tokio::test]
async fn keys_are_needed_for_all_but_a_few() {
    let fixture = listens([127, 0, 0, 1], &["key"]);
    let host = [(header::HOST, "localhost")];
    for (path, expected) in [
        ("/", StatusCode::OK),
        ("/health", StatusCode::OK),
        ("/v1/health", StatusCode::OK),
        ("/ui", StatusCode::OK),
        ("/ui/state", StatusCode::UNAUTHORIZED),
        ("/metrics", StatusCode::UNAUTHORIZED),
        ("/openapi.json", StatusCode::UNAUTHORIZED),
        ("/api/tags", StatusCode::UNAUTHORIZED),
        ("/v1/models", StatusCode::UNAUTHORIZED),
        ("/nowhere", StatusCode::UNAUTHORIZED),
    ] {
        assert_eq!(ask(&fixture, Method::GET, path, &host).await.0, expected, "{path}");
    }
}

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

/// A page whose name was made to lead here, after it was loaded, has its own name as host. It is the origin of what
/// it posts; with what it gets, browsers send none.
#[tokio::test]
async fn foreign_names_are_refused_wherever_it_listens() {
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
            let alone = [(header::HOST, host)];
            let with_origin = [alone[0].clone(), (header::ORIGIN, origin.as_str())];
            for headers in [&alone[..], &with_origin] {
                for path in ["/api/tags", "/metrics"] {
                    let (status, _) = ask(&fixture, Method::GET, path, headers).await;
                    assert_eq!(status, expected, "{path} {headers:?} at {address:?}");
                }
            }
        }
    }
    // Who has a key may call it what they like.
    let fixture = listens([0, 0, 0, 0], &["key"]);
    let headers = [
        (header::HOST, "any.example:11434"),
        (header::ORIGIN, "http://any.example:11434"),
        (header::AUTHORIZATION, "Bearer key"),
    ];
    assert_eq!(ask(&fixture, Method::GET, "/api/tags", &headers).await.0, StatusCode::OK);
}

/// A proxy may pass on the name that it is called by, if that is one of an origin; pages of that host are its own.
#[tokio::test]
async fn a_proxy_has_a_name_that_the_user_has_named() {
    for keys in [&[][..], &["key"]] {
        let fixture = listens([127, 0, 0, 1], keys);
        for (host, origin, expected) in [
            ("chat.example", "https://chat.example", StatusCode::OK),
            ("chat.example:8443", "https://chat.example:8443", StatusCode::OK),
            ("chat.example", "https://evil.example", StatusCode::FORBIDDEN),
            ("other.example", "https://chat.example", StatusCode::FORBIDDEN),
        ] {
            let headers = [
                (header::HOST, host),
                (header::AUTHORIZATION, "Bearer key"),
                (header::ORIGIN, origin),
            ];
            let (status, _) = ask(&fixture, Method::GET, "/api/tags", &headers).await;
            assert_eq!(status, expected, "{host} {origin} {keys:?}");
        }
        let headers = [(header::HOST, "other.example"), (header::AUTHORIZATION, "Bearer key")];
        assert_eq!(
            ask(&fixture, Method::GET, "/api/tags", &headers).await.0,
            StatusCode::FORBIDDEN
        );
    }
    let fixture = listens([127, 0, 0, 1], &[]);
    let request = Request::get("/api/tags").header(header::HOST, "other.example");
    let (_, text) = fixture.send(request.body(Body::empty()).expect("valid")).await;
    assert!(text.contains("--origins https://NAME"), "{text}");
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

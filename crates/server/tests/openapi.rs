//! The document of the routes, and the routes.

mod support;

use std::collections::BTreeSet;

use axum::body::Body;
use axum::http::{Request, StatusCode, header};
use serde_json::Value;
use support::Fixture;
use tierstream_script::Script;
use tower::ServiceExt;

/// Paths of the page, whose files are not for programs.
const PAGE: &str = "/ui";

#[tokio::test]
async fn all_routes_are_in_the_document_and_no_others() {
    let fixture = Fixture::new(Script::default());
    let (status, document) = fixture.get("/openapi.json").await;
    assert_eq!(status, StatusCode::OK);
    let Value::Object(paths) = &document["paths"] else { panic!("{document}") };
    let told: BTreeSet<&str> = paths.keys().map(String::as_str).collect();
    // A router tells its paths in no other way.
    let debug = format!("{:?}", fixture.router).replace("{*", "{");
    let quoted = debug.split('"').filter(|text| text.starts_with('/'));
    let no_route = |path: &&str| path.starts_with(PAGE) || path.contains("__private");
    let routed: BTreeSet<&str> = quoted.filter(|path| !no_route(path)).collect();
    assert_eq!(told, routed);
    for (path, methods) in paths {
        let told: BTreeSet<String> = methods
            .as_object()
            .expect("an object")
            .keys()
            .map(|name| name.to_uppercase())
            .collect();
        let asked = Request::builder().method("NOTHING").uri(path.replace(['{', '}'], ""));
        let request =
            asked.header(header::HOST, "localhost").body(Body::empty()).expect("a request");
        let response = fixture.router.clone().oneshot(request).await.expect("it does not fail");
        assert_eq!(response.status(), StatusCode::METHOD_NOT_ALLOWED, "{path}");
        let allowed = response.headers()[header::ALLOW].to_str().expect("text").to_owned();
        let mut allowed: BTreeSet<String> = allowed.split(',').map(str::to_owned).collect();
        if allowed.contains("GET") {
            allowed.remove("HEAD");
        }
        assert_eq!(told, allowed, "{path}");
    }
}

#[tokio::test]
async fn the_document_has_what_is_read() {
    let fixture = Fixture::new(Script::default());
    let (_, document) = fixture.get("/openapi.json").await;
    let schema = |path: &str| {
        let body = &document["paths"][path]["post"]["requestBody"];
        let name = body["content"]["application/json"]["schema"]["$ref"].as_str().expect("a name");
        document.pointer(name.trim_start_matches('#')).expect("it is there").clone()
    };
    let chat = schema("/v1/chat/completions");
    for field in ["model", "messages", "stop", "tools", "temperature", "reasoning_effort"] {
        assert!(
            chat["properties"][field].is_object() || chat["properties"][field] == true,
            "{field}: {chat}"
        );
    }
    assert_eq!(chat["required"], serde_json::json!(["messages"]));
    let chat = schema("/api/chat");
    assert_eq!(chat["properties"]["keep_alive"]["type"][0], "string");
    assert!(chat.get("required").is_none());
}

#[tokio::test]
async fn the_page_has_all_routes() {
    let fixture = Fixture::new(Script::default());
    let (_, document) = fixture.get("/openapi.json").await;
    let (status, Value::String(page)) = fixture.get("/docs").await else { panic!("no page") };
    assert_eq!(status, StatusCode::OK);
    for path in document["paths"].as_object().expect("an object").keys() {
        assert!(page.contains(&format!("<code>{path}</code>")), "{path}");
    }
    assert!(page.contains("<code>reasoning_effort</code>"));
    assert!(!page.contains("http:") && !page.contains("https:") && !page.contains("<script"));
}

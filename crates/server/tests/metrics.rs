//! What `/metrics` has.

mod support;

use axum::http::{Request, header};
use serde_json::{Value, json};
use support::Fixture;
use tierstream_script::Script;

/// Every number that the board in `docs/` asks for is there.
#[tokio::test]
async fn the_board_asks_for_what_there_is() {
    let fixture = Fixture::new(Script::default());
    let chat =
        json!({"model": "one", "messages": [{"role": "user", "content": "Hi"}], "stream": false});
    fixture.post("/api/chat", chat).await;
    let Value::String(text) = fixture.get("/metrics").await.1 else { panic!("it is text") };
    let there: Vec<&str> = text
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|l| l.split(['{', ' ']).next())
        .collect();
    let board: Value =
        serde_json::from_str(include_str!("../../../docs/grafana.json")).expect("JSON");
    let panels = board["panels"].as_array().expect("panels");
    let queries = panels.iter().flat_map(|panel| panel["targets"].as_array().expect("targets"));
    let mut names = Vec::new();
    for query in queries {
        let query = query["expr"].as_str().expect("a query");
        let is_name = |c: char| c.is_alphanumeric() || c == '_' || c == ':';
        names.extend(
            query
                .split(|c| !is_name(c))
                .filter(|name| name.starts_with("llamacpp:") || name.starts_with("tierstream_")),
        );
    }
    assert!(names.len() > 15, "{names:?}");
    for name in names {
        assert!(there.contains(&name), "{name} is not in:\n{text}");
    }
}

/// As Prometheus reads them: types before values, and an end.
#[tokio::test]
async fn metrics_are_in_prometheus_text() {
    let fixture = Fixture::new(Script::default());
    let request = Request::get("/metrics").header(header::HOST, "localhost");
    let (_, text) = fixture.send(request.body(axum::body::Body::empty()).expect("valid")).await;
    assert!(text.ends_with("# EOF\n"), "{text}");
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (_, value) = line.rsplit_once(' ').expect("a name and a value");
        assert!(value.parse::<f64>().is_ok(), "{line}");
    }
}

//! Ollama's API.

mod answer;
mod chat;
mod embed;
mod generate;
mod models;
mod pull;

use std::sync::Arc;

use axum::Router;
use axum::http::StatusCode;
use axum::routing::{delete, get, head, post};
use serde_json::{Value, json};
use tierstream_chat::Think;

use crate::error::{ApiError, ApiResult, Ollama};
use crate::hub::{Hub, KeepAlive};
use crate::openapi::{Api, JSON, LINES, TEXT};
use crate::settings;

/// The version of Ollama whose API this is: clients look for one that is new enough for them.
const VERSION: &str = "0.12.6";

pub(crate) fn routes() -> Router<Arc<Hub>> {
    Router::new()
        .route("/", get(|| async { "Ollama is running" }))
        .route("/api/version", get(|| async { axum::Json(json!({ "version": VERSION })) }))
        .route("/api/tags", get(models::tags))
        .route("/api/ps", get(models::ps))
        .route("/api/show", post(models::show))
        .route("/api/pull", post(pull::pull))
        .route("/api/chat", post(chat::chat))
        .route("/api/generate", post(generate::generate))
        .route("/api/embed", post(embed::embed))
        .route("/api/embeddings", post(embed::embeddings))
        .route("/api/blobs/{digest}", head(|| async { StatusCode::NOT_FOUND }).post(foreign))
        .route("/api/delete", delete(foreign))
        .route("/api/copy", post(foreign))
        .route("/api/create", post(foreign))
        .route("/api/push", post(foreign))
}

/// What `routes` has.
pub(crate) fn describe(api: &mut Api) {
    let whole_or_lines = &[LINES, JSON];
    api.get("/", "Says that there is a server", &[TEXT]);
    api.get("/api/version", "The version of Ollama whose API this is", &[JSON]);
    api.get("/api/tags", "The models that there are", &[JSON]);
    api.get("/api/ps", "The models that are loaded", &[JSON]);
    api.post::<models::Show>("/api/show", "What a model is like", &[JSON]);
    api.post::<chat::Body>("/api/chat", "Goes on with a chat", whole_or_lines);
    api.post::<generate::Body>("/api/generate", "Goes on from a prompt", whole_or_lines);
    api.post::<embed::Body>("/api/embed", "Embeddings of texts", &[JSON]);
    api.post::<embed::Body>(
        "/api/embeddings",
        "The embedding of a text, as it was before",
        &[JSON],
    );
    api.post::<pull::Body>("/api/pull", "Fetches a model", whole_or_lines);
    let path = "/api/blobs/{digest}";
    api.refuses("head", path, 404, "Whether there is a blob: none can be put here");
    for (method, path) in FOREIGN.iter().chain(&[("post", path)]) {
        api.refuses(method, path, 501, "Not here: the models of other programs are only read");
    }
}

/// Routes that would write to the stores of other programs.
const FOREIGN: [(&str, &str); 4] = [
    ("delete", "/api/delete"),
    ("post", "/api/copy"),
    ("post", "/api/create"),
    ("post", "/api/push"),
];

/// What would write to the stores of other programs.
async fn foreign() -> Ollama {
    let why = "the models belong to the programs that put them there, and are only read here";
    Ollama(ApiError::new(StatusCode::NOT_IMPLEMENTED, why))
}

/// `keep_alive` of a request: seconds, or a time such as `5m`.
fn keep_alive(value: Option<&Value>) -> ApiResult<Option<KeepAlive>> {
    let wrong = |why: String| ApiError::of("keep_alive", format!("keep_alive: {why}"));
    match value {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => settings::keep_alive(text).map(Some).map_err(wrong),
        Some(other) => {
            let time = other.as_f64().and_then(settings::of_seconds);
            time.map(Some).ok_or_else(|| wrong(format!("{other} is no time")))
        }
    }
}

/// `think` of a request.
fn think(value: Option<&Value>) -> ApiResult<Option<Think>> {
    match value {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Bool(true)) => Ok(Some(Think::On)),
        Some(Value::Bool(false)) => Ok(Some(Think::Off)),
        Some(Value::String(level)) => match level.as_str() {
            "low" => Ok(Some(Think::Low)),
            "medium" => Ok(Some(Think::Medium)),
            "high" => Ok(Some(Think::High)),
            "" => Ok(None),
            _ => Err(ApiError::bad(format!(
                "think is {level:?}; it is true, false, low, medium or high"
            ))),
        },
        Some(other) => {
            Err(ApiError::bad(format!("think is {other}; it is true, false, low, medium or high")))
        }
    }
}

/// How many of the likeliest tokens are told with each.
fn logprobs(wanted: Option<bool>, top: Option<usize>) -> Option<usize> {
    wanted.unwrap_or(false).then(|| top.unwrap_or(0).min(TOP_LOGPROBS_MAX))
}

/// As in both APIs.
const TOP_LOGPROBS_MAX: usize = 20;

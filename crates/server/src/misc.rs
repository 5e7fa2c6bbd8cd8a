//! What is of neither dialect: health, metrics, tokens.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Query, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures_util::{StreamExt, stream};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::body::{Admission, Received, json, read};
use crate::engine::Token;
use crate::error::{ApiError, OpenAi};
use crate::hub::{Hub, Lease, blocking};
use crate::metrics;
use crate::openapi::{Api, JSON};
use crate::overdue::Overdue;

pub(crate) fn routes() -> Router<Arc<Hub>> {
    Router::new()
        .route("/health", get(|| async { Json(json!({"status": "ok"})) }))
        .route("/v1/health", get(|| async { Json(json!({"status": "ok"})) }))
        .route("/metrics", get(all_metrics))
        .route("/props", get(props))
        .route("/tokenize", post(tokenize))
        .route("/detokenize", post(detokenize))
}

/// What `routes` has.
pub(crate) fn describe(api: &mut Api) {
    api.get("/health", "Says that there is a server", &[JSON]);
    api.get("/v1/health", "Says that there is a server", &[JSON]);
    api.get("/metrics", "Counters, for Prometheus", &["application/openmetrics-text"]);
    api.get(
        "/props",
        "What a loaded model is like; without a name, the one that was used last",
        &[JSON],
    );
    api.query("/props", "model");
    api.post::<Tokenize>("/tokenize", "The tokens of a text", &[JSON]);
    api.post::<Detokenize>("/detokenize", "The text of tokens", &[JSON]);
}

async fn all_metrics(State(hub): State<Arc<Hub>>) -> Result<Response, OpenAi> {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    // Its counters may have to be waited for.
    let text = blocking(move || metrics::text(&hub)).await?;
    Ok(([(header::CONTENT_TYPE, kind)], text).into_response())
}

#[derive(Deserialize, JsonSchema)]
struct Named {
    model: Option<String>,
}

/// What a loaded model is like; without a name, the one that was used last.
async fn props(
    State(hub): State<Arc<Hub>>,
    Query(named): Query<Named>,
) -> Result<Json<Value>, OpenAi> {
    let model = hub.loaded_as(named.model.as_deref())?;
    let (bos, eos) = model.text.bos_eos();
    let of = model.clone();
    let template = blocking(move || of.template_source()).await??;
    Ok(Json(json!({
        "default_generation_settings": {"n_ctx": model.limits.ctx},
        "total_slots": model.limits.sequences,
        "model_alias": model.found.name,
        "chat_template": template,
        "bos_token": bos,
        "eos_token": eos,
        "build_info": concat!("tierstream ", env!("CARGO_PKG_VERSION")),
        "notes": model.notes,
        "load_seconds": model.load_time.as_secs_f64(),
    })))
}

/// The model that a request names, loaded if it is not; without a name, the one that was used last.
async fn lease(hub: &Arc<Hub>, name: Option<&str>) -> Result<Lease, ApiError> {
    match name {
        Some(name) => hub.acquire_any(name).await,
        None => {
            let name = hub.loaded_as(None)?.found.name.clone();
            hub.acquire_any(&name).await
        }
    }
}

#[derive(Deserialize, JsonSchema)]
struct Tokenize {
    model: Option<String>,
    content: String,
    add_special: Option<bool>,
    parse_special: Option<bool>,
    with_pieces: Option<bool>,
}

async fn tokenize(State(hub): State<Arc<Hub>>, body: Received) -> Result<Response, OpenAi> {
    let (body, admission): (Tokenize, _) = read(body)?;
    let lease = admission.within(lease(&hub, body.model.as_deref())).await?;
    let tokenized = blocking(move || {
        let (begin, markup) =
            (body.add_special.unwrap_or(false), body.parse_special.unwrap_or(true));
        let tokens = lease.text.tokenize(&body.content, begin, markup)?;
        drop(body.content);
        admission.shrink(size_of_val(&tokens[..]));
        Ok::<_, ApiError>(Tokenized {
            tokens,
            with_pieces: body.with_pieces.unwrap_or(false),
            lease,
            admission,
        })
    });
    Ok(tokenized.await??.into_response())
}

/// Tokens that are made JSON of at a time.
const AT_ONCE: usize = 4096;

/// The tokens of a text. As JSON, with their pieces, they take many times what it does: that is made as it is sent.
struct Tokenized {
    tokens: Vec<Token>,
    with_pieces: bool,
    lease: Lease,
    /// Has memory for the tokens.
    admission: Admission,
}

impl IntoResponse for Tokenized {
    fn into_response(self) -> Response {
        let overdue = Overdue {
            deadline: self.admission.deadline,
            retires: self.lease.retirement(),
            computing: None,
        };
        let parts = stream::iter((0..self.tokens.len()).step_by(AT_ONCE)).map(move |from| {
            let list = self.list(from);
            let comma = if from == 0 { "" } else { "," };
            format!("{comma}{}", &list[1..list.len() - 1])
        });
        let around = |text: &str| stream::iter([text.to_owned()]);
        let all = overdue.cut(around("{\"tokens\":[").chain(parts).chain(around("]}")));
        ([(header::CONTENT_TYPE, "application/json")], Body::from_stream(all)).into_response()
    }
}

/// A token with its text, or its bytes where they are no text.
#[derive(Serialize)]
struct WithPiece {
    id: Token,
    piece: Piece,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Piece {
    Text(String),
    Bytes(Vec<u8>),
}

impl Tokenized {
    /// A list of the tokens from there on, as many as are made at once.
    fn list(&self, from: usize) -> String {
        let tokens = self.tokens[from..].iter().take(AT_ONCE);
        let with_piece = |&id: &Token| {
            let piece = String::from_utf8(self.lease.text.piece(id, true));
            let piece = piece.map_or_else(|error| Piece::Bytes(error.into_bytes()), Piece::Text);
            WithPiece { id, piece }
        };
        match self.with_pieces {
            true => json(&tokens.map(with_piece).collect::<Vec<_>>()),
            false => json(&tokens.collect::<Vec<_>>()),
        }
    }
}

#[derive(Deserialize, JsonSchema)]
struct Detokenize {
    model: Option<String>,
    tokens: Vec<Token>,
}

async fn detokenize(State(hub): State<Arc<Hub>>, body: Received) -> Result<Json<Value>, OpenAi> {
    let (body, admission): (Detokenize, _) = read(body)?;
    let lease = admission.within(lease(&hub, body.model.as_deref())).await?;
    let tokens = lease.checked(body.tokens)?;
    let bytes: Vec<u8> = tokens.iter().flat_map(|&token| lease.text.piece(token, true)).collect();
    Ok(Json(json!({"content": String::from_utf8_lossy(&bytes)})))
}

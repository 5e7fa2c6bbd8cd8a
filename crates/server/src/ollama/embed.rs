//! `/api/embed`, and `/api/embeddings` as it was before.

use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::extract::State;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::ask::{Params, one_or_more};
use crate::body::{Admission, Received, read};
use crate::embed::{EmbedAsk, EmbedInput, embed as compute};
use crate::error::Ollama;
use crate::generation::nanos;
use crate::hub::Hub;
use crate::openapi::schemas;

#[derive(Deserialize, JsonSchema)]
#[schemars(rename = "OllamaEmbed")]
pub(super) struct Body {
    #[serde(default)]
    model: String,
    #[serde(default, deserialize_with = "one_or_more")]
    #[schemars(schema_with = "schemas::texts")]
    input: Option<Vec<String>>,
    prompt: Option<String>,
    truncate: Option<bool>,
    dimensions: Option<usize>,
    options: Option<Params>,
    #[serde(default)]
    #[schemars(schema_with = "schemas::keep_alive")]
    keep_alive: Option<Value>,
}

impl Body {
    fn ask(self, admission: Admission, texts: Vec<String>) -> Result<EmbedAsk, Ollama> {
        Ok(EmbedAsk {
            admission,
            model: self.model,
            keep_alive: super::keep_alive(self.keep_alive.as_ref())?,
            inputs: texts.into_iter().map(EmbedInput::Text).collect(),
            params: self.options.unwrap_or_default(),
            truncate: self.truncate.unwrap_or(true),
            dimensions: self.dimensions,
        })
    }
}

/// The numbers as they are: as JSON values, they would take many times as much.
#[derive(Serialize)]
pub(super) struct Answer {
    model: String,
    embeddings: Vec<Vec<f32>>,
    total_duration: u64,
    load_duration: u64,
    prompt_eval_count: usize,
}

pub(super) async fn embed(
    State(hub): State<Arc<Hub>>,
    body: Received,
) -> Result<Json<Answer>, Ollama> {
    let start = Instant::now();
    let (mut body, admission): (Body, _) = read(body)?;
    let model = body.model.clone();
    // Nothing at all asks for no embedding, but has the model loaded.
    let texts = body.input.take().filter(|texts| *texts != [""]).unwrap_or_default();
    let done = compute(&hub, body.ask(admission, texts)?).await?;
    Ok(Json(Answer {
        model,
        embeddings: done.embeddings,
        total_duration: nanos(start.elapsed()),
        load_duration: nanos(done.load_time),
        prompt_eval_count: done.tokens,
    }))
}

/// As it was before.
#[derive(Serialize)]
pub(super) struct One {
    embedding: Vec<f32>,
}

pub(super) async fn embeddings(
    State(hub): State<Arc<Hub>>,
    body: Received,
) -> Result<Json<One>, Ollama> {
    let (mut body, admission): (Body, _) = read(body)?;
    let texts = body.prompt.take().filter(|prompt| !prompt.is_empty()).into_iter().collect();
    let done = compute(&hub, body.ask(admission, texts)?).await?;
    Ok(Json(One { embedding: done.embeddings.into_iter().next().unwrap_or_default() }))
}

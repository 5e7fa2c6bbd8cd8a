//! `/api/generate`.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::Value;

use super::answer::{Shape, answer};
use crate::ask::{Ask, Input, Params};
use crate::body::{Received, read};
use crate::engine::Token;
use crate::error::{ApiError, Ollama};
use crate::grammar::Form;
use crate::hub::Hub;
use crate::openapi::schemas;

#[derive(Deserialize, JsonSchema)]
#[schemars(rename = "OllamaGenerate")]
pub(super) struct Body {
    #[serde(default)]
    model: String,
    prompt: Option<String>,
    suffix: Option<String>,
    system: Option<String>,
    template: Option<String>,
    context: Option<Vec<Token>>,
    raw: Option<bool>,
    images: Option<Vec<Value>>,
    #[serde(default)]
    #[schemars(schema_with = "schemas::format")]
    format: Option<Value>,
    options: Option<Params>,
    stream: Option<bool>,
    #[serde(default)]
    #[schemars(schema_with = "schemas::keep_alive")]
    keep_alive: Option<Value>,
    #[serde(default)]
    #[schemars(schema_with = "schemas::think")]
    think: Option<Value>,
    logprobs: Option<bool>,
    top_logprobs: Option<usize>,
}

pub(super) async fn generate(
    State(hub): State<Arc<Hub>>,
    body: Received,
) -> Result<Response, Ollama> {
    let (body, admission): (Body, _) = read(body)?;
    if body.images.is_some_and(|images| !images.is_empty()) {
        return Err(ApiError::bad("images are not supported").into());
    }
    let prompt = body.prompt.unwrap_or_default();
    let suffix = body.suffix.filter(|suffix| !suffix.is_empty());
    let given = |text: Option<String>| text.filter(|text| !text.is_empty());
    let (template, system) = (given(body.template), given(body.system));
    let before = body.context.unwrap_or_default();
    let input = match (body.raw.unwrap_or(false), suffix) {
        (true, _) if template.is_some() || system.is_some() || !before.is_empty() => {
            let why = "raw mode does not support template, system, or context";
            return Err(ApiError::bad(why).into());
        }
        (true, _) => Input::Raw(prompt),
        (false, Some(suffix)) => Input::Insert { prompt, suffix },
        (false, None) => Input::Prompt { system, prompt, template, before },
    };
    let ask = Ask {
        keep_alive: super::keep_alive(body.keep_alive.as_ref())?,
        think: super::think(body.think.as_ref())?,
        thinking_is_a_must: true,
        form: Form::of_ollama(body.format)?,
        params: body.options.unwrap_or_default(),
        logprobs: super::logprobs(body.logprobs, body.top_logprobs),
        ..Ask::new(admission, body.model, input)
    };
    Ok(answer(&hub, ask, body.stream.unwrap_or(true), Shape::Generate).await?)
}

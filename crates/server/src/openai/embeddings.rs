//! `/v1/embeddings`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::ask::Wishes;
use crate::body::{Received, read};
use crate::embed::{EmbedAsk, EmbedInput, embed};
use crate::engine::Token;
use crate::error::{ApiError, OpenAi};
use crate::hub::Hub;

#[derive(Deserialize, JsonSchema)]
#[schemars(rename = "Embeddings")]
pub(super) struct Body {
    #[serde(default)]
    model: String,
    input: Input,
    encoding_format: Option<String>,
    dimensions: Option<usize>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(untagged)]
enum Input {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<Token>),
    Many(Vec<Vec<Token>>),
}

pub(super) async fn embeddings(
    State(hub): State<Arc<Hub>>,
    body: Received,
) -> Result<Json<Value>, OpenAi> {
    let (body, admission): (Body, _) = read(body)?;
    let in_base64 = match body.encoding_format.as_deref() {
        None | Some("float") => false,
        Some("base64") => true,
        Some(other) => {
            let why = format!("encoding_format is {other:?}; it is float or base64");
            return Err(ApiError::of("encoding_format", why).into());
        }
    };
    let inputs = match body.input {
        Input::Text(one) => vec![EmbedInput::Text(one)],
        Input::Texts(all) => all.into_iter().map(EmbedInput::Text).collect(),
        Input::Tokens(one) => vec![EmbedInput::Tokens(one)],
        Input::Many(all) => all.into_iter().map(EmbedInput::Tokens).collect(),
    };
    let is_empty = |input: &EmbedInput| matches!(input, EmbedInput::Text(text) if text.is_empty());
    if inputs.is_empty() || inputs.iter().any(is_empty) {
        return Err(ApiError::of("input", "the input is empty").into());
    }
    let ask = EmbedAsk {
        admission,
        model: body.model.clone(),
        keep_alive: None,
        inputs,
        wishes: Wishes::default(),
        truncate: false,
        dimensions: body.dimensions,
    };
    let done = embed(&hub, ask).await?;
    let one = |(index, embedding): (usize, Vec<f32>)| {
        let embedding = match in_base64 {
            true => BASE64_STANDARD
                .encode(embedding.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>())
                .into(),
            false => Value::from(embedding),
        };
        json!({"object": "embedding", "index": index, "embedding": embedding})
    };
    let data: Vec<Value> = done.embeddings.into_iter().enumerate().map(one).collect();
    Ok(Json(json!({
        "object": "list",
        "data": data,
        "model": body.model,
        "usage": {"prompt_tokens": done.tokens, "total_tokens": done.tokens},
    })))
}

//! `/v1/embeddings`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use base64::display::Base64Display;
use base64::prelude::BASE64_STANDARD;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize, Serializer};

use crate::ask::Params;
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
) -> Result<Json<Answer>, OpenAi> {
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
        params: Params::default(),
        truncate: false,
        dimensions: body.dimensions,
    };
    let done = embed(&hub, ask).await?;
    let one = |(index, embedding): (usize, Vec<f32>)| {
        let embedding = match in_base64 {
            true => Numbers::Base64(embedding),
            false => Numbers::List(embedding),
        };
        Item { object: "embedding", index, embedding }
    };
    Ok(Json(Answer {
        object: "list",
        data: done.embeddings.into_iter().enumerate().map(one).collect(),
        model: body.model,
        usage: Usage { prompt_tokens: done.tokens, total_tokens: done.tokens },
    }))
}

/// The numbers as they are: as JSON values, they would take many times as much.
#[derive(Serialize)]
pub(super) struct Answer {
    object: &'static str,
    data: Vec<Item>,
    model: String,
    usage: Usage,
}

#[derive(Serialize)]
struct Item {
    object: &'static str,
    index: usize,
    embedding: Numbers,
}

#[derive(Serialize)]
struct Usage {
    prompt_tokens: usize,
    total_tokens: usize,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Numbers {
    List(Vec<f32>),
    #[serde(serialize_with = "in_base64")]
    Base64(Vec<f32>),
}

/// Of their bytes, the lowest first.
fn in_base64<S: Serializer>(numbers: &[f32], to: S) -> Result<S::Ok, S::Error> {
    let bytes: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
    to.collect_str(&Base64Display::new(&bytes, &BASE64_STANDARD))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// With no more digits than tell an `f32` from the others.
    #[test]
    fn numbers_are_written_as_they_are() {
        let json = |numbers| {
            let item = Item { object: "embedding", index: 0, embedding: numbers };
            serde_json::to_string(&item).expect("JSON")
        };
        let numbers = vec![0.6, -1.0, 1e-8];
        assert_eq!(
            json(Numbers::List(numbers.clone())),
            r#"{"object":"embedding","index":0,"embedding":[0.6,-1.0,1e-8]}"#
        );
        assert_eq!(
            json(Numbers::Base64(numbers)),
            r#"{"object":"embedding","index":0,"embedding":"mpkZPwAAgL93zCsy"}"#
        );
    }
}

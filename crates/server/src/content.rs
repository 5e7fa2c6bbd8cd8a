//! What messages say, in the shapes that OpenAI's and Anthropic's APIs have for it.

use serde_json::Value;

use crate::error::{ApiError, ApiResult};

/// A text, or a list of parts that have one. `param`: what of the request it is.
pub(crate) fn text(param: &'static str, content: &Value) -> ApiResult<String> {
    let part = |part: &Value| match part["text"].as_str().or_else(|| part["refusal"].as_str()) {
        Some(text) => Ok(text.to_owned()),
        None => Err(unsupported(param, part["type"].as_str().unwrap_or_default())),
    };
    match content {
        Value::Null => Ok(String::new()),
        Value::String(text) => Ok(text.clone()),
        Value::Array(parts) => {
            Ok(parts.iter().map(part).collect::<ApiResult<Vec<_>>>()?.join("\n"))
        }
        _ => Err(ApiError::of(param, "content is a text or a list")),
    }
}

/// Content that is no text, such as an image.
pub(crate) fn unsupported(param: &'static str, kind: &str) -> ApiError {
    ApiError::of(param, format!("content of type {kind:?} is not supported"))
}

//! `/api/chat`.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::Value;
use tierstream_chat::{Message, Tool, ToolCall};

use super::answer::{Shape, answer};
use crate::ask::{Ask, Input, Params};
use crate::body::{Received, read};
use crate::error::{ApiError, ApiResult, Ollama};
use crate::grammar::Form;
use crate::hub::Hub;
use crate::openapi::schemas;

#[derive(Deserialize, JsonSchema)]
#[schemars(rename = "OllamaChat")]
pub(super) struct Body {
    #[serde(default)]
    model: String,
    messages: Option<Vec<MessageBody>>,
    #[serde(default)]
    #[schemars(schema_with = "schemas::tools")]
    tools: Option<Vec<Tool>>,
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
    truncate: Option<bool>,
    logprobs: Option<bool>,
    top_logprobs: Option<usize>,
}

#[derive(Deserialize, JsonSchema)]
#[schemars(rename = "OllamaMessage")]
struct MessageBody {
    role: String,
    content: Option<String>,
    thinking: Option<String>,
    images: Option<Vec<Value>>,
    tool_calls: Option<Vec<CallBody>>,
    tool_call_id: Option<String>,
    tool_name: Option<String>,
}

#[derive(Deserialize, JsonSchema)]
#[schemars(rename = "OllamaCall")]
struct CallBody {
    id: Option<String>,
    function: FunctionBody,
}

#[derive(Deserialize, JsonSchema)]
#[schemars(rename = "OllamaFunction")]
struct FunctionBody {
    name: String,
    #[serde(default)]
    arguments: Value,
}

pub(super) async fn chat(State(hub): State<Arc<Hub>>, body: Received) -> Result<Response, Ollama> {
    let (body, admission): (Body, _) = read(body)?;
    let messages = body.messages.unwrap_or_default().into_iter().map(message);
    let input = Input::Chat(messages.collect::<ApiResult<_>>()?);
    let ask = Ask {
        keep_alive: super::keep_alive(body.keep_alive.as_ref())?,
        tools: body.tools.unwrap_or_default(),
        think: super::think(body.think.as_ref())?,
        thinking_is_a_must: true,
        form: Form::of_ollama(body.format)?,
        params: body.options.unwrap_or_default(),
        logprobs: super::logprobs(body.logprobs, body.top_logprobs),
        truncate: body.truncate.unwrap_or(true),
        ..Ask::new(admission, body.model, input)
    };
    Ok(answer(&hub, ask, body.stream.unwrap_or(true), Shape::Chat).await?)
}

fn message(body: MessageBody) -> ApiResult<Message> {
    if body.images.is_some_and(|images| !images.is_empty()) {
        return Err(ApiError::bad("images are not supported"));
    }
    let call = |body: CallBody| ToolCall {
        id: body.id.filter(|id| !id.is_empty()),
        name: body.function.name,
        arguments: body.function.arguments,
    };
    Ok(Message {
        role: body.role,
        content: body.content.unwrap_or_default(),
        thinking: body.thinking.filter(|text| !text.is_empty()),
        tool_calls: body.tool_calls.unwrap_or_default().into_iter().map(call).collect(),
        tool_call_id: body.tool_call_id,
        tool_name: body.tool_name,
    })
}

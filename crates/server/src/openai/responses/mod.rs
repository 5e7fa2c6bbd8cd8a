//! `/v1/responses`. Nothing is kept of an answer: clients send all that was said so far.

mod answer;

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tierstream_chat::{Function, Message, Tool, ToolCall};

use self::answer::{Answer, answer};
use super::chat::{effort, response_format};
use super::{check_most, now, tool_choice};
use crate::ask::{Ask, Input, Params};
use crate::body::{Admission, Received, read};
use crate::content;
use crate::error::{ApiError, ApiResult, OpenAi};
use crate::generation::Generation;
use crate::grammar::Form;
use crate::hub::Hub;
use crate::ids::id;
use crate::openapi::schemas;

#[derive(Deserialize, JsonSchema)]
#[schemars(rename = "Responses")]
pub(super) struct Body {
    #[serde(default)]
    model: String,
    input: Items,
    instructions: Option<String>,
    tools: Option<Vec<Value>>,
    tool_choice: Option<Value>,
    parallel_tool_calls: Option<bool>,
    stream: Option<bool>,
    #[schemars(range(min = 0.0))]
    temperature: Option<f32>,
    #[schemars(range(min = 0.0, max = 1.0))]
    top_p: Option<f32>,
    #[schemars(range(min = 1))]
    max_output_tokens: Option<i64>,
    text: Option<TextBody>,
    reasoning: Option<Reasoning>,
    previous_response_id: Option<String>,
    metadata: Option<Map<String, Value>>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(untagged)]
enum Items {
    Text(String),
    List(Vec<Value>),
}

#[derive(Deserialize, JsonSchema)]
#[schemars(rename = "Text")]
struct TextBody {
    format: Option<Value>,
}

#[derive(Deserialize, JsonSchema)]
struct Reasoning {
    #[serde(default)]
    #[schemars(schema_with = "schemas::effort")]
    effort: Option<String>,
}

pub(super) async fn responses(
    State(hub): State<Arc<Hub>>,
    body: Received,
) -> Result<Response, OpenAi> {
    let (body, admission): (Body, _) = read(body)?;
    let streams = body.stream.unwrap_or(false);
    let (ask, frame) = ask(body, admission)?;
    let room = hub.bodies.room_beside(&ask.admission, &frame)?;
    let generation = Generation::begin(&hub, ask).await?;
    Ok(answer(&hub, Answer::new(generation, frame, room), streams).await?)
}

fn ask(body: Body, admission: Admission) -> ApiResult<(Ask, Map<String, Value>)> {
    if body.previous_response_id.is_some() {
        let why = "answers are not kept: send what was said before as input";
        return Err(ApiError::of("previous_response_id", why));
    }
    check_most("max_output_tokens", body.max_output_tokens)?;
    let mut messages = Vec::new();
    if let Some(instructions) = &body.instructions {
        messages.push(Message::new("system", instructions));
    }
    match body.input {
        Items::Text(text) => messages.push(Message::new("user", text)),
        Items::List(items) if items.is_empty() => {
            return Err(ApiError::of("input", "the input is empty"));
        }
        Items::List(items) => items.iter().try_for_each(|item| add(item, &mut messages))?,
    }
    let given = body.tools.unwrap_or_default();
    let mut tools: Vec<Tool> = given.iter().filter_map(function).collect();
    let effort_text = body.reasoning.and_then(|reasoning| reasoning.effort);
    let format = body.text.and_then(|text| text.format).filter(|format| !format.is_null());
    let form = match &format {
        None => Form::Free,
        // The schema stands one level higher than in a chat.
        Some(format) => response_format(&json!({"type": format["type"], "json_schema": format}))?,
    };
    let choice = body.tool_choice.as_ref();
    let form = tool_choice(choice, form, body.parallel_tool_calls, &mut tools)?;
    let frame = json!({
        "id": id("resp_"),
        "object": "response",
        "created_at": now(),
        "error": null,
        "incomplete_details": null,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "model": body.model,
        "parallel_tool_calls": body.parallel_tool_calls.unwrap_or(true),
        "previous_response_id": null,
        "reasoning": {"effort": effort_text, "summary": null},
        "store": false,
        "temperature": body.temperature,
        "text": {"format": format.unwrap_or_else(|| json!({"type": "text"}))},
        "tool_choice": body.tool_choice.unwrap_or_else(|| "auto".into()),
        "tools": given,
        "top_p": body.top_p,
        "truncation": "disabled",
        "metadata": body.metadata.unwrap_or_default(),
    });
    let ask = Ask {
        tools,
        think: effort(effort_text.as_deref())?,
        form,
        params: Params {
            temperature: body.temperature,
            top_p: body.top_p,
            num_predict: body.max_output_tokens,
            ..Params::default()
        },
        ..Ask::new(admission, body.model, Input::Chat(messages))
    };
    match frame {
        Value::Object(frame) => Ok((ask, frame)),
        _ => unreachable!("written as an object"),
    }
}

/// A tool that is a function; others would run on OpenAI's machines, and the model is not told of them.
fn function(tool: &Value) -> Option<Tool> {
    let name = tool["name"].as_str().filter(|_| tool["type"] == "function")?;
    let description = tool["description"].as_str().map(str::to_owned);
    let function =
        Function { name: name.into(), description, parameters: tool["parameters"].clone() };
    Some(Tool { kind: "function".into(), function })
}

/// Adds an item to the messages that it belongs to.
fn add(item: &Value, messages: &mut Vec<Message>) -> ApiResult<()> {
    let text = |key: &str| item[key].as_str().unwrap_or_default().to_owned();
    match item["type"].as_str().unwrap_or("message") {
        "message" => {
            let role = match item["role"].as_str() {
                Some("developer") => "system",
                Some(role) => role,
                None => return Err(ApiError::of("input", "a message has a role")),
            };
            let content = content::text("input", &item["content"])?;
            match messages.last_mut() {
                // Thinking that came before it.
                Some(last)
                    if role == "assistant" && last.role == role && last.content.is_empty() =>
                {
                    last.content = content;
                }
                _ => messages.push(Message::new(role, content)),
            }
        }
        "reasoning" => {
            let thinking = content::text("input", &item["content"]).unwrap_or_default();
            if !thinking.is_empty() {
                messages
                    .push(Message { thinking: Some(thinking), ..Message::new("assistant", "") });
            }
        }
        "function_call" => {
            let arguments = text("arguments");
            let arguments = serde_json::from_str(&arguments).unwrap_or(Value::String(arguments));
            let call = ToolCall { id: Some(text("call_id")), name: text("name"), arguments };
            match messages.last_mut() {
                Some(last) if last.role == "assistant" => last.tool_calls.push(call),
                _ => messages
                    .push(Message { tool_calls: vec![call], ..Message::new("assistant", "") }),
            }
        }
        "function_call_output" => {
            let call_id = text("call_id");
            let output = content::text("input", &item["output"])?;
            messages.push(Message { tool_call_id: Some(call_id), ..Message::new("tool", output) });
        }
        other => {
            return Err(ApiError::of(
                "input",
                format!("items of type {other:?} are not supported"),
            ));
        }
    }
    Ok(())
}

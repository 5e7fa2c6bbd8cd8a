//! Anthropic's API: `/v1/messages`.

use std::sync::Arc;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Json, Router};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Value, json};
use tierstream_chat::{Function, Message, Think, Tool, ToolCall};

use crate::ask::{self, Ask, Input, Wishes, random};
use crate::blocks::{Block, Blocks, Change};
use crate::body::{Admission, Received, read};
use crate::error::{Anthropic, ApiError, ApiResult};
use crate::grammar::Form;
use crate::hub::{Hub, blocking};
use crate::job::{Done, Reason};
use crate::openai::stream::{Chunks, named_events};
use crate::openapi::{Api, EVENTS, JSON, schemas};
use crate::talk::{Said, Talk};

pub(crate) fn routes() -> Router<Arc<Hub>> {
    Router::new()
        .route("/v1/messages", post(messages))
        .route("/v1/messages/count_tokens", post(count))
}

/// What `routes` has.
pub(crate) fn describe(api: &mut Api) {
    api.post::<Body>("/v1/messages", "Goes on with a chat", &[JSON, EVENTS]);
    api.post::<Body>("/v1/messages/count_tokens", "How many tokens a chat has", &[JSON]);
}

#[derive(Deserialize, JsonSchema)]
#[schemars(rename = "Messages")]
struct Body {
    #[serde(default)]
    model: String,
    messages: Vec<MessageBody>,
    #[serde(default)]
    #[schemars(schema_with = "schemas::blocks")]
    system: Option<Value>,
    #[schemars(range(min = 1))]
    max_tokens: Option<i64>,
    tools: Option<Vec<ToolBody>>,
    tool_choice: Option<Choice>,
    stop_sequences: Option<Vec<String>>,
    stream: Option<bool>,
    #[schemars(range(min = 0.0))]
    temperature: Option<f32>,
    #[schemars(range(min = 0.0, max = 1.0))]
    top_p: Option<f32>,
    top_k: Option<i64>,
    thinking: Option<Thinking>,
}

#[derive(Deserialize, JsonSchema)]
#[schemars(rename = "AnthropicMessage")]
struct MessageBody {
    role: String,
    #[schemars(schema_with = "schemas::blocks")]
    content: Value,
}

#[derive(Deserialize, JsonSchema)]
#[schemars(rename = "AnthropicTool")]
struct ToolBody {
    name: String,
    description: Option<String>,
    #[serde(default)]
    input_schema: Value,
}

#[derive(Deserialize, JsonSchema)]
#[schemars(rename = "AnthropicToolChoice")]
struct Choice {
    #[serde(rename = "type")]
    kind: String,
    name: Option<String>,
    disable_parallel_tool_use: Option<bool>,
}

#[derive(Deserialize, JsonSchema)]
struct Thinking {
    #[serde(rename = "type")]
    kind: String,
}

async fn messages(State(hub): State<Arc<Hub>>, body: Received) -> Result<Response, Anthropic> {
    let (body, admission): (Body, _) = read(body)?;
    let (streams, model) = (body.stream.unwrap_or(false), body.model.clone());
    if body.max_tokens.is_none_or(|n| n < 1) {
        return Err(ApiError::of("max_tokens", "max_tokens is to be at least 1").into());
    }
    let mut talk = Talk::begin(&hub, ask(body, admission)?).await?;
    let id = format!("msg_{:016x}", random());
    if streams {
        return Ok(named_events(
            &hub,
            Streamed { talk, id, model, blocks: Blocks::default(), stage: Stage::Begins },
        ));
    }
    let (mut blocks, mut content) = (Blocks::default(), Vec::new());
    let mut close = |changes: Vec<Change>| {
        content.extend(changes.into_iter().filter_map(|change| match change {
            Change::Close { block, .. } => Some(block_of(&block, true)),
            _ => None,
        }));
    };
    loop {
        match talk.next().await.ok_or_else(ApiError::endless)?? {
            Said::Part(part) => part.deltas.into_iter().for_each(|delta| close(blocks.push(delta))),
            Said::End(done) => {
                close(blocks.finish());
                let mut message = head(&id, &model, &content);
                let (reason, text) = reason(&talk, &done);
                message["stop_reason"] = reason.into();
                message["stop_sequence"] = text;
                message["usage"] = usage(&done);
                return Ok(Json(message).into_response());
            }
        }
    }
}

async fn count(State(hub): State<Arc<Hub>>, body: Received) -> Result<Json<Value>, Anthropic> {
    let (body, admission) = read(body)?;
    let mut ask = ask(body, admission.clone())?;
    let counted = async {
        let lease = hub.acquire(&ask.model, None, None).await?;
        blocking(move || ask::prompt(&lease, &mut ask).map(|prompt| prompt.tokens.len())).await?
    };
    let tokens = admission.within(counted).await?;
    Ok(Json(json!({ "input_tokens": tokens })))
}

fn ask(body: Body, admission: Admission) -> ApiResult<Ask> {
    if body.messages.is_empty() {
        return Err(ApiError::of("messages", "there are no messages"));
    }
    let mut messages = Vec::new();
    if let Some(system) = body.system.as_ref().filter(|system| !system.is_null()) {
        messages.push(Message::new("system", text_of(system)?));
    }
    body.messages.iter().try_for_each(|message| add(message, &mut messages))?;
    ask::name_results(&mut messages);
    let tool = |tool: ToolBody| {
        let (name, description, parameters) = (tool.name, tool.description, tool.input_schema);
        Tool { kind: "function".into(), function: Function { name, description, parameters } }
    };
    let mut tools: Vec<Tool> = body.tools.unwrap_or_default().into_iter().map(tool).collect();
    let form = match &body.tool_choice {
        None => Form::Free,
        Some(choice) => match (choice.kind.as_str(), &choice.name) {
            ("auto", _) => Form::Free,
            ("none", _) => {
                tools.clear();
                Form::Free
            }
            ("any", _) => {
                let parallel = !choice.disable_parallel_tool_use.unwrap_or(false);
                Form::Calls { name: None, parallel }
            }
            ("tool", Some(name)) => Form::Calls { name: Some(name.clone()), parallel: false },
            _ => {
                return Err(ApiError::of(
                    "tool_choice",
                    "tool_choice is of type auto, any, none or tool",
                ));
            }
        },
    };
    if matches!(form, Form::Calls { .. }) && tools.is_empty() {
        return Err(ApiError::of("tool_choice", "tool_choice needs tools"));
    }
    Ok(Ask {
        tools,
        think: body
            .thinking
            .map(|thinking| if thinking.kind == "disabled" { Think::Off } else { Think::On }),
        form,
        wishes: Wishes {
            num_predict: body.max_tokens,
            temperature: body.temperature,
            top_p: body.top_p,
            top_k: body.top_k,
            stop: body.stop_sequences,
            ..Wishes::default()
        },
        ..Ask::new(admission, body.model, Input::Chat(messages))
    })
}

/// A message may hold results of tools, which are messages of their own elsewhere.
fn add(body: &MessageBody, messages: &mut Vec<Message>) -> ApiResult<()> {
    let Value::Array(blocks) = &body.content else {
        messages.push(Message::new(&body.role, text_of(&body.content)?));
        return Ok(());
    };
    let mut message = Message::new(&body.role, "");
    let mut texts = Vec::new();
    for block in blocks {
        let text = |key: &str| block[key].as_str().unwrap_or_default().to_owned();
        match block["type"].as_str().unwrap_or_default() {
            "text" => texts.push(text("text")),
            "thinking" => message.thinking.get_or_insert_default().push_str(&text("thinking")),
            "redacted_thinking" => {}
            "tool_use" => message.tool_calls.push(ToolCall {
                id: Some(text("id")),
                name: text("name"),
                arguments: block["input"].clone(),
            }),
            "tool_result" => {
                let id = text("tool_use_id");
                let content = text_of(&block["content"])?;
                messages.push(Message { tool_call_id: Some(id), ..Message::new("tool", content) });
            }
            other => {
                return Err(ApiError::of(
                    "messages",
                    format!("content of type {other:?} is not supported"),
                ));
            }
        }
    }
    message.content = texts.join("\n");
    if !message.content.is_empty() || !message.tool_calls.is_empty() || message.thinking.is_some() {
        messages.push(message);
    }
    Ok(())
}

/// A text, or a list of blocks of text.
fn text_of(content: &Value) -> ApiResult<String> {
    match content {
        Value::Null => Ok(String::new()),
        Value::String(text) => Ok(text.clone()),
        Value::Array(blocks) => {
            let text = |block: &Value| match block["text"].as_str() {
                Some(text) => Ok(text.to_owned()),
                None => Err(ApiError::of(
                    "messages",
                    format!("content of type {} is not supported", block["type"]),
                )),
            };
            Ok(blocks.iter().map(text).collect::<ApiResult<Vec<_>>>()?.join("\n"))
        }
        _ => Err(ApiError::of("messages", "content is a text or a list")),
    }
}

fn head(id: &str, model: &str, content: &[Value]) -> Value {
    json!({
        "id": id,
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": content,
        "stop_reason": null,
        "stop_sequence": null,
        "usage": {"input_tokens": 0, "output_tokens": 0},
    })
}

fn usage(done: &Done) -> Value {
    json!({
        "input_tokens": done.prompt_tokens - done.cached,
        "cache_read_input_tokens": done.cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": done.drawn.len(),
    })
}

fn reason(talk: &Talk, done: &Done) -> (&'static str, Value) {
    match (&done.stop_text, done.reason) {
        (Some(text), _) => ("stop_sequence", text.as_str().into()),
        (None, Reason::Length) => ("max_tokens", Value::Null),
        (None, Reason::Stop) if talk.has_called() => ("tool_use", Value::Null),
        (None, Reason::Stop) => ("end_turn", Value::Null),
    }
}

/// A block of content; at its beginning without what follows in deltas.
fn block_of(block: &Block, is_done: bool) -> Value {
    match block {
        Block::Thinking(text) => json!({"type": "thinking", "thinking": text, "signature": ""}),
        Block::Text(text) => json!({"type": "text", "text": text}),
        Block::Call { id, name, arguments } => {
            let input = if is_done {
                serde_json::from_str(arguments).unwrap_or_default()
            } else {
                json!({})
            };
            json!({"type": "tool_use", "id": id, "name": name, "input": input})
        }
    }
}

struct Streamed {
    talk: Talk,
    id: String,
    model: String,
    blocks: Blocks,
    stage: Stage,
}

#[derive(PartialEq, Eq)]
enum Stage {
    Begins,
    /// Inside of a block of this kind of deltas.
    Goes {
        delta: &'static str,
        key: &'static str,
    },
    Over,
}

impl Chunks for Streamed {
    async fn next(&mut self) -> Option<Vec<Value>> {
        match self.stage {
            Stage::Over => return None,
            Stage::Begins => {
                self.stage = Stage::Goes { delta: "text_delta", key: "text" };
                let message = head(&self.id, &self.model, &[]);
                return Some(vec![
                    json!({"type": "message_start", "message": message}),
                    json!({"type": "ping"}),
                ]);
            }
            Stage::Goes { .. } => {}
        }
        match self.talk.next().await? {
            Ok(Said::Part(part)) => {
                let changes: Vec<_> =
                    part.deltas.into_iter().flat_map(|delta| self.blocks.push(delta)).collect();
                Some(changes.into_iter().map(|change| self.change(change)).collect())
            }
            Ok(Said::End(done)) => {
                let changes = self.blocks.finish();
                let mut events: Vec<_> =
                    changes.into_iter().map(|change| self.change(change)).collect();
                self.stage = Stage::Over;
                let (reason, text) = reason(&self.talk, &done);
                let delta = json!({"stop_reason": reason, "stop_sequence": text});
                events
                    .push(json!({"type": "message_delta", "delta": delta, "usage": usage(&done)}));
                events.push(json!({"type": "message_stop"}));
                Some(events)
            }
            Err(error) => {
                self.stage = Stage::Over;
                Some(vec![error.anthropic()])
            }
        }
    }
}

impl Streamed {
    fn change(&mut self, change: Change) -> Value {
        match change {
            Change::Open { index, block } => {
                let (delta, key) = match block {
                    Block::Thinking(_) => ("thinking_delta", "thinking"),
                    Block::Text(_) => ("text_delta", "text"),
                    Block::Call { .. } => ("input_json_delta", "partial_json"),
                };
                self.stage = Stage::Goes { delta, key };
                json!({"type": "content_block_start", "index": index, "content_block": block_of(&block, false)})
            }
            Change::More { index, text } => {
                let Stage::Goes { delta: kind, key } = self.stage else {
                    unreachable!("it has begun")
                };
                let mut delta = json!({ "type": kind });
                delta[key] = text.into();
                json!({"type": "content_block_delta", "index": index, "delta": delta})
            }
            Change::Close { index, .. } => json!({"type": "content_block_stop", "index": index}),
        }
    }
}

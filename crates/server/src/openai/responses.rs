//! `/v1/responses`. Nothing is kept of an answer: clients send all that was said so far.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tierstream_chat::{Function, Message, Tool, ToolCall};

use super::chat::{effort, response_format};
use super::stream::{Chunks, named_events};
use super::{check_most, id, now};
use crate::ask::{Ask, Input, Wishes, name_results};
use crate::blocks::{Block, Blocks, Change};
use crate::body::{Admission, Received, Room, read};
use crate::error::{ApiError, ApiResult, OpenAi};
use crate::grammar::Form;
use crate::hub::Hub;
use crate::job::{Done, Reason};
use crate::openapi::schemas;
use crate::talk::{Said, Talk};

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
    #[schemars(extend("not" = {"const": 0}))]
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
    let room = hub.bodies.room_of(&frame)?;
    let talk = Talk::begin(&hub, ask).await?;
    let mut answer = Answer::new(talk, frame, room);
    if streams {
        return Ok(named_events(&hub, answer));
    }
    loop {
        let events = answer.step().await?;
        let is_last = |event: &&Value| {
            event["response"]["status"] == "completed"
                || event["response"]["status"] == "incomplete"
        };
        if let Some(last) = events.iter().find(is_last) {
            return Ok(Json(&last["response"]).into_response());
        }
    }
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
        Items::List(items) => {
            items.iter().try_for_each(|item| add(item, &mut messages))?;
            name_results(&mut messages);
        }
    }
    let given = body.tools.unwrap_or_default();
    let mut tools: Vec<Tool> = given.iter().filter_map(function).collect();
    let effort_text = body.reasoning.and_then(|reasoning| reasoning.effort);
    let format = body.text.and_then(|text| text.format).filter(|format| !format.is_null());
    let parallel = body.parallel_tool_calls.unwrap_or(true);
    let form = match &format {
        None => Form::Free,
        // The schema stands one level higher than in a chat.
        Some(format) => response_format(&json!({"type": format["type"], "json_schema": format}))?,
    };
    let form = choice(body.tool_choice.as_ref(), form, parallel, &mut tools)?;
    let frame = json!({
        "id": id("resp_"),
        "object": "response",
        "created_at": now(),
        "error": null,
        "incomplete_details": null,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "model": body.model,
        "parallel_tool_calls": parallel,
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
        wishes: Wishes {
            temperature: body.temperature,
            top_p: body.top_p,
            num_predict: body.max_output_tokens,
            ..Wishes::default()
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

fn choice(
    choice: Option<&Value>,
    form: Form,
    parallel: bool,
    tools: &mut Vec<Tool>,
) -> ApiResult<Form> {
    let wrong =
        || ApiError::of("tool_choice", "tool_choice is none, auto, required, or names a function");
    let calls = |name: Option<String>| Form::Calls { parallel: parallel && name.is_none(), name };
    let form = match choice {
        None | Some(Value::Null) => form,
        Some(Value::String(text)) => match text.as_str() {
            "auto" => form,
            "none" => {
                tools.clear();
                form
            }
            "required" => calls(None),
            _ => return Err(wrong()),
        },
        Some(named) => calls(Some(named["name"].as_str().ok_or_else(wrong)?.to_owned())),
    };
    match form {
        Form::Calls { .. } if tools.is_empty() => {
            Err(ApiError::of("tool_choice", "tool_choice needs tools"))
        }
        form => Ok(form),
    }
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
            let content = content(&item["content"])?;
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
            let thinking = content(&item["content"]).unwrap_or_default();
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
            let output = content(&item["output"])?;
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

/// A text, or a list of texts.
fn content(content: &Value) -> ApiResult<String> {
    match content {
        Value::Null => Ok(String::new()),
        Value::String(text) => Ok(text.clone()),
        Value::Array(parts) => {
            let text =
                |part: &Value| match part["text"].as_str().or_else(|| part["refusal"].as_str()) {
                    Some(text) => Ok(text.to_owned()),
                    None => Err(ApiError::of(
                        "input",
                        format!("content of type {} is not supported", part["type"]),
                    )),
                };
            Ok(parts.iter().map(text).collect::<ApiResult<Vec<_>>>()?.join("\n"))
        }
        _ => Err(ApiError::of("input", "content is a text or a list")),
    }
}

/// An answer on its way.
struct Answer {
    talk: Talk,
    frame: Map<String, Value>,
    /// Of the frame, which has much of the request in it.
    _room: Room,
    blocks: Blocks,
    /// Ids of the items, and what their events are called.
    ids: Vec<(String, &'static str)>,
    /// Those that are complete.
    items: Vec<Value>,
    events: u64,
    begun: bool,
    is_over: bool,
}

impl Answer {
    fn new(talk: Talk, frame: Map<String, Value>, room: Room) -> Self {
        let (ids, items) = (Vec::new(), Vec::new());
        Self {
            talk,
            frame,
            _room: room,
            blocks: Blocks::default(),
            ids,
            items,
            events: 0,
            begun: false,
            is_over: false,
        }
    }

    async fn step(&mut self) -> ApiResult<Vec<Value>> {
        if !self.begun {
            self.begun = true;
            let response = self.response("in_progress", None);
            let created = self.event("response.created", json!({ "response": response }));
            return Ok(vec![
                created,
                self.event("response.in_progress", json!({ "response": response })),
            ]);
        }
        let said = self.talk.next().await;
        match said.ok_or_else(ApiError::endless)?? {
            Said::Part(part) => {
                let changes: Vec<_> =
                    part.deltas.into_iter().flat_map(|delta| self.blocks.push(delta)).collect();
                Ok(changes.into_iter().flat_map(|change| self.change(change)).collect())
            }
            Said::End(done) => {
                self.is_over = true;
                let changes = self.blocks.finish();
                let mut events: Vec<_> =
                    changes.into_iter().flat_map(|change| self.change(change)).collect();
                let status = match done.reason {
                    Reason::Stop => "completed",
                    Reason::Length => "incomplete",
                };
                let response = self.response(status, Some(&done));
                events.push(
                    self.event(&format!("response.{status}"), json!({ "response": response })),
                );
                Ok(events)
            }
        }
    }

    fn response(&self, status: &str, done: Option<&Done>) -> Value {
        let mut response = self.frame.clone();
        response.insert("status".into(), status.into());
        response.insert("output".into(), self.items.clone().into());
        if status == "incomplete" {
            response.insert("incomplete_details".into(), json!({"reason": "max_output_tokens"}));
        }
        response.insert(
            "usage".into(),
            done.map_or(Value::Null, |done| {
                let (prompt, drawn) = (done.prompt_tokens, done.drawn.len());
                json!({
                    "input_tokens": prompt,
                    "input_tokens_details": {"cached_tokens": done.cached},
                    "output_tokens": drawn,
                    "output_tokens_details": {"reasoning_tokens": 0},
                    "total_tokens": prompt + drawn,
                })
            }),
        );
        Value::Object(response)
    }

    fn event(&mut self, kind: &str, mut event: Value) -> Value {
        event["type"] = kind.into();
        event["sequence_number"] = self.events.into();
        self.events += 1;
        event
    }

    /// The events of a change of the blocks, each of which is an item.
    fn change(&mut self, change: Change) -> Vec<Value> {
        match change {
            Change::Open { index, block } => {
                self.ids.push(match &block {
                    Block::Thinking(_) => (id("rs_"), "reasoning_text"),
                    Block::Text(_) => (id("msg_"), "output_text"),
                    Block::Call { .. } => (id("fc_"), "function_call_arguments"),
                });
                let item = self.item(index, &block, false);
                let mut events = vec![self.event(
                    "response.output_item.added",
                    json!({"output_index": index, "item": item}),
                )];
                if let Some(part) = part(&block) {
                    let added = self.at(index, json!({"content_index": 0, "part": part}));
                    events.push(self.event("response.content_part.added", added));
                }
                events
            }
            Change::More { index, text } => {
                let kind = format!("response.{}.delta", self.ids[index].1);
                let delta = self.at(index, json!({"content_index": 0, "delta": text}));
                vec![self.event(&kind, delta)]
            }
            Change::Close { index, block } => self.close(index, &block),
        }
    }

    fn close(&mut self, index: usize, block: &Block) -> Vec<Value> {
        let mut events = Vec::new();
        let kind = format!("response.{}.done", self.ids[index].1);
        match block {
            Block::Thinking(text) | Block::Text(text) => {
                let done = self.at(index, json!({"content_index": 0, "text": text}));
                events.push(self.event(&kind, done));
                let done = self.at(index, json!({"content_index": 0, "part": part(block)}));
                events.push(self.event("response.content_part.done", done));
            }
            Block::Call { name, arguments, .. } => {
                let done = self.at(index, json!({"name": name, "arguments": arguments}));
                events.push(self.event(&kind, done));
            }
        }
        let item = self.item(index, block, true);
        events.push(
            self.event("response.output_item.done", json!({"output_index": index, "item": item})),
        );
        self.items.push(item);
        events
    }

    fn at(&self, index: usize, mut event: Value) -> Value {
        event["item_id"] = self.ids[index].0.as_str().into();
        event["output_index"] = index.into();
        event
    }

    fn item(&self, index: usize, block: &Block, is_done: bool) -> Value {
        let (id, status) = (&self.ids[index].0, if is_done { "completed" } else { "in_progress" });
        let content = part(block).filter(|_| is_done).into_iter().collect::<Vec<_>>();
        match block {
            Block::Thinking(_) => {
                json!({"type": "reasoning", "id": id, "summary": [], "content": content, "status": status})
            }
            Block::Text(_) => {
                json!({"type": "message", "id": id, "status": status, "role": "assistant", "content": content})
            }
            Block::Call { id: call_id, name, arguments } => json!({
                "type": "function_call",
                "id": id,
                "call_id": call_id,
                "name": name,
                "arguments": arguments,
                "status": status,
            }),
        }
    }
}

/// The content of an item.
fn part(block: &Block) -> Option<Value> {
    match block {
        Block::Thinking(text) => Some(json!({"type": "reasoning_text", "text": text})),
        Block::Text(text) => {
            Some(json!({"type": "output_text", "text": text, "annotations": [], "logprobs": []}))
        }
        Block::Call { .. } => None,
    }
}

impl Chunks for Answer {
    async fn next(&mut self) -> Option<Vec<Value>> {
        if self.is_over {
            return None;
        }
        match self.step().await {
            Ok(events) => Some(events),
            Err(error) => {
                self.is_over = true;
                let mut response = self.response("failed", None);
                response["error"] = json!({"code": "server_error", "message": error.message});
                Some(vec![self.event("response.failed", json!({ "response": response }))])
            }
        }
    }
}

//! `/v1/chat/completions`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize, Serializer};
use serde_json::{Value, json};
use tierstream_chat::{Delta, Message, Think, Tool, ToolCall};

use super::{Common, Head, Object, UNLIMITED, check_most, now, timings, tool_choice, usage};
use crate::ask::{Ask, Input};
use crate::body::{Admission, Received, json, read};
use crate::content;
use crate::error::{ApiError, ApiResult, OpenAi};
use crate::events::{Chunks, events};
use crate::generation::{Generation, Output, Part, Whole};
use crate::grammar::Form;
use crate::hub::Hub;
use crate::ids::id;
use crate::logprobs::Told;
use crate::openapi::schemas;

#[derive(Deserialize, JsonSchema)]
#[schemars(rename = "Chat")]
pub(super) struct Body {
    #[serde(flatten)]
    common: Common,
    messages: Vec<MessageBody>,
    /// As `max_tokens`, of which it is the newer word.
    #[schemars(range(min = -1))]
    max_completion_tokens: Option<i64>,
    #[serde(default)]
    #[schemars(schema_with = "schemas::tools")]
    tools: Option<Vec<Tool>>,
    #[serde(default)]
    #[schemars(schema_with = "schemas::tool_choice")]
    tool_choice: Option<Value>,
    parallel_tool_calls: Option<bool>,
    #[serde(default)]
    #[schemars(schema_with = "schemas::response_format")]
    response_format: Option<Value>,
    logprobs: Option<bool>,
    #[schemars(range(max = 20))]
    top_logprobs: Option<usize>,
    #[serde(default)]
    #[schemars(schema_with = "schemas::effort")]
    reasoning_effort: Option<String>,
    chat_template_kwargs: Option<TemplateArguments>,
}

/// What some clients have templates told.
#[derive(Deserialize, JsonSchema)]
struct TemplateArguments {
    enable_thinking: Option<bool>,
}

#[derive(Deserialize, JsonSchema)]
#[schemars(rename = "Message")]
struct MessageBody {
    role: String,
    content: Option<Content>,
    reasoning_content: Option<String>,
    tool_calls: Option<Vec<CallBody>>,
    tool_call_id: Option<String>,
    name: Option<String>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<ContentPart>),
}

#[derive(Deserialize, JsonSchema)]
struct ContentPart {
    #[serde(rename = "type")]
    kind: String,
    text: Option<String>,
    refusal: Option<String>,
}

#[derive(Deserialize, JsonSchema)]
#[schemars(rename = "Call")]
struct CallBody {
    id: Option<String>,
    function: FunctionBody,
}

#[derive(Deserialize, JsonSchema)]
#[schemars(rename = "CalledFunction")]
struct FunctionBody {
    name: String,
    #[serde(default)]
    arguments: Value,
}

pub(super) async fn chat(State(hub): State<Arc<Hub>>, body: Received) -> Result<Response, OpenAi> {
    let (mut body, admission): (Body, _) = read(body)?;
    let (streams, tells_usage) = (body.common.streams(), body.common.tells_usage());
    let model = body.common.model.clone();
    let tells_logprobs = body.logprobs.unwrap_or(false);
    let ask = ask(&mut body, admission)?;
    let mut generation = Generation::begin(&hub, ask).await?;
    let head = Head { id: id("chatcmpl-"), created: now(), model };
    if streams {
        let stage = Stage::Begins;
        return Ok(events(&hub, Streamed { generation, head, tells_usage, tells_logprobs, stage }));
    }
    let Whole { reply, logprobs: content, done } = generation.whole().await?;
    let mut message = json!({"role": "assistant", "content": reply.content, "refusal": null});
    if !reply.thinking.is_empty() {
        message["reasoning_content"] = reply.thinking.into();
    }
    let reason = reason(&generation, done.reason.name());
    if !reply.tool_calls.is_empty() {
        let call = |call: ToolCall| {
            let arguments = call.arguments.to_string();
            let function = json!({"name": call.name, "arguments": arguments});
            json!({"id": call.id.unwrap_or_else(|| id("call_")), "type": "function", "function": function})
        };
        if message["content"] == "" {
            message["content"] = Value::Null;
        }
        message["tool_calls"] = reply.tool_calls.into_iter().map(call).collect();
    }
    let choice = Choice {
        index: 0,
        message: Some(message),
        delta: None,
        finish_reason: Some(reason),
        logprobs: tells_logprobs.then_some(Listed { content, refusal: () }),
    };
    let mut answer = head.object("chat.completion", [choice]);
    answer.usage = Some(usage(&done));
    answer.timings = Some(timings(&done));
    Ok(Json(answer).into_response())
}

/// What an answer has one of.
#[derive(Serialize)]
struct Choice<'a> {
    index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    delta: Option<Value>,
    finish_reason: Option<&'a str>,
    logprobs: Option<Listed>,
}

#[derive(Serialize)]
struct Listed {
    #[serde(serialize_with = "list")]
    content: Told,
    refusal: (),
}

fn list<S: Serializer>(content: &Told, to: S) -> Result<S::Ok, S::Error> {
    content.list(to, true)
}

fn reason(generation: &Generation, reason: &'static str) -> &'static str {
    match reason {
        "stop" if generation.has_called() => "tool_calls",
        reason => reason,
    }
}

/// The kind of an answer's parts.
const CHUNK: &str = "chat.completion.chunk";

struct Streamed {
    generation: Generation,
    head: Head,
    tells_usage: bool,
    tells_logprobs: bool,
    stage: Stage,
}

#[derive(PartialEq, Eq)]
enum Stage {
    Begins,
    Goes,
    Over,
}

impl Chunks for Streamed {
    type Chunk = String;

    fn generation(&self) -> &Generation {
        &self.generation
    }

    async fn next(&mut self) -> Option<Vec<String>> {
        match self.stage {
            Stage::Over => return None,
            // Before the prompt is read, so that the client sees that it will be answered.
            Stage::Begins => {
                self.stage = Stage::Goes;
                let delta = json!({"role": "assistant", "content": ""});
                return Some(vec![json(&self.chunk(delta, None, None))]);
            }
            Stage::Goes => {}
        }
        match self.generation.next().await? {
            Ok(Output::Part(Part { deltas, logprobs })) => {
                let mut told = Some(self.generation.told(logprobs)).filter(|told| !told.is_empty());
                let mut chunks = Vec::new();
                for delta in deltas.into_iter().filter_map(delta_of) {
                    chunks.push(json(&self.chunk(delta, None, told.take())));
                }
                if told.is_some() {
                    chunks.push(json(&self.chunk(json!({}), None, told)));
                }
                Some(chunks)
            }
            Ok(Output::End(done)) => {
                self.stage = Stage::Over;
                let reason = reason(&self.generation, done.reason.name());
                let mut last = self.chunk(json!({}), Some(reason), None);
                if !self.tells_usage {
                    last.timings = Some(timings(&done));
                    return Some(vec![json(&last)]);
                }
                let mut counts = self.head.object::<[Choice; 0]>(CHUNK, []);
                counts.usage = Some(usage(&done));
                counts.timings = Some(timings(&done));
                Some(vec![json(&last), json(&counts)])
            }
            Err(error) => {
                self.stage = Stage::Over;
                Some(vec![json(&error.openai())])
            }
        }
    }
}

impl Streamed {
    fn chunk<'a>(
        &'a self,
        delta: Value,
        finish_reason: Option<&'a str>,
        told: Option<Told>,
    ) -> Object<'a, [Choice<'a>; 1]> {
        let told = told.filter(|_| self.tells_logprobs);
        let logprobs = told.map(|content| Listed { content, refusal: () });
        let choice =
            Choice { index: 0, message: None, delta: Some(delta), finish_reason, logprobs };
        let mut chunk = self.head.object(CHUNK, [choice]);
        chunk.usage = self.tells_usage.then_some(Value::Null);
        chunk
    }
}

fn delta_of(delta: Delta) -> Option<Value> {
    let call = |call: Value| Some(json!({ "tool_calls": [call] }));
    match delta {
        Delta::Content(text) => Some(json!({ "content": text })),
        Delta::Thinking(text) => Some(json!({ "reasoning_content": text })),
        Delta::ToolStart { index, id: given, name } => call(json!({
            "index": index,
            "id": given.unwrap_or_else(|| id("call_")),
            "type": "function",
            "function": {"name": name, "arguments": ""},
        })),
        Delta::ToolArguments { index, json_fragment } => {
            call(json!({"index": index, "function": {"arguments": json_fragment}}))
        }
        Delta::ToolEnd { .. } => None,
    }
}

fn ask(body: &mut Body, admission: Admission) -> ApiResult<Ask> {
    let messages = std::mem::take(&mut body.messages);
    if messages.is_empty() {
        return Err(ApiError::of("messages", "there are no messages"));
    }
    let mut params = body.common.params()?;
    let most = body.max_completion_tokens.filter(|&tokens| tokens != UNLIMITED);
    check_most("max_completion_tokens", most)?;
    params.num_predict = body.max_completion_tokens.or(params.num_predict);
    let mut tools = body.tools.take().unwrap_or_default();
    let form = form(body, &mut tools)?;
    let input = Input::Chat(messages.into_iter().map(message).collect::<ApiResult<_>>()?);
    Ok(Ask {
        tools,
        think: think(body)?,
        form,
        params,
        bias: body.common.bias()?,
        logprobs: logprobs_of(body)?,
        ..Ask::new(admission, body.common.model.clone(), input)
    })
}

fn logprobs_of(body: &Body) -> ApiResult<Option<usize>> {
    match (body.logprobs.unwrap_or(false), body.top_logprobs.unwrap_or(0)) {
        (true, n @ 0..=20) => Ok(Some(n)),
        (false, 0) => Ok(None),
        (false, _) => Err(ApiError::of("top_logprobs", "top_logprobs needs logprobs")),
        (true, _) => Err(ApiError::of("top_logprobs", "top_logprobs is at most 20")),
    }
}

fn think(body: &Body) -> ApiResult<Option<Think>> {
    if let Some(on) = body.chat_template_kwargs.as_ref().and_then(|given| given.enable_thinking) {
        return Ok(Some(if on { Think::On } else { Think::Off }));
    }
    effort(body.reasoning_effort.as_deref())
}

/// How much is to be thought.
pub(super) fn effort(effort: Option<&str>) -> ApiResult<Option<Think>> {
    match effort {
        None => Ok(None),
        Some("none") => Ok(Some(Think::Off)),
        Some("minimal" | "low") => Ok(Some(Think::Low)),
        Some("medium") => Ok(Some(Think::Medium)),
        Some("high" | "xhigh") => Ok(Some(Think::High)),
        Some(other) => {
            let why = format!("reasoning_effort is {other:?}; it is none, low, medium or high");
            Err(ApiError::of("reasoning_effort", why))
        }
    }
}

/// What the answer is held to.
fn form(body: &mut Body, tools: &mut Vec<Tool>) -> ApiResult<Form> {
    let form = match (body.common.grammar.take(), body.response_format.take()) {
        (Some(grammar), _) => Form::Lark(grammar),
        (None, None | Some(Value::Null)) => Form::Free,
        (None, Some(format)) => response_format(&format)?,
    };
    tool_choice(body.tool_choice.as_ref(), form, body.parallel_tool_calls, tools)
}

pub(super) fn response_format(format: &Value) -> ApiResult<Form> {
    let wrong = |why: &str| ApiError::of("response_format", why);
    match format["type"].as_str() {
        Some("text") => Ok(Form::Free),
        Some("json_object") => match &format["schema"] {
            Value::Null => Ok(Form::any_object()),
            schema => Ok(Form::Json(schema.clone())),
        },
        Some("json_schema") => match &format["json_schema"]["schema"] {
            Value::Null => Err(wrong("response_format has no json_schema.schema")),
            schema => Ok(Form::Json(schema.clone())),
        },
        _ => Err(wrong("response_format is of type text, json_object or json_schema")),
    }
}

fn message(body: MessageBody) -> ApiResult<Message> {
    let content = match body.content {
        // An assistant that calls tools, or has thought only.
        None if body.role == "assistant" => String::new(),
        None => {
            let why = format!("a message of the role {:?} has no content", body.role);
            return Err(ApiError::of("messages", why));
        }
        Some(Content::Text(text)) => text,
        Some(Content::Parts(parts)) => {
            parts.into_iter().map(part).collect::<ApiResult<Vec<_>>>()?.join("\n")
        }
    };
    let call = |call: CallBody| {
        // A text of JSON by the API's rules; some clients send the object.
        let arguments = match call.function.arguments {
            Value::String(text) => serde_json::from_str(&text).unwrap_or(Value::String(text)),
            other => other,
        };
        ToolCall { id: call.id, name: call.function.name, arguments }
    };
    let is_tool = body.role == "tool";
    Ok(Message {
        // The newer word for it, which templates do not know.
        role: if body.role == "developer" { "system".into() } else { body.role },
        content,
        thinking: body.reasoning_content,
        tool_calls: body.tool_calls.unwrap_or_default().into_iter().map(call).collect(),
        tool_call_id: body.tool_call_id,
        tool_name: body.name.filter(|_| is_tool),
    })
}

fn part(part: ContentPart) -> ApiResult<String> {
    match (part.kind.as_str(), part.text, part.refusal) {
        ("text", Some(text), _) | ("refusal", _, Some(text)) => Ok(text),
        (kind, ..) => Err(content::unsupported("messages", kind)),
    }
}

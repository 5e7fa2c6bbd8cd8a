//! Anthropic's API: `/v1/messages`.

mod answer;

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use axum::routing::post;
use axum::{Json, Router};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Value, json};
use tierstream_chat::{Function, Message, Think, Tool, ToolCall};

use self::answer::{Answering, answer};
use crate::ask::{self, Ask, Input, Params};
use crate::body::{Admission, Received, read};
use crate::content;
use crate::error::{Anthropic, ApiError, ApiResult};
use crate::generation::Generation;
use crate::grammar::Form;
use crate::hub::{Hub, blocking};
use crate::openapi::{Api, EVENTS, JSON, schemas};

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
    #[serde(rename = "type")]
    kind: Option<String>,
    name: Option<String>,
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
    let stops = body.stop_sequences.clone().unwrap_or_default();
    let generation = Generation::begin(&hub, ask(body, admission)?).await?;
    Ok(answer(&hub, Answering { generation, model, stops }, streams).await?)
}

async fn count(State(hub): State<Arc<Hub>>, body: Received) -> Result<Json<Value>, Anthropic> {
    let (body, admission) = read(body)?;
    let mut ask = ask(body, admission.clone())?;
    let counted = async {
        // Whatever context it has: none is loaded again to be asked this.
        let lease = hub.acquire_any(&ask.model).await?;
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
        messages.push(Message::new("system", content::text("system", system)?));
    }
    body.messages.iter().try_for_each(|message| add(message, &mut messages))?;
    let tools = body.tools.unwrap_or_default().into_iter().filter(ToolBody::is_the_clients);
    let mut tools: Vec<Tool> = tools.map(ToolBody::function).collect::<ApiResult<_>>()?;
    let form = match &body.tool_choice {
        None => Form::Free,
        Some(choice) => match (choice.kind.as_str(), &choice.name) {
            ("auto", _) => Form::Free,
            ("none", _) => {
                tools.clear();
                Form::Free
            }
            ("any", _) => {
                Form::calls(None, !choice.disable_parallel_tool_use.unwrap_or(false), &tools)?
            }
            ("tool", Some(name)) => Form::calls(Some(name), false, &tools)?,
            _ => {
                return Err(ApiError::of(
                    "tool_choice",
                    "tool_choice is of type auto, any, none or tool",
                ));
            }
        },
    };
    Ok(Ask {
        tools,
        think: body
            .thinking
            .map(|thinking| if thinking.kind == "disabled" { Think::Off } else { Think::On }),
        form,
        params: Params {
            num_predict: body.max_tokens,
            temperature: body.temperature,
            top_p: body.top_p,
            top_k: body.top_k,
            stop: body.stop_sequences,
            ..Params::default()
        },
        ..Ask::new(admission, body.model, Input::Chat(messages))
    })
}

impl ToolBody {
    /// Whether the client runs it; others would run on Anthropic's machines, and the model is not told of them.
    fn is_the_clients(&self) -> bool {
        self.kind.as_deref().is_none_or(|kind| kind == "custom")
    }

    fn function(self) -> ApiResult<Tool> {
        let name = self.name.ok_or_else(|| ApiError::of("tools", "a tool has a name"))?;
        let (description, parameters) = (self.description, self.input_schema);
        let function = Function { name, description, parameters };
        Ok(Tool { kind: "function".into(), function })
    }
}

/// A message may hold results of tools, which are messages of their own elsewhere.
fn add(body: &MessageBody, messages: &mut Vec<Message>) -> ApiResult<()> {
    let Value::Array(blocks) = &body.content else {
        messages.push(Message::new(&body.role, content::text("messages", &body.content)?));
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
                let content = content::text("messages", &block["content"])?;
                messages.push(Message { tool_call_id: Some(id), ..Message::new("tool", content) });
            }
            other => return Err(content::unsupported("messages", other)),
        }
    }
    message.content = texts.join("\n");
    if !message.content.is_empty() || !message.tool_calls.is_empty() || message.thinking.is_some() {
        messages.push(message);
    }
    Ok(())
}

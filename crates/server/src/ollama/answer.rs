//! Answers of `/api/chat` and `/api/generate`: lines, or one object.

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde::{Serialize, Serializer};
use serde_json::{Map, Value, json};
use tierstream_chat::{Reply, ToolCall};

use crate::ask::Ask;
use crate::body;
use crate::engine::Token;
use crate::error::ApiResult;
use crate::generation::{Generation, Output, Part, Whole, nanos};
use crate::hub::{Hub, KeepAlive};
use crate::ids;
use crate::job::Done;
use crate::logprobs::Told;

/// What the routes differ in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    /// A message.
    Chat,
    /// A text, and the tokens of all so far.
    Generate,
}

/// An answer on its way.
struct Answer {
    generation: Generation,
    shape: Shape,
    model: String,
    start: Instant,
    /// Calls that were told.
    calls: usize,
    is_over: bool,
}

/// Answers a request.
pub(super) async fn answer(
    hub: &Arc<Hub>,
    ask: Ask,
    streams: bool,
    shape: Shape,
) -> ApiResult<Response> {
    let start = Instant::now();
    let model = ask.model.clone();
    if ask.is_empty() {
        return Ok(axum::Json(load_or_unload(hub, &ask, shape, start).await?).into_response());
    }
    let generation = Generation::begin(hub, ask).await?;
    let mut answer = Answer { generation, shape, model, start, calls: 0, is_over: false };
    if !streams {
        let Whole { reply, logprobs, done } = answer.generation.whole().await?;
        let mut whole = answer.line(reply, Some(logprobs));
        whole.values.extend(answer.end(&done));
        return Ok(axum::Json(whole).into_response());
    }
    let overdue = answer.generation.overdue();
    Ok(body::lines(overdue.cut(stream::unfold(answer, |mut answer| async move {
        let line = answer.next().await?;
        Some((line, answer))
    }))))
}

/// A request without a prompt loads its model, or with `keep_alive` 0 unloads it.
async fn load_or_unload(
    hub: &Arc<Hub>,
    ask: &Ask,
    shape: Shape,
    start: Instant,
) -> ApiResult<Value> {
    let unloads = matches!(ask.keep_alive, Some(KeepAlive::For(time)) if time.is_zero());
    let reason = match unloads {
        true => {
            ask.admission.within(hub.unload(&ask.model)).await?;
            "unload"
        }
        false => {
            let load = hub.acquire(&ask.model, ask.params.ctx()?, ask.keep_alive);
            ask.admission.within(load).await?;
            "load"
        }
    };
    let mut line = beginning(&ask.model);
    line.extend(said(shape, Reply::default()));
    line.insert("done".into(), true.into());
    line.insert("done_reason".into(), reason.into());
    if !unloads {
        line.insert("total_duration".into(), nanos(start.elapsed()).into());
        line.insert("load_duration".into(), nanos(start.elapsed()).into());
    }
    Ok(Value::Object(line))
}

/// A line of an answer.
#[derive(Serialize)]
struct Line {
    #[serde(flatten)]
    values: Map<String, Value>,
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "list")]
    logprobs: Option<Told>,
}

fn list<S: Serializer>(logprobs: &Option<Told>, to: S) -> Result<S::Ok, S::Error> {
    match logprobs {
        Some(told) => told.list(to, false),
        None => to.serialize_none(),
    }
}

impl Answer {
    async fn next(&mut self) -> Option<Line> {
        if self.is_over {
            return None;
        }
        let line = match self.generation.next().await? {
            Ok(Output::Part(Part { deltas, logprobs })) => {
                let mut reply = Reply::default();
                reply.extend(deltas);
                let told = self.generation.told(logprobs);
                self.line(reply, Some(told))
            }
            Ok(Output::End(done)) => {
                self.is_over = true;
                let mut line = self.line(Reply::default(), None);
                line.values.extend(self.end(&done));
                line
            }
            Err(error) => {
                self.is_over = true;
                return Some(Line { values: object(error.ollama()), logprobs: None });
            }
        };
        Some(line)
    }

    fn line(&mut self, mut reply: Reply, logprobs: Option<Told>) -> Line {
        let mut line = beginning(&self.model);
        let calls = std::mem::take(&mut reply.tool_calls);
        let mut said = said(self.shape, reply);
        if !calls.is_empty()
            && let Some(Value::Object(message)) = said.get_mut("message")
        {
            let calls: Vec<Value> = calls.into_iter().map(|call| self.call(call)).collect();
            message.insert("tool_calls".into(), calls.into());
        }
        line.extend(said);
        line.insert("done".into(), false.into());
        Line { values: line, logprobs: logprobs.filter(|told| !told.is_empty()) }
    }

    fn call(&mut self, call: ToolCall) -> Value {
        let index = self.calls;
        self.calls += 1;
        let id = call.id.unwrap_or_else(|| ids::id("call_"));
        json!({"id": id, "function": {"index": index, "name": call.name, "arguments": call.arguments}})
    }

    fn end(&self, done: &Done) -> Map<String, Value> {
        let mut end = object(json!({
            "done": true,
            "done_reason": done.reason.name(),
            "total_duration": nanos(self.start.elapsed()),
            "load_duration": nanos(self.generation.lease.load_time),
            "prompt_eval_count": done.prompt_tokens,
            "prompt_eval_duration": nanos(done.prompt_time),
            "eval_count": done.drawn.len(),
            "eval_duration": nanos(done.eval_time),
        }));
        if let (Shape::Generate, Some(prompt)) = (self.shape, self.generation.prompt()) {
            let context: Vec<Token> = prompt.iter().chain(&done.drawn).copied().collect();
            end.insert("context".into(), context.into());
        }
        end
    }
}

fn beginning(model: &str) -> Map<String, Value> {
    let now = humantime::format_rfc3339_micros(SystemTime::now()).to_string();
    object(json!({"model": model, "created_at": now}))
}

fn said(shape: Shape, reply: Reply) -> Map<String, Value> {
    let thinking = (!reply.thinking.is_empty()).then_some(reply.thinking);
    let mut said = match shape {
        Shape::Chat => json!({"role": "assistant", "content": reply.content}),
        Shape::Generate => json!({"response": reply.content}),
    };
    if let Some(thinking) = thinking {
        said["thinking"] = thinking.into();
    }
    object(match shape {
        Shape::Chat => json!({ "message": said }),
        Shape::Generate => said,
    })
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => unreachable!("written as an object"),
    }
}

//! Answers of `/v1/messages`: events, or one object.

use axum::Json;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::blocks::{Block, Blocks, Change};
use crate::error::{ApiError, ApiResult};
use crate::events::{Chunks, named_events};
use crate::generation::{Generation, Output};
use crate::hub::Hub;
use crate::ids::id;
use crate::job::{Done, Reason};

/// An answer, and what it is told with.
pub(super) struct Answering {
    pub(super) generation: Generation,
    pub(super) model: String,
    /// The request's own stop texts.
    pub(super) stops: Vec<String>,
}

/// Answers a request.
pub(super) async fn answer(hub: &Hub, answer: Answering, streams: bool) -> ApiResult<Response> {
    let id = id("msg_");
    match streams {
        true => {
            let (blocks, stage) = (Blocks::default(), Stage::Begins);
            Ok(named_events(hub, Streamed { answer, id, blocks, stage }))
        }
        false => Ok(Json(whole(answer, &id).await?).into_response()),
    }
}

async fn whole(mut answer: Answering, id: &str) -> ApiResult<Value> {
    let (mut blocks, mut content) = (Blocks::default(), Vec::new());
    let mut close = |changes: Vec<Change>| {
        content.extend(changes.into_iter().filter_map(|change| match change {
            Change::Close { block, .. } => Some(block_of(&block, true)),
            _ => None,
        }));
    };
    loop {
        match answer.generation.next().await.ok_or_else(ApiError::endless)?? {
            Output::Part(part) => {
                part.deltas.into_iter().for_each(|delta| close(blocks.push(delta)))
            }
            Output::End(done) => {
                close(blocks.finish());
                let mut message = head(id, &answer.model, &content);
                let (reason, text) = answer.reason(&done);
                message["stop_reason"] = reason.into();
                message["stop_sequence"] = text;
                message["usage"] = usage(&done);
                return Ok(message);
            }
        }
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

impl Answering {
    fn reason(&self, done: &Done) -> (&'static str, Value) {
        // Others are the model's, of which the client has not heard.
        let own = done.stop_text.as_ref().filter(|text| self.stops.contains(text));
        match (own, done.reason) {
            (Some(text), _) => ("stop_sequence", text.as_str().into()),
            (None, Reason::Length) => ("max_tokens", Value::Null),
            (None, Reason::Stop) if self.generation.has_called() => ("tool_use", Value::Null),
            (None, Reason::Stop) => ("end_turn", Value::Null),
        }
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
    answer: Answering,
    id: String,
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
    type Chunk = Value;

    fn generation(&self) -> &Generation {
        &self.answer.generation
    }

    async fn next(&mut self) -> Option<Vec<Value>> {
        match self.stage {
            Stage::Over => return None,
            Stage::Begins => {
                self.stage = Stage::Goes { delta: "text_delta", key: "text" };
                let message = head(&self.id, &self.answer.model, &[]);
                return Some(vec![
                    json!({"type": "message_start", "message": message}),
                    json!({"type": "ping"}),
                ]);
            }
            Stage::Goes { .. } => {}
        }
        match self.answer.generation.next().await? {
            Ok(Output::Part(part)) => {
                let changes: Vec<_> =
                    part.deltas.into_iter().flat_map(|delta| self.blocks.push(delta)).collect();
                Some(changes.into_iter().map(|change| self.change(change)).collect())
            }
            Ok(Output::End(done)) => {
                let changes = self.blocks.finish();
                let mut events: Vec<_> =
                    changes.into_iter().map(|change| self.change(change)).collect();
                self.stage = Stage::Over;
                let (reason, text) = self.answer.reason(&done);
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

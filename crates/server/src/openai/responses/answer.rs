//! Answers of `/v1/responses`: events, of which the last has all of it.

use axum::Json;
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};

use crate::blocks::{Block, Blocks, Change};
use crate::body::Room;
use crate::error::{ApiError, ApiResult};
use crate::events::{Chunks, named_events};
use crate::generation::{Generation, Output};
use crate::hub::{Hub, blocking};
use crate::ids::id;
use crate::job::{Done, Reason};

/// Answers a request.
pub(super) async fn answer(hub: &Hub, mut answer: Answer, streams: bool) -> ApiResult<Response> {
    if streams {
        return Ok(named_events(hub, answer));
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

/// An answer on its way.
pub(super) struct Answer {
    generation: Generation,
    frame: Map<String, Value>,
    /// Of the frame, which has much of the request in it.
    _room: Room,
    blocks: Blocks,
    /// Ids of the items, and what their events are called.
    ids: Vec<(String, &'static str)>,
    /// Those that are complete.
    items: Vec<Value>,
    /// What the model thought, and how many tokens of its vocabulary that is, once it is over.
    thoughts: String,
    thought_tokens: usize,
    events: u64,
    begun: bool,
    is_over: bool,
}

impl Answer {
    pub(super) fn new(generation: Generation, frame: Map<String, Value>, room: Room) -> Self {
        let (ids, items) = (Vec::new(), Vec::new());
        Self {
            generation,
            frame,
            _room: room,
            blocks: Blocks::default(),
            ids,
            items,
            thoughts: String::new(),
            thought_tokens: 0,
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
        let said = self.generation.next().await;
        match said.ok_or_else(ApiError::endless)?? {
            Output::Part(part) => {
                let changes: Vec<_> =
                    part.deltas.into_iter().flat_map(|delta| self.blocks.push(delta)).collect();
                Ok(changes.into_iter().flat_map(|change| self.change(change)).collect())
            }
            Output::End(done) => {
                self.is_over = true;
                let changes = self.blocks.finish();
                let mut events: Vec<_> =
                    changes.into_iter().flat_map(|change| self.change(change)).collect();
                self.count_thoughts().await?;
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

    async fn count_thoughts(&mut self) -> ApiResult<()> {
        let (text, thoughts) =
            (self.generation.lease.text.clone(), std::mem::take(&mut self.thoughts));
        self.thought_tokens =
            blocking(move || text.tokenize(&thoughts, false, false)).await??.len();
        Ok(())
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
                    "output_tokens_details": {"reasoning_tokens": self.thought_tokens.min(drawn)},
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
        if let Block::Thinking(text) = block {
            self.thoughts += text;
        }
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
    type Chunk = Value;

    fn generation(&self) -> &Generation {
        &self.generation
    }

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

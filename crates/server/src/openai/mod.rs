//! OpenAI's API, with the additions of llama.cpp's server.

mod chat;
mod completions;
mod embeddings;
mod models;
mod responses;

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::routing::{get, post};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tierstream_chat::Tool;

use crate::ask::{Params, one_or_more};
use crate::engine::Token;
use crate::error::{ApiError, ApiResult};
use crate::grammar::Form;
use crate::hub::Hub;
use crate::job::Done;
use crate::openapi::{Api, EVENTS, JSON, schemas};

pub(crate) fn routes() -> Router<Arc<Hub>> {
    Router::new()
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::one))
        .route("/v1/chat/completions", post(chat::chat))
        .route("/v1/embeddings", post(embeddings::embeddings))
        .route("/v1/responses", post(responses::responses))
        .route("/v1/completions", post(completions::completions))
}

/// What `routes` has.
pub(crate) fn describe(api: &mut Api) {
    api.get("/v1/models", "The models that there are", &[JSON]);
    api.get("/v1/models/{*id}", "A model", &[JSON]);
    api.post::<chat::Body>("/v1/chat/completions", "Goes on with a chat", &[JSON, EVENTS]);
    api.post::<completions::Body>("/v1/completions", "Goes on from a text", &[JSON, EVENTS]);
    api.post::<responses::Body>("/v1/responses", "Answers a chat with items", &[JSON, EVENTS]);
    api.post::<embeddings::Body>("/v1/embeddings", "Embeddings of texts", &[JSON]);
}

/// What both kinds of requests have.
#[derive(Deserialize, JsonSchema)]
struct Common {
    #[serde(default)]
    model: String,
    #[serde(default)]
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    /// -1: as many as there is room for, as with llama.cpp and LM Studio.
    #[schemars(range(min = -1))]
    max_tokens: Option<i64>,
    #[schemars(range(min = 0.0))]
    temperature: Option<f32>,
    #[schemars(range(min = 0.0, max = 1.0))]
    top_p: Option<f32>,
    top_k: Option<i64>,
    #[schemars(range(min = 0.0, max = 1.0))]
    min_p: Option<f32>,
    #[schemars(range(min = 0.0, max = 1.0))]
    typical_p: Option<f32>,
    seed: Option<i64>,
    #[serde(default, deserialize_with = "one_or_more")]
    #[schemars(schema_with = "schemas::texts")]
    stop: Option<Vec<String>>,
    #[schemars(range(min = -100.0, max = 100.0))]
    presence_penalty: Option<f32>,
    #[schemars(range(min = -100.0, max = 100.0))]
    frequency_penalty: Option<f32>,
    #[schemars(extend("exclusiveMinimum" = 0))]
    repeat_penalty: Option<f32>,
    repeat_last_n: Option<i64>,
    logit_bias: Option<serde_json::Map<String, Value>>,
    #[schemars(range(min = 1, max = 1))]
    n: Option<u32>,
    #[schemars(range(min = 1, max = 1))]
    best_of: Option<u32>,
    /// A grammar in Lark, as llguidance reads it.
    grammar: Option<String>,
}

#[derive(Deserialize, JsonSchema)]
struct StreamOptions {
    include_usage: Option<bool>,
}

impl Common {
    fn streams(&self) -> bool {
        self.stream.unwrap_or(false)
    }

    fn tells_usage(&self) -> bool {
        self.stream_options.as_ref().and_then(|options| options.include_usage).unwrap_or(false)
    }

    fn params(&mut self) -> ApiResult<Params> {
        if self.n.unwrap_or(1) != 1 || self.best_of.unwrap_or(1) != 1 {
            return Err(ApiError::of("n", "one answer is given to a request: n and best_of are 1"));
        }
        check_most("max_tokens", self.max_tokens.filter(|&tokens| tokens != UNLIMITED))?;
        Ok(Params {
            num_ctx: None,
            num_predict: self.max_tokens,
            seed: self.seed,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            typical_p: self.typical_p,
            repeat_last_n: self.repeat_last_n,
            temperature: self.temperature,
            repeat_penalty: self.repeat_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            stop: self.stop.take(),
        })
    }

    /// Token ids, and what is added to their logits.
    fn bias(&mut self) -> ApiResult<Vec<(Token, f32)>> {
        let wrong = || {
            ApiError::of("logit_bias", "logit_bias has token ids, with numbers from -100 to 100")
        };
        let one = |(id, value): (String, Value)| {
            let bias = value.as_f64().filter(|bias| bias.abs() <= 100.0).ok_or_else(wrong)?;
            // As it is used, -100 forbids.
            let bias = if bias == -100.0 { f32::NEG_INFINITY } else { bias as f32 };
            Ok((id.parse().map_err(|_| wrong())?, bias))
        };
        self.logit_bias.take().unwrap_or_default().into_iter().map(one).collect()
    }
}

/// What clients of llama.cpp's server and LM Studio's say for an answer without a limit.
const UNLIMITED: i64 = -1;

/// Refuses answers of no tokens. Below 0 would be without a limit in Ollama's options.
fn check_most(name: &'static str, tokens: Option<i64>) -> ApiResult<()> {
    match tokens {
        Some(..1) => Err(ApiError::of(name, format!("{name} is at least 1"))),
        _ => Ok(()),
    }
}

/// What `tool_choice` makes of the form of an answer. Who is to call nothing is told of no tools.
fn tool_choice(
    choice: Option<&Value>,
    form: Form,
    parallel: Option<bool>,
    tools: &mut Vec<Tool>,
) -> ApiResult<Form> {
    let wrong =
        || ApiError::of("tool_choice", "tool_choice is none, auto, required, or names a function");
    match choice {
        None | Some(Value::Null) => Ok(form),
        Some(Value::String(text)) => match text.as_str() {
            "auto" => Ok(form),
            "none" => {
                tools.clear();
                Ok(form)
            }
            "required" => Form::calls(None, parallel.unwrap_or(true), tools),
            _ => Err(wrong()),
        },
        Some(named) => {
            // In a chat it stands one level deeper than in /v1/responses.
            let name = named["function"]["name"].as_str().or_else(|| named["name"].as_str());
            Form::calls(Some(name.ok_or_else(wrong)?), false, tools)
        }
    }
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

fn fingerprint() -> &'static str {
    concat!("tierstream-", env!("CARGO_PKG_VERSION"))
}

fn usage(done: &Done) -> Value {
    let (prompt, drawn) = (done.prompt_tokens, done.drawn.len());
    json!({
        "prompt_tokens": prompt,
        "completion_tokens": drawn,
        "total_tokens": prompt + drawn,
        "prompt_tokens_details": {"cached_tokens": done.cached},
    })
}

/// As llama.cpp's server has them.
fn timings(done: &Done) -> Value {
    let (prompt, drawn) = (done.prompt_tokens - done.cached, done.drawn.len());
    let per_second = |n: usize, time: std::time::Duration| match time.as_secs_f64() {
        0.0 => 0.0,
        seconds => n as f64 / seconds,
    };
    json!({
        "cache_n": done.cached,
        "prompt_n": prompt,
        "prompt_ms": done.prompt_time.as_secs_f64() * 1e3,
        "prompt_per_second": per_second(prompt, done.prompt_time),
        "predicted_n": drawn,
        "predicted_ms": done.eval_time.as_secs_f64() * 1e3,
        "predicted_per_second": per_second(drawn, done.eval_time),
    })
}

/// What all parts of an answer have.
struct Head {
    id: String,
    created: u64,
    model: String,
}

/// An answer, or a part of it.
#[derive(Serialize)]
struct Object<'a, C> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    system_fingerprint: &'static str,
    choices: C,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    timings: Option<Value>,
}

impl Head {
    fn object<C>(&self, object: &'static str, choices: C) -> Object<'_, C> {
        Object {
            id: &self.id,
            object,
            created: self.created,
            model: &self.model,
            system_fingerprint: fingerprint(),
            choices,
            usage: None,
            timings: None,
        }
    }
}

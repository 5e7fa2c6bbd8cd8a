//! `/v1/completions`: text as it is, gone on with.

use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize, Serializer};
use serde_json::{Map, Value};
use tierstream_chat::{Delta, Reply};

use super::{Common, Head, now, timings, usage};
use crate::ask::{self, Ask, Input};
use crate::body::{Admission, Received, json, read};
use crate::engine::Token;
use crate::error::{ApiError, ApiResult, OpenAi};
use crate::events::{Chunks, events};
use crate::generation::{Generation, Output, Part, Whole};
use crate::grammar::Form;
use crate::hub::{Hub, Lease, blocking};
use crate::ids::id;
use crate::job::Done;
use crate::logprobs::Told;

#[derive(Deserialize, JsonSchema)]
#[schemars(rename = "Completion")]
pub(super) struct Body {
    #[serde(flatten)]
    common: Common,
    prompt: Prompt,
    suffix: Option<String>,
    echo: Option<bool>,
    logprobs: Option<usize>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(untagged)]
enum Prompt {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<Token>),
    Many(Vec<Vec<Token>>),
}

impl Default for Prompt {
    fn default() -> Self {
        Self::Text(String::new())
    }
}

/// Prompts of a request, which are answered one after the other.
const PROMPTS_MAX: usize = 128;

pub(super) async fn completions(
    State(hub): State<Arc<Hub>>,
    body: Received,
) -> Result<Response, OpenAi> {
    let (mut body, admission): (Body, _) = read(body)?;
    let echo = body.echo.unwrap_or(false);
    let (streams, tells_usage) = (body.common.streams(), body.common.tells_usage());
    let head = Head { id: id("cmpl-"), created: now(), model: body.common.model.clone() };
    // The prompt is kept until it is told.
    let kept = echo.then(|| admission.clone());
    let mut asks = Asks::new(&mut body, admission)?;
    let is_one = asks.inputs.len() == 1;
    if streams && !is_one {
        return Err(ApiError::of("prompt", "one prompt at a time can be streamed").into());
    }
    let lease = asks.lease(&hub).await?;
    if !is_one && !echo {
        asks = asks.tokenized(lease.clone()).await?;
    }
    if streams {
        let (echoed, ask) = asks.next(&lease)?.expect("there is one");
        let generation = Generation::begin_on(&hub, lease, ask).await?;
        return Ok(events(
            &hub,
            Streamed {
                generation,
                head,
                echoed: echoed.zip(kept),
                tells_usage,
                offset: 0,
                is_over: false,
            },
        ));
    }
    let mut choices = Vec::new();
    let mut sum: Option<Done> = None;
    while let Some((echoed, mut ask)) = asks.next(&lease)? {
        if !choices.is_empty() {
            // The time to its first token begins when the prompt before it is done.
            ask.admission.asked = Instant::now();
        }
        let mut generation = Generation::begin_on(&hub, lease.clone(), ask).await?;
        let Whole { reply, logprobs, done } = generation.whole().await?;
        let text = echoed.unwrap_or_default() + &reply.content;
        let told = Some(logprobs).filter(|told| !told.is_empty());
        choices.push(Choice {
            index: choices.len(),
            text,
            finish_reason: Some(done.reason.name()),
            logprobs: told.map(|told| Logprobs::new(told, 0)),
        });
        sum = Some(match sum {
            None => done,
            Some(sum) => sum.and(&done),
        });
    }
    let mut answer = head.object(KIND, choices);
    answer.usage = sum.as_ref().map(usage);
    answer.timings = sum.as_ref().map(timings);
    Ok(Json(answer).into_response())
}

/// The requests, with the texts that are to be echoed. Each is made when its turn comes: all have the same suffix
/// and form.
struct Asks {
    inputs: std::vec::IntoIter<Input>,
    suffix: Option<String>,
    echo: bool,
    /// What they have in common; none after the last.
    ask: Option<Ask>,
}

impl Asks {
    fn new(body: &mut Body, admission: Admission) -> ApiResult<Self> {
        if body.logprobs.is_some_and(|n| n > 20) {
            return Err(ApiError::of("logprobs", "logprobs is at most 20"));
        }
        if body.logprobs.is_some() && body.echo == Some(true) {
            let why = "there are no logprobs of the prompt: echo and logprobs rule each other out";
            return Err(ApiError::of("echo", why));
        }
        let inputs: Vec<_> = match std::mem::take(&mut body.prompt) {
            Prompt::Text(one) => vec![Input::Raw(one)],
            Prompt::Texts(all) => all.into_iter().map(Input::Raw).collect(),
            Prompt::Tokens(one) => vec![Input::Tokens(one)],
            Prompt::Many(all) => all.into_iter().map(Input::Tokens).collect(),
        };
        let is_empty = |input: &Input| matches!(input, Input::Tokens(tokens) if tokens.is_empty());
        if inputs.is_empty() || inputs.iter().any(is_empty) {
            return Err(ApiError::of("prompt", "the prompt is empty"));
        }
        if inputs.len() > PROMPTS_MAX {
            let most = format!("a request has at most {PROMPTS_MAX} prompts");
            return Err(ApiError::of("prompt", most));
        }
        let ask = Ask {
            form: body.common.grammar.take().map_or(Form::Free, Form::Lark),
            params: body.common.params()?,
            bias: body.common.bias()?,
            logprobs: body.logprobs,
            ..Ask::new(admission, body.common.model.clone(), Input::Raw(String::new()))
        };
        Ok(Self {
            inputs: inputs.into_iter(),
            suffix: body.suffix.take().filter(|suffix| !suffix.is_empty()),
            echo: body.echo.unwrap_or(false),
            ask: Some(ask),
        })
    }

    /// The model of them all: another load of it may have other tokens.
    async fn lease(&self, hub: &Arc<Hub>) -> ApiResult<Lease> {
        let ask = self.ask.as_ref().expect("none has been taken");
        let lease = hub.acquire(&ask.model, ask.params.ctx()?, ask.keep_alive);
        ask.admission.within(lease).await
    }

    /// With tokens in place of texts, which would take the request's memory until the last one's turn.
    async fn tokenized(mut self, lease: Lease) -> ApiResult<Self> {
        let Some(ask) = self.ask.clone() else { return Ok(self) };
        blocking(move || {
            let mut all = Vec::new();
            while let Some((_, mut ask)) = self.next(&lease)? {
                all.push(ask::prompt(&lease, &mut ask)?.tokens);
            }
            let form = if let Form::Lark(text) = &ask.form { text.len() } else { 0 };
            let bytes = all.iter().map(|tokens| size_of_val(&tokens[..])).sum::<usize>();
            ask.admission.shrink(bytes + form + size_of_val(&ask.bias[..]));
            let inputs = all.into_iter().map(Input::Tokens).collect::<Vec<_>>().into_iter();
            Ok(Self { inputs, suffix: None, ask: Some(ask), ..self })
        })
        .await?
    }

    /// The next request, and what is to be echoed of it; none after the last.
    fn next(&mut self, lease: &Lease) -> ApiResult<Option<(Option<String>, Ask)>> {
        let Some(input) = self.inputs.next() else { return Ok(None) };
        let echoed = match &input {
            Input::Raw(text) if self.echo => Some(text.clone()),
            // Of more there is no answer.
            Input::Tokens(tokens) if self.echo && tokens.len() < lease.limits.ctx => {
                let tokens = lease.checked(tokens.clone())?;
                let pieces = tokens.iter().flat_map(|&token| lease.text.piece(token, true));
                Some(lossy(&pieces.collect::<Vec<_>>()))
            }
            _ => None,
        };
        let input = match (input, &self.suffix) {
            (Input::Raw(prompt), Some(suffix)) => Input::Insert { prompt, suffix: suffix.clone() },
            (input, _) => input,
        };
        // With the last one goes what the request was let in with.
        let ask = if self.inputs.len() == 0 { self.ask.take() } else { self.ask.clone() };
        Ok(ask.map(|ask| (echoed, Ask { input, ..ask })))
    }
}

/// What answers and their parts are.
const KIND: &str = "text_completion";

/// An answer to one prompt, or a part of it.
#[derive(Serialize)]
struct Choice {
    index: usize,
    text: String,
    finish_reason: Option<&'static str>,
    logprobs: Option<Logprobs>,
}

/// Logprobs as they were before chats.
#[derive(Serialize)]
struct Logprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<f64>,
    #[serde(serialize_with = "likeliest")]
    top_logprobs: Told,
    text_offset: Vec<usize>,
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn likeliest<S: Serializer>(told: &Told, to: S) -> Result<S::Ok, S::Error> {
    to.collect_seq(told.likeliest().map(|all| {
        let one = |(bytes, logprob): (Vec<u8>, f64)| (lossy(&bytes), Value::from(logprob));
        all.map(one).collect::<Map<_, _>>()
    }))
}

impl Logprobs {
    /// `offset`: characters of the answer before the first.
    fn new(told: Told, mut offset: usize) -> Self {
        let (mut tokens, mut token_logprobs, mut text_offset) = (vec![], vec![], vec![]);
        for (bytes, logprob) in told.drawn() {
            let text = lossy(&bytes);
            text_offset.push(offset);
            offset += text.chars().count();
            tokens.push(text);
            token_logprobs.push(logprob);
        }
        Self { tokens, token_logprobs, top_logprobs: told, text_offset }
    }
}

struct Streamed {
    generation: Generation,
    head: Head,
    /// The prompt, to be told first, and its memory.
    echoed: Option<(String, Admission)>,
    tells_usage: bool,
    /// Characters so far.
    offset: usize,
    is_over: bool,
}

impl Chunks for Streamed {
    type Chunk = String;

    fn generation(&self) -> &Generation {
        &self.generation
    }

    async fn next(&mut self) -> Option<Vec<String>> {
        if self.is_over {
            return None;
        }
        if let Some((prompt, _kept)) = self.echoed.take() {
            return Some(vec![json(&self.head.object(KIND, [part(prompt, None)]))]);
        }
        match self.generation.next().await? {
            Ok(Output::Part(Part { deltas, logprobs })) => {
                Some(vec![self.chunk(deltas, self.generation.told(logprobs))])
            }
            Ok(Output::End(done)) => {
                self.is_over = true;
                let reason = Some(done.reason.name());
                let mut last = self.head.object(KIND, [part(String::new(), reason)]);
                last.timings = Some(timings(&done));
                if !self.tells_usage {
                    return Some(vec![json(&last)]);
                }
                let mut counts = self.head.object::<[Choice; 0]>(KIND, []);
                counts.usage = Some(usage(&done));
                Some(vec![json(&last), json(&counts)])
            }
            Err(error) => {
                self.is_over = true;
                Some(vec![json(&error.openai())])
            }
        }
    }
}

impl Streamed {
    fn chunk(&mut self, deltas: Vec<Delta>, told: Told) -> String {
        let mut reply = Reply::default();
        reply.extend(deltas);
        let characters = reply.content.chars().count();
        let logprobs = (!told.is_empty()).then(|| Logprobs::new(told, self.offset));
        self.offset += characters;
        json(&self.head.object(KIND, [Choice { logprobs, ..part(reply.content, None) }]))
    }
}

fn part(text: String, finish_reason: Option<&'static str>) -> Choice {
    Choice { index: 0, text, finish_reason, logprobs: None }
}

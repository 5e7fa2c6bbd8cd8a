//! `/v1/completions`: text as it is, gone on with.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tierstream_chat::{Delta, Reply};

use super::stream::{Chunks, events};
use super::{Common, fingerprint, id, now, timings, usage};
use crate::ask::{Ask, Input};
use crate::body::{Received, read};
use crate::engine::Token;
use crate::error::{ApiError, ApiResult, OpenAi};
use crate::grammar::Form;
use crate::hub::Hub;
use crate::job::{Done, TokenLogprobs};
use crate::talk::{Part, Said, Talk, Whole};

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

/// Prompts of a request, which are answered one after the other.
const PROMPTS_MAX: usize = 128;

pub(super) async fn completions(
    State(hub): State<Arc<Hub>>,
    body: Received,
) -> Result<Response, OpenAi> {
    let mut body: Body = read(body)?;
    let echo = body.echo.unwrap_or(false);
    let (streams, tells_usage) = (body.common.streams(), body.common.tells_usage());
    let head = Head { id: id("cmpl-"), created: now(), model: body.common.model.clone() };
    let asks = asks(&mut body)?;
    let mut asks = asks.into_iter().enumerate();
    if streams {
        let (_, (echoed, ask)) =
            asks.next().ok_or_else(|| ApiError::of("prompt", "there is no prompt"))?;
        if asks.next().is_some() {
            return Err(ApiError::of("prompt", "one prompt at a time can be streamed").into());
        }
        let talk = Talk::begin(&hub, ask).await?;
        let echoed = echo.then_some(echoed);
        return Ok(events(
            &hub,
            Streamed { talk, head, echoed, tells_usage, offset: 0, is_over: false },
        ));
    }
    let mut choices = Vec::new();
    let mut sum: Option<Done> = None;
    for (index, (echoed, ask)) in asks {
        let mut talk = Talk::begin(&hub, ask).await?;
        let Whole { reply, logprobs, done } = talk.whole().await?;
        let text = if echo { echoed + &reply.content } else { reply.content };
        choices.push(choice(index, &text, Some(done.reason.name()), &logprobs, 0));
        sum = Some(match sum {
            None => done,
            Some(sum) => sum.and(&done),
        });
    }
    let mut answer = head.object(choices.into());
    if let Some(sum) = sum {
        answer["usage"] = usage(&sum);
        answer["timings"] = timings(&sum);
    }
    Ok(Json(answer).into_response())
}

/// The requests, with the texts that they go on from, as far as these are texts.
fn asks(body: &mut Body) -> ApiResult<Vec<(String, Ask)>> {
    let form = body.common.grammar.take().map_or(Form::Free, Form::Lark);
    let wishes = body.common.wishes()?;
    let bias = body.common.bias()?;
    if body.logprobs.is_some_and(|n| n > 20) {
        return Err(ApiError::of("logprobs", "logprobs is at most 20"));
    }
    let suffix = body.suffix.take().filter(|suffix| !suffix.is_empty());
    let text = |text: String| {
        let input = match &suffix {
            Some(suffix) => Input::Insert { prompt: text.clone(), suffix: suffix.clone() },
            None => Input::Raw(text.clone()),
        };
        (text, input)
    };
    let tokens = |tokens| (String::new(), Input::Tokens(tokens));
    let inputs: Vec<_> = match std::mem::replace(&mut body.prompt, Prompt::Text(String::new())) {
        Prompt::Text(one) => vec![text(one)],
        Prompt::Texts(all) => all.into_iter().map(text).collect(),
        Prompt::Tokens(one) => vec![tokens(one)],
        Prompt::Many(all) => all.into_iter().map(tokens).collect(),
    };
    if inputs.len() > PROMPTS_MAX {
        return Err(ApiError::of("prompt", format!("a request has at most {PROMPTS_MAX} prompts")));
    }
    let ask = |(text, input)| {
        let ask = Ask {
            model: body.common.model.clone(),
            input,
            form: form.clone(),
            wishes: wishes.clone(),
            bias: bias.clone(),
            logprobs: body.logprobs,
            ..Ask::default()
        };
        (text, ask)
    };
    Ok(inputs.into_iter().map(ask).collect())
}

struct Head {
    id: String,
    created: u64,
    model: String,
}

impl Head {
    fn object(&self, choices: Value) -> Value {
        json!({
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": fingerprint(),
            "choices": choices,
        })
    }
}

fn choice(
    index: usize,
    text: &str,
    reason: Option<&str>,
    all: &[TokenLogprobs],
    offset: usize,
) -> Value {
    let logprobs = (!all.is_empty()).then(|| logprobs(all, offset));
    json!({"index": index, "text": text, "finish_reason": reason, "logprobs": logprobs})
}

/// As they were before chats. `offset`: characters of the answer before the first.
fn logprobs(all: &[TokenLogprobs], mut offset: usize) -> Value {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let mut offsets = Vec::new();
    for token in all {
        offsets.push(offset);
        offset += text(&token.bytes).chars().count();
    }
    let top = |token: &TokenLogprobs| -> Map<String, Value> {
        token.top.iter().map(|(bytes, logprob)| (text(bytes), (*logprob).into())).collect()
    };
    json!({
        "tokens": all.iter().map(|token| text(&token.bytes)).collect::<Vec<_>>(),
        "token_logprobs": all.iter().map(|token| token.logprob).collect::<Vec<_>>(),
        "top_logprobs": all.iter().map(top).collect::<Vec<_>>(),
        "text_offset": offsets,
    })
}

struct Streamed {
    talk: Talk,
    head: Head,
    /// The prompt, to be said first.
    echoed: Option<String>,
    tells_usage: bool,
    /// Characters so far.
    offset: usize,
    is_over: bool,
}

impl Chunks for Streamed {
    async fn next(&mut self) -> Option<Vec<Value>> {
        if self.is_over {
            return None;
        }
        if let Some(prompt) = self.echoed.take() {
            return Some(vec![self.head.object(json!([choice(0, &prompt, None, &[], 0)]))]);
        }
        match self.talk.next().await? {
            Ok(Said::Part(Part { deltas, logprobs })) => Some(vec![self.chunk(deltas, &logprobs)]),
            Ok(Said::End(done)) => {
                self.is_over = true;
                let reason = Some(done.reason.name());
                let mut last = self.head.object(json!([choice(0, "", reason, &[], 0)]));
                last["timings"] = timings(&done);
                if !self.tells_usage {
                    return Some(vec![last]);
                }
                let mut counts = self.head.object(json!([]));
                counts["usage"] = usage(&done);
                Some(vec![last, counts])
            }
            Err(error) => {
                self.is_over = true;
                Some(vec![error.openai()])
            }
        }
    }
}

impl Streamed {
    fn chunk(&mut self, deltas: Vec<Delta>, logprobs: &[TokenLogprobs]) -> Value {
        let mut reply = Reply::default();
        reply.extend(deltas);
        let chunk =
            self.head.object(json!([choice(0, &reply.content, None, logprobs, self.offset)]));
        self.offset += reply.content.chars().count();
        chunk
    }
}

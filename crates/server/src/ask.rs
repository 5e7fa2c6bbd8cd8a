//! What a client asks for, whichever dialect it speaks, and the tokens and samplers that this means.

use std::collections::HashMap;

use axum::http::StatusCode;
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use tierstream_chat::{DateTime, Message, Request, Template, Think, Tool};

use crate::body::Admission;
use crate::catalog::{self, Found};
use crate::engine::{Sampling, Token};
use crate::error::{ApiError, ApiResult};
use crate::grammar::Form;
use crate::hub::{KeepAlive, Lease};
use crate::openapi::schemas;

/// A request for text.
#[derive(Debug, Clone)]
pub(crate) struct Ask {
    pub(crate) admission: Admission,
    pub(crate) model: String,
    pub(crate) keep_alive: Option<KeepAlive>,
    pub(crate) input: Input,
    /// What the model may call.
    pub(crate) tools: Vec<Tool>,
    pub(crate) think: Option<Think>,
    /// A model that knows no thinking is an error then.
    pub(crate) thinking_is_a_must: bool,
    pub(crate) form: Form,
    pub(crate) params: Params,
    /// What is added to the logits of tokens.
    pub(crate) bias: Vec<(Token, f32)>,
    /// How many of the likeliest tokens are told with each.
    pub(crate) logprobs: Option<usize>,
    /// A chat that is too long loses its oldest messages. Else it is refused.
    pub(crate) truncate: bool,
}

impl Ask {
    /// One that leaves all else open.
    pub(crate) fn new(admission: Admission, model: String, input: Input) -> Self {
        Self {
            admission,
            model,
            keep_alive: None,
            input,
            tools: Vec::new(),
            think: None,
            thinking_is_a_must: false,
            form: Form::Free,
            params: Params::default(),
            bias: Vec::new(),
            logprobs: None,
            truncate: false,
        }
    }
}

/// What the model goes on from.
#[derive(Debug, Clone)]
pub(crate) enum Input {
    Chat(Vec<Message>),
    /// A prompt for the model's template; with a template of the client's, for that.
    Prompt {
        system: Option<String>,
        prompt: String,
        template: Option<String>,
        before: Vec<Token>,
    },
    /// Text between two others.
    Insert {
        prompt: String,
        suffix: String,
    },
    /// Text as it is.
    Raw(String),
    Tokens(Vec<Token>),
}

/// How a client wants its tokens, as in the `options` of Ollama's requests and in its models' layer of
/// parameters. What it leaves open is the model's, then ours.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(default)]
#[schemars(rename = "Options")]
pub struct Params {
    /// Tokens of context; 0: as many as usual.
    #[serde(deserialize_with = "whole")]
    pub num_ctx: Option<i64>,
    /// Tokens; below 0: as many as there is room for.
    #[serde(deserialize_with = "whole")]
    pub num_predict: Option<i64>,
    /// Of sampling; -1: any.
    #[serde(deserialize_with = "whole")]
    pub seed: Option<i64>,
    /// Draw from this many most likely tokens; 0: from all.
    #[serde(deserialize_with = "whole")]
    pub top_k: Option<i64>,
    /// Draw from the most likely tokens that together have this probability.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub top_p: Option<f32>,
    /// Leave out tokens less likely than this share of the most likely one.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub min_p: Option<f32>,
    /// Leave out tokens that are less usual than this; 1: none.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub typical_p: Option<f32>,
    /// Tokens that penalties look back on; below 0: the context.
    #[serde(deserialize_with = "whole")]
    pub repeat_last_n: Option<i64>,
    /// Of sampling; 0: the most likely token.
    #[schemars(range(min = 0.0))]
    pub temperature: Option<f32>,
    /// Divides the logits of tokens that were there lately.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub repeat_penalty: Option<f32>,
    /// Taken from the logits of tokens that were there lately.
    #[schemars(range(min = -100.0, max = 100.0))]
    pub presence_penalty: Option<f32>,
    /// Taken from them for each time.
    #[schemars(range(min = -100.0, max = 100.0))]
    pub frequency_penalty: Option<f32>,
    /// Texts that an answer ends before.
    #[serde(deserialize_with = "one_or_more")]
    #[schemars(schema_with = "schemas::texts")]
    pub stop: Option<Vec<String>>,
}

/// A whole number, also one that is written as `4096.0`.
fn whole<'de, D: Deserializer<'de>>(from: D) -> Result<Option<i64>, D::Error> {
    let number = Option::<serde_json::Number>::deserialize(from)?;
    let wrong = || serde::de::Error::custom("a whole number is wanted");
    let read = |number: serde_json::Number| match (number.as_i64(), number.as_f64()) {
        (Some(n), _) => Ok(n),
        (None, Some(x)) if x.fract() == 0.0 && x.abs() < 9e15 => Ok(x as i64),
        _ => Err(wrong()),
    };
    number.map(read).transpose()
}

/// A text, or a list of texts.
pub(crate) fn one_or_more<'de, D: Deserializer<'de>>(
    from: D,
) -> Result<Option<Vec<String>>, D::Error> {
    let value = Option::<Value>::deserialize(from)?;
    let wrong = || serde::de::Error::custom("a text or a list of texts is wanted");
    let text = |value| match value {
        Value::String(text) => Ok(text),
        _ => Err(wrong()),
    };
    match value {
        None => Ok(None),
        Some(Value::Array(all)) => all.into_iter().map(text).collect::<Result<_, _>>().map(Some),
        Some(one) => Ok(Some(vec![text(one)?])),
    }
}

/// Stop texts of a request, and bytes of each: each is looked for in every piece of text.
const STOPS_MAX: usize = 64;
const STOP_BYTES_MAX: usize = 1024;

impl Params {
    /// These, and for what they leave open, `others`.
    pub fn or(self, others: Self) -> Self {
        Self {
            num_ctx: self.num_ctx.or(others.num_ctx),
            num_predict: self.num_predict.or(others.num_predict),
            seed: self.seed.or(others.seed),
            top_k: self.top_k.or(others.top_k),
            top_p: self.top_p.or(others.top_p),
            min_p: self.min_p.or(others.min_p),
            typical_p: self.typical_p.or(others.typical_p),
            repeat_last_n: self.repeat_last_n.or(others.repeat_last_n),
            temperature: self.temperature.or(others.temperature),
            repeat_penalty: self.repeat_penalty.or(others.repeat_penalty),
            presence_penalty: self.presence_penalty.or(others.presence_penalty),
            frequency_penalty: self.frequency_penalty.or(others.frequency_penalty),
            stop: self.stop.or(others.stop),
        }
    }

    /// Tokens of context.
    ///
    /// # Errors
    /// It is no number of tokens.
    pub fn ctx(&self) -> ApiResult<Option<u32>> {
        let wrong = |_| ApiError::of("num_ctx", "num_ctx is to be a number of tokens");
        self.num_ctx.filter(|&n| n != 0).map(u32::try_from).transpose().map_err(wrong)
    }

    /// The sampler's settings. What nobody wants otherwise is as in llama.cpp's tools, with a seed of its own
    /// for each request. `ctx`: tokens of context.
    ///
    /// # Errors
    /// A number is out of its range.
    pub fn sampling(&self, ctx: usize) -> ApiResult<Sampling> {
        let number = |name, wanted: Option<f32>, usual: f32, least: f32, most: f32| match wanted {
            None => Ok(usual),
            Some(x) if (least..=most).contains(&x) => Ok(x),
            Some(x) => {
                Err(ApiError::of(name, format!("{name} is {x}; it goes from {least} to {most}")))
            }
        };
        let positive = |name, wanted| number(name, wanted, 1.0, f32::MIN_POSITIVE, 1e6);
        let look_back = match self.repeat_last_n {
            Some(n) if n < 0 => ctx,
            Some(n) => usize::try_from(n).unwrap_or(ctx).min(ctx),
            None => 64,
        };
        Ok(Sampling {
            temperature: number("temperature", self.temperature, 0.8, 0.0, 1e6)?,
            top_k: self.top_k.map_or(40, |k| i32::try_from(k.max(0)).unwrap_or(i32::MAX)),
            top_p: number("top_p", self.top_p, 0.95, 0.0, 1.0)?,
            min_p: number("min_p", self.min_p, 0.05, 0.0, 1.0)?,
            typical_p: number("typical_p", self.typical_p, 1.0, 0.0, 1.0)?,
            penalty_tokens: u32::try_from(look_back).unwrap_or(u32::MAX),
            repeat_penalty: positive("repeat_penalty", self.repeat_penalty)?,
            frequency_penalty: number(
                "frequency_penalty",
                self.frequency_penalty,
                0.0,
                -100.0,
                100.0,
            )?,
            presence_penalty: number(
                "presence_penalty",
                self.presence_penalty,
                0.0,
                -100.0,
                100.0,
            )?,
            seed: match self.seed {
                // As in Ollama and llama.cpp, -1 is any.
                None | Some(-1) => random() as u32,
                Some(seed) => seed as u32,
            },
        })
    }

    /// Where an answer ends.
    ///
    /// # Errors
    /// They are too many, or too long.
    pub fn stops(&self) -> ApiResult<Vec<String>> {
        let stops = self.stop.clone().unwrap_or_default();
        if stops.len() > STOPS_MAX || stops.iter().any(|stop| stop.len() > STOP_BYTES_MAX) {
            let most =
                format!("at most {STOPS_MAX} stop texts of {STOP_BYTES_MAX} bytes are taken");
            return Err(ApiError::of("stop", most));
        }
        Ok(stops)
    }

    /// Most tokens of an answer.
    pub fn most_tokens(&self) -> usize {
        self.num_predict.map_or(usize::MAX, |n| usize::try_from(n).unwrap_or(usize::MAX))
    }
}

/// 64 bits that differ each time.
pub(crate) fn random() -> u64 {
    use std::hash::{BuildHasher, Hasher, RandomState};
    // The standard library's hasher takes its keys from the system, and counts them on.
    let mut hasher = RandomState::new().build_hasher();
    hasher.write_u64(0);
    hasher.finish()
}

/// What a model is given of a request.
#[derive(Debug)]
pub(crate) struct Prompt {
    pub(crate) tokens: Vec<Token>,
    /// The answer may have thinking and calls in it; the prompt ended in the former.
    pub(crate) parsed: Option<bool>,
}

/// Gives results of tools, which name their call, the name of the tool: templates ask for it, and most clients do not
/// say it.
fn name_results(messages: &mut [Message]) {
    let mut names: HashMap<String, String> = HashMap::new();
    for message in messages {
        for call in &message.tool_calls {
            names.extend(call.id.clone().map(|id| (id, call.name.clone())));
        }
        if message.tool_name.is_none()
            && let Some(id) = &message.tool_call_id
        {
            message.tool_name = names.get(id).cloned();
        }
    }
}

/// Reads what the model's own layers wish.
pub(crate) fn own_params(found: &Found) -> ApiResult<Params> {
    let Some(path) = &found.layers.params else { return Ok(Params::default()) };
    let wrong = |error| {
        let why = format!("the parameters of {:?} are not as they should be: {error}", found.name);
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, why)
    };
    serde_json::from_str(&catalog::small_file(path)?).map_err(wrong)
}

/// Makes the tokens of a request. Takes a while for long ones.
pub(crate) fn prompt(lease: &Lease, ask: &mut Ask) -> ApiResult<Prompt> {
    let now = now();
    let text = |text: &str, parsed| Ok(Prompt { tokens: tokenize(lease, text)?, parsed });
    check_abilities(lease, ask)?;
    match &mut ask.input {
        Input::Tokens(tokens) => {
            Ok(Prompt { tokens: lease.checked(std::mem::take(tokens))?, parsed: None })
        }
        Input::Raw(raw) => text(raw, None),
        Input::Insert { prompt, suffix } => insert(lease, prompt, suffix, ask.think, now),
        Input::Prompt { system, prompt, template, before } => {
            let own = template.as_deref().map(Template::go).transpose()?;
            let system = system.take().or_else(|| lease.preset.system.clone());
            let system = system.filter(|s| !s.is_empty()).map(|s| Message::new("system", s));
            let messages: Vec<_> =
                system.into_iter().chain([Message::new("user", std::mem::take(prompt))]).collect();
            let request =
                Request { tools: &ask.tools, think: ask.think, ..Request::new(&messages, now) };
            let rendered = own.as_ref().unwrap_or(&lease.preset.template).render(&request)?;
            let mut tokens = lease.checked(std::mem::take(before))?;
            let begins = tokens.is_empty();
            tokens.append(&mut match begins {
                true => tokenize(lease, &rendered)?,
                false => lease.text.tokenize(&rendered, false, true)?,
            });
            Ok(Prompt { tokens, parsed: Some(lease.preset.format.opens_thinking(&rendered)) })
        }
        Input::Chat(messages) => {
            name_results(messages);
            if !messages.iter().any(|message| message.role == "system")
                && let Some(system) = &lease.preset.system
            {
                messages.insert(0, Message::new("system", system));
            }
            chat(lease, ask, now)
        }
    }
}

fn chat(lease: &Lease, ask: &mut Ask, now: DateTime) -> ApiResult<Prompt> {
    let Input::Chat(messages) = &ask.input else { unreachable!("the caller has looked") };
    let whole = render_chat(lease, ask, messages, now)?;
    if !ask.truncate || whole.tokens.len() < lease.limits.ctx {
        return Ok(whole);
    }
    // The oldest go until the others fit: system messages stay, the last one does, and with an answer go the tools'
    // messages that it called for.
    let others: Vec<usize> =
        (0..messages.len()).filter(|&at| messages[at].role != "system").collect();
    let begins = |&n: &usize| messages[others[n]].role != "tool" || n + 1 == others.len();
    let cuts: Vec<usize> = (1..others.len()).filter(begins).map(|n| others[n]).collect();
    let (mut low, mut high, mut best, mut is_found) = (0, cuts.len(), whole, false);
    while low < high {
        let middle = usize::midpoint(low, high);
        let stays =
            |&(at, message): &(usize, &Message)| at >= cuts[middle] || message.role == "system";
        let kept: Vec<Message> =
            messages.iter().enumerate().filter(stays).map(|(_, message)| message.clone()).collect();
        let prompt = render_chat(lease, ask, &kept, now)?;
        let fits = prompt.tokens.len() < lease.limits.ctx;
        if fits || !is_found {
            best = prompt;
        }
        is_found |= fits;
        match fits {
            true => high = middle,
            false => low = middle + 1,
        }
    }
    Ok(best)
}

fn render_chat(lease: &Lease, ask: &Ask, messages: &[Message], now: DateTime) -> ApiResult<Prompt> {
    // Who ends with words of the assistant wants them to be gone on with.
    let (before, begun) = match messages.split_last() {
        Some((last, before)) if last.role == "assistant" && last.tool_calls.is_empty() => {
            (before, last.content.as_str())
        }
        _ => (messages, ""),
    };
    let request = Request { tools: &ask.tools, think: ask.think, ..Request::new(before, now) };
    let mut rendered = lease.preset.template.render(&request)?;
    check_roles(before, &rendered)?;
    let opens = lease.preset.format.opens_thinking(&rendered);
    rendered.push_str(begun);
    let tokens = tokenize(lease, &rendered)?;
    Ok(Prompt { tokens, parsed: Some(opens && begun.is_empty()) })
}

/// Roles that every template has heard of, whether or not it has a place for them.
const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

/// Refuses messages of roles that a template passes over. Some know more than the usual ones.
fn check_roles(messages: &[Message], rendered: &str) -> ApiResult<()> {
    let is_lost = |message: &&Message| {
        !ROLES.contains(&message.role.as_str()) && !rendered.contains(message.content.trim())
    };
    match messages.iter().find(is_lost) {
        None => Ok(()),
        Some(Message { role, .. }) => {
            let why = format!("the model's chat template knows no messages of the role {role:?}");
            Err(ApiError::of("messages", why))
        }
    }
}

fn insert(
    lease: &Lease,
    prompt: &str,
    suffix: &str,
    think: Option<Think>,
    now: DateTime,
) -> ApiResult<Prompt> {
    if lease.preset.template.capabilities().insert {
        let rendered = lease.preset.template.insert(prompt, suffix, think, now)?;
        return Ok(Prompt { tokens: tokenize(lease, &rendered)?, parsed: None });
    }
    let Some([before, behind, middle]) = catalog::fim_tokens(&lease.header) else {
        let name = &lease.preset.found.name;
        return Err(ApiError::bad(format!("{name:?} does not support insert")));
    };
    let plain = |text: &str| lease.text.tokenize(text, false, false);
    let mut tokens = tokenize(lease, "")?;
    tokens.push(before);
    tokens.append(&mut plain(prompt)?);
    tokens.push(behind);
    tokens.append(&mut plain(suffix)?);
    tokens.push(middle);
    Ok(Prompt { tokens, parsed: None })
}

fn check_abilities(lease: &Lease, ask: &mut Ask) -> ApiResult<()> {
    let name = &lease.preset.found.name;
    let can = lease.preset.template.capabilities();
    if !ask.tools.is_empty() && !can.tools {
        return Err(ApiError::of("tools", format!("{name:?} does not support tools")));
    }
    if !can.thinking && !ask.thinking_is_a_must {
        ask.think = None;
    }
    if ask.think.is_some_and(Think::is_on) && !can.thinking {
        return Err(ApiError::bad(format!("{name:?} does not support thinking")));
    }
    Ok(())
}

/// The tokens of a prompt, with the first one that the model wants, once.
fn tokenize(lease: &Lease, text: &str) -> ApiResult<Vec<Token>> {
    let bos = lease.text.bos_eos().0;
    let has_one = !bos.is_empty() && text.starts_with(&bos);
    Ok(lease.text.tokenize(text, !has_one, true)?)
}

fn now() -> DateTime {
    let since =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    DateTime::from_unix(i64::try_from(since.as_secs()).unwrap_or(0))
}

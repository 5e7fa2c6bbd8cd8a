//! A model's chat template of either kind.

use crate::error::{Error, Result};
use crate::format::Format;
use crate::go::GoTemplate;
use crate::jinja::JinjaTemplate;
use crate::limits;
use crate::message::{Message, Think, Tool};
use crate::time::DateTime;

/// What is to be made a prompt of.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The chat so far.
    pub messages: &'a [Message],
    /// The tools that the model may call; none if empty.
    pub tools: &'a [Tool],
    /// Whether it is to think; `None` leaves that to the template.
    pub think: Option<Think>,
    /// Whether the prompt ends with the beginning of the assistant's next message. Go templates settle
    /// that by themselves.
    pub add_generation_prompt: bool,
    /// What templates are told that the time is.
    pub now: DateTime,
}

impl<'a> Request<'a> {
    /// A request for the next message, without tools.
    pub fn new(messages: &'a [Message], now: DateTime) -> Self {
        Self { messages, tools: &[], think: None, add_generation_prompt: true, now }
    }
}

/// What a template has a place for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// It tells the model about tools.
    pub tools: bool,
    /// It knows thinking.
    pub thinking: bool,
    /// It has a place for a suffix: [`Template::insert`].
    pub insert: bool,
}

/// A chat template.
#[derive(Debug)]
pub struct Template {
    kind: Kind,
    source: String,
    capabilities: Capabilities,
}

#[derive(Debug)]
enum Kind {
    Jinja(Box<JinjaTemplate>),
    Go(Box<GoTemplate>),
}

impl Template {
    /// A template in Jinja, as a GGUF's `tokenizer.chat_template`. `bos` and `eos` are the texts of the
    /// tokens that the template calls so; empty where the model has none.
    ///
    /// A prompt may begin with `bos`: whoever makes tokens of it adds no second one.
    ///
    /// # Errors
    ///
    /// If it is too long or not well-formed.
    pub fn jinja(source: &str, bos: &str, eos: &str) -> Result<Self> {
        check_length(source)?;
        let template = JinjaTemplate::new(source, bos, eos)?;
        let capabilities = Capabilities {
            tools: template.habits().tools,
            thinking: template.knows_thinking() || Format::detect(source).has_thinking(),
            insert: false,
        };
        Ok(Self { kind: Kind::Jinja(Box::new(template)), source: source.into(), capabilities })
    }

    /// A template in Go's `text/template`, as the layer `template` of a model in Ollama's store.
    ///
    /// # Errors
    ///
    /// If it is too long, not well-formed, or uses what Ollama's templates do not (`define`, `template`).
    pub fn go(source: &str) -> Result<Self> {
        check_length(source)?;
        let template = GoTemplate::new(source)?;
        let capabilities = Capabilities {
            tools: template.uses("tools"),
            thinking: template.uses("thinking") || template.uses("think"),
            insert: template.uses("suffix"),
        };
        Ok(Self { kind: Kind::Go(Box::new(template)), source: source.into(), capabilities })
    }

    /// The template of a model with these, if it has one: `jinja`, which it was trained with, and where there is none
    /// that can be read, `go`, Ollama's rewriting of it.
    ///
    /// # Errors
    ///
    /// As [`Template::jinja`], if there is no `go`, and [`Template::go`].
    pub fn of_model(
        jinja: Option<&str>,
        go: Option<&str>,
        (bos, eos): (&str, &str),
    ) -> Result<Option<Self>> {
        let own = jinja.map(|source| Self::jinja(source, bos, eos));
        match (own, go) {
            (Some(Ok(template)), _) => Ok(Some(template)),
            (_, Some(source)) => Self::go(source).map(Some),
            (own, None) => own.transpose(),
        }
    }

    /// The prompt for a chat. Messages are in it as they are: names of control tokens that somebody wrote
    /// there are told from the template's own by nobody.
    ///
    /// # Errors
    ///
    /// If the template refuses the messages, fails on them, or takes too much.
    pub fn render(&self, request: &Request<'_>) -> Result<String> {
        match &self.kind {
            Kind::Jinja(template) => template.render(request),
            Kind::Go(template) => template.render(request),
        }
    }

    /// The prompt for text that goes between `prompt` and `suffix`.
    ///
    /// # Errors
    ///
    /// [`Error::NoInsert`] if the template has no place for a suffix; else as [`Template::render`].
    pub fn insert(
        &self,
        prompt: &str,
        suffix: &str,
        think: Option<Think>,
        now: DateTime,
    ) -> Result<String> {
        match &self.kind {
            Kind::Go(template) if self.capabilities.insert => {
                template.insert(prompt, suffix, think, now)
            }
            _ => Err(Error::NoInsert),
        }
    }

    /// What it has a place for.
    pub fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    /// How the model writes thinking and calls, as far as the template tells.
    pub fn format(&self) -> Format {
        Format::detect(&self.source)
    }

    /// The text of the template.
    pub fn source(&self) -> &str {
        &self.source
    }
}

/// The bytes that a request brings, for what rendering it may take.
pub(crate) fn request_bytes(request: &Request<'_>) -> usize {
    let messages = request.messages.iter().map(|m| {
        let calls = m.tool_calls.iter().map(|c| c.name.len() + json_bytes(&c.arguments));
        m.content.len() + m.thinking.as_ref().map_or(0, String::len) + calls.sum::<usize>()
    });
    let tools = request.tools.iter().map(|t| {
        t.function.name.len()
            + t.function.description.as_ref().map_or(0, String::len)
            + json_bytes(&t.function.parameters)
    });
    messages.sum::<usize>() + tools.sum::<usize>()
}

fn json_bytes(value: &serde_json::Value) -> usize {
    value.to_string().len()
}

fn check_length(source: &str) -> Result<()> {
    if source.len() > limits::TEMPLATE_BYTES {
        return Err(Error::TooLong { bytes: source.len() });
    }
    Ok(())
}

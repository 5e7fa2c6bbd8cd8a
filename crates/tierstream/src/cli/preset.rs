//! How a model is talked to: through its template, with the system prompt and the parameters that its name brings
//! along, as `tierstream serve` does.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use tierstream::{Engine, Sampling, Token};
use tierstream_chat::{DateTime, Format, Message, Parser, Request, Template, Think};
use tierstream_server::{Params, engine};
use tierstream_store::Layers;

use super::output::Failure;

/// Bytes of a text that belongs to a model.
const TEXT_BYTES_MAX: u64 = 1 << 20;

/// What a model's name brings along beside the weights, as Ollama's do.
#[derive(Debug, Default)]
pub(crate) struct Own {
    template: Option<String>,
    system: Option<String>,
    pub(crate) params: Params,
}

impl Own {
    /// `raw`: without what only a template needs.
    pub(crate) fn read(layers: &Layers, raw: bool) -> anyhow::Result<Self> {
        let text = |path: &Option<_>| path.as_deref().map(text).transpose();
        let params = match (text(&layers.params)?, &layers.params) {
            (Some(json), Some(path)) => serde_json::from_str(&json)
                .map_err(|error| unusable(path, format!("it has no such parameters: {error}")))?,
            _ => Params::default(),
        };
        let (template, system) = match raw {
            true => (None, None),
            false => (text(&layers.template)?, text(&layers.system)?),
        };
        Ok(Self { template, system: system.filter(|text| !text.is_empty()), params })
    }
}

fn text(path: &Path) -> anyhow::Result<String> {
    let mut text = String::new();
    let read =
        File::open(path).and_then(|file| file.take(TEXT_BYTES_MAX + 1).read_to_string(&mut text));
    read.map_err(|error| unusable(path, error.to_string()))?;
    if text.len() as u64 > TEXT_BYTES_MAX {
        return Err(unusable(path, format!("it is longer than {} MiB", TEXT_BYTES_MAX >> 20)));
    }
    Ok(text)
}

fn unusable(path: &Path, why: String) -> anyhow::Error {
    let hint = "it belongs to the model's name: fetch that again, or give the model by its file";
    Failure::error(format!("{}: {why}", path.display()), hint)
}

/// A model, as it is talked to.
#[derive(Debug)]
pub(crate) struct Preset {
    /// None: it goes on from plain text.
    template: Option<Template>,
    format: Option<Format>,
    /// Control tokens whose names are looked for in replies.
    marks: Vec<Token>,
    /// Comes before the messages.
    pub(crate) system: Option<String>,
    think: Option<Think>,
}

/// What a user says of how a model is talked to.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Talk<'a> {
    /// Without its template.
    pub(crate) raw: bool,
    pub(crate) system: Option<&'a str>,
    pub(crate) think: Option<Think>,
}

/// The text of a conversation, that a model goes on from.
#[derive(Debug)]
pub(crate) struct Rendered {
    pub(crate) text: String,
    /// It ends where the model is to go on thinking.
    pub(crate) opens_thinking: bool,
}

impl Preset {
    /// Of a loaded model.
    pub(crate) fn new(own: Own, engine: &Engine, talk: Talk) -> anyhow::Result<Self> {
        let vocab = engine.model().vocab();
        let template = match talk.raw || !vocab.has_text() {
            true => None,
            false => {
                let metadata = engine.file().metadata();
                let jinja = metadata.str("tokenizer.chat_template").ok().flatten();
                let name = |token: Option<Token>| {
                    let bytes = token.map(|token| vocab.name(token)).unwrap_or_default();
                    String::from_utf8_lossy(&bytes).into_owned()
                };
                let bos_eos = (&*name(vocab.bos()), &*name(vocab.eos()));
                Template::of_model(jinja, own.template.as_deref(), bos_eos).map_err(bad_template)?
            }
        };
        if template.is_none() && talk.system.is_some() {
            return Err(no_template_for_system());
        }
        let format = template.as_ref().map(Template::format);
        let single = |mark: &&str| match vocab.tokenize(mark, false, true).ok()?[..] {
            [token] => Some(token),
            _ => None,
        };
        let marks = format.iter().flat_map(Format::marks).collect::<Vec<_>>();
        let mut preset = Self {
            template,
            format,
            marks: marks.iter().filter_map(single).collect(),
            system: talk.system.map(str::to_owned).or(own.system),
            think: None,
        };
        // What can think does, as with `ollama run`.
        preset.think = preset.can_think().then_some(Think::On);
        if let Some(think) = talk.think {
            preset.set_think(think).map_err(|why| Failure::error(why, "leave --think out"))?;
        }
        Ok(preset)
    }

    pub(crate) fn has_template(&self) -> bool {
        self.template.is_some()
    }

    /// Control tokens whose names a [`Preset::parser`] wants to see.
    pub(crate) fn marks(&self) -> &[Token] {
        &self.marks
    }

    /// What tells thinking from the answer; none where nothing is to be told.
    pub(crate) fn parser(&self, opens_thinking: bool) -> Option<Parser> {
        Some(Parser::new(self.format.as_ref()?, &[], opens_thinking))
    }

    /// Whether the model is to think from now on.
    pub(crate) fn set_think(&mut self, think: Think) -> Result<(), &'static str> {
        match (self.can_think(), think.is_on()) {
            (true, _) => self.think = Some(think),
            (false, false) => {}
            (false, true) => return Err("this model's chat template knows no thinking"),
        }
        Ok(())
    }

    fn can_think(&self) -> bool {
        self.template.as_ref().is_some_and(|template| template.capabilities().thinking)
    }

    /// The text of a conversation, up to where the answer begins. None without a template.
    pub(crate) fn render(&self, messages: &[Message]) -> anyhow::Result<Option<Rendered>> {
        let (Some(template), Some(format)) = (&self.template, &self.format) else {
            return Ok(None);
        };
        let system = self.system.iter().map(|text| Message::new("system", text.as_str()));
        let messages: Vec<Message> = system.chain(messages.iter().cloned()).collect();
        let request = Request { think: self.think, ..Request::new(&messages, now()) };
        let text = template.render(&request).map_err(bad_template)?;
        let opens_thinking = format.opens_thinking(&text);
        Ok(Some(Rendered { text, opens_thinking }))
    }
}

/// The tokens of a text that a template made, with the first one that the model wants, once.
pub(crate) fn tokens(engine: &Engine, rendered: &str) -> tierstream::Result<Vec<Token>> {
    let vocab = engine.model().vocab();
    let bos = vocab.bos().map(|token| vocab.name(token)).unwrap_or_default();
    let has_one = !bos.is_empty() && rendered.as_bytes().starts_with(&bos);
    Ok(vocab.tokenize(rendered, !has_one, true)?)
}

/// How tokens are drawn, as the library takes it.
pub(crate) fn sampling(how: &engine::Sampling) -> Sampling {
    let engine::Sampling { temperature, top_k, top_p, min_p, typical_p, .. } = *how;
    Sampling {
        temperature,
        top_k,
        top_p,
        min_p,
        typical_p,
        penalty_tokens: how.penalty_tokens,
        repeat_penalty: how.repeat_penalty,
        frequency_penalty: how.frequency_penalty,
        presence_penalty: how.presence_penalty,
        seed: how.seed,
    }
}

fn now() -> DateTime {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    DateTime::from_unix(i64::try_from(since.as_secs()).unwrap_or(0))
}

fn no_template_for_system() -> anyhow::Error {
    Failure::error(
        "this model has no chat template, through which it would get a system prompt",
        "write it at the beginning of the prompt",
    )
}

fn bad_template(error: tierstream_chat::Error) -> anyhow::Error {
    Failure::error(error, "--raw gives it the prompt as it is, without the template")
}

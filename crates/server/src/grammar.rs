//! Answers that are held to a form: the tokens that a grammar allows next.

use llguidance::api::TopLevelGrammar;
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};
use tierstream_chat::{Format, GrammarOptions, Tool, Which};
use toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};

use crate::engine::{EngineError, Text, Token};
use crate::error::{ApiError, ApiResult};

/// The form of an answer.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) enum Form {
    #[default]
    Free,
    /// JSON of a schema.
    Json(Value),
    /// A grammar of the client's: Lark, as llguidance reads it.
    Lark(String),
    /// Calls of tools, or of the one of that name; several, or one.
    Calls { name: Option<String>, parallel: bool },
}

/// Bytes of a schema or a grammar.
const SOURCE_BYTES_MAX: usize = 1 << 20;

/// Space between the tokens of JSON: without a bound some models write nothing else.
const SPACE: &str = r"(\n[ \t]{0,32}| )?";

impl Form {
    /// `format` of Ollama's requests: `json`, or a schema.
    pub(crate) fn of_ollama(format: Option<Value>) -> ApiResult<Self> {
        match format {
            None | Some(Value::Null) => Ok(Self::Free),
            Some(Value::String(text)) if text.is_empty() => Ok(Self::Free),
            Some(Value::String(text)) if text == "json" => Ok(Self::any_object()),
            Some(schema @ Value::Object(_)) => Ok(Self::Json(schema)),
            Some(other) => Err(ApiError::of(
                "format",
                format!("format is {other}; it is json or a JSON schema"),
            )),
        }
    }

    /// Calls that a client demands.
    pub(crate) fn calls(name: Option<&str>, parallel: bool, tools: &[Tool]) -> ApiResult<Self> {
        if tools.is_empty() {
            return Err(ApiError::of("tool_choice", "tool_choice needs tools"));
        }
        let name = name.map(str::to_owned);
        Ok(Self::Calls { parallel: parallel && name.is_none(), name })
    }

    pub(crate) fn any_object() -> Self {
        Self::Json(json!({"type": "object"}))
    }

    /// Why it cannot be used, by what llguidance says, which goes on about its own workings for many lines.
    fn refused(&self, error: &str) -> ApiError {
        let line = error.lines().next().unwrap_or_default();
        let why = line.split("failed to compile JSON schema: ").last().unwrap_or_default();
        let why = why.replace("Unimplemented keys:", "these keywords are not supported:");
        match self {
            Self::Lark(source) if source.contains("::=") => {
                let why = "the grammar is GBNF; it is to be Lark, with `rule: \"text\"`, as llguidance reads it";
                ApiError::of("grammar", why)
            }
            Self::Lark(_) => ApiError::of("grammar", format!("the grammar is no Lark: {why}")),
            Self::Calls { .. } => {
                ApiError::of("tools", format!("a tool's schema cannot be used: {why}"))
            }
            Self::Json(_) | Self::Free => {
                ApiError::of("response_format", format!("the schema cannot be used: {why}"))
            }
        }
    }

    /// What llguidance is to read; none where there is nothing to hold to.
    fn grammar(
        &self,
        format: &Format,
        tools: &[Tool],
        thinks_first: bool,
    ) -> ApiResult<Option<TopLevelGrammar>> {
        let lark = match self {
            Self::Free => return Ok(None),
            Self::Lark(lark) => lark.clone(),
            Self::Json(schema) => {
                let mut schema = schema.clone();
                if let Value::Object(map) = &mut schema {
                    map.insert("x-guidance".into(), json!({"whitespace_pattern": SPACE}));
                }
                format.json_grammar(&schema, thinks_first)
            }
            Self::Calls { name, parallel } => {
                let which = name.as_deref().map_or(Which::All, Which::Named);
                let options = GrammarOptions { parallel: *parallel, thinks_first };
                let grammar = format.tool_grammar(tools, which, options);
                grammar.ok_or_else(|| {
                    ApiError::of("tool_choice", "tool_choice names none of the tools")
                })?
            }
        };
        if lark.len() > SOURCE_BYTES_MAX {
            let most = format!("a grammar or schema has at most {SOURCE_BYTES_MAX} bytes");
            return Err(ApiError::of("response_format", most));
        }
        Ok(Some(TopLevelGrammar::from_lark(lark)))
    }
}

/// Makes guides for a vocabulary.
pub(crate) struct Grammars {
    factory: ParserFactory,
}

impl Grammars {
    /// `marks`: control tokens whose names are text in grammars.
    pub(crate) fn new(text: &dyn Text, marks: &[Token]) -> Result<Self, String> {
        let ids = || (0..text.len()).filter_map(|id| Token::try_from(id).ok());
        let words: Vec<Vec<u8>> = ids().map(|id| word(text, id, marks)).collect();
        let ends: Vec<u32> =
            ids().filter(|&id| text.is_end(id)).map(Token::cast_unsigned).collect();
        let first = *ends.first().ok_or("the model has no token that ends an answer")?;
        let size = u32::try_from(words.len()).map_err(|error| error.to_string())?;
        let trie = TokTrie::from(&TokRxInfo::new(size, first), &words).with_eos_tokens(&ends);
        let tokens: TokEnv = std::sync::Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new_simple(&tokens).map_err(|error| error.to_string())?;
        factory.quiet();
        factory.limits_mut().verbose_errors = false;
        Ok(Self { factory })
    }

    /// What holds an answer to a form; none where it is free.
    pub(crate) fn guide(
        &self,
        form: &Form,
        format: &Format,
        tools: &[Tool],
        thinks_first: bool,
    ) -> ApiResult<Option<Guide>> {
        let Some(grammar) = form.grammar(format, tools, thinks_first)? else { return Ok(None) };
        let mut matcher = Matcher::new(self.factory.create_parser(grammar));
        // What cannot be read shows at the first question.
        drop(matcher.compute_mask());
        match matcher.get_error() {
            Some(error) => Err(form.refused(&error)),
            None => Ok(Some(Guide { matcher })),
        }
    }
}

/// The bytes of a token; those of a control token begin with a byte that no text has.
fn word(text: &dyn Text, id: Token, marks: &[Token]) -> Vec<u8> {
    let plain = text.piece(id, false);
    if !plain.is_empty() {
        return plain;
    }
    let mut name = text.piece(id, true);
    if !marks.contains(&id) {
        name.insert(0, TokTrie::SPECIAL_TOKEN_MARKER);
    }
    name
}

/// Holds an answer to a form.
pub(crate) struct Guide {
    matcher: Matcher,
}

impl Guide {
    /// Takes the tokens that cannot come next out of a row of logits.
    pub(crate) fn shape(&mut self, row: &mut [f32]) -> Result<(), EngineError> {
        let failed = |error| EngineError::Failed(format!("the answer's form: {error}"));
        let mask = self.matcher.compute_mask_or_eos().map_err(failed)?;
        for (id, logit) in row.iter_mut().enumerate() {
            if id >= mask.len() || !mask.get(id) {
                *logit = f32::NEG_INFINITY;
            }
        }
        Ok(())
    }

    /// Goes on with a token that was drawn.
    pub(crate) fn accept(&mut self, token: Token) -> Result<(), EngineError> {
        let failed = |error| EngineError::Failed(format!("the answer's form: {error}"));
        self.matcher.consume_token(token.cast_unsigned()).map_err(failed)
    }
}

//! How families of models write their thinking and their calls. The formats are those that llama.cpp's
//! `common/chat*.cpp` and ollama's `model/parsers` read.

/// How a model writes thinking and calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    pub(crate) thinking: Option<Thinking>,
    pub(crate) calls: &'static Calls,
}

/// The marks around thinking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Thinking {
    pub(crate) open: &'static str,
    pub(crate) close: &'static str,
}

/// How calls are written.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Calls {
    pub(crate) family: Family,
    /// What may begin a call. Several may follow each other.
    pub(crate) opens: &'static [&'static str],
    /// What is passed over after a call.
    pub(crate) closes: &'static [&'static str],
    /// What stands around the answer, and is no part of it.
    pub(crate) around: &'static [&'static str],
    /// Whether a reply that begins with JSON of a known tool's name is a call.
    pub(crate) bare: bool,
    pub(crate) body: Body,
}

/// What stands between the marks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Body {
    /// `{"name": …, "arguments": {…}}`, or a list of these.
    Json,
    /// A name, something in between, and an object of arguments.
    Named,
    /// A name, and each argument in tags.
    Tagged(Tags),
}

/// The tags of [`Body::Tagged`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tags {
    /// Before the name; empty if the name follows the call's opening.
    pub(crate) name: &'static str,
    /// Behind the name; empty if the name ends with its line, or where a tag begins.
    pub(crate) name_end: &'static str,
    /// Before an argument's key.
    pub(crate) key: &'static str,
    /// Behind the key.
    pub(crate) key_end: &'static str,
    /// Before the value, after white space; empty if it follows the key's end.
    pub(crate) value: &'static str,
    /// Behind the value.
    pub(crate) value_end: &'static str,
    /// Behind the last argument.
    pub(crate) end: &'static str,
    /// Whether names, keys and values stand on lines of their own.
    pub(crate) lines: bool,
}

/// Which family's habits these are, where tables do not tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    Harmony,
    DeepSeek,
    DeepSeek31,
    Kimi,
    MiniMax,
    Seed,
    Glm,
    QwenXml,
    Mistral,
    MistralList,
    Hermes,
    Granite,
    Command,
    Llama,
    Unknown,
}

const fn plain(
    family: Family,
    opens: &'static [&'static str],
    closes: &'static [&'static str],
) -> Calls {
    Calls { family, opens, closes, around: &[], bare: false, body: Body::Json }
}

const fn named(
    family: Family,
    opens: &'static [&'static str],
    closes: &'static [&'static str],
) -> Calls {
    Calls { family, opens, closes, around: &[], bare: false, body: Body::Named }
}

const fn tagged(
    family: Family,
    opens: &'static [&'static str],
    closes: &'static [&'static str],
    tags: Tags,
) -> Calls {
    Calls { family, opens, closes, around: &[], bare: false, body: Body::Tagged(tags) }
}

const FUNCTION_TAGS: Tags = Tags {
    name: "<function=",
    name_end: ">",
    key: "<parameter=",
    key_end: ">",
    value: "",
    value_end: "</parameter>",
    end: "</function>",
    lines: true,
};

static HARMONY: Calls = named(
    Family::Harmony,
    &["<|channel|>", "<|start|>", "<|message|>"],
    &["<|end|>", "<|call|>", "<|return|>", "<|constrain|>"],
);
static DEEPSEEK: Calls = named(
    Family::DeepSeek,
    &["<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"],
    &["```", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"],
);
static DEEPSEEK31: Calls = named(
    Family::DeepSeek31,
    &["<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"],
    &["<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"],
);
static KIMI: Calls = named(
    Family::Kimi,
    &["<|tool_calls_section_begin|>", "<|tool_call_begin|>"],
    &["<|tool_call_end|>", "<|tool_calls_section_end|>"],
);
static MINIMAX: Calls = tagged(
    Family::MiniMax,
    &["<minimax:tool_call>"],
    &["</minimax:tool_call>"],
    Tags {
        name: "<invoke name=\"",
        name_end: "\">",
        key: "<parameter name=\"",
        key_end: "\">",
        value: "",
        value_end: "</parameter>",
        end: "</invoke>",
        lines: false,
    },
);
static SEED: Calls =
    tagged(Family::Seed, &["<seed:tool_call>"], &["</seed:tool_call>"], FUNCTION_TAGS);
static GLM: Calls = tagged(
    Family::Glm,
    &["<tool_call>"],
    &[],
    Tags {
        name: "",
        name_end: "",
        key: "<arg_key>",
        key_end: "</arg_key>",
        value: "<arg_value>",
        value_end: "</arg_value>",
        end: "</tool_call>",
        lines: false,
    },
);
static QWEN_XML: Calls =
    tagged(Family::QwenXml, &["<tool_call>"], &["</tool_call>"], FUNCTION_TAGS);
static MISTRAL: Calls = named(Family::Mistral, &["[TOOL_CALLS]"], &[]);
static MISTRAL_LIST: Calls = named(Family::MistralList, &["[TOOL_CALLS]"], &[]);
static HERMES: Calls = plain(Family::Hermes, &["<tool_call>"], &["</tool_call>"]);
static GRANITE: Calls =
    plain(Family::Granite, &["<|tool_call|>", "<tool_call>"], &["<|/tool_call|>", "</tool_call>"]);
/// Phi's, which has the marks, or a word that it learned before them.
static PHI: Calls = plain(Family::Granite, &["<|tool_call|>", "functools"], &["<|/tool_call|>"]);
static COMMAND: Calls = Calls {
    around: &["<|START_RESPONSE|>", "<|END_RESPONSE|>"],
    ..plain(Family::Command, &["<|START_ACTION|>"], &["<|END_ACTION|>"])
};
static LLAMA: Calls =
    Calls { bare: true, ..plain(Family::Llama, &["<|python_tag|>"], &[";", "<|eom_id|>"]) };
static UNKNOWN: Calls =
    Calls { bare: true, ..plain(Family::Unknown, &["<tool_call>"], &["</tool_call>"]) };

impl Format {
    /// The format of the model that a template, of either kind, is for.
    pub fn detect(template: &str) -> Self {
        let has = |text: &str| template.contains(text);
        let calls = if has("<|channel|>") && has("<|message|>") {
            &HARMONY
        } else if has("<｜tool▁call▁begin｜>") {
            if has("```") { &DEEPSEEK } else { &DEEPSEEK31 }
        } else if has("<|tool_call_begin|>") {
            &KIMI
        } else if has("<minimax:tool_call>") {
            &MINIMAX
        } else if has("<seed:tool_call>") {
            &SEED
        } else if has("<arg_key>") {
            &GLM
        } else if has("<function=") && has("<parameter=") {
            &QWEN_XML
        } else if has("[TOOL_CALLS]") {
            if has("[ARGS]") { &MISTRAL } else { &MISTRAL_LIST }
        } else if has("<|START_ACTION|>") {
            &COMMAND
        } else if has("<|tool_call|>") {
            &GRANITE
        } else if has("<|tool|>") {
            &PHI
        } else if has("<tool_call>") {
            &HERMES
        } else if has("<|python_tag|>") || (has("<|start_header_id|>") && has("parameters")) {
            &LLAMA
        } else {
            &UNKNOWN
        };
        let thinking = [
            ("<seed:think>", "</seed:think>"),
            ("[THINK]", "[/THINK]"),
            ("<think>", "</think>"),
            ("<|START_THINKING|>", "<|END_THINKING|>"),
        ]
        .into_iter()
        .find(|(open, close)| has(open) || has(close))
        .map(|(open, close)| Thinking { open, close });
        Self { thinking, calls }
    }

    /// Whether the model writes thinking apart from its answer.
    pub fn has_thinking(&self) -> bool {
        self.thinking.is_some() || self.is_harmony()
    }

    /// Whether a prompt ends where the model is to go on thinking.
    pub fn opens_thinking(&self, prompt: &str) -> bool {
        self.thinking.is_some_and(|thinking| prompt.trim_end().ends_with(thinking.open))
    }

    /// The marks that a reply may have. In many vocabularies they are control tokens: they have to be in
    /// the text that a [`Parser`](crate::Parser) is fed, and a grammar takes them for text.
    pub fn marks(&self) -> Vec<&'static str> {
        let thinking = self.thinking.iter().flat_map(|t| [t.open, t.close]);
        let within: &[&str] = match self.calls.family {
            Family::DeepSeek | Family::DeepSeek31 => &["<｜tool▁sep｜>"],
            Family::Kimi => &["<|tool_call_argument_begin|>"],
            Family::Mistral | Family::MistralList => &["[CALL_ID]", "[ARGS]"],
            Family::Glm => {
                &["<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "</tool_call>"]
            }
            _ => &[],
        };
        let calls = self.calls.opens.iter().chain(self.calls.closes).chain(self.calls.around);
        let calls = calls.chain(within).copied();
        thinking.chain(calls.filter(|mark| mark.len() > 3)).collect()
    }

    pub(crate) fn is_harmony(&self) -> bool {
        self.calls.family == Family::Harmony
    }
}

/// The name and the id that stand before a call's arguments in [`Body::Named`].
pub(crate) fn named_header(family: Family, header: &str) -> Option<(String, Option<String>)> {
    let header = header.trim();
    let (name, id) = match family {
        // `name`, or `function`, a separator, `name` and a fence.
        Family::DeepSeek | Family::DeepSeek31 => {
            let (first, rest) = header.split_once("<｜tool▁sep｜>")?;
            let rest = rest.trim().trim_end_matches("json").trim_end_matches("```").trim();
            (if rest.is_empty() { first } else { rest }, None)
        }
        // `functions.name:0`
        Family::Kimi => {
            let id = header.strip_suffix("<|tool_call_argument_begin|>")?.trim();
            let name = id.strip_prefix("functions.").unwrap_or(id);
            (name.rsplit_once(':').map_or(name, |(name, _)| name), Some(id))
        }
        // `name`, with or without an id.
        Family::Mistral | Family::MistralList => {
            let header = header.strip_suffix("[ARGS]").unwrap_or(header);
            match header.split_once("[CALL_ID]") {
                Some((name, id)) => (name, Some(id.trim())),
                None => (header, None),
            }
        }
        _ => (header, None),
    };
    let name = name.trim();
    is_name(name).then(|| (name.to_owned(), id.map(str::to_owned)))
}

/// Whether a tool could have that name.
pub(crate) fn is_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= crate::limits::NAME_BYTES
        && name.chars().all(|c| c.is_alphanumeric() || matches!(c, '_' | '-' | '.' | ':' | '/'))
}

//! What a Jinja template wants messages to be like, found by rendering messages with words that stand out.

use serde_json::json;

use super::JinjaTemplate;
use crate::message::{Function, Message, Tool, ToolCall};
use crate::template::Request;
use crate::time::DateTime;

/// How a template takes a call's arguments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Arguments {
    /// As an object, which it writes by itself, mostly with `tojson`.
    #[default]
    Object,
    /// As the text of a JSON object, which it puts where it belongs.
    Text,
}

/// What a template wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Habits {
    /// It writes system messages. Without, they go before the first user message.
    pub(crate) system: bool,
    /// It wants content as a list of typed parts, and no string.
    pub(crate) typed_content: bool,
    /// It writes calls only if the content of their message is null.
    pub(crate) null_content: bool,
    /// How it takes a call's arguments.
    pub(crate) arguments: Arguments,
    /// It tells the model about tools.
    pub(crate) tools: bool,
}

impl Default for Habits {
    fn default() -> Self {
        Self {
            system: true,
            typed_content: false,
            null_content: false,
            arguments: Arguments::Object,
            tools: false,
        }
    }
}

const NEEDLE: &str = "quillwort";
const KEY: &str = "sedgekey";
const VALUE: &str = "bracken";

impl Habits {
    pub(super) fn of(template: &JinjaTemplate) -> Self {
        let mut habits = Self::default();
        let user = [Message::new("user", NEEDLE)];
        let probe = |habits: &Self, messages: &[Message], tools: &[Tool], needle: &str| {
            let request = Request { tools, ..Request::new(messages, DateTime::from_unix(0)) };
            template.render_as(habits, &request).is_ok_and(|text| text.contains(needle))
        };
        // A template of typed parts writes a string letter by letter, or not at all.
        if !probe(&habits, &user, &[], NEEDLE) {
            let typed = Self { typed_content: true, ..habits.clone() };
            habits.typed_content = probe(&typed, &user, &[], NEEDLE);
        }
        let system = [Message::new("system", NEEDLE), Message::new("user", "a")];
        habits.system = probe(&habits, &system, &[], NEEDLE);
        if !habits.system && !probe(&habits, &system, &[], NEEDLE) {
            // It takes no system message in either way, and is left to say why.
            habits.system = true;
        }
        habits.tools = probe(&habits, &[Message::new("user", "a")], &[tool()], NEEDLE);
        habits.find_arguments(template);
        habits
    }

    /// Tries the ways to hand over a call, the usual one first.
    fn find_arguments(&mut self, template: &JinjaTemplate) {
        let call = ToolCall {
            // Mistral's templates want nine letters or digits.
            id: Some("abcdefghi".into()),
            name: NEEDLE.into(),
            arguments: json!({KEY: VALUE}),
        };
        let answer = Message {
            tool_call_id: Some("abcdefghi".into()),
            tool_name: Some(NEEDLE.into()),
            ..Message::new("tool", "a")
        };
        let caller = Message { tool_calls: vec![call], ..Message::new("assistant", "") };
        let messages = [Message::new("user", "a"), caller, answer];
        let tools = [tool()];
        let request = Request { tools: &tools, ..Request::new(&messages, DateTime::from_unix(0)) };
        let ways = [
            (Arguments::Object, false),
            (Arguments::Object, true),
            (Arguments::Text, false),
            (Arguments::Text, true),
        ];
        for (arguments, null_content) in ways {
            let way = Self { arguments, null_content, ..self.clone() };
            if template.render_as(&way, &request).is_ok_and(|text| is_written(&text)) {
                *self = way;
                return;
            }
        }
    }
}

/// Whether a prompt has the call's name, key and value, as JSON or in tags: neither as Python prints a
/// dict, nor as JSON within JSON.
fn is_written(text: &str) -> bool {
    text.contains(NEEDLE)
        && text.contains(KEY)
        && text.contains(VALUE)
        && !text.contains(&format!("'{KEY}'"))
        && !text.contains(&format!("\\\"{KEY}"))
}

fn tool() -> Tool {
    Tool {
        kind: "function".into(),
        function: Function {
            name: NEEDLE.into(),
            description: Some("a".into()),
            parameters: json!({
                "type": "object",
                "properties": {"a": {"type": "string", "description": "a"}},
                "required": ["a"],
            }),
        },
    }
}

//! What the tests have in common: templates of our own in the style of model families, tools, replies.

use std::fmt::Write;

use serde_json::{Value, json};
use tierstream_chat::{Delta, Format, Function, Parser, Tool};

/// A template of `tests/templates`.
pub(crate) fn source(name: &str) -> String {
    let path = format!("{}/tests/templates/{name}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The format that such a template has.
pub(crate) fn format(name: &str) -> Format {
    Format::detect(&source(name))
}

pub(crate) fn tool(name: &str, description: &str, parameters: Value) -> Tool {
    let description = Some(description.to_owned()).filter(|text| !text.is_empty());
    Tool {
        kind: "function".into(),
        function: Function { name: name.into(), description, parameters },
    }
}

/// Tools with arguments of all types.
pub(crate) fn tools() -> Vec<Tool> {
    let weather = json!({
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "A \"city\""},
            "days": {"type": "integer"},
            "unit": {"type": "string", "enum": ["C", "F"]},
        },
        "required": ["city"],
    });
    let search = json!({
        "type": "object",
        "properties": {
            "query": {"type": "string"},
            "exact": {"type": "boolean"},
            "tags": {"type": "array", "items": {"type": "string"}},
            "filter": {"type": "object"},
            "limit": {"anyOf": [{"type": "number"}, {"type": "null"}]},
        },
        "required": ["query", "exact"],
    });
    vec![
        tool("get_weather", "The weather <of> a place", weather),
        tool("search", "Finds 日本 & more", search),
        tool("now", "", json!({"type": "object", "properties": {}})),
    ]
}

/// What a parser makes of pieces, with neighbours of one kind joined.
pub(crate) fn parse<'p>(
    format: &Format,
    tools: &[Tool],
    opens_thinking: bool,
    pieces: impl IntoIterator<Item = &'p str>,
) -> Vec<Delta> {
    let mut parser = Parser::new(format, tools, opens_thinking);
    let mut deltas = Vec::new();
    for piece in pieces {
        deltas.extend(parser.feed(piece));
    }
    deltas.extend(parser.finish());
    joined(deltas)
}

fn joined(deltas: Vec<Delta>) -> Vec<Delta> {
    let mut all: Vec<Delta> = Vec::new();
    for delta in deltas {
        match (all.last_mut(), delta) {
            (Some(Delta::Thinking(last)), Delta::Thinking(text))
            | (Some(Delta::Content(last)), Delta::Content(text)) => *last += &text,
            (
                Some(Delta::ToolArguments { index: last, json_fragment }),
                Delta::ToolArguments { index, json_fragment: text },
            ) if *last == index => *json_fragment += &text,
            (_, delta) => all.push(delta),
        }
    }
    all
}

/// Deltas for people, one a line.
pub(crate) fn told(deltas: &[Delta]) -> String {
    let mut out = String::new();
    for delta in deltas {
        let _ = match delta {
            Delta::Thinking(text) => writeln!(out, "  thinking  {text:?}"),
            Delta::Content(text) => writeln!(out, "  content   {text:?}"),
            Delta::ToolStart { index, id, name } => {
                writeln!(out, "  call {index}    {name} {}", id.as_deref().unwrap_or("without id"))
            }
            Delta::ToolArguments { index, json_fragment } => {
                writeln!(out, "  json {index}    {json_fragment}")
            }
            Delta::ToolEnd { index, call } => {
                let id = call.id.as_deref().unwrap_or("without id");
                writeln!(out, "  end {index}     {} {id} {}", call.name, call.arguments)
            }
        };
    }
    out
}

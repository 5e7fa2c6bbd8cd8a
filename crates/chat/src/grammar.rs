//! Grammars that hold a model to calling tools in its own format: Lark, as llguidance reads it.

use std::fmt::Write;

use serde_json::{Value, json};

use crate::format::{Body, Family, Format, Tags};
use crate::message::Tool;

/// Which tools the model may call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which<'a> {
    /// Any of them.
    All,
    /// The one of that name.
    Named(&'a str),
}

/// What a grammar allows beside one call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GrammarOptions {
    /// Several calls.
    pub parallel: bool,
    /// The prompt ends inside of thinking, which goes on first.
    pub thinks_first: bool,
}

impl Format {
    /// A grammar for a reply that is a call; `None` if there is no such tool. It has the
    /// [`marks`](Format::marks) as text, so the vocabulary that it is used with has to have them as text, too.
    pub fn tool_grammar(
        &self,
        tools: &[Tool],
        which: Which<'_>,
        options: GrammarOptions,
    ) -> Option<String> {
        let tools: Vec<&Tool> = tools
            .iter()
            .filter(|tool| match which {
                Which::All => true,
                Which::Named(name) => tool.function.name == name,
            })
            .collect();
        if tools.is_empty() {
            return None;
        }
        let mut rules = Rules::default();
        let calls: Vec<String> = tools.iter().map(|tool| self.call(tool, &mut rules)).collect();
        rules.add("call", &calls.join(" | "));
        let start = self.reply(options);
        let thought = self.thought(options.thinks_first, &mut rules);
        Some(format!("start: {thought}{start}\n{}", rules.lines))
    }

    /// A grammar for an answer that is JSON of this schema. `thinks_first`: the prompt ends inside of thinking,
    /// which goes on first. Marks are text here as they are in a [`Format::tool_grammar`].
    pub fn json_grammar(&self, schema: &Value, thinks_first: bool) -> String {
        let mut rules = Rules::default();
        let json = rules.json("answer", schema);
        let thought = self.thought(thinks_first, &mut rules);
        let (before, after) = match self.calls.family {
            Family::Harmony => ("\"<|channel|>final<|message|>\" ", ""),
            Family::Command => ("\"<|START_RESPONSE|>\" ", " \"<|END_RESPONSE|>\""),
            _ => ("", ""),
        };
        format!("start: {thought}{before}{json}{after}\n{}", rules.lines)
    }

    /// What comes before a reply's calls or its answer.
    fn thought(&self, thinks_first: bool, rules: &mut Rules) -> &'static str {
        match self.thinking {
            Some(thinking) if thinks_first => {
                rules.text_until("thought", thinking.close);
                "thought /\\s*/ "
            }
            _ if self.is_harmony() => {
                rules.text_until("thought", "<|end|>");
                rules.add(
                    "analysis",
                    r#""<|channel|>analysis<|message|>" thought "<|start|>assistant""#,
                );
                "analysis? "
            }
            _ => "",
        }
    }

    /// The whole reply, of calls.
    fn reply(&self, options: GrammarOptions) -> String {
        let more = |separator: &str| match options.parallel {
            true => format!("call ({separator} call)*"),
            false => "call".to_owned(),
        };
        match self.calls.family {
            Family::DeepSeek | Family::DeepSeek31 => {
                format!("\"<｜tool▁calls▁begin｜>\" {} \"<｜tool▁calls▁end｜>\"", more(r#"/\n?/"#))
            }
            Family::Kimi => format!(
                "\"<|tool_calls_section_begin|>\" {} \"<|tool_calls_section_end|>\"",
                more("/\\n?/")
            ),
            Family::MiniMax => {
                // The line's end by itself: what is read takes the longest piece that may follow.
                format!(
                    r#""<minimax:tool_call>\n" {} "\n" "</minimax:tool_call>""#,
                    more(r#""\n""#)
                )
            }
            Family::MistralList => format!(r#""[TOOL_CALLS][" {} "]""#, more("\", \"")),
            Family::Granite => format!(r#""<|tool_call|>[" {} "]""#, more("\", \"")),
            Family::Command => {
                format!(r#""<|START_ACTION|>[" {} "]<|END_ACTION|>""#, more("\", \""))
            }
            Family::Mistral => more("/ ?/"),
            // A reply has one call, and ends with it.
            Family::Harmony => "call".into(),
            Family::Llama => more("\"; \""),
            _ => more("\"\\n\""),
        }
    }

    /// One call of a tool.
    fn call(&self, tool: &Tool, rules: &mut Rules) -> String {
        let name = &tool.function.name;
        if let Body::Tagged(tags) = self.calls.body {
            return tagged_call(tool, self.calls.family, tags, rules);
        }
        let arguments = rules.json("args", &parameters(tool));
        let around = |before: String, after: &str| {
            let after =
                if after.is_empty() { String::new() } else { format!(" {}", literal(after)) };
            format!("({} {arguments}{after})", literal(&before))
        };
        let quoted = Value::from(name.as_str());
        match self.calls.family {
            Family::Harmony => around(
                format!("<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>"),
                "",
            ),
            Family::DeepSeek => around(
                format!("<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n"),
                "\n```<｜tool▁call▁end｜>",
            ),
            Family::DeepSeek31 => {
                around(format!("<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>"), "<｜tool▁call▁end｜>")
            }
            Family::Kimi => {
                let before = literal(&format!("<|tool_call_begin|>functions.{name}:"));
                let between = literal("<|tool_call_argument_begin|>");
                let after = literal("<|tool_call_end|>");
                format!("({before} /[0-9]{{1,3}}/ {between} {arguments} {after})")
            }
            Family::Mistral => around(format!("[TOOL_CALLS]{name}[ARGS]"), ""),
            Family::MistralList | Family::Granite => {
                around(format!("{{\"name\": {quoted}, \"arguments\": "), "}")
            }
            Family::Command => {
                let before = literal("{\"tool_call_id\": \"");
                let between = literal(&format!("\", \"tool_name\": {quoted}, \"parameters\": "));
                format!("({before} /[0-9]{{1,3}}/ {between} {arguments} \"}}\")")
            }
            Family::Llama => around(format!("{{\"name\": {quoted}, \"parameters\": "), "}"),
            _ => around(
                format!("<tool_call>\n{{\"name\": {quoted}, \"arguments\": "),
                "}\n</tool_call>",
            ),
        }
    }
}

/// A call with each argument in tags: those that have to be there, and any of the others, in the schema's order.
fn tagged_call(tool: &Tool, family: Family, tags: Tags, rules: &mut Rules) -> String {
    let line =
        if tags.lines || family == Family::Glm || family == Family::MiniMax { "\n" } else { "" };
    let (open, close) = match family {
        Family::Seed => ("<seed:tool_call>\n", "\n</seed:tool_call>"),
        Family::QwenXml => ("<tool_call>\n", "\n</tool_call>"),
        Family::Glm => ("<tool_call>", ""),
        _ => ("", ""),
    };
    let head = format!("{open}{}{}{}{line}", tags.name, tool.function.name, tags.name_end);
    let mut parts = vec![literal(&head)];
    let schema = parameters(tool);
    let required = schema.get("required").and_then(Value::as_array);
    let properties = schema.get("properties").and_then(Value::as_object);
    for (key, property) in properties.into_iter().flatten() {
        let between = if tags.value.is_empty() { "" } else { "\n" };
        let inner = if tags.lines { "\n" } else { "" };
        let before = format!("{}{key}{}{between}{}{inner}", tags.key, tags.key_end, tags.value);
        let end = format!("{inner}{}{line}", tags.value_end);
        let value = rules.tagged_value(&with_definitions(property, &schema), &end);
        let part = format!("{} {value}", literal(&before));
        let is_required = required.is_some_and(|keys| keys.iter().any(|k| k == key));
        parts.push(if is_required { part } else { format!("({part})?") });
    }
    parts.push(literal(&format!("{}{close}", tags.end)));
    format!("({})", parts.join(" "))
}

/// The schema of a tool's arguments, an object in any case.
fn parameters(tool: &Tool) -> Value {
    match &tool.function.parameters {
        Value::Object(map) if map.get("type").is_some_and(|t| t == "object") => {
            Value::Object(map.clone())
        }
        Value::Object(map) if map.contains_key("properties") => {
            let mut map = map.clone();
            map.insert("type".into(), "object".into());
            Value::Object(map)
        }
        _ => json!({"type": "object"}),
    }
}

/// A property's schema with the definitions that it may refer to.
fn with_definitions(property: &Value, schema: &Value) -> Value {
    let mut property = property.clone();
    if let Value::Object(map) = &mut property {
        for key in ["$defs", "definitions"] {
            if let (Some(definitions), false) = (schema.get(key), map.contains_key(key)) {
                map.insert(key.into(), definitions.clone());
            }
        }
    }
    property
}

/// The schema with its objects closed where it says nothing of that, as llama.cpp and Ollama read it. By the standard,
/// a model could invent keys. One that puts objects together from several schemas stays as it is: the keys of
/// one part are foreign to the other.
fn closed(schema: &Value) -> Value {
    let mut schema = schema.clone();
    if !puts_together(&mut schema) {
        close(&mut schema);
    }
    schema
}

/// Keywords of schemas that hold for a value beside those around them.
const BESIDE: [&str; 9] = [
    "allOf",
    "anyOf",
    "oneOf",
    "not",
    "if",
    "$ref",
    "dependentSchemas",
    "unevaluatedProperties",
    "$dynamicRef",
];

fn puts_together(schema: &mut Value) -> bool {
    let here = match &*schema {
        Value::Object(map) => {
            let has_several = |all: &Value| all.as_array().is_some_and(|all| all.len() > 1);
            map.get("allOf").is_some_and(has_several)
                || map.contains_key("properties") && BESIDE.iter().any(|key| map.contains_key(*key))
        }
        _ => false,
    };
    here || parts(schema).into_iter().any(puts_together)
}

fn close(schema: &mut Value) {
    if let Value::Object(map) = schema
        && let Some(Value::Object(named)) = map.get("properties")
    {
        let required = map.get("required").and_then(Value::as_array).into_iter().flatten();
        // One that wants a key that it does not describe could not be satisfied.
        if required.filter_map(Value::as_str).all(|key| named.contains_key(key)) {
            map.entry("additionalProperties").or_insert(false.into());
        }
    }
    parts(schema).into_iter().for_each(close);
}

/// The schemas inside of a schema that say what a value is.
fn parts(schema: &mut Value) -> Vec<&mut Value> {
    let Value::Object(map) = schema else { return Vec::new() };
    let mut parts = Vec::new();
    for (key, value) in map {
        match (key.as_str(), value) {
            ("properties" | "patternProperties" | "$defs" | "definitions", Value::Object(all)) => {
                parts.extend(all.values_mut());
            }
            ("allOf" | "anyOf" | "oneOf" | "prefixItems" | "items", Value::Array(all)) => {
                parts.extend(all);
            }
            ("items" | "additionalProperties", one) => parts.push(one),
            _ => {}
        }
    }
    parts
}

/// The rules of a grammar, one a line.
#[derive(Default)]
struct Rules {
    lines: String,
    count: usize,
}

impl Rules {
    fn add(&mut self, name: &str, rule: &str) {
        let _ = writeln!(self.lines, "{name}: {rule}");
    }

    fn next(&mut self, kind: &str) -> String {
        self.count += 1;
        format!("{kind}_{}", self.count)
    }

    /// A rule for JSON of a schema, with no keys but those that it names.
    fn json(&mut self, kind: &str, schema: &Value) -> String {
        let name = self.next(kind);
        self.add(&name, &format!("%json {}", closed(schema)));
        name
    }

    /// A rule for any text up to a mark, and the mark.
    fn text_until(&mut self, name: &str, mark: &str) {
        self.add(&format!("{name}[suffix={}]", literal(mark)), r"/(?s:.*)/");
    }

    /// A rule for an argument's value in tags, with what ends it: text that is as it is, or JSON.
    fn tagged_value(&mut self, schema: &Value, end: &str) -> String {
        let strings: Option<Vec<&str>> = schema
            .get("enum")
            .and_then(Value::as_array)
            .and_then(|values| values.iter().map(Value::as_str).collect());
        if let Some(strings) = strings.filter(|strings| !strings.is_empty()) {
            let options: Vec<String> = strings.iter().map(|text| literal(text)).collect();
            return format!("({}) {}", options.join(" | "), literal(end));
        }
        if schema.get("type").is_some_and(|kind| kind == "string") {
            let name = self.next("text");
            self.text_until(&name, end);
            return name;
        }
        format!("{} {}", self.json("value", schema), literal(end))
    }
}

/// A string of the grammar.
fn literal(text: &str) -> String {
    Value::from(text).to_string()
}

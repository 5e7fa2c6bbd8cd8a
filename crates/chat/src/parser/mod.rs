//! A model's text, as it comes, to thinking, content and calls.

mod body;
mod harmony;
mod json;
mod object;
mod plain;
mod tagged;

use std::collections::BTreeMap;

use serde_json::Value;

use crate::format::Format;
use crate::limits;
use crate::message::{Tool, ToolCall};

/// A piece of a reply.
#[derive(Clone, Debug, PartialEq)]
pub enum Delta {
    /// More of what the model thinks.
    Thinking(String),
    /// More of its answer.
    Content(String),
    /// A call begins.
    ToolStart {
        /// Which one of this reply, from 0.
        index: usize,
        /// The id that the model gave it.
        id: Option<String>,
        /// The tool.
        name: String,
    },
    /// More of a call's arguments.
    ToolArguments {
        /// Of which call.
        index: usize,
        /// JSON; all fragments of a call, joined, are its arguments.
        json_fragment: String,
    },
    /// A call is complete. It does not come for a call that the model broke off, or whose arguments it
    /// garbled halfway; text that follows is content then, but for a mark that was broken off.
    ToolEnd {
        /// Which one.
        index: usize,
        /// All of it.
        call: ToolCall,
    },
}

/// Reads one reply, in pieces of any length.
///
/// Text comes out as soon as it is clear what it is: never part of a mark, and a call's arguments once
/// its name is known. What looks like a call and is none comes out as the text that it is. How the text
/// was cut makes no difference to what comes out, joined.
#[derive(Debug)]
pub struct Parser {
    machine: Machine,
    buffer: String,
    out: Output,
}

#[derive(Debug)]
enum Machine {
    Plain(plain::Plain),
    Harmony(harmony::Harmony),
}

impl Parser {
    /// A parser for a reply in this format. Without `tools` nothing is taken for a call. `opens_thinking`
    /// says that the prompt ended inside of thinking: [`Format::opens_thinking`].
    pub fn new(format: &Format, tools: &[Tool], opens_thinking: bool) -> Self {
        let machine = if format.is_harmony() {
            Machine::Harmony(harmony::Harmony::new(!tools.is_empty()))
        } else {
            Machine::Plain(plain::Plain::new(format, !tools.is_empty(), opens_thinking))
        };
        let out = Output { tools: Types::of(tools), ..Output::default() };
        Self { machine, buffer: String::new(), out }
    }

    /// Reads on.
    pub fn feed(&mut self, text: &str) -> Vec<Delta> {
        self.buffer += text;
        self.run(false)
    }

    /// What was held back, at the end of the reply.
    pub fn finish(&mut self) -> Vec<Delta> {
        let deltas = self.run(true);
        self.buffer.clear();
        deltas
    }

    /// Whether what comes next belongs to thinking, as far as can be told.
    pub fn is_thinking(&self) -> bool {
        match &self.machine {
            Machine::Plain(plain) => plain.is_thinking(),
            Machine::Harmony(harmony) => harmony.is_thinking(),
        }
    }

    fn run(&mut self, last: bool) -> Vec<Delta> {
        let mut input = Input { text: &self.buffer, last };
        while match &mut self.machine {
            Machine::Plain(plain) => plain.step(&mut input, &mut self.out),
            Machine::Harmony(harmony) => harmony.step(&mut input, &mut self.out),
        } {}
        let rest = input.text.len();
        let used = self.buffer.len() - rest;
        self.buffer.drain(..used);
        std::mem::take(&mut self.out.deltas)
    }
}

/// The text that was not used yet.
#[derive(Debug)]
struct Input<'t> {
    text: &'t str,
    /// Whether no more will come.
    last: bool,
}

/// What the text begins with.
#[derive(Debug, PartialEq)]
enum Begins {
    /// With this one of the marks.
    With(usize),
    /// With none of them.
    Not,
    /// More text has to come to tell.
    Unclear,
}

impl<'t> Input<'t> {
    fn take(&mut self, bytes: usize) -> &'t str {
        let (taken, rest) = self.text.split_at(bytes);
        self.text = rest;
        taken
    }

    /// Passes over white space. Returns it.
    fn skip_space(&mut self) -> &'t str {
        self.take(self.space())
    }

    /// Moves so many bytes to `text`. It gets no longer than `max`, but for one letter, by which it is
    /// too long: whether they fitted.
    fn move_to(&mut self, text: &mut String, bytes: usize, max: usize) -> bool {
        let room = max.saturating_sub(text.len());
        let fits = bytes <= room;
        let end = if fits { bytes } else { self.text.ceil_char_boundary(room + 1) };
        *text += self.take(end);
        fits
    }

    /// Moves what stands before the marks to `text`, which gets no longer than [`Input::move_to`] lets it.
    /// The mark that follows, if one does; none at all if it is too long.
    fn move_up_to<'m>(
        &mut self,
        text: &mut String,
        marks: impl IntoIterator<Item = &'m str> + Clone,
        max: usize,
    ) -> Option<Option<usize>> {
        let (before, mark) = self.before(marks);
        self.move_to(text, before.len(), max).then_some(mark)
    }

    /// How many bytes of white space the text begins with.
    fn space(&self) -> usize {
        self.text.len() - self.text.trim_start().len()
    }

    /// Which of the marks the text begins with; the longest, if several.
    fn begins<'m>(&self, marks: impl IntoIterator<Item = &'m str>) -> Begins {
        let mut found = Begins::Not;
        let mut length = 0;
        for (i, mark) in marks.into_iter().enumerate() {
            if self.text.starts_with(mark) && mark.len() > length {
                (found, length) = (Begins::With(i), mark.len());
            } else if !self.last && mark.len() > self.text.len() && mark.starts_with(self.text) {
                return Begins::Unclear;
            }
        }
        found
    }

    /// Whether the reply was broken off within one of the marks.
    fn breaks_off<'m>(&self, marks: impl IntoIterator<Item = &'m str>) -> bool {
        let is_begun = |mark: &str| mark.len() > self.text.len() && mark.starts_with(self.text);
        self.last && !self.text.is_empty() && marks.into_iter().any(is_begun)
    }

    /// Up to where none of the marks can begin, and the mark that begins there.
    fn before<'m>(
        &self,
        marks: impl IntoIterator<Item = &'m str> + Clone,
    ) -> (&'t str, Option<usize>) {
        for (at, _) in self.text.char_indices() {
            let rest = Input { text: &self.text[at..], last: self.last };
            match rest.begins(marks.clone()) {
                Begins::With(mark) => return (&self.text[..at], Some(mark)),
                Begins::Unclear => return (&self.text[..at], None),
                Begins::Not => {}
            }
        }
        (self.text, None)
    }
}

/// What comes out, and the numbers of calls.
#[derive(Debug, Default)]
struct Output {
    deltas: Vec<Delta>,
    calls: usize,
    tools: Types,
}

impl Output {
    fn thinking(&mut self, text: &str) {
        match self.deltas.last_mut() {
            _ if text.is_empty() => {}
            Some(Delta::Thinking(last)) => *last += text,
            _ => self.deltas.push(Delta::Thinking(text.into())),
        }
    }

    fn content(&mut self, text: &str) {
        match self.deltas.last_mut() {
            _ if text.is_empty() => {}
            Some(Delta::Content(last)) => *last += text,
            _ => self.deltas.push(Delta::Content(text.into())),
        }
    }

    fn start(&mut self, name: &str, id: Option<String>) {
        self.deltas.push(Delta::ToolStart { index: self.calls, id, name: name.into() });
        self.calls += 1;
    }

    /// More of the arguments of the last call that was started.
    fn arguments(&mut self, text: &str) {
        let last = self.calls.saturating_sub(1);
        match self.deltas.last_mut() {
            _ if text.is_empty() => {}
            Some(Delta::ToolArguments { index, json_fragment }) if *index == last => {
                *json_fragment += text;
            }
            _ => self.deltas.push(Delta::ToolArguments { index: last, json_fragment: text.into() }),
        }
    }

    fn end(&mut self, name: &str, id: Option<String>, arguments: Value) {
        let call = ToolCall { id, name: name.into(), arguments };
        self.deltas.push(Delta::ToolEnd { index: self.calls.saturating_sub(1), call });
    }

    /// Whether one more call is within the limits.
    fn has_room(&self) -> bool {
        self.calls < limits::CALLS
    }
}

/// The tools that may be called, and the types of their arguments.
#[derive(Debug, Default)]
struct Types {
    tools: BTreeMap<String, Tool>,
}

impl Types {
    fn of(tools: &[Tool]) -> Self {
        Self { tools: tools.iter().map(|t| (t.function.name.clone(), t.clone())).collect() }
    }

    fn has(&self, name: &str) -> bool {
        self.tools.contains_key(name)
    }

    /// The value that an argument's text means: a string where the schema says so or where it is no JSON.
    fn value(&self, tool: &str, key: &str, text: &str) -> Value {
        let schema = self.tools.get(tool).and_then(|tool| tool.parameter(key));
        let parsed: Option<Value> = serde_json::from_str(text.trim()).ok();
        match (parsed, schema) {
            (Some(value), Some(schema)) if fits(&value, schema) => value,
            (Some(value), None) => value,
            // Python's words, which some models write.
            (_, Some(schema)) if takes(schema, "boolean") && text.trim() == "True" => true.into(),
            (_, Some(schema)) if takes(schema, "boolean") && text.trim() == "False" => false.into(),
            (_, Some(schema)) if takes(schema, "null") && text.trim() == "None" => Value::Null,
            _ => text.into(),
        }
    }
}

/// Whether a schema allows a value's type; strings stay what they were written as.
fn fits(value: &Value, schema: &Value) -> bool {
    if takes(schema, "string") && !matches!(value, Value::Null | Value::Object(_) | Value::Array(_))
    {
        return false;
    }
    match value {
        Value::Null => takes(schema, "null"),
        Value::Bool(_) => takes(schema, "boolean"),
        Value::Number(number) => {
            takes(schema, "number") || (takes(schema, "integer") && !number.is_f64())
        }
        Value::Array(_) => takes(schema, "array"),
        Value::Object(_) => takes(schema, "object"),
        Value::String(_) => true,
    }
}

/// Whether a schema names a type, by itself or in one of its alternatives; one that names none takes all
/// but strings.
fn takes(schema: &Value, name: &str) -> bool {
    if let Some(Value::Array(any)) = schema.get("anyOf").or_else(|| schema.get("oneOf")) {
        return any.iter().any(|schema| schema.get("type").is_some_and(|t| names(t, name)));
    }
    match schema.get("type") {
        Some(kind) => names(kind, name),
        None => match schema.get("enum") {
            Some(Value::Array(values)) => values.iter().any(Value::is_string) == (name == "string"),
            _ => name != "string",
        },
    }
}

fn names(kind: &Value, name: &str) -> bool {
    match kind {
        Value::String(kind) => kind == name,
        Value::Array(kinds) => kinds.iter().any(|kind| kind == name),
        _ => false,
    }
}

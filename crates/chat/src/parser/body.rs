//! One call, from behind its opening mark to the end of its arguments.

use serde_json::{Map, Value};

use super::json::{Scanner, Step};
use super::object::Object;
use super::tagged::Tagged;
use super::{Input, Output};
use crate::format::{Family, named_header};
use crate::limits;

/// How far a call is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// More text has to come.
    More,
    /// It is complete.
    Done,
    /// It is no call. What was read is in the raw text, unless it had started.
    Broken,
}

/// A call that is read.
#[derive(Debug)]
pub(super) struct Call {
    body: Box<Body>,
    /// Bytes that were read.
    size: usize,
}

#[derive(Debug)]
enum Body {
    Object(Object),
    Named(Named),
    Tagged(Tagged),
}

impl From<Object> for Call {
    fn from(call: Object) -> Self {
        Self { body: Box::new(Body::Object(call)), size: 0 }
    }
}

impl From<Named> for Call {
    fn from(call: Named) -> Self {
        Self { body: Box::new(Body::Named(call)), size: 0 }
    }
}

impl From<Tagged> for Call {
    fn from(call: Tagged) -> Self {
        Self { body: Box::new(Body::Tagged(call)), size: 0 }
    }
}

impl Call {
    /// Reads on. Until the call starts, what is read is kept in `raw`.
    pub(super) fn step(
        &mut self,
        input: &mut Input<'_>,
        out: &mut Output,
        raw: &mut String,
    ) -> Outcome {
        // It sees no more than it may have, so that what is too long breaks off at the same letter however
        // it comes.
        let room = limits::CALL_BYTES.saturating_sub(self.size).min(input.text.len());
        let end = input.text.floor_char_boundary(room);
        let is_cut = end < input.text.len();
        let mut part = Input { text: &input.text[..end], last: input.last && !is_cut };
        let outcome = match &mut *self.body {
            Body::Object(call) => call.step(&mut part, out, raw),
            Body::Named(call) => call.step(&mut part, out, raw),
            Body::Tagged(call) => call.step(&mut part, out, raw),
        };
        let used = end - part.text.len();
        input.take(used);
        self.size += used;
        match outcome {
            Outcome::More if input.last && !is_cut && self.has_started() => {
                // Nothing, or a mark that was broken off.
                input.take(input.text.len());
                Outcome::Broken
            }
            Outcome::More if input.last || is_cut => Outcome::Broken,
            outcome => outcome,
        }
    }

    pub(super) fn has_started(&self) -> bool {
        match &*self.body {
            Body::Object(call) => call.has_started(),
            Body::Named(call) => call.arguments.is_some(),
            Body::Tagged(call) => call.has_started(),
        }
    }
}

/// A name, something in between, and an object.
#[derive(Debug)]
pub(super) struct Named {
    family: Family,
    header: String,
    name: String,
    id: Option<String>,
    arguments: Option<Arguments>,
}

impl Named {
    pub(super) fn new(family: Family) -> Self {
        Self { family, header: String::new(), name: String::new(), id: None, arguments: None }
    }

    /// A call whose name is known, and whose arguments follow.
    pub(super) fn with_name(family: Family, name: &str) -> Self {
        Self { name: name.into(), ..Self::new(family) }
    }

    fn step(&mut self, input: &mut Input<'_>, out: &mut Output, raw: &mut String) -> Outcome {
        if self.arguments.is_none() {
            let before = self.header.len();
            let end = input.move_up_to(&mut self.header, ["{"], limits::CALL_HEADER_BYTES);
            raw.push_str(&self.header[before..]);
            match end {
                None => return Outcome::Broken,
                Some(None) => return Outcome::More,
                Some(Some(_)) => {}
            }
            if self.name.is_empty() {
                let Some((name, id)) = named_header(self.family, &self.header) else {
                    return Outcome::Broken;
                };
                (self.name, self.id) = (name, id);
            }
            out.start(&self.name, self.id.clone());
        }
        let arguments = self.arguments.get_or_insert_with(Arguments::new);
        match arguments.step(input, Some(out)) {
            Outcome::Done => match arguments.value() {
                Some(value) => {
                    out.end(&self.name, self.id.take(), value);
                    Outcome::Done
                }
                None => Outcome::Broken,
            },
            outcome => outcome,
        }
    }
}

/// An object, or a string, as it comes.
#[derive(Debug)]
pub(super) struct Arguments {
    scanner: Scanner,
    text: String,
}

impl Arguments {
    pub(super) fn new() -> Self {
        Self { scanner: Scanner::new(), text: String::new() }
    }

    /// Reads on, and gives out what it reads if there is an output.
    pub(super) fn step(&mut self, input: &mut Input<'_>, out: Option<&mut Output>) -> Outcome {
        let mut end = input.text.len();
        let mut outcome = Outcome::More;
        for (at, c) in input.text.char_indices() {
            match self.scanner.push(c) {
                Step::More => continue,
                Step::Done => (end, outcome) = (at + c.len_utf8(), Outcome::Done),
                Step::Invalid => (end, outcome) = (at, Outcome::Broken),
            }
            break;
        }
        let text = input.take(end);
        self.text += text;
        if let Some(out) = out {
            out.arguments(text);
        }
        outcome
    }

    pub(super) fn text(&self) -> &str {
        &self.text
    }

    /// The arguments, if they are an object, or a string of one.
    pub(super) fn value(&self) -> Option<Value> {
        match serde_json::from_str(&self.text).ok()? {
            Value::String(text) => {
                serde_json::from_str::<Map<String, Value>>(&text).ok().map(Value::Object)
            }
            value @ Value::Object(_) => Some(value),
            _ => None,
        }
    }
}

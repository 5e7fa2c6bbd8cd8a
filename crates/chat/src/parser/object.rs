//! A call as one JSON object: `{"name": …, "arguments": {…}}`, with the keys in any order.

use serde_json::{Map, Value};

use super::body::{Arguments, Outcome};
use super::{Input, Output};
use crate::format::is_name;

/// Length of a number beside the arguments.
const WORD_BYTES: usize = 64;

/// The object as far as it was read.
#[derive(Debug)]
pub(super) struct Object {
    state: State,
    /// Whether no mark says that it is a call, so that its keys and its name have to.
    bare: bool,
    key: String,
    name: Option<String>,
    id: Option<String>,
    /// The arguments' JSON, if they came before the name.
    waiting: Option<Value>,
    /// The arguments, if they were given out.
    given: Option<Value>,
    started: bool,
}

#[derive(Debug)]
enum State {
    Open,
    FirstKey,
    Key,
    KeyText(Arguments),
    Colon,
    Value,
    /// A string, an object or a list.
    Whole(Arguments),
    /// A number or a word.
    Word(String),
    AfterValue,
}

impl Object {
    pub(super) fn new(bare: bool) -> Self {
        Self {
            state: State::Open,
            bare,
            key: String::new(),
            name: None,
            id: None,
            waiting: None,
            given: None,
            started: false,
        }
    }

    pub(super) fn has_started(&self) -> bool {
        self.started
    }

    pub(super) fn step(
        &mut self,
        input: &mut Input<'_>,
        out: &mut Output,
        raw: &mut String,
    ) -> Outcome {
        loop {
            let before = input.text;
            let had_started = self.started;
            let outcome = self.part(input, out);
            if !had_started {
                raw.push_str(&before[..before.len() - input.text.len()]);
            }
            match outcome {
                Some(outcome) => return outcome,
                None if input.text.is_empty() => return Outcome::More,
                None => {}
            }
        }
    }

    /// Reads one part; what became of the object, if that is clear.
    fn part(&mut self, input: &mut Input<'_>, out: &mut Output) -> Option<Outcome> {
        match &mut self.state {
            State::KeyText(text) => {
                return match text.step(input, None) {
                    Outcome::Done => self.end_key(),
                    outcome => Some(outcome).filter(|o| *o != Outcome::More),
                };
            }
            State::Whole(text) => {
                let streams = self.started && self.given.is_none() && is_arguments(&self.key);
                return match text.step(input, streams.then_some(out)) {
                    Outcome::Done => self.end_value(out),
                    outcome => Some(outcome).filter(|o| *o != Outcome::More),
                };
            }
            State::Word(word) => {
                let end =
                    input.text.find(|c: char| !c.is_ascii_alphanumeric() && !"+-.".contains(c));
                if !input.move_to(word, end.unwrap_or(input.text.len()), WORD_BYTES) {
                    return Some(Outcome::Broken);
                }
                return if end.is_some() { self.end_word() } else { None };
            }
            _ => {}
        }
        input.skip_space();
        let c = input.text.chars().next()?;
        self.state = match (&self.state, c) {
            (State::Open, '{') => State::FirstKey,
            (State::FirstKey | State::Key, '"') => {
                self.state = State::KeyText(Arguments::new());
                return None;
            }
            (State::FirstKey | State::AfterValue, '}') => {
                input.take(1);
                return Some(self.end(out));
            }
            (State::AfterValue, ',') => State::Key,
            (State::Colon, ':') => State::Value,
            (State::Value, '{') if is_arguments(&self.key) => {
                if !self.start(out) {
                    return Some(Outcome::Broken);
                }
                self.state = State::Whole(Arguments::new());
                return None;
            }
            (State::Value, '{' | '[' | '"') => {
                self.state = State::Whole(Arguments::new());
                return None;
            }
            (State::Value, _) => {
                self.state = State::Word(String::new());
                return None;
            }
            _ => return Some(Outcome::Broken),
        };
        input.take(1);
        None
    }

    fn end_key(&mut self) -> Option<Outcome> {
        let State::KeyText(text) = &self.state else {
            return Some(Outcome::Broken);
        };
        let Ok(key) = serde_json::from_str::<String>(text.text()) else {
            return Some(Outcome::Broken);
        };
        let known = is_arguments(&key) || matches!(key.as_str(), "name" | "id" | "type");
        if self.bare && !self.started && !known {
            return Some(Outcome::Broken);
        }
        self.key = key;
        self.state = State::Colon;
        None
    }

    fn end_value(&mut self, out: &Output) -> Option<Outcome> {
        let State::Whole(text) = &self.state else {
            return Some(Outcome::Broken);
        };
        let value: Value = serde_json::from_str(text.text()).unwrap_or_default();
        match (self.key.as_str(), &value) {
            (key, _) if is_arguments(key) && self.given.is_none() && self.waiting.is_none() => {
                let Some(value) = text.value() else {
                    return Some(Outcome::Broken);
                };
                if self.started { self.given = Some(value) } else { self.waiting = Some(value) }
            }
            ("name" | "tool_name", Value::String(name)) if !self.started => {
                if !is_name(name) || (self.bare && !out.tools.has(name)) {
                    return Some(Outcome::Broken);
                }
                self.name = Some(name.clone());
            }
            // Command's `tool_call_id` counts the calls of one reply, so that it names none in a chat.
            ("id", Value::String(id)) => self.id = Some(id.clone()),
            _ => {}
        }
        self.state = State::AfterValue;
        None
    }

    fn end_word(&mut self) -> Option<Outcome> {
        let State::Word(word) = &self.state else {
            return Some(Outcome::Broken);
        };
        let value: Value = match serde_json::from_str(word) {
            Ok(value) => value,
            Err(_) => return Some(Outcome::Broken),
        };
        // No arguments may be `null`, but neither a number nor a truth.
        if is_arguments(&self.key) && !value.is_null() {
            return Some(Outcome::Broken);
        }
        self.state = State::AfterValue;
        None
    }

    /// Begins the call if its name is known. Whether what comes can still be a call.
    fn start(&mut self, out: &mut Output) -> bool {
        if let (false, Some(name)) = (self.started, &self.name) {
            out.start(name, self.id.clone());
            self.started = true;
        }
        // Arguments that come twice would be given out twice.
        self.given.is_none() && self.waiting.is_none()
    }

    fn end(&mut self, out: &mut Output) -> Outcome {
        let Some(name) = self.name.clone() else {
            return Outcome::Broken;
        };
        let given = self.given.take();
        if !self.started {
            out.start(&name, self.id.clone());
            self.started = true;
        }
        let arguments = given.unwrap_or_else(|| {
            let value = self.waiting.take().unwrap_or_else(|| Map::new().into());
            out.arguments(&value.to_string());
            value
        });
        out.end(&name, self.id.take(), arguments);
        Outcome::Done
    }
}

fn is_arguments(key: &str) -> bool {
    matches!(key, "arguments" | "parameters")
}

//! A call with its arguments in tags of their own.

use serde_json::{Map, Value};

use super::body::Outcome;
use super::{Begins, Input, Output};
use crate::format::{Tags, is_name};
use crate::limits;

/// The call as far as it was read.
#[derive(Debug)]
pub(super) struct Tagged {
    tags: Tags,
    state: State,
    name: String,
    key: String,
    text: String,
    arguments: Map<String, Value>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    Open,
    Name,
    /// After the name, or an argument.
    Between,
    Key,
    AfterKey,
    Value,
}

impl Tagged {
    pub(super) fn new(tags: Tags) -> Self {
        Self {
            tags,
            state: State::Open,
            name: String::new(),
            key: String::new(),
            text: String::new(),
            arguments: Map::new(),
        }
    }

    pub(super) fn has_started(&self) -> bool {
        !matches!(self.state, State::Open | State::Name)
    }

    pub(super) fn step(
        &mut self,
        input: &mut Input<'_>,
        out: &mut Output,
        raw: &mut String,
    ) -> Outcome {
        loop {
            let before = input.text;
            let had_started = self.has_started();
            let outcome = self.part(input, out);
            if !had_started {
                raw.push_str(&before[..before.len() - input.text.len()]);
            }
            if let Some(outcome) = outcome {
                return outcome;
            }
        }
    }

    /// Reads one part; what became of the call, if that is clear or more has to come.
    fn part(&mut self, input: &mut Input<'_>, out: &mut Output) -> Option<Outcome> {
        let tags = self.tags;
        match self.state {
            State::Open => {
                input.skip_space();
                match input.begins([tags.name]) {
                    _ if tags.name.is_empty() => {}
                    Begins::With(_) => {
                        input.take(tags.name.len());
                    }
                    Begins::Not if input.text.is_empty() => return Some(Outcome::More),
                    Begins::Not => return Some(Outcome::Broken),
                    Begins::Unclear => return Some(Outcome::More),
                }
                self.state = State::Name;
            }
            State::Name => return self.name(input, out),
            State::Between => {
                input.skip_space();
                let marks = [tags.key, tags.end];
                match input.begins(marks) {
                    Begins::With(0) => {
                        input.take(tags.key.len());
                        self.key.clear();
                        self.state = State::Key;
                    }
                    Begins::With(_) => {
                        input.take(tags.end.len());
                        out.arguments(if self.arguments.is_empty() { "{}" } else { "}" });
                        let arguments = std::mem::take(&mut self.arguments);
                        out.end(&self.name, None, arguments.into());
                        return Some(Outcome::Done);
                    }
                    Begins::Not if input.text.is_empty() => return Some(Outcome::More),
                    Begins::Not if input.breaks_off(marks) => return Some(Outcome::More),
                    Begins::Not => return Some(Outcome::Broken),
                    Begins::Unclear => return Some(Outcome::More),
                }
            }
            State::Key => {
                match input.move_up_to(&mut self.key, [tags.key_end], limits::NAME_BYTES) {
                    None => return Some(Outcome::Broken),
                    Some(None) => return Some(Outcome::More),
                    Some(Some(_)) => {}
                }
                input.take(tags.key_end.len());
                self.text.clear();
                self.state = State::AfterKey;
            }
            State::AfterKey => {
                if !tags.value.is_empty() {
                    input.skip_space();
                    match input.begins([tags.value]) {
                        Begins::With(_) => {
                            input.take(tags.value.len());
                        }
                        Begins::Not if input.text.is_empty() => return Some(Outcome::More),
                        Begins::Not if input.breaks_off([tags.value]) => {
                            return Some(Outcome::More);
                        }
                        Begins::Not => return Some(Outcome::Broken),
                        Begins::Unclear => return Some(Outcome::More),
                    }
                }
                self.state = State::Value;
            }
            State::Value => {
                let (text, end) = input.before([tags.value_end]);
                self.text += input.take(text.len());
                if end.is_none() {
                    return Some(Outcome::More);
                }
                input.take(tags.value_end.len());
                self.argument(out);
                self.state = State::Between;
            }
        }
        None
    }

    fn name(&mut self, input: &mut Input<'_>, out: &mut Output) -> Option<Outcome> {
        let tags = self.tags;
        let ends: &[&str] =
            if tags.name_end.is_empty() { &["\n", tags.key, tags.end] } else { &[tags.name_end] };
        match input.move_up_to(&mut self.name, ends.iter().copied(), limits::NAME_BYTES) {
            None => return Some(Outcome::Broken),
            Some(None) => return Some(Outcome::More),
            Some(Some(_)) => {}
        }
        input.take(tags.name_end.len());
        let name = self.name.trim();
        if !is_name(name) {
            return Some(Outcome::Broken);
        }
        self.name = name.into();
        out.start(&self.name, None);
        self.state = State::Between;
        None
    }

    fn argument(&mut self, out: &mut Output) {
        let mut text = self.text.as_str();
        if self.tags.lines {
            text = text.strip_prefix('\n').unwrap_or(text);
            text = text.strip_suffix('\n').unwrap_or(text);
        }
        let key = self.key.trim();
        let value = out.tools.value(&self.name, key, text);
        let before = if self.arguments.is_empty() { "{" } else { "," };
        out.arguments(&format!("{before}{}:{value}", Value::from(key)));
        self.arguments.insert(key.into(), value);
    }
}

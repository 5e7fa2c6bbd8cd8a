//! Replies that are text, with thinking before it and calls in it. All formats but gpt-oss's.

use super::body::{Call, Named, Outcome};
use super::object::Object;
use super::tagged::Tagged;
use super::{Begins, Input, Output};
use crate::format::{Body, Calls, Format, Thinking};
use crate::limits;

/// Where in a reply we are.
#[derive(Debug)]
pub(super) struct Plain {
    calls: &'static Calls,
    thinking: Option<Thinking>,
    has_tools: bool,
    state: State,
}

#[derive(Debug)]
enum State {
    /// Before anything was said. White space that follows thinking is dropped.
    Start {
        thought: bool,
    },
    /// Thinking begins, after white space.
    ThinkingStart,
    Thinking,
    Text,
    /// Behind a mark that opens a call.
    Open {
        raw: String,
        in_thinking: bool,
        in_list: bool,
    },
    Call {
        call: Call,
        raw: String,
        in_thinking: bool,
        in_list: bool,
    },
    /// Behind a call; of the closing marks the first ones have gone by.
    After {
        closed: usize,
        in_list: bool,
        in_thinking: bool,
    },
}

impl Plain {
    pub(super) fn new(format: &Format, has_tools: bool, opens_thinking: bool) -> Self {
        let state = match format.thinking {
            Some(_) if opens_thinking => State::ThinkingStart,
            _ => State::Start { thought: false },
        };
        Self { calls: format.calls, thinking: format.thinking, has_tools, state }
    }

    pub(super) fn is_thinking(&self) -> bool {
        matches!(self.state, State::ThinkingStart | State::Thinking)
    }

    /// Does one step; whether another one may follow.
    pub(super) fn step(&mut self, input: &mut Input<'_>, out: &mut Output) -> bool {
        match &mut self.state {
            State::Start { thought } => {
                let thought = *thought;
                self.start(thought, input, out)
            }
            State::ThinkingStart => {
                input.skip_space();
                if input.text.is_empty() {
                    return false;
                }
                // Some models write the mark again that the prompt ended with.
                match self.thinking.map_or(Begins::Not, |t| input.begins([t.open])) {
                    Begins::Unclear => return false,
                    Begins::With(_) => {
                        input.take(self.thinking.map_or(0, |t| t.open.len()));
                    }
                    Begins::Not => self.state = State::Thinking,
                }
                true
            }
            State::Thinking => self.think(input, out),
            State::Text => self.text(input, out),
            State::Open { .. } => self.open(input, out),
            State::Call { call, raw, in_thinking, in_list } => match call.step(input, out, raw) {
                Outcome::More => false,
                Outcome::Done => {
                    let (in_list, in_thinking) = (*in_list, *in_thinking);
                    self.state = State::After { closed: 0, in_list, in_thinking };
                    true
                }
                Outcome::Broken if call.has_started() => {
                    self.state = if *in_thinking { State::Thinking } else { State::Text };
                    true
                }
                Outcome::Broken => {
                    let (raw, in_thinking) = (std::mem::take(raw), *in_thinking);
                    self.give_back(&raw, in_thinking, out);
                    true
                }
            },
            State::After { .. } => self.after(input, out),
        }
    }

    fn start(&mut self, thought: bool, input: &mut Input<'_>, out: &mut Output) -> bool {
        let trimmed = input.text.trim_start();
        if trimmed.is_empty() {
            if thought {
                input.skip_space();
            } else if input.last {
                out.content(input.take(input.text.len()));
            }
            return false;
        }
        let rest = Input { text: trimmed, last: input.last };
        let opens_thinking = match self.thinking {
            Some(thinking) if !thought => rest.begins([thinking.open]),
            _ => Begins::Not,
        };
        match opens_thinking {
            Begins::Unclear => return false,
            Begins::With(_) => {
                input.skip_space();
                input.take(self.thinking.map_or(0, |t| t.open.len()));
                self.state = State::ThinkingStart;
                return true;
            }
            Begins::Not => {}
        }
        let space = input.skip_space();
        let raw = if thought { String::new() } else { space.to_owned() };
        if self.has_tools && self.calls.bare && trimmed.starts_with('{') {
            let call = Object::new(true).into();
            self.state = State::Call { call, raw, in_thinking: false, in_list: false };
        } else {
            out.content(&raw);
            self.state = State::Text;
        }
        true
    }

    fn think(&mut self, input: &mut Input<'_>, out: &mut Output) -> bool {
        let close = self.thinking.map_or("</think>", |t| t.close);
        let marks = self.call_marks(out);
        let (text, mark) = input.before(std::iter::once(close).chain(marks.iter().copied()));
        match mark {
            Some(0) => {
                out.thinking(text.trim_end());
                input.take(text.len() + close.len());
                self.state = State::Start { thought: true };
                true
            }
            Some(_) => {
                out.thinking(input.take(text.len()));
                self.state = State::Open { raw: String::new(), in_thinking: true, in_list: false };
                true
            }
            None if input.last => {
                out.thinking(input.take(input.text.len()));
                false
            }
            // The white space before the mark at its end does not belong to it.
            None => {
                let bytes = text.trim_end().len();
                out.thinking(input.take(bytes));
                false
            }
        }
    }

    fn text(&mut self, input: &mut Input<'_>, out: &mut Output) -> bool {
        let calls = self.call_marks(out);
        let around = self.calls.around;
        let (text, mark) = input.before(around.iter().chain(&calls).copied());
        out.content(input.take(text.len()));
        match mark {
            Some(mark) if mark < around.len() => {
                input.take(around[mark].len());
            }
            Some(_) => {
                self.state = State::Open { raw: String::new(), in_thinking: false, in_list: false };
            }
            None => {}
        }
        mark.is_some()
    }

    /// What begins a call: the opening marks, and the first tag, which some models write without them.
    fn call_marks(&self, out: &Output) -> Vec<&'static str> {
        if !self.has_tools || !out.has_room() {
            return Vec::new();
        }
        let tag = match self.calls.body {
            Body::Tagged(tags) if !tags.name.is_empty() => Some(tags.name),
            _ => None,
        };
        self.calls.opens.iter().copied().chain(tag).collect()
    }

    fn open(&mut self, input: &mut Input<'_>, out: &mut Output) -> bool {
        let State::Open { raw, in_thinking, in_list } = &mut self.state else {
            return false;
        };
        let most = limits::CALL_HEADER_BYTES;
        if raw.len() > most || !input.move_to(raw, input.space(), most) {
            let (raw, in_thinking) = (std::mem::take(raw), *in_thinking);
            self.give_back(&raw, in_thinking, out);
            return true;
        }
        match input.begins(self.calls.opens.iter().copied()) {
            Begins::With(mark) => {
                raw.push_str(input.take(self.calls.opens[mark].len()));
                return true;
            }
            Begins::Unclear if !input.text.is_empty() => return false,
            Begins::Unclear | Begins::Not => {}
        }
        let Some(c) = input.text.chars().next() else {
            if input.last {
                let (raw, in_thinking) = (std::mem::take(raw), *in_thinking);
                self.give_back(&raw, in_thinking, out);
            }
            return false;
        };
        let call = match (self.calls.body, c) {
            (Body::Tagged(tags), _) => Tagged::new(tags).into(),
            (Body::Json | Body::Named, '[') if !*in_list => {
                *in_list = true;
                raw.push_str(input.take(1));
                return true;
            }
            (Body::Json | Body::Named, '{') => Object::new(false).into(),
            (Body::Named, _) if !*in_list => Named::new(self.calls.family).into(),
            _ => {
                let (raw, in_thinking) = (std::mem::take(raw), *in_thinking);
                self.give_back(&raw, in_thinking, out);
                return true;
            }
        };
        let (raw, in_thinking, in_list) = (std::mem::take(raw), *in_thinking, *in_list);
        self.state = State::Call { call, raw, in_thinking, in_list };
        true
    }

    fn after(&mut self, input: &mut Input<'_>, out: &mut Output) -> bool {
        let State::After { closed, in_list, in_thinking } = &mut self.state else {
            return false;
        };
        let in_thinking = *in_thinking;
        input.skip_space();
        if input.text.is_empty() {
            return false;
        }
        if *in_list {
            let next = input.text.starts_with(',') && out.has_room();
            if next {
                input.take(1);
                let raw = ",".to_owned();
                self.state = State::Open { raw, in_thinking, in_list: true };
            } else {
                if input.text.starts_with(']') {
                    input.take(1);
                }
                *in_list = false;
            }
            return true;
        }
        let closes = &self.calls.closes[*closed..];
        match input.begins(closes.iter().copied()) {
            Begins::With(mark) => {
                input.take(closes[mark].len());
                *closed += mark + 1;
                return true;
            }
            Begins::Unclear => return false,
            Begins::Not => {}
        }
        let opens = self.call_marks(out);
        let thinking = self.thinking.filter(|_| in_thinking).map(|thinking| thinking.close);
        if input.breaks_off(closes.iter().chain(&opens).copied().chain(thinking)) {
            input.take(input.text.len());
            return false;
        }
        self.state = match input.begins(opens) {
            Begins::Unclear => return false,
            Begins::With(_) => State::Open { raw: String::new(), in_thinking, in_list: false },
            Begins::Not if self.calls.bare && out.has_room() && input.text.starts_with('{') => {
                let call = Object::new(true).into();
                State::Call { call, raw: String::new(), in_thinking, in_list: false }
            }
            Begins::Not => match thinking {
                // A call ends thinking, whether or not that is said, too.
                Some(close) => match input.begins([close]) {
                    Begins::Unclear => return false,
                    Begins::With(_) => {
                        input.take(close.len());
                        State::Start { thought: true }
                    }
                    Begins::Not => State::Text,
                },
                None => State::Text,
            },
        };
        true
    }

    /// What looked like a call is what it was before.
    fn give_back(&mut self, raw: &str, in_thinking: bool, out: &mut Output) {
        if in_thinking {
            out.thinking(raw);
            self.state = State::Thinking;
        } else {
            out.content(raw);
            self.state = State::Text;
        }
    }
}

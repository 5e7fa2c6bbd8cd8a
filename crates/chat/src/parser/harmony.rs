//! gpt-oss's replies: messages with a channel and, if they are calls, a recipient
//! (openai/harmony, `docs/format.md`).

use super::body::{Call, Named, Outcome};
use super::{Begins, Input, Output};
use crate::format::{Family, is_name};
use crate::limits;

const BEGINS: [&str; 5] = ["<|channel|>", "<|start|>", "<|message|>", " to=", "<|constrain|>"];
const ENDS: [&str; 3] = ["<|end|>", "<|call|>", "<|return|>"];
const MESSAGE: &str = "<|message|>";

/// Where in a reply we are.
#[derive(Debug)]
pub(super) struct Harmony {
    has_tools: bool,
    state: State,
}

#[derive(Debug)]
enum State {
    /// Before a message's header.
    Between,
    Header(String),
    Text(Channel),
    /// Before a call's arguments.
    CallStart(String),
    Call {
        call: Call,
        raw: String,
    },
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Channel {
    Thinking,
    Content,
}

impl Harmony {
    pub(super) fn new(has_tools: bool) -> Self {
        Self { has_tools, state: State::Between }
    }

    pub(super) fn is_thinking(&self) -> bool {
        matches!(self.state, State::Text(Channel::Thinking))
    }

    /// Does one step; whether another one may follow.
    pub(super) fn step(&mut self, input: &mut Input<'_>, out: &mut Output) -> bool {
        match &mut self.state {
            State::Between => self.between(input),
            State::Header(header) => {
                match input.move_up_to(header, [MESSAGE], limits::CALL_HEADER_BYTES) {
                    Some(Some(_)) => {
                        input.take(MESSAGE.len());
                        let header = std::mem::take(header);
                        self.state = self.message(&header, out);
                        true
                    }
                    Some(None) => {
                        // A reply that ends in a header was broken off there. Nobody is to read that.
                        if input.last && !header.starts_with("<|") {
                            out.content(header);
                        }
                        false
                    }
                    None => {
                        out.content(header);
                        self.state = State::Text(Channel::Content);
                        true
                    }
                }
            }
            State::Text(channel) => {
                let channel = *channel;
                self.text(channel, input, out)
            }
            State::CallStart(name) => {
                input.skip_space();
                if input.text.is_empty() {
                    return false;
                }
                self.state = if input.text.starts_with('{') {
                    let call = Named::with_name(Family::Harmony, name).into();
                    State::Call { call, raw: String::new() }
                } else {
                    // Code for a tool of OpenAI's own.
                    State::Text(Channel::Content)
                };
                true
            }
            State::Call { call, raw } => match call.step(input, out, raw) {
                Outcome::More => false,
                Outcome::Done => {
                    self.state = State::Between;
                    true
                }
                Outcome::Broken => {
                    self.state = State::Text(Channel::Content);
                    true
                }
            },
        }
    }

    fn between(&mut self, input: &mut Input<'_>) -> bool {
        if input.text.is_empty() {
            return false;
        }
        self.state = match input.begins(ENDS.into_iter().chain(BEGINS)) {
            Begins::Unclear => return false,
            Begins::With(mark) if mark < ENDS.len() => {
                input.take(ENDS[mark].len());
                State::Between
            }
            Begins::With(_) => State::Header(String::new()),
            Begins::Not => State::Text(Channel::Content),
        };
        true
    }

    /// What a message with this header is.
    fn message(&self, header: &str, out: &Output) -> State {
        let word = |mark: &str| {
            let rest = header.split_once(mark)?.1;
            let end = rest.find(|c: char| c.is_whitespace() || c == '<').unwrap_or(rest.len());
            Some(&rest[..end])
        };
        match (word("to="), word("<|channel|>")) {
            (Some(recipient), _) if self.has_tools && out.has_room() && is_name(recipient) => {
                let name = recipient.strip_prefix("functions.").unwrap_or(recipient);
                State::CallStart(name.into())
            }
            (_, Some("analysis")) => State::Text(Channel::Thinking),
            _ => State::Text(Channel::Content),
        }
    }

    fn text(&mut self, channel: Channel, input: &mut Input<'_>, out: &mut Output) -> bool {
        let marks = ENDS.into_iter().chain(["<|start|>", "<|channel|>"]);
        let (text, mark) = input.before(marks);
        let text = input.take(text.len());
        match channel {
            Channel::Thinking => out.thinking(text),
            Channel::Content => out.content(text),
        }
        if mark.is_some() {
            self.state = State::Between;
        }
        mark.is_some()
    }
}

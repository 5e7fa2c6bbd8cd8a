//! A whole reply, put together from its deltas.

use crate::message::ToolCall;
use crate::parser::Delta;

/// What a model said, all of it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Reply {
    /// What it thought.
    pub thinking: String,
    /// What it answered.
    pub content: String,
    /// What it called. A call that it did not finish is none.
    pub tool_calls: Vec<ToolCall>,
}

impl Extend<Delta> for Reply {
    fn extend<T: IntoIterator<Item = Delta>>(&mut self, deltas: T) {
        for delta in deltas {
            match delta {
                Delta::Thinking(text) => self.thinking += &text,
                Delta::Content(text) => self.content += &text,
                Delta::ToolEnd { call, .. } => self.tool_calls.push(call),
                Delta::ToolStart { .. } | Delta::ToolArguments { .. } => {}
            }
        }
    }
}

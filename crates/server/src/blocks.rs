//! An answer as a list of blocks, one after the other: thinking, text, calls.

use tierstream_chat::Delta;

use crate::ids;

/// A block, as far as it is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Block {
    Thinking(String),
    Text(String),
    /// `arguments` is JSON.
    Call {
        id: String,
        name: String,
        arguments: String,
    },
}

/// What happens to the blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Change {
    /// A block begins, without its text.
    Open { index: usize, block: Block },
    /// More of its text, or of its arguments.
    More { index: usize, text: String },
    /// All of it.
    Close { index: usize, block: Block },
}

/// Makes blocks of what a model says.
#[derive(Debug, Default)]
pub(crate) struct Blocks {
    open: Option<Block>,
    /// Blocks before it.
    closed: usize,
}

impl Blocks {
    pub(crate) fn push(&mut self, delta: Delta) -> Vec<Change> {
        let mut changes = Vec::new();
        match delta {
            Delta::Thinking(text) => {
                if !matches!(self.open, Some(Block::Thinking(_))) {
                    self.begin(Block::Thinking(String::new()), &mut changes);
                }
                self.more(text, &mut changes);
            }
            Delta::Content(text) => {
                if !matches!(self.open, Some(Block::Text(_))) {
                    self.begin(Block::Text(String::new()), &mut changes);
                }
                self.more(text, &mut changes);
            }
            Delta::ToolStart { id, name, .. } => {
                let id = id.unwrap_or_else(|| ids::id("call_"));
                self.begin(Block::Call { id, name, arguments: String::new() }, &mut changes);
            }
            Delta::ToolArguments { json_fragment, .. } => self.more(json_fragment, &mut changes),
            Delta::ToolEnd { .. } => self.close(&mut changes),
        }
        changes
    }

    /// The answer is over.
    pub(crate) fn finish(&mut self) -> Vec<Change> {
        let mut changes = Vec::new();
        self.close(&mut changes);
        changes
    }

    fn begin(&mut self, block: Block, changes: &mut Vec<Change>) {
        self.close(changes);
        changes.push(Change::Open { index: self.closed, block: block.clone() });
        self.open = Some(block);
    }

    fn more(&mut self, more: String, changes: &mut Vec<Change>) {
        if let Some(
            Block::Thinking(text) | Block::Text(text) | Block::Call { arguments: text, .. },
        ) = &mut self.open
        {
            text.push_str(&more);
            changes.push(Change::More { index: self.closed, text: more });
        }
    }

    fn close(&mut self, changes: &mut Vec<Change>) {
        if let Some(block) = self.open.take() {
            changes.push(Change::Close { index: self.closed, block });
            self.closed += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use tierstream_chat::ToolCall;

    use super::*;

    #[test]
    fn blocks_follow_each_other() {
        let call = ToolCall { id: None, name: "f".into(), arguments: serde_json::json!({}) };
        let deltas = [
            Delta::Thinking("a".into()),
            Delta::Thinking("b".into()),
            Delta::Content("c".into()),
            Delta::ToolStart { index: 0, id: Some("i".into()), name: "f".into() },
            Delta::ToolArguments { index: 0, json_fragment: "{".into() },
            Delta::ToolArguments { index: 0, json_fragment: "}".into() },
            Delta::ToolEnd { index: 0, call },
            Delta::Content("d".into()),
        ];
        let mut blocks = Blocks::default();
        let mut changes: Vec<Change> =
            deltas.into_iter().flat_map(|delta| blocks.push(delta)).collect();
        changes.extend(blocks.finish());
        let closed = changes.iter().filter_map(|change| match change {
            Change::Close { index, block } => Some((*index, block.clone())),
            _ => None,
        });
        let closed: Vec<_> = closed.collect();
        let called = Block::Call { id: "i".into(), name: "f".into(), arguments: "{}".into() };
        let wanted = [
            Block::Thinking("ab".into()),
            Block::Text("c".into()),
            called,
            Block::Text("d".into()),
        ];
        assert_eq!(closed, wanted.into_iter().enumerate().collect::<Vec<_>>());
        // What is said of a block lies between its beginning and its end.
        let mut open = None;
        for change in changes {
            match change {
                Change::Open { index, .. } => assert_eq!(open.replace(index), None),
                Change::More { index, .. } => assert_eq!(open, Some(index)),
                Change::Close { index, .. } => assert_eq!(open.take(), Some(index)),
            }
        }
    }
}

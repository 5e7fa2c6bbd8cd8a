//! A reply on stdout, as it comes: what a model thinks apart from its answer, as `ollama run` shows them.

use std::io::{self, IsTerminal};

use tierstream_chat::{Delta, Parser};

use super::output::{self, printable};
use super::wrap::{self, Wrap};

const OPENING: &str = "Thinking...\n";
const CLOSING: &str = "...done thinking.\n\n";

/// The ANSI style of what a model thinks, and that of the lines around it.
const DIM: &str = "2";
const DIM_BOLD: &str = "1;2";

/// How a reply is read, and what is shown of it.
#[derive(Debug, Default)]
pub(crate) struct Manner {
    /// Nothing is printed, for `--json`.
    pub(crate) silent: bool,
    /// What the model thinks is not printed.
    pub(crate) hides_thinking: bool,
    /// What tells thinking from the answer, if anything does.
    pub(crate) parser: Option<Parser>,
}

/// A reply, of which text comes in pieces.
#[derive(Debug)]
pub(crate) struct Reply {
    manner: Manner,
    terminal: bool,
    wrap: Wrap,
    /// Thinking was shown, and its end was not.
    is_open: bool,
    /// The answer so far.
    pub(crate) text: String,
    /// What the model has thought so far.
    pub(crate) thinking: String,
    failed: Option<io::Error>,
}

impl Reply {
    pub(crate) fn new(manner: Manner) -> Self {
        Self {
            manner,
            terminal: io::stdout().is_terminal(),
            wrap: Wrap::default(),
            is_open: false,
            text: String::new(),
            thinking: String::new(),
            failed: None,
        }
    }

    /// Takes text as the model writes it.
    pub(crate) fn push(&mut self, text: &str) {
        let shown = self.read(text);
        self.write(&shown);
    }

    /// Shows what was held back, and ends the line.
    pub(crate) fn finish(&mut self) -> io::Result<()> {
        let shown = self.rest() + "\n";
        self.write(&shown);
        self.failed.take().map_or(Ok(()), Err)
    }

    /// Whether stdout takes no more.
    pub(crate) fn has_failed(&self) -> bool {
        self.failed.is_some()
    }

    /// What is shown of a piece of text.
    fn read(&mut self, text: &str) -> String {
        match &mut self.manner.parser {
            Some(parser) => {
                let deltas = parser.feed(text);
                self.shown(deltas)
            }
            None => self.shown(vec![Delta::Content(text.to_owned())]),
        }
    }

    /// What is shown of text that was held back.
    fn rest(&mut self) -> String {
        let deltas = self.manner.parser.as_mut().map(Parser::finish).unwrap_or_default();
        self.shown(deltas)
    }

    fn shown(&mut self, deltas: Vec<Delta>) -> String {
        let mut shown = String::new();
        for delta in deltas {
            match delta {
                Delta::Thinking(text) if !text.is_empty() => self.think(&text, &mut shown),
                Delta::Content(text) if !text.is_empty() => self.answer(&text, &mut shown),
                // Without tools, nothing is a call.
                _ => {}
            }
        }
        shown
    }

    fn think(&mut self, text: &str, shown: &mut String) {
        self.thinking.push_str(text);
        if self.manner.hides_thinking {
            return;
        }
        if !self.is_open {
            self.is_open = true;
            shown.push_str(&self.laid_out(OPENING, Some(DIM_BOLD)));
        }
        shown.push_str(&self.laid_out(text, Some(DIM)));
    }

    fn answer(&mut self, text: &str, shown: &mut String) {
        self.text.push_str(text);
        if std::mem::take(&mut self.is_open) {
            let line_end = if self.thinking.ends_with('\n') { "" } else { "\n" };
            shown.push_str(&self.laid_out(&format!("{line_end}{CLOSING}"), Some(DIM_BOLD)));
        }
        shown.push_str(&self.laid_out(text, None));
    }

    /// As it is on a terminal, if stdout is one.
    fn laid_out(&mut self, text: &str, style: Option<&str>) -> String {
        if !self.terminal {
            return text.to_owned();
        }
        // The width each time: a user may change it while the text comes.
        let text = match wrap::columns(io::stdout()) {
            Some(columns) => self.wrap.push(&printable(text), columns),
            None => printable(text),
        };
        match style {
            Some(style) => output::styled_for(&io::stdout(), style, &text),
            None => text,
        }
    }

    fn write(&mut self, text: &str) {
        if !self.manner.silent && !text.is_empty() && self.failed.is_none() {
            self.failed = output::write(text).err();
        }
    }
}

#[cfg(test)]
mod tests {
    use tierstream_chat::Template;

    use super::*;

    /// What is shown of a text that comes in pieces of so many characters, and the reply that it is.
    fn read(text: &str, len: usize, hides_thinking: bool) -> (String, Reply) {
        let template = Template::jinja("<think></think>", "", "").unwrap();
        let parser = Some(Parser::new(&template.format(), &[], true));
        let mut reply = Reply::new(Manner { silent: true, hides_thinking, parser });
        reply.terminal = false;
        let all: Vec<char> = text.chars().collect();
        let mut shown: String =
            all.chunks(len).map(|piece| reply.read(&piece.iter().collect::<String>())).collect();
        shown.push_str(&reply.rest());
        (shown, reply)
    }

    #[test]
    fn thinking_is_shown_as_ollama_shows_it() {
        for len in [1, 3, 100] {
            let (shown, reply) = read("Is it?\n</think>\n\nYes.", len, false);
            assert_eq!(shown, "Thinking...\nIs it?\n...done thinking.\n\nYes.");
            assert_eq!((&*reply.thinking, &*reply.text), ("Is it?", "Yes."));
            let (shown, reply) = read("Is it?\n</think>\n\nYes.", len, true);
            assert_eq!((&*shown, &*reply.thinking), ("Yes.", "Is it?"));
            // It did not come to an answer, or did not think.
            assert_eq!(read("Is it", len, false).0, "Thinking...\nIs it");
            assert_eq!(read("</think>Yes.", len, false).0, "Yes.");
        }
    }
}

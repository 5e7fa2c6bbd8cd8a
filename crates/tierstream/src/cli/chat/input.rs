//! The lines of a chat, from a terminal.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::path::PathBuf;

use rustix::termios::{self, LocalModes, OptionalActions, SpecialCodeIndex};
use rustyline::completion::Completer;
use rustyline::config::Configurer;
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::DefaultHistory;
use rustyline::validate::{ValidationContext, ValidationResult, Validator};
use rustyline::{Config, Editor, Helper};
use tierstream::cache;

use super::words::{COMMANDS, goes_on};
use crate::cli::output;

/// Lines that are remembered.
const HISTORY_LINES: usize = 1000;

const PROMPT: &str = ">>> ";

/// The values of TERM with which rustyline does not edit.
const PLAIN_TERMS: [&str; 3] = ["dumb", "cons25", "emacs"];

/// What the kernel keeps of a Ctrl-D typed while nobody reads.
const CTRL_D: char = '\0';

/// Reads what the user types, also while nobody reads.
pub(super) struct Input {
    editor: Editor<LineHelper, DefaultHistory>,
    history: Option<PathBuf>,
    /// The terminal can do what editing takes; otherwise the editor reads plain lines, and forgets
    /// nothing.
    edits: bool,
    ahead: Ahead,
}

impl Input {
    pub(super) fn new() -> anyhow::Result<Self> {
        let mut editor = editor()?;
        let history = history_file();
        if let Some(path) = &history {
            // There is none the first time.
            let _ = editor.load_history(path);
        }
        let plain = |term: &str| PLAIN_TERMS.iter().any(|t| t.eq_ignore_ascii_case(term));
        let edits = !std::env::var("TERM").is_ok_and(|term| plain(&term));
        Ok(Self { editor, history, edits, ahead: Ahead::default() })
    }

    /// The next line; several of them where the first ones say that they go on.
    pub(super) fn next(&mut self) -> rustyline::Result<String> {
        let line = self.read()?;
        if !line.trim().is_empty() {
            self.editor.add_history_entry(line.as_str())?;
            // After each line, since a terminal may be closed at any time. A chat without a
            // history is better than none.
            if let Some(path) = &self.history {
                let _ = self.editor.append_history(path);
            }
        }
        Ok(line)
    }

    /// The editor forgets what it has read beyond the end of a line: what was typed before it reads
    /// is taken out of its way.
    fn read(&mut self) -> rustyline::Result<String> {
        if self.edits && self.ahead.lines.is_empty() {
            self.ahead.take(&typed_ahead()?);
        }
        match self.ahead.lines.pop_front() {
            Some(Typed::End) => Err(ReadlineError::Eof),
            Some(Typed::Line(line)) => {
                output::stderr(&format!("{PROMPT}{}", output::printable(&line)));
                Ok(line)
            }
            None => {
                let begun = std::mem::take(&mut self.ahead.begun);
                self.editor.readline_with_initial(PROMPT, (&begun, ""))
            }
        }
    }
}

#[derive(Debug, PartialEq)]
enum Typed {
    Line(String),
    /// Ctrl-D.
    End,
}

/// What was typed while nobody read.
#[derive(Debug, Default)]
struct Ahead {
    lines: VecDeque<Typed>,
    /// A line that has no end yet.
    begun: String,
}

impl Ahead {
    fn take(&mut self, text: &str) {
        for c in text.chars() {
            match c {
                // Enter is the one while the editor reads, and the other while nobody does.
                '\r' | '\n' if goes_on(&self.begun) => self.begun.push('\n'),
                '\r' | '\n' => {
                    self.lines.push_back(Typed::Line(std::mem::take(&mut self.begun)));
                }
                CTRL_D if self.begun.is_empty() => self.lines.push_back(Typed::End),
                '\t' => self.begun.push(c),
                c if c.is_control() => {}
                c => self.begun.push(c),
            }
        }
    }
}

/// All that waits in the terminal, without waiting for more.
fn typed_ahead() -> io::Result<String> {
    let stdin = io::stdin();
    let Ok(usual) = termios::tcgetattr(&stdin) else {
        return Ok(String::new());
    };
    let mut at_once = usual.clone();
    at_once.local_modes.remove(LocalModes::ICANON);
    at_once.special_codes[SpecialCodeIndex::VMIN] = 0;
    at_once.special_codes[SpecialCodeIndex::VTIME] = 0;
    termios::tcsetattr(&stdin, OptionalActions::Now, &at_once)?;
    let mut bytes = Vec::new();
    let read = stdin.lock().read_to_end(&mut bytes);
    termios::tcsetattr(&stdin, OptionalActions::Now, &usual)?;
    read?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn editor() -> anyhow::Result<Editor<LineHelper, DefaultHistory>> {
    let mut editor = Editor::with_config(Config::builder().build())?;
    editor.set_max_history_size(HISTORY_LINES)?;
    editor.set_helper(Some(LineHelper));
    Ok(editor)
}

/// `None` where there can be none.
fn history_file() -> Option<PathBuf> {
    let dir = cache::dir()?;
    std::fs::create_dir_all(&dir).ok()?;
    Some(dir.join("history"))
}

/// Multi-line editing and completion of commands.
struct LineHelper;

impl Helper for LineHelper {}
impl Highlighter for LineHelper {}

impl Hinter for LineHelper {
    type Hint = String;
}

impl Validator for LineHelper {
    fn validate(&self, ctx: &mut ValidationContext<'_>) -> rustyline::Result<ValidationResult> {
        let more = goes_on(ctx.input());
        Ok(if more { ValidationResult::Incomplete } else { ValidationResult::Valid(None) })
    }
}

impl Completer for LineHelper {
    type Candidate = String;

    fn complete(
        &self,
        line: &str,
        pos: usize,
        _: &rustyline::Context<'_>,
    ) -> rustyline::Result<(usize, Vec<String>)> {
        let typed = line.get(..pos).filter(|t| t.starts_with('/'));
        let fits = |c: &&&str| typed.is_some_and(|t| c.starts_with(t));
        Ok((0, COMMANDS.iter().filter(fits).map(|c| (*c).to_owned()).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::{Ahead, Typed};

    #[test]
    fn lines_typed_ahead_keep_their_order_and_their_rest() {
        let mut ahead = Ahead::default();
        ahead.take("one\n/set n 5\rtwo \\\nthree\n\"\"\"a\n/bye\n\"\"\"\nhal\x1b");
        ahead.take("f\n\0rest");
        let lines = ["one", "/set n 5", "two \\\nthree", "\"\"\"a\n/bye\n\"\"\"", "half"];
        let mut all: Vec<_> = lines.map(|l| Typed::Line(l.to_owned())).into();
        all.push(Typed::End);
        assert_eq!(ahead.lines, all);
        assert_eq!(ahead.begun, "rest");
    }
}

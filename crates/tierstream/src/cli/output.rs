//! What every verb writes with: text and JSON on stdout, all else on stderr; errors with hints.

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::path::Path;

use anyhow::Context;
use serde::Serialize;
use tierstream::Token;

pub(crate) use super::progress::Progress;
use super::reply::{Manner, Reply};
use super::wrap;

const NOT_WRITTEN: &str = "cannot write to standard output";

/// An error of the program's own, with what a user can do about it.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Failure {
    message: String,
    hint: String,
}

impl Failure {
    pub(crate) fn error(message: impl Display, hint: impl Display) -> anyhow::Error {
        Self { message: message.to_string(), hint: hint.to_string() }.into()
    }
}

/// The answer of a verb that failed, with `--json`.
#[derive(Debug, Serialize)]
struct JsonError {
    error: String,
    hint: Option<String>,
}

/// Prints `text` on stdout, as it is.
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    write(text).context(NOT_WRITTEN)
}

/// Writes `text` to stdout, as it is.
pub(crate) fn write(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// Prints the one object of a verb with `--json`.
pub(crate) fn json(value: &impl Serialize) -> anyhow::Result<()> {
    let mut text = serde_json::to_string_pretty(value)?;
    text.push('\n');
    print(&text)
}

/// Prints a note on stderr.
pub(crate) fn note(text: impl Display) {
    stderr(&format!("note: {}", printable(&text.to_string())));
}

/// Prints a line on stderr in an ANSI style, broken at words on a terminal.
pub(crate) fn status(style: &str, line: &str) {
    let line = match wrap::columns(io::stderr()) {
        Some(columns) => wrap::broken(line, columns),
        None => line.to_owned(),
    };
    stderr(&styled(style, &line));
}

/// Prints a line on stderr. Nobody is left to tell when that is closed.
pub(crate) fn stderr(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// Tells of an error: one line for it and its causes, one for the hint; or the JSON object.
pub(crate) fn report(error: &anyhow::Error, json: bool) {
    let hint = error
        .downcast_ref::<tierstream::Error>()
        .and_then(|e| e.hint())
        .or_else(|| error.downcast_ref::<tierstream_store::Error>().and_then(|e| e.hint()))
        .or_else(|| error.downcast_ref::<tierstream_pull::Error>().and_then(|e| e.hint()))
        .or_else(|| {
            let error = error.downcast_ref::<tierstream_eval::Error>();
            error.and_then(|e| e.hint()).map(str::to_owned)
        })
        .or_else(|| error.downcast_ref::<Failure>().map(|f| f.hint.clone()));
    // Where stdout takes nothing, stderr may.
    if json && self::json(&JsonError { error: told(error), hint: hint.clone() }).is_ok() {
        return;
    }
    stderr(&format!("{} {}", styled("1;31", "error:"), printable(&told(error))));
    if let Some(hint) = hint {
        stderr(&format!("{} {}", styled("1;36", "hint:"), printable(&hint)));
    }
}

/// The error and its causes, but for those that the one before has told already.
fn told(error: &anyhow::Error) -> String {
    let mut told = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if told.is_empty() {
            told = cause;
        } else if !told.ends_with(&cause) {
            told.push_str(": ");
            told.push_str(&cause);
        }
    }
    told
}

/// Refuses to write over what is read.
pub(crate) fn check_other(input: &Path, output: &Path) -> anyhow::Result<()> {
    let is_same = match (input.canonicalize(), output.canonicalize()) {
        (Ok(input), Ok(output)) => input == output,
        _ => false,
    };
    if is_same {
        let message = format!("{} is what is read", output.display());
        return Err(Failure::error(message, "name another file to write to"));
    }
    Ok(())
}

/// Whether the error is that of a reader who has seen enough, as `head` has.
pub(crate) fn is_closed_pipe(error: &anyhow::Error) -> bool {
    let io = error.chain().filter_map(|e| e.downcast_ref::<io::Error>());
    io.into_iter().any(|e| e.kind() == io::ErrorKind::BrokenPipe)
}

/// `text` in an ANSI style, for stderr; plain where that is no terminal or colour is not wanted.
pub(crate) fn styled(style: &str, text: &str) -> String {
    styled_for(&io::stderr(), style, text)
}

/// The same for what is written there.
pub(crate) fn styled_for(there: &impl IsTerminal, style: &str, text: &str) -> String {
    let wanted = std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
        && std::env::var_os("TERM").is_none_or(|v| v != "dumb");
    if wanted && there.is_terminal() {
        format!("\x1b[{style}m{text}\x1b[0m")
    } else {
        text.to_owned()
    }
}

/// What a terminal may get of a text from a file: no control characters, which could move its
/// cursor or write its title.
pub(crate) fn printable(text: &str) -> String {
    let keep = |c: char| !c.is_control() || c == '\n' || c == '\t';
    text.chars().map(|c| if keep(c) { c } else { '\u{fffd}' }).collect()
}

/// Bytes per second as drives are sold: `2.51 GB/s`.
pub(crate) fn rate(bytes_per_s: f64) -> String {
    format!("{:.2} GB/s", bytes_per_s / 1e9)
}

/// A time to wait, in words.
pub(crate) fn rough(seconds: f64) -> String {
    match seconds.round() as u64 {
        s @ 0..100 => format!("{s} s"),
        s @ 100..6000 => format!("{} min", s.div_ceil(60)),
        s => format!("{:.1} h", s as f64 / 3600.0),
    }
}

/// Lines of cells, the first with titles, in columns. No cell breaks its line.
pub(crate) fn table<const N: usize>(lines: Vec<[String; N]>) -> String {
    let cell = |cell: String| printable(&cell).replace(['\n', '\t'], " ");
    let lines: Vec<[String; N]> = lines.into_iter().map(|line| line.map(cell)).collect();
    let widths: [usize; N] = std::array::from_fn(|column| {
        lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0)
    });
    let mut text = String::new();
    for line in &lines {
        let padded = line.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        text.push_str(padded.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// Joins the bytes of tokens into characters.
#[derive(Debug, Default)]
pub(crate) struct Utf8 {
    held: Vec<u8>,
}

impl Utf8 {
    /// Takes bytes and gives the characters that are complete; those that are none become U+FFFD.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> String {
        self.held.extend_from_slice(bytes);
        let mut text = String::new();
        loop {
            let (valid, skip) = match std::str::from_utf8(&self.held) {
                Ok(_) => (self.held.len(), None),
                Err(e) => (e.valid_up_to(), e.error_len()),
            };
            text.push_str(&String::from_utf8_lossy(&self.held[..valid]));
            self.held.drain(..valid + skip.unwrap_or(0));
            if skip.is_none() {
                return text;
            }
            text.push('\u{fffd}');
        }
    }

    /// What is left: a character that never became complete.
    pub(crate) fn finish(&mut self) -> String {
        let rest = String::from_utf8_lossy(&self.held).into_owned();
        self.held.clear();
        rest
    }
}

/// Finds the texts that end a generation, also where they span tokens.
#[derive(Debug, Default)]
struct Stops {
    texts: Vec<String>,
    /// What may be the beginning of one of them.
    held: String,
    found: bool,
}

impl Stops {
    fn new(texts: &[String]) -> Self {
        let texts = texts.iter().filter(|text| !text.is_empty()).cloned().collect();
        Self { texts, ..Self::default() }
    }

    /// Takes text and gives what surely stands before all stop texts.
    fn push(&mut self, text: &str) -> String {
        if self.found {
            return String::new();
        }
        self.held.push_str(text);
        let first = self.texts.iter().filter_map(|stop| self.held.find(stop.as_str())).min();
        self.found = first.is_some();
        let rest = self.held.split_off(first.unwrap_or_else(|| self.sure()));
        std::mem::replace(&mut self.held, rest)
    }

    /// Bytes before what may be the beginning of a stop text.
    fn sure(&self) -> usize {
        let held = &self.held;
        let begins = |at: &usize| self.texts.iter().any(|stop| stop.starts_with(&held[*at..]));
        held.char_indices().map(|(at, _)| at).find(begins).unwrap_or(held.len())
    }

    /// What is left: the beginning of a stop text that never became whole.
    fn finish(&mut self) -> String {
        if self.found { String::new() } else { std::mem::take(&mut self.held) }
    }
}

/// Writes generated tokens to stdout as they come: text, or ids where there is no tokenizer.
#[derive(Debug)]
pub(crate) struct Tokens {
    has_text: bool,
    utf8: Utf8,
    stops: Stops,
    pub(crate) reply: Reply,
    /// All text so far as the model wrote it, without what may be the beginning of a stop text.
    pub(crate) raw: String,
    has_ids: bool,
}

impl Tokens {
    /// Of models with text, the output ends before the first of `stops`.
    pub(crate) fn new(has_text: bool, stops: &[String], manner: Manner) -> Self {
        Self {
            has_text,
            utf8: Utf8::default(),
            stops: Stops::new(stops),
            reply: Reply::new(manner),
            raw: String::new(),
            has_ids: false,
        }
    }

    /// False when a stop text has come, or stdout takes no more.
    #[must_use]
    pub(crate) fn push(&mut self, token: Token, bytes: &[u8]) -> bool {
        if self.has_text {
            let text = self.stops.push(&self.utf8.push(bytes));
            self.write(&text);
        } else {
            let space = if self.has_ids { " " } else { "" };
            self.has_ids = true;
            self.reply.push(&format!("{space}{token}"));
        }
        !self.reply.has_failed() && !self.stopped()
    }

    /// Whether a stop text has come.
    pub(crate) fn stopped(&self) -> bool {
        self.stops.found
    }

    fn write(&mut self, text: &str) {
        self.raw.push_str(text);
        self.reply.push(text);
    }

    /// Writes what is held back and ends the line.
    pub(crate) fn finish(&mut self) -> anyhow::Result<()> {
        let rest = self.stops.push(&self.utf8.finish()) + &self.stops.finish();
        self.write(&rest);
        self.reply.finish().context(NOT_WRITTEN)
    }
}

#[cfg(test)]
mod tests {
    use super::{Stops, Utf8, printable, rough, table};

    #[test]
    fn characters_are_held_back_until_complete() {
        let mut utf8 = Utf8::default();
        let bytes = "aé→😀b".as_bytes();
        for split in 1..=4 {
            let mut text = String::new();
            for piece in bytes.chunks(split) {
                let new = utf8.push(piece);
                assert!(!new.contains('\u{fffd}'), "{new:?}");
                text.push_str(&new);
            }
            assert_eq!(text, "aé→😀b");
            assert_eq!(utf8.finish(), "");
        }
    }

    #[test]
    fn what_is_no_character_is_replaced() {
        let mut utf8 = Utf8::default();
        assert_eq!(utf8.push(b"a\xff\xfeb\xe2\x82"), "a\u{fffd}\u{fffd}b");
        assert_eq!(utf8.push(b"c"), "\u{fffd}c");
        assert_eq!(utf8.push(b"\xf0\x9f"), "");
        assert_eq!(utf8.finish(), "\u{fffd}");
        assert_eq!(utf8.finish(), "");
    }

    #[test]
    fn stop_texts_are_found_across_pieces() {
        let all = "One. Two.\n\nUser: three";
        for (stops, kept) in [
            (&["\n\n", "User:"][..], "One. Two."),
            (&["User: ", "Two!"], "One. Two.\n\n"),
            (&["threes", "One.."], all),
            (&["e", "ne"], "O"),
            (&["One"], ""),
            (&[], all),
        ] {
            for len in [1, 2, 3, 100] {
                let mut found =
                    Stops::new(&stops.iter().map(|s| s.to_string()).collect::<Vec<_>>());
                let mut text = String::new();
                for piece in all.as_bytes().chunks(len) {
                    text.push_str(&found.push(std::str::from_utf8(piece).unwrap()));
                }
                text.push_str(&found.finish());
                assert_eq!(text, kept, "{stops:?} {len}");
                assert_eq!(found.found, kept != all);
            }
        }
    }

    #[test]
    fn times_are_told_in_words() {
        for (seconds, text) in [(0.4, "0 s"), (99.0, "99 s"), (121.0, "3 min"), (9000.0, "2.5 h")] {
            assert_eq!(rough(seconds), text);
        }
    }

    #[test]
    fn columns_are_as_wide_as_their_cells() {
        let line = |cells: [&str; 2]| cells.map(str::to_owned);
        let lines = vec![line(["NAME", "SIZE"]), line(["longer", ""]), line(["é", "a\nb"])];
        assert_eq!(table(lines), "NAME    SIZE\nlonger\né       a b\n");
    }

    #[test]
    fn terminals_get_no_control_characters() {
        assert_eq!(printable("a\x1b]0;t\x07\n\tb\u{9b}"), "a\u{fffd}]0;t\u{fffd}\n\tb\u{fffd}");
    }
}

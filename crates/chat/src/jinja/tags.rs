//! What is looked at, and changed, in a template's text before it is read.

use std::borrow::Cow;

use crate::error::{Error, Result};
use crate::limits;

/// The text as minijinja is to have it: lines end as jinja2 ends them, `{% generation %}`, which marks what
/// transformers trains on, is a block that says nothing, and a line's end behind `{% raw %}` stays, as in
/// jinja2.
///
/// # Errors
///
/// If tags are so long that minijinja would go too deep: it limits what is nested, but a chain of operators
/// makes as deep a tree.
pub(super) fn prepared(source: &str) -> Result<String> {
    let source = with_plain_lines(source);
    let mut out = String::with_capacity(source.len());
    let mut alternatives = 0;
    let mut pieces = Pieces { rest: &source, is_raw: false };
    while let Some(Piece { text, words, is_block }) = pieces.next() {
        let name = if is_block { name(text) } else { "" };
        alternatives += usize::from(name.split_whitespace().next() == Some("elif"));
        if words > limits::JINJA_TAG_WORDS || alternatives > limits::JINJA_ALTERNATIVES {
            let before = &source[..source.len() - pieces.rest.len() - text.len()];
            let line = before.matches('\n').count() + 1;
            return Err(Error::Syntax { line, reason: "too many words in a tag".into() });
        }
        match name {
            "generation" => out += &text.replace("generation", "if true"),
            "endgeneration" => out += &text.replace("endgeneration", "endif"),
            "raw" => {
                out += text;
                let trims = !text.ends_with("-%}") && !text.ends_with("+%}");
                out += if trims && pieces.rest.starts_with('\n') { "\n" } else { "" };
            }
            _ => out += text,
        }
    }
    Ok(out)
}

fn with_plain_lines(source: &str) -> Cow<'_, str> {
    if source.contains('\r') {
        source.replace("\r\n", "\n").replace('\r', "\n").into()
    } else {
        source.into()
    }
}

/// Text, a comment, or a tag.
struct Piece<'s> {
    text: &'s str,
    /// Of a tag: names, texts, numbers, and each letter of operators.
    words: usize,
    is_block: bool,
}

struct Pieces<'s> {
    rest: &'s str,
    is_raw: bool,
}

impl<'s> Pieces<'s> {
    fn next(&mut self) -> Option<Piece<'s>> {
        if self.rest.is_empty() {
            return None;
        }
        if std::mem::take(&mut self.is_raw) {
            return Some(self.take(end_of_raw(self.rest), 0, false));
        }
        let starts = self.rest.match_indices('{').map(|(at, _)| at);
        let mut starts = starts.filter(|at| self.rest[at + 1..].starts_with(['{', '%', '#']));
        let start = starts.next().unwrap_or(self.rest.len());
        if start > 0 {
            return Some(self.take(start, 0, false));
        }
        let inner = &self.rest[2..];
        let piece = match self.rest.as_bytes()[1] {
            b'#' => {
                let end = inner.find("#}").map_or(inner.len(), |end| end + 2);
                return Some(self.take(end + 2, 0, false));
            }
            b'%' => {
                let (end, words) = end_of_tag(inner, "%}");
                self.take(end + 2, words, true)
            }
            _ => {
                let (end, words) = end_of_tag(inner, "}}");
                self.take(end + 2, words, false)
            }
        };
        self.is_raw = piece.is_block && name(piece.text) == "raw";
        Some(piece)
    }

    fn take(&mut self, bytes: usize, words: usize, is_block: bool) -> Piece<'s> {
        let (text, rest) = self.rest.split_at(bytes);
        self.rest = rest;
        Piece { text, words, is_block }
    }
}

/// Where a tag ends, and its words: strings are one, and in parentheses is no end.
fn end_of_tag(inner: &str, close: &str) -> (usize, usize) {
    let bytes = inner.as_bytes();
    let (mut at, mut words, mut depth) = (0, 0, 0_i64);
    while at < bytes.len() {
        if depth == 0 && inner.as_bytes()[at..].starts_with(close.as_bytes()) {
            return (at + close.len(), words);
        }
        let is_word = |b: &u8| b.is_ascii_alphanumeric() || *b == b'_' || !b.is_ascii();
        let length = match bytes[at] {
            b if b.is_ascii_whitespace() => {
                at += 1;
                continue;
            }
            quote @ (b'"' | b'\'') => string_length(&bytes[at..], quote),
            b if is_word(&b) => bytes[at..].iter().take_while(|b| is_word(b)).count(),
            b => {
                depth += match b {
                    b'(' | b'[' | b'{' => 1,
                    b')' | b']' | b'}' => -1,
                    _ => 0,
                };
                1
            }
        };
        at += length;
        words += 1;
    }
    (inner.len(), words)
}

fn string_length(bytes: &[u8], quote: u8) -> usize {
    let mut escaped = false;
    for (at, &b) in bytes.iter().enumerate().skip(1) {
        match b {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b if b == quote => return at + 1,
            _ => {}
        }
    }
    bytes.len()
}

/// What stands in a tag.
fn name(tag: &str) -> &str {
    let inner = tag.strip_prefix("{%").unwrap_or(tag);
    inner.strip_suffix("%}").unwrap_or(inner).trim_matches(['-', '+']).trim()
}

/// Where the tag begins that ends raw text.
fn end_of_raw(text: &str) -> usize {
    let mut starts = text.match_indices("{%").map(|(at, _)| at);
    let is_end = |at: &usize| {
        let inner = text[at + 2..].trim_start_matches(['-', '+']).trim_start();
        inner.starts_with("endraw")
    };
    starts.find(is_end).unwrap_or(text.len())
}

//! The text of a Go template to its pieces: text, and the words of its actions.

use crate::error::{Error, Result};

/// A piece of a template.
#[derive(Debug, PartialEq)]
pub(super) enum Piece {
    Text(String),
    Action { words: Vec<Word>, line: usize },
}

/// A word of an action.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Word {
    pub(super) kind: Kind,
    /// Whether nothing stands between it and the word before.
    pub(super) joined: bool,
}

/// What a word is.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Kind {
    /// `.`
    Dot,
    /// `.Name`
    Field(String),
    /// `$` or `$name`, with the dollar.
    Variable(String),
    /// A function, a keyword, `true`, `false`, `nil`.
    Name(String),
    Text(String),
    Int(i64),
    Float(f64),
    Open,
    Close,
    Pipe,
    Comma,
    /// `:=`
    Declare,
    /// `=`
    Assign,
}

/// All pieces of a template, with white space trimmed where its markers say so.
pub(super) fn pieces(source: &str) -> Result<Vec<Piece>> {
    let mut pieces = Vec::new();
    let mut rest = source;
    let mut trims = false;
    loop {
        let (mut text, action) = match rest.find("{{") {
            Some(at) => (&rest[..at], Some(&rest[at + 2..])),
            None => (rest, None),
        };
        if trims {
            text = text.trim_start_matches(is_space);
        }
        let Some(action) = action else {
            push_text(&mut pieces, text);
            return Ok(pieces);
        };
        let line = line_of(source, action);
        let body = match action.strip_prefix('-') {
            Some(body) if body.starts_with(is_space) => {
                text = text.trim_end_matches(is_space);
                body
            }
            _ => action,
        };
        push_text(&mut pieces, text);
        let (words, after, trims_next) = action_words(body, line)?;
        if let Some(words) = words {
            pieces.push(Piece::Action { words, line });
        }
        rest = after;
        trims = trims_next;
    }
}

fn push_text(pieces: &mut Vec<Piece>, text: &str) {
    if !text.is_empty() {
        pieces.push(Piece::Text(text.into()));
    }
}

fn line_of(source: &str, rest: &str) -> usize {
    source[..source.len() - rest.len()].matches('\n').count() + 1
}

fn is_space(c: char) -> bool {
    matches!(c, ' ' | '\t' | '\r' | '\n')
}

type Words<'a> = (Option<Vec<Word>>, &'a str, bool);

/// The words of one action, what comes after it, and whether white space there is trimmed. A comment has
/// no words.
fn action_words(body: &str, line: usize) -> Result<Words<'_>> {
    let failed = |reason: &str| Error::Syntax { line, reason: reason.into() };
    let trimmed = body.trim_start_matches(is_space);
    if let Some(comment) = trimmed.strip_prefix("/*") {
        let end = comment.find("*/").ok_or_else(|| failed("a comment has no end"))?;
        let (after, trims) =
            action_end(&comment[end + 2..]).ok_or_else(|| failed("something follows a comment"))?;
        return Ok((None, after, trims));
    }
    let mut words = Vec::new();
    let mut rest = body;
    loop {
        if let Some((after, trims)) = action_end(rest) {
            return Ok((Some(words), after, trims));
        }
        let next = rest.trim_start_matches(is_space);
        let joined = next.len() == rest.len();
        if next.is_empty() {
            return Err(failed("an action has no end"));
        }
        let (kind, length) = word(next).map_err(|reason| failed(&reason))?;
        words.push(Word { kind, joined });
        rest = &next[length..];
    }
}

/// What follows the end of an action, if `rest` begins with it.
fn action_end(rest: &str) -> Option<(&str, bool)> {
    let next = rest.trim_start_matches(is_space);
    if next.len() < rest.len()
        && let Some(after) = next.strip_prefix("-}}")
    {
        return Some((after, true));
    }
    next.strip_prefix("}}").map(|after| (after, false))
}

/// The word that `rest` begins with, and its length.
fn word(rest: &str) -> std::result::Result<(Kind, usize), String> {
    let name = |from: usize| {
        let tail = &rest[from..];
        from + tail.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(tail.len())
    };
    let mut chars = rest.chars();
    let first = chars.next().unwrap_or_default();
    let second = chars.next().unwrap_or_default();
    Ok(match first {
        '(' => (Kind::Open, 1),
        ')' => (Kind::Close, 1),
        '|' => (Kind::Pipe, 1),
        ',' => (Kind::Comma, 1),
        ':' if second == '=' => (Kind::Declare, 2),
        '=' => (Kind::Assign, 1),
        '.' if second.is_alphabetic() || second == '_' => {
            let end = name(1);
            (Kind::Field(rest[1..end].into()), end)
        }
        '.' if !second.is_ascii_digit() => (Kind::Dot, 1),
        '$' => {
            let end = name(1);
            (Kind::Variable(rest[..end].into()), end)
        }
        '"' => quoted(rest)?,
        '`' => {
            let end = rest[1..].find('`').ok_or("a raw string has no end")? + 1;
            (Kind::Text(rest[1..end].into()), end + 1)
        }
        '\'' => {
            let (kind, length) = quoted(rest)?;
            let Kind::Text(text) = kind else { return Err("a character is malformed".into()) };
            let mut chars = text.chars();
            match (chars.next(), chars.next()) {
                (Some(c), None) => (Kind::Int(u32::from(c).into()), length),
                _ => return Err("a character constant is not one character".into()),
            }
        }
        c if c.is_ascii_digit() || matches!(c, '-' | '+' | '.') => number(rest)?,
        c if c.is_alphabetic() || c == '_' => {
            let end = name(0);
            (Kind::Name(rest[..end].into()), end)
        }
        c => return Err(format!("{c:?} is unexpected")),
    })
}

fn number(rest: &str) -> std::result::Result<(Kind, usize), String> {
    let end = rest
        .find(|c: char| !(c.is_ascii_alphanumeric() || matches!(c, '.' | '+' | '-' | '_')))
        .unwrap_or(rest.len());
    let text = rest[..end].replace('_', "");
    if let Ok(int) = text.parse() {
        Ok((Kind::Int(int), end))
    } else if let Some(int) = text.strip_prefix("0x").and_then(|x| i64::from_str_radix(x, 16).ok())
    {
        Ok((Kind::Int(int), end))
    } else {
        let float: f64 = text.parse().map_err(|_| format!("{text:?} is no number"))?;
        Ok((Kind::Float(float), end))
    }
}

/// A string in the quotes that `rest` begins with, and its length with both.
fn quoted(rest: &str) -> std::result::Result<(Kind, usize), String> {
    let quote = rest.chars().next().unwrap_or_default();
    let mut text = String::new();
    let mut chars = rest.char_indices().skip(1);
    while let Some((at, c)) = chars.next() {
        match c {
            c if c == quote => return Ok((Kind::Text(text), at + 1)),
            '\n' => break,
            '\\' => {
                let (_, escaped) = chars.next().ok_or("a string has no end")?;
                let digits = match escaped {
                    'x' => 2,
                    'u' => 4,
                    'U' => 8,
                    _ => 0,
                };
                if digits > 0 {
                    let hex: String = chars.by_ref().take(digits).map(|(_, c)| c).collect();
                    let code = u32::from_str_radix(&hex, 16).ok().and_then(char::from_u32);
                    text.push(code.ok_or_else(|| format!("\\{escaped}{hex} is no character"))?);
                    continue;
                }
                text.push(match escaped {
                    'n' => '\n',
                    't' => '\t',
                    'r' => '\r',
                    'a' => '\u{7}',
                    'b' => '\u{8}',
                    'f' => '\u{c}',
                    'v' => '\u{b}',
                    '0' => '\0',
                    '\\' | '"' | '\'' => escaped,
                    c => return Err(format!("\\{c} is unknown in a string")),
                });
            }
            c => text.push(c),
        }
    }
    Err("a string has no end".into())
}

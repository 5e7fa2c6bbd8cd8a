//! Whether text that comes letter by letter is JSON so far.

use crate::limits;

/// What the letters say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// It belongs to the value, which is not at its end.
    More,
    /// It is the last one of the value.
    Done,
    /// It cannot be there.
    Invalid,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Value,
    /// After `[`.
    FirstItem,
    /// After `{`.
    FirstKey,
    Key,
    Colon,
    AfterItem,
    Text,
    Escape,
    /// So many digits of `\u` are missing.
    Hex(u8),
    /// The letters that have to follow.
    Word(&'static str),
    Sign,
    Zero,
    Digits,
    Point,
    Fraction,
    Exponent,
    ExponentSign,
    ExponentDigits,
}

/// One value: an object, a list, or a string. Numbers and words have no end of their own, and are only
/// read inside of these.
#[derive(Debug)]
pub(super) struct Scanner {
    state: State,
    /// Whether the open containers are objects, inner ones last.
    open: Vec<bool>,
    /// Whether the string that is read is a key.
    is_key: bool,
}

impl Scanner {
    pub(super) fn new() -> Self {
        Self { state: State::Value, open: Vec::new(), is_key: false }
    }

    /// Reads one letter.
    pub(super) fn push(&mut self, c: char) -> Step {
        match self.next(c) {
            Some(_) if self.open.is_empty() && self.state == State::AfterItem => Step::Done,
            Some(()) => Step::More,
            None => Step::Invalid,
        }
    }

    fn next(&mut self, c: char) -> Option<()> {
        let is_space = matches!(c, ' ' | '\t' | '\r' | '\n');
        self.state = match (self.state, c) {
            (State::Text, '"') if self.is_key => State::Colon,
            (State::Text, '"') => State::AfterItem,
            (State::Text, '\\') => State::Escape,
            (State::Text, c) if c >= ' ' => State::Text,
            (State::Escape, 'u') => State::Hex(4),
            (State::Escape, '"' | '\\' | '/' | 'b' | 'f' | 'n' | 'r' | 't') => State::Text,
            (State::Hex(1), c) if c.is_ascii_hexdigit() => State::Text,
            (State::Hex(left), c) if c.is_ascii_hexdigit() => State::Hex(left - 1),
            (State::Word(word), c) => {
                let rest = word.strip_prefix(c)?;
                if rest.is_empty() { State::AfterItem } else { State::Word(rest) }
            }
            (
                state @ (State::Value
                | State::FirstItem
                | State::FirstKey
                | State::Key
                | State::Colon),
                _,
            ) if is_space => state,
            (State::FirstKey, '}') | (State::FirstItem, ']') => return self.close(),
            (State::FirstKey | State::Key, '"') => {
                self.is_key = true;
                State::Text
            }
            (State::Colon, ':') => State::Value,
            (State::Value | State::FirstItem, c) => return self.value(c),
            (State::Sign, '0') => State::Zero,
            (State::Sign | State::Digits, '0'..='9') => State::Digits,
            (State::Zero | State::Digits, '.') => State::Point,
            (State::Point | State::Fraction, '0'..='9') => State::Fraction,
            (State::Zero | State::Digits | State::Fraction, 'e' | 'E') => State::Exponent,
            (State::Exponent, '+' | '-') => State::ExponentSign,
            (State::Exponent | State::ExponentSign | State::ExponentDigits, '0'..='9') => {
                State::ExponentDigits
            }
            (
                State::AfterItem
                | State::Zero
                | State::Digits
                | State::Fraction
                | State::ExponentDigits,
                c,
            ) => return self.after(c, is_space),
            _ => return None,
        };
        Some(())
    }

    fn value(&mut self, c: char) -> Option<()> {
        self.state = match c {
            '{' | '[' => {
                if self.open.len() >= limits::JSON_DEPTH {
                    return None;
                }
                self.open.push(c == '{');
                if c == '{' { State::FirstKey } else { State::FirstItem }
            }
            '"' => {
                self.is_key = false;
                State::Text
            }
            _ if self.open.is_empty() => return None,
            't' => State::Word("rue"),
            'f' => State::Word("alse"),
            'n' => State::Word("ull"),
            '-' => State::Sign,
            '0' => State::Zero,
            '1'..='9' => State::Digits,
            _ => return None,
        };
        Some(())
    }

    /// After a whole value, inside of a container.
    fn after(&mut self, c: char, is_space: bool) -> Option<()> {
        let in_object = *self.open.last()?;
        match c {
            ',' => self.state = if in_object { State::Key } else { State::Value },
            '}' if in_object => return self.close(),
            ']' if !in_object => return self.close(),
            _ if is_space => self.state = State::AfterItem,
            _ => return None,
        }
        Some(())
    }

    fn close(&mut self) -> Option<()> {
        self.open.pop()?;
        self.state = State::AfterItem;
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Whether the scanner takes all of the text, and no less, for one value.
    fn scans(text: &str) -> bool {
        let mut scanner = Scanner::new();
        let mut chars = text.chars();
        for c in chars.by_ref() {
            match scanner.push(c) {
                Step::More => {}
                Step::Done => return chars.next().is_none(),
                Step::Invalid => return false,
            }
        }
        false
    }

    proptest! {
        #[test]
        fn takes_what_serde_takes(text in r#"[\[{"]([\[\]{}:,"0-9ae.\\+ -]|true|null|"a":){0,12}[\]}"]"#) {
            let serde = serde_json::from_str::<serde_json::Value>(&text);
            // serde_json alone refuses floats out of range and halves of surrogate pairs.
            let odd = serde.as_ref().is_err_and(|e| e.to_string().contains("out of range"));
            prop_assert!(odd || scans(&text) == serde.is_ok(), "{text}: {serde:?}");
        }
    }

    #[test]
    fn depth_has_a_limit() {
        let deep = |n: usize| "[".repeat(n) + &"]".repeat(n);
        assert!(scans(&deep(limits::JSON_DEPTH)));
        assert!(!scans(&deep(limits::JSON_DEPTH + 1)));
    }
}

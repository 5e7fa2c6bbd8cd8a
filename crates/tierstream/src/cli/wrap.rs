//! Breaks lines at words where a terminal would break them anywhere.

use std::io::IsTerminal;
use std::os::fd::AsFd;

use rustix::termios;

/// Columns from one tab stop to the next.
const TAB: usize = 8;

/// The columns of a terminal that can move its cursor.
pub(crate) fn columns(terminal: impl IsTerminal + AsFd) -> Option<usize> {
    if !terminal.is_terminal() || std::env::var_os("TERM").is_none_or(|term| term == "dumb") {
        return None;
    }
    let size = termios::tcgetwinsize(terminal).ok()?;
    // Some have none, and in few there is no room for words.
    (size.ws_col >= 20).then_some(usize::from(size.ws_col))
}

/// Breaks a text that comes in pieces: each is shown at once, and a word that turns out too long
/// for its line is taken back and goes to the next one, as Ollama does it.
#[derive(Debug, Default)]
pub(crate) struct Wrap {
    column: usize,
    /// What the line has of its last word.
    word: String,
    word_columns: usize,
}

impl Wrap {
    /// What shows `text` on a terminal of so many columns.
    pub(crate) fn push(&mut self, text: &str, columns: usize) -> String {
        // A cursor behind the last column is not where moves count from.
        let most = columns - 1;
        let mut shown = String::with_capacity(text.len());
        for c in text.chars() {
            match c {
                '\n' => self.end_line(&mut shown),
                ' ' | '\t' => {
                    self.end_word();
                    let wide = if c == '\t' { TAB - self.column % TAB } else { 1 };
                    // One at the end of a line would only begin the next one with a gap.
                    if self.column + wide <= most {
                        shown.push(c);
                        self.column += wide;
                    } else {
                        self.column = most;
                    }
                }
                c => self.show(c, most, &mut shown),
            }
        }
        shown
    }

    fn show(&mut self, c: char, most: usize, shown: &mut String) {
        let wide = width(c);
        // Between such characters, a line may end anywhere.
        if wide == 2 {
            self.end_word();
        }
        if self.column + wide > most {
            let word = (std::mem::take(&mut self.word), std::mem::take(&mut self.word_columns));
            if 0 < word.1 && word.1 < self.column {
                // Back to where the word begins, and clear the rest of the line.
                shown.push_str(&format!("\x1b[{}D\x1b[K", word.1));
                self.end_line(shown);
                shown.push_str(&word.0);
                self.column = word.1;
                (self.word, self.word_columns) = word;
            } else {
                self.end_line(shown);
            }
        }
        shown.push(c);
        self.column += wide;
        if wide < 2 {
            self.word.push(c);
            self.word_columns += wide;
        }
    }

    fn end_word(&mut self) {
        self.word.clear();
        self.word_columns = 0;
    }

    fn end_line(&mut self, shown: &mut String) {
        shown.push('\n');
        self.end_word();
        self.column = 0;
    }
}

/// A line broken at its spaces, for a terminal of so many columns.
pub(crate) fn broken(line: &str, columns: usize) -> String {
    let mut text = String::with_capacity(line.len());
    let mut column = 0;
    for word in line.split(' ') {
        let wide = word.chars().map(width).sum::<usize>();
        if column > 0 && column + 1 + wide > columns {
            text.push('\n');
            column = 0;
        } else if !text.is_empty() {
            text.push(' ');
            column += 1;
        }
        text.push_str(word);
        column += wide;
    }
    text
}

/// The columns that a character takes: two in the scripts and signs that Unicode calls wide (UAX
/// 11), none for marks on the one before. Roughly: where it errs, a line is a bit short or long.
fn width(c: char) -> usize {
    match u32::from(c) {
        0x300..=0x36f | 0x200b..=0x200f | 0xfe00..=0xfe0f => 0,
        0x1100..=0x115f | 0x2e80..=0xa4cf | 0xac00..=0xd7a3 | 0xf900..=0xfaff => 2,
        0xfe30..=0xfe6f | 0xff00..=0xff60 | 0xffe0..=0xffe6 | 0x1f300..=0x1faff => 2,
        0x20000..=0x3fffd => 2,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::{Wrap, broken, width};

    /// The lines of a terminal that was sent `text`, and that breaks none by itself. Spaces at their
    /// ends are not seen.
    fn screen(text: &str) -> Vec<String> {
        let mut lines = vec![String::new()];
        let mut rest = text;
        while let Some(c) = rest.chars().next() {
            let line = lines.last_mut().unwrap();
            if let Some(moved) = rest.strip_prefix("\x1b[") {
                let (count, after) = moved.split_once("D\x1b[K").expect("back, then clear");
                for _ in 0..count.parse::<usize>().unwrap() {
                    line.pop().expect("no further than to the left edge");
                }
                rest = after;
                continue;
            }
            match c {
                '\n' => lines.push(String::new()),
                c => line.push(c),
            }
            rest = &rest[c.len_utf8()..];
        }
        lines.iter().map(|line| line.trim_end().to_owned()).collect()
    }

    fn shown(text: &str, piece: usize, columns: usize) -> Vec<String> {
        let mut wrap = Wrap::default();
        let pieces: Vec<char> = text.chars().collect();
        let pieces = pieces.chunks(piece).map(|piece| piece.iter().collect::<String>());
        screen(&pieces.map(|piece| wrap.push(&piece, columns)).collect::<String>())
    }

    #[test]
    fn words_stay_whole_however_they_come() {
        let text = "It was a cold evening in November, and the old gentleman sat by the fire.";
        for columns in 20..90 {
            let whole = shown(text, 1000, columns);
            assert_eq!(whole.join(" "), text);
            assert!(whole.iter().all(|line| line.chars().count() < columns), "{whole:?}");
            // No word of the next line would have fitted.
            for pair in whole.windows(2) {
                let next = pair[1].split(' ').next().unwrap();
                assert!(pair[0].len() + 1 + next.len() >= columns, "{whole:?}");
            }
            for piece in 1..8 {
                assert_eq!(shown(text, piece, columns), whole, "{columns} {piece}");
            }
        }
    }

    #[test]
    fn what_has_no_spaces_is_broken_at_the_edge() {
        let long = "x".repeat(50);
        assert_eq!(
            shown(&format!("a {long}"), 3, 21),
            ["a", &long[..20], &long[..20], &long[..10]]
        );
        let wide = "天".repeat(25);
        let lines = shown(&wide, 4, 21);
        assert_eq!(lines.concat(), wide);
        assert!(lines.iter().all(|l| l.chars().map(width).sum::<usize>() <= 20), "{lines:?}");
    }

    #[test]
    fn lines_of_the_text_and_their_indents_stay() {
        let text = "fn main() {\n    let x = 1;\n\n}\n";
        assert_eq!(shown(text, 2, 40), ["fn main() {", "    let x = 1;", "", "}", ""]);
    }

    #[test]
    fn a_line_is_broken_at_spaces() {
        assert_eq!(broken("12 tokens, 3.1 tok/s, nothing", 20), "12 tokens, 3.1\ntok/s, nothing");
        assert_eq!(broken("12 tokens", 20), "12 tokens");
        assert_eq!(broken(&"x".repeat(30), 20), "x".repeat(30));
    }
}

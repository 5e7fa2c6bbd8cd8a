//! What a line of a chat asks for.

pub(super) const HELP: &str = "\
/help            this list
/clear           forget the conversation
/show            what is in the model
/stats           what the chat took so far: tokens, speed, hit rate, bytes read
/set temp VALUE  sampling temperature; 0 is greedy
/set seed VALUE  seed of sampling
/set n VALUE     most tokens of an answer
/set system TEXT what the model is told before the conversation
/set think HOW   whether it thinks before it answers: true, false, low, medium, high
/bye             leave (so does Ctrl-D)
Ctrl-C stops an answer. A line that ends with \\ goes on in the next one, as does a text
between \"\"\" and \"\"\".";

pub(super) const COMMANDS: &[&str] = &[
    "/help",
    "/clear",
    "/show",
    "/stats",
    "/set temp ",
    "/set seed ",
    "/set n ",
    "/set system ",
    "/set think ",
    "/bye",
];

/// What a line asks for.
#[derive(Debug, PartialEq)]
pub(super) enum Line<'a> {
    Nothing,
    Say(String),
    Help,
    Clear,
    Show,
    Stats,
    Set(&'a str, &'a str),
    Bye,
    /// A command that was given an argument and takes none.
    NoArgument(&'a str),
    /// A word with a slash before it that is no command.
    Unknown(&'a str),
}

/// A path begins with a slash too, but goes on with another one or a dot.
fn is_like_a_command(word: &str) -> bool {
    word.strip_prefix('/').is_some_and(|name| {
        !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    })
}

/// Reads a line as the user means it.
pub(super) fn parse(line: &str) -> Line<'_> {
    let text = line.trim();
    if text.is_empty() {
        return Line::Nothing;
    }
    if let Some(quoted) = text.strip_prefix(QUOTES) {
        let quoted = quoted.strip_suffix(QUOTES).unwrap_or(quoted);
        let quoted = quoted.trim_matches('\n');
        return if quoted.is_empty() { Line::Nothing } else { Line::Say(quoted.to_owned()) };
    }
    let words: Vec<&str> = text.split_whitespace().collect();
    match words[..] {
        ["/help" | "/?"] => Line::Help,
        ["/clear"] => Line::Clear,
        ["/show"] => Line::Show,
        ["/stats"] => Line::Stats,
        ["/set", ..] => set(text),
        ["/bye" | "/exit" | "/quit"] => Line::Bye,
        [command @ ("/help" | "/?" | "/clear" | "/show" | "/stats"), ..] => {
            Line::NoArgument(command)
        }
        [command @ ("/bye" | "/exit" | "/quit"), ..] => Line::NoArgument(command),
        [command, ..] if is_like_a_command(command) => Line::Unknown(command),
        _ => Line::Say(line.replace("\\\n", "\n")),
    }
}

/// Ollama has `/set parameter NAME VALUE` for what is `/set NAME VALUE` here, and words for thinking alone.
fn set(text: &str) -> Line<'_> {
    let words = text.trim_start_matches("/set").trim_start();
    let words = words.strip_prefix("parameter ").map_or(words, str::trim_start);
    match words.split_once(char::is_whitespace) {
        None if words == "think" => Line::Set("think", "true"),
        None if words == "nothink" => Line::Set("think", "false"),
        Some((name, value)) if name == "system" || value.split_whitespace().count() == 1 => {
            Line::Set(name, value.trim())
        }
        _ => Line::Set("", ""),
    }
}

const QUOTES: &str = "\"\"\"";

/// Whether Enter begins another line instead of sending.
pub(super) fn goes_on(input: &str) -> bool {
    match input.trim_start().strip_prefix(QUOTES) {
        Some(quoted) => !quoted.trim_end().ends_with(QUOTES),
        None => input.ends_with('\\'),
    }
}

#[cfg(test)]
mod tests {
    use super::{Line, goes_on, parse};

    #[test]
    fn commands_and_texts_are_told_apart() {
        assert_eq!(parse("  "), Line::Nothing);
        assert_eq!(parse("\"\"\"\"\"\""), Line::Nothing);
        assert_eq!(parse("/set temp 0.5"), Line::Set("temp", "0.5"));
        assert_eq!(parse("/set temp"), Line::Set("", ""));
        assert_eq!(parse("/set think low"), Line::Set("think", "low"));
        assert_eq!(parse("/set think"), Line::Set("think", "true"));
        assert_eq!(parse("/set nothink"), Line::Set("think", "false"));
        assert_eq!(parse("/set temp 1 2"), Line::Set("", ""));
        assert_eq!(parse("/set parameter temperature  2"), Line::Set("temperature", "2"));
        assert_eq!(parse("/set system  Be brief. "), Line::Set("system", "Be brief."));
        assert_eq!(parse("/show info"), Line::NoArgument("/show"));
        assert_eq!(parse("/load demo"), Line::Unknown("/load"));
        assert_eq!(parse("/byebye"), Line::Unknown("/byebye"));
        for text in ["/tmp/x.png what is this", "/x.png", "/", "//", "say /bye"] {
            assert_eq!(parse(text), Line::Say(text.into()));
        }
        assert_eq!(parse(" /bye "), Line::Bye);
        assert_eq!(parse("one \\\ntwo"), Line::Say("one \ntwo".into()));
        assert_eq!(parse("\"\"\"\n/bye\n\nx\n\"\"\""), Line::Say("/bye\n\nx".into()));
    }

    #[test]
    fn enter_sends_only_what_is_complete() {
        for text in ["one", "\"\"\"one\"\"\"", "one \"\"\"", "\"\"\"\none\n\"\"\" "] {
            assert!(!goes_on(text), "{text:?}");
        }
        for text in ["one\\", "\"\"\"", "\"\"\"one", "one\\\ntwo\\"] {
            assert!(goes_on(text), "{text:?}");
        }
    }
}

//! Text for HTML: escaped, and figures as people read them.

use std::fmt::Write as _;

/// Characters of a text that are shown.
const SHOWN_MAX: usize = 300;

/// Any text, as it may stand in an element or between quotes. What is no character to be seen, or turns
/// the direction of others, is replaced.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for (place, c) in text.chars().enumerate() {
        if place == SHOWN_MAX {
            escaped.push('…');
            break;
        }
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            c if hidden(c) => escaped.push('\u{fffd}'),
            c => escaped.push(c),
        }
    }
    escaped
}

/// Control characters, marks of direction, and what XML has not.
fn hidden(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
        || matches!(c, '\u{fffe}' | '\u{ffff}')
}

/// The first characters of a text, for a place that has no room for more.
pub(super) fn short(text: &str, most: usize) -> String {
    match text.chars().count() > most {
        true => text.chars().take(most - 1).chain(['…']).collect(),
        false => text.to_owned(),
    }
}

/// A list of HTML.
pub(super) fn list(class: &str, items: impl Iterator<Item = String>) -> String {
    let mut text = match class {
        "" => "<ul>".to_owned(),
        class => format!("<ul class=\"{class}\">"),
    };
    items.for_each(|item| _ = write!(text, "<li>{item}</li>"));
    text.push_str("</ul>\n");
    text
}

/// A share in percent.
pub(super) fn percent(share: f64) -> String {
    // No "-0.0".
    format!("{:.1} %", 100.0 * share + 0.0)
}

/// A size of a pool as a share of all experts, with as few digits as it has.
pub(super) fn size(share: f64) -> String {
    let percent = (1000.0 * share).round() / 10.0;
    format!("{percent} %")
}

/// What may be missing.
pub(super) fn or_dash<T>(value: Option<T>, show: impl Fn(T) -> String) -> String {
    value.map_or("–".to_owned(), show)
}

pub(super) fn number(value: f64) -> String {
    format!("{value:.1}")
}

/// 12,345.
pub(super) fn count(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `1 prompt`, `2 prompts`.
pub(super) fn counted(value: u64, name: &str) -> String {
    format!("{} {name}{}", count(value), if value == 1 { "" } else { "s" })
}

pub(super) fn bytes(value: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let (mut value, mut unit) = (value as f64, 0);
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = if unit == 0 || value >= 100.0 {
        0
    } else if value >= 10.0 {
        1
    } else {
        2
    };
    format!("{value:.digits$} {}", units[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_text_is_markup() {
        assert_eq!(escape("<b a=\"x\" b='y'>&"), "&lt;b a=&quot;x&quot; b=&#39;y&#39;&gt;&amp;");
        assert_eq!(escape("a\0\x1b\u{202e}b\n"), "a\u{fffd}\u{fffd}\u{fffd}b\u{fffd}");
        assert_eq!(escape(&"é".repeat(400)).chars().count(), SHOWN_MAX + 1);
        assert_eq!((short("éèê", 3), short("éèêë", 3)), ("éèê".to_owned(), "éè…".to_owned()));
    }

    #[test]
    fn figures_are_read_by_people() {
        assert_eq!(["0", "999", "1,000", "1,234,567"], [0, 999, 1000, 1_234_567].map(count)[..]);
        assert_eq!([percent(0.7123), percent(-0.0), size(0.25)], ["71.2 %", "0.0 %", "25 %"]);
        assert_eq!(size(1.0 / 128.0), "0.8 %");
        assert_eq!(
            [bytes(1023), bytes(3 << 29), bytes(1 << 40)],
            ["1023 B", "1.50 GiB", "1.00 TiB"]
        );
        assert_eq!([counted(1, "prompt"), counted(2, "prompt")], ["1 prompt", "2 prompts"]);
    }
}

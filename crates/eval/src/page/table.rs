//! Tables.

use std::fmt::Write as _;

use super::text::escape;

/// Rows of a table, which a browser has to lay out.
pub(super) const ROWS_MAX: usize = 256;

/// A table with a line of titles; the first cell of each row names it. All of it is text.
pub(super) fn table(caption: &str, titles: &[&str], rows: &[Vec<String>]) -> String {
    let mut text = format!(
        "<div class=\"table\" tabindex=\"0\" role=\"group\" aria-label=\"{0}\"><table><caption>{0}</caption><thead><tr>",
        escape(caption)
    );
    for title in titles {
        _ = write!(text, "<th scope=\"col\">{}</th>", escape(title));
    }
    text.push_str("</tr></thead><tbody>\n");
    for row in rows {
        text.push_str("<tr>");
        for (place, cell) in row.iter().enumerate() {
            let cell = escape(cell);
            _ = match place {
                0 => write!(text, "<th scope=\"row\">{cell}</th>"),
                _ => write!(text, "<td>{cell}</td>"),
            };
        }
        text.push_str("</tr>\n");
    }
    text.push_str("</tbody></table></div>\n");
    text
}

/// Something that is shown when it is asked for.
pub(super) fn details(summary: &str, inside: &str) -> String {
    format!("<details><summary>{}</summary>\n{inside}</details>\n", escape(summary))
}

/// How much of the page's width something takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Width {
    Half,
    Full,
}

/// A chart with its title, what it says, and its numbers.
pub(super) fn figure(width: Width, title: &str, note: &str, chart: &str, numbers: &str) -> String {
    let class = if width == Width::Full { " class=\"wide\"" } else { "" };
    format!(
        "<figure{class}>\n<figcaption><h3>{}</h3><p>{}</p></figcaption>\n{chart}{}</figure>\n",
        escape(title),
        escape(note),
        details("The numbers", numbers)
    )
}

/// Something without a chart.
pub(super) fn panel(title: &str, note: &str, inside: &str) -> String {
    format!(
        "<div class=\"panel\"><h3>{}</h3><p class=\"note\">{}</p>{inside}</div>\n",
        escape(title),
        escape(note)
    )
}

/// Tells of rows beyond [`ROWS_MAX`].
pub(super) fn left_out(all: usize, what: &str) -> String {
    match all.saturating_sub(ROWS_MAX) {
        0 => String::new(),
        _ => format!(
            "<p class=\"note\">The first {ROWS_MAX} of {all} {what}; <code>eval metrics --json</code> has the others.</p>\n"
        ),
    }
}

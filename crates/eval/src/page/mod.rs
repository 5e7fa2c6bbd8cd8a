//! A report that people look at: one HTML file with charts, which asks for nothing from elsewhere.
//!
//! [`Study::of`] computes the numbers, by [`metrics`](crate::metrics) and [`sim`](crate::sim), and [`html`]
//! writes them. Names and tags come from files that anyone may have made: all text is escaped
//! (`text.rs`), and there are no scripts.

mod chart;
mod compare;
mod curves;
mod domains;
mod findings;
mod heat;
mod locality;
mod panels;
mod plan;
mod reproduce;
mod section;
mod study;
mod table;
mod text;

pub use plan::Plan;
pub use reproduce::quoted;
pub use study::{DomainRates, Study};

use text::{escape, list};

/// What the page tells of how it was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Made {
    /// Version of the program.
    pub version: String,
    /// The command line.
    pub command: String,
}

const STYLE: &str = include_str!("style.css");

/// Nothing is loaded or run, whatever a trace says.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'";

/// The page: a section for each study, one in which several are side by side, and what a plan predicts.
///
/// It is well-formed XML, too.
#[must_use]
pub fn html(studies: &[Study], plan: Option<&Plan>, made: &Made) -> String {
    let names: Vec<String> = studies.iter().map(Study::label).collect();
    let title = match &names[..] {
        [one] => format!("How local is the routing of {one}?"),
        _ => "How local is the routing of these models?".to_owned(),
    };
    let mut page = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"{}\"/>\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n\
         <meta name=\"color-scheme\" content=\"light dark\"/>\n\
         <title>{}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<header>\n<h1>{}</h1>\n",
        escape(POLICY),
        escape(&title),
        escape(&title)
    );
    if studies.len() > 1 {
        let links = (1..)
            .zip(&names)
            .map(|(number, name)| format!("<a href=\"#trace-{number}\">{}</a>", escape(name)));
        page.push_str(&format!("<nav aria-label=\"Traces\">{}</nav>\n", list("", links)));
    }
    page.push_str("</header>\n<main>\n");
    if studies.len() > 1 {
        page.push_str(&compare::section(studies));
    }
    for (number, study) in (1..).zip(studies) {
        page.push_str(&section::section(study, number, studies.len() > 1));
    }
    page.push_str(&plan.map(plan::section).unwrap_or_default());
    page.push_str(&reproduce::section(studies, made));
    page.push_str("</main>\n</body>\n</html>\n");
    page
}

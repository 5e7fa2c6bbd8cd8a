//! Charts as inline SVG, drawn by hand.
//!
//! Places along the x axis are in percent and those along the y axis in pixels, so that a chart takes
//! any width and its text keeps its size. Only lines are drawn in a part that is stretched. Colours and
//! dashes are classes of `style.css`.

use std::fmt::Write as _;

use super::text::{escape, list, short};

/// Height of what is between the axes, in pixels.
const HEIGHT: f64 = 280.0;

/// Width of the stretched part, in units of its own.
const STRETCHED: f64 = 1000.0;

/// Height of a line of numbers below the x axis.
const TICK: f64 = 16.0;

/// Values along an axis.
#[derive(Debug, Clone)]
pub(super) struct Axis {
    pub(super) min: f64,
    pub(super) max: f64,
    pub(super) log: bool,
    /// What stands at some of them, a line for each text.
    pub(super) ticks: Vec<(f64, Vec<String>)>,
    pub(super) title: String,
}

impl Axis {
    /// Shares from 0 to 100 %.
    pub(super) fn of_shares(title: &str) -> Self {
        let tick = |percent: u32| (f64::from(percent) / 100.0, vec![format!("{percent} %")]);
        let ticks = (0..=4).map(|quarter| tick(25 * quarter)).collect();
        Self { min: 0.0, max: 1.0, log: false, ticks, title: title.to_owned() }
    }

    /// Where a value is, from 0 to 1.
    fn place(&self, value: f64) -> f64 {
        let on = |value: f64| if self.log { value.ln() } else { value };
        let place = (on(value) - on(self.min)) / (on(self.max) - on(self.min));
        if place.is_finite() { place.clamp(0.0, 1.0) } else { 0.0 }
    }

    fn percent(&self, value: f64) -> String {
        format!("{}%", round(100.0 * self.place(value)))
    }

    /// From the top.
    fn pixels(&self, value: f64) -> f64 {
        round(HEIGHT * (1.0 - self.place(value)))
    }
}

fn round(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}

/// A line of a chart.
#[derive(Debug, Clone)]
pub(super) struct Line {
    pub(super) name: String,
    /// What it looks like.
    pub(super) class: &'static str,
    pub(super) points: Vec<(f64, f64)>,
    /// What is told of each point where it is pointed at; none for a line without points of its own.
    pub(super) told: Vec<String>,
    /// An interval for some points.
    pub(super) intervals: Vec<(f64, [f64; 2])>,
}

/// Lines, the last ones on top, and their key.
pub(super) fn lines(label: &str, x: &Axis, y: &Axis, lines: &[Line]) -> String {
    let mut svg = begin(label, x, HEIGHT);
    grid(&mut svg, y);
    ticks(&mut svg, x, HEIGHT);
    _ = write!(
        svg,
        "<svg width=\"100%\" height=\"{HEIGHT}\" viewBox=\"0 0 {STRETCHED} {HEIGHT}\" preserveAspectRatio=\"none\">"
    );
    for line in lines.iter().filter(|line| line.points.len() > 1) {
        let at =
            |&(a, b): &(f64, f64)| format!("{} {}", round(STRETCHED * x.place(a)), y.pixels(b));
        let path = line.points.iter().map(at).collect::<Vec<_>>().join("L");
        _ = write!(svg, "<path class=\"line {}\" d=\"M{path}\"/>", line.class);
    }
    svg.push_str("</svg>\n");
    for line in lines {
        for (at, [low, high]) in &line.intervals {
            let (at, low, high) = (x.percent(*at), y.pixels(*low), y.pixels(*high));
            _ = write!(
                svg,
                "<line class=\"line interval {}\" x1=\"{at}\" x2=\"{at}\" y1=\"{low}\" y2=\"{high}\"/>",
                line.class
            );
        }
        for (&(a, b), told) in line.points.iter().zip(&line.told) {
            _ = writeln!(
                svg,
                "<circle class=\"dot {}\" cx=\"{}\" cy=\"{}\" r=\"2.5\"><title>{}</title></circle>",
                line.class,
                x.percent(a),
                y.pixels(b),
                escape(told)
            );
        }
    }
    svg.push_str("</svg>\n");
    // Named in the order in which one looks at them.
    let keys = lines.iter().rev().map(|line| {
        format!(
            "<svg class=\"key\" width=\"30\" height=\"10\" aria-hidden=\"true\"><path class=\"line {}\" d=\"M1 5h28\"/></svg>{}",
            line.class,
            escape(&line.name)
        )
    });
    svg + &list("legend", keys)
}

/// A bar.
#[derive(Debug, Clone)]
pub(super) struct Bar {
    pub(super) name: String,
    pub(super) value: f64,
    /// Where it would end by chance.
    pub(super) chance: f64,
    pub(super) told: String,
}

/// Bars beside each other, with marks of what chance gives.
pub(super) fn columns(label: &str, title: &str, y: &Axis, bars: &[Bar]) -> String {
    let width = 100.0 / bars.len().max(1) as f64;
    let middle = |place: usize| (place as f64 + 0.5) * width;
    let x = Axis {
        min: 0.0,
        max: 100.0,
        log: false,
        ticks: (0..).zip(bars).map(|(at, bar)| (middle(at), vec![bar.name.clone()])).collect(),
        title: title.to_owned(),
    };
    let mut svg = begin(label, &x, HEIGHT);
    grid(&mut svg, y);
    ticks(&mut svg, &x, HEIGHT);
    for (place, bar) in bars.iter().enumerate() {
        let (top, chance) = (y.pixels(bar.value), y.pixels(bar.chance));
        let left = place as f64 * width;
        _ = writeln!(
            svg,
            "<g><title>{}</title><rect class=\"hit\" x=\"{}%\" y=\"0\" width=\"{}%\" height=\"{HEIGHT}\"/>\
             <rect class=\"bar b-0\" x=\"{}%\" y=\"{top}\" width=\"{}%\" height=\"{}\"/>\
             <line class=\"line chance\" x1=\"{}%\" x2=\"{}%\" y1=\"{chance}\" y2=\"{chance}\"/></g>",
            escape(&bar.told),
            round(left),
            round(width),
            round(left + 0.12 * width),
            round(0.76 * width),
            round(HEIGHT - top),
            round(left + 0.04 * width),
            round(left + 0.96 * width),
        );
    }
    svg.push_str("</svg>\n");
    svg
}

/// What bars are of.
#[derive(Debug, Clone)]
pub(super) struct Group {
    pub(super) name: String,
    /// A value from 0 to 1, what is told of it, and its interval.
    pub(super) bars: Vec<(f64, String, Option<[f64; 2]>)>,
}

/// Bars of shares below each other, in groups, and their key.
pub(super) fn rows(label: &str, names: &[String], groups: &[Group]) -> String {
    let (title, bar, gap) = (20.0, 12.0, 14.0);
    let tall = |group: &Group| title + bar * group.bars.len() as f64 + gap;
    let height: f64 = groups.iter().map(tall).sum();
    let x = Axis::of_shares("");
    // No values to its left.
    let mut svg = begin(label, &x, height).replacen("chart", "chart flush", 1);
    for (at, _) in &x.ticks {
        let at = x.percent(*at);
        _ = write!(svg, "<line class=\"grid\" x1=\"{at}\" x2=\"{at}\" y1=\"0\" y2=\"{height}\"/>");
    }
    ticks(&mut svg, &x, height);
    let mut y = 0.0;
    for group in groups {
        _ = writeln!(
            svg,
            "<text class=\"name\" x=\"0\" y=\"{}\">{}</text>",
            y + 14.0,
            escape(&short(&group.name, 32))
        );
        for (place, (value, told, interval)) in group.bars.iter().enumerate() {
            let top = y + title + bar * place as f64;
            _ = write!(
                svg,
                "<g><title>{}</title><rect class=\"hit\" x=\"0\" y=\"{top}\" width=\"100%\" height=\"{bar}\"/>\
                 <rect class=\"bar b-{place}\" x=\"0\" y=\"{}\" width=\"{}\" height=\"{}\"/>",
                escape(told),
                top + 1.0,
                x.percent(*value),
                bar - 2.0
            );
            if let Some([low, high]) = interval {
                let middle = top + bar / 2.0;
                _ = write!(
                    svg,
                    "<line class=\"line whisker\" x1=\"{}\" x2=\"{}\" y1=\"{middle}\" y2=\"{middle}\"/>",
                    x.percent(*low),
                    x.percent(*high)
                );
            }
            svg.push_str("</g>\n");
        }
        y += tall(group);
    }
    svg.push_str("</svg>\n");
    let keys = names.iter().enumerate().map(|(place, name)| {
        format!(
            "<svg class=\"key\" width=\"14\" height=\"10\" aria-hidden=\"true\"><rect class=\"bar b-{place}\" width=\"14\" height=\"10\"/></svg>{}",
            escape(name)
        )
    });
    svg + &list("legend", keys)
}

fn begin(label: &str, x: &Axis, height: f64) -> String {
    let lines = x.ticks.iter().map(|(_, texts)| texts.len()).max().unwrap_or(0) as f64;
    let below = 8.0 + TICK * lines + if x.title.is_empty() { 0.0 } else { TICK + 4.0 };
    let mut svg = format!(
        "<svg class=\"chart\" role=\"img\" aria-label=\"{}\" width=\"100%\" height=\"{}\">\n",
        escape(label),
        height + below
    );
    if !x.title.is_empty() {
        let y = height + below - 4.0;
        _ = writeln!(
            svg,
            "<text class=\"axis middle\" x=\"50%\" y=\"{y}\">{}</text>",
            escape(&x.title)
        );
    }
    svg
}

/// Lines across, with the values of the y axis before them.
fn grid(svg: &mut String, y: &Axis) {
    for (value, texts) in &y.ticks {
        let at = y.pixels(*value);
        _ = write!(svg, "<line class=\"grid\" x1=\"0\" x2=\"100%\" y1=\"{at}\" y2=\"{at}\"/>");
        for text in texts {
            _ = write!(
                svg,
                "<text class=\"end\" x=\"-6\" y=\"{}\">{}</text>",
                at + 4.0,
                escape(text)
            );
        }
    }
    if !y.title.is_empty() {
        _ = writeln!(svg, "<text class=\"axis\" x=\"6\" y=\"12\">{}</text>", escape(&y.title));
    }
}

/// The values below the x axis.
fn ticks(svg: &mut String, x: &Axis, height: f64) {
    for (number, (value, texts)) in x.ticks.iter().enumerate() {
        // A narrow page has no room for all of them.
        let spare = number % 2 == 1;
        let class = match x.place(*value) {
            place if place > 0.97 => "end",
            place if place < 0.03 => "start",
            _ => "middle",
        };
        for (line, text) in texts.iter().enumerate() {
            let below = height + TICK * (line as f64 + 1.0);
            let weak = if line > 0 { " weak" } else { "" };
            let spare = if spare && (line > 0 || x.ticks.len() > 8) { " spare" } else { "" };
            _ = write!(
                svg,
                "<text class=\"{class}{weak}{spare}\" x=\"{}\" y=\"{below}\">{}</text>",
                x.percent(*value),
                escape(text)
            );
        }
    }
    svg.push('\n');
}

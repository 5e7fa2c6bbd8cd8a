//! Predicted tokens per second, from the answer of `tierstream plan --json`.

use serde::Deserialize;

use super::chart::{self, Axis, Line};
use super::table::{Width, figure, table};
use super::text::{bytes, escape, number, or_dash, percent};
use crate::error::{Error, Result};

/// An answer of `plan --json`, as far as it is shown (`docs/json.md`).
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Plan {
    model: String,
    sentence: String,
    predictions: Vec<Prediction>,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
struct Prediction {
    placement: String,
    ram_bytes: u64,
    vram_bytes: u64,
    pool_bytes: u64,
    fits: bool,
    hit_rate: Option<f64>,
    tok_s: f64,
    tok_s_low: f64,
    tok_s_high: f64,
    limited_by: String,
}

/// Looks of placements, one after the other.
const CLASSES: [&str; 6] = ["c-lru", "c-lfu", "c-slru", "c-s3-fifo", "c-fifo", "c-lfru"];

impl Plan {
    /// Reads one.
    ///
    /// # Errors
    ///
    /// If the text is not such an answer, or one without predictions, as that of a dense model.
    pub fn from_json(text: &str) -> Result<Self> {
        let plan: Self = serde_json::from_str(text)
            .map_err(|error| Error::file(format!("this is no answer of plan --json: {error}")))?;
        match plan.predictions.is_empty() {
            true => Err(Error::file("the plan has no predictions: its model has no experts")),
            false => Ok(plan),
        }
    }

    /// What a prediction is drawn over: the memory of the processor that computes.
    fn on_gpu(&self) -> bool {
        self.predictions.iter().any(|prediction| prediction.vram_bytes > 0)
    }

    fn lines(&self) -> Vec<Line> {
        let mut names: Vec<&str> = Vec::new();
        for prediction in &self.predictions {
            if !names.contains(&prediction.placement.as_str()) {
                names.push(&prediction.placement);
            }
        }
        let mut lines: Vec<Line> = names
            .into_iter()
            .zip(CLASSES.iter().cycle())
            .map(|(name, class)| self.line(name, class))
            .collect();
        lines.reverse();
        lines
    }

    fn line(&self, name: &str, class: &'static str) -> Line {
        let gpu = self.on_gpu();
        let own = self.predictions.iter().filter(|prediction| prediction.placement == name);
        let mut own: Vec<(f64, &Prediction)> =
            own.map(|p| (if gpu { p.vram_bytes } else { p.ram_bytes } as f64, p)).collect();
        own.sort_by(|a, b| a.0.total_cmp(&b.0));
        let told = own.iter().map(|(memory, p)| {
            let room = if p.fits { "" } else { "; there is no room for it" };
            format!(
                "{name}, {}: {} tokens/s, {} to {}{room}",
                bytes(*memory as u64),
                number(p.tok_s),
                number(p.tok_s_low),
                number(p.tok_s_high)
            )
        });
        Line {
            name: name.to_owned(),
            class,
            told: told.collect(),
            points: own.iter().map(|&(memory, p)| (memory, p.tok_s)).collect(),
            intervals: own
                .iter()
                .map(|&(memory, p)| (memory, [p.tok_s_low, p.tok_s_high]))
                .collect(),
        }
    }
}

/// Values with marks at round numbers, a little beyond both ends.
fn round(least: f64, most: f64, title: &str) -> Axis {
    let wide = (most - least).max(most / 100.0).max(1e-9) / 4.0;
    let power = 10f64.powf(wide.log10().floor());
    let step = [1.0, 2.0, 5.0].map(|n| n * power).into_iter().find(|step| *step >= wide);
    let step = step.unwrap_or(10.0 * power);
    let (first, last) = ((least / step).floor(), (most / step).ceil());
    let digits = (-step.log10().floor()).max(0.0) as usize;
    let tick = |at: u32| (first + f64::from(at)) * step;
    let ticks =
        (0..=(last - first) as u32).map(|at| (tick(at), vec![format!("{:.digits$}", tick(at))]));
    Axis {
        min: first * step,
        max: last * step,
        log: false,
        ticks: ticks.collect(),
        title: title.to_owned(),
    }
}

pub(super) fn section(plan: &Plan) -> String {
    let lines = plan.lines();
    let ends = || lines.iter().flat_map(|line| &line.intervals);
    let most = ends().map(|(_, [_, high])| *high).fold(0.0, f64::max);
    let memory = ends().map(|(memory, _)| *memory).fold(0.0, f64::max);
    let least = ends().map(|(memory, _)| *memory).fold(memory, f64::min);
    let whose = if plan.on_gpu() { "the GPU’s memory" } else { "host memory" };
    let (unit, name) = match memory >= 4e9 {
        true => (f64::from(1 << 30), "GiB"),
        false => (f64::from(1 << 20), "MiB"),
    };
    let mut x = round(least / unit, memory / unit, &format!("{whose}, {name}"));
    x.min *= unit;
    x.max *= unit;
    x.ticks.iter_mut().for_each(|(value, _)| *value *= unit);
    let y = round(0.0, most, "tokens/s");
    // Where it lies is nobody else's.
    let model = plan.model.rsplit(['/', '\\']).next().unwrap_or_default();
    let rows: Vec<Vec<String>> = plan
        .predictions
        .iter()
        .map(|p| {
            vec![
                p.placement.clone(),
                bytes(p.ram_bytes),
                bytes(p.vram_bytes),
                bytes(p.pool_bytes),
                or_dash(p.hit_rate, percent),
                number(p.tok_s),
                format!("{} to {}", number(p.tok_s_low), number(p.tok_s_high)),
                p.limited_by.clone(),
                if p.fits { "yes" } else { "no" }.to_owned(),
            ]
        })
        .collect();
    let titles = [
        "placement",
        "host memory",
        "GPU memory",
        "pool",
        "hits",
        "tokens/s",
        "error bar",
        "limited by",
        "room for it",
    ];
    let chart = chart::lines(
        "Predicted tokens per second over memory, a line for each placement",
        &x,
        &y,
        &lines,
    );
    format!(
        "<section id=\"plan\">\n<h2>How fast it would be</h2>\n<ul class=\"findings\"><li>{}</li></ul>\n{}</section>\n",
        escape(&plan.sentence),
        figure(
            Width::Full,
            "Predicted tokens per second",
            &format!(
                "By tierstream plan, on the machine where it ran, for {model}. Bands are its error bars."
            ),
            &chart,
            &table("Predictions", &titles, &rows),
        )
    )
}

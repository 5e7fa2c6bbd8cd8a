//! Where the uses of a trace go: a cell for each expert of each layer.

use std::fmt::Write as _;

use super::study::{Study, shape};
use super::table::{ROWS_MAX as LINES_MAX, Width, figure, left_out, table};
use super::text::{counted, escape, list, percent};

/// More layers, or experts, share a cell.
const ROWS_MAX: usize = 128;
const COLUMNS_MAX: usize = 256;

/// A cell's uses beside those of uniform routing: its colour is the last that it reaches.
const LEVELS: [(f64, &str); 8] = [
    (0.0, "never"),
    (f64::MIN_POSITIVE, "less than ¼"),
    (0.25, "¼ to ½"),
    (0.5, "½ to 1"),
    (1.0, "1 to 2"),
    (2.0, "2 to 4"),
    (4.0, "4 to 8"),
    (8.0, "8 and more"),
];

/// Layers or experts that have a row or a column together.
fn together(all: usize, most: usize) -> usize {
    all.div_ceil(most).max(1)
}

/// The map with what it says.
pub(super) fn figure_of(study: &Study) -> String {
    let title = "Use of experts";
    let note = format!(
        "Uses of each expert beside those that uniform routing would give it: 1 is as many.{}",
        shared(study)
    );
    let rows = study.counts.uses.iter().zip(&study.header.layers).enumerate().take(LINES_MAX);
    let row = |(index, (uses, layer)): (usize, (&Vec<u64>, &crate::Layer))| {
        let Concentration { top, share, half, unused } = Concentration::of(uses);
        vec![
            index.to_string(),
            layer.block.to_string(),
            layer.experts.to_string(),
            half.to_string(),
            unused.to_string(),
            top.to_string(),
            percent(share),
        ]
    };
    let titles = [
        "MoE layer",
        "block",
        "experts",
        "take half of the uses",
        "never used",
        "most used",
        "its share",
    ];
    let mut numbers = table("Where the uses go", &titles, &rows.map(row).collect::<Vec<_>>());
    numbers.push_str(&left_out(study.header.layers.len(), "layers"));
    let label = format!(
        "Heat map of the uses of experts, {} down, {} across",
        counted(study.header.layers.len() as u64, "layer"),
        counted(shape(&study.header).0.into(), "expert")
    );
    figure(Width::Full, title, &note, &map(study, &label), &numbers)
}

/// The map, as SVG, and its key.
fn map(study: &Study, label: &str) -> String {
    let uses = &study.counts.uses;
    let most = uses.iter().map(Vec::len).max().unwrap_or(1);
    let (down, across) = (together(uses.len(), ROWS_MAX), together(most, COLUMNS_MAX));
    let (rows, columns) = (uses.len().div_ceil(down), most.div_ceil(across));
    let cell = (420 / rows).clamp(4, 16);
    let height = rows * cell;
    let mut svg = format!(
        "<svg class=\"chart\" role=\"img\" aria-label=\"{}\" width=\"100%\" height=\"{}\">\n\
         <svg class=\"heat\" width=\"100%\" height=\"{height}\" viewBox=\"0 0 {columns} {rows}\" \
         preserveAspectRatio=\"none\">",
        escape(label),
        height + 40
    );
    for (level, path) in (0..).zip(paths(uses, down, across)) {
        if !path.is_empty() {
            _ = write!(svg, "<path class=\"h-{level}\" d=\"{path}\"/>");
        }
    }
    svg.push_str("</svg>\n");
    for row in 0..rows {
        let layers = row * down..((row + 1) * down).min(uses.len());
        _ = writeln!(
            svg,
            "<rect class=\"hit\" x=\"0\" y=\"{}\" width=\"100%\" height=\"{cell}\"><title>{}</title></rect>",
            row * cell,
            escape(&told(uses, layers))
        );
    }
    let every = (28 / cell).max(1);
    for row in (0..rows).step_by(every) {
        let y = row * cell + cell / 2 + 4;
        _ = write!(svg, "<text class=\"end\" x=\"-6\" y=\"{y}\">{}</text>", row * down);
    }
    for quarter in 0..=4 {
        let class = ["start", "middle", "middle", "middle", "end"][quarter];
        let expert = (most * quarter / 4).min(most - 1);
        _ = write!(
            svg,
            "<text class=\"{class}\" x=\"{}%\" y=\"{}\">{expert}</text>",
            25 * quarter,
            height + 16
        );
    }
    _ = writeln!(
        svg,
        "<text class=\"axis middle\" x=\"50%\" y=\"{}\">expert of each MoE layer (down: the layers)</text></svg>",
        height + 36
    );
    let keys = LEVELS.iter().enumerate().map(|(level, (_, name))| {
        format!(
            "<svg class=\"key\" width=\"14\" height=\"10\" aria-hidden=\"true\"><path class=\"h-{level}\" d=\"M0 5h14\" stroke-width=\"10\"/></svg>{name}"
        )
    });
    svg + &list("legend heat-key", keys)
}

/// For each level the cells that have it, a line for those beside each other.
fn paths(uses: &[Vec<u64>], down: usize, across: usize) -> Vec<String> {
    let mut paths = vec![String::new(); LEVELS.len()];
    let mut ends = vec![(0, 0); LEVELS.len()];
    for (row, layers) in uses.chunks(down).enumerate() {
        let columns = layers.iter().map(Vec::len).max().unwrap_or(0).div_ceil(across);
        let levels: Vec<usize> = (0..columns)
            .map(|column| level(layers, column * across..(column + 1) * across))
            .collect();
        let mut column = 0;
        for run in levels.chunk_by(|a, b| a == b) {
            let (level, wide) = (run[0], run.len());
            let (x, y): (i64, i64) = (column as i64, row as i64);
            let (from_x, from_y) = std::mem::replace(&mut ends[level], (x + wide as i64, y));
            let path = &mut paths[level];
            _ = match path.is_empty() {
                // In the middle of the row.
                true => write!(path, "M{x} {y}.5h{wide}"),
                false => write!(path, "m{} {}h{wide}", x - from_x, y - from_y),
            };
            column += wide;
        }
    }
    paths
}

/// Of the mean of some experts of some layers.
fn level(layers: &[Vec<u64>], experts: std::ops::Range<usize>) -> usize {
    let (mut sum, mut cells) = (0.0, 0);
    for uses in layers {
        let all: u64 = uses.iter().sum();
        let part = &uses[experts.start.min(uses.len())..experts.end.min(uses.len())];
        let mean = all as f64 / uses.len() as f64;
        sum += part.iter().map(|&uses| if all > 0 { uses as f64 / mean } else { 0.0 }).sum::<f64>();
        cells += part.len();
    }
    let ratio = sum / cells.max(1) as f64;
    LEVELS.iter().rposition(|&(from, _)| ratio >= from).unwrap_or(0)
}

/// What a row of the map says.
fn told(uses: &[Vec<u64>], layers: std::ops::Range<usize>) -> String {
    if layers.len() > 1 {
        return format!("MoE layers {} to {}", layers.start, layers.end - 1);
    }
    let Concentration { top, share, half, .. } = Concentration::of(&uses[layers.start]);
    let experts = uses[layers.start].len();
    format!(
        "MoE layer {}: {half} of {experts} experts take half of the uses; the most used one is {top} ({})",
        layers.start,
        percent(share)
    )
}

/// How the uses of a layer lie.
struct Concentration {
    /// The most used expert, and its share of the uses.
    top: usize,
    share: f64,
    /// The fewest experts with half of the uses.
    half: usize,
    /// Experts that were never used.
    unused: usize,
}

impl Concentration {
    fn of(uses: &[u64]) -> Self {
        let all: u64 = uses.iter().sum();
        let mut order: Vec<usize> = (0..uses.len()).collect();
        order.sort_by_key(|&expert| (std::cmp::Reverse(uses[expert]), expert));
        let top = order.first().copied().unwrap_or(0);
        let mut seen = 0;
        let half = order.iter().position(|&expert| {
            seen += uses[expert];
            2 * seen >= all
        });
        Self {
            top,
            share: uses.get(top).map_or(0.0, |&uses| uses as f64 / all.max(1) as f64),
            half: if all == 0 { 0 } else { half.map_or(0, |place| place + 1) },
            unused: uses.iter().filter(|&&uses| uses == 0).count(),
        }
    }
}

/// Says if cells are of several layers or experts.
fn shared(study: &Study) -> String {
    let uses = &study.counts.uses;
    let most = uses.iter().map(Vec::len).max().unwrap_or(1);
    let (down, across) = (together(uses.len(), ROWS_MAX), together(most, COLUMNS_MAX));
    match (down, across) {
        (1, 1) => String::new(),
        _ => format!(
            " A cell is the mean of {} by {}.",
            counted(down as u64, "layer"),
            counted(across as u64, "expert")
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_beside_each_other_are_one_line() {
        // Twice as often as any, half as often, never, never.
        let paths = paths(&[vec![8, 4, 0, 4], vec![4, 4, 4, 4]], 1, 1);
        assert_eq!(paths[0], "M2 0.5h1");
        assert_eq!(paths[4], "M1 0.5h1m1 0h1m-4 1h4");
        assert_eq!(paths[5], "M0 0.5h1");
        assert!(
            paths.iter().enumerate().all(|(level, p)| p.is_empty() || [0, 4, 5].contains(&level))
        );
    }

    #[test]
    fn large_models_share_cells() {
        let uses = vec![vec![1; 1000]; 4096];
        let (down, across) = (together(4096, ROWS_MAX), together(1000, COLUMNS_MAX));
        assert_eq!((down, across), (32, 4));
        let paths = paths(&uses, down, across);
        assert_eq!(paths[4].matches('h').count(), ROWS_MAX);
        assert!(paths[4].starts_with("M0 0.5h250m-250 1h250"), "{}", &paths[4][..40]);
    }

    #[test]
    fn who_has_half() {
        let of = |uses: &[u64]| {
            let Concentration { top, half, unused, .. } = Concentration::of(uses);
            (top, half, unused)
        };
        assert_eq!(of(&[1, 1, 1, 1]), (0, 2, 0));
        assert_eq!(of(&[0, 9, 3, 0]), (1, 1, 2));
        assert_eq!(of(&[0, 0]), (0, 0, 2));
    }
}

//! `route_trace v1`: a row per routed expert, after a preamble of comments.

use std::collections::BTreeMap;
use std::io::{BufReader, Read};

use super::{Assume, expert, experts, lines::Lines};
use crate::error::{Error, Place, Result};
use crate::header::{Header, Layer, Model};
use crate::limits;
use crate::trace::{NO_EXPERT, Phase, Token, Trace};

/// Columns that there must be. They are found by name: later versions add some.
const NEEDED: [&str; 5] = ["turn", "phase", "step", "layer", "expert"];

#[derive(Debug, Clone, Copy)]
struct Row {
    turn: u32,
    phase: Phase,
    step: u32,
    block: u32,
    slot: u32,
    expert: u16,
    weight: f32,
    line: u32,
}

impl Row {
    fn token(&self) -> (u32, Phase, u32) {
        (self.turn, self.phase, self.step)
    }
}

/// What the comments before the rows tell.
#[derive(Debug, Default)]
struct Preamble {
    model: String,
    architecture: Option<String>,
    experts: Option<u32>,
    used: Option<u32>,
    record_bytes: BTreeMap<u32, u64>,
}

/// Reads a trace. Rows may come in any order; the router's is that of `slot`, or of the rows where
/// there is no such column.
pub(super) fn read(file: impl Read, assume: Assume) -> Result<Trace> {
    let mut lines = Lines::new(BufReader::new(file));
    let mut preamble = Preamble::default();
    let mut columns = None;
    let mut rows = Vec::new();
    while let Some((number, line)) = lines.next()? {
        let at = Place::Line(number);
        if let Some(comment) = line.strip_prefix('#') {
            preamble.read(comment.trim());
            continue;
        }
        let Some(columns) = &columns else {
            columns = Some(Columns::find(line).map_err(|e| e.at(at))?);
            continue;
        };
        let count = rows.len() as u64 + 1;
        Error::limit("rows", count, (limits::IDS_MAX as u64).min(u32::MAX.into()))?;
        let row = columns.row(line, number, rows.len());
        rows.push(row.ok_or_else(|| Error::damaged(at, format!("no row of a trace: {line}")))??);
    }
    if columns.is_none() {
        return Err(Error::file(format!("there are no columns {}", NEEDED.join(", "))));
    }
    rows.sort_by_key(|row| (row.token(), row.block, row.slot, row.line));
    build(preamble, &rows, assume)
}

impl Preamble {
    fn read(&mut self, comment: &str) {
        if let Some(rest) = comment.strip_prefix("model=") {
            let (model, rest) = rest.split_once(" arch=").unwrap_or((rest, ""));
            self.model = model.to_owned();
            let mut words = rest.split_whitespace();
            self.architecture = words.next().map(str::to_owned);
            for (name, value) in words.filter_map(|word| word.split_once('=')) {
                match name {
                    "n_expert" => self.experts = value.parse().ok(),
                    "n_expert_used" => self.used = value.parse().ok(),
                    _ => {}
                }
            }
        } else if comment.starts_with("layer=") {
            let value = |name: &str| {
                let mut words = comment.split_whitespace().filter_map(|word| word.split_once('='));
                words.find(|(found, _)| *found == name).map(|(_, value)| value)
            };
            let layer = value("layer").and_then(|layer| layer.parse().ok());
            let bytes = value("expert_bytes").and_then(|bytes| bytes.parse().ok());
            if let (Some(layer), Some(bytes)) = (layer, bytes) {
                self.record_bytes.insert(layer, bytes);
            }
        }
    }
}

struct Columns {
    needed: [usize; 5],
    slot: Option<usize>,
    weight: Option<usize>,
}

impl Columns {
    fn find(line: &str) -> Result<Self> {
        let place = |name: &str| line.split(',').position(|field| field.trim() == name);
        let found: Vec<usize> = NEEDED.iter().filter_map(|name| place(name)).collect();
        match <[usize; 5]>::try_from(found) {
            Ok(needed) => Ok(Self { needed, slot: place("slot"), weight: place("weight") }),
            Err(_) => Err(Error::file(format!("no columns {}", NEEDED.join(", ")))),
        }
    }

    fn row(&self, line: &str, number: u64, count: usize) -> Option<Result<Row>> {
        let fields: Vec<&str> = line.split(',').map(str::trim).collect();
        let number_at = |column: usize| fields.get(column)?.parse::<u64>().ok();
        let small = |column| number_at(column).and_then(|n| u32::try_from(n).ok());
        let [turn, phase, step, block, id] = self.needed;
        let phase = match number_at(phase)? {
            0 => Phase::Prefill,
            1 => Phase::Decode,
            _ => return None,
        };
        let weight = match self.weight {
            Some(column) => fields.get(column)?.parse().ok()?,
            None => f32::NAN,
        };
        let slot = match self.slot {
            Some(column) => small(column)?,
            None => count as u32,
        };
        let (turn, step, block, id) = (small(turn)?, small(step)?, small(block)?, number_at(id)?);
        let line = u32::try_from(number).unwrap_or(u32::MAX);
        Some(
            expert(id)
                .map(|expert| Row { turn, phase, step, block, slot, expert, weight, line })
                .map_err(|e| e.at(Place::Line(number))),
        )
    }
}

fn build(preamble: Preamble, rows: &[Row], assume: Assume) -> Result<Trace> {
    let mut blocks: Vec<u32> = rows.iter().map(|row| row.block).collect();
    blocks.sort_unstable();
    blocks.dedup();
    let most = rows.chunk_by(|a, b| (a.token(), a.block) == (b.token(), b.block));
    let most = most.map(<[Row]>::len).max().unwrap_or(0) as u32;
    let used = preamble.used.unwrap_or(most);
    let highest = rows.iter().map(|row| row.expert).max().unwrap_or(0);
    let experts = match preamble.experts {
        Some(experts) => experts,
        None => experts(assume, highest)?,
    };
    if blocks.is_empty() {
        // A trace that has not begun: its layers are those that have experts.
        blocks = preamble.record_bytes.iter().filter(|(_, b)| **b > 0).map(|(l, _)| *l).collect();
    }
    let layer = |&block: &u32| Layer {
        block,
        experts,
        used,
        record_bytes: preamble.record_bytes.get(&block).copied().unwrap_or(0),
    };
    let mut trace = Trace::new(Header {
        model: Model { name: preamble.model, hash: None, architecture: preamble.architecture },
        layers: blocks.iter().map(layer).collect(),
        ranked: true,
        sampling: None,
        source: "route_trace v1".to_owned(),
    })?;
    let mut ids = vec![NO_EXPERT; trace.header().row_len()];
    let mut weights = vec![f32::NAN; ids.len()];
    let mut batch = 0u32;
    let mut last: Option<(u32, Phase)> = None;
    for token in rows.chunk_by(|a, b| a.token() == b.token()) {
        let first = &token[0];
        // A prompt is computed at once, and what follows token by token.
        if last.is_some_and(|last| last != (first.turn, Phase::Prefill) || last.1 != first.phase) {
            batch += 1;
        }
        last = Some((first.turn, first.phase));
        ids.fill(NO_EXPERT);
        weights.fill(f32::NAN);
        for cell in token.chunk_by(|a, b| a.block == b.block) {
            let layer = blocks.binary_search(&cell[0].block).expect("it is one of the rows'");
            fill(cell, layer, used as usize, experts, &mut ids, &mut weights)?;
        }
        let known = weights.iter().any(|weight| !weight.is_nan());
        let token = Token {
            prompt: first.turn,
            position: first.step,
            batch,
            id: None,
            phase: first.phase,
            domain: 0,
        };
        trace
            .push(token, &ids, if known { &weights } else { &[] })
            .map_err(|e| relocate(e, first.line))?;
    }
    Ok(trace)
}

/// Puts the experts of one layer into a token's row.
fn fill(
    cell: &[Row],
    layer: usize,
    used: usize,
    count: u32,
    ids: &mut [u16],
    weights: &mut [f32],
) -> Result<()> {
    let at = |row: &Row, reason: String| Err(Error::damaged(Place::Line(row.line.into()), reason));
    if let Some(row) = cell.get(used) {
        return at(row, format!("more than {used} experts of layer {}", row.block));
    }
    for (place, row) in cell.iter().enumerate() {
        if u32::from(row.expert) >= count {
            return at(row, format!("no expert {}, there are {count}", row.expert));
        }
        if cell[..place].iter().any(|other| other.expert == row.expert) {
            return at(row, format!("layer {} has expert {} twice", row.block, row.expert));
        }
        ids[layer * used + place] = row.expert;
        weights[layer * used + place] = row.weight;
    }
    Ok(())
}

fn relocate(error: Error, line: u32) -> Error {
    match error {
        Error::Damaged { reason, .. } => Error::damaged(Place::Line(line.into()), reason),
        other => other,
    }
}

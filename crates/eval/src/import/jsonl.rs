//! JSON lines: `{"tok": n, "layers": [[ids], ...]}`, and what [`write_jsonl`](crate::write_jsonl) adds.

use std::io::{BufReader, Read};

use serde::Deserialize;

use super::{Assume, expert, experts, lines::Lines};
use crate::error::{Error, Place, Result};
use crate::header::Header;
use crate::limits;
use crate::trace::{NO_EXPERT, Phase, Token, Trace};

/// A token. Everything but `layers` may be missing.
#[derive(Debug, Deserialize)]
struct Line {
    layers: Vec<Vec<u64>>,
    #[serde(default)]
    weights: Vec<Vec<Option<f32>>>,
    tok: Option<u32>,
    #[serde(default)]
    prompt: u32,
    position: Option<u32>,
    batch: Option<u32>,
    id: Option<u32>,
    phase: Option<String>,
    #[serde(default)]
    domain: String,
}

#[derive(Debug, Deserialize)]
struct Head {
    header: Header,
}

pub(super) fn read(file: impl Read, assume: Assume) -> Result<Trace> {
    let mut lines = Lines::new(BufReader::new(file));
    let Some((number, first)) = lines.next()? else {
        return Err(Error::file("there are no lines"));
    };
    match serde_json::from_str::<Head>(first) {
        Ok(head) => with_header(lines, head.header),
        Err(error) if first.starts_with("{\"header\"") => {
            Err(Error::damaged(Place::Line(number), error))
        }
        Err(_) => {
            let first = (number, first.to_owned());
            without_header(lines, &first, assume)
        }
    }
}

fn with_header<R: std::io::BufRead>(mut lines: Lines<R>, header: Header) -> Result<Trace> {
    let mut trace = Trace::new(header)?;
    let mut row = Row::default();
    while let Some((number, text)) = lines.next()? {
        let at = Place::Line(number);
        let line = parse(text).map_err(|e| e.at(at))?;
        row.clear();
        let layers = trace.header().layers.clone();
        if line.layers.len() != layers.len() {
            let reason = format!("{} layers instead of {}", line.layers.len(), layers.len());
            return Err(Error::damaged(at, reason));
        }
        for (index, layer) in layers.iter().enumerate() {
            row.add(&line, index, layer.used as usize).map_err(|e| e.at(at))?;
        }
        push(&mut trace, &line, &row).map_err(|e| relocate(e, at))?;
    }
    Ok(trace)
}

/// What the lines say, until the shape of the model is known.
fn without_header<R: std::io::BufRead>(
    mut lines: Lines<R>,
    first: &(u64, String),
    assume: Assume,
) -> Result<Trace> {
    let mut all = Vec::new();
    let mut ids = 0;
    let mut take = |number: u64, text: &str| -> Result<()> {
        let at = Place::Line(number);
        let line = parse(text).map_err(|e| e.at(at))?;
        ids += line.layers.iter().map(Vec::len).sum::<usize>();
        Error::limit("expert ids", ids as u64, limits::IDS_MAX as u64)?;
        all.push((number, line));
        Ok(())
    };
    take(first.0, &first.1)?;
    while let Some((number, text)) = lines.next()? {
        take(number, text)?;
    }
    let layers = all[0].1.layers.len();
    Error::limit("MoE layers", layers as u64, limits::LAYERS_MAX as u64)?;
    let (mut used, mut highest) = (0, 0);
    for (number, line) in &all {
        if line.layers.len() != layers {
            let reason = format!("{} layers instead of {layers}", line.layers.len());
            return Err(Error::damaged(Place::Line(*number), reason));
        }
        for layer in &line.layers {
            used = used.max(layer.len());
            for &id in layer {
                highest = highest.max(expert(id).map_err(|e| e.at(Place::Line(*number)))?);
            }
        }
    }
    Error::limit("experts used in a layer", used as u64, limits::USED_MAX.into())?;
    let mut header = Header::uniform(layers as u32, experts(assume, highest)?, used as u32);
    header.source = "jsonl".to_owned();
    // Sorted everywhere: nobody ranks so.
    let sorted = all.iter().all(|(_, line)| line.layers.iter().all(|layer| layer.is_sorted()));
    header.ranked = !sorted && used > 1;
    let mut trace = Trace::new(header)?;
    let mut row = Row::default();
    for (number, line) in &all {
        let at = Place::Line(*number);
        row.clear();
        for index in 0..layers {
            row.add(line, index, used).map_err(|e| e.at(at))?;
        }
        push(&mut trace, line, &row).map_err(|e| relocate(e, at))?;
    }
    Ok(trace)
}

fn parse(text: &str) -> Result<Line> {
    serde_json::from_str(text).map_err(Error::file)
}

#[derive(Default)]
struct Row {
    ids: Vec<u16>,
    weights: Vec<f32>,
}

impl Row {
    fn clear(&mut self) {
        self.ids.clear();
        self.weights.clear();
    }

    /// Adds the experts of a layer.
    fn add(&mut self, line: &Line, index: usize, used: usize) -> Result<()> {
        let layer = &line.layers[index];
        if layer.len() > used {
            let reason = format!("{} experts in MoE layer {index}, which uses {used}", layer.len());
            return Err(Error::file(reason));
        }
        for &id in layer {
            self.ids.push(expert(id)?);
        }
        self.ids.resize(self.ids.len() + used - layer.len(), NO_EXPERT);
        if let Some(weights) = line.weights.get(index) {
            if weights.len() != layer.len() {
                let reason = format!("{} weights of {} experts", weights.len(), layer.len());
                return Err(Error::file(reason));
            }
            self.weights.extend(weights.iter().map(|weight| weight.unwrap_or(f32::NAN)));
        }
        if !line.weights.is_empty() {
            self.weights.resize(self.ids.len(), f32::NAN);
        }
        Ok(())
    }
}

fn push(trace: &mut Trace, line: &Line, row: &Row) -> Result<()> {
    let phase = match line.phase.as_deref() {
        None | Some("decode") => Phase::Decode,
        Some("prefill") => Phase::Prefill,
        Some(other) => return Err(Error::file(format!("no phase: {other}"))),
    };
    let count = trace.len() as u32;
    let next = trace.tokens().last().map_or(Some(0), |last| last.batch.checked_add(1));
    let batch = line.batch.or(next).ok_or_else(|| Error::file("too many batches"))?;
    let token = Token {
        prompt: line.prompt,
        position: line.position.or(line.tok).unwrap_or(count),
        batch,
        id: line.id,
        phase,
        domain: trace.domains_mut().number(&line.domain)?,
    };
    trace.push(token, &row.ids, &row.weights)
}

fn relocate(error: Error, at: Place) -> Error {
    match error {
        Error::Damaged { reason, .. } => Error::Damaged { place: Some(at), reason },
        other => other,
    }
}

//! A CSV per prompt: `Layer ID,Batch Number,Token,Activated Expert IDs`, layer by layer.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::BufReader;
use std::path::PathBuf;

use super::{Assume, expert, experts, open};
use crate::error::{Error, Place, Result};
use crate::header::{Header, Layer};
use crate::limits;
use crate::trace::{NO_EXPERT, Phase, Token, Trace};

const COLUMNS: [&str; 4] = ["Layer ID", "Batch Number", "Token", "Activated Expert IDs"];

/// The experts of all tokens of a layer: batch and ids, in the order of the file.
type Rows = Vec<(u32, Vec<u16>)>;

/// Reads a prompt of each file. Tokens of a batch of several are a prompt's; the text of a token is
/// passed over.
pub(super) fn read(files: &[PathBuf], assume: Assume) -> Result<Trace> {
    let mut prompts = Vec::new();
    let mut ids = 0;
    for path in files {
        let layers = layers(open(path)?, &mut ids).map_err(|error| error.of(path))?;
        prompts.push((path, layers));
    }
    let mut blocks: Vec<u32> = prompts.iter().flat_map(|(_, p)| p.keys().copied()).collect();
    blocks.sort_unstable();
    blocks.dedup();
    let rows = || prompts.iter().flat_map(|(_, layers)| layers.values().flatten());
    let used = rows().map(|(_, ids)| ids.len()).max().unwrap_or(0) as u32;
    let highest = rows().flat_map(|(_, ids)| ids).copied().max().unwrap_or(0);
    let experts = experts(assume, highest)?;
    let layer = |&block: &u32| Layer { block, experts, used, record_bytes: 0 };
    let mut header = Header::uniform(0, experts, used);
    header.layers = blocks.iter().map(layer).collect();
    header.source = "prompt csv".to_owned();
    let mut trace = Trace::new(header)?;
    let mut batch = 0;
    for (prompt, (path, layers)) in (0u32..).zip(&prompts) {
        add(&mut trace, prompt, &blocks, layers, &mut batch).map_err(|error| error.of(path))?;
    }
    Ok(trace)
}

fn layers(file: File, ids: &mut usize) -> Result<BTreeMap<u32, Rows>> {
    let mut reader = csv::ReaderBuilder::new().from_reader(BufReader::new(file));
    let header = reader.byte_headers().map_err(failed)?;
    if !header.iter().map(<[u8]>::trim_ascii).eq(COLUMNS.map(str::as_bytes)) {
        return Err(Error::damaged(Place::Line(1), format!("no columns {}", COLUMNS.join(","))));
    }
    let mut layers: BTreeMap<u32, Rows> = BTreeMap::new();
    let mut record = csv::ByteRecord::new();
    while reader.read_byte_record(&mut record).map_err(failed)? {
        let line = record.position().map_or(0, csv::Position::line);
        let at = Place::Line(line);
        let text = |column: usize| std::str::from_utf8(&record[column]).unwrap_or_default().trim();
        let number = |column: usize| text(column).parse::<u32>().ok();
        let (Some(layer), Some(batch)) = (number(0), number(1)) else {
            return Err(Error::damaged(at, "no numbers of a layer and a batch"));
        };
        let list = text(3).strip_prefix('[').and_then(|list| list.strip_suffix(']'));
        let Some(list) = list else {
            return Err(Error::damaged(at, format!("no list of experts: {}", text(3))));
        };
        let mut found = Vec::new();
        for id in list.split(',').map(str::trim).filter(|id| !id.is_empty()) {
            let id = id.parse().map_err(|_| Error::damaged(at, format!("no expert {id}")))?;
            found.push(expert(id).map_err(|e| e.at(at))?);
            Error::limit("experts used in a layer", found.len() as u64, limits::USED_MAX.into())?;
        }
        *ids += found.len();
        Error::limit("expert ids", *ids as u64, limits::IDS_MAX as u64)?;
        let rows = layers.entry(layer).or_default();
        if rows.last().is_some_and(|(last, _)| *last > batch) {
            return Err(Error::damaged(at, "its batch was before that of the last row"));
        }
        rows.push((batch, found));
        Error::limit("MoE layers", layers.len() as u64, limits::LAYERS_MAX as u64)?;
    }
    Ok(layers)
}

fn failed(error: csv::Error) -> Error {
    let place = error.position().map(|position| Place::Line(position.line()));
    match error.into_kind() {
        csv::ErrorKind::Io(source) => Error::Io(source),
        csv::ErrorKind::UnequalLengths { expected_len, len, .. } => {
            let error = Error::file(format!("{len} columns instead of {expected_len}"));
            match place {
                Some(place) => error.at(place),
                None => error,
            }
        }
        other => Error::file(format!("no CSV: {other:?}")),
    }
}

fn add(
    trace: &mut Trace,
    prompt: u32,
    blocks: &[u32],
    layers: &BTreeMap<u32, Rows>,
    batch: &mut u32,
) -> Result<()> {
    let Some((first, tokens)) = layers.iter().next() else { return Ok(()) };
    let batches = |rows: &Rows| rows.iter().map(|(batch, _)| *batch).collect::<Vec<_>>();
    for (layer, rows) in layers {
        if batches(rows) != batches(tokens) {
            let reason = format!("layer {layer} has other tokens than layer {first}");
            return Err(Error::file(reason));
        }
    }
    let used = trace.header().layers[0].used as usize;
    let mut row = vec![NO_EXPERT; trace.header().row_len()];
    let mut index = 0;
    for together in tokens.chunk_by(|a, b| a.0 == b.0) {
        let given = index == 0 || together.len() > 1;
        let phase = if given { Phase::Prefill } else { Phase::Decode };
        for _ in together {
            row.fill(NO_EXPERT);
            for (place, block) in blocks.iter().enumerate() {
                let Some(rows) = layers.get(block) else { continue };
                let ids = &rows[index].1;
                row[place * used..][..ids.len()].copy_from_slice(ids);
            }
            let position = index as u32;
            let token = Token { prompt, position, batch: *batch, id: None, phase, domain: 0 };
            trace.push(token, &row, &[]).map_err(|error| match error {
                Error::Damaged { reason, .. } => {
                    Error::file(format!("token {position} of the prompt: {reason}"))
                }
                other => other,
            })?;
            index += 1;
        }
        *batch += 1;
    }
    Ok(())
}

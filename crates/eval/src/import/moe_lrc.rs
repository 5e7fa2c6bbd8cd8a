//! The experts of all tokens as moe-lrc keeps them: a safetensors file per layer.
//!
//! `MODEL_NN.safetensors` of its `topk` step has a tensor per corpus, of shape [samples, tokens, used],
//! with the numbers of the experts, best first (`src/40_topk.py` of the repository). Its texts were
//! computed at once and not decoded, so that all tokens count as prefill.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use tierstream_safetensors::{Dtype, Header as Tensors};

use super::{Assume, expert, experts, open};
use crate::error::{Error, Result};
use crate::header::{Header, Layer, Model};
use crate::limits;
use crate::trace::{Phase, Token, Trace};

/// The tensors of one layer's file: corpus, shape, experts.
type Corpora = Vec<(String, [usize; 3], Vec<u16>)>;

pub(super) fn read(files: &[PathBuf], assume: Assume) -> Result<Trace> {
    let mut layers: Vec<(u32, Corpora)> = Vec::new();
    let mut model = String::new();
    let mut ids = 0;
    for path in files {
        let (name, block) = name(path)?;
        if !model.is_empty() && model != name {
            let reason = format!("it is of {name}, other files are of {model}");
            return Err(Error::file(reason).of(path));
        }
        model = name;
        let corpora = corpora(open(path)?, &mut ids).map_err(|error| error.of(path))?;
        let shapes = |corpora: &Corpora| -> Vec<(String, [usize; 3])> {
            corpora.iter().map(|(name, shape, _)| (name.clone(), *shape)).collect()
        };
        if layers.first().is_some_and(|(_, first)| shapes(first) != shapes(&corpora)) {
            return Err(Error::file("its tensors are not those of the other layers").of(path));
        }
        layers.push((block, corpora));
    }
    layers.sort_by_key(|(block, _)| *block);
    let all = || layers.iter().flat_map(|(_, corpora)| corpora);
    let used = all().map(|(_, shape, _)| shape[2]).max().unwrap_or(0);
    if all().any(|(_, shape, _)| shape[2] != used) {
        return Err(Error::file("tensors have different numbers of experts"));
    }
    let highest = all().flat_map(|(_, _, ids)| ids).copied().max().unwrap_or(0);
    let experts = experts(assume, highest)?;
    let layer = |(block, _): &(u32, _)| Layer {
        block: *block,
        experts,
        used: used as u32,
        record_bytes: 0,
    };
    let mut trace = Trace::new(Header {
        model: Model { name: model, ..Model::default() },
        layers: layers.iter().map(layer).collect(),
        ranked: true,
        sampling: None,
        source: "moe-lrc topk".to_owned(),
    })?;
    add(&mut trace, &layers, used)?;
    Ok(trace)
}

/// Model and layer of `MODEL_NN.safetensors`.
fn name(path: &Path) -> Result<(String, u32)> {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let parts =
        stem.rsplit_once('_').and_then(|(name, n)| Some((name.to_owned(), n.parse().ok()?)));
    parts
        .ok_or_else(|| Error::file("its name does not end in _ and the number of a layer").of(path))
}

fn corpora(mut file: File, ids: &mut usize) -> Result<Corpora> {
    let header = Tensors::read(&mut file).map_err(Error::file)?;
    let mut corpora = Vec::new();
    for tensor in header.tensors() {
        let told = |reason: String| Error::file(format!("tensor {}: {reason}", tensor.name));
        let bytes = match tensor.dtype {
            Dtype::I8 | Dtype::U8 => 1,
            Dtype::I16 | Dtype::U16 => 2,
            Dtype::I32 | Dtype::U32 => 4,
            Dtype::I64 | Dtype::U64 => 8,
            other => return Err(told(format!("{} holds no numbers of experts", other.name()))),
        };
        let [samples, tokens, used] = tensor.shape[..] else {
            return Err(told(format!(
                "its shape is {:?}, not [samples, tokens, used]",
                tensor.shape
            )));
        };
        *ids = ids.saturating_add(tensor.elements() as usize);
        Error::limit("expert ids", *ids as u64, limits::IDS_MAX as u64)?;
        Error::limit("experts used in a layer", used, limits::USED_MAX.into())?;
        file.seek(SeekFrom::Start(tensor.offset))?;
        let mut raw = vec![0; tensor.len as usize];
        file.read_exact(&mut raw)?;
        let numbers = raw.chunks_exact(bytes).map(|bytes| {
            let mut word = [0; 8];
            word[..bytes.len()].copy_from_slice(bytes);
            expert(u64::from_le_bytes(word))
        });
        let numbers = numbers.collect::<Result<Vec<u16>>>().map_err(|e| told(e.to_string()))?;
        if used > 1 && ranks(&numbers, used as usize) {
            return Err(told(
                "ranks of all experts; the folder `topk` has those that are used".into(),
            ));
        }
        let shape = [samples as usize, tokens as usize, used as usize];
        corpora.push((tensor.name.clone(), shape, numbers));
    }
    corpora.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(corpora)
}

/// Whether every token has the numbers from 0 on, once each, as moe-lrc's `rank` step writes.
fn ranks(numbers: &[u16], used: usize) -> bool {
    !numbers.is_empty()
        && numbers.chunks_exact(used).all(|row| {
            let mut row = row.to_vec();
            row.sort_unstable();
            row.iter().enumerate().all(|(rank, &number)| rank == usize::from(number))
        })
}

fn add(trace: &mut Trace, layers: &[(u32, Corpora)], used: usize) -> Result<()> {
    let Some((_, first)) = layers.first() else { return Ok(()) };
    let mut prompt = 0;
    let mut row = Vec::with_capacity(trace.header().row_len());
    for (corpus, (name, [samples, tokens, _], _)) in first.iter().enumerate() {
        let domain = trace.domains_mut().number(name)?;
        for sample in 0..*samples {
            for position in 0..*tokens {
                row.clear();
                for (_, corpora) in layers {
                    let begin = (sample * tokens + position) * used;
                    row.extend_from_slice(&corpora[corpus].2[begin..begin + used]);
                }
                let token = Token {
                    prompt,
                    position: position as u32,
                    batch: prompt,
                    id: None,
                    phase: Phase::Prefill,
                    domain,
                };
                trace.push(token, &row, &[])?;
            }
            prompt += 1;
        }
    }
    Ok(())
}

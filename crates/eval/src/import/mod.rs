//! Reading traces, whatever their format is.

mod jsonl;
mod lines;
mod moe_lrc;
mod prompts;
mod route_csv;

use std::fmt;
use std::fs::{self, File};
use std::io::{Read, Seek};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::trace::Trace;

/// A format in which traces are published. `docs/trace-format.md` tells what is known of each, and
/// from where.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// Our own.
    Parquet,
    /// `route_trace v1`: a CSV with a row per routed expert, and a preamble (BigMoeOnEdge).
    RouteCsv,
    /// A line `{"tok": n, "layers": [[ids], ...]}` per token (waste), or what we export.
    Jsonl,
    /// A CSV per prompt: `Layer ID,Batch Number,Token,Activated Expert IDs` (moe-beyond).
    PromptCsv,
    /// A safetensors file per layer with the experts of all tokens (the `topk` step of moe-lrc).
    MoeLrc,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Parquet => "parquet",
            Self::RouteCsv => "route_trace v1",
            Self::Jsonl => "jsonl",
            Self::PromptCsv => "prompt csv",
            Self::MoeLrc => "moe-lrc topk",
        })
    }
}

/// What to take for known where a format does not tell it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Assume {
    /// Routed experts of each layer. Without it, the highest one that was used is the last.
    pub experts: Option<u32>,
}

impl Format {
    /// The format of a file, or of a folder of files.
    ///
    /// # Errors
    ///
    /// [`Error::Format`] if it is none that is known, with what to do about it; [`Error::File`] if it
    /// cannot be read.
    pub fn detect(path: &Path) -> Result<Self> {
        detect(path).map_err(|error| error.of(path))
    }
}

/// Reads a trace: a file, or a folder where the format has several.
///
/// # Errors
///
/// [`Error::In`] with the file and, inside, what is wrong with it and in which line or row.
pub fn read(path: &Path, assume: Assume) -> Result<Trace> {
    let trace = match Format::detect(path)? {
        Format::Parquet => crate::file::read(open(path)?),
        Format::RouteCsv => route_csv::read(open(path)?, assume),
        Format::Jsonl => jsonl::read(open(path)?, assume),
        Format::PromptCsv => prompts::read(&files(path, "csv")?, assume),
        Format::MoeLrc => moe_lrc::read(&files(path, "safetensors")?, assume),
    };
    trace.map_err(|error| error.of(path))
}

fn detect(path: &Path) -> Result<Format> {
    let what = "read";
    let failed = |source| Error::File { what, path: path.to_owned(), source };
    if fs::metadata(path).map_err(failed)?.is_dir() {
        let has = |extension| files(path, extension).is_ok_and(|files| !files.is_empty());
        return match () {
            () if has("safetensors") => Ok(Format::MoeLrc),
            () if has("csv") => Ok(Format::PromptCsv),
            () => Err(Error::Format {
                reason: "a folder without traces".to_owned(),
                hint: "a folder has one .csv for each prompt, or moe-lrc's .safetensors files",
            }),
        };
    }
    let mut head = Vec::new();
    let mut file = open(path)?;
    file.by_ref().take(4096).read_to_end(&mut head).map_err(failed)?;
    file.rewind().map_err(failed)?;
    let unknown = |reason: &str, hint| Err(Error::Format { reason: reason.to_owned(), hint });
    let first = head.split(|&byte| byte == b'\n').find(|line| !line.trim_ascii().is_empty());
    let first = first.unwrap_or_default().trim_ascii();
    match &head[..] {
        [] => unknown("the file is empty", FORMATS),
        [b'P', b'A', b'R', b'1', ..] => Ok(Format::Parquet),
        [b'A', b'R', b'R', b'O', b'W', b'1', ..] | [0xff, 0xff, 0xff, 0xff, ..] => unknown(
            "an Arrow file",
            "what moe-lrc publishes in Arrow are the texts, not their routing; import the folder of \
             .safetensors files that its `topk` step writes",
        ),
        [_, _, _, _, _, 0, 0, 0, b'{', ..] => Ok(Format::MoeLrc),
        _ if first.starts_with(b"{") => Ok(Format::Jsonl),
        _ if first.starts_with(b"Layer ID,") => Ok(Format::PromptCsv),
        _ if first.starts_with(b"# route_trace") || first.starts_with(b"turn,phase,") => {
            Ok(Format::RouteCsv)
        }
        _ => unknown("no trace in a format that is known", FORMATS),
    }
}

const FORMATS: &str = "there are: Parquet of `tierstream trace`, `route_trace v1` CSV, JSON lines \
                       with `layers`, CSVs of prompts, and moe-lrc's safetensors";

fn open(path: &Path) -> Result<File> {
    File::open(path).map_err(|source| Error::File { what: "read", path: path.to_owned(), source })
}

/// The file itself, or those of a folder that end so, in the order of the numbers in their names.
fn files(path: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let failed = |source| Error::File { what: "read", path: path.to_owned(), source };
    let mut files = Vec::new();
    for entry in fs::read_dir(path).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.extension().is_some_and(|found| found == extension) && path.is_file() {
            files.push(path);
        }
    }
    files.sort_by_cached_key(|path| natural(&path.to_string_lossy()));
    Ok(files)
}

/// A key that sorts `prompt_2` before `prompt_10`.
fn natural(name: &str) -> Vec<(u64, String)> {
    let mut key = Vec::new();
    let mut rest = name;
    while !rest.is_empty() {
        let text = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        let (before, after) = rest.split_at(text);
        let digits = after.find(|c: char| !c.is_ascii_digit()).unwrap_or(after.len());
        let (number, after) = after.split_at(digits);
        key.push((u64::MAX, before.to_owned()));
        key.push((number.parse().unwrap_or(u64::MAX - 1), String::new()));
        rest = after;
    }
    key
}

/// How many experts a layer has if the highest that is used is this one.
fn experts(assume: Assume, highest: u16) -> Result<u32> {
    let least = u32::from(highest) + 1;
    match assume.experts {
        Some(experts) if experts < least => {
            Err(Error::file(format!("expert {highest} is used, but there are to be {experts}")))
        }
        Some(experts) => Ok(experts),
        None => Ok(least),
    }
}

/// An expert's number from a text format.
fn expert(number: u64) -> Result<u16> {
    match u16::try_from(number) {
        Ok(expert) if expert != crate::NO_EXPERT => Ok(expert),
        _ => Err(Error::file(format!("no expert {number}"))),
    }
}

#[cfg(test)]
mod tests;

//! Traces of what this program computes: from the routing of batches to a file.

use std::fs::{self, File};
use std::io::{self, BufWriter};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use tierstream::ggml::{BatchRouting, TokenAt};
use tierstream::{Engine, gguf};
use tierstream_eval::{Header, Layer, Model, NO_EXPERT, Phase, Sampling, Token, Writer};

use super::output;

/// What a batch does not tell of a token.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Of {
    pub(crate) prompt: u32,
    pub(crate) phase: Phase,
    /// A number of [`Recording::domain`].
    pub(crate) domain: u16,
    /// Whether its id may be told.
    pub(crate) has_id: bool,
}

/// A trace that is being written, beside its place until it is finished.
pub(crate) struct Recording {
    path: PathBuf,
    part: PathBuf,
    /// None when it is finished.
    writer: Option<Writer<BufWriter<File>>>,
    /// Where each layer begins in a row.
    starts: Vec<usize>,
    batch: u32,
    prefill: u64,
    decode: u64,
    // A token's, reused.
    experts: Vec<u16>,
    weights: Vec<f32>,
}

impl Recording {
    pub(crate) fn create(path: &Path, header: Header) -> anyhow::Result<Self> {
        let part = part_of(path);
        let failed = || format!("cannot write {}", path.display());
        let used = header.layers.iter().map(|layer| layer.used as usize);
        let starts = used.scan(0, |end, used| Some(std::mem::replace(end, *end + used))).collect();
        let row = header.row_len();
        let file = new_file(&part).with_context(failed)?;
        // From here on it is removed if anything fails.
        let mut recording = Self {
            path: path.to_owned(),
            part,
            writer: None,
            starts,
            batch: 0,
            prefill: 0,
            decode: 0,
            experts: vec![NO_EXPERT; row],
            weights: vec![f32::NAN; row],
        };
        recording.writer = Some(Writer::new(BufWriter::new(file), header)?);
        Ok(recording)
    }

    /// The number of a domain's tag.
    pub(crate) fn domain(&mut self, name: &str) -> anyhow::Result<u16> {
        Ok(self.writer().domain(name)?)
    }

    /// Adds the tokens of batches. `one_by_one`: each counts as a batch of its own.
    pub(crate) fn push(
        &mut self,
        batches: &[BatchRouting],
        one_by_one: bool,
        mut of: impl FnMut(&TokenAt) -> Of,
    ) -> anyhow::Result<()> {
        for batch in batches {
            for (index, at) in batch.tokens.iter().enumerate() {
                if !self.fill(batch, index) {
                    continue;
                }
                let Of { prompt, phase, domain, has_id } = of(at);
                let id = has_id.then_some(at.entry.token.cast_unsigned());
                let batch = self.batch;
                let token = Token { prompt, position: at.position, batch, id, phase, domain };
                let (experts, weights) = (&self.experts, &self.weights);
                let writer = self.writer.as_mut().expect("not finished");
                writer.push(&token, experts, weights)?;
                match phase {
                    Phase::Prefill => self.prefill += 1,
                    Phase::Decode => self.decode += 1,
                }
                self.batch += u32::from(one_by_one);
            }
            self.batch += 1;
        }
        Ok(())
    }

    /// Makes the row of a token. False if nothing is known of it.
    fn fill(&mut self, batch: &BatchRouting, index: usize) -> bool {
        self.experts.fill(NO_EXPERT);
        self.weights.fill(f32::NAN);
        let mut known = false;
        for (layer, &start) in batch.layers.iter().zip(&self.starts) {
            let Some((experts, weights)) = layer.of(index) else { continue };
            known |= !experts.is_empty();
            for (to, &expert) in self.experts[start..].iter_mut().zip(experts) {
                *to = u16::try_from(expert).expect("the header allows no more");
            }
            self.weights[start..start + weights.len()].copy_from_slice(weights);
        }
        known
    }

    /// Tokens of prompts and decoded ones so far.
    pub(crate) fn tokens(&self) -> (u64, u64) {
        (self.prefill, self.decode)
    }

    /// Puts the file to its place. Returns its size.
    pub(crate) fn finish(mut self) -> anyhow::Result<u64> {
        let writer = self.writer.take().expect("finished once");
        let failed = || format!("cannot write {}", self.path.display());
        let written = || -> anyhow::Result<u64> {
            let file = writer.finish()?.into_inner()?;
            let bytes = file.metadata()?.len();
            fs::rename(&self.part, &self.path)?;
            Ok(bytes)
        };
        written().with_context(failed)
    }

    fn writer(&mut self) -> &mut Writer<BufWriter<File>> {
        self.writer.as_mut().expect("not finished")
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        // Of a finished one nothing is there; what is left of another one is of no use.
        let _ = fs::remove_file(&self.part);
    }
}

fn part_of(path: &Path) -> PathBuf {
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    PathBuf::from(part)
}

/// For the user alone: routing follows what was written.
fn new_file(path: &Path) -> io::Result<File> {
    File::options().write(true).create(true).truncate(true).mode(0o600).open(path)
}

/// An error if no trace could be written there, before a model is loaded for it.
pub(crate) fn try_path(path: &Path) -> anyhow::Result<()> {
    let part = part_of(path);
    let tried = new_file(&part).and_then(|_| fs::remove_file(&part));
    tried.with_context(|| format!("cannot write {}", path.display()))
}

/// The header of a trace of a loaded model, which is called `name`.
pub(crate) fn header(
    engine: &Engine,
    name: &str,
    sampling: Option<Sampling>,
    source: &str,
) -> Header {
    let file = engine.file();
    let hash = digest(file);
    let architecture = file.metadata().str("general.architecture").ok().flatten();
    Header {
        model: Model { name: name.to_owned(), hash, architecture: architecture.map(str::to_owned) },
        layers: layers(engine),
        ranked: true,
        sampling,
        source: source.to_owned(),
    }
}

/// What tells a model from others; none, after a note, if its files cannot be read.
pub(crate) fn digest(file: &gguf::Model) -> Option<String> {
    match tierstream::sums::identity(file) {
        Ok(sum) => Some(format!("xxh3:{sum:016x}")),
        Err(error) => {
            output::note(format!("the model has no digest, to be told from others: {error}"));
            None
        }
    }
}

/// The layers whose experts are in the pool, in the order of computing.
fn layers(engine: &Engine) -> Vec<Layer> {
    let all = engine.experts().layers();
    let of = |block: u32| {
        let layer = all.iter().find(|layer| layer.layer == block && layer.is_streamed());
        let layer = layer.expect("the pool has layers of the model");
        let (experts, used, record_bytes) = (layer.experts, layer.used, layer.record_bytes);
        Layer { block, experts, used, record_bytes }
    };
    engine.model().layer_counters().into_iter().map(|(block, _)| of(block)).collect()
}

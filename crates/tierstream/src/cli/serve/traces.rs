//! `serve --trace`: where the tokens of requests are routed to, in files of a folder.
//!
//! What a request wrote, and what it was answered, is not in them: no ids of tokens.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use tierstream::Engine;
use tierstream::ggml::{self, BatchRouting, Entry};
use tierstream_eval::{Header, Phase};

use crate::cli::output;
use crate::cli::recording::{self, Of, Recording};

/// Tokens of a file. What is in the last one is lost if the server is killed.
const FILE_TOKENS: u64 = 1 << 16;

/// The traces of one loaded model.
pub(super) struct Traces {
    /// Of the files: the folder, and a name with the model and the time.
    title: PathBuf,
    header: Header,
    files: u32,
    recording: Option<Recording>,
    prompts: u32,
    sequences: Vec<Sequence>,
}

/// What is known of a sequence of the context.
#[derive(Debug, Clone, Copy, Default)]
struct Sequence {
    /// None for one that begins anew.
    prompt: Option<u32>,
    /// A token was drawn from its last row: the next one is that.
    has_drawn: bool,
}

impl Traces {
    /// Has the engine's context record routing.
    pub(super) fn begin(
        folder: &Path,
        name: &str,
        engine: &mut Engine,
    ) -> tierstream::Result<Self> {
        engine.context().record_routing(true)?;
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let plain = name.replace(['/', ':', '\\'], "-");
        let sequences = engine.context().options().n_seq as usize;
        Ok(Self {
            title: folder.join(format!("{plain}-{}", since.as_millis())),
            header: recording::header(engine, name, None, "tierstream serve --trace"),
            files: 0,
            recording: None,
            prompts: 0,
            sequences: vec![Sequence::default(); sequences],
        })
    }

    /// A sequence has other tokens now than what was computed of it.
    pub(super) fn other_tokens(&mut self, sequence: usize) {
        self.sequences[sequence] = Sequence::default();
    }

    /// Entries were computed, in batches that are routed so. False, after a note, if that is not known, or
    /// cannot be written.
    pub(super) fn add(
        &mut self,
        entries: &[Entry],
        routing: ggml::Result<Vec<BatchRouting>>,
    ) -> bool {
        let of = self.of_sequences(entries);
        let added = self.recording().and_then(|recording| {
            recording.push(&routing?, false, |at| of[at.entry.sequence as usize])?;
            let (prefill, decode) = recording.tokens();
            Ok(prefill + decode >= FILE_TOKENS)
        });
        let finished = added.and_then(|is_full| if is_full { self.finish() } else { Ok(()) });
        finished.inspect_err(Self::tell).is_ok()
    }

    /// What the tokens of each sequence are.
    fn of_sequences(&mut self, entries: &[Entry]) -> Vec<Of> {
        let Self { prompts, sequences, .. } = self;
        let of = |(number, sequence): (usize, &mut Sequence)| {
            let mut phase = Phase::Prefill;
            let mut own = entries.iter().filter(|entry| entry.sequence as usize == number);
            let count = own.clone().count();
            if let Some(last) = own.next_back() {
                // Another turn of a conversation does not follow on the last one's answer token by token.
                if sequence.prompt.is_none() || sequence.has_drawn && count > 1 {
                    sequence.prompt = Some(*prompts);
                    *prompts += 1;
                }
                if sequence.has_drawn && count == 1 {
                    phase = Phase::Decode;
                }
                sequence.has_drawn = last.keep;
            }
            Of { prompt: sequence.prompt.unwrap_or(0), phase, domain: 0, has_id: false }
        };
        sequences.iter_mut().enumerate().map(of).collect()
    }

    fn recording(&mut self) -> anyhow::Result<&mut Recording> {
        if self.recording.is_none() {
            self.files += 1;
            let mut name = self.title.as_os_str().to_owned();
            name.push(format!("-{}.parquet", self.files));
            self.recording = Some(Recording::create(Path::new(&name), self.header.clone())?);
        }
        Ok(self.recording.as_mut().expect("just made"))
    }

    fn finish(&mut self) -> anyhow::Result<()> {
        self.recording.take().map_or(Ok(()), |recording| recording.finish().map(drop))
    }

    fn tell(error: &anyhow::Error) {
        output::note(format!("--trace: nothing is recorded of this model any more: {error:#}"));
    }
}

impl Drop for Traces {
    fn drop(&mut self) {
        let _ = self.finish().inspect_err(Self::tell);
    }
}

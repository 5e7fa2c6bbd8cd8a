//! What the server needs of whatever runs models. The program runs them with llama.cpp; tests have one that
//! needs no weights (`crates/script`).

use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A token id.
pub type Token = i32;

/// Why an engine could not do something, for the client to read.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// Stopped by [`Compute::stopper`].
    #[error("cancelled")]
    Cancelled,
    /// The server ends, and its models go while they compute.
    #[error("the server is stopping")]
    Stopping,
    /// What was asked for cannot be: the client's mistake.
    #[error("{0}")]
    Refused(String),
    /// It does not fit what memory is left.
    #[error("{0}")]
    NoRoom(String),
    /// Anything else.
    #[error("{0}")]
    Failed(String),
}

/// Loads models.
pub trait Engine: Send + Sync + 'static {
    /// Loads a model, which takes seconds to minutes, as long as `is_wanted`.
    ///
    /// # Errors
    /// [`EngineError`].
    fn load(
        &self,
        path: &Path,
        options: &LoadOptions,
        is_wanted: &(dyn Fn() -> bool + Sync),
    ) -> Result<Loaded, EngineError>;
    /// Whether a model could be loaded with so much context if no other was there, as far as its header tells.
    ///
    /// # Errors
    /// Those of [`Engine::load`].
    fn check(&self, path: &Path, ctx: Option<u32>) -> Result<(), EngineError>;
}

/// How a model is to be loaded.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LoadOptions {
    /// What the client calls it.
    pub name: String,
    /// Tokens of context of each sequence, if the client wants a number: what the model was trained with at most.
    pub ctx: Option<u32>,
    /// Bytes of host memory that other loaded models have.
    pub taken_bytes: u64,
    /// Bytes of a GPU's memory that they have.
    pub taken_vram_bytes: u64,
}

/// A model that is loaded.
pub struct Loaded {
    /// Its tokenizer.
    pub text: Arc<dyn Text>,
    /// What computes.
    pub compute: Box<dyn Compute>,
    /// What sequences that are saved are good for: models of which this is the same, in this process or another.
    pub identity: String,
    /// Counters for `/metrics`.
    pub counters: Arc<dyn Fn() -> Counters + Send + Sync>,
    /// Counters of its layers with experts, for the page; none where nothing streams. What they cost is
    /// paid by who asks.
    pub layers: Arc<dyn Fn() -> Vec<LayerCounters> + Send + Sync>,
    /// What its experts' ways can do.
    pub rates: Rates,
    /// Bytes of host memory that it has.
    pub ram_bytes: u64,
    /// Bytes of a GPU's memory that it has.
    pub vram_bytes: u64,
    /// What a user should know of how it was loaded.
    pub notes: Vec<String>,
}

/// Bounds of [`Counters::waits`], in seconds.
pub const WAIT_BOUNDS: [f64; 10] =
    [16e-6, 64e-6, 256e-6, 1e-3, 4e-3, 16e-3, 64e-3, 0.256, 1.0, 4.0];

/// What a model did since it was loaded, and what it holds.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Counters {
    /// Routed experts that were in a GPU's memory.
    pub from_vram: u64,
    /// Routed experts that were in host memory.
    pub from_ram: u64,
    /// Routed experts that had to be read.
    pub from_drive: u64,
    /// Records of experts that gave way.
    pub evictions: u64,
    /// Bytes of experts that were read.
    pub bytes_read: u64,
    /// Bytes that the drive has read, of whatever.
    pub drive_bytes: u64,
    /// Bytes of experts that came into a GPU's memory.
    pub gpu_bytes: u64,
    /// Bytes that the expert pools have of a GPU's memory.
    pub vram_pool_bytes: u64,
    /// Bytes that they have of host memory.
    pub ram_pool_bytes: u64,
    /// Bytes of the experts that are in a GPU's memory now.
    pub vram_filled_bytes: u64,
    /// Bytes of those that are in host memory now.
    pub ram_filled_bytes: u64,
    /// Bytes of all experts that stream, as they lie on the drive.
    pub expert_bytes: u64,
    /// Reads that the drive has now.
    pub reads_in_flight: u64,
    /// Reads that it has done.
    pub reads: u64,
    /// How long computing waited for experts: so many times up to each of [`WAIT_BOUNDS`] seconds, and longer.
    pub waits: [u64; WAIT_BOUNDS.len() + 1],
    /// All these waits, in seconds.
    pub waited_seconds: f64,
    /// Time that half of them took at most, and 99 of 100, in seconds.
    pub read_seconds: (f64, f64),
}

/// What happened to the experts of one layer since the model was loaded.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LayerCounters {
    /// Its number among all layers of the model.
    pub block: u32,
    /// Routed experts that were in a GPU's memory.
    pub from_vram: u64,
    /// Routed experts that were in host memory.
    pub from_ram: u64,
    /// Routed experts that had to be read.
    pub from_drive: u64,
    /// How often each expert was routed to, modulo 2^32. Empty where nobody looks at the routing, because
    /// all experts are in place.
    pub uses: Vec<u32>,
}

/// What the ways of experts can do at most, bytes per second; none where nobody knows.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Rates {
    /// The drive, as it was measured.
    pub drive: Option<f64>,
    /// The link to the GPU, by its generation and width; none without a GPU.
    pub gpu: Option<f64>,
}

/// A tokenizer.
pub trait Text: Send + Sync {
    /// The ids of a text. `begin`: with the token that the model wants first. `markup`: names of control
    /// tokens are read as these.
    ///
    /// # Errors
    /// [`EngineError::Refused`] where the model has no tokenizer.
    fn tokenize(&self, text: &str, begin: bool, markup: bool) -> Result<Vec<Token>, EngineError>;
    /// The bytes of a token. `markup`: those of control tokens, too.
    fn piece(&self, token: Token, markup: bool) -> Vec<u8>;
    /// Whether it ends an answer.
    fn is_end(&self, token: Token) -> bool;
    /// The texts that templates call `bos_token` and `eos_token`; empty where the model has none.
    fn bos_eos(&self) -> (String, String);
    /// The number of ids.
    fn len(&self) -> usize;
    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A token that is appended to a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// The token.
    pub token: Token,
    /// The sequence.
    pub sequence: usize,
    /// Whether its row of logits is wanted.
    pub keep: bool,
}

/// What can be computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Tokens of a sequence.
    pub ctx: usize,
    /// Sequences.
    pub sequences: usize,
    /// Tokens of a step.
    pub batch: usize,
    /// Sequences that get a token in one step: fewer than there are where more would be slower than one
    /// after the other.
    pub together: usize,
    /// It makes embeddings of whole texts, and writes none: a text is one step, and nothing is held of it.
    pub is_encoder: bool,
}

/// A model that computes several sequences.
pub trait Compute: Send {
    /// What it can.
    fn limits(&self) -> Limits;
    /// Appends tokens to sequences and computes them.
    ///
    /// # Errors
    /// [`EngineError`]. The sequences are then as they were, or empty.
    fn step(&mut self, entries: &[Entry]) -> Result<(), EngineError>;
    /// Appends tokens to a sequence, and gives what the model makes of all that the sequence holds: an embedding
    /// of any length. Of a model that is no encoder this is one token.
    ///
    /// # Errors
    /// As [`Compute::step`].
    fn embed(&mut self, sequence: usize, tokens: &[Token]) -> Result<Vec<f32>, EngineError>;
    /// A row of logits of the last step, in the order in which they were wanted.
    fn logits(&mut self, row: usize) -> &[f32];
    /// Tokens of a sequence.
    fn len(&mut self, sequence: usize) -> usize;
    /// Forgets what a sequence has from there on; false where that cannot be.
    fn cut(&mut self, sequence: usize, len: usize) -> bool;
    /// Bytes of [`Compute::save`].
    fn saved_bytes(&mut self, sequence: usize) -> usize;
    /// What [`Compute::restore`] makes a sequence of that it is now, in any model with this
    /// [`Loaded::identity`]; none where that cannot be.
    fn save(&mut self, sequence: usize) -> Option<Vec<u8>>;
    /// Makes an empty sequence one of `len` tokens that was saved; false where that failed, and it is empty then.
    fn restore(&mut self, sequence: usize, state: &[u8], len: usize) -> bool;
    /// Nothing is computed for a while.
    fn rest(&mut self) {}
    /// A sampler.
    fn sampler(&self, sampling: &Sampling) -> Box<dyn Sample>;
    /// Stops the step that runs, from any thread, and every later one until it is called with `false`.
    fn stopper(&self) -> Arc<dyn Fn(bool) + Send + Sync>;
}

/// Draws tokens.
pub trait Sample: Send {
    /// Tells of tokens that were not drawn.
    fn accept(&mut self, tokens: &[Token]);
    /// Draws from a row of logits; none where all are -infinity.
    fn sample(&mut self, logits: &[f32]) -> Option<Token>;
}

/// How tokens are drawn. The fields are those of `tierstream_ggml::Sampling`.
#[derive(Debug, Clone, Copy, PartialEq)]
#[allow(missing_docs)]
pub struct Sampling {
    pub temperature: f32,
    pub top_k: i32,
    pub top_p: f32,
    pub min_p: f32,
    pub typical_p: f32,
    pub penalty_tokens: u32,
    pub repeat_penalty: f32,
    pub frequency_penalty: f32,
    pub presence_penalty: f32,
    pub seed: u32,
}

/// A model that is there beside those of the store.
#[derive(Debug, Clone)]
pub struct Extra {
    /// Its name.
    pub name: String,
    /// Its file.
    pub path: PathBuf,
}

//! What can go wrong between a model file and its tokens.

use std::path::PathBuf;
use std::sync::Arc;

/// An error of this crate.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file is no GGUF that we accept; llama.cpp has not seen it.
    #[error(transparent)]
    Gguf(Arc<tierstream_gguf::Error>),
    /// A read failed, fell short, or the file changed under us.
    #[error(transparent)]
    Io(#[from] tierstream_io::Error),
    /// Weights do not have the checksum that they are compared with.
    #[error("{0}")]
    Checksum(Box<crate::verified::Mismatch>),
    /// Weights are to be compared with checksums that llama.cpp reads by itself.
    #[error(
        "{}: {} cannot be compared with checksums: llama.cpp reads {} by itself", path.display(),
        tensor.as_ref().map_or("weights".to_owned(), |name| format!("the tensor {name}")),
        if tensor.is_some() { "it" } else { "them" }
    )]
    NotVerified {
        /// The (first) file of the model.
        path: PathBuf,
        /// Which; none if it is all of them.
        tensor: Option<String>,
    },
    /// The file says something on which llama.cpp would abort; it has not seen it.
    #[error("{}: this model cannot be used: {reason}", path.display())]
    Unusable {
        /// The model file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// llama.cpp refused the model; `reason` is its own last error line.
    #[error("{}: llama.cpp cannot load this model: {reason}", path.display())]
    Load {
        /// The model file.
        path: PathBuf,
        /// What llama.cpp logged.
        reason: String,
    },
    /// llama.cpp could not make a context (KV cache and compute buffers).
    #[error("cannot create a context of {n_ctx} tokens: {reason}")]
    Context {
        /// Tokens asked for.
        n_ctx: u32,
        /// What llama.cpp logged.
        reason: String,
    },
    /// The pool asked for cannot hold what one token needs.
    #[error(
        "an expert pool of {bytes} bytes is too small: this model needs at least {least_bytes} \
         (the experts that one token uses, in every layer)"
    )]
    PoolTooSmall {
        /// Bytes asked for.
        bytes: u64,
        /// Bytes of the smallest pool that works.
        least_bytes: u64,
    },
    /// The pool could not be made.
    #[error(transparent)]
    Pool(#[from] tierstream_pool::Error),
    /// A start-up check found that llama.cpp does not behave as the proxy device needs.
    #[error("start-up check failed: {0}")]
    SelfCheck(String),
    /// The compute graph has a shape that the executor cannot serve.
    #[error("layer {layer}: {reason}")]
    Graph {
        /// Transformer block (`blk.N`).
        layer: u32,
        /// What was met.
        reason: String,
    },
    /// The processor cannot compute experts of a layer, as [`Miss::Compute`](crate::Miss::Compute)
    /// asks for.
    #[error("layer {layer}: only the GPU can compute these experts: {reason}")]
    OnlyOnGpu {
        /// Transformer block (`blk.N`).
        layer: u32,
        /// Which operation it is because of.
        reason: String,
    },
    /// `llama_decode` failed for a reason of its own.
    #[error("decoding failed (llama.cpp status {status}): {reason}")]
    Decode {
        /// llama.cpp's return value.
        status: i32,
        /// What llama.cpp logged, or a plain sentence.
        reason: String,
    },
    /// The logits are no numbers.
    #[error(
        "{}: the model computes no numbers: its weights are damaged or not what the file says",
        path.display()
    )]
    NotANumber {
        /// The model file.
        path: PathBuf,
    },
    /// llama.cpp was to load a packed model in a way that only it does.
    #[error("{}: llama.cpp cannot load a packed model", path.display())]
    PackedForStock {
        /// The packed file.
        path: PathBuf,
    },
    /// The caller's cancel flag was seen.
    #[error("cancelled")]
    Cancelled,
    /// The batch does not fit the context or breaks a limit.
    #[error("{0}")]
    Batch(String),
    /// What was saved of a sequence is nothing that this context can go on with.
    #[error("a saved sequence cannot be restored: {reason}")]
    Saved {
        /// llama.cpp's reason, or ours.
        reason: String,
    },
    /// Text could not be turned into tokens or back.
    #[error("{0}")]
    Vocab(String),
    /// The GPU has too little memory left, or the host has for pinning.
    #[error(transparent)]
    OutOfGpuMemory(tierstream_cuda::Error),
    /// The GPU has too little memory left for the weights that are not in the pool.
    #[error("the GPU has no room for the weights beside the experts: {bytes} bytes")]
    WeightsTooLarge {
        /// Bytes of all of them.
        bytes: usize,
    },
    /// Not even the smallest pool, and what computing with it takes, has room in the GPU's memory:
    /// something else has taken it.
    #[error(
        "the GPU has no memory left: the experts of one token need {least_bytes} bytes of it, and \
         {had_bytes} are to be had ({source})"
    )]
    GpuMemoryTaken {
        /// What the experts of one token take, and the room that batches are computed in.
        least_bytes: u64,
        /// What the pool had, and what was free.
        had_bytes: u64,
        /// What the driver said.
        source: tierstream_cuda::Error,
    },
    /// A pool is to change its size that cannot: only those on a GPU can.
    #[error("the model has no expert pool on a GPU, and no other one changes its size")]
    NotElastic,
    /// The GPU is not there, refused something, or is gone.
    #[error(transparent)]
    Gpu(tierstream_cuda::Error),
    /// The GPU has waited too long for experts. The same token can be computed again, which
    /// [`Context`](crate::Context) does, layer by layer.
    #[error("layer {layer}: the GPU has waited too long for experts")]
    GateGivenUp {
        /// Transformer block (`blk.N`).
        layer: u32,
    },
    /// A ggml backend library or device is not there or does not fit.
    #[error("{0}")]
    Backend(String),
    /// Memory for the pool could not be had.
    #[error("cannot allocate {bytes} bytes for {what}")]
    OutOfMemory {
        /// Bytes asked for.
        bytes: usize,
        /// For what.
        what: &'static str,
    },
    /// Recorded routing is of another model than this one.
    #[error(
        "the recorded routing does not fit: it has experts {found:?} for MoE layer {layer}, of which \
         a token uses {used} of {experts}"
    )]
    Replay {
        /// Index among the MoE layers.
        layer: usize,
        /// What is recorded.
        found: Vec<u32>,
        /// Experts that a token uses.
        used: usize,
        /// Experts of the layer.
        experts: u32,
    },
    /// Nobody looks at the routing of a model whose experts are not in a pool.
    #[error("the model has no expert pool, so that nobody looks at its routing")]
    NoPool,
    /// The model has a pool, or is being given one by another thread.
    #[error("the model has an expert pool already")]
    HasPool,
    /// Of the model there is only the header: see [`Rehearsal`](crate::Rehearsal).
    #[error("this model was only rehearsed: it has no weights")]
    Rehearsal,
    /// A bug of ours, caught before it could cross a C frame.
    #[error("internal error: {0}")]
    Internal(String),
}

impl From<tierstream_cuda::Error> for Error {
    fn from(e: tierstream_cuda::Error) -> Self {
        match e {
            tierstream_cuda::Error::OutOfMemory { .. } => Error::OutOfGpuMemory(e),
            other => Error::Gpu(other),
        }
    }
}

impl From<tierstream_gguf::Error> for Error {
    fn from(e: tierstream_gguf::Error) -> Self {
        Error::Gguf(Arc::new(e))
    }
}

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

//! Errors of the facade, each with what a user can do about it.

use std::path::PathBuf;

use crate::memory;
use crate::size::Bytes;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The model file cannot be read as a GGUF.
    #[error(transparent)]
    Gguf(#[from] tierstream_gguf::Error),
    /// A packed model cannot be read, or made.
    #[error(transparent)]
    Pack(tierstream_pack::Error),
    /// There are no checksums that weights can be compared with.
    #[error(transparent)]
    Sums(tierstream_sums::Error),
    /// Loading, decoding or reading failed.
    #[error(transparent)]
    Engine(tierstream_ggml::Error),
    /// The storage engine could not be started.
    #[error(transparent)]
    Io(#[from] tierstream_io::Error),
    /// `--ram` is below what the model needs.
    #[error(
        "{} is too little memory for this model: it needs at least {}{}",
        Bytes(*.ram_bytes), Bytes(*.least_bytes).rounded_up(), parts(*.least_bytes, *.pool_bytes)
    )]
    Ram {
        /// The budget.
        ram_bytes: u64,
        /// The least budget that works.
        least_bytes: u64,
        /// Of that, for the experts that one token uses; 0 for a dense model. The others are dense weights, KV cache,
        /// compute buffers and the program itself.
        pool_bytes: u64,
    },
    /// `--vram` is below what the model needs.
    #[error(
        "{} is too little memory of the GPU for this model: it needs at least {}",
        Bytes(*.vram_bytes), Bytes(*.least_bytes).rounded_up()
    )]
    Vram {
        /// The budget.
        vram_bytes: u64,
        /// The least budget that works.
        least_bytes: u64,
    },
    /// Something else has taken so much of the GPU's memory that no pool has room.
    #[error(
        "the GPU has no memory left: the experts of one token need {} of it, and {} are to be had",
        Bytes(*.least_bytes), Bytes(*.had_bytes)
    )]
    VramTaken {
        /// What the least pool takes, and the room that batches are computed in.
        least_bytes: u64,
        /// What the pool had, and what was free.
        had_bytes: u64,
    },
    /// `--ram`, with a GPU, is below what one token needs.
    #[error(
        "{} of host memory are too little for the experts that do not fit the GPU's: those of one \
         token take {}",
        Bytes(*.ram_bytes), Bytes(*.least_bytes)
    )]
    RamBelow {
        /// The budget.
        ram_bytes: u64,
        /// The least that works.
        least_bytes: u64,
    },
    /// `--miss compute` without experts in host memory.
    #[error("--miss compute computes experts from host memory, and there are none of them there")]
    NothingToCompute,
    /// `--experts` is below what one token needs.
    #[error(
        "an expert pool of {} is too small: this model needs at least {} (the experts that one \
         token uses, in every layer)",
        Bytes(*.bytes), Bytes(*.least_bytes)
    )]
    PoolTooSmall {
        /// The pool asked for.
        bytes: u64,
        /// The least pool that works.
        least_bytes: u64,
    },
    /// The expert pool takes more memory than there is now.
    #[error(
        "an expert pool of {} does not fit the {} of memory that are available",
        Bytes(*.pool_bytes), Bytes(*.available_bytes)
    )]
    NotAvailable {
        /// The pool asked for.
        pool_bytes: u64,
        /// What the system, or this process's memory cgroup, has left.
        available_bytes: u64,
    },
    /// The context has no room for so many tokens.
    #[error("{tokens} tokens do not fit the {room} free ones of a context of {n_ctx}")]
    ContextTooSmall {
        /// Tokens to compute.
        tokens: usize,
        /// Tokens that there is room for.
        room: usize,
        /// Tokens of the context.
        n_ctx: u32,
    },
    /// The system has no memory left for something.
    #[error("there is no memory for {what}{}", refused(*.bytes))]
    OutOfMemory {
        /// Bytes asked for; 0 if that is not known.
        bytes: usize,
        /// For what.
        what: &'static str,
    },
    /// A file of the user's cannot be read.
    #[error("cannot read {}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// `--io cufile` where cuFile cannot read.
    #[error("--io cufile: {reason}")]
    Cufile {
        /// Why not.
        reason: String,
    },
    /// The request makes no sense.
    #[error("{0}")]
    Request(String),
}

/// Result of the facade.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl From<tierstream_pack::Error> for Error {
    fn from(error: tierstream_pack::Error) -> Self {
        match error {
            tierstream_pack::Error::Gguf(error) => Error::Gguf(error),
            tierstream_pack::Error::Source(error) => Error::Io(error),
            other => Error::Pack(other),
        }
    }
}

impl From<tierstream_sums::Error> for Error {
    fn from(error: tierstream_sums::Error) -> Self {
        match error {
            tierstream_sums::Error::Gguf(error) => Error::Gguf(error),
            tierstream_sums::Error::Source(error) => Error::Io(error),
            other => Error::Sums(other),
        }
    }
}

impl From<tierstream_ggml::Error> for Error {
    fn from(error: tierstream_ggml::Error) -> Self {
        match error {
            tierstream_ggml::Error::PoolTooSmall { bytes, least_bytes } => {
                Error::PoolTooSmall { bytes, least_bytes }
            }
            tierstream_ggml::Error::GpuMemoryTaken { least_bytes, had_bytes, .. } => {
                Error::VramTaken { least_bytes, had_bytes }
            }
            tierstream_ggml::Error::OutOfMemory { bytes, what } => {
                Error::OutOfMemory { bytes, what }
            }
            other => Error::Engine(other),
        }
    }
}

impl Error {
    /// What a user can do about it.
    pub fn hint(&self) -> Option<String> {
        use tierstream_ggml::Error as E;
        match self {
            Error::Gguf(e) => gguf_hint(e),
            Error::Engine(E::Gguf(e)) => gguf_hint(e),
            Error::Pack(e) => e.hint(),
            Error::Sums(e) => e.hint(),
            Error::Engine(E::Checksum(m)) => Some(match &m.source.record {
                Some(record) => format!(
                    "the file or its drive is damaged: fetch the file again; if it was exchanged on \
                     purpose, remove {}, and its checksums are recorded anew",
                    record.display()
                ),
                None => "the file or its drive is damaged: fetch the file again, or make it again"
                    .to_owned(),
            }),
            Error::Engine(E::NotVerified { .. }) => {
                Some("it runs without --verify-weights".to_owned())
            }
            Error::Engine(E::PackedForStock { .. }) => {
                Some("name the GGUF that it was made of".to_owned())
            }
            Error::Ram { least_bytes, .. } if *least_bytes > memory::most_bytes() => Some(format!(
                "there are {} here; a smaller --ctx needs less, and so does a smaller model",
                Bytes(memory::most_bytes())
            )),
            Error::Ram { least_bytes, .. } => {
                Some(format!("give it --ram {}, or a smaller --ctx", round_up_mib(*least_bytes)))
            }
            Error::RamBelow { least_bytes, .. } => Some(format!(
                "give it --ram {}, or --ram 0 to read them from the drive each time",
                round_up_mib(*least_bytes)
            )),
            Error::NothingToCompute => Some(
                "give it a --ram above 0 that is free, or --miss copy, which is the default".to_owned(),
            ),
            Error::Engine(E::OnlyOnGpu { .. }) => {
                Some("--miss copy, which is the default, runs it, and so does --miss auto".to_owned())
            }
            Error::Vram { least_bytes, .. } => {
                Some(format!("give it --vram {}, or a smaller --ctx", round_up_mib(*least_bytes)))
            }
            Error::VramTaken { .. } => Some(
                "another program may have taken it (nvidia-smi tells); the pool grows again by itself \
                 when there is some, and a smaller --ctx needs less"
                    .to_owned(),
            ),
            Error::Engine(E::OutOfGpuMemory(_)) => Some(
                "less is taken with a smaller --vram (of the GPU), --ram (pinned) or --ctx".to_owned(),
            ),
            Error::Engine(E::Gpu(tierstream_ggml::GpuError::NoGpu { .. })) => Some(
                "without --gpu it runs on the processor; `tierstream doctor` tells what there is"
                    .to_owned(),
            ),
            Error::Engine(E::Backend(_)) => Some(
                "./x cuda builds it, where there is nvcc; TIERSTREAM_BACKENDS names it elsewhere"
                    .to_owned(),
            ),
            Error::PoolTooSmall { least_bytes, .. } => {
                Some(format!("give it --experts {}", round_up_mib(*least_bytes)))
            }
            Error::Cufile { .. } => Some(
                "--io auto takes the faster way to a GPU that there is, and --io direct the one \
                 through host memory"
                    .to_owned(),
            ),
            Error::NotAvailable { .. } => Some(
                "without --ram and --experts, the pool takes what fits into the memory that is free"
                    .to_owned(),
            ),
            Error::OutOfMemory { .. } => Some(
                "less is needed with a smaller --experts or --ram, and with a smaller --ctx"
                    .to_owned(),
            ),
            Error::Engine(E::Context { .. }) => {
                Some("a smaller --ctx needs less memory, and so does a smaller --batch".to_owned())
            }
            Error::Engine(E::WeightsTooLarge { .. }) => Some(
                "no flag makes them smaller; free some of its memory, or take a model with smaller \
                 ones"
                    .to_owned(),
            ),
            Error::Engine(E::Load { reason, .. }) if lacks_memory(reason) => Some(
                "no flag makes the weights beside the experts smaller; free some memory, or take \
                 a model with smaller ones"
                    .to_owned(),
            ),
            Error::ContextTooSmall { .. } => Some("a larger --ctx holds more tokens".to_owned()),
            Error::Engine(E::Load { .. }) => Some(
                "`tierstream show` tells what is in the file; --log shows what llama.cpp says"
                    .to_owned(),
            ),
            Error::Engine(E::Io(e)) | Error::Io(e) => io_hint(e),
            _ => None,
        }
    }
}

fn refused(bytes: usize) -> String {
    if bytes == 0 { String::new() } else { format!(", of {}", Bytes(bytes as u64)) }
}

/// What a model needs memory for, where that is more than one thing.
fn parts(least_bytes: u64, pool_bytes: u64) -> String {
    if pool_bytes == 0 {
        return String::new();
    }
    let rest = Bytes(least_bytes - pool_bytes);
    format!(" ({rest} beside the experts, {} for those that one token uses)", Bytes(pool_bytes))
}

/// Whether llama.cpp gave up for want of memory, in its own words.
fn lacks_memory(reason: &str) -> bool {
    reason.contains("insufficient memory") || reason.contains("failed to allocate")
}

fn gguf_hint(error: &tierstream_gguf::Error) -> Option<String> {
    use tierstream_gguf::ErrorKind as K;
    match error.kind() {
        K::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
            Some("check the path; `demo` names the small model in the program".to_owned())
        }
        _ => error.hint(),
    }
}

fn io_hint(error: &tierstream_io::Error) -> Option<String> {
    use tierstream_io::Error as E;
    Some(
        match error {
            E::Changed { .. } => {
                "the model was loaded from an older state of this file; start again"
            }
            E::Truncated { .. } => {
                "the file is shorter than when it was opened; check the download"
            }
            _ => return None,
        }
        .to_owned(),
    )
}

fn round_up_mib(bytes: u64) -> String {
    format!("{}MiB", bytes.div_ceil(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::Error;

    fn hint(error: tierstream_ggml::Error) -> String {
        Error::from(error).hint().expect("these have a hint")
    }

    #[test]
    fn want_of_memory_hints_at_what_takes_it() {
        use tierstream_ggml::Error as E;
        let slots = hint(E::OutOfMemory { bytes: 1 << 30, what: "expert slots" });
        assert!(slots.contains("--experts") && slots.contains("--ram"), "{slots}");
        let context = hint(E::Context { n_ctx: 4096, reason: String::new() });
        assert!(context.contains("--ctx") && context.contains("--batch"), "{context}");
        assert!(hint(E::WeightsTooLarge { bytes: 1 << 30 }).contains("free some of its memory"));
        let load = |reason: &str| hint(E::Load { path: "m".into(), reason: reason.to_owned() });
        assert!(load("ggml_aligned_malloc: insufficient memory").contains("free some memory"));
        assert!(load("unknown model architecture: 'x'").contains("--log"));
    }
}

//! Errors of the facade, each with what a user can do about it.

use std::path::PathBuf;

use crate::size::Bytes;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The model file cannot be read as a GGUF.
    #[error(transparent)]
    Gguf(#[from] tierstream_gguf::Error),
    /// Loading, decoding or reading failed.
    #[error(transparent)]
    Engine(tierstream_ggml::Error),
    /// The storage engine could not be started.
    #[error(transparent)]
    Io(#[from] tierstream_io::Error),
    /// `--ram` is below what the model needs.
    #[error(
        "{} is too little memory for this model: it needs at least {} ({} beside the experts, {} \
         for those that one token uses)",
        Bytes(*.ram_bytes), Bytes(*.least_bytes), Bytes(*.fixed_bytes), Bytes(.least_bytes - .fixed_bytes)
    )]
    Ram {
        /// The budget.
        ram_bytes: u64,
        /// The least budget that works.
        least_bytes: u64,
        /// Dense weights, KV cache, compute buffers and the program itself.
        fixed_bytes: u64,
    },
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
    /// A file of the user's cannot be read.
    #[error("cannot read {}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The request makes no sense.
    #[error("{0}")]
    Request(String),
}

/// Result of the facade.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl From<tierstream_ggml::Error> for Error {
    fn from(error: tierstream_ggml::Error) -> Self {
        match error {
            tierstream_ggml::Error::PoolTooSmall { bytes, least_bytes } => {
                Error::PoolTooSmall { bytes, least_bytes }
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
            Error::Ram { least_bytes, .. } => {
                Some(format!("give it --ram {}, or a smaller --ctx", round_up_mib(*least_bytes)))
            }
            Error::PoolTooSmall { least_bytes, .. } => {
                Some(format!("give it --experts {}", round_up_mib(*least_bytes)))
            }
            Error::Engine(E::Context { .. }) => {
                Some("a smaller --ctx needs less memory".to_owned())
            }
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

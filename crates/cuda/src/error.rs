//! What can go wrong, with what was being done and what the driver said.

use std::borrow::Cow;

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A call that failed. `doing` is what it was for, `name` and `text` are the driver's own words.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no GPU that could be used.
    #[error("no GPU: {reason}")]
    NoGpu {
        /// Why not.
        reason: String,
    },
    /// The device, or the host when pinning, has too little memory left. Nothing has changed.
    #[error("cannot {doing}: {name} ({text})")]
    OutOfMemory {
        /// What was being done.
        doing: String,
        /// `CUDA_ERROR_OUT_OF_MEMORY`.
        name: Cow<'static, str>,
        /// The same in words.
        text: Cow<'static, str>,
    },
    /// Something on the device went wrong for good, perhaps long before this call: no call to this
    /// device will succeed in this process any more.
    #[error("the GPU is lost, seen when trying to {doing}: {name} ({text})")]
    Lost {
        /// What was being done.
        doing: String,
        /// The driver's name of the error.
        name: Cow<'static, str>,
        /// The same in words.
        text: Cow<'static, str>,
    },
    /// The driver refused.
    #[error("cannot {doing}: {name} ({text})")]
    Driver {
        /// What was being done.
        doing: String,
        /// The driver's name of the error.
        name: Cow<'static, str>,
        /// The same in words.
        text: Cow<'static, str>,
    },
    /// Files cannot be read straight to a GPU here.
    #[error("no GPUDirect Storage: {reason}")]
    NoGds {
        /// Why not.
        reason: String,
    },
    /// Memory is to be unmapped that copies still use, or that a [`Span`](crate::Span) stands for.
    #[error("granule {granule} is in use")]
    Busy {
        /// Number of the granule, from the start of the region.
        granule: usize,
    },
    /// A range that goes beyond its memory, or over a part of it that is not mapped.
    #[error("{bytes} bytes at offset {offset} are not all there: {what}")]
    Range {
        /// Offset of the first byte.
        offset: u64,
        /// Length.
        bytes: u64,
        /// What there is instead.
        what: String,
    },
    /// Sizes that cannot be meant.
    #[error("{0}")]
    Config(String),
}

/// What the driver said to one call.
#[derive(Debug, Clone)]
pub(crate) struct Failure {
    pub(crate) code: u32,
    pub(crate) name: Cow<'static, str>,
    pub(crate) text: Cow<'static, str>,
}

/// `CUDA_ERROR_OUT_OF_MEMORY`
pub(crate) const OUT_OF_MEMORY: u32 = 2;
/// `CUDA_ERROR_ILLEGAL_ADDRESS`
pub(crate) const ILLEGAL_ADDRESS: u32 = 700;

impl Failure {
    /// The error of this failure while `doing` something: "copy 3 bytes to the device".
    pub(crate) fn doing(self, doing: impl Into<String>) -> Error {
        let Self { code, name, text } = self;
        let doing = doing.into();
        match code {
            OUT_OF_MEMORY => Error::OutOfMemory { doing, name, text },
            _ if is_final(code) => Error::Lost { doing, name, text },
            _ => Error::Driver { doing, name, text },
        }
    }
}

/// Whether the driver's documentation says of an error that it leaves the process in an
/// inconsistent state (`CUresult`: "the process must be terminated and relaunched").
fn is_final(code: u32) -> bool {
    // ECC and NVLink errors, illegal addresses, time-outs of kernels, asserts, traps, launch
    // failures, tensor memory leaks.
    matches!(code, 214 | 220 | 700 | 702 | 710 | 714..=719 | 721)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_say_what_was_done_and_are_sorted() {
        let failure = |code| Failure { code, name: "NAME".into(), text: "words".into() };
        let error = failure(OUT_OF_MEMORY).doing("pin 4096 bytes");
        assert_eq!(error.to_string(), "cannot pin 4096 bytes: NAME (words)");
        assert!(matches!(error, Error::OutOfMemory { .. }));
        assert!(matches!(failure(ILLEGAL_ADDRESS).doing("wait"), Error::Lost { .. }));
        assert!(matches!(failure(1).doing("wait"), Error::Driver { .. }));
    }
}

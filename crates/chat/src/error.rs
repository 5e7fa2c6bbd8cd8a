//! What can go wrong with a template.

/// Why a template cannot be used, or did not give a prompt.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The template is not well-formed.
    #[error("the chat template is not valid, line {line}: {reason}")]
    Syntax {
        /// The line of the template, from 1; 0 where it is not known.
        line: usize,
        /// What is wrong there.
        reason: String,
    },
    /// The template refuses these messages, or fails on them.
    #[error("the chat template failed: {0}")]
    Render(String),
    /// The template takes more time or memory than [`crate::limits`] allow.
    #[error("the chat template takes too much time or memory")]
    OutOfFuel,
    /// The template is longer than [`crate::limits::TEMPLATE_BYTES`].
    #[error(
        "the chat template has {bytes} bytes, at most {} are read",
        crate::limits::TEMPLATE_BYTES
    )]
    TooLong {
        /// Its length in bytes.
        bytes: usize,
    },
    /// The template has no place for a suffix, so that nothing can be inserted before one.
    #[error("the chat template has no place for a suffix")]
    NoInsert,
}

/// Shorthand for a result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

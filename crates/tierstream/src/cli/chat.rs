//! The chat of `tierstream run`.

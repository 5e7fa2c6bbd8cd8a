//! What a model's routing says about streaming it: traces, locality metrics, a cache simulator, and pages.
//!
//! A [`Trace`] holds, for every token and MoE layer, the experts that the router chose. It comes from
//! the engine through a [`Writer`], or from a file: [`read`] takes our own Parquet
//! (`docs/trace-format.md`) and the formats in which others publish theirs ([`Format`]).
//!
//! Nothing in a file is believed: counts are compared with [`limits`] before memory is taken for them,
//! and what breaks a rule is an [`Error`] with the line or the row.

#![forbid(unsafe_code)]

mod error;
mod export;
mod file;
mod header;
mod import;
pub mod limits;
pub mod metrics;
pub mod page;
pub mod plan;
mod random;
pub mod sim;
mod trace;

pub use error::{Error, Place, Result};
pub use export::{write_jsonl, write_route_csv};
pub use file::Writer;
pub use header::{Header, Layer, Model, Sampling};
pub use import::{Assume, Format, read};
pub use trace::{Domains, NO_EXPERT, Phase, Token, Trace};

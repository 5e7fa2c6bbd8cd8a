//! Runs language models that are bigger than the memory they run on: mixture-of-experts models
//! keep their busy experts in memory, within a budget, and stream the others from the drive.
//!
//! ```no_run
//! use std::ops::ControlFlow;
//! use tierstream::{Engine, Generate, Options, Sampling};
//!
//! # fn main() -> Result<(), tierstream::Error> {
//! let options = Options { ram_bytes: Some(8 << 30), ..Options::default() };
//! let mut engine = Engine::load("model.gguf".as_ref(), options, &mut |_| true)?;
//! let prompt = engine.model().vocab().tokenize("Once upon a time", true, false)?;
//! let generate = Generate { max_tokens: 64, sampling: Sampling::default() };
//! engine.generate(&prompt, &generate, |_, bytes| {
//!     print!("{}", String::from_utf8_lossy(bytes));
//!     ControlFlow::Continue(())
//! })?;
//! # Ok(())
//! # }
//! ```
//!
//! The `tierstream` program is the feature `cli`, on by default: a program that embeds this library
//! depends on it with `default-features = false`. The feature `demo` alone brings the demo model.

#![forbid(unsafe_code)]
#![deny(clippy::print_stdout, clippy::print_stderr)]

pub mod bench;
mod budget;
pub mod cache;
pub mod costs;
#[cfg(feature = "demo")]
pub mod demo;
pub mod drive;
mod engine;
mod error;
pub mod machine;
pub mod memory;
pub mod numa;
mod packing;
mod progress;
mod random;
mod reading;
pub mod size;
#[cfg(test)]
#[path = "../../io/tests/support/skip.rs"]
mod skip;
mod verify;
mod vram;
mod weights;

pub use budget::{Forecast, Requirement};
pub use engine::{DEFAULT_CTX, Engine, Generate, Generation, Options, Stop, default_threads};
pub use error::{Error, Result};
pub use packing::Packing;
pub use progress::{LoadProgress, LoadRate, LoadStage, Loading};
pub use reading::{io_config, io_config_for};
pub use tierstream_ggml as ggml;
pub use tierstream_ggml::{
    Cancel, Context, ContextOptions, DeviceInfo, Execution, ExpertCounters, Gpu, Keep, Miss, Model,
    Placement, PoolOptions, PoolSize, Prefetch, Progress, Sampler, Sampling, Token, Vocab, Weights,
    devices, set_verbose,
};
pub use tierstream_gguf as gguf;
pub use tierstream_io as io;
pub use tierstream_pack as pack;
pub use tierstream_pool as pool;
pub use tierstream_pool::Policy;
pub use tierstream_sums as sums;
pub use verify::{
    Checksums, Difference, Requests, Stage, Verification, VerifyOptions, VerifyProgress, verify,
};
pub use vram::VramBudget;
pub use weights::WeightSums;

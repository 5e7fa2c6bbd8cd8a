//! Safetensors checkpoints, one file or shards with an index: checked headers, and named tensors
//! loaded at the drive's own speed.
//!
//! ```no_run
//! use std::sync::Arc;
//! use tierstream_io::{Config, Reader};
//! use tierstream_safetensors::{Checkpoint, Loader};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // A folder, an index or a .safetensors file. Reads the headers, and nothing else.
//! let checkpoint = Checkpoint::open("Qwen3-30B-A3B")?;
//! for tensor in checkpoint.tensors() {
//!     println!("{} {} {:?}: {} bytes", tensor.name, tensor.dtype, tensor.shape, tensor.len);
//! }
//!
//! let loader = Loader::new(Arc::new(Reader::new(Config::default())?), checkpoint)?;
//! // Into memory of its own, without a copy on the way.
//! let weights = loader.load_all(|progress| {
//!     eprint!("\r{} of {} bytes", progress.bytes_done, progress.bytes_total);
//!     true // false cancels
//! })?;
//! let embedding: &[u8] = weights.get("model.embed_tokens.weight").ok_or("no embedding")?;
//! # let _ = embedding;
//!
//! // Into memory of the caller's.
//! let mut norm = vec![0; 4096];
//! loader.load_into([("model.norm.weight", &mut norm[..])], |_| true)?;
//! # Ok(())
//! # }
//! ```
//!
//! A checkpoint comes from the internet. Nothing in it is believed: lengths and counts are compared
//! with [`limits`] and with the bytes that a file really has before memory is taken for them, every
//! sum is checked, and what an index names cannot lead out of its folder. What breaks a rule is an
//! [`Error`] that names the file and the tensor.
//!
//! The format is that of the `safetensors` package (Hugging Face, `safetensors/README.md`, section
//! "Format"; `safetensors/src/tensor.rs` for what it leaves open): 8 bytes of length, a JSON object,
//! and the bytes of all tensors without holes. [`Header`] reads one file, [`Index`] what names several,
//! [`Checkpoint`] joins them, [`Loader`] brings the bytes.

#![forbid(unsafe_code)]

mod checkpoint;
mod dtype;
mod error;
mod guess;
mod header;
mod index;
mod json;
pub mod limits;
mod load;
mod tensor;

pub use checkpoint::{Checkpoint, FileInfo};
pub use dtype::Dtype;
pub use error::{Error, ErrorKind};
pub use header::Header;
pub use index::Index;
pub use load::{Loaded, Loader, Progress};
pub use tensor::Tensor;

/// What this crate's functions return.
pub type Result<T> = std::result::Result<T, Error>;

/// String pairs that a file says of itself, as `("format", "pt")`.
pub type Metadata = std::collections::BTreeMap<String, String>;

//! GGUF headers, read from untrusted bytes: metadata, tensors with absolute byte extents, and the
//! expert records of mixture-of-experts models.
//!
//! A GGUF file comes from the internet. Nothing in it is believed: every count and length is
//! compared with a limit and with the bytes that the file really has before anything is allocated,
//! every sum is checked, and a file that breaks the format is an [`Error`] that names the file, the
//! byte, the key or the tensor. Memory stays proportional to the header bytes that were really
//! there.
//!
//! ```no_run
//! use tierstream_gguf::{Experts, Model};
//!
//! # fn main() -> Result<(), tierstream_gguf::Error> {
//! let model = Model::open("model-00001-of-00003.gguf")?;
//! let experts = Experts::group(&model)?;
//! for (index, layer) in experts.layers().iter().enumerate() {
//!     println!("layer {}: {} x {} bytes", layer.layer, layer.experts, layer.record_bytes);
//!     for extent in experts.record(index, 0).into_iter().flatten() {
//!         println!("  file {} offset {} length {}", extent.file, extent.offset, extent.len);
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//!
//! Where to look: [`Header`] reads one file, [`Model`] joins the parts of a split model,
//! [`Experts`] finds the records that a streaming runtime moves, [`mod@write`] makes headers. Rules
//! come from the GGUF specification (ggml, `docs/gguf.md`); where ggml's own reader
//! (`ggml/src/gguf.cpp`) is stricter, its rule is named at the check.

#![forbid(unsafe_code)]

mod cursor;
mod error;
pub mod experts;
mod format;
mod header;
pub mod limits;
mod model;
mod parse;
mod split;
mod tensor;
mod tensor_type;
mod value;
pub mod write;

pub use error::{Error, ErrorKind, Subject};
pub use experts::Experts;
pub use format::Format;
pub use header::Header;
pub use model::{FileIdentity, FileInfo, Model, Original, Place};
pub use tensor::{Dims, Extent, Tensor};
pub use tensor_type::TensorType;
pub use value::{Array, Metadata, Strings, Value, ValueType};

/// What this crate's functions return.
pub type Result<T> = std::result::Result<T, Error>;

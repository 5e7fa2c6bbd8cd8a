//! Random-weight GGUF models for tests and benches: several architectures, quantisations and
//! file layouts, of any size, that load and decode in llama.cpp.
//!
//! ```no_run
//! use tierstream_synth::{Arch, Quant, Spec};
//!
//! let mut spec = Spec::new(Arch::DeepSeek2).experts(16, 2).quant(Quant::Q4_K_M);
//! spec.split_bytes = Some(4 << 20);
//! let written = spec.write("model.gguf")?;
//! println!("{} bytes, load {}", written.bytes, written.files[0].display());
//! # Ok::<(), tierstream_synth::Error>(())
//! ```
//!
//! Weights are drawn directly as valid blocks of their type; each matrix has a spread of
//! 1 / sqrt(row length), so activations keep their size through any number of layers, and the
//! router's scores and the logits lie well apart. A tensor's content depends on the seed, its
//! name, its type and its shape only: the same model split over files or with another alignment
//! has the same weights.
//!
//! There is no tokenizer (`no_vocab`): feed token ids.

#![forbid(unsafe_code)]

mod arch;
mod blocks;
mod error;
mod gguf;
mod half;
mod plan;
mod rng;
mod size;
mod spec;
mod types;
mod write;

pub use arch::Arch;
pub use error::{Error, Result};
pub use plan::{Plan, Role, Tensor};
pub use size::parse_size;
pub use spec::{Mla, Spec};
pub use types::{Quant, TensorType};
pub use write::Written;

//! Models that are on the machine already, by name: those of Ollama, of the Hugging Face cache, of LM
//! Studio, of llama.cpp, and those in folders that the user names. It only reads, and never writes into
//! the store of another program.
//!
//! ```no_run
//! use tierstream_store::{Environment, Store};
//!
//! # fn main() -> Result<(), tierstream_store::Error> {
//! let store = Store::new(&Environment::of_process());
//! let model = store.find("qwen3:30b")?;
//! println!("{} of {} is {}", model.name, model.tool, model.path.display());
//! # Ok(())
//! # }
//! ```
//!
//! What is read comes from somebody else: sizes, counts and depths have [`limits`], digests are checked
//! by their form before they become part of a path, and a name is compared with what there is, and never
//! made a path of. Each program's store is a file: `ollama.rs`, `hub.rs`, `lm_studio.rs`, `llama_cpp.rs`,
//! `folder.rs`.

#![forbid(unsafe_code)]

mod disk;
mod environment;
mod error;
mod file;
mod folder;
mod hub;
mod hub_name;
pub mod limits;
mod llama_cpp;
mod lm_studio;
mod name;
mod ollama;
mod source;
mod store;

pub use environment::{Environment, Secret};
pub use error::{Error, Readers, Result};
pub use file::is_model_file;
pub use hub_name::{HubName, Which};
#[doc(hidden)]
pub use ollama::blob_paths;
pub use store::{Layers, Listed, Listing, Model, Store, Tool};

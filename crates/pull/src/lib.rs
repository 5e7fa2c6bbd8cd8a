//! Models of the Hugging Face hub, fetched into its cache as `huggingface_hub` lays it out, so that every
//! program that reads this cache finds them.
//!
//! ```no_run
//! use tierstream_pull::{Cancel, Options, Puller, Quiet};
//! use tierstream_store::{Environment, HubName};
//!
//! # fn main() -> Result<(), tierstream_pull::Error> {
//! let puller = Puller::new(&Environment::of_process(), Options::default())?;
//! let name = HubName::parse("owner/repo-GGUF:Q4_K_M")?;
//! let pulled = puller.pull(&name, &Quiet, &Cancel::new())?;
//! println!("{} is {}", pulled.name, pulled.path.display());
//! # Ok(())
//! # }
//! ```
//!
//! A pull's way:
//!
//! ```text
//! puller.rs     the files of the repository, which of them are meant, what is there already
//!   hub.rs      what the hub tells of a repository and its files
//!     client.rs requests: redirects, the token, what a failure means; tries.rs: when to try again
//!   cache.rs    where things are in the cache, and the lock on each file
//!   fetch.rs    pieces of all files, taken by several connections; one thread hashes what has come
//!     piece.rs  one piece: a range of a file, until it is there
//!     partial.rs  a file that is not whole, and the record of what there is of it; ranges.rs
//! ```
//!
//! What a server sends is bounded by [`limits`], and no name of its is made a path of before it was looked
//! at. A file gets its name when its SHA-256 is that of the hub, and never before.

#![forbid(unsafe_code)]

mod cache;
mod cancel;
mod client;
mod error;
mod event;
mod fetch;
mod hub;
pub mod limits;
mod partial;
mod piece;
mod puller;
mod ranges;
mod tries;

pub use cancel::Cancel;
pub use error::{Error, Result};
pub use event::{Event, FileState, Observer, Quiet};
pub use puller::{Options, Pulled, Puller};

//! Reads byte ranges of files at the drive's own speed: past the page cache, through a fixed ring
//! of buffers, with priorities and cancellation. Knows nothing of models.
//!
//! ```
//! use tierstream_io::{Config, Extent, Reader};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let dir = tempfile::tempdir()?;
//! # let path = dir.path().join("weights");
//! # std::fs::write(&path, b"0123456789")?;
//! let reader = Reader::new(Config::default())?;
//! let file = reader.open(&path)?;
//! let mut bytes = [0; 4];
//! reader.read(Extent { file, offset: 3, len: 4 }, &mut bytes)?;
//! assert_eq!(&bytes, b"3456");
//! # Ok(())
//! # }
//! ```
//!
//! The way of a read: [`Reader::submit`] gives extents to the planner ([`plan`]), which makes
//! aligned reads of at most one buffer. They wait in the reader's queues, `Demand` before
//! `Prefetch` before `Bulk`, until a buffer of the [`Ring`] and room in the [`Engine`] are free.
//! The reader's one thread takes what arrives, submits the next reads, and only then gives the
//! bytes to the [`Sink`], as [`Chunk`]s that hold their buffer until dropped. A piece whose sink
//! has a [`Place`] that suits the drive's alignment needs no buffer: it is read straight there, and
//! with one read for all places that belong to a record which is one piece of the file.
//! [`Reader::fill`] does that with memory of its own, [`Pages`], and hands it out when it is full.
//!
//! Nothing falls back in silence: [`Reader::status`] names the engine that really runs, whether
//! reads pass the page cache, and why not.

mod ahead;
#[cfg(target_os = "linux")]
pub mod cache;
pub mod engine;
mod error;
mod file;
mod fill;
mod map;
#[cfg(target_os = "linux")]
pub mod mapped;
mod pages;
pub mod plan;
mod reader;
mod ring;
#[cfg(target_os = "linux")]
mod sigbus;
mod sink;
#[cfg(test)]
#[path = "../tests/support/skip.rs"]
mod skip;
mod sync;
pub mod wrap;

pub use ahead::Ahead;
pub use engine::{Engine, EngineKind};
pub use error::{Error, Result};
pub use file::{DirectState, File, FileId};
pub use fill::{Fill, Placed, Told};
pub use pages::Pages;
pub use reader::{AS_ASKED, Config, Extent, Priority, Reader, Stats, Status, Ticket, Wrap};
pub use ring::{Buffer, PAGE, Ring};
pub use sink::{Chunk, Place, Sink};

//! Packed models: a file in which each expert's record lies in one piece, so that a miss costs one
//! read. Made from GGUF files, and read in their place.
//!
//! A packed file holds the headers of the files that it was made of, byte for byte, and says where the
//! data lie now: `docs/pack-format.md`. [`open`] reads a model of either kind; what follows does not
//! know which it is, since a [`tierstream_gguf::Model`] tells where data lie in any case.
//!
//! ```no_run
//! # fn main() -> Result<(), tierstream_pack::Error> {
//! let model = tierstream_pack::open("model.tspack".as_ref())?;
//! println!("{} tensors of {}", model.tensors().len(), model.architecture());
//! # Ok(())
//! # }
//! ```
//!
//! A packed file comes from somebody else, as a GGUF does: every count and length in it is compared
//! with a limit and with the bytes that are there before memory is taken for it. Making one is
//! [`Writer::write`], looking at every byte of one [`Pack::check`].

#![forbid(unsafe_code)]

mod cursor;
mod disk;
mod error;
mod feed;
mod format;
mod journal;
mod layout;
mod read;
mod write;

pub use error::{Error, Result};
#[doc(hidden)]
pub use format::sign;
pub use format::{ALIGN, MAGIC, VERSION};
pub use layout::Gain;
pub use read::{Checked, Pack, is_packed, open};
pub use write::{Options, Packed, Progress, Writer, target};

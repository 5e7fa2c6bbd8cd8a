//! NVIDIA GPUs through the driver alone: pinned host memory, copy streams and events, device memory
//! that grows and shrinks in place, captured graphs, and [`Gates`] in them. Knows nothing of models.
//!
//! The driver is loaded while the program runs: nothing of CUDA is needed to build, and a machine
//! without it gets [`Error::NoGpu`], with the reason. The [`standin`] has the same face over host
//! memory, so that what rests on this crate can be tested anywhere, faults included.
//!
//! ```
//! use tierstream_cuda::standin::{Config, StandIn};
//!
//! # fn main() -> tierstream_cuda::Result<()> {
//! let device = StandIn::new(Config::default())?.device(); // or one of `Device::all()?`
//! let pool = device.reserve(1 << 30, 32 << 20)?; // addresses for 1 GiB, no memory yet
//! pool.map(0)?; // 32 MiB of it
//!
//! let stream = device.stream()?;
//! let mut weights = device.pin(4096)?;
//! weights.fill(7);
//! stream.upload(weights, pool.span(0, 4096)?)?; // freed when the copy is done
//! let back = stream.download(pool.span(0, 4096)?, vec![0; 4096])?;
//! assert_eq!(back.wait()?, vec![7; 4096]);
//! # Ok(())
//! # }
//! ```
//!
//! What makes the face safe: a copy owns its memory until it is done. A [`Stream`] takes the host
//! memory and the [`Span`] of device memory by value, and gives them up when an [`Event`] after the
//! copy is seen done. Memory that a copy uses can neither be freed nor unmapped nor, on the host,
//! changed. The device's memory is no memory of the program: a kernel that reads an unmapped
//! address makes [`Error::Lost`] of everything that follows, and nothing worse.

mod device;
mod driver;
mod error;
mod gate;
mod gds;
mod graph;
mod host;
mod mark;
mod memory;
mod modules;
mod pci;
mod probe;
mod region;
pub mod standin;
mod stream;
mod sync;

pub use device::{Device, Info, Memory};
pub use error::{Error, Result};
pub use gate::{At, GATE_WIDTH, Gates};
pub use gds::{Buffer, Cufile, Gds, GdsFile, Places};
pub use graph::Graph;
pub use host::{Pinned, Registered, Shared};
pub use mark::Mark;
pub use memory::{Block, Span};
pub use modules::load_modules_eagerly;
pub use pci::Link;
pub use probe::Bandwidth;
pub use region::Region;
pub use stream::{Event, Pending, Stream};

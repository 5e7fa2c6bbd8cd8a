//! A device without a GPU, for tests: memory of the device is memory of the host, a stream is a
//! thread that works off a queue, and what can go wrong goes wrong when it is told to.
//!
//! Stricter than a GPU where that finds mistakes: what is not mapped is `PROT_NONE`, so that code
//! that computes on the device's memory dies of it; a copy from or to there makes
//! [`Error::Lost`]; new memory is full of NaNs ([`GARBAGE`]).

mod driver;
mod fault;
mod foreign;
mod gate;
mod memory;
mod queue;

use std::fmt;
use std::sync::Arc;

use crate::device::{Device, Info};
use crate::driver::RawStream;
use crate::error::{Error, Result};
use crate::stream::Stream;
use crate::sync::lock;

use driver::Shared;
pub use fault::Fault;
pub use foreign::{Capture, Foreign};

/// Every byte of new device memory. In all floating-point formats, bytes of these are NaN.
pub const GARBAGE: u8 = 0xff;

/// What kind of device it is.
#[derive(Debug, Clone, Copy)]
pub struct Config {
    /// All memory of the device. Taken from the host when it is used.
    pub memory_bytes: u64,
    /// What sizes of mapped memory are multiples of; itself a multiple of 4096.
    pub granularity: u64,
}

impl Default for Config {
    /// 8 GiB, and granules of 2 MiB as CUDA has them.
    fn default() -> Self {
        Self { memory_bytes: 8 << 30, granularity: 2 << 20 }
    }
}

/// A device without a GPU, and the strings to pull it by. Clones are the same device.
#[derive(Clone)]
pub struct StandIn {
    shared: Arc<Shared>,
    device: Device,
}

impl StandIn {
    /// A new device.
    ///
    /// # Errors
    /// [`Error::Config`] for a granularity that is no multiple of 4096.
    pub fn new(config: Config) -> Result<Self> {
        if config.granularity == 0 || !config.granularity.is_multiple_of(4096) {
            return Err(Error::Config(format!("a granularity of {}", config.granularity)));
        }
        let shared = Arc::new(Shared::new(config));
        let info = Info {
            name: "stand-in".to_owned(),
            compute_capability: (0, 0),
            memory_bytes: config.memory_bytes,
            cuda: "0.0".to_owned(),
            driver: None,
            pci_bus_id: None,
            link: None,
            numa_node: None,
            eager_modules: true,
        };
        let device = Device::new(Box::new(Arc::clone(&shared)), info);
        Ok(Self { shared, device })
    }

    /// The device.
    pub fn device(&self) -> Device {
        self.device.clone()
    }

    /// Lets something go wrong at the operation that comes `after` so many others of its kind, and
    /// at that one only.
    pub fn inject(&self, fault: Fault, after: u64) {
        lock(&self.shared.state).faults.add(fault, after);
    }

    /// Forgets what was injected and has not struck.
    pub fn calm(&self) {
        lock(&self.shared.state).faults.clear();
    }

    /// Stops a stream of this device before its next operation, until the guard is dropped; what is
    /// queued waits, and so does the dropping of the stream.
    pub fn hold(&self, stream: &Stream) -> Held {
        let held = Held { shared: Arc::clone(&self.shared), stream: stream.raw() };
        held.set(true);
        held
    }

    /// For a backend of somebody else that computes on this device.
    pub fn foreign(&self) -> Foreign {
        Foreign::new(Arc::clone(&self.shared))
    }

    /// Bytes of host memory that are pinned now.
    pub fn pinned_bytes(&self) -> u64 {
        lock(&self.shared.state).memory.pinned_bytes()
    }
}

/// A stream that is held. Goes on when this is dropped.
#[must_use = "the stream goes on when this is dropped"]
pub struct Held {
    shared: Arc<Shared>,
    stream: RawStream,
}

impl Held {
    fn set(&self, held: bool) {
        self.shared.hold(self.stream, held);
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.set(false);
    }
}

impl fmt::Debug for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Held({})", self.stream.0)
    }
}

impl fmt::Debug for StandIn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.device.fmt(f)
    }
}

//! Devices: what they are, and where everything on them begins.

use std::fmt;
use std::sync::Arc;

use crate::driver::{Driver, nvidia};
use crate::error::{Error, Result};
use crate::pci::Link;

/// What a device is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Info {
    /// The device's name: `NVIDIA H200`.
    pub name: String,
    /// Major and minor compute capability.
    pub compute_capability: (i32, i32),
    /// All memory of the device.
    pub memory_bytes: u64,
    /// The newest CUDA that the driver knows: `13.0`.
    pub cuda: String,
    /// The kernel driver's version, where the system tells.
    pub driver: Option<String>,
    /// Domain, bus, device and function, in lower case: `0000:01:00.0`.
    pub pci_bus_id: Option<String>,
    /// Its link to the processor, where the system tells.
    pub link: Option<Link>,
    /// The NUMA node that it is near to, if there are several.
    pub numa_node: Option<u32>,
    /// Kernels are loaded with their module: see [`load_modules_eagerly`](crate::load_modules_eagerly).
    pub eager_modules: bool,
}

/// A device's memory, as it is at the moment: other programs take of it too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// Bytes that nobody uses.
    pub free_bytes: u64,
    /// All bytes.
    pub total_bytes: u64,
}

/// A device. A handle: clones are the same device.
#[derive(Clone)]
pub struct Device {
    shared: Arc<Shared>,
}

struct Shared {
    driver: Box<dyn Driver>,
    info: Info,
}

impl Device {
    /// The NVIDIA devices that this process may use: one at least. Takes no memory on them yet.
    ///
    /// # Errors
    /// [`Error::NoGpu`] with the reason, if there are none.
    pub fn all() -> Result<Vec<Self>> {
        let devices = nvidia::all()?;
        Ok(devices.into_iter().map(|(driver, info)| Self::new(Box::new(driver), info)).collect())
    }

    pub(crate) fn new(driver: Box<dyn Driver>, info: Info) -> Self {
        Self { shared: Arc::new(Shared { driver, info }) }
    }

    pub(crate) fn driver(&self) -> &dyn Driver {
        &*self.shared.driver
    }

    /// Refuses another device.
    pub(crate) fn check_same(&self, other: &Self) -> Result<()> {
        if Arc::ptr_eq(&self.shared, &other.shared) {
            return Ok(());
        }
        Err(Error::Config("a stream works with its own device alone".to_owned()))
    }

    /// What it is.
    pub fn info(&self) -> &Info {
        &self.shared.info
    }

    /// How much of its memory is free now.
    ///
    /// # Errors
    /// What the driver says.
    pub fn memory(&self) -> Result<Memory> {
        self.driver().memory().map_err(|f| f.doing("ask for the free memory of the device"))
    }

    /// What sizes of mapped memory are multiples of, in bytes.
    ///
    /// # Errors
    /// What the driver says; the device may not be able to map memory at all.
    pub fn granularity(&self) -> Result<u64> {
        self.driver().granularity().map_err(|f| f.doing("ask how memory can be mapped"))
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Device").field(&self.info().name).finish()
    }
}

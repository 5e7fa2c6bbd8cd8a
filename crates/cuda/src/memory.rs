//! Device memory, and the parts of it that copies work on.

use std::fmt;
use std::sync::Arc;

use crate::device::Device;
use crate::driver::Address;
use crate::error::{Error, Result};
use crate::region::Use;

/// Device memory of a fixed size. Freed when it and all its [`Span`]s are gone, unless it is
/// [somebody else's](Device::borrow).
#[derive(Debug, Clone)]
pub struct Block {
    owned: Arc<Owned>,
}

#[derive(Debug)]
pub(crate) struct Owned {
    device: Device,
    address: Address,
    bytes: u64,
    /// Somebody else frees it.
    borrowed: bool,
}

impl Drop for Owned {
    fn drop(&mut self) {
        if !self.borrowed {
            // SAFETY: from `allocate`; copies that use it hold a span, and with it this.
            unsafe { self.device.driver().free(self.address) };
        }
    }
}

impl Device {
    /// Takes `bytes` of the device's memory, of unknown contents.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::Config`] for no bytes.
    pub fn allocate(&self, bytes: u64) -> Result<Block> {
        if bytes == 0 {
            return Err(Error::Config("no bytes to allocate".to_owned()));
        }
        let allocated = self.driver().allocate(bytes);
        let address =
            allocated.map_err(|f| f.doing(format!("allocate {bytes} bytes of GPU memory")))?;
        let device = self.clone();
        Ok(Block { owned: Arc::new(Owned { device, address, bytes, borrowed: false }) })
    }

    /// Memory of this device that somebody else has allocated, and will free.
    ///
    /// # Safety
    /// The `bytes` from `address` on are memory of this device until the block and all its
    /// [`Span`]s are gone, those among them that copies hold.
    pub unsafe fn borrow(&self, address: u64, bytes: u64) -> Block {
        let device = self.clone();
        Block { owned: Arc::new(Owned { device, address, bytes, borrowed: true }) }
    }
}

impl Block {
    /// Where it begins in the device's address space.
    pub fn address(&self) -> u64 {
        self.owned.address
    }

    /// Its size.
    pub fn bytes(&self) -> u64 {
        self.owned.bytes
    }

    /// A part of it.
    ///
    /// # Errors
    /// [`Error::Range`] beyond its end.
    pub fn span(&self, offset: u64, bytes: u64) -> Result<Span> {
        check_range(offset, bytes, self.bytes())?;
        let owner = Owner::Block(Arc::clone(&self.owned));
        Ok(Span { address: self.address() + offset, bytes, owner })
    }
}

/// Refuses what goes beyond `there` bytes.
pub(crate) fn check_range(offset: u64, bytes: u64, there: u64) -> Result<()> {
    if offset.checked_add(bytes).is_none_or(|end| end > there) {
        let what = format!("there are {there}");
        return Err(Error::Range { offset, bytes, what });
    }
    Ok(())
}

/// Bytes on a device, which stay there for as long as this lives: their memory can neither be freed
/// nor unmapped meanwhile.
pub struct Span {
    address: Address,
    bytes: u64,
    owner: Owner,
}

/// What a span keeps in place.
pub(crate) enum Owner {
    Block(Arc<Owned>),
    Region(Use),
}

impl Span {
    pub(crate) fn of_region(address: Address, bytes: u64, part: Use) -> Self {
        Self { address, bytes, owner: Owner::Region(part) }
    }

    /// Where it begins in the device's address space.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Its length.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn device(&self) -> &Device {
        match &self.owner {
            Owner::Block(block) => &block.device,
            Owner::Region(part) => part.device(),
        }
    }
}

impl fmt::Debug for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Span({} bytes at {:#x})", self.bytes, self.address)
    }
}

//! Pinned host memory: the only memory that copies reach at full speed, and without a detour.

use std::fmt;
use std::ops::{Deref, DerefMut, Range};
use std::ptr::NonNull;
use std::sync::Arc;

use crate::device::Device;
use crate::error::{Error, Result};

/// Pinned host memory, aligned to a page. Ordinary cached memory for the processor, not
/// write-combined. Freed when dropped.
pub struct Pinned {
    device: Device,
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: plain memory that this value owns; the driver lets every thread free it.
unsafe impl Send for Pinned {}
// SAFETY: `&Pinned` only reads.
unsafe impl Sync for Pinned {}

impl Device {
    /// Pins `bytes` of new host memory, all zeros.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::Config`] for no bytes.
    pub fn pin(&self, bytes: usize) -> Result<Pinned> {
        if bytes == 0 {
            return Err(Error::Config("no bytes to pin".to_owned()));
        }
        let pinned = self.driver().pin(bytes);
        let base = pinned.map_err(|f| f.doing(format!("pin {bytes} bytes of memory")))?;
        // SAFETY: `bytes` from `base` on are ours, and nobody else has seen them.
        unsafe { base.write_bytes(0, bytes) };
        Ok(Pinned { device: self.clone(), base, bytes })
    }

    /// Pins memory that there is already, until the value is dropped, which drops `owner` too.
    ///
    /// # Safety
    /// The `bytes` from `base` on are mapped for as long as `owner` lives, and when the value is
    /// dropped no copy of them is under way.
    ///
    /// # Errors
    /// What the driver says: it refuses memory that is pinned already, and some mappings of files.
    pub unsafe fn register<T>(
        &self,
        owner: T,
        base: NonNull<u8>,
        bytes: usize,
    ) -> Result<Registered<T>> {
        // SAFETY: mapped until `owner` is dropped, which `Registered` does after unregistering.
        let registered = unsafe { self.driver().register(base, bytes) };
        registered.map_err(|f| f.doing(format!("pin {bytes} bytes that are there already")))?;
        Ok(Registered { pin: Registration { device: self.clone(), base }, owner })
    }
}

impl Pinned {
    /// Gives up writing, so that several copies can read from it at the same time.
    pub fn share(self) -> Shared {
        let range = 0..self.bytes;
        Shared { memory: Arc::new(self), range }
    }

    /// Where it begins, for who shares it with the device: nobody may look at it as a slice then.
    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }
}

impl Deref for Pinned {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: initialised in `pin`, ours until drop.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.bytes) }
    }
}

impl DerefMut for Pinned {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `&mut self` excludes every other access.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.bytes) }
    }
}

impl AsRef<[u8]> for Pinned {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl AsMut<[u8]> for Pinned {
    fn as_mut(&mut self) -> &mut [u8] {
        self
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: from `pin`; copies of it own it, so none is under way.
        unsafe { self.device.driver().unpin(self.base, self.bytes) };
    }
}

impl fmt::Debug for Pinned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pinned({} bytes)", self.bytes)
    }
}

/// A part of pinned memory that is only read. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Shared {
    memory: Arc<Pinned>,
    range: Range<usize>,
}

impl Shared {
    /// A part of this part.
    ///
    /// # Errors
    /// [`Error::Range`] beyond its end.
    pub fn slice(&self, offset: usize, bytes: usize) -> Result<Self> {
        let start = self.range.start;
        match offset.checked_add(bytes) {
            Some(end) if end <= self.range.len() => {
                let range = start + offset..start + end;
                Ok(Self { memory: Arc::clone(&self.memory), range })
            }
            _ => Err(Error::Range {
                offset: offset as u64,
                bytes: bytes as u64,
                what: format!("{} bytes of pinned memory", self.range.len()),
            }),
        }
    }
}

impl AsRef<[u8]> for Shared {
    fn as_ref(&self) -> &[u8] {
        &self.memory[self.range.clone()]
    }
}

/// Memory of an owner, pinned. Dropping it takes that back, then drops the owner.
#[derive(Debug)]
pub struct Registered<T> {
    // Before `owner`: fields are dropped in this order.
    #[expect(dead_code, reason = "held for its drop")]
    pin: Registration,
    owner: T,
}

impl<T> Registered<T> {
    /// Whose memory it is.
    pub fn owner(&self) -> &T {
        &self.owner
    }
}

#[derive(Debug)]
struct Registration {
    device: Device,
    base: NonNull<u8>,
}

// SAFETY: only the address of memory, which the driver lets every thread unregister.
unsafe impl Send for Registration {}
// SAFETY: as above; nothing is reached through a reference.
unsafe impl Sync for Registration {}

impl Drop for Registration {
    fn drop(&mut self) {
        // SAFETY: registered when made, and by the contract of `register` no copy is under way.
        unsafe { self.device.driver().unregister(self.base) };
    }
}

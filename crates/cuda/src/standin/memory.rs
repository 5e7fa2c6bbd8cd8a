//! The stand-in's memory: real addresses of the host, which can be read and written where there is
//! memory behind them, and counted as the device's.

use std::collections::{BTreeMap, HashMap};
use std::ptr::{NonNull, null_mut};

use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect, munmap};

use super::GARBAGE;
use crate::device;
use crate::driver::{Address, Handle, Outcome};
use crate::error::{Failure, ILLEGAL_ADDRESS, OUT_OF_MEMORY};

/// `CUDA_ERROR_INVALID_VALUE`
const INVALID_VALUE: u32 = 1;

/// Smallest unit of the host's memory protection.
const PAGE: u64 = 4096;

#[derive(Debug)]
pub(crate) struct Memory {
    total: u64,
    used: u64,
    /// Start and length of what can be copied from and to.
    usable: BTreeMap<Address, u64>,
    /// Length of reserved address ranges.
    reserved: BTreeMap<Address, u64>,
    handles: HashMap<u64, u64>,
    next_handle: u64,
    pinned: BTreeMap<usize, usize>,
}

impl Memory {
    pub(crate) fn new(total: u64) -> Self {
        Self {
            total,
            used: 0,
            usable: BTreeMap::new(),
            reserved: BTreeMap::new(),
            handles: HashMap::new(),
            next_handle: 0,
            pinned: BTreeMap::new(),
        }
    }

    pub(crate) fn free(&self) -> device::Memory {
        device::Memory { free_bytes: self.total - self.used, total_bytes: self.total }
    }

    pub(crate) fn pinned_bytes(&self) -> u64 {
        self.pinned.values().map(|bytes| *bytes as u64).sum()
    }

    /// Counts memory as pinned, as CUDA does for whole ranges that do not overlap.
    pub(crate) fn pin(&mut self, base: NonNull<u8>, bytes: usize) -> Outcome<()> {
        let base = base.addr().get();
        let before = self.pinned.range(..base + bytes).next_back();
        if before.is_some_and(|(start, len)| start + len > base) {
            return Err(failure(712, "HOST_MEMORY_ALREADY_REGISTERED", "part is pinned already"));
        }
        self.pinned.insert(base, bytes);
        Ok(())
    }

    pub(crate) fn unpin(&mut self, base: NonNull<u8>) {
        self.pinned.remove(&base.addr().get()).expect("only what is pinned is unpinned");
    }

    fn take(&mut self, bytes: u64) -> Outcome<()> {
        if bytes > self.total - self.used {
            return Err(out_of_memory());
        }
        self.used += bytes;
        Ok(())
    }

    pub(crate) fn reserve(&mut self, bytes: u64) -> Outcome<Address> {
        let len = usize::try_from(bytes).map_err(|_| out_of_memory())?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing.
        let base = unsafe { mmap_anonymous(null_mut(), len, ProtFlags::empty(), flags) };
        let at = base.map_err(|_| out_of_memory())? as Address;
        self.reserved.insert(at, bytes);
        Ok(at)
    }

    pub(crate) fn unreserve(&mut self, at: Address) {
        let bytes = self.reserved.remove(&at).expect("only what is reserved is given back");
        // SAFETY: from `reserve`, and by the driver's contract nothing uses it any more.
        let _ = unsafe { munmap(at as *mut _, bytes as usize) };
    }

    pub(crate) fn allocate(&mut self, bytes: u64) -> Outcome<Address> {
        let whole = bytes.checked_next_multiple_of(PAGE).ok_or_else(out_of_memory)?;
        self.take(whole)?;
        let at = self.reserve(whole).inspect_err(|_| self.used -= whole)?;
        self.open(at, bytes, whole).inspect_err(|_| {
            self.unreserve(at);
            self.used -= whole;
        })?;
        Ok(at)
    }

    pub(crate) fn release(&mut self, at: Address) {
        let bytes = self.usable.remove(&at).expect("only what is allocated is freed");
        self.unreserve(at);
        self.used -= bytes.next_multiple_of(PAGE);
    }

    pub(crate) fn create(&mut self, bytes: u64) -> Outcome<Handle> {
        self.take(bytes)?;
        self.next_handle += 1;
        self.handles.insert(self.next_handle, bytes);
        Ok(Handle(self.next_handle))
    }

    pub(crate) fn destroy(&mut self, handle: Handle) {
        self.used -= self.handles.remove(&handle.0).expect("only what was created is destroyed");
    }

    pub(crate) fn map(&mut self, at: Address, bytes: u64, handle: Handle) -> Outcome<()> {
        let reserved = self.reserved.range(..=at).next_back();
        let fits = reserved.is_some_and(|(start, len)| at + bytes <= start + len);
        let before = self.usable.range(..at + bytes).next_back();
        let free = before.is_none_or(|(start, len)| start + len <= at);
        if !fits || !free || self.handles.get(&handle.0) != Some(&bytes) {
            return Err(failure(INVALID_VALUE, "INVALID_VALUE", "not free to be mapped so"));
        }
        self.open(at, bytes, bytes)
    }

    pub(crate) fn unmap(&mut self, at: Address, bytes: u64) -> Outcome<()> {
        if self.usable.get(&at) != Some(&bytes) {
            return Err(failure(INVALID_VALUE, "INVALID_VALUE", "not mapped like that"));
        }
        self.usable.remove(&at);
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        // SAFETY: replaces a part of our own reservation, which by the driver's contract nothing
        // uses any more.
        let closed =
            unsafe { mmap_anonymous(at as *mut _, bytes as usize, ProtFlags::empty(), flags) };
        closed.map_err(|_| out_of_memory())?;
        Ok(())
    }

    /// Makes the `whole` pages of reserved addresses readable and writable, and `bytes` usable.
    fn open(&mut self, at: Address, bytes: u64, whole: u64) -> Outcome<()> {
        let access = MprotectFlags::READ | MprotectFlags::WRITE;
        // SAFETY: pages of our own reservation.
        let opened = unsafe { mprotect(at as *mut _, whole as usize, access) };
        opened.map_err(|_| out_of_memory())?;
        // SAFETY: opened above, and nobody else knows of them yet.
        unsafe { (at as *mut u8).write_bytes(GARBAGE, whole as usize) };
        self.usable.insert(at, bytes);
        Ok(())
    }

    /// Refuses a range of device addresses that is not memory from end to end.
    pub(crate) fn check(&self, at: Address, bytes: u64) -> Outcome<()> {
        let (mut reached, end) = (at, at + bytes);
        while reached < end {
            let part = self.usable.range(..=reached).next_back();
            match part.map(|(start, len)| start + len).filter(|end| *end > reached) {
                Some(part_end) => reached = part_end,
                None => {
                    let text = "an address that is not mapped was read or written";
                    return Err(failure(ILLEGAL_ADDRESS, "ILLEGAL_ADDRESS", text));
                }
            }
        }
        Ok(())
    }
}

impl Memory {
    /// Refuses a range of host addresses that is not pinned as a whole.
    pub(crate) fn check_pinned(&self, at: Address, bytes: u64) -> Outcome<()> {
        let part = self.pinned.range(..=at as usize).next_back();
        if part.is_some_and(|(start, len)| at + bytes <= (start + len) as u64) {
            return Ok(());
        }
        let text = "an address that is not mapped was read or written";
        Err(failure(ILLEGAL_ADDRESS, "ILLEGAL_ADDRESS", text))
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        for (&at, &bytes) in &self.reserved {
            // SAFETY: from `reserve`. The device goes last: nothing uses it any more.
            let _ = unsafe { munmap(at as *mut _, bytes as usize) };
        }
    }
}

pub(crate) fn out_of_memory() -> Failure {
    failure(OUT_OF_MEMORY, "OUT_OF_MEMORY", "out of memory")
}

/// With a name as CUDA has it, but for the prefix: nobody shall take it for a driver's.
pub(crate) fn failure(code: u32, name: &'static str, text: &'static str) -> Failure {
    Failure { code, name: format!("STANDIN_ERROR_{name}").into(), text: text.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_must_lie_in_memory_from_end_to_end() {
        let mut memory = Memory::new(64 * PAGE);
        let at = memory.reserve(8 * PAGE).unwrap();
        let first = memory.create(PAGE).unwrap();
        let second = memory.create(PAGE).unwrap();
        memory.map(at + PAGE, PAGE, first).unwrap();
        memory.map(at + 2 * PAGE, PAGE, second).unwrap();
        memory.check(at + PAGE, 2 * PAGE).unwrap();
        memory.check(at, 0).unwrap();
        assert_eq!(memory.check(at, PAGE).unwrap_err().code, ILLEGAL_ADDRESS);
        assert_eq!(memory.check(at + 2 * PAGE, PAGE + 1).unwrap_err().code, ILLEGAL_ADDRESS);
        memory.unmap(at + 2 * PAGE, PAGE).unwrap();
        assert!(memory.check(at + PAGE, 2 * PAGE).is_err());
        memory.check(at + PAGE, PAGE).unwrap();
    }

    #[test]
    fn only_free_addresses_are_mapped_and_only_whole_handles() {
        let mut memory = Memory::new(64 * PAGE);
        let at = memory.reserve(4 * PAGE).unwrap();
        let handle = memory.create(2 * PAGE).unwrap();
        assert!(memory.map(at, PAGE, handle).is_err());
        assert!(memory.map(at + 3 * PAGE, 2 * PAGE, handle).is_err());
        memory.map(at + PAGE, 2 * PAGE, handle).unwrap();
        assert!(memory.map(at, 2 * PAGE, handle).is_err());
        assert!(memory.unmap(at + PAGE, PAGE).is_err());
        memory.unmap(at + PAGE, 2 * PAGE).unwrap();
        memory.destroy(handle);
        assert_eq!(memory.free().free_bytes, 64 * PAGE);
    }

    #[test]
    fn pinned_ranges_do_not_overlap() {
        let mut memory = Memory::new(0);
        let bytes = [0u8; 100];
        let at = |offset| NonNull::from(&bytes[offset]);
        memory.pin(at(10), 10).unwrap();
        assert!(memory.pin(at(5), 6).is_err());
        assert!(memory.pin(at(19), 1).is_err());
        memory.pin(at(20), 10).unwrap();
        memory.pin(at(0), 10).unwrap();
        assert_eq!(memory.pinned_bytes(), 30);
    }
}

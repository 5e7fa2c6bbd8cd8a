//! An anonymous mapping: aligned, zeroed, given back when it is dropped.

#[cfg(target_os = "linux")]
use std::io;
use std::ptr::NonNull;

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::ahead;
use crate::ring::PAGE;

/// Size of a transparent huge page on the platforms that we know. Only a wish: a wrong guess costs
/// address space, not memory.
pub(crate) const HUGE_PAGE: usize = 2 << 20;

/// Most NUMA nodes that Linux is built for.
#[cfg(target_os = "linux")]
const NODES_MAX: usize = 1024;

/// Memory at an address of its own, the same until drop. Its owner sees to who reads and writes it.
pub(crate) struct Map {
    map: NonNull<u8>,
    map_bytes: usize,
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: it belongs to nobody but this value, which itself neither reads nor writes its bytes
// beside `populate`, and that is for its first owner.
unsafe impl Send for Map {}
// SAFETY: as above.
unsafe impl Sync for Map {}

impl Map {
    /// Maps `bytes`, not zero; aligned to [`PAGE`], and to a huge page where it holds one.
    pub(crate) fn new(bytes: usize) -> rustix::io::Result<Self> {
        let slack = if bytes >= HUGE_PAGE { HUGE_PAGE } else { 0 };
        let map_bytes = bytes.checked_add(slack).ok_or(Errno::NOMEM)?;
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice overlaps nothing.
        let map = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                map_bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        }?;
        let map = NonNull::new(map.cast::<u8>()).ok_or(Errno::NOMEM)?;
        let shift = if slack == 0 { 0 } else { map.as_ptr().align_offset(HUGE_PAGE) };
        // SAFETY: `shift` < HUGE_PAGE = `slack`, so `shift + bytes` lies within the mapping.
        let base = unsafe { map.add(shift) };
        let map = Self { map, map_bytes, base, bytes };
        map.advise(Advice::LinuxHugepage);
        Ok(map)
    }

    /// First byte.
    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// Size in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// A child of a fork does not get this memory. Without that, a fork during a direct read could
    /// leave the child's copy, or ours, without the bytes that the drive delivers.
    pub(crate) fn withhold_from_forks(&self) {
        self.advise(Advice::LinuxDontFork);
    }

    /// A child of a fork gets this memory again.
    pub(crate) fn allow_forks(&self) {
        self.advise(Advice::LinuxDoFork);
    }

    /// Its memory, none of which has been touched yet, is to come from this NUMA node as long as that
    /// has some.
    ///
    /// # Errors
    /// What the system says: some sandboxes refuse it.
    #[cfg(target_os = "linux")]
    pub(crate) fn prefer_node(&self, node: u32) -> io::Result<()> {
        const MPOL_PREFERRED: libc::c_int = 1;
        let mut mask = [0 as libc::c_ulong; NODES_MAX / libc::c_ulong::BITS as usize];
        let bits = libc::c_ulong::BITS;
        let word = mask.get_mut((node / bits) as usize).ok_or(io::ErrorKind::InvalidInput)?;
        *word |= 1 << (node % bits);
        // SAFETY: the range is ours and mapped; the call changes where its pages come from, not what
        // they hold. The kernel reads NODES_MAX bits of the mask.
        let result = unsafe {
            libc::syscall(
                libc::SYS_mbind,
                self.base.as_ptr(),
                self.bytes,
                MPOL_PREFERRED,
                mask.as_ptr(),
                // The kernel takes one off before it counts.
                NODES_MAX + 1,
                0,
            )
        };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// A wish, which the kernel may refuse.
    fn advise(&self, advice: Advice) {
        debug_assert!(matches!(
            advice,
            Advice::LinuxHugepage | Advice::LinuxDontFork | Advice::LinuxDoFork
        ));
        // SAFETY: the range is ours and mapped; this advice does not change its contents.
        let _ = unsafe { rustix::mm::madvise(self.base.as_ptr().cast(), self.bytes, advice) };
    }

    /// Gets the memory now rather than when it is touched. For a mapping that nobody else has seen.
    pub(crate) fn populate(&self) {
        if ahead::populate(self.base.addr().get(), self.bytes) {
            return;
        }
        for offset in (0..self.bytes).step_by(PAGE) {
            // SAFETY: `offset` is within the mapping, and nobody else has seen it yet.
            unsafe { self.base.as_ptr().add(offset).write_volatile(0) };
        }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours; its owner lets go of it when nobody uses it any more.
        let _ = unsafe { rustix::mm::munmap(self.map.as_ptr().cast(), self.map_bytes) };
    }
}

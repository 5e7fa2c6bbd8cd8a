//! The ring: equal, page-aligned buffers, mapped and faulted in once and reused for ever.

use std::fmt;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, OnceLock};

use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::error::{Error, Result};
use crate::sync::lock;

/// Alignment of every buffer, in bytes; buffer sizes are multiples of it.
pub const PAGE: usize = 4096;

/// Size of a transparent huge page on the platforms that we know. Only a wish: a wrong guess costs
/// address space, not memory.
const HUGE_PAGE: usize = 2 << 20;

/// A fixed set of equal buffers in one anonymous mapping. Never grows.
pub struct Ring {
    map: NonNull<u8>,
    map_bytes: usize,
    base: NonNull<u8>,
    buffer_bytes: usize,
    count: usize,
    free: Mutex<Free>,
    on_return: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

struct Free {
    indices: Vec<u32>,
    starved: bool,
}

// SAFETY: the mapping belongs to the ring until drop; a buffer's bytes are reached only through
// the one `Buffer` that holds its index, and the index list is behind a mutex.
unsafe impl Send for Ring {}
// SAFETY: see `Send`; `&Ring` hands out addresses and whole buffers, never shared mutable bytes.
unsafe impl Sync for Ring {}

impl Ring {
    /// Maps `count` buffers of `buffer_bytes` (a multiple of [`PAGE`]) and faults them in.
    ///
    /// # Errors
    /// [`Error::Config`] for sizes that make no ring, [`Error::Ring`] when the memory cannot be
    /// had.
    pub fn new(buffer_bytes: usize, count: usize) -> Result<Arc<Self>> {
        if buffer_bytes == 0 || !buffer_bytes.is_multiple_of(PAGE) {
            return Err(Error::config(format!(
                "buffers of {buffer_bytes} bytes; a multiple of {PAGE} is needed"
            )));
        }
        let bytes = buffer_bytes.checked_mul(count).filter(|bytes| *bytes > 0);
        let (Some(bytes), Ok(indices)) = (bytes, u32::try_from(count)) else {
            return Err(Error::config(format!("a ring of {count} x {buffer_bytes} bytes")));
        };
        let fail = |errno: rustix::io::Errno| Error::Ring { bytes, source: Arc::new(errno.into()) };
        let slack = if bytes >= HUGE_PAGE { HUGE_PAGE } else { 0 };
        let map_bytes =
            bytes.checked_add(slack).ok_or_else(|| Error::config("the ring is too large"))?;
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice overlaps nothing.
        let map = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                map_bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        }
        .map_err(fail)?;
        let Some(map) = NonNull::new(map.cast::<u8>()) else {
            return Err(fail(rustix::io::Errno::NOMEM));
        };
        let shift = if slack == 0 { 0 } else { map.as_ptr().align_offset(HUGE_PAGE) };
        // SAFETY: `shift` < HUGE_PAGE = `slack`, so `shift + bytes` lies within the mapping.
        let base = unsafe { map.add(shift) };
        let ring = Self {
            map,
            map_bytes,
            base,
            buffer_bytes,
            count,
            free: Mutex::new(Free { indices: (0..indices).rev().collect(), starved: false }),
            on_return: OnceLock::new(),
        };
        ring.fault_in();
        Ok(Arc::new(ring))
    }

    fn fault_in(&self) {
        let (base, bytes) = (self.base.as_ptr(), self.bytes());
        // Both are wishes. Without DontFork a fork during a direct read could leave the child's
        // copy with the bytes that the drive delivers.
        for advice in [Advice::LinuxHugepage, Advice::LinuxDontFork] {
            // SAFETY: the range is ours and mapped; this advice does not change its contents.
            let _ = unsafe { rustix::mm::madvise(base.cast(), bytes, advice) };
        }
        // SAFETY: as above; populating keeps the contents.
        let populated =
            unsafe { rustix::mm::madvise(base.cast(), bytes, Advice::LinuxPopulateWrite) };
        if populated.is_err() {
            for offset in (0..bytes).step_by(PAGE) {
                // SAFETY: `offset` is within the mapping, and nobody else has seen it yet.
                unsafe { base.add(offset).write_volatile(0) };
            }
        }
    }

    /// First byte of the first buffer. The buffers follow each other without gaps.
    pub fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Size of all buffers together, in bytes.
    pub fn bytes(&self) -> usize {
        self.buffer_bytes * self.count
    }

    /// Size of one buffer, in bytes.
    pub fn buffer_bytes(&self) -> usize {
        self.buffer_bytes
    }

    /// Number of buffers.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Number of buffers that nobody holds now.
    pub fn free_count(&self) -> usize {
        lock(&self.free).indices.len()
    }

    /// Takes a buffer, if more than `reserve` are free. After a refusal, the next returned buffer
    /// calls the ring's `on_return`.
    pub fn take(self: &Arc<Self>, reserve: usize) -> Option<Buffer> {
        let mut free = lock(&self.free);
        if free.indices.len() <= reserve {
            free.starved = true;
            return None;
        }
        let index = free.indices.pop()?;
        Some(Buffer { ring: Arc::clone(self), index, quarantined: false })
    }

    /// Sets what a returned buffer calls after a refusal, on the thread that returns it. Only the
    /// first call counts.
    pub(crate) fn on_return(&self, call: Box<dyn Fn() + Send + Sync>) {
        let _ = self.on_return.set(call);
    }

    fn give_back(&self, index: u32) {
        let starved = {
            let mut free = lock(&self.free);
            free.indices.push(index);
            std::mem::take(&mut free.starved)
        };
        if starved && let Some(call) = self.on_return.get() {
            call();
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and every buffer holds an `Arc` of the ring, so none is
        // left.
        let _ = unsafe { rustix::mm::munmap(self.map.as_ptr().cast(), self.map_bytes) };
    }
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ring")
            .field("buffer_bytes", &self.buffer_bytes)
            .field("count", &self.count)
            .finish_non_exhaustive()
    }
}

/// Sole access to one buffer of a [`Ring`], until it is dropped. Always initialised memory: zeros,
/// or what an earlier read left.
pub struct Buffer {
    ring: Arc<Ring>,
    index: u32,
    quarantined: bool,
}

impl Buffer {
    /// Which buffer of the ring this is.
    pub fn index(&self) -> usize {
        self.index as usize
    }

    /// The ring that it belongs to.
    pub fn ring(&self) -> &Arc<Ring> {
        &self.ring
    }

    fn start(&self) -> *mut u8 {
        // SAFETY: `index` < `count`, so the offset is within the mapping.
        unsafe { self.ring.base.as_ptr().add(self.index() * self.ring.buffer_bytes) }
    }

    /// Its bytes.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: mapped, initialised, and this buffer is the only way to these bytes.
        unsafe { std::slice::from_raw_parts(self.start(), self.ring.buffer_bytes) }
    }

    /// Its bytes, to be written.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_slice`, and `&mut self` excludes every other access.
        unsafe { std::slice::from_raw_parts_mut(self.start(), self.ring.buffer_bytes) }
    }

    /// Gives this buffer up for ever: the kernel may still write to it, so it must neither be
    /// reused nor unmapped.
    pub(crate) fn quarantine(&mut self) {
        if !std::mem::replace(&mut self.quarantined, true) {
            std::mem::forget(Arc::clone(&self.ring));
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if !self.quarantined {
            self.ring.give_back(self.index);
        }
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} of {:?})", self.index, self.ring)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn buffers_are_aligned_disjoint_and_return() {
        for (bytes, count) in [(PAGE, 3), (1 << 20, 5), (3 * PAGE, 400)] {
            let ring = Ring::new(bytes, count).unwrap();
            assert_eq!(ring.bytes(), bytes * count);
            let mut held: Vec<_> = std::iter::from_fn(|| ring.take(0)).collect();
            assert_eq!(held.len(), count);
            for buffer in &mut held {
                assert!(buffer.as_slice().as_ptr().addr().is_multiple_of(PAGE));
                assert!(buffer.as_slice().iter().all(|b| *b == 0));
                let mark = buffer.index() as u8;
                buffer.as_mut_slice().fill(mark);
            }
            for buffer in &held {
                assert!(buffer.as_slice().iter().all(|b| *b == buffer.index() as u8));
            }
            drop(held);
            assert_eq!(ring.free_count(), count);
        }
    }

    #[test]
    fn reserve_is_kept_and_a_refusal_is_answered_once() {
        let ring = Ring::new(PAGE, 2).unwrap();
        let calls = Arc::new(AtomicUsize::new(0));
        let seen = Arc::clone(&calls);
        ring.on_return(Box::new(move || {
            seen.fetch_add(1, Ordering::Relaxed);
        }));
        let first = ring.take(1).unwrap();
        assert!(ring.take(1).is_none());
        let second = ring.take(0).unwrap();
        drop(first);
        drop(second);
        assert_eq!(calls.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn a_quarantined_buffer_never_returns() {
        let ring = Ring::new(PAGE, 2).unwrap();
        ring.take(0).unwrap().quarantine();
        assert_eq!(ring.free_count(), 1);
    }

    #[test]
    fn nonsense_sizes_are_refused() {
        for (bytes, count) in [(0, 1), (100, 1), (PAGE, 0), (PAGE, usize::MAX / 2)] {
            assert!(matches!(Ring::new(bytes, count), Err(Error::Config(_))), "{bytes} {count}");
        }
    }
}

//! The ring: equal, page-aligned buffers, mapped and faulted in once and reused for ever.

use std::fmt;
use std::sync::{Arc, Mutex, OnceLock};

use crate::error::{Error, Result};
use crate::map::Map;
use crate::sync::lock;

/// Alignment of every buffer, in bytes; buffer sizes are multiples of it.
pub const PAGE: usize = 4096;

/// A fixed set of equal buffers in one anonymous mapping. Never grows.
pub struct Ring {
    map: Map,
    buffer_bytes: usize,
    count: usize,
    free: Mutex<Free>,
    on_return: OnceLock<Box<dyn Fn() + Send + Sync>>,
    remark: Option<String>,
}

struct Free {
    indices: Vec<u32>,
    starved: bool,
}

impl Ring {
    /// Maps `count` buffers of `buffer_bytes` (a multiple of [`PAGE`]) and faults them in.
    ///
    /// # Errors
    /// [`Error::Config`] for sizes that make no ring, [`Error::Ring`] when the memory cannot be
    /// had.
    pub fn new(buffer_bytes: usize, count: usize) -> Result<Arc<Self>> {
        Self::on_node(buffer_bytes, count, None)
    }

    /// The same on a NUMA node, as far as that has memory. [`Ring::remark`] says if that was refused.
    ///
    /// # Errors
    /// As [`Ring::new`].
    pub fn on_node(buffer_bytes: usize, count: usize, node: Option<u32>) -> Result<Arc<Self>> {
        if buffer_bytes == 0 || !buffer_bytes.is_multiple_of(PAGE) {
            return Err(Error::config(format!(
                "buffers of {buffer_bytes} bytes; a multiple of {PAGE} is needed"
            )));
        }
        let bytes = buffer_bytes.checked_mul(count).filter(|bytes| *bytes > 0);
        let (Some(bytes), Ok(indices)) = (bytes, u32::try_from(count)) else {
            return Err(Error::config(format!("a ring of {count} x {buffer_bytes} bytes")));
        };
        let map = Map::new(bytes)
            .map_err(|errno| Error::Ring { bytes, source: Arc::new(errno.into()) })?;
        map.withhold_from_forks();
        let remark = node.and_then(|node| place_on(&map, node));
        map.populate();
        Ok(Arc::new(Self {
            map,
            buffer_bytes,
            count,
            free: Mutex::new(Free { indices: (0..indices).rev().collect(), starved: false }),
            on_return: OnceLock::new(),
            remark,
        }))
    }

    /// That its memory is not where it was to be, and why.
    pub fn remark(&self) -> Option<&str> {
        self.remark.as_deref()
    }

    /// First byte of the first buffer. The buffers follow each other without gaps.
    pub fn base(&self) -> *mut u8 {
        self.map.base().as_ptr()
    }

    /// Size of all buffers together, in bytes.
    pub fn bytes(&self) -> usize {
        self.map.bytes()
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

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ring")
            .field("buffer_bytes", &self.buffer_bytes)
            .field("count", &self.count)
            .finish_non_exhaustive()
    }
}

/// Has the memory come from a NUMA node, or says why not.
#[cfg(target_os = "linux")]
fn place_on(map: &Map, node: u32) -> Option<String> {
    let error = map.prefer_node(node).err()?;
    Some(format!("the ring may be on any NUMA node, and not on {node}: {error}"))
}

#[cfg(not(target_os = "linux"))]
fn place_on(_: &Map, node: u32) -> Option<String> {
    Some(format!("the ring may be on any NUMA node, and not on {node}: that takes Linux"))
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
        unsafe { self.ring.base().add(self.index() * self.ring.buffer_bytes) }
    }

    /// Its bytes.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: mapped and initialised, for as long as there is a buffer, which holds the ring.
        // This buffer is the only way to these bytes: it alone has its index.
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

    /// Every Linux machine has node 0, and none the last that there could be.
    #[test]
    #[cfg(target_os = "linux")]
    fn a_node_that_is_not_there_is_told() {
        let ring = Ring::on_node(PAGE, 2, Some(1023)).unwrap();
        assert!(ring.remark().unwrap().contains("not on 1023"), "{ring:?}");
        assert!(Ring::on_node(PAGE, 2, Some(u32::MAX)).unwrap().remark().is_some());
        let ring = Ring::on_node(PAGE, 2, Some(0)).unwrap();
        // A kernel without NUMA, or a sandbox, refuses it.
        if let Some(remark) = ring.remark() {
            crate::skip::skip(remark);
        }
        assert!(ring.take(0).unwrap().as_slice().iter().all(|byte| *byte == 0));
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

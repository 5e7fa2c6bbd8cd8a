//! Slots in the memory of a GPU: addresses for all of them from the start, memory as they are used.
//!
//! What is read is copied there by [`Uploads`].

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tierstream_cuda::{Device, Event, Region, Stream};
use tierstream_io::Chunk;

use super::layer::TAIL_BYTES;
use crate::abi::*;
use crate::error::{Error, Result};
use crate::gpu::disturbing;
use crate::uploads::Uploads;

/// The memory of one pool on a GPU.
pub(super) struct Vram {
    /// Copies from the host.
    uploads: Arc<Uploads>,
    /// Copies within this memory, beside them: the bus is not needed for these.
    within: Stream,
    region: Region,
    /// Held while memory is mapped, so that a granule is cleared before it is used.
    growing: Mutex<()>,
    /// What the tensors of the pool are said to lie in: a genuine buffer of ggml's, since kernels
    /// are chosen by the buffer's kind and usage. Nothing is in it.
    anchor: ggml_backend_buffer_t,
}

// SAFETY: the buffer is only named in tensors, and freed once.
unsafe impl Send for Vram {}
// SAFETY: as above.
unsafe impl Sync for Vram {}

impl Vram {
    /// Addresses for `bytes` on the GPU of `uploads`, with no memory behind them yet. It will come in
    /// granules of `granule_bytes`.
    pub(super) fn new(uploads: Arc<Uploads>, bytes: u64, granule_bytes: u64) -> Result<Self> {
        let device = uploads.gpu().device();
        let region = device.reserve(bytes, granule_bytes)?;
        let within = device.stream()?;
        // SAFETY: a device of ggml's registry; a buffer of its own kind.
        let anchor = unsafe {
            let buffer_type = ggml_backend_dev_buffer_type(uploads.gpu().inner().cast());
            let anchor = ggml_backend_buft_alloc_buffer(buffer_type, 256);
            if anchor.is_null() {
                return Err(Error::OutOfMemory { bytes: 256, what: "a buffer on the GPU" });
            }
            ggml_backend_buffer_set_usage(anchor, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
            anchor.cast()
        };
        Ok(Self { uploads, within, region, growing: Mutex::new(()), anchor })
    }

    /// The GPU.
    pub(super) fn device(&self) -> &Device {
        self.uploads.gpu().device()
    }

    /// Where the first byte is, in the device's address space.
    pub(super) fn base(&self) -> *mut u8 {
        // Kernels get it as the address of a tensor; nobody here reads or writes there.
        std::ptr::without_provenance_mut(
            usize::try_from(self.region.address()).expect("addresses have 64 bits"),
        )
    }

    /// What tensors in this memory name as their buffer.
    pub(super) fn buffer(&self) -> ggml_backend_buffer_t {
        self.anchor
    }

    /// Bytes of the device's memory that are taken now.
    pub(super) fn mapped_bytes(&self) -> u64 {
        self.region.mapped_bytes()
    }

    /// Puts memory, zeros, behind `bytes` from `offset` on, and behind what kernels may read beyond,
    /// as long as the device has `left` bytes free afterwards.
    pub(super) fn back(&self, offset: u64, bytes: u64, left: u64) -> Result<()> {
        let size = self.region.granule_bytes();
        let end = (offset + bytes + TAIL_BYTES as u64).min(self.region.bytes());
        let _growing = lock(&self.growing);
        for granule in offset / size..end.div_ceil(size) {
            let index = usize::try_from(granule).expect("granules are counted in usize");
            if !self.region.is_mapped(index) {
                if left > 0 {
                    self.leave(size, left)?;
                }
                self.region.map(index)?;
                // What is not surely cleared before it is used is not there.
                let cleared =
                    self.clear(granule * size, size).and_then(|()| self.copy_after_clearing());
                if let Err(error) = cleared {
                    self.uploads.synchronize()?;
                    self.region.unmap(index)?;
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Refuses to take `bytes` of the device's memory if fewer than `left` would be free then.
    fn leave(&self, bytes: u64, left: u64) -> Result<()> {
        let free = self.uploads.gpu().free_bytes()?;
        if free >= bytes + left {
            return Ok(());
        }
        Err(Error::OutOfGpuMemory(tierstream_cuda::Error::OutOfMemory {
            doing: format!("take {bytes} bytes of GPU memory, and leave {left} to others"),
            name: "out of memory".into(),
            text: format!("{free} are free").into(),
        }))
    }

    /// Takes the memory away behind every granule that `used` has no part of, which is asked for
    /// while nobody can put memory anywhere; returns its bytes. Kernels that read there are done.
    pub(super) fn unback(&self, used: impl FnOnce() -> Vec<Range<u64>>) -> Result<u64> {
        // First, since whoever must not be disturbed may be waiting for memory.
        disturbing(|| self.unback_alone(used))
    }

    fn unback_alone(&self, used: impl FnOnce() -> Vec<Range<u64>>) -> Result<u64> {
        let size = self.region.granule_bytes();
        let _growing = lock(&self.growing);
        let used = used();
        let is_used = |granule: &usize| {
            let (start, end) = (*granule as u64 * size, (*granule as u64 + 1) * size);
            used.iter().any(|part| part.start < end && start < part.end)
        };
        let idle = (0..self.region.granules()).filter(|granule| !is_used(granule));
        let idle: Vec<usize> = idle.filter(|&granule| self.region.is_mapped(granule)).collect();
        if idle.is_empty() {
            return Ok(0);
        }
        // Copies that nobody has seen done keep their granules.
        self.uploads.synchronize()?;
        self.within.synchronize()?;
        idle.iter().try_for_each(|&granule| self.region.unmap(granule))?;
        Ok(idle.len() as u64 * size)
    }

    /// Of the bytes before `offset`, the start of a granule, those that there is memory behind.
    pub(super) fn mapped_bytes_before(&self, offset: u64) -> u64 {
        let size = self.region.granule_bytes();
        let granules = usize::try_from(offset / size).expect("granules are counted in usize");
        (0..granules).filter(|&granule| self.region.is_mapped(granule)).count() as u64 * size
    }

    /// Starts to copy `count` rows of `width` bytes of pinned memory to `offset` and beyond, where
    /// there is memory. They begin every so many bytes (a pitch) here and there.
    pub(super) fn upload_rows<T>(
        &self,
        from: T,
        from_pitch: usize,
        offset: u64,
        to_pitch: usize,
        (count, width): (usize, usize),
    ) -> Result<()>
    where
        T: AsRef<[u8]> + Send + 'static,
    {
        let to = self.region.span(offset, ((count - 1) * to_pitch + width) as u64)?;
        Ok(self.uploads.upload_rows(from, from_pitch, to, to_pitch, width)?)
    }

    /// Starts to copy a chunk of the ring to `offset`, where there is memory. Comes from the reader's thread.
    pub(super) fn upload_chunk(&self, chunk: Chunk, offset: u64) -> Result<()> {
        let to = self.region.span(offset, chunk.len() as u64)?;
        self.uploads.upload_chunk(chunk, to)
    }

    /// An event behind every upload that was started.
    pub(super) fn uploaded(&self) -> Result<Event> {
        Ok(self.uploads.record()?)
    }

    /// Starts to write zeros, before the uploads that follow.
    pub(super) fn clear(&self, offset: u64, bytes: u64) -> Result<()> {
        Ok(self.uploads.fill(self.region.span(offset, bytes)?, 0)?)
    }

    /// Has copies within this memory that are started from now on come after what has been cleared.
    /// Uploads do anyhow, on the same stream.
    pub(super) fn copy_after_clearing(&self) -> Result<()> {
        Ok(self.within.wait_for(&self.uploads.record()?)?)
    }

    /// Starts to copy within this memory, what uploads have [settled](Self::settle).
    pub(super) fn copy(&self, from: u64, to: u64, bytes: u64) -> Result<()> {
        self.within.copy_within(self.region.span(from, bytes)?, self.region.span(to, bytes)?)?;
        Ok(())
    }

    /// An event behind every [copy](Self::copy) that was started.
    pub(super) fn copied(&self) -> Result<Event> {
        Ok(self.within.record()?)
    }

    /// Waits for every copy that was started.
    pub(super) fn settle(&self) -> Result<()> {
        let copied = self.copied()?;
        self.uploads.settle()?;
        Ok(copied.wait()?)
    }
}

impl Drop for Vram {
    fn drop(&mut self) {
        // On a lost device nothing is copied any more, whatever this says.
        let _ = (self.uploads.synchronize(), self.within.synchronize());
        // SAFETY: ours, freed once; whoever computes with tensors that name it is gone.
        unsafe { ggml_backend_buffer_free(self.anchor.cast()) };
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

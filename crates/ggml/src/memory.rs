//! Host memory for tensors, from a ggml buffer type.

use crate::abi::*;
use crate::error::{Error, Result};

/// One buffer of a backend, filled from a base address upwards.
pub(crate) struct Memory {
    buffer: ggml_backend_buffer_t,
    bytes: usize,
}

impl Memory {
    /// Of every tensor's address, bytes.
    pub(crate) const ALIGNMENT: usize = 64;

    /// For weights. Kernels are chosen by the buffer's usage.
    pub(crate) fn weights(buffer_type: ggml_backend_buffer_type_t, bytes: usize) -> Result<Self> {
        let this = Self::new(buffer_type, bytes, "expert slots")?;
        this.prefer_huge_pages();
        // SAFETY: a live buffer.
        unsafe {
            ggml_backend_buffer_set_usage(this.buffer.cast(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
        }
        Ok(this)
    }

    /// For activations.
    pub(crate) fn scratch(buffer_type: ggml_backend_buffer_type_t, bytes: usize) -> Result<Self> {
        Self::new(buffer_type, bytes, "gathered rows")
    }

    fn new(
        buffer_type: ggml_backend_buffer_type_t,
        bytes: usize,
        what: &'static str,
    ) -> Result<Self> {
        let bytes = bytes.max(Self::ALIGNMENT);
        // SAFETY: a buffer type of ggml's registry.
        unsafe {
            if !ggml_backend_buft_is_host(buffer_type.cast()) {
                return Err(Error::Backend("the host executor needs host memory".into()));
            }
            let buffer = ggml_backend_buft_alloc_buffer(buffer_type.cast(), bytes);
            if buffer.is_null() {
                return Err(Error::OutOfMemory { bytes, what });
            }
            Ok(Self { buffer: buffer.cast(), bytes })
        }
    }

    /// Asks for huge pages: a fresh slot costs a page fault per 4 KiB otherwise, and kernels
    /// stream through slots. What it brings is in BENCHMARKS.md.
    fn prefer_huge_pages(&self) {
        const HUGE_PAGE: usize = 2 << 20;
        let (start, end) = (self.base().addr(), self.base().addr() + self.bytes);
        let (first, last) = (start.next_multiple_of(HUGE_PAGE), end / HUGE_PAGE * HUGE_PAGE);
        if first < last {
            let at = self.base().wrapping_add(first - start);
            // SAFETY: advice about pages that lie wholly inside our buffer; a refusal is harmless.
            unsafe { libc::madvise(at.cast(), last - first, libc::MADV_HUGEPAGE) };
        }
    }

    pub(crate) fn base(&self) -> *mut u8 {
        // SAFETY: a live buffer.
        unsafe { ggml_backend_buffer_get_base(self.buffer.cast()).cast() }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn buffer(&self) -> ggml_backend_buffer_t {
        self.buffer
    }

    /// A contiguous tensor of this buffer at `data`.
    pub(crate) fn tensor(&self, type_: ggml_type, ne: [i64; 3], data: *mut u8) -> ggml_tensor {
        // SAFETY: plain data, for which zero is a valid value everywhere.
        let mut t: ggml_tensor = unsafe { std::mem::zeroed() };
        t.type_ = type_;
        t.buffer = self.buffer.cast();
        t.ne = [ne[0], ne[1], ne[2], 1];
        // SAFETY: pure functions of the type; the shape was checked with the file's header.
        let (element, row) = unsafe { (ggml_type_size(type_), ggml_row_size(type_, ne[0])) };
        let size = |n: i64| usize::try_from(n).expect("checked with the file's header");
        t.nb = [element, row, row * size(ne[1]), row * size(ne[1]) * size(ne[2])];
        t.data = data.cast();
        t
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: made by `new`, freed once; contexts that compute with it are gone.
        unsafe { ggml_backend_buffer_free(self.buffer.cast()) };
    }
}

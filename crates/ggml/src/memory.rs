//! Memory for tensors: the host's, and small buffers of a device.

use std::ptr;

use tierstream_io::PAGE;

use crate::abi::*;
use crate::error::{Error, Result};

/// Size of a huge page on the platforms that we know. Memory that begins at one costs less to look up.
pub(crate) const HUGE_PAGE: usize = 2 << 20;

/// Gives memory that was freed back to the system, so that what is resident is what is used.
pub fn give_back_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: may be called at any time, from any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// One buffer, filled from a base address upwards.
#[derive(Debug)]
pub(crate) struct Memory {
    buffer: ggml_backend_buffer_t,
    bytes: usize,
}

// SAFETY: a buffer of ggml's has no ties to a thread.
unsafe impl Send for Memory {}
// SAFETY: `&Memory` gives away addresses and sizes, no contents.
unsafe impl Sync for Memory {}

impl Memory {
    /// Of a buffer's base and least size, bytes.
    pub(crate) const ALIGNMENT: usize = 64;

    /// For weights, which direct reads fill: zeros, from a page's start on, and taking room only
    /// as it is touched. Kernels are chosen by the buffer's usage.
    pub(crate) fn weights(bytes: usize) -> Result<Self> {
        let bytes = bytes.max(Self::ALIGNMENT);
        let buffer = mapped_buffer(bytes);
        if buffer.is_null() {
            return Err(Error::OutOfMemory { bytes, what: "expert slots" });
        }
        // SAFETY: a live buffer.
        unsafe { ggml_backend_buffer_set_usage(buffer.cast(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS) };
        Ok(Self { buffer, bytes })
    }

    /// For activations.
    pub(crate) fn scratch(buffer_type: ggml_backend_buffer_type_t, bytes: usize) -> Result<Self> {
        Self::new(buffer_type, bytes, "gathered rows")
    }

    /// In the memory that `backend` computes in.
    pub(crate) fn of_backend(
        backend: ggml_backend_t,
        bytes: usize,
        what: &'static str,
    ) -> Result<Self> {
        // SAFETY: a live backend, whose buffer type lives for ever.
        let buffer_type = unsafe { ggml_backend_get_default_buffer_type(backend.cast()) };
        Self::allocate(buffer_type.cast(), bytes, what)
    }

    /// In host memory that `backend` copies to on its own time, if it has such memory.
    pub(crate) fn beside_backend(
        backend: ggml_backend_t,
        bytes: usize,
        what: &'static str,
    ) -> Result<Self> {
        // SAFETY: a live backend, whose device and buffer types live for ever.
        let (pinned, plain) = unsafe {
            let device = ggml_backend_get_device(backend.cast());
            (ggml_backend_dev_host_buffer_type(device), ggml_backend_cpu_buffer_type())
        };
        let buffer_type = if pinned.is_null() { plain } else { pinned };
        Self::new(buffer_type.cast(), bytes, what)
    }

    fn new(
        buffer_type: ggml_backend_buffer_type_t,
        bytes: usize,
        what: &'static str,
    ) -> Result<Self> {
        // SAFETY: a buffer type of ggml's registry.
        if unsafe { !ggml_backend_buft_is_host(buffer_type.cast()) } {
            return Err(Error::Backend("the host executor needs host memory".into()));
        }
        Self::allocate(buffer_type, bytes, what)
    }

    fn allocate(
        buffer_type: ggml_backend_buffer_type_t,
        bytes: usize,
        what: &'static str,
    ) -> Result<Self> {
        let bytes = bytes.max(Self::ALIGNMENT);
        // SAFETY: a buffer type of ggml's registry.
        let buffer = unsafe { ggml_backend_buft_alloc_buffer(buffer_type.cast(), bytes) };
        if buffer.is_null() {
            return Err(Error::OutOfMemory { bytes, what });
        }
        Ok(Self { buffer: buffer.cast(), bytes })
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
        tensor(self.buffer, type_, ne, data)
    }
}

/// A contiguous tensor at `data`, which is said to lie in `buffer`.
pub(crate) fn tensor(
    buffer: ggml_backend_buffer_t,
    type_: ggml_type,
    ne: [i64; 3],
    data: *mut u8,
) -> ggml_tensor {
    // SAFETY: plain data, for which zero is a valid value everywhere.
    let mut t: ggml_tensor = unsafe { std::mem::zeroed() };
    t.type_ = type_;
    t.buffer = buffer.cast();
    t.ne = [ne[0], ne[1], ne[2], 1];
    // SAFETY: pure functions of the type; the shape was checked with the file's header.
    let (element, row) = unsafe { (ggml_type_size(type_), ggml_row_size(type_, ne[0])) };
    let size = |n: i64| usize::try_from(n).expect("checked with the file's header");
    t.nb = [element, row, row * size(ne[1]), row * size(ne[1]) * size(ne[2])];
    t.data = data.cast();
    t
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: made by `new`, freed once; contexts that compute with it are gone.
        unsafe { ggml_backend_buffer_free(self.buffer.cast()) };
    }
}

/// A buffer of host memory for the CPU's kernels: zeros, from a huge page's start on, and taking room only
/// as it is touched. Null if the system refuses.
pub(crate) fn mapped_buffer(bytes: usize) -> ggml_backend_buffer_t {
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let Some(room) = bytes.checked_add(HUGE_PAGE) else { return ptr::null_mut() };
    // SAFETY: a fresh mapping at an address of the kernel's choice overlaps nothing.
    let map = unsafe { libc::mmap(ptr::null_mut(), room, access, flags, -1, 0) };
    if map == libc::MAP_FAILED {
        return ptr::null_mut();
    }
    let before = map.align_offset(HUGE_PAGE);
    let base = map.wrapping_byte_add(before);
    let bytes = bytes.next_multiple_of(PAGE);
    // SAFETY: whole pages of the mapping that nobody has seen, before and behind.
    unsafe {
        if before > 0 {
            libc::munmap(map, before);
        }
        if room - before > bytes {
            libc::munmap(base.wrapping_byte_add(bytes), room - before - bytes);
        }
    }
    let advise = |advice| {
        // SAFETY: advice about a mapping of ours; a refusal is harmless.
        unsafe { libc::madvise(base, bytes, advice) };
    };
    // Fresh memory costs a page fault per 4 KiB otherwise, and kernels stream through it. What it
    // brings is in BENCHMARKS.md.
    advise(libc::MADV_HUGEPAGE);
    // A fork during a direct read could part the page that the drive writes to from ours:
    // open(2), O_DIRECT.
    advise(libc::MADV_DONTFORK);
    // SAFETY: a mapping of so many bytes, which goes with the buffer; the CPU's buffer type lives for
    // ever.
    unsafe {
        let buffer: ggml_backend_buffer_t = ggml_backend_cpu_buffer_from_ptr(base, bytes).cast();
        if buffer.is_null() {
            libc::munmap(base, bytes);
        } else {
            (*buffer).buft = ggml_backend_cpu_buffer_type().cast();
            (*buffer).iface.free_buffer = Some(unmap);
        }
        buffer
    }
}

extern "C" fn unmap(buffer: ggml_backend_buffer_t) {
    // SAFETY: the mapping that `mapped_buffer` has made, given back once.
    unsafe { libc::munmap((*buffer).context, (*buffer).size) };
}

/// A count as ggml has it.
pub(crate) fn to_ne(n: usize) -> i64 {
    i64::try_from(n).expect("shapes fit ggml's int64")
}

/// The count that `ne` is.
pub(crate) fn usize_of(ne: i64) -> usize {
    usize::try_from(ne).expect("ggml's shapes are not negative")
}

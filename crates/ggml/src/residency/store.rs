//! The memory that slots are in: the host's or a GPU's.

use std::sync::Arc;

use tierstream_cuda::Registered;

use super::vram::Vram;
use crate::abi::*;
use crate::memory::Memory;

/// The memory that slots are in.
pub(super) enum Store {
    /// The host's, which reads go to. Pinned where it is below a GPU's.
    Host { _pin: Option<Registered<Arc<Memory>>>, memory: Arc<Memory> },
    /// A GPU's, to which is copied what was read.
    Vram(Vram),
}

impl Store {
    pub(super) fn base(&self) -> *mut u8 {
        match self {
            Store::Host { memory, .. } => memory.base(),
            Store::Vram(vram) => vram.base(),
        }
    }

    pub(super) fn buffer(&self) -> ggml_backend_buffer_t {
        match self {
            Store::Host { memory, .. } => memory.buffer(),
            Store::Vram(vram) => vram.buffer(),
        }
    }

    /// How far `data`, an address in this memory, is from its beginning.
    pub(super) fn offset(&self, data: *const u8) -> u64 {
        (data.addr() - self.base().addr()) as u64
    }
}

//! The next layer's router on this layer's input, computed at once.

use crate::abi::*;
use crate::error::Error;
use crate::memory::Memory;
use crate::plan::Routing;
use crate::prefetch::{Guessed, by_rank};
use crate::routed::read_ids;
use crate::router::{CopyGraph, RouterCopy};
use crate::segment::synchronize;

/// Asks routers what they think of another layer's input.
pub(super) struct Lookahead {
    buffer_type: ggml_backend_buffer_type_t,
    memory: Option<Memory>,
    graph: CopyGraph,
    ids: Vec<u32>,
    raw: Vec<u8>,
}

impl Lookahead {
    pub(super) fn new(inner: ggml_backend_t) -> Self {
        // SAFETY: a live backend.
        let buffer_type = unsafe { ggml_backend_get_default_buffer_type(inner.cast()) }.cast();
        let (ids, raw) = (Vec::new(), Vec::new());
        Self { buffer_type, memory: None, graph: CopyGraph::new(), ids, raw }
    }

    /// What `next`, of `n_experts`, will need, guessed from the input of `current`; None where
    /// that does not fit.
    pub(super) fn guess(
        &mut self,
        inner: ggml_backend_t,
        current: &Routing,
        next: &Routing,
        n_experts: u32,
    ) -> Result<Option<Vec<Guessed>>, Error> {
        let (Ok(here), Ok(there)) = (&current.router, &next.router) else { return Ok(None) };
        if !there.takes(here.input()) {
            return Ok(None);
        }
        let needed = there.copy_bytes();
        if self.memory.as_ref().is_none_or(|memory| memory.bytes() < needed) {
            self.memory = None;
            self.memory = Some(Memory::scratch(self.buffer_type, needed)?);
        }
        let memory = self.memory.as_ref().expect("just made");
        // The input is kept for the expert matmuls that follow.
        let mut copy = RouterCopy::new(there, here.input(), memory);
        let status = self.graph.compute(inner, &mut copy);
        synchronize(inner);
        if status != GGML_STATUS_SUCCESS {
            return Ok(None);
        }
        // SAFETY: just computed, in a copy that nothing changes meanwhile.
        let ids = unsafe { &*copy.ids() };
        let read = read_ids(ids, n_experts, &mut self.raw, &mut self.ids);
        Ok(read.ok().map(|(n_used, n_tokens)| by_rank(&self.ids, n_used, n_tokens)))
    }
}

//! The next layer's router on this layer's input, as part of what the GPU computes anyway.

use std::collections::HashMap;

use crate::abi::*;
use crate::error::{Error, Result};
use crate::memory::Memory;
use crate::plan::{PLANS_KEPT, Routing};
use crate::prefetch::{Guessed, by_rank};
use crate::routed::sort_out_ids;
use crate::router::{CopyGraph, RouterCopy};

/// Asks routers what they think of another layer's input. The executor waits for its backend before
/// it asks again, and before this is dropped.
pub(super) struct Lookahead {
    inner: ggml_backend_t,
    memory: Option<Memory>,
    graph: CopyGraph,
    copies: Vec<Copies>,
    ids: Vec<u32>,
}

/// The copies of one graph, which are the same whenever it comes again: ggml-cuda captures what comes
/// again as it was.
struct Copies {
    uid: u64,
    by_layer: HashMap<usize, RouterCopy>,
}

impl Lookahead {
    pub(super) fn new(inner: ggml_backend_t) -> Self {
        let (graph, copies, ids) = (CopyGraph::new(), Vec::new(), Vec::new());
        Self { inner, memory: None, graph, copies, ids }
    }

    /// Has the GPU compute, behind all else, what the router of `next` makes of the input of
    /// `current`. Returns the ids, to be read when it has been waited for; None where that does not
    /// fit, or has no memory, which is not worth any slots. `uid` is that of their graph.
    pub(super) fn ask(
        &mut self,
        uid: u64,
        current: &Routing,
        next: &Routing,
    ) -> Result<Option<*mut ggml_tensor>> {
        let (Ok(here), Ok(there)) = (&current.router, &next.router) else { return Ok(None) };
        if !there.takes(here.input()) {
            return Ok(None);
        }
        let needed = there.copy_bytes();
        if self.memory.as_ref().is_none_or(|memory| memory.bytes() < needed) {
            self.copies.clear();
            self.memory = None;
            let bytes = needed.next_power_of_two();
            self.memory = match Memory::of_backend(self.inner, bytes, "a copy of a router") {
                Err(Error::OutOfMemory { .. }) => None,
                made => Some(made?),
            };
        }
        let Some(memory) = &self.memory else { return Ok(None) };
        let known = self.copies.iter().position(|copies| copies.uid == uid && uid != 0);
        let index = known.unwrap_or_else(|| {
            self.copies.retain(|copies| copies.uid != 0);
            if self.copies.len() >= PLANS_KEPT {
                self.copies.remove(0);
            }
            self.copies.push(Copies { uid, by_layer: HashMap::new() });
            self.copies.len() - 1
        });
        // The input is kept for the expert matmuls that follow.
        let new = || RouterCopy::new(there, here.input(), memory);
        let copy = self.copies[index].by_layer.entry(next.layer).or_insert_with(new);
        let status = self.graph.compute(self.inner, copy);
        Ok((status == GGML_STATUS_SUCCESS).then(|| copy.ids()))
    }

    /// The experts that `ids`, as [asked](Self::ask) for, names in `bytes`.
    pub(super) fn guessed(
        &mut self,
        ids: *mut ggml_tensor,
        bytes: &[u8],
        n_experts: u32,
    ) -> Option<Vec<Guessed>> {
        // SAFETY: in a copy that nothing changes before the next question.
        let ids = unsafe { &*ids };
        let (n_used, n_tokens) = sort_out_ids(ids, n_experts, bytes, &mut self.ids).ok()?;
        Some(by_rank(&self.ids, n_used, n_tokens))
    }
}

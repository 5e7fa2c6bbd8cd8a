//! What goes to and from the GPU beside the records: numbers of slots, and what routers say.

use std::collections::HashMap;
use std::ops::Range;

use crate::abi::*;
use crate::error::Result;
use crate::memory::{self, Memory};
use crate::plan::{Routing, nodes};
use crate::residency::Residency;
use crate::routed::Routed;
use crate::segment::Patch;

/// What nodes get instead of the model's weights and the router's ids. The same tensors whenever a
/// layer comes again, over all slots of its class: ggml-cuda captures a part of a graph only if
/// everything that its nodes name stays as it is, and launches kernel by kernel otherwise.
#[derive(Default)]
pub(super) struct OverSlots {
    ids: Option<Ids>,
    weights: HashMap<(usize, usize), Box<ggml_tensor>>,
}

impl OverSlots {
    /// All slots of a part of a layer's records.
    fn weights(&mut self, residency: &Residency, layer: usize, part: usize) -> *mut ggml_tensor {
        let all = || Box::new(residency.window(layer, part, 0, residency.slots_of(layer) - 1));
        &raw mut **self.weights.entry((layer, part)).or_insert_with(all)
    }

    /// Has the expert matmuls of a routing read slots: those that
    /// are in `slots`, for as long as `patch` lives.
    pub(super) fn exchange(
        &mut self,
        residency: &Residency,
        graph: &ggml_cgraph,
        routing: &Routing,
        slots: *mut ggml_tensor,
        patch: &mut Patch,
    ) {
        let all = nodes(graph);
        for op in routing.ops() {
            patch.source(all[op.node], 2, slots);
            patch.source(all[op.node], 0, self.weights(residency, routing.layer, op.part));
        }
    }

    /// The slots of `routed`; set behind what the backend has to compute, which may still read the
    /// ones before.
    pub(super) fn ids(
        &mut self,
        inner: ggml_backend_t,
        routed: &Routed,
    ) -> Result<*mut ggml_tensor> {
        let shape = [memory::to_ne(routed.n_used), memory::to_ne(routed.n_tokens), 1];
        if self.ids.as_ref().is_none_or(|ids| ids.tensor.ne[..3] != shape) {
            self.ids = None;
            self.ids = Some(Ids::new(inner, shape)?);
        }
        let ids = self.ids.as_mut().expect("just made");
        let bytes = size_of_val(routed.slots.as_slice());
        let values = routed.slots.as_ptr().cast();
        // SAFETY: a tensor of this size in a live buffer; the values are taken before the call
        // returns (a copy from pageable memory of less than 64 KiB: CUDA driver API, "API
        // synchronization behavior").
        unsafe {
            ggml_backend_tensor_set_async(inner.cast(), &raw mut *ids.tensor, values, 0, bytes)
        };
        Ok(&raw mut *ids.tensor)
    }
}

/// Numbers of slots, in the backend's own memory.
struct Ids {
    tensor: Box<ggml_tensor>,
    // The executor waits for its backend before this is freed.
    _memory: Memory,
}

impl Ids {
    fn new(inner: ggml_backend_t, shape: [i64; 3]) -> Result<Self> {
        let count: i64 = shape.iter().product();
        let bytes = usize::try_from(count).unwrap_or(0) * size_of::<i32>();
        let what = "numbers of slots on the GPU";
        let memory = Memory::of_backend(inner, bytes.next_multiple_of(256), what)?;
        let tensor = Box::new(memory.tensor(GGML_TYPE_I32, shape, memory.base()));
        Ok(Self { tensor, _memory: memory })
    }
}

/// Tensors that are copied to the host behind what the backend has to compute: all that a layer
/// asks for is there when the backend has been waited for once.
#[derive(Default)]
pub(super) struct ReadBack {
    memory: Option<Memory>,
    /// Where each tensor's bytes are.
    parts: Vec<Range<usize>>,
}

impl ReadBack {
    /// Asks for all bytes of `tensors`.
    pub(super) fn ask(
        &mut self,
        inner: ggml_backend_t,
        tensors: &[*mut ggml_tensor],
    ) -> Result<()> {
        self.make_room(inner, tensors)?;
        tensors.iter().enumerate().for_each(|(index, &tensor)| self.ask_one(inner, index, tensor));
        Ok(())
    }

    /// Makes room for all bytes of `tensors`, which are then asked for one by one.
    pub(super) fn make_room(
        &mut self,
        inner: ggml_backend_t,
        tensors: &[*mut ggml_tensor],
    ) -> Result<()> {
        self.parts.clear();
        let mut end = 0;
        for &tensor in tensors {
            // SAFETY: a live tensor.
            let bytes = unsafe { ggml_nbytes(tensor) };
            self.parts.push(end..end + bytes);
            end = (end + bytes).next_multiple_of(Memory::ALIGNMENT);
        }
        if self.memory.as_ref().is_none_or(|memory| memory.bytes() < end) {
            self.memory = None;
            let bytes = end.next_power_of_two();
            self.memory = Some(Memory::beside_backend(inner, bytes, "selected experts")?);
        }
        Ok(())
    }

    /// Asks for the bytes of a tensor for which there is room, the `index`th.
    pub(super) fn ask_one(&self, inner: ggml_backend_t, index: usize, tensor: *mut ggml_tensor) {
        let (part, memory) = (&self.parts[index], self.memory.as_ref().expect("room was made"));
        if part.is_empty() {
            return;
        }
        let to = memory.base().wrapping_add(part.start).cast();
        // SAFETY: a live, allocated tensor of the backend; the memory has room, and stays until
        // the backend has been waited for.
        unsafe { ggml_backend_tensor_get_async(inner.cast(), tensor, to, 0, part.len()) };
    }

    /// Of the `index`th tensor that was asked for; the backend has been waited for since.
    pub(super) fn bytes(&self, index: usize) -> &[u8] {
        let (Some(memory), Some(part)) = (&self.memory, self.parts.get(index)) else { return &[] };
        // SAFETY: in bounds of the memory, which the copy has filled, and nobody writes to before
        // the next `ask`.
        unsafe { std::slice::from_raw_parts(memory.base().add(part.start), part.len()) }
    }
}

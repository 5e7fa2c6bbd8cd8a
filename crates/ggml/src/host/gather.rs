//! Expert matmuls for some of the routed experts: their rows are gathered, multiplied in one small
//! graph, and scattered into the outputs of the nodes that they stand for.

use std::ptr;

use crate::abi::*;
use crate::error::{Error, Result};
use crate::memory::{Memory, to_ne, usize_of};
use crate::residency::{Placed, Residency};
use crate::routed::{Routed, slot_range};
use crate::segment::{compute_on, synchronize};
use crate::workspace::{PAIRS_PER_CALL, scratch_bytes};

/// Headers of one gathered matmul: tensors and a small graph.
const CONTEXT_BYTES: usize = 64 * 1024;

/// Nodes that a small graph has room for.
const GRAPH_NODES: usize = 16;

/// Host memory and tensor headers for what the executor adds to a graph.
pub(super) struct Scratch {
    buffer_type: ggml_backend_buffer_type_t,
    memory: Option<Memory>,
    context: *mut ggml_context,
    /// Most slots of a window times pairs of a call: `Workspace::mappings`.
    mappings: usize,
    /// Rows of the input, slots and rows of the output, per pair of the call.
    from: Vec<usize>,
    slots: Vec<i32>,
    to: Vec<usize>,
}

/// A matmul of a stage: the node that it stands for, and which part of the records it reads.
#[derive(Clone, Copy)]
pub(super) struct Op {
    pub(super) node: *mut ggml_tensor,
    pub(super) part: usize,
}

impl Scratch {
    pub(super) fn new(inner: ggml_backend_t) -> Self {
        let params = ggml_init_params {
            mem_size: CONTEXT_BYTES,
            mem_buffer: ptr::null_mut(),
            no_alloc: true,
        };
        // SAFETY: a live backend; ggml_init returns null or a context.
        unsafe {
            Self {
                buffer_type: ggml_backend_get_default_buffer_type(inner.cast()).cast(),
                memory: None,
                context: ggml_init(params),
                mappings: 0,
                from: Vec::new(),
                slots: Vec::new(),
                to: Vec::new(),
            }
        }
    }

    /// Takes what was allocated with the context.
    pub(super) fn reserve(&mut self, memory: Memory, mappings: usize) {
        self.memory = Some(memory);
        self.mappings = mappings;
    }

    /// Whether `pairs` may be multiplied at once over a window of slots `low..=high`.
    pub(super) fn window_fits(&self, (low, high): (u32, u32), pairs: usize) -> bool {
        (high - low + 1) as usize * pairs <= self.mappings
    }

    fn memory(&mut self, bytes: usize) -> Result<&Memory> {
        if self.memory.as_ref().is_none_or(|m| m.bytes() < bytes) {
            self.memory = None; // give the old one back first
            self.memory = Some(Memory::scratch(self.buffer_type, bytes)?);
        }
        Ok(self.memory.as_ref().expect("just made"))
    }

    /// A tensor with the slots of all pairs, shaped like the routing's ids.
    pub(super) fn ids(&mut self, routed: &Routed) -> Result<ggml_tensor> {
        let memory = self.memory(routed.slots.len() * 4)?;
        let shape = [routed.n_used, routed.n_tokens, 1];
        let ids = memory.tensor(GGML_TYPE_I32, shape.map(to_ne), memory.base());
        // SAFETY: the scratch has room for all slots, and nothing reads it now.
        unsafe {
            ptr::copy_nonoverlapping(routed.slots.as_ptr(), ids.data.cast(), routed.slots.len())
        };
        Ok(ids)
    }

    /// `ops` (matmuls of one layer with the same input) for the rows of `placed` only, in as many
    /// calls as the scratch allows.
    pub(super) fn compute(
        &mut self,
        inner: ggml_backend_t,
        residency: &Residency,
        layer: usize,
        ops: &[Op],
        placed: &[Placed],
        routed: &Routed,
    ) -> Result<ggml_status> {
        let mut rest = placed;
        while !rest.is_empty() {
            let mut pairs = 0;
            let (mut low, mut high) = (u32::MAX, 0);
            let fits = |p: &&Placed| {
                let first = pairs == 0;
                pairs += routed.rows_of(p.expert).len();
                (low, high) = (low.min(p.slot), high.max(p.slot));
                first || (pairs <= PAIRS_PER_CALL && self.window_fits((low, high), pairs))
            };
            let n = rest.iter().take_while(fits).count();
            let (now, later) = rest.split_at(n);
            let status = self.call(inner, residency, layer, ops, now, routed)?;
            if status != GGML_STATUS_SUCCESS {
                return Ok(status);
            }
            rest = later;
        }
        Ok(GGML_STATUS_SUCCESS)
    }

    fn call(
        &mut self,
        inner: ggml_backend_t,
        residency: &Residency,
        layer: usize,
        ops: &[Op],
        placed: &[Placed],
        routed: &Routed,
    ) -> Result<ggml_status> {
        let unsupported = |reason: &str| Error::Graph {
            layer: residency.layer(layer).block,
            reason: reason.to_owned(),
        };
        // SAFETY: live, allocated nodes of the graph and their common source.
        let input = unsafe { &*(*ops[0].node).src[1] };
        let rows = Rows::of(input)
            .ok_or_else(|| unsupported("an expert matmul's input is not in rows"))?;
        let mut outputs = 0;
        for op in ops {
            // SAFETY: as above.
            let node = unsafe { &*op.node };
            // SAFETY: as above.
            if !unsafe { ggml_is_contiguous(node) } || node.type_ != GGML_TYPE_F32 {
                return Err(unsupported("an expert matmul's output is not contiguous F32"));
            }
            outputs += usize_of(node.ne[0]);
        }
        let (low, high) = slot_range(placed);
        self.list(placed, low, routed, &rows);
        let (n, k) = (self.slots.len(), usize_of(input.ne[0]));
        // A single token's row is shared by its experts and need not be gathered.
        let gathered = if rows.count == 1 { 0 } else { n * k };
        let width = if gathered == 0 { 0 } else { k };
        let base = self.memory(scratch_bytes(n, width, outputs))?.base();
        let windows: Vec<_> =
            ops.iter().map(|op| residency.window(layer, op.part, low, high)).collect();
        // SAFETY: `gathered`, outputs and slots lie one behind the other in the scratch, which has
        // room for all; `list` has bounded the rows by the shapes of input and nodes, and all of
        // them are host memory (`Memory` refuses other buffer types).
        unsafe {
            let gathered_at = base.cast::<f32>();
            let mut out_at = gathered_at.add(gathered);
            let slots_at = out_at.add(n * outputs).cast::<i32>();
            ptr::copy_nonoverlapping(self.slots.as_ptr(), slots_at, n);
            if gathered > 0 {
                for (i, &row) in self.from.iter().enumerate() {
                    let source = input.data.cast::<u8>().add(row * rows.stride).cast();
                    ptr::copy_nonoverlapping(source, gathered_at.add(i * k), k);
                }
            }
            let data = if gathered > 0 { gathered_at.cast() } else { input.data };
            let outs = self.multiply(inner, &windows, ops, input.ne[0], data, slots_at, out_at)?;
            if outs != GGML_STATUS_SUCCESS {
                return Ok(outs);
            }
            for op in ops {
                let m = usize_of((*op.node).ne[0]);
                for (i, &row) in self.to.iter().enumerate() {
                    let target = (*op.node).data.cast::<f32>().add(row * m);
                    ptr::copy_nonoverlapping(out_at.add(i * m), target, m);
                }
                out_at = out_at.add(n * m);
            }
        }
        Ok(GGML_STATUS_SUCCESS)
    }

    /// Lists the rows of `placed`: input row, slot and output row of each pair.
    fn list(&mut self, placed: &[Placed], low: u32, routed: &Routed, rows: &Rows) {
        self.from.clear();
        self.slots.clear();
        self.to.clear();
        for p in placed {
            let slot = i32::try_from(p.slot - low).expect("slots fit ggml's ids");
            for &pair in routed.rows_of(p.expert) {
                let pair = pair as usize;
                let (token, rank) = (pair / routed.n_used, pair % routed.n_used);
                self.from.push(token * rows.per_token + rank % rows.per_token);
                self.slots.push(slot);
                self.to.push(pair);
            }
        }
    }

    /// One `MUL_MAT_ID` per window over the same rows; outputs one behind the other at `out_at`.
    ///
    /// # Safety
    /// `data` holds a row of `k` floats per slot, or one for all if there is one token's; `slots`
    /// and `out_at` have room as in [`Scratch::call`].
    #[allow(clippy::too_many_arguments, reason = "the operands of one matmul")]
    unsafe fn multiply(
        &mut self,
        inner: ggml_backend_t,
        windows: &[ggml_tensor],
        ops: &[Op],
        k: i64,
        data: *mut std::ffi::c_void,
        slots: *mut i32,
        mut out_at: *mut f32,
    ) -> Result<ggml_status> {
        let memory = self.memory.as_ref().expect("the caller has made it");
        let (context, buffer) = (self.context, memory.buffer());
        let n = to_ne(self.slots.len());
        let shared = !ptr::eq(data.cast(), memory.base());
        // SAFETY: fresh headers in our own context over memory that the caller vouches for; the
        // headers are detached from the graph that they stand for.
        unsafe {
            ggml_reset(context);
            let rows = ggml_new_tensor_3d(context, GGML_TYPE_F32, k, 1, if shared { 1 } else { n });
            (*rows).data = data;
            (*rows).buffer = buffer.cast();
            let shape = if shared { [n, 1] } else { [1, n] };
            let ids = ggml_new_tensor_2d(context, GGML_TYPE_I32, shape[0], shape[1]);
            (*ids).data = slots.cast();
            (*ids).buffer = buffer.cast();
            let graph: *mut ggml_cgraph = ggml_new_graph_custom(context, GRAPH_NODES, false).cast();
            for (window, op) in windows.iter().zip(ops) {
                let weights = ggml_dup_tensor(context, window);
                *weights = *window;
                let out = ggml_mul_mat_id(context, weights, rows, ids);
                (*out).op_params = (*op.node).op_params;
                (*out).data = out_at.cast();
                (*out).buffer = buffer.cast();
                out_at = out_at.add(usize_of((*out).ne[0] * n));
                ggml_build_forward_expand(graph.cast(), out);
            }
            let status = compute_on(inner, &mut *graph);
            synchronize(inner);
            Ok(status)
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // SAFETY: ours, freed once.
        unsafe { ggml_free(self.context) };
    }
}

/// Rows of an expert matmul's input `[k, rows per token, tokens]`.
struct Rows {
    per_token: usize,
    count: usize,
    /// Bytes between rows.
    stride: usize,
}

impl Rows {
    /// None if no single stride leads through all rows.
    fn of(input: &ggml_tensor) -> Option<Rows> {
        let (per_token, tokens) = (usize_of(input.ne[1]), usize_of(input.ne[2]));
        let even = input.type_ == GGML_TYPE_F32 && input.nb[0] == 4 && input.ne[3] == 1;
        let stride = if per_token == 1 { input.nb[2] } else { input.nb[1] };
        (even && (per_token == 1 || tokens == 1 || input.nb[2] == per_token * stride))
            .then_some(Rows { per_token, count: per_token * tokens, stride })
    }
}

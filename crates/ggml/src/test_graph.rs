//! A graph with expert matmuls, for tests of what reads graphs.

use std::collections::HashMap;
use std::ffi::CString;
use std::ptr;

use crate::abi::*;
use crate::weights::{PartRef, WeightTable};

/// Three MoE layers of two parts and four experts, a graph to be filled, and tensors to fill it
/// with. Two experts are used for each of three tokens.
pub(crate) struct TestGraph {
    pub(crate) context: *mut ggml_context,
    pub(crate) table: WeightTable,
    /// By layer and part.
    pub(crate) weights: [[*mut ggml_tensor; 2]; 3],
    graph: *mut ggml_cgraph,
}

impl TestGraph {
    pub(crate) fn new() -> Self {
        let params =
            ggml_init_params { mem_size: 1 << 20, mem_buffer: ptr::null_mut(), no_alloc: true };
        // SAFETY: room for all that the tests make.
        let context = unsafe { ggml_init(params) };
        let name = |layer: usize, part: usize| format!("{layer}.{part}");
        let all = (0..6).map(|i| (name(i / 2, i % 2), PartRef { layer: i / 2, part: i % 2 }));
        let mut table = WeightTable::new(all.collect::<HashMap<_, _>>());
        let weights = [0, 1, 2].map(|layer| {
            [0, 1].map(|part| {
                let name = CString::new(name(layer, part)).unwrap();
                // SAFETY: a live context.
                unsafe {
                    let t = ggml_new_tensor_3d(context, GGML_TYPE_F32, 8, 8, 4);
                    ggml_set_name(t, name.as_ptr());
                    table.place(t).unwrap();
                    t
                }
            })
        });
        // SAFETY: a live context.
        let graph = unsafe { ggml_new_graph(context) }.cast();
        Self { context, table, weights, graph }
    }

    pub(crate) fn graph(&self) -> &ggml_cgraph {
        // SAFETY: it lives as long as the context; nothing adds to it meanwhile.
        unsafe { &*self.graph }
    }

    pub(crate) fn ids(&self) -> *mut ggml_tensor {
        // SAFETY: a live context.
        unsafe { ggml_new_tensor_2d(self.context, GGML_TYPE_I32, 2, 3) }
    }

    /// As many numbers for each of the experts.
    pub(crate) fn numbers(&self, n: i64) -> *mut ggml_tensor {
        // SAFETY: a live context.
        unsafe { ggml_new_tensor_2d(self.context, GGML_TYPE_I32, n, 4) }
    }

    pub(crate) fn add(&self, t: *mut ggml_tensor) {
        // SAFETY: a live graph.
        unsafe { ggml_build_forward_expand(self.graph.cast(), t) };
    }

    /// An expert matmul.
    pub(crate) fn matmul(&self, layer: usize, part: usize, ids: *mut ggml_tensor) {
        // SAFETY: shapes that fit.
        let out = unsafe {
            let input = ggml_new_tensor_3d(self.context, GGML_TYPE_F32, 8, 1, 3);
            ggml_mul_mat_id(self.context, self.weights[layer][part], input, ids)
        };
        self.add(out);
    }

    /// Some operation that reads no expert.
    pub(crate) fn other(&self) {
        // SAFETY: shapes that fit.
        let out = unsafe {
            let input = ggml_new_tensor_1d(self.context, GGML_TYPE_F32, 8);
            ggml_sqr(self.context, input)
        };
        self.add(out);
    }
}

impl Drop for TestGraph {
    fn drop(&mut self) {
        // SAFETY: ours, freed once.
        unsafe { ggml_free(self.context) };
    }
}

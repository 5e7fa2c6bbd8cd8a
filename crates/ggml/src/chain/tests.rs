use std::cell::OnceCell;

use super::*;
use crate::plan::{ExpertOp, Stage};
use crate::segment::{compute_on, synchronize};

const EMBD: i64 = 32;
const FF: i64 = 48;
pub(crate) const EXPERTS: i64 = 6;
pub(crate) const SELECTED: [i32; 3] = [4, 1, 3];

/// A layer for one token, in host memory: weights, an input, and what is computed from them.
pub(crate) struct Layer {
    weights: *mut ggml_context,
    pub(crate) context: *mut ggml_context,
    /// Up, gate, down, and gate and up in one.
    pub(crate) experts: [*mut ggml_tensor; 4],
    bias: *mut ggml_tensor,
    scale: *mut ggml_tensor,
    input: *mut ggml_tensor,
    /// Of the router: one for each selected expert.
    shares: *mut ggml_tensor,
    pub(crate) ids: *mut ggml_tensor,
    graph: *mut ggml_cgraph,
    buffers: Vec<ggml_backend_buffer_t>,
    backend: ggml_backend_t,
}

fn context() -> *mut ggml_context {
    let params =
        ggml_init_params { mem_size: 1 << 20, mem_buffer: ptr::null_mut(), no_alloc: true };
    // SAFETY: room for all that the tests make.
    unsafe { ggml_init(params) }
}

impl Layer {
    pub(crate) fn new() -> Self {
        let (weights, context) = (context(), context());
        // SAFETY: shapes that fit, in a live context with room for them.
        unsafe {
            let three = |ne0, ne1| ggml_new_tensor_3d(weights, GGML_TYPE_F32, ne0, ne1, EXPERTS);
            Self {
                weights,
                context,
                experts: [three(EMBD, FF), three(EMBD, FF), three(FF, EMBD), three(EMBD, 2 * FF)],
                bias: ggml_new_tensor_2d(weights, GGML_TYPE_F32, FF, EXPERTS),
                scale: ggml_new_tensor_1d(weights, GGML_TYPE_F32, EXPERTS),
                input: ggml_new_tensor_3d(context, GGML_TYPE_F32, EMBD, 1, 1),
                shares: ggml_new_tensor_3d(context, GGML_TYPE_F32, 1, 3, 1),
                ids: ggml_new_tensor_2d(context, GGML_TYPE_I32, 3, 1),
                graph: ggml_new_graph(context).cast(),
                buffers: Vec::new(),
                backend: ggml_backend_cpu_init().cast(),
            }
        }
    }

    pub(crate) fn add(&self, t: *mut ggml_tensor) {
        // SAFETY: a live graph with room for more.
        unsafe { ggml_build_forward_expand(self.graph.cast(), t) };
    }

    pub(crate) fn matmul(&self, part: usize, input: *mut ggml_tensor) -> *mut ggml_tensor {
        // SAFETY: shapes that fit, in a live context with room for them.
        unsafe { ggml_mul_mat_id(self.context, self.experts[part], input, self.ids) }
    }

    /// What is made of a layer's experts after the last matmul.
    pub(crate) fn end(&self, hidden: *mut ggml_tensor) {
        let down = self.matmul(2, hidden);
        // SAFETY: shapes that fit, in a live context with room for them.
        self.add(unsafe { ggml_mul(self.context, down, self.shares) });
    }

    pub(crate) fn graph(&self) -> &ggml_cgraph {
        // SAFETY: it lives as long as the context; nothing adds to it meanwhile.
        unsafe { &*self.graph }
    }

    pub(crate) fn chain(&self) -> Result<Chain, String> {
        let all = nodes(self.graph());
        let part = |node: usize| {
            // SAFETY: a node of the live graph.
            let weights = unsafe { (*all[node]).src[0] };
            self.experts.iter().position(|&experts| experts == weights)
        };
        let ops: Vec<ExpertOp> = (0..all.len())
            // SAFETY: a node of the live graph.
            .filter(|&node| unsafe { (*all[node]).op } == GGML_OP_MUL_MAT_ID)
            .map(|node| ExpertOp { node, part: part(node).unwrap() })
            .collect();
        let (start, end) = (ops[0].node, all.len());
        let (ids, router, chain) = (self.ids, Err("nobody has asked"), OnceCell::new());
        let routing = Routing { layer: 0, ids, router, stages: vec![Stage { ops }], chain };
        Chain::of(self.graph(), &Segment { start, end, routing: None }, &routing)
    }

    /// Gives everything memory with numbers in it, and computes the graph.
    pub(crate) fn compute(&mut self) {
        for context in [self.weights, self.context] {
            // SAFETY: a live context, whose tensors have no memory yet.
            let buffer = unsafe {
                ggml_backend_alloc_ctx_tensors_from_buft(context, ggml_backend_cpu_buffer_type())
            };
            self.buffers.push(buffer.cast());
        }
        // SAFETY: a live buffer.
        unsafe {
            ggml_backend_buffer_set_usage(self.buffers[0].cast(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS)
        };
        let mut state = 1u32;
        let leaves = [self.bias, self.scale, self.input, self.shares];
        for leaf in self.experts.into_iter().chain(leaves) {
            // SAFETY: a live tensor.
            let floats: Vec<f32> = (0..unsafe { ggml_nelements(leaf) })
                .map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (state >> 8) as f32 / (1 << 23) as f32 - 1.0
                })
                .collect();
            let bytes = size_of_val(floats.as_slice());
            // SAFETY: a tensor in memory, of these bytes.
            unsafe { ggml_backend_tensor_set(leaf, floats.as_ptr().cast(), 0, bytes) };
        }
        let bytes = size_of_val(&SELECTED);
        // SAFETY: a tensor in memory, of these bytes.
        unsafe { ggml_backend_tensor_set(self.ids, SELECTED.as_ptr().cast(), 0, bytes) };
        // SAFETY: a live graph, whose tensors are in memory.
        let status = compute_on(self.backend, unsafe { &mut *self.graph });
        synchronize(self.backend);
        assert_eq!(status, GGML_STATUS_SUCCESS);
    }
}

impl Drop for Layer {
    fn drop(&mut self) {
        // SAFETY: all ours, freed once.
        unsafe {
            self.buffers.drain(..).for_each(|buffer| ggml_backend_buffer_free(buffer.cast()));
            ggml_free(self.weights);
            ggml_free(self.context);
            ggml_backend_free(self.backend.cast());
        }
    }
}

/// Adds to a layer what is computed with its experts.
type Build = fn(&Layer);

/// The ways in which llama.cpp computes experts.
pub(crate) const WAYS: [(&str, Build); 7] = [
    ("gated", |l| {
        let (up, gate) = (l.matmul(0, l.input), l.matmul(1, l.input));
        // SAFETY: shapes that fit, in a live context with room for them.
        l.end(unsafe { ggml_swiglu_split(l.context, gate, up) });
    }),
    ("not gated", |l| {
        // SAFETY: shapes that fit, in a live context with room for them.
        let up = unsafe { ggml_relu(l.context, l.matmul(0, l.input)) };
        // SAFETY: shapes that fit, in a live context with room for them.
        l.end(unsafe { ggml_sqr(l.context, up) });
    }),
    // SAFETY: shapes that fit, in a live context with room for them.
    ("scaled", |l| unsafe {
        let scaled = |t| {
            let s = ggml_reshape_3d(l.context, l.scale, 1, EXPERTS, 1);
            let s = ggml_repeat_4d(l.context, s, 1, EXPERTS, 1, 1);
            ggml_mul(l.context, t, ggml_get_rows(l.context, s, l.ids))
        };
        let (up, gate) = (scaled(l.matmul(0, l.input)), scaled(l.matmul(1, l.input)));
        l.end(ggml_swiglu_split(l.context, gate, up));
    }),
    // SAFETY: shapes that fit, in a live context with room for them.
    ("biased", |l| unsafe {
        let biased = |part| ggml_add_id(l.context, l.matmul(part, l.input), l.bias, l.ids);
        l.end(ggml_swiglu_oai(l.context, biased(1), biased(0), 1.702, 7.0));
    }),
    // SAFETY: shapes that fit, in a live context with room for them.
    ("clamped", |l| unsafe {
        let up = ggml_clamp(l.context, l.matmul(0, l.input), -0.5, 0.5);
        let gate = ggml_silu(l.context, l.matmul(1, l.input));
        let gate = ggml_clamp(l.context, gate, f32::NEG_INFINITY, 0.5);
        l.end(ggml_mul(l.context, gate, up));
    }),
    // SAFETY: shapes that fit, in a live context with room for them.
    ("in one", |l| unsafe {
        let both = l.matmul(3, l.input);
        let [_, row, all, _] = (*both).nb;
        let half = |at: i64| {
            let offset = usize::try_from(at).unwrap() * 4;
            ggml_view_3d(l.context, both, FF, 3, 1, row, all, offset)
        };
        l.end(ggml_swiglu_split(l.context, half(0), half(FF)));
    }),
    // SAFETY: shapes that fit, in a live context with room for them.
    ("weighted before", |l| unsafe {
        let rows = ggml_repeat_4d(l.context, l.input, EMBD, 3, 1, 1);
        let input = ggml_mul(l.context, rows, l.shares);
        let (up, gate) = (l.matmul(0, input), l.matmul(1, input));
        l.end(ggml_swiglu_split(l.context, gate, up));
    }),
];

#[test]
fn chains_are_found_however_experts_are_computed() {
    for (way, build) in WAYS {
        let mut layer = Layer::new();
        build(&layer);
        layer.compute();
        let chain = layer.chain().unwrap_or_else(|why| panic!("{way}: {why}"));
        let parts = chain.links.iter().filter(|link| link.part.is_some()).count();
        assert_eq!(parts, if ["in one", "not gated"].contains(&way) { 2 } else { 3 }, "{way}");
        assert_eq!(chain.inputs().len(), 1, "{way}");
        assert_eq!(chain.last(), nodes(layer.graph()).len() - 2, "{way}");
        let links = chain.links.iter().map(|link| link.node);
        assert!(links.is_sorted(), "{way}");
    }
}

#[test]
fn what_does_not_go_row_by_row_is_named() {
    let refused: [(&str, Build); 5] = [
        // SAFETY: shapes that fit, in a live context with room for them.
        ("CUMSUM", |l| l.end(unsafe { ggml_cumsum(l.context, l.matmul(0, l.input)) })),
        ("SUM_ROWS reads", |l| {
            let up = l.matmul(0, l.input);
            l.end(up);
            // SAFETY: shapes that fit, in a live context with room for them.
            l.add(unsafe { ggml_sum_rows(l.context, up) });
        }),
        ("TRANSPOSE", |l| {
            // SAFETY: shapes that fit, in a live context with room for them.
            let turned = unsafe { ggml_transpose(l.context, l.matmul(0, l.input)) };
            // SAFETY: shapes that fit, in a live context with room for them.
            let turned = unsafe { ggml_transpose(l.context, turned) };
            // SAFETY: shapes that fit, in a live context with room for them.
            l.end(unsafe { ggml_cont(l.context, turned) });
        }),
        ("does not depend", |l| {
            l.add(l.matmul(0, l.input));
            // SAFETY: shapes that fit, in a live context with room for them.
            let other = unsafe { ggml_new_tensor_3d(l.context, GGML_TYPE_F32, FF, 1, 1) };
            l.end(other);
        }),
        ("more than", |l| {
            let mut t = l.matmul(0, l.input);
            for _ in 0..LINKS_MAX {
                // SAFETY: shapes that fit, in a live context with room for them.
                t = unsafe { ggml_sqr(l.context, t) };
            }
            l.end(t);
        }),
    ];
    for (what, build) in refused {
        let layer = Layer::new();
        build(&layer);
        let why = layer.chain().unwrap_err();
        assert!(why.contains(what), "{what}: {why}");
    }
}

#[test]
fn several_tokens_have_no_chain() {
    let mut layer = Layer::new();
    // SAFETY: shapes that fit, in a live context with room for them.
    unsafe {
        layer.ids = ggml_new_tensor_2d(layer.context, GGML_TYPE_I32, 3, 2);
        let input = ggml_new_tensor_3d(layer.context, GGML_TYPE_F32, EMBD, 1, 2);
        let down = layer.matmul(2, layer.matmul(0, input));
        layer.add(down);
    }
    assert!(layer.chain().unwrap_err().contains("several tokens"));
}

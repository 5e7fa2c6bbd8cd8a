//! What computing takes beside llama.cpp's own buffers, told by the graphs that a context reserves
//! while it is made: the rows that we gather, and ggml-cpu's work buffer, which grows to what the
//! largest graph asks for.

use std::collections::HashMap;
use std::ptr;

use crate::abi::*;
use crate::error::{Error, Result};
use crate::memory::{to_ne, usize_of};
use crate::plan;

/// (token, expert) pairs in one gathered matmul, beyond which a new one is begun. Bounds the
/// scratch memory: the rows of one expert are never split, so a batch of n tokens needs room for
/// this many pairs or for n, whichever is more.
pub(crate) const PAIRS_PER_CALL: usize = 256;

/// Bytes of scratch that one call takes for `rows` pairs, with inputs of `width` floats and outputs
/// of `outputs` floats in all: rows, outputs, slots.
pub(crate) fn scratch_bytes(rows: usize, width: usize, outputs: usize) -> usize {
    rows * (width + outputs + 1) * 4
}

/// Room for computing, bytes but for `mappings`. The most of all graphs that were included.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Workspace {
    /// Gathered rows, their outputs and their slots.
    pub(crate) scratch_bytes: usize,
    /// ggml-cpu's work buffer.
    pub(crate) work_bytes: usize,
    /// Most (slots of a window) x (routed rows) of one expert matmul: ggml-cpu lists the rows of
    /// every matrix of its weights apart, with room for all rows each time. As many as llama.cpp's
    /// own matmul over all experts of a layer has, and no fewer than a single token needs over a
    /// window of the whole pool.
    pub(crate) mappings: usize,
}

impl Workspace {
    /// Takes in a graph that will be computed with `n_threads`. `is_expert` knows the weights that
    /// are pooled; `slots` is the most slots that a window can have.
    pub(crate) fn include(
        &mut self,
        graph: &ggml_cgraph,
        is_expert: &dyn Fn(*const ggml_tensor) -> bool,
        slots: usize,
        n_threads: i32,
    ) {
        self.work_bytes = self.work_bytes.max(work_bytes(graph, n_threads));
        let matmuls: Vec<Matmul<'_>> = plan::nodes(graph)
            .iter()
            // SAFETY: nodes of a live graph.
            .map(|&node| unsafe { &*node })
            .filter(|op| op.op == GGML_OP_MUL_MAT_ID && is_expert(op.src[0]))
            .map(|op| Matmul { op, slots, n_threads })
            .collect();
        for matmul in &matmuls {
            self.mappings = self.mappings.max(matmul.mappings());
        }
        let mut stages: Vec<Stage> = Vec::new();
        for matmul in &matmuls {
            let op = matmul.op;
            self.work_bytes = self.work_bytes.max(matmul.work_bytes(self.mappings));
            match stages.iter_mut().find(|s| s.input == op.src[1]) {
                Some(stage) => stage.outputs += usize_of(op.ne[0]),
                None => stages.push(Stage {
                    input: op.src[1],
                    rows: matmul.gathered(),
                    pairs: matmul.pairs(),
                    outputs: usize_of(op.ne[0]),
                }),
            }
        }
        let most = stages.iter().map(Stage::scratch_bytes).max().unwrap_or(0);
        self.scratch_bytes = self.scratch_bytes.max(most);
    }

    /// Bytes of all.
    pub(crate) fn bytes(&self) -> usize {
        self.scratch_bytes + self.work_bytes
    }
}

/// What a context's graphs need.
#[derive(Debug, Clone, Default)]
pub(crate) struct Needs {
    pub(crate) workspace: Workspace,
    /// Bytes of the tensors that hold what a model keeps of its tokens (KV cache), by address.
    state: HashMap<usize, usize>,
}

impl Needs {
    /// As [`Workspace::include`].
    pub(crate) fn include(
        &mut self,
        graph: &ggml_cgraph,
        is_expert: &dyn Fn(*const ggml_tensor) -> bool,
        slots: usize,
        n_threads: i32,
    ) {
        self.workspace.include(graph, is_expert, slots, n_threads);
        self.include_state(graph);
    }

    /// Bytes of what the model keeps of its tokens, as far as graphs read it.
    pub(crate) fn state_bytes(&self) -> usize {
        self.state.values().sum()
    }

    /// Finds the tensors that `graph` reads and that are neither weights nor computed by it nor
    /// set before it is.
    fn include_state(&mut self, graph: &ggml_cgraph) {
        for &node in plan::nodes(graph) {
            // SAFETY: a live node, its sources, and what those are views of.
            unsafe {
                for &src in (*node).src.iter().filter(|src| !src.is_null()) {
                    let root = if (*src).view_src.is_null() { src } else { (*src).view_src };
                    let buffer = (*root).buffer.cast::<ggml_backend_buffer>();
                    let state = !buffer.is_null()
                        && (*root).op == GGML_OP_NONE
                        && (*buffer).usage == GGML_BACKEND_BUFFER_USAGE_ANY;
                    if state {
                        self.state.insert(root.addr(), ggml_nbytes(root));
                    }
                }
            }
        }
    }
}

/// The matmuls of one input: they are gathered together.
struct Stage {
    input: *mut ggml_tensor,
    /// Most rows of a call.
    rows: usize,
    /// Rows of the whole batch, of which the slots at least are mapped.
    pairs: usize,
    /// Width of all outputs.
    outputs: usize,
}

impl Stage {
    fn scratch_bytes(&self) -> usize {
        // SAFETY: a source of a live node.
        let width = usize_of(unsafe { (*self.input).ne[0] });
        scratch_bytes(self.rows, width, self.outputs).max(self.pairs * size_of::<i32>())
    }
}

/// One expert matmul of a graph.
#[derive(Clone, Copy)]
struct Matmul<'a> {
    op: &'a ggml_tensor,
    slots: usize,
    n_threads: i32,
}

impl Matmul<'_> {
    fn source(&self, index: usize) -> ggml_tensor {
        // SAFETY: an expert matmul has three sources, which live as long as it.
        unsafe { *self.op.src[index] }
    }

    fn ids(&self) -> (usize, usize) {
        let ids = self.source(2);
        (usize_of(ids.ne[0]), usize_of(ids.ne[1]))
    }

    /// (token, expert) pairs of the batch.
    fn pairs(&self) -> usize {
        let (used, tokens) = self.ids();
        used * tokens
    }

    /// Most rows of a gathered call: those of one expert are never split.
    fn gathered(&self) -> usize {
        self.ids().1.max(PAIRS_PER_CALL).min(self.pairs())
    }

    fn mappings(&self) -> usize {
        let experts = usize_of(self.source(0).ne[2]);
        (experts * self.pairs()).max(self.slots * self.ids().0)
    }

    /// For this matmul as it is or gathered, over any window that `mappings` allows.
    fn work_bytes(&self, mappings: usize) -> usize {
        let (used, tokens) = self.ids();
        let (pairs, gathered) = (self.pairs().max(1), self.gathered().max(1));
        let input = self.source(1);
        let whole = self.planned([input.ne[1], input.ne[2]], [used, tokens], mappings / pairs);
        let rows = [1, to_ne(gathered)];
        let apart = self.planned(rows, [1, gathered], mappings / gathered);
        // Fewer rows may have wider windows: their lists are no longer, but there are more of them.
        whole.max(apart) + self.planned([1, 1], [1, 1], self.slots)
    }

    /// What ggml-cpu asks for with other rows and ids, over `matrices` slots.
    fn planned(&self, rows: [i64; 2], ids: [usize; 2], matrices: usize) -> usize {
        let (mut weights, mut input) = (self.source(0), self.source(1));
        let (mut routed, mut node) = (self.source(2), *self.op);
        weights.ne[2] = to_ne(matrices.max(1));
        input.ne[1..3].copy_from_slice(&rows);
        (routed.ne[0], routed.ne[1]) = (to_ne(ids[0]), to_ne(ids[1]));
        (node.ne[1], node.ne[2]) = (to_ne(ids[0]), to_ne(ids[1]));
        node.src[..3].copy_from_slice(&[&raw mut weights, &raw mut input, &raw mut routed]);
        let mut nodes = [&raw mut node];
        work_bytes(&one_node(&mut nodes), self.n_threads)
    }
}

fn one_node(nodes: &mut [*mut ggml_tensor; 1]) -> ggml_cgraph {
    // SAFETY: plain data, for which zero is a valid value everywhere: no tables, no leaves.
    let mut graph: ggml_cgraph = unsafe { std::mem::zeroed() };
    graph.n_nodes = 1;
    graph.nodes = nodes.as_mut_ptr();
    graph
}

/// Bytes of work buffer that ggml-cpu asks for to compute `graph`.
fn work_bytes(graph: &ggml_cgraph, n_threads: i32) -> usize {
    // SAFETY: looks at types and shapes of live nodes and their sources.
    unsafe { ggml_graph_plan(ptr::from_ref(graph).cast(), n_threads, ptr::null_mut()).work_size }
}

/// Makes the CPU backend `inner` take its work buffer, of at least `bytes`. By growing it step by
/// step, as graphs come, more memory could be held than the largest takes.
///
/// ggml has no call for that. A rotation asks for a row of work space per thread, and one of no
/// rows is planned but not computed, so that nothing is touched.
pub(crate) fn take_work_buffer(inner: ggml_backend_t, bytes: usize) -> Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    // SAFETY: plain data, for which zero is a valid value everywhere.
    let mut node: ggml_tensor = unsafe { std::mem::zeroed() };
    (node.type_, node.op) = (GGML_TYPE_F32, GGML_OP_ROPE);
    node.ne = [to_ne(bytes.div_ceil(size_of::<f32>())), 0, 1, 1];
    let mut nodes = [&raw mut node];
    let mut graph = one_node(&mut nodes);
    if work_bytes(&graph, 1) < bytes {
        return Err(Error::SelfCheck("ggml-cpu plans its work buffer in another way".into()));
    }
    // SAFETY: the host executor's inner backend is ggml-cpu's; llama.cpp sets the number of threads
    // before it computes. The graph's one node is without elements.
    let status = unsafe {
        ggml_backend_cpu_set_n_threads(inner.cast(), 1);
        ggml_backend_graph_compute(inner.cast(), ptr::from_mut(&mut graph).cast())
    };
    match status {
        GGML_STATUS_SUCCESS => Ok(()),
        _ => Err(Error::OutOfMemory { bytes, what: "ggml's work buffer" }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A matmul over 64 experts of `k` x 48 for `tokens` tokens, of which each uses 4.
    struct Bench {
        context: *mut ggml_context,
        weights: *mut ggml_tensor,
        graph: *mut ggml_cgraph,
    }

    impl Bench {
        fn new(k: i64, tokens: i64) -> Self {
            let params =
                ggml_init_params { mem_size: 1 << 20, mem_buffer: ptr::null_mut(), no_alloc: true };
            // SAFETY: room for all that follows; shapes that fit.
            unsafe {
                let context = ggml_init(params);
                let weights = ggml_new_tensor_3d(context, GGML_TYPE_Q8_0, k, 48, 64);
                let input = ggml_new_tensor_3d(context, GGML_TYPE_F32, k, 1, tokens);
                let ids = ggml_new_tensor_2d(context, GGML_TYPE_I32, 4, tokens);
                let out = ggml_mul_mat_id(context, weights, input, ids);
                let graph = ggml_new_graph(context);
                ggml_build_forward_expand(graph, out);
                Self { context, weights, graph: graph.cast() }
            }
        }

        fn workspace(&self, slots: usize) -> Workspace {
            let mut workspace = Workspace::default();
            // SAFETY: a live graph.
            let graph = unsafe { &*self.graph };
            workspace.include(graph, &|t| ptr::eq(t, self.weights), slots, 2);
            workspace
        }
    }

    impl Drop for Bench {
        fn drop(&mut self) {
            // SAFETY: ours, freed once.
            unsafe { ggml_free(self.context) };
        }
    }

    #[test]
    fn rows_of_the_largest_call_fit() {
        // 256 gathered rows of 128 + 48 floats and a slot, or 512 of them when one expert has all.
        let row = (128 + 48 + 1) * 4;
        assert_eq!(Bench::new(128, 256).workspace(64).scratch_bytes, 256 * row);
        assert_eq!(Bench::new(128, 512).workspace(64).scratch_bytes, 512 * row);
        assert_eq!(Bench::new(128, 2).workspace(64).scratch_bytes, 8 * row);
    }

    #[test]
    fn windows_are_bounded_by_what_a_token_needs_or_a_layer_has() {
        assert_eq!(Bench::new(128, 1).workspace(6000).mappings, 6000 * 4);
        assert_eq!(Bench::new(128, 512).workspace(6000).mappings, 64 * 4 * 512);
    }

    #[test]
    fn the_work_buffer_holds_the_rows_in_the_type_of_the_kernel() {
        let (narrow, wide) = (Bench::new(128, 512), Bench::new(4096, 512));
        let more = wide.workspace(64).work_bytes - narrow.workspace(64).work_bytes;
        // Q8_0 takes 34 bytes for 32 values.
        assert!(more >= 512 * (4096 - 128) * 34 / 32, "{more}");
        assert!(wide.workspace(6000).work_bytes > wide.workspace(64).work_bytes);
    }

    #[test]
    fn other_matmuls_are_left_alone() {
        let bench = Bench::new(128, 512);
        let mut workspace = Workspace::default();
        // SAFETY: a live graph.
        workspace.include(unsafe { &*bench.graph }, &|_| false, 64, 2);
        assert_eq!((workspace.scratch_bytes, workspace.mappings), (0, 0));
        assert!(workspace.work_bytes > 0);
    }

    #[test]
    fn the_work_buffer_is_taken_at_once() {
        // SAFETY: the CPU device is part of the build.
        let backend: ggml_backend_t =
            unsafe { ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, ptr::null()) }.cast();
        take_work_buffer(backend, 5 << 20).unwrap();
        take_work_buffer(backend, 0).unwrap();
        // SAFETY: ours, freed once.
        unsafe { ggml_backend_free(backend.cast()) };
    }
}

//! Routers: the operations of a graph that choose a layer's experts, found from the ids that they
//! make, and copies of them that choose for another input.
//!
//! A copy computes what llama.cpp built for that layer, with its gating function, bias and groups,
//! whatever the architecture: only the input is another one.

use std::collections::HashMap;
use std::ptr;

use crate::abi::*;
use crate::memory::Memory;
use crate::segment::compute_on;

/// More operations than any router of llama.cpp has; DeepSeek's with its groups has 20.
pub(crate) const NODES_MAX: usize = 48;

/// Where tensors of a copy begin, bytes: what ggml-cuda asks for.
const ALIGNMENT: usize = 128;

/// The operations from a router's matmul to the ids.
#[derive(Debug)]
pub(crate) struct Router {
    /// In the order of computing, views included; the last is the ids. Their sources are among
    /// them, or weights, or the matmul's input. No more than [`NODES_MAX`].
    nodes: Vec<*mut ggml_tensor>,
    /// The router's weights times the layer's input, among the nodes.
    matmul: *mut ggml_tensor,
}

impl Router {
    /// The router that computes `ids`, which a graph reads; or why it cannot be told from the graph.
    pub(crate) fn of(ids: *mut ggml_tensor) -> Result<Router, &'static str> {
        let mut search = Search::default();
        search.visit(ids, 0).ok_or("it has too many operations")?;
        match search.matmuls.as_slice() {
            &[matmul] => Ok(Router { nodes: search.nodes, matmul }),
            [] => Err("it multiplies with no weights"),
            _ => Err("it multiplies with weights more than once"),
        }
    }

    /// What the router looks at: `[n_embd, n_tokens]`.
    pub(crate) fn input(&self) -> *mut ggml_tensor {
        // SAFETY: a live node of the graph.
        unsafe { (*self.matmul).src[1] }
    }

    /// Whether `input` could stand in for the router's own.
    pub(crate) fn takes(&self, input: *mut ggml_tensor) -> bool {
        // SAFETY: live tensors of the graph.
        let (own, other) = unsafe { (&*self.input(), &*input) };
        own.ne == other.ne && own.type_ == other.type_
    }

    /// Whether something of the width and type of `input` could, for some number of tokens.
    pub(crate) fn looks_at_the_like_of(&self, input: *mut ggml_tensor) -> bool {
        // SAFETY: live tensors of the graph.
        let (own, other) = unsafe { (&*self.input(), &*input) };
        own.ne[0] == other.ne[0] && own.type_ == other.type_
    }

    /// What a copy needs room for, bytes.
    pub(crate) fn copy_bytes(&self) -> usize {
        let own = self.nodes.iter().map(node).filter(|t| t.view_src.is_null());
        own.map(bytes).sum::<usize>() + ALIGNMENT
    }
}

fn node<'a>(&tensor: &*mut ggml_tensor) -> &'a ggml_tensor {
    // SAFETY: a live node of the graph, which outlives what is made of it.
    unsafe { &*tensor }
}

fn bytes(t: &ggml_tensor) -> usize {
    // SAFETY: a live tensor.
    unsafe { ggml_nbytes(t) }.next_multiple_of(ALIGNMENT)
}

#[derive(Default)]
struct Search {
    nodes: Vec<*mut ggml_tensor>,
    matmuls: Vec<*mut ggml_tensor>,
}

impl Search {
    /// Sources first. None when it leads too far: `depth` operations lie between this and the ids.
    fn visit(&mut self, tensor: *mut ggml_tensor, depth: usize) -> Option<()> {
        // SAFETY: a source of a live node is a live tensor.
        let t = unsafe { &*tensor };
        if is_leaf(t) || self.nodes.contains(&tensor) {
            return Some(());
        }
        if depth == NODES_MAX {
            return None;
        }
        // SAFETY: as above; a matmul has two sources.
        if t.op == GGML_OP_MUL_MAT && is_leaf(unsafe { &*t.src[0] }) {
            self.matmuls.push(tensor);
        } else {
            for &source in t.src.iter().chain([&t.view_src]).filter(|s| !s.is_null()) {
                self.visit(source, depth + 1)?;
            }
        }
        if self.nodes.len() == NODES_MAX {
            return None;
        }
        self.nodes.push(tensor);
        Some(())
    }
}

/// Neither computed nor a view of something computed.
fn is_leaf(t: &ggml_tensor) -> bool {
    t.op == GGML_OP_NONE && t.view_src.is_null()
}

/// A router's operations over memory of their own. Good as long as the graph is, whose weights they
/// read, and the memory.
pub(crate) struct RouterCopy {
    // Boxed: they point to each other.
    #[allow(clippy::vec_box, reason = "graphs hold their addresses")]
    tensors: Vec<Box<ggml_tensor>>,
}

impl RouterCopy {
    /// Copies `router` to look at `input`, into `memory`, which has room for
    /// [that](Router::copy_bytes).
    pub(crate) fn new(router: &Router, input: *mut ggml_tensor, memory: &Memory) -> Self {
        assert!(memory.bytes() >= router.copy_bytes(), "room for a copy");
        let base = memory.base();
        let mut at = base.wrapping_add(base.addr().next_multiple_of(ALIGNMENT) - base.addr());
        let mut copies: HashMap<*mut ggml_tensor, *mut ggml_tensor> = HashMap::new();
        let mut tensors = Vec::with_capacity(router.nodes.len());
        for original in &router.nodes {
            let mut copy = Box::new(*node(original));
            copy.buffer = memory.buffer().cast();
            for source in &mut copy.src {
                if let Some(&theirs) = copies.get(source) {
                    *source = theirs;
                }
            }
            if ptr::eq(*original, router.matmul) {
                copy.src[1] = input;
            }
            if copy.view_src.is_null() {
                copy.data = at.cast();
                at = at.wrapping_add(bytes(&copy));
            } else if let Some(&of) = copies.get(&copy.view_src) {
                copy.view_src = of;
                // SAFETY: a copy made above.
                copy.data = unsafe { (*of).data.wrapping_byte_add(copy.view_offs) };
            }
            copies.insert(*original, &raw mut *copy);
            tensors.push(copy);
        }
        Self { tensors }
    }

    /// What it makes.
    pub(crate) fn ids(&mut self) -> *mut ggml_tensor {
        &raw mut **self.tensors.last_mut().expect("a router has nodes")
    }
}

/// Headers of the graph of a copy.
const CONTEXT_BYTES: usize = 64 * 1024;

/// A graph for copies to be computed with, one after the other.
pub(crate) struct CopyGraph {
    context: *mut ggml_context,
}

impl CopyGraph {
    pub(crate) fn new() -> Self {
        let params = ggml_init_params {
            mem_size: CONTEXT_BYTES,
            mem_buffer: ptr::null_mut(),
            no_alloc: true,
        };
        // SAFETY: ggml_init returns null or a context.
        Self { context: unsafe { ggml_init(params) } }
    }

    /// Has `backend` compute `copy`, which outlives that. Its input is computed then.
    pub(crate) fn compute(
        &mut self,
        backend: ggml_backend_t,
        copy: &mut RouterCopy,
    ) -> ggml_status {
        if self.context.is_null() {
            return GGML_STATUS_ALLOC_FAILED;
        }
        // SAFETY: a fresh graph in our own context, with room for as many nodes as a router has. No
        // node is in its table, so that no backend takes one for another's only use.
        unsafe {
            ggml_reset(self.context);
            let graph: *mut ggml_cgraph =
                ggml_new_graph_custom(self.context, NODES_MAX, false).cast();
            for node in &mut copy.tensors {
                (*graph).nodes.add((*graph).n_nodes as usize).write(&raw mut **node);
                (*graph).n_nodes += 1;
            }
            compute_on(backend, &mut *graph)
        }
    }
}

impl Drop for CopyGraph {
    fn drop(&mut self) {
        // SAFETY: ours, freed once; null is freed by doing nothing.
        unsafe { ggml_free(self.context) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_graph::TestGraph;

    /// Ids behind a router's matmul and so many further operations.
    fn ids_behind(built: &TestGraph, operations: usize) -> *mut ggml_tensor {
        // SAFETY: shapes that fit, in a live context.
        unsafe {
            let weights = ggml_new_tensor_2d(built.context, GGML_TYPE_F32, 8, 4);
            let input = ggml_new_tensor_2d(built.context, GGML_TYPE_F32, 8, 3);
            let mut t = ggml_mul_mat(built.context, weights, input);
            for _ in 0..operations {
                t = ggml_sqr(built.context, t);
            }
            ggml_argsort(built.context, t, GGML_SORT_ORDER_DESC)
        }
    }

    #[test]
    fn a_router_has_a_bound() {
        let built = TestGraph::new();
        // The matmul and the sorting are operations too.
        let most = NODES_MAX - 2;
        let router = Router::of(ids_behind(&built, most)).expect("as many as there may be");
        assert_eq!(router.nodes.len(), NODES_MAX);
        for operations in [most + 1, 2 * NODES_MAX, 1000] {
            assert!(Router::of(ids_behind(&built, operations)).is_err(), "{operations}");
        }
    }

    #[test]
    fn ids_of_no_matmul_or_of_two_have_no_router() {
        let built = TestGraph::new();
        assert!(Router::of(built.ids()).unwrap_err().contains("no weights"));
        // SAFETY: shapes that fit, in a live context.
        let both = unsafe {
            let sum = ggml_add(
                built.context,
                (*ids_behind(&built, 0)).src[0],
                (*ids_behind(&built, 0)).src[0],
            );
            ggml_argsort(built.context, sum, GGML_SORT_ORDER_DESC)
        };
        assert!(Router::of(both).unwrap_err().contains("more than once"));
    }
}

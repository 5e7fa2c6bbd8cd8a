//! Routers: the operations of a graph that choose a layer's experts, found from the ids that they
//! make, and copies of them that choose for another input.
//!
//! A copy computes what llama.cpp built for that layer, with its gating function, bias and groups,
//! whatever the architecture: only the input is another one.

use std::collections::HashMap;
use std::ptr;

use crate::abi::*;
use crate::error::Result;
use crate::memory::Memory;

/// More operations than any router of llama.cpp has; DeepSeek's with its groups has 20.
pub(crate) const NODES_MAX: usize = 48;

/// Where tensors of a copy begin, bytes.
const ALIGNMENT: usize = 64;

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
    /// The router that computes `ids`, which a graph reads. None if there is not exactly one
    /// matmul with weights in front of them.
    pub(crate) fn of(ids: *mut ggml_tensor) -> Option<Router> {
        let mut search = Search::default();
        search.visit(ids, 0)?;
        let &[matmul] = search.matmuls.as_slice() else { return None };
        Some(Router { nodes: search.nodes, matmul })
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

/// A router's operations over memory of their own.
#[derive(Default)]
pub(crate) struct RouterCopy {
    // Boxed: they point to each other.
    #[allow(clippy::vec_box, reason = "graphs hold their addresses")]
    tensors: Vec<Box<ggml_tensor>>,
}

impl RouterCopy {
    /// Copies `router` to look at `input`, into `memory`, which grows if need be. Returns the ids.
    ///
    /// The copies are good as long as the graph is, whose weights they read.
    pub(crate) fn make(
        &mut self,
        router: &Router,
        input: *mut ggml_tensor,
        memory: &mut Option<Memory>,
        buffer_type: ggml_backend_buffer_type_t,
    ) -> Result<*mut ggml_tensor> {
        // SAFETY: live nodes of the graph.
        let node = |&t: &*mut ggml_tensor| unsafe { &*t };
        // SAFETY: as above.
        let bytes = |t: &ggml_tensor| unsafe { ggml_nbytes(t) }.next_multiple_of(ALIGNMENT);
        let own = router.nodes.iter().map(node).filter(|t| t.view_src.is_null());
        let needed = own.map(bytes).sum::<usize>() + ALIGNMENT;
        if memory.as_ref().is_none_or(|m| m.bytes() < needed) {
            *memory = None;
            *memory = Some(Memory::scratch(buffer_type, needed)?);
        }
        let memory = memory.as_ref().expect("just made");
        let mut at = memory.base();
        at = at.wrapping_add(at.align_offset(ALIGNMENT));
        let mut copies: HashMap<*mut ggml_tensor, *mut ggml_tensor> = HashMap::new();
        self.tensors.clear();
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
            self.tensors.push(copy);
        }
        let ids = self.tensors.last_mut().expect("a router has nodes");
        Ok(&raw mut **ids)
    }

    /// What was copied last, in the order of computing.
    pub(crate) fn nodes(&mut self) -> impl Iterator<Item = *mut ggml_tensor> {
        self.tensors.iter_mut().map(|copy| &raw mut **copy)
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
            assert!(Router::of(ids_behind(&built, operations)).is_none(), "{operations}");
        }
    }

    #[test]
    fn ids_of_no_matmul_or_of_two_have_no_router() {
        let built = TestGraph::new();
        assert!(Router::of(built.ids()).is_none());
        // SAFETY: shapes that fit, in a live context.
        let both = unsafe {
            let sum = ggml_add(
                built.context,
                (*ids_behind(&built, 0)).src[0],
                (*ids_behind(&built, 0)).src[0],
            );
            ggml_argsort(built.context, sum, GGML_SORT_ORDER_DESC)
        };
        assert!(Router::of(both).is_none());
    }
}

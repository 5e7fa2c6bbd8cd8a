//! Where a compute graph is cut, and which operations read pooled tensors.
//!
//! A segment ends where the next layer's expert matmuls begin: by then its router, top-k and
//! routing weights are computed, because llama.cpp puts them into the graph before the matmuls
//! (llama-graph.cpp, `build_moe_ffn`), and topological order puts the ids before their users in
//! any case. Cutting there keeps the router's operations together for the backend's fusions.

use std::ffi::CStr;
use std::ptr;

use crate::abi::*;
use crate::error::{Error, Result};
use crate::weights::{PartRef, WeightTable};

/// One expert matmul of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ExpertOp {
    /// Index of the node in the graph.
    pub(crate) node: usize,
    /// Which part of the layer's records it reads.
    pub(crate) part: usize,
}

/// The expert matmuls that share one routing.
#[derive(Debug)]
pub(crate) struct Routing {
    /// Index among the MoE layers.
    pub(crate) layer: usize,
    /// The selected experts, I32 `[n_used, n_tokens]`, often a strided view.
    pub(crate) ids: *mut ggml_tensor,
    pub(crate) ops: Vec<ExpertOp>,
}

/// Nodes `start..end` of the graph; those with a routing begin with its first expert matmul.
#[derive(Debug)]
pub(crate) struct Segment {
    pub(crate) start: usize,
    pub(crate) end: usize,
    pub(crate) routing: Option<Routing>,
}

/// The segments of one graph.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) segments: Vec<Segment>,
}

impl Plan {
    /// Cuts `graph`. Fails on an operation that reads an expert tensor in another way than as the
    /// matrices of a `MUL_MAT_ID`: its memory is not there.
    pub(crate) fn new(graph: &ggml_cgraph, table: &WeightTable) -> Result<Plan> {
        let nodes = nodes(graph);
        let mut segments = vec![Segment { start: 0, end: nodes.len(), routing: None }];
        for (index, &node) in nodes.iter().enumerate() {
            // SAFETY: nodes of a graph that ggml is about to compute.
            let node = unsafe { &*node };
            let Some(PartRef { layer, part }) = expert_source(node, table)? else { continue };
            let ids = node.src[2];
            let op = ExpertOp { node: index, part };
            let current = segments.last_mut().expect("never empty");
            match &mut current.routing {
                Some(routing) if ptr::eq(routing.ids, ids) => {
                    if routing.layer != layer {
                        return Err(Error::SelfCheck(format!(
                            "MoE layers {} and {layer} share one routing",
                            routing.layer
                        )));
                    }
                    routing.ops.push(op);
                }
                _ => {
                    current.end = index;
                    let routing = Some(Routing { layer, ids, ops: vec![op] });
                    segments.push(Segment { start: index, end: nodes.len(), routing });
                }
            }
        }
        segments.retain(|s| s.start < s.end);
        for routing in segments.iter().filter_map(|s| s.routing.as_ref()) {
            check_whole(routing, table)?;
        }
        Ok(Plan { segments })
    }

    /// Whether any node reads a pooled tensor.
    pub(crate) fn has_experts(&self) -> bool {
        self.segments.iter().any(|s| s.routing.is_some())
    }
}

/// The nodes of a graph, in the order of computing.
pub(crate) fn nodes(graph: &ggml_cgraph) -> &[*mut ggml_tensor] {
    let n = usize::try_from(graph.n_nodes).unwrap_or(0);
    if n == 0 {
        return &[];
    }
    // SAFETY: ggml keeps `n_nodes` node pointers at `nodes`.
    unsafe { std::slice::from_raw_parts(graph.nodes, n) }
}

/// Nodes `start..end` of `graph` as a graph of their own, as `ggml_graph_view` makes it (ggml.c;
/// not exported). It borrows all tables of `graph`.
pub(crate) fn view(graph: &ggml_cgraph, start: usize, end: usize) -> ggml_cgraph {
    let count = |n: usize| i32::try_from(n).expect("ggml counts nodes in int");
    ggml_cgraph {
        size: 0,
        n_nodes: count(end - start),
        n_leafs: 0,
        nodes: graph.nodes.wrapping_add(start),
        grads: ptr::null_mut(),
        grad_accs: ptr::null_mut(),
        leafs: ptr::null_mut(),
        use_counts: graph.use_counts,
        visited_hash_set: graph.visited_hash_set,
        order: graph.order,
        uid: 0,
    }
}

/// A record is loaded by the matmuls that read it: all of its parts, each once.
fn check_whole(routing: &Routing, table: &WeightTable) -> Result<()> {
    let mut parts: Vec<usize> = routing.ops.iter().map(|op| op.part).collect();
    parts.sort_unstable();
    if parts.iter().copied().eq(0..table.parts_of(routing.layer)) {
        return Ok(());
    }
    Err(Error::SelfCheck(format!(
        "one routing of MoE layer {} uses parts {parts:?} of its records, which have {}",
        routing.layer,
        table.parts_of(routing.layer)
    )))
}

/// The pooled tensor that `node` multiplies with, if it does.
fn expert_source(node: &ggml_tensor, table: &WeightTable) -> Result<Option<PartRef>> {
    if node.op == GGML_OP_NONE {
        return Ok(None);
    }
    for (index, &src) in node.src.iter().enumerate() {
        if src.is_null() {
            continue;
        }
        let Some(part) = table.part(src) else { continue };
        if index == 0 && node.op == GGML_OP_MUL_MAT_ID {
            return Ok(Some(part));
        }
        // SAFETY: ggml returns a static string for every operation.
        let op = unsafe { CStr::from_ptr(ggml_op_name(node.op)) };
        return Err(Error::SelfCheck(format!(
            "operation {} reads the expert weights of MoE layer {} directly",
            op.to_string_lossy(),
            part.layer
        )));
    }
    Ok(None)
}

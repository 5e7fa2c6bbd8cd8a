//! Where a compute graph is cut, and which operations read pooled tensors.
//!
//! A segment ends where the next layer's expert matmuls begin: by then its router, top-k and
//! routing weights are computed, because llama.cpp puts them into the graph before the matmuls
//! (llama-graph.cpp, `build_moe_ffn`), and topological order puts the ids before their users in
//! any case. Cutting there keeps the router's operations together for the backend's fusions.

use std::cell::OnceCell;
use std::ffi::CStr;
use std::ptr;

use crate::abi::*;
use crate::chain::Chain;
use crate::error::{Error, Result};
use crate::recorder::weights_of;
use crate::router::Router;
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
    /// What computes the ids; or why that is not known.
    pub(crate) router: Result<Router, &'static str>,
    pub(crate) stages: Vec<Stage>,
    /// What is computed row by row, if that was asked for; or why it cannot be told.
    pub(crate) chain: OnceCell<Result<Chain, String>>,
}

impl Routing {
    /// Every expert matmul, in the order of computing.
    pub(crate) fn ops(&self) -> impl Iterator<Item = &ExpertOp> {
        self.stages.iter().flat_map(|s| &s.ops)
    }
}

/// Expert matmuls of the same input with nothing computed between them (gate and up), so that
/// they can be computed as one: the outputs of all are allocated while each of them is.
#[derive(Debug)]
pub(crate) struct Stage {
    pub(crate) ops: Vec<ExpertOp>,
}

impl Stage {
    /// The first node.
    pub(crate) fn first(&self) -> usize {
        self.ops[0].node
    }

    /// The last node.
    pub(crate) fn last(&self) -> usize {
        self.ops[self.ops.len() - 1].node
    }

    /// Whether node `next` of `nodes` belongs to this stage.
    fn takes(&self, nodes: &[*mut ggml_tensor], next: usize) -> bool {
        // SAFETY: nodes of a graph that ggml is about to compute.
        let node = |index: usize| unsafe { &*nodes[index] };
        let is_view = |op| {
            [GGML_OP_NONE, GGML_OP_RESHAPE, GGML_OP_VIEW, GGML_OP_PERMUTE, GGML_OP_TRANSPOSE]
                .contains(&op)
        };
        ptr::eq(node(self.last()).src[1], node(next).src[1])
            && (self.last() + 1..next).all(|between| is_view(node(between).op))
    }
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
    /// Cuts `graph`, and finds its `routers` if they are wanted. Fails on an operation that reads
    /// an expert tensor in another way than as the matrices of a `MUL_MAT_ID`: its memory is not
    /// there.
    pub(crate) fn new(graph: &ggml_cgraph, table: &WeightTable, routers: bool) -> Result<Plan> {
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
                    match routing.stages.last_mut() {
                        Some(stage) if stage.takes(nodes, index) => stage.ops.push(op),
                        _ => routing.stages.push(Stage { ops: vec![op] }),
                    }
                }
                _ => {
                    current.end = index;
                    let stages = vec![Stage { ops: vec![op] }];
                    let router = if routers { Router::of(ids) } else { Err("nobody has asked") };
                    let chain = OnceCell::new();
                    let routing = Some(Routing { layer, ids, router, stages, chain });
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

    /// MoE layers that nothing can be guessed for by their router from the layer before, and why.
    pub(crate) fn unguessed(&self) -> Vec<(usize, &'static str)> {
        let routings = || self.segments.iter().filter_map(|s| s.routing.as_ref());
        let pairs = routings().zip(routings().skip(1));
        let unguessed = |(before, routing): (&Routing, &Routing)| {
            let why = match (&before.router, &routing.router) {
                (_, Err(why)) => why,
                (Err(_), _) => "it is not known what the router before it looks at",
                (Ok(before), Ok(router)) if !router.looks_at_the_like_of(before.input()) => {
                    "the router before it looks at something else"
                }
                _ => return None,
            };
            Some((routing.layer, why))
        };
        pairs.filter_map(unguessed).collect()
    }

    /// Tokens whose experts the graph computes, as its first layer has them.
    pub(crate) fn tokens(&self) -> i64 {
        let first = self.segments.iter().find_map(|s| s.routing.as_ref());
        // SAFETY: a live tensor of the graph.
        first.map_or(0, |routing| unsafe { (*routing.ids).ne[1] })
    }

    /// The routing weights of segment `index`, where the graph shows them.
    pub(crate) fn weights_of(&self, graph: &ggml_cgraph, index: usize) -> Option<*mut ggml_tensor> {
        let segment = &self.segments[index];
        let before =
            index.checked_sub(1).map_or(segment.start, |before| self.segments[before].start);
        let ids = segment.routing.as_ref()?.ids;
        weights_of(&nodes(graph)[before..segment.end], segment.start - before, ids)
    }

    /// Whether any node reads a pooled tensor.
    pub(crate) fn has_experts(&self) -> bool {
        self.segments.iter().any(|s| s.routing.is_some())
    }
}

/// Graphs whose plans are kept. llama.cpp alternates between a few (prefill, decode).
pub(crate) const PLANS_KEPT: usize = 4;

/// Plans of the graphs that come again and again.
#[derive(Debug)]
pub(crate) struct Plans {
    /// By the graph's uid.
    kept: Vec<(u64, Plan)>,
    routers: bool,
}

impl Plans {
    /// Of plans that name their routers, or do not.
    pub(crate) fn new(routers: bool) -> Self {
        Self { kept: Vec::new(), routers }
    }

    /// The plan of `graph`, taken out or made. To be [`put`](Self::put) back.
    pub(crate) fn take(&mut self, graph: &ggml_cgraph, table: &WeightTable) -> Result<Plan> {
        let known = self.kept.iter().position(|(uid, _)| *uid == graph.uid && graph.uid != 0);
        if let Some(index) = known {
            return Ok(self.kept.remove(index).1);
        }
        if self.kept.len() >= PLANS_KEPT {
            self.kept.remove(0);
        }
        Plan::new(graph, table, self.routers)
    }

    /// Keeps the plan of `graph`, if the graph can be known again.
    pub(crate) fn put(&mut self, graph: &ggml_cgraph, plan: Plan) {
        if graph.uid != 0 {
            self.kept.push((graph.uid, plan));
        }
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
    let mut parts: Vec<usize> = routing.ops().map(|op| op.part).collect();
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_graph::TestGraph;

    fn plan(built: &TestGraph) -> Result<Plan> {
        Plan::new(built.graph(), &built.table, false)
    }

    fn refusal(built: &TestGraph) -> String {
        match plan(built) {
            Err(Error::SelfCheck(reason)) => reason,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn segments_begin_with_the_first_matmul_of_a_routing() {
        let built = TestGraph::new();
        let (a, b) = (built.ids(), built.ids());
        built.other();
        built.matmul(0, 0, a);
        built.other();
        built.matmul(0, 1, a);
        built.other();
        built.matmul(1, 1, b);
        built.matmul(1, 0, b);
        built.other();
        let plan = plan(&built).unwrap();
        let cuts: Vec<_> = plan.segments.iter().map(|s| (s.start, s.end)).collect();
        assert_eq!(cuts, [(0, 1), (1, 5), (5, 8)]);
        assert!(plan.has_experts() && plan.segments[0].routing.is_none());
        let first = plan.segments[1].routing.as_ref().unwrap();
        assert_eq!((first.layer, first.ids), (0, a));
        let ops = |r: &Routing| r.ops().copied().collect::<Vec<_>>();
        assert_eq!(ops(first), [ExpertOp { node: 1, part: 0 }, ExpertOp { node: 3, part: 1 }]);
        assert_eq!(first.stages.len(), 2, "something is computed between the two");
        let second = plan.segments[2].routing.as_ref().unwrap();
        assert_eq!(ops(second), [ExpertOp { node: 5, part: 1 }, ExpertOp { node: 6, part: 0 }]);
    }

    #[test]
    fn layers_whose_router_cannot_be_told_are_named() {
        let built = TestGraph::new();
        // SAFETY: shapes that fit, in a live context.
        let routed = |width: i64| unsafe {
            let weights = ggml_new_tensor_2d(built.context, GGML_TYPE_F32, width, 4);
            let input = ggml_new_tensor_2d(built.context, GGML_TYPE_F32, width, 3);
            let logits = ggml_mul_mat(built.context, weights, input);
            ggml_argsort_top_k(built.context, logits, 2)
        };
        let layer = |layer, ids| (0..2).for_each(|part| built.matmul(layer, part, ids));
        let unguessed =
            |routers| Plan::new(built.graph(), &built.table, routers).unwrap().unguessed();
        layer(0, routed(8));
        layer(1, routed(8));
        assert_eq!(unguessed(true), []);
        assert_eq!(unguessed(false).len(), 1, "nobody has asked");
        layer(2, routed(16));
        let [(2, why)] = unguessed(true)[..] else { panic!("{:?}", unguessed(true)) };
        assert!(why.contains("something else"));
        let built = TestGraph::new();
        for layer in 0..2 {
            let ids = built.ids();
            (0..2).for_each(|part| built.matmul(layer, part, ids));
        }
        let plan = Plan::new(built.graph(), &built.table, true).unwrap();
        let [(1, why)] = plan.unguessed()[..] else { panic!("{:?}", plan.unguessed()) };
        assert!(why.contains("no weights"));
    }

    #[test]
    fn a_graph_without_experts_is_one_segment() {
        let built = TestGraph::new();
        assert!(plan(&built).unwrap().segments.is_empty());
        built.other();
        let plan = plan(&built).unwrap();
        assert!(!plan.has_experts() && plan.segments.len() == 1);
    }

    #[test]
    fn other_readers_of_experts_are_refused() {
        type Make = fn(&TestGraph) -> *mut ggml_tensor;
        // SAFETY: shapes that fit, in a live context.
        let readers: [(&str, Make); 4] = unsafe {
            [
                ("GET_ROWS", |b| ggml_get_rows(b.context, b.weights[1][0], b.numbers(2))),
                ("VIEW", |b| ggml_view_1d(b.context, b.weights[1][0], 8, 0)),
                ("MUL_MAT", |b| {
                    ggml_mul_mat(
                        b.context,
                        b.weights[1][0],
                        ggml_new_tensor_3d(b.context, GGML_TYPE_F32, 8, 1, 4),
                    )
                }),
                ("MUL_MAT_ID", |b| {
                    let rows = ggml_new_tensor_3d(b.context, GGML_TYPE_F32, 8, 2, 4);
                    ggml_mul_mat_id(b.context, rows, b.weights[1][0], b.numbers(8))
                }),
            ]
        };
        for (op, make) in readers {
            let built = TestGraph::new();
            built.add(make(&built));
            let reason = refusal(&built);
            assert!(reason.contains(op) && reason.contains("MoE layer 1"), "{op}: {reason}");
        }
    }

    #[test]
    fn records_used_in_parts_are_refused() {
        // One part is never used, used twice, or under another routing.
        let built = TestGraph::new();
        built.matmul(0, 1, built.ids());
        assert!(refusal(&built).contains("parts [1]"));
        let built = TestGraph::new();
        let ids = built.ids();
        [0, 1, 1].into_iter().for_each(|part| built.matmul(0, part, ids));
        assert!(refusal(&built).contains("parts [0, 1, 1]"));
        let built = TestGraph::new();
        let ids = built.ids();
        built.matmul(0, 0, ids);
        built.matmul(0, 1, built.ids());
        assert!(refusal(&built).contains("parts [0]"));
        let built = TestGraph::new();
        let ids = built.ids();
        built.matmul(0, 0, ids);
        built.matmul(1, 0, ids);
        assert!(refusal(&built).contains("share one routing"));
    }
}

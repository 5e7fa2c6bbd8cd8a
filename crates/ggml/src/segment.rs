//! What executors share: parts of a graph, computed on the inner backend with some of their sources
//! exchanged.

use std::ptr;

use crate::abi::*;
use crate::error::Error;
use crate::plan::{Plan, Routing, Segment, nodes, view};
use crate::residency::Residency;

/// Why a graph was not computed to its end.
pub(crate) enum Halt {
    /// The inner backend said so.
    Status(ggml_status),
    Error(Error),
}

impl From<Error> for Halt {
    fn from(error: Error) -> Self {
        Halt::Error(error)
    }
}

pub(crate) type Run<T = ()> = std::result::Result<T, Halt>;

pub(crate) fn done(status: ggml_status) -> Run {
    if status == GGML_STATUS_SUCCESS { Ok(()) } else { Err(Halt::Status(status)) }
}

/// What ggml is told of a run.
pub(crate) fn outcome(run: Run) -> Result<ggml_status, Error> {
    match run {
        Ok(()) => Ok(GGML_STATUS_SUCCESS),
        Err(Halt::Status(status)) => Ok(status),
        Err(Halt::Error(error)) => Err(error),
    }
}

pub(crate) fn compute_on(backend: ggml_backend_t, graph: &mut ggml_cgraph) -> ggml_status {
    // SAFETY: a live backend and a graph whose tensors are allocated.
    unsafe { (*backend).iface.graph_compute.expect("every backend computes")(backend, graph) }
}

/// Waits until `backend` has computed what it was given.
pub(crate) fn synchronize(backend: ggml_backend_t) {
    // SAFETY: a live backend; the slot may be empty.
    unsafe {
        if let Some(f) = (*backend).iface.synchronize {
            f(backend);
        }
    }
}

/// Computes nodes `start..end` of `graph`. A `uid` other than 0 says that the same nodes come again.
pub(crate) fn run_nodes(
    inner: ggml_backend_t,
    graph: &ggml_cgraph,
    start: usize,
    end: usize,
    uid: u64,
) -> Run {
    if start == end {
        return Ok(());
    }
    let mut view = view(graph, start, end);
    view.uid = uid;
    done(compute_on(inner, &mut view))
}

/// Computes a graph whose every record sits in expert order, from slot `bases[layer]` on: only the
/// weights need exchanging, in one call.
pub(crate) fn run_resident(
    inner: ggml_backend_t,
    residency: &Residency,
    graph: &ggml_cgraph,
    plan: &Plan,
    bases: &[u32],
) -> Run {
    let all = nodes(graph);
    let routings = || plan.segments.iter().filter_map(|s| s.routing.as_ref());
    let mut windows = Vec::new();
    for routing in routings() {
        let (base, experts) = (bases[routing.layer], residency.layer(routing.layer).experts);
        for op in routing.ops() {
            let window = residency.window(routing.layer, op.part, base, base + experts - 1);
            windows.push((all[op.node], window));
        }
    }
    let mut patch = Patch::default();
    for (node, window) in &mut windows {
        patch.source(*node, 0, ptr::from_mut(window));
    }
    run_nodes(inner, graph, 0, all.len(), graph.uid)?;
    for routing in routings() {
        // SAFETY: a live tensor of the graph.
        let tokens = unsafe { (*routing.ids).ne[1] };
        residency.count_resident(routing.layer, tokens.unsigned_abs());
    }
    Ok(())
}

/// Computes a segment as it is, with `weights` for each part of the records, and `ids` if others
/// than the router's are meant.
pub(crate) fn run_exchanged(
    inner: ggml_backend_t,
    graph: &ggml_cgraph,
    segment: &Segment,
    routing: &Routing,
    weights: impl Fn(usize) -> ggml_tensor,
    mut ids: Option<ggml_tensor>,
) -> Run {
    let all = nodes(graph);
    let mut tensors: Vec<_> = routing.ops().map(|op| (all[op.node], weights(op.part))).collect();
    let mut patch = Patch::default();
    for (node, tensor) in &mut tensors {
        patch.source(*node, 0, ptr::from_mut(tensor));
        if let Some(ids) = &mut ids {
            patch.source(*node, 2, ptr::from_mut(ids));
        }
    }
    run_nodes(inner, graph, segment.start, segment.end, 0)
}

/// Sources of nodes, exchanged for the time of a call.
#[derive(Default)]
pub(crate) struct Patch {
    saved: Vec<(*mut ggml_tensor, usize, *mut ggml_tensor)>,
}

impl Patch {
    pub(crate) fn source(&mut self, node: *mut ggml_tensor, index: usize, with: *mut ggml_tensor) {
        // SAFETY: a live node of the graph that is being computed, by this thread alone.
        let slot = unsafe { &mut (*node).src[index] };
        self.saved.push((node, index, *slot));
        *slot = with;
    }
}

impl Drop for Patch {
    fn drop(&mut self) {
        for &(node, index, original) in self.saved.iter().rev() {
            // SAFETY: as in `source`.
            unsafe { (*node).src[index] = original };
        }
    }
}

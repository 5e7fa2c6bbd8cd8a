//! The chain of a layer: what its graph computes from the first expert matmul to the last, one row
//! for each expert of a token. Found in the graph, so that some of the rows can be computed elsewhere
//! with copies of the same operations, whatever the architecture.
//!
//! Rows must not know of each other: only operations that work row by row, or look something up by
//! the number of an expert, are taken. Others are named, and the layer is left as it is.

use std::ffi::CStr;
use std::ptr;

use crate::abi::*;
use crate::plan::{Routing, Segment, nodes};

/// More operations than any chain of llama.cpp has; ten are usual.
pub(crate) const LINKS_MAX: usize = 48;

/// Operations that compute each element from those at its place, or its row's.
const BY_ROW: [ggml_op; 16] = [
    GGML_OP_ADD,
    GGML_OP_SUB,
    GGML_OP_MUL,
    GGML_OP_DIV,
    GGML_OP_SQR,
    GGML_OP_SQRT,
    GGML_OP_LOG,
    GGML_OP_SIN,
    GGML_OP_COS,
    GGML_OP_SCALE,
    GGML_OP_CLAMP,
    GGML_OP_CONT,
    GGML_OP_LEAKY_RELU,
    GGML_OP_NORM,
    GGML_OP_RMS_NORM,
    GGML_OP_L2_NORM,
];

/// The operations of a layer that compute one row for each expert of a token.
#[derive(Debug)]
pub(crate) struct Chain {
    /// In the order of computing; the last is the last expert matmul. No more than [`LINKS_MAX`].
    pub(crate) links: Vec<Link>,
    /// Experts of a token, and so rows.
    pub(crate) used: usize,
    /// The selected experts, as the graph has them.
    pub(crate) ids: *mut ggml_tensor,
}

/// One operation.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Link {
    pub(crate) tensor: *mut ggml_tensor,
    /// Index in the graph.
    pub(crate) node: usize,
    /// Of an expert matmul: the part of the records that it reads.
    pub(crate) part: Option<usize>,
    /// Whether it has one row for each expert; else it is the same for all.
    pub(crate) by_expert: bool,
}

/// What a link reads that no other link computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outside {
    /// Weights, which never change.
    Constant,
    /// Computed before the layer's experts are.
    Input,
}

impl Chain {
    /// The chain of a segment that routes a single token. If there is none, says why.
    pub(crate) fn of(
        graph: &ggml_cgraph,
        segment: &Segment,
        routing: &Routing,
    ) -> Result<Chain, String> {
        let all = nodes(graph);
        // SAFETY: live tensors of the graph.
        let ids = unsafe { &*routing.ids };
        if ids.ne[1..] != [1, 1, 1] {
            return Err("the batch has several tokens".into());
        }
        let last = routing.ops().map(|op| op.node).max().unwrap_or(segment.start);
        let mut search = Search {
            nodes: all,
            start: segment.start,
            last,
            routing,
            used: ids.ne[0],
            links: Vec::new(),
        };
        search.visit(all[last], 0)?;
        let links = search.links;
        if routing.ops().any(|op| !links.iter().any(|link| link.node == op.node)) {
            return Err("the layer's last expert matmul does not depend on all others".into());
        }
        let between = &links[..links.len() - 1];
        for (index, &node) in all.iter().enumerate().skip(segment.start) {
            let is_link = links.iter().any(|link| link.node == index);
            let reads = |tensor| between.iter().any(|link| link.by_expert && link.tensor == tensor);
            if !is_link && sources(node).any(reads) {
                return Err(format!("operation {} reads what only experts see", name(node)));
            }
        }
        let used = usize::try_from(ids.ne[0]).unwrap_or(0);
        Ok(Chain { links, used, ids: routing.ids })
    }

    /// Index in the graph of the last expert matmul.
    pub(crate) fn last(&self) -> usize {
        self.links.last().map_or(0, |link| link.node)
    }

    /// What the last expert matmul computes: a row for each expert.
    pub(crate) fn output(&self) -> *mut ggml_tensor {
        self.links.last().map_or(ptr::null_mut(), |link| link.tensor)
    }

    /// What the links read that is computed before, each once.
    pub(crate) fn inputs(&self) -> Vec<*mut ggml_tensor> {
        let mut inputs = Vec::new();
        for link in &self.links {
            for source in sources(link.tensor).filter(|&s| self.outside(link, s).is_some()) {
                if outside(source) == Outside::Input && !inputs.contains(&source) {
                    inputs.push(source);
                }
            }
        }
        inputs
    }

    /// What `source` of a link is, if it is neither a link, nor experts, nor their numbers.
    pub(crate) fn outside(&self, link: &Link, source: *mut ggml_tensor) -> Option<Outside> {
        // SAFETY: a live node of the graph.
        let experts = link.part.map(|_| unsafe { (*link.tensor).src[0] });
        let known = source == self.ids
            || experts == Some(source)
            || self.links.iter().any(|link| link.tensor == source);
        (!known).then(|| outside(source))
    }
}

/// Everything that a node reads or is a view of.
fn sources(node: *mut ggml_tensor) -> impl Iterator<Item = *mut ggml_tensor> {
    // SAFETY: a live node of the graph.
    let t = unsafe { &*node };
    t.src.into_iter().chain([t.view_src]).filter(|source| !source.is_null())
}

/// Of a tensor that no link computes.
fn outside(tensor: *mut ggml_tensor) -> Outside {
    // SAFETY: a source of a live node is a live tensor, and so is what it is a view of.
    unsafe {
        let t = &*tensor;
        let root = if t.view_src.is_null() { t } else { &*t.view_src };
        let is_weight = root.op == GGML_OP_NONE
            && !root.buffer.is_null()
            && ggml_backend_buffer_get_usage(root.buffer) == GGML_BACKEND_BUFFER_USAGE_WEIGHTS;
        if is_weight { Outside::Constant } else { Outside::Input }
    }
}

fn name(node: *mut ggml_tensor) -> String {
    // SAFETY: a live node; ggml returns a static string for every operation.
    unsafe { CStr::from_ptr(ggml_op_name((*node).op)) }.to_string_lossy().into_owned()
}

struct Search<'a> {
    nodes: &'a [*mut ggml_tensor],
    /// First and last node of the chain.
    start: usize,
    last: usize,
    routing: &'a Routing,
    used: i64,
    links: Vec<Link>,
}

impl Search<'_> {
    /// Sources first.
    fn visit(&mut self, tensor: *mut ggml_tensor, depth: usize) -> Result<(), String> {
        let range = self.start..=self.last;
        let Some(node) = self.nodes[range].iter().position(|&node| node == tensor) else {
            return Ok(());
        };
        let node = self.start + node;
        if tensor == self.routing.ids || self.link_of(tensor).is_some() {
            return Ok(());
        }
        if depth == LINKS_MAX {
            return Err(format!("more than {LINKS_MAX} operations are computed for each expert"));
        }
        let part = self.routing.ops().find(|op| op.node == node).map(|op| op.part);
        // SAFETY: a live node of the graph.
        let experts = part.map(|_| unsafe { (*tensor).src[0] });
        for source in sources(tensor).filter(|&source| experts != Some(source)) {
            self.visit(source, depth + 1)?;
        }
        let by_expert = part.is_some()
            || sources(tensor)
                .any(|source| source == self.routing.ids || self.is_by_expert(source));
        let link = Link { tensor, node, part, by_expert };
        if !self.can_copy(&link) {
            return Err(format!("operation {} cannot be computed row by row", name(tensor)));
        }
        if self.links.len() == LINKS_MAX {
            return Err(format!("more than {LINKS_MAX} operations are computed for each expert"));
        }
        self.links.push(link);
        Ok(())
    }

    fn link_of(&self, tensor: *mut ggml_tensor) -> Option<&Link> {
        self.links.iter().find(|link| link.tensor == tensor)
    }

    /// Whether a source has one row for each expert.
    fn is_by_expert(&self, source: *mut ggml_tensor) -> bool {
        match self.link_of(source) {
            Some(link) => link.by_expert,
            None => outside(source) == Outside::Input && self.used > 1 && self.has_rows(source),
        }
    }

    /// Whether the shape of a tensor is that of one row for each expert.
    fn has_rows(&self, tensor: *mut ggml_tensor) -> bool {
        // SAFETY: a source of a live node is a live tensor.
        unsafe { &*tensor }.ne[1..] == [self.used, 1, 1]
    }

    /// Whether a source can stand beside rows: it has one for each expert, or one for all.
    fn goes_with_rows(&self, source: *mut ggml_tensor) -> bool {
        // SAFETY: a source of a live node is a live tensor.
        let one = unsafe { &*source }.ne[1..] == [1, 1, 1];
        source != self.routing.ids && (one || self.is_by_expert(source) && self.has_rows(source))
    }

    /// Whether a source is the same for all experts.
    fn is_same_for_all(&self, source: *mut ggml_tensor) -> bool {
        source != self.routing.ids && !self.is_by_expert(source)
    }

    /// Whether a copy of the operation, with fewer rows, computes the same rows.
    fn can_copy(&self, link: &Link) -> bool {
        // SAFETY: a live node of the graph.
        let t = unsafe { &*link.tensor };
        let ids = self.routing.ids;
        let is_view = [GGML_OP_VIEW, GGML_OP_RESHAPE].contains(&t.op);
        let is_by_row = BY_ROW.contains(&t.op) || [GGML_OP_UNARY, GGML_OP_GLU].contains(&t.op);
        // What is computed in place changes what it is a view of, which has to be a copy then.
        let is_link = |of| self.link_of(of).is_some();
        if !t.view_src.is_null() && !is_view && !is_link(t.view_src) {
            return false;
        }
        if !link.by_expert {
            let repeats = t.op == GGML_OP_REPEAT;
            return (is_view || is_by_row || repeats)
                && sources(link.tensor).all(|source| self.is_same_for_all(source));
        }
        // SAFETY: as above.
        let (element, row) = unsafe { (ggml_type_size(t.type_), ggml_row_size(t.type_, t.ne[0])) };
        if !self.has_rows(link.tensor) || t.nb[0] != element {
            return false;
        }
        if !t.view_src.is_null() {
            // SAFETY: what a live tensor is a view of is live.
            let of = unsafe { &*t.view_src };
            let within = of.nb[1] == t.nb[1] && t.view_offs + row <= of.nb[1];
            if !(self.is_by_expert(t.view_src) && is_link(t.view_src) && within) {
                return false;
            }
        } else if t.nb[1] != row {
            return false;
        }
        match t.op {
            GGML_OP_MUL_MAT_ID => {
                link.part.is_some() && t.src[2] == ids && self.goes_with_rows(t.src[1])
            }
            GGML_OP_ADD_ID => {
                t.src[2] == ids && self.goes_with_rows(t.src[0]) && self.is_same_for_all(t.src[1])
            }
            GGML_OP_GET_ROWS => t.src[1] == ids && self.is_same_for_all(t.src[0]),
            _ if is_view => true,
            _ if is_by_row => sources(link.tensor).all(|source| self.goes_with_rows(source)),
            _ => false,
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;

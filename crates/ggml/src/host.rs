//! The host executor: routing is read back to the host before each MoE layer, faults are served,
//! and the layer's matmuls are pointed at slots.
//!
//! When every routed record is resident, the segment runs as llama.cpp built it, with two sources
//! of each expert matmul exchanged for the call: the weights for a window of the pool, the ids for
//! slots. When some are missing, each expert matmul is computed in groups of experts, resident
//! ones first, while the reads of the others are in flight; rows are gathered, multiplied and
//! scattered into the node's own output. A matmul with an expert's rows gives the same bits
//! whatever other experts are in the call, provided that all rows of one expert stay in one call
//! (ggml-cpu chooses its kernel by their number), so both ways are exact on the CPU backend.

use std::ptr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use tierstream_io::Priority;

use crate::abi::*;
use crate::error::{Error, Result};
use crate::plan::{ExpertOp, Plan, Routing, nodes, view};
use crate::proxy::{Control, Device};
use crate::residency::{Memory, Need, Placed, Residency, Step};

/// Graphs whose plans are kept. llama.cpp alternates between a few (prefill, decode).
const PLANS_KEPT: usize = 4;

/// (token, expert) pairs in one gathered matmul, beyond which a new one is begun. Bounds the
/// scratch memory: the rows of one expert are never split, so a batch of n tokens needs room for
/// this many pairs and n more.
const PAIRS_PER_CALL: usize = 1024;

/// Computes graphs on an inner backend. One per context.
pub(crate) struct Executor {
    inner: ggml_backend_t,
    control: Arc<Control>,
    plans: Vec<(u64, Plan)>,
    routed: Routed,
    scratch: Scratch,
}

impl Executor {
    pub(crate) fn new(inner: ggml_backend_t, control: Arc<Control>) -> Self {
        Self {
            inner,
            control,
            plans: Vec::new(),
            routed: Routed::default(),
            scratch: Scratch::new(inner),
        }
    }

    /// Computes `graph`, blocking. Fails without having computed on bytes that did not arrive.
    pub(crate) fn compute(
        &mut self,
        device: &Device,
        graph: *mut ggml_cgraph,
    ) -> Result<ggml_status> {
        // SAFETY: ggml passes a graph that stays as it is for the call.
        let graph = unsafe { &*graph };
        let plan = self.take_plan(device, graph)?;
        let status = self.run_plan(device, graph, &plan.1);
        self.plans.push(plan);
        status
    }

    fn run_plan(
        &mut self,
        device: &Device,
        graph: &ggml_cgraph,
        plan: &Plan,
    ) -> Result<ggml_status> {
        if !plan.has_experts() {
            return Ok(self.run_nodes(graph, 0, nodes(graph).len(), graph.uid));
        }
        let no_pool = || Error::SelfCheck("expert weights are used before there is a pool".into());
        let residency = device.residency().ok_or_else(no_pool)?.clone();
        if let Some(bases) = &*residency.identity() {
            return Ok(self.run_resident(&residency, graph, plan, bases));
        }
        for segment in &plan.segments {
            if self.control.is_cancelled() {
                return Err(Error::Cancelled);
            }
            let status = match &segment.routing {
                None => self.run_nodes(graph, segment.start, segment.end, 0),
                Some(routing) => {
                    self.run_layer(&residency, graph, (segment.start, segment.end), routing)?
                }
            };
            if status != GGML_STATUS_SUCCESS {
                return Ok(status);
            }
        }
        Ok(GGML_STATUS_SUCCESS)
    }

    /// Every record sits in expert order: only the weights need exchanging, in one call.
    fn run_resident(
        &mut self,
        residency: &Residency,
        graph: &ggml_cgraph,
        plan: &Plan,
        bases: &[u32],
    ) -> ggml_status {
        let all = nodes(graph);
        let mut patch = Patch::default();
        let mut windows = Vec::new();
        for routing in plan.segments.iter().filter_map(|s| s.routing.as_ref()) {
            let layer = residency.layer(routing.layer);
            let base = bases[routing.layer];
            for op in &routing.ops {
                let last = base + layer.experts - 1;
                let window = residency.window(routing.layer, op.part, base, last);
                windows.push((all[op.node], Box::new(window)));
            }
            // SAFETY: a live tensor of the graph.
            let tokens = unsafe { (*routing.ids).ne[1] };
            residency.count_resident(routing.layer, tokens.unsigned_abs());
        }
        for (node, window) in &mut windows {
            patch.source(*node, 0, ptr::from_mut(window.as_mut()));
        }
        self.run_nodes(graph, 0, all.len(), graph.uid)
    }

    /// One MoE layer: everything from its first expert matmul to the next layer's.
    fn run_layer(
        &mut self,
        residency: &Arc<Residency>,
        graph: &ggml_cgraph,
        (start, end): (usize, usize),
        routing: &Routing,
    ) -> Result<ggml_status> {
        self.synchronize();
        let layer = residency.layer(routing.layer);
        self.routed.read(routing, layer.experts).map_err(|reason| Error::Graph {
            layer: layer.block,
            reason,
        })?;
        if self.routed.pairs() == 0 {
            return Ok(self.run_nodes(graph, start, end, 0));
        }
        let cancelled = || self.control.is_cancelled();
        let mut step = residency.acquire(routing.layer, self.routed.needs(), &cancelled)?;
        let status = if step.arriving().is_empty() {
            let placed = step.hits().to_vec();
            self.run_whole(residency, graph, (start, end), routing, &placed)?
        } else {
            self.run_in_groups(residency, graph, (start, end), routing, &mut step)?
        };
        if status == GGML_STATUS_SUCCESS {
            step.finish()?; // else reads may be under way that nobody has waited for
        }
        Ok(status)
    }

    /// All routed records are resident: the segment as it is, over slots.
    fn run_whole(
        &mut self,
        residency: &Residency,
        graph: &ggml_cgraph,
        (start, end): (usize, usize),
        routing: &Routing,
        placed: &[Placed],
    ) -> Result<ggml_status> {
        let (low, high) = slot_range(placed);
        self.routed.map(placed, low);
        let mut ids = self.scratch.ids(&self.routed)?;
        let all = nodes(graph);
        let mut windows: Vec<_> = routing
            .ops
            .iter()
            .map(|op| (all[op.node], residency.window(routing.layer, op.part, low, high)))
            .collect();
        let mut patch = Patch::default();
        for (node, window) in &mut windows {
            patch.source(*node, 0, ptr::from_mut(window));
            patch.source(*node, 2, &raw mut ids);
        }
        Ok(self.run_nodes(graph, start, end, 0))
    }

    /// Some routed records are missing: expert matmuls in groups, all else as it is.
    fn run_in_groups(
        &mut self,
        residency: &Residency,
        graph: &ggml_cgraph,
        (start, end): (usize, usize),
        routing: &Routing,
        step: &mut Step,
    ) -> Result<ggml_status> {
        let mut loads = Loads::new(&routing.ops, step);
        let mut at = start;
        for (index, op) in routing.ops.iter().enumerate() {
            let mut status = self.run_nodes(graph, at, op.node, 0);
            if status == GGML_STATUS_SUCCESS {
                let node = nodes(graph)[op.node];
                status = self.run_op(residency, routing, node, index, &mut loads, step)?;
            }
            if status != GGML_STATUS_SUCCESS {
                return Ok(status);
            }
            at = op.node + 1;
        }
        Ok(self.run_nodes(graph, at, end, 0))
    }

    /// One expert matmul: resident records first, then each group as it arrives.
    fn run_op(
        &mut self,
        residency: &Residency,
        routing: &Routing,
        node: *mut ggml_tensor,
        op: usize,
        loads: &mut Loads,
        step: &mut Step,
    ) -> Result<ggml_status> {
        let part = routing.ops[op].part;
        let hits = step.hits().to_vec();
        let mut status = self.run_experts(residency, routing.layer, part, node, &hits)?;
        for group in 0..step.arriving().len() {
            if self.control.is_cancelled() {
                return Err(Error::Cancelled);
            }
            if status != GGML_STATUS_SUCCESS {
                break;
            }
            let waiting = Instant::now();
            let load = loads.of(op, group);
            self.control.wait_for(step.ticket(load))?;
            let waited = u64::try_from(waiting.elapsed().as_nanos()).unwrap_or(u64::MAX);
            self.control.stall_ns.fetch_add(waited, Ordering::Relaxed);
            step.arrived(load)?;
            let placed = step.arriving()[group].clone();
            status = self.run_experts(residency, routing.layer, part, node, &placed)?;
            loads.computed(step, op, group);
        }
        Ok(status)
    }

    /// The rows of `placed` experts of one expert matmul, in as many calls as the scratch allows.
    fn run_experts(
        &mut self,
        residency: &Residency,
        layer: usize,
        part: usize,
        node: *mut ggml_tensor,
        placed: &[Placed],
    ) -> Result<ggml_status> {
        let mut rest = placed;
        while !rest.is_empty() {
            let mut pairs = 0;
            let fits = |p: &&Placed| {
                let first = pairs == 0;
                pairs += self.routed.rows_of(p.expert).len();
                first || pairs <= PAIRS_PER_CALL
            };
            let n = rest.iter().take_while(fits).count();
            let (now, later) = rest.split_at(n);
            let (low, high) = slot_range(now);
            let window = residency.window(layer, part, low, high);
            let status = self.scratch.gathered_matmul(self.inner, node, &window, now, low, &self.routed);
            let status = status.map_err(|e| match e {
                Error::Graph { reason, .. } => {
                    Error::Graph { layer: residency.layer(layer).block, reason }
                }
                other => other,
            })?;
            if status != GGML_STATUS_SUCCESS {
                return Ok(status);
            }
            rest = later;
        }
        Ok(GGML_STATUS_SUCCESS)
    }

    fn run_nodes(&self, graph: &ggml_cgraph, start: usize, end: usize, uid: u64) -> ggml_status {
        if start == end {
            return GGML_STATUS_SUCCESS;
        }
        let mut view = view(graph, start, end);
        view.uid = uid;
        compute_on(self.inner, &mut view)
    }

    /// Waits until the inner backend has computed what it was given.
    fn synchronize(&self) {
        // SAFETY: a live backend; the slot may be empty.
        unsafe {
            if let Some(f) = (*self.inner).iface.synchronize {
                f(self.inner);
            }
        }
    }

    /// The plan of `graph`, taken out of the cache or made.
    fn take_plan(&mut self, device: &Device, graph: &ggml_cgraph) -> Result<(u64, Plan)> {
        let known = self.plans.iter().position(|(uid, _)| *uid == graph.uid && graph.uid != 0);
        if let Some(index) = known {
            return Ok(self.plans.remove(index));
        }
        if self.plans.len() >= PLANS_KEPT {
            self.plans.remove(0);
        }
        Ok((graph.uid, Plan::new(graph, &device.weight_table())?))
    }
}

fn compute_on(backend: ggml_backend_t, graph: &mut ggml_cgraph) -> ggml_status {
    // SAFETY: a live backend and a graph whose tensors are allocated.
    unsafe { (*backend).iface.graph_compute.expect("every backend computes")(backend, graph) }
}

fn slot_range(placed: &[Placed]) -> (u32, u32) {
    let slots = placed.iter().map(|p| p.slot);
    (slots.clone().min().unwrap_or(0), slots.max().unwrap_or(0))
}

/// The order in which the parts of the missing records are read.
///
/// A load belongs to one expert matmul and one group. Loads start in the order in which they are
/// computed, each as soon as the group that last used its slots has been computed with that part.
/// Different parts lie in different memory, so with one or two groups everything starts at once.
struct Loads {
    parts: Vec<usize>,
    groups: usize,
    /// Groups that may be in the slots at one time.
    turns: usize,
    /// Loads started, in order; index = op * groups + group.
    started: Vec<usize>,
    /// Groups computed, per op.
    computed: Vec<usize>,
}

impl Loads {
    fn new(ops: &[ExpertOp], step: &mut Step) -> Self {
        let groups = step.arriving();
        let shared = groups.len() > 1 && groups[0].iter().any(|p| groups[1].iter().any(|q| p.slot == q.slot));
        let mut this = Self {
            parts: ops.iter().map(|op| op.part).collect(),
            groups: groups.len(),
            turns: if shared { 1 } else { 2 },
            started: Vec::with_capacity(ops.len() * groups.len()),
            computed: vec![0; ops.len()],
        };
        this.start(step);
        this
    }

    fn start(&mut self, step: &mut Step) {
        while self.started.len() < self.parts.len() * self.groups {
            let (op, group) = (self.started.len() / self.groups, self.started.len() % self.groups);
            if group >= self.computed[op] + self.turns {
                break;
            }
            let placed = step.arriving()[group].clone();
            self.started.push(step.load(self.parts[op], &placed, Priority::Demand));
        }
    }

    /// The load of a group for an expert matmul, which has been started.
    fn of(&self, op: usize, group: usize) -> usize {
        self.started[op * self.groups + group]
    }

    fn computed(&mut self, step: &mut Step, op: usize, group: usize) {
        self.computed[op] = group + 1;
        self.start(step);
    }
}

/// Sources of nodes, exchanged for the time of a call.
#[derive(Default)]
struct Patch {
    saved: Vec<(*mut ggml_tensor, usize, *mut ggml_tensor)>,
}

impl Patch {
    fn source(&mut self, node: *mut ggml_tensor, index: usize, with: *mut ggml_tensor) {
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

/// The routing of one batch in one layer, on the host.
#[derive(Default)]
struct Routed {
    /// Expert of each pair, `n_used` a token; pair = token * n_used + rank.
    experts: Vec<u32>,
    /// What the matmul gets instead: slot - low.
    slots: Vec<i32>,
    n_used: usize,
    n_tokens: usize,
    needs: Vec<Need>,
    /// Pairs in the order of their experts.
    by_expert: Vec<u32>,
    /// Where an expert's pairs begin in `by_expert`; one more than experts.
    starts: Vec<u32>,
    raw: Vec<u8>,
}

impl Routed {
    /// Reads the ids of a routing, which the backend has computed.
    fn read(&mut self, routing: &Routing, n_experts: u32) -> Result<(), String> {
        // SAFETY: a live, allocated tensor of the graph.
        let ids = unsafe { &*routing.ids };
        if ids.type_ != GGML_TYPE_I32 || ids.ne[2] != 1 || ids.ne[3] != 1 {
            return Err("the selected experts are no I32 matrix".into());
        }
        let size = |n: i64| usize::try_from(n).unwrap_or(0);
        (self.n_used, self.n_tokens) = (size(ids.ne[0]), size(ids.ne[1]));
        self.experts.clear();
        // SAFETY: as above; the bytes of a view span its strides.
        unsafe {
            self.raw.resize(ggml_nbytes(ids), 0);
            ggml_backend_tensor_get(ids, self.raw.as_mut_ptr().cast(), 0, self.raw.len());
        }
        for token in 0..self.n_tokens {
            for rank in 0..self.n_used {
                let at = token * ids.nb[1] + rank * ids.nb[0];
                let bytes = self.raw[at..at + 4].try_into().expect("four bytes");
                let id = i32::from_ne_bytes(bytes);
                match u32::try_from(id) {
                    Ok(id) if id < n_experts => self.experts.push(id),
                    _ => return Err(format!("expert {id} selected of {n_experts}")),
                }
            }
        }
        self.index(n_experts);
        Ok(())
    }

    /// Sorts the pairs by expert (counting sort) and lists the distinct experts.
    fn index(&mut self, n_experts: u32) {
        self.starts.clear();
        self.starts.resize(n_experts as usize + 1, 0);
        for &e in &self.experts {
            self.starts[e as usize + 1] += 1;
        }
        self.needs.clear();
        for e in 0..n_experts as usize {
            if self.starts[e + 1] > 0 {
                self.needs.push(Need { expert: u32::try_from(e).expect("below n_experts"), last_row: 0 });
            }
            self.starts[e + 1] += self.starts[e];
        }
        self.by_expert.clear();
        self.by_expert.resize(self.experts.len(), 0);
        let mut next = self.starts.clone();
        for (pair, &e) in (0u32..).zip(&self.experts) {
            self.by_expert[next[e as usize] as usize] = pair;
            next[e as usize] += 1;
        }
        let n_used = u32::try_from(self.n_used.max(1)).expect("top-k is small");
        for need in &mut self.needs {
            let end = self.starts[need.expert as usize + 1] as usize;
            need.last_row = self.by_expert[end - 1] / n_used;
        }
    }

    fn pairs(&self) -> usize {
        self.experts.len()
    }

    /// Distinct experts, with the last token that needs each.
    fn needs(&self) -> &[Need] {
        &self.needs
    }

    /// Pairs that are routed to `expert`, ascending.
    fn rows_of(&self, expert: u32) -> &[u32] {
        let e = expert as usize;
        &self.by_expert[self.starts[e] as usize..self.starts[e + 1] as usize]
    }

    /// Fills `slots` for all pairs. Every routed expert must be in `placed`.
    fn map(&mut self, placed: &[Placed], low: u32) {
        self.slots.clear();
        self.slots.resize(self.experts.len(), 0);
        for p in placed {
            let slot = i32::try_from(p.slot - low).expect("slots fit ggml's ids");
            let e = p.expert as usize;
            for at in self.starts[e]..self.starts[e + 1] {
                self.slots[self.by_expert[at as usize] as usize] = slot;
            }
        }
    }
}

/// Memory and tensors for what the executor adds to a graph.
struct Scratch {
    buffer_type: ggml_backend_buffer_type_t,
    memory: Option<Memory>,
    /// Tensor headers of one gathered matmul, without data.
    context: *mut ggml_context,
}

/// Headers of one gathered matmul: tensors and a small graph.
const CONTEXT_BYTES: usize = 64 * 1024;

impl Scratch {
    fn new(inner: ggml_backend_t) -> Self {
        let params =
            ggml_init_params { mem_size: CONTEXT_BYTES, mem_buffer: ptr::null_mut(), no_alloc: true };
        // SAFETY: a live backend; ggml_init returns null or a context.
        unsafe {
            Self {
                buffer_type: ggml_backend_get_default_buffer_type(inner.cast()).cast(),
                memory: None,
                context: ggml_init(params),
            }
        }
    }

    fn memory(&mut self, bytes: usize) -> Result<&Memory> {
        if self.memory.as_ref().is_none_or(|m| m.bytes() < bytes) {
            self.memory = None; // give the old one back first
            self.memory = Some(Memory::scratch(self.buffer_type, bytes)?);
        }
        Ok(self.memory.as_ref().expect("just made"))
    }

    /// A tensor with the slots of all pairs, shaped like the routing's ids.
    fn ids(&mut self, routed: &Routed) -> Result<ggml_tensor> {
        let memory = self.memory(routed.slots.len() * 4)?;
        let shape = [routed.n_used, routed.n_tokens, 1];
        let mut ids = memory.tensor(GGML_TYPE_I32, shape.map(to_ne), memory.base());
        set(&mut ids, &routed.slots);
        Ok(ids)
    }

    /// `node` (a `MUL_MAT_ID`) for the rows of `placed` only, with `window` as its matrices.
    ///
    /// rows = src1 at the pairs' rows; out = window\[slot\] x rows; node at the pairs = out.
    fn gathered_matmul(
        &mut self,
        inner: ggml_backend_t,
        node: *mut ggml_tensor,
        window: &ggml_tensor,
        placed: &[Placed],
        low: u32,
        routed: &Routed,
    ) -> Result<ggml_status> {
        // SAFETY: a live, allocated node of the graph and its source.
        let (node, input) = unsafe { (&*node, &*(*node).src[1]) };
        let unsupported = |reason: &str| Error::Graph { layer: 0, reason: reason.to_owned() };
        let (inputs_per_token, input_rows, input_stride) =
            row_layout(input).ok_or_else(|| unsupported("the expert matmul's input is not in rows"))?;
        // SAFETY: a live tensor.
        if !unsafe { ggml_is_contiguous(node) } {
            return Err(unsupported("the expert matmul's output is not contiguous"));
        }
        let mut from = Vec::new();
        let mut slots = Vec::new();
        let mut to = Vec::new();
        for p in placed {
            let slot = i32::try_from(p.slot - low).expect("slots fit ggml's ids");
            for &pair in routed.rows_of(p.expert) {
                let (token, rank) = (pair as usize / routed.n_used, pair as usize % routed.n_used);
                let row = token * inputs_per_token + rank % inputs_per_token;
                from.push(i32::try_from(row).expect("rows fit ggml's ids"));
                slots.push(slot);
                to.push(i32::try_from(pair).expect("rows fit ggml's ids"));
            }
        }
        let n = from.len();
        let (k, m) = (input.ne[0], node.ne[0]);
        // One input row for all: a single token's, shared by its experts. It need not be gathered.
        let shared = input_rows == 1;
        let bytes = |elements: usize| (elements * 4).next_multiple_of(Memory::ALIGNMENT);
        let gathered = if shared { 0 } else { bytes(n * usize_of(k)) };
        let index = bytes(n);
        let memory = self.memory(gathered + bytes(n * usize_of(m)) + 3 * index)?;
        let (base, buffer) = (memory.base(), memory.buffer());
        let context = self.context;
        // SAFETY: building a graph of fresh headers in our own context over live data: `place`
        // puts each into the scratch in bounds, sources are detached from their own graph.
        unsafe {
            ggml_reset(context);
            let mut at = base;
            let mut place = |t: *mut ggml_tensor, bytes: usize| {
                (*t).data = at.cast();
                (*t).buffer = buffer.cast();
                at = at.add(bytes);
                t
            };
            let indices = |t: *mut ggml_tensor, values: &[i32]| {
                set(&mut *t, values);
                t
            };
            let n = to_ne(n);
            let from_t = indices(place(ggml_new_tensor_1d(context, GGML_TYPE_I32, n), index), &from);
            let to_t = indices(place(ggml_new_tensor_1d(context, GGML_TYPE_I32, n), index), &to);
            let ids_shape = if shared { [n, 1] } else { [1, n] };
            let ids_t = ggml_new_tensor_2d(context, GGML_TYPE_I32, ids_shape[0], ids_shape[1]);
            let ids_t = indices(place(ids_t, index), &slots);

            let source = ggml_new_tensor_2d(context, input.type_, k, to_ne(input_rows));
            (*source).nb[1] = input_stride;
            (*source).nb[2] = input_stride * input_rows;
            (*source).nb[3] = (*source).nb[2];
            (*source).data = input.data;
            (*source).buffer = input.buffer;
            let rows = if shared {
                source
            } else {
                let rows = place(ggml_get_rows(context, source, from_t), gathered);
                ggml_reshape_3d(context, rows, k, 1, n)
            };
            let weights = ggml_dup_tensor(context, window);
            *weights = *window;
            let out = ggml_mul_mat_id(context, weights, rows, ids_t);
            (*out).op_params = node.op_params;
            let out = place(out, bytes(usize_of(n * m)));
            let target = ggml_new_tensor_2d(context, node.type_, m, node.ne[1] * node.ne[2]);
            (*target).data = node.data;
            (*target).buffer = node.buffer;
            let out = ggml_reshape_2d(context, out, m, n);
            let scatter = ggml_set_rows(context, target, out, to_t);

            let graph: *mut ggml_cgraph = ggml_new_graph_custom(context, 16, false).cast();
            ggml_build_forward_expand(graph.cast(), scatter);
            let status = compute_on(inner, &mut *graph);
            if let Some(f) = (*inner).iface.synchronize {
                f(inner); // the indices in the scratch are about to be overwritten
            }
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

/// Rows per token, rows in all and bytes between rows of an expert matmul's input `[k, rows per
/// token, tokens]`, if one stride leads through all rows.
fn row_layout(input: &ggml_tensor) -> Option<(usize, usize, usize)> {
    let (per_token, tokens) = (usize_of(input.ne[1]), usize_of(input.ne[2]));
    let even = input.type_ == GGML_TYPE_F32 && input.nb[0] == 4 && input.ne[3] == 1;
    let stride = if per_token == 1 { input.nb[2] } else { input.nb[1] };
    (even && (per_token == 1 || tokens == 1 || input.nb[2] == per_token * stride))
        .then_some((per_token, per_token * tokens, stride))
}

fn to_ne(n: usize) -> i64 {
    i64::try_from(n).expect("shapes fit ggml's int64")
}

fn usize_of(ne: i64) -> usize {
    usize::try_from(ne).expect("ggml's shapes are not negative")
}

/// Uploads `values` to a tensor of as many elements.
fn set(tensor: &mut ggml_tensor, values: &[i32]) {
    // SAFETY: an allocated tensor; ggml checks the size.
    unsafe { ggml_backend_tensor_set(tensor, values.as_ptr().cast(), 0, size_of_val(values)) };
}

#[cfg(test)]
mod tests;

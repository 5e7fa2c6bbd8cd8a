//! Single tokens whose routing nobody waits for: the whole forward pass is captured as one graph of
//! CUDA's, with a [gate](tierstream_cuda::Gates) before each layer's experts.
//!
//! A gate maps what the router has chosen to slots. Where all of it is in slots, the GPU goes on; where
//! something is missing it waits for this thread, which follows it from gate to gate, asks the pool for
//! the same records in the same order as for any other token, and brings what is missing.
//!
//! While the GPU may wait, nobody else gets a slot ([`Hold`](crate::residency::Hold)), memory is behind
//! all of them, nobody makes calls that wait for the GPU ([`undisturbed`]), and no kernel is started
//! for the first time: tokens are computed layer by layer first, and what is captured is loaded.

use std::ffi::c_void;
use std::hint;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use tierstream_cuda::{At, Device, GATE_WIDTH, Gates, Graph, Mark, Stream};

use super::OnGpu;
use super::exchange::{OverSlots, ReadBack};
use super::undisturbed::undisturbed;
use crate::abi::*;
use crate::error::{Error, Result};
use crate::memory;
use crate::plan::{Plan, Routing, Segment, nodes, view};
use crate::recorder::{Noted, floats};
use crate::residency::{Residency, SlotMap};
use crate::segment::{Patch, Run, compute_on, synchronize};

/// Tokens of a graph that are computed layer by layer before it is captured.
const LAYER_BY_LAYER_FIRST: u32 = 2;

/// Graphs that are kept: llama.cpp comes back to one after a prompt.
const KEPT: usize = 2;

/// How long the GPU waits for experts. Where it also draws the screen, a kernel may not take longer
/// than some seconds.
const LONGEST_WAIT: Duration = Duration::from_secs(2);

/// How often is looked, before others get the processor.
const LOOKS: u32 = 200;

/// What it takes to compute single tokens as a whole.
#[derive(Default)]
pub(super) struct Whole {
    // In the order in which they are to be dropped: graphs name what follows.
    forwards: Vec<Forward>,
    gated: Option<Gated>,
    /// The routing of the token that is being computed, if it is recorded.
    noted: Vec<Noted>,
    /// Captures so far.
    captured: u64,
    /// The GPU has waited in vain: something is too slow for this.
    is_given_up: bool,
}

/// Gates, and the streams that they are on.
struct Gated {
    stream: Stream,
    gates: Gates,
    map: SlotMap,
    /// The slots that each gate writes.
    slots: Vec<ggml_tensor>,
    /// Between the backend's stream and ours.
    handover: Mark,
    /// The last graph has been computed.
    done: Mark,
    /// Slots per size class that there was memory behind when it was last looked.
    backed: Vec<u32>,
}

/// The forward pass for one token.
struct Forward {
    /// Of ggml's graph.
    uid: u64,
    /// Tokens that were computed layer by layer.
    tokens: u32,
    graph: Option<Captured>,
}

struct Captured {
    graph: Graph,
    purpose: Purpose,
    /// The routing weights of each layer, where they are recorded.
    weights: Option<Weights>,
    _parts: Vec<Part>,
}

/// What a graph was captured for.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Purpose {
    /// The numbers are the host's and not the routers'.
    replays: bool,
    /// Routing is recorded.
    records: bool,
}

/// The routing weights of all layers, copied to the host when they are computed.
struct Weights {
    /// By layer.
    tensors: Vec<*mut ggml_tensor>,
    told: ReadBack,
}

impl Weights {
    /// None if a layer's are not known.
    fn new(inner: ggml_backend_t, graph: &ggml_cgraph, plan: &Plan) -> Result<Option<Self>> {
        let all = plan.segments.iter().enumerate().filter(|(_, s)| s.routing.is_some());
        let tensors: Option<Vec<_>> = all.map(|(index, _)| plan.weights_of(graph, index)).collect();
        let Some(tensors) = tensors else { return Ok(None) };
        let mut told = ReadBack::default();
        told.make_room(inner, &tensors)?;
        Ok(Some(Self { tensors, told }))
    }

    fn ask(&self, inner: ggml_backend_t, layer: usize) {
        self.told.ask_one(inner, layer, self.tensors[layer]);
    }
}

/// A part of ggml's graph, as a list of nodes of our own, behind one that computes nothing: ggml-cuda
/// knows a graph again by its first node, and captures those that it knows, which it cannot within a
/// capture of ours.
struct Part {
    first: Box<ggml_tensor>,
    nodes: Vec<*mut ggml_tensor>,
}

impl Part {
    /// Nodes `start..end`, for the `capture`th time that something is captured.
    fn new(graph: &ggml_cgraph, start: usize, end: usize, capture: u64) -> Self {
        let nothing = std::ptr::null_mut();
        let mut first = Box::new(memory::tensor(nothing, GGML_TYPE_F32, [1, 1, 1], nothing.cast()));
        // So that it is no other one that was at the same address.
        let (low, high) = (capture as u32, (capture >> 32) as u32);
        first.op_params[..2].copy_from_slice(&[low.cast_signed(), high.cast_signed()]);
        let mut all = vec![&raw mut *first];
        all.extend_from_slice(&nodes(graph)[start..end]);
        Self { first, nodes: all }
    }

    fn compute(&mut self, inner: ggml_backend_t, graph: &ggml_cgraph) -> Result<()> {
        self.nodes[0] = &raw mut *self.first;
        let mut part = view(graph, 0, self.nodes.len());
        part.nodes = self.nodes.as_mut_ptr();
        match compute_on(inner, &mut part) {
            GGML_STATUS_SUCCESS => Ok(()),
            status => Err(Error::Backend(format!("a graph cannot be captured: status {status}"))),
        }
    }
}

impl OnGpu {
    /// Computes a single token as a whole, if that can be done. Whether it was.
    pub(super) fn run_whole(
        &mut self,
        residency: &Arc<Residency>,
        graph: &ggml_cgraph,
        plan: &Plan,
    ) -> Run<bool> {
        let may = self.control.may_compute_as_a_whole() && !self.whole.is_given_up;
        if !may || graph.uid == 0 || plan.tokens() != 1 {
            return Ok(false);
        }
        let Some(index) = self.whole.warm(graph.uid) else { return Ok(false) };
        let Some(_undisturbed) = undisturbed() else { return Ok(false) };
        if self.whole.gated.is_none() {
            if !can_be_gated(self.inner, residency, graph, plan) {
                self.whole.is_given_up = true;
                return Ok(false);
            }
            self.whole.gated = Some(Gated::new(residency, plan)?);
        }
        let gated = self.whole.gated.as_mut().expect("just made");
        let Some(_hold) = residency.hold() else { return Ok(false) };
        if !gated.is_backed(residency)? {
            return Ok(false);
        }
        let purpose = Purpose {
            replays: self.control.replay().is_some(),
            records: self.control.recorder.is_on(),
        };
        let is_captured = |f: &Forward| f.graph.as_ref().is_some_and(|g| g.purpose == purpose);
        if !is_captured(&self.whole.forwards[index]) {
            self.whole.captured += 1;
            let capture = self.whole.captured;
            let captured = gated.capture(
                (self.inner, capture),
                (residency, graph, plan),
                &mut self.over_slots,
                purpose,
            )?;
            self.whole.forwards[index].graph = Some(captured);
        }
        if let Err(error) = self.launch(residency, plan, index) {
            // What the gates are at is not known any more. The backend may have to wait for them.
            synchronize(self.inner);
            self.whole.is_given_up |= matches!(error, Error::GateGivenUp { .. });
            self.whole.forwards.clear();
            self.whole.gated = None;
            return Err(error.into());
        }
        self.control.whole_tokens.fetch_add(1, Ordering::Relaxed);
        Ok(true)
    }

    /// Has the GPU compute, brings what it waits for, and waits until it is done.
    fn launch(&mut self, residency: &Arc<Residency>, plan: &Plan, index: usize) -> Result<()> {
        if let Some(replay) = self.control.replay() {
            let gated = self.whole.gated.as_mut().expect("there is a graph of it");
            for routing in routings(plan) {
                let shape = (used(routing), residency.layer(routing.layer).experts);
                let experts = replay.experts(self.replayed, routing.layer, shape)?;
                let numbers: Vec<i32> = experts.iter().map(|e| e.cast_signed()).collect();
                gated.gates.give(routing.layer, &numbers);
            }
            self.replayed += 1;
        }
        let inner = self.inner;
        let gated = self.whole.gated.as_mut().expect("there is a graph of it");
        let captured = self.whole.forwards[index].graph.as_ref().expect("just captured");
        if gated.map.refresh(residency) {
            gated.gates.set_tables(&gated.stream, gated.map.entries())?;
        }
        record(inner, &gated.handover);
        gated.stream.wait_for_mark(&gated.handover)?;
        self.whole.noted.clear();
        gated.gates.begin();
        gated.stream.launch(&captured.graph)?;
        gated.stream.set(&gated.done)?;
        wait(inner, &gated.done);
        let served = self.serve(residency, plan);
        let gated = self.whole.gated.as_mut().expect("as above");
        gated.done.wait()?;
        served?;
        // What was answered in the last moment may have come too late.
        let Some(last) = routings(plan).last() else { return Ok(()) };
        match gated.gates.poll(last.layer, &mut Vec::new()) {
            Some(At::Passed) => {}
            _ => return Err(Error::GateGivenUp { layer: residency.layer(last.layer).block }),
        }
        let captured = self.whole.forwards[index].graph.as_ref().expect("as above");
        for mut noted in self.whole.noted.drain(..) {
            if let Some(weights) = &captured.weights {
                noted.weights = floats(weights.told.bytes(noted.layer));
            }
            self.control.recorder.note(noted);
        }
        Ok(())
    }

    /// Follows the GPU from gate to gate. After an error too, to its end: it goes on with anything, and
    /// what it computes is nobody's.
    fn serve(&mut self, residency: &Arc<Residency>, plan: &Plan) -> Result<()> {
        let mut served = Ok(());
        let mut numbers = Vec::with_capacity(GATE_WIDTH);
        for routing in routings(plan) {
            let gated = self.whole.gated.as_ref().expect("there is a graph of it");
            let at = gated.wait_for_gate(routing.layer, &mut numbers)?;
            if served.is_ok() {
                served = self.serve_gate(residency, routing, &at, &numbers);
                if served.is_ok() {
                    continue;
                }
            }
            if matches!(at, At::Asks) {
                let gated = self.whole.gated.as_mut().expect("as above");
                gated.gates.answer(routing.layer, &vec![0; numbers.len()], &[]);
            }
        }
        served
    }

    fn serve_gate(
        &mut self,
        residency: &Arc<Residency>,
        routing: &Routing,
        at: &At,
        numbers: &[i32],
    ) -> Result<()> {
        let layer = residency.layer(routing.layer);
        let failed = |reason| Error::Graph { layer: layer.block, reason };
        self.routed.take_token(numbers, layer.experts).map_err(failed)?;
        if self.control.recorder.is_on() {
            self.whole.noted.push(self.routed.noted(routing.layer, None));
        }
        match at {
            At::GaveUp => return Err(Error::GateGivenUp { layer: layer.block }),
            At::Asks if self.control.is_cancelled() => return Err(Error::Cancelled),
            At::Asks | At::Passed => {}
        }
        let Some(step) = self.bring_to_slots(residency, routing, None)? else {
            return Err(Error::Internal("all slots are free, and do not suffice".into()));
        };
        let arrived = step.arriving().first().map_or(&[][..], |group| group).to_vec();
        self.routed.map(&[step.hits(), &arrived].concat(), 0);
        // The GPU computes with them from now on, and this thread alone gives slots away, not before
        // the next gate.
        step.finish()?;
        let gated = self.whole.gated.as_mut().expect("there is a graph of it");
        let changes = gated.map.take_in(residency, routing.layer, &arrived);
        match at {
            At::Asks => {
                let entry = |(entry, slot)| (u32::try_from(entry).expect("counted in u32"), slot);
                let changes: Vec<_> = changes.into_iter().map(entry).collect();
                gated.gates.answer(routing.layer, &self.routed.slots, &changes);
            }
            _ if changes.is_empty() => {}
            _ => return Err(failed("the GPU has taken a record for resident".into())),
        }
        Ok(())
    }
}

impl Whole {
    /// The forward pass of ggml's graph, if enough tokens of it were computed layer by layer; this one
    /// counts as one of them otherwise.
    fn warm(&mut self, uid: u64) -> Option<usize> {
        let index = match self.forwards.iter().position(|forward| forward.uid == uid) {
            Some(index) => index,
            None => {
                if self.forwards.len() >= KEPT {
                    self.forwards.remove(0);
                }
                self.forwards.push(Forward { uid, tokens: 0, graph: None });
                self.forwards.len() - 1
            }
        };
        let forward = &mut self.forwards[index];
        if forward.tokens < LAYER_BY_LAYER_FIRST {
            forward.tokens += 1;
            return None;
        }
        Some(index)
    }
}

impl Gated {
    fn new(residency: &Residency, plan: &Plan) -> Result<Self> {
        let device = residency.device().expect("slots are on a GPU");
        let tables: Vec<u32> = residency.layers().iter().map(|layer| layer.experts).collect();
        let gates = device.gates(&tables)?;
        let slots = routings(plan).map(|routing| {
            let at = usize::try_from(gates.slots(routing.layer)).expect("addresses have 64 bits");
            let ne = [memory::to_ne(used(routing)), 1, 1];
            // The kind of buffer that kernels expect; nothing is in it.
            let buffer = residency.window(routing.layer, 0, 0, 0).buffer;
            let data = std::ptr::without_provenance_mut(at);
            memory::tensor(buffer.cast(), GGML_TYPE_I32, ne, data)
        });
        Ok(Self {
            slots: slots.collect(),
            stream: device.stream()?,
            map: SlotMap::default(),
            handover: device.mark()?,
            done: device.mark()?,
            backed: Vec::new(),
            gates,
        })
    }

    /// Whether there is memory behind all slots, which is taken now if there is not.
    fn is_backed(&mut self, residency: &Residency) -> Result<bool> {
        let slots = residency.slots();
        if slots == self.backed {
            return Ok(true);
        }
        if !residency.back_all(&slots)? {
            return Ok(false);
        }
        self.backed = slots;
        Ok(true)
    }

    fn capture(
        &mut self,
        (inner, capture): (ggml_backend_t, u64),
        (residency, graph, plan): (&Residency, &ggml_cgraph, &Plan),
        over_slots: &mut OverSlots,
        purpose: Purpose,
    ) -> Result<Captured> {
        let mut parts = Vec::with_capacity(plan.segments.len());
        let weights =
            purpose.records.then(|| Weights::new(inner, graph, plan)).transpose()?.flatten();
        let Self { stream, gates, slots, handover, .. } = self;
        let graph = stream.capture(|| {
            stream.set(handover)?;
            wait(inner, handover);
            for segment in &plan.segments {
                let mut patch = Patch::default();
                if let Some(routing) = &segment.routing {
                    if let Some(weights) = &weights {
                        weights.ask(inner, routing.layer);
                    }
                    record(inner, handover);
                    stream.wait_for_mark(handover)?;
                    let numbers = match purpose.replays {
                        true => gates.given(routing.layer),
                        // SAFETY: a live, allocated tensor of the graph.
                        false => unsafe { (*routing.ids).data.addr() as u64 },
                    };
                    // SAFETY: memory of the context's, or pinned; both outlive the graph, which is
                    // dropped with the executor, before the backend.
                    unsafe {
                        gates.put(stream, routing.layer, numbers, used(routing), LONGEST_WAIT)?;
                    }
                    stream.set(handover)?;
                    wait(inner, handover);
                    over_slots.exchange(
                        residency,
                        graph,
                        routing,
                        &raw mut slots[routing.layer],
                        &mut patch,
                    );
                }
                let Segment { start, end, .. } = *segment;
                parts.push(Part::new(graph, start, end, capture));
                parts.last_mut().expect("just added").compute(inner, graph)?;
            }
            record(inner, handover);
            stream.wait_for_mark(handover)?;
            Ok::<(), Error>(())
        })?;
        Ok(Captured { graph, purpose, weights, _parts: parts })
    }

    /// Waits until the GPU has come to a gate.
    fn wait_for_gate(&self, gate: usize, numbers: &mut Vec<i32>) -> Result<At> {
        let mut looks = 0;
        loop {
            if let Some(at) = self.gates.poll(gate, numbers) {
                return Ok(at);
            }
            looks += 1;
            if looks % LOOKS != 0 {
                hint::spin_loop();
                continue;
            }
            // A lost device comes to no gate.
            if self.done.is_done()? && self.gates.poll(gate, numbers).is_none() {
                return Err(Error::Internal("a token was computed past a gate".into()));
            }
            thread::yield_now();
        }
    }
}

/// The expert layers, in the order of computing.
fn routings(plan: &Plan) -> impl Iterator<Item = &Routing> {
    plan.segments.iter().filter_map(|segment| segment.routing.as_ref())
}

/// Experts that the only token uses.
fn used(routing: &Routing) -> usize {
    // SAFETY: a live tensor of the graph.
    memory::usize_of(unsafe { (*routing.ids).ne[0] })
}

/// Whether gates can stand before all layers of such graphs on this backend's device.
fn can_be_gated(
    inner: ggml_backend_t,
    residency: &Residency,
    graph: &ggml_cgraph,
    plan: &Plan,
) -> bool {
    // SAFETY: a live backend.
    let iface = unsafe { &(*inner).iface };
    let is_simple = |routing: &Routing| {
        // SAFETY: a live tensor of the graph.
        let ids = unsafe { &*routing.ids };
        ids.type_ == GGML_TYPE_I32 && ids.ne[1] == 1 && ids.nb[0] == size_of::<i32>()
    };
    // For one token, of other types ggml-cuda may read the ids back, which cannot be captured
    // (ggml-cuda.cu, `ggml_cuda_mul_mat_id_needs_sync`).
    let can_be_captured = |&node: &*mut ggml_tensor| {
        // SAFETY: a live node of the graph, and its weights.
        unsafe { (*node).op != GGML_OP_MUL_MAT_ID || ggml_is_quantized((*(*node).src[0]).type_) }
    };
    let layers = routings(plan).map(|routing| routing.layer);
    iface.event_record.is_some()
        && iface.event_wait.is_some()
        && residency.device().is_some_and(Device::has_gates)
        && layers.eq(0..residency.layers().len())
        && nodes(graph).iter().all(can_be_captured)
        && routings(plan).all(|routing| is_simple(routing) && used(routing) <= GATE_WIDTH)
}

/// A mark as ggml has its events.
fn event(inner: ggml_backend_t, mark: &Mark) -> ggml_backend_event {
    // SAFETY: a live backend.
    let device = unsafe { (*inner).device };
    ggml_backend_event { device, context: mark.raw().cast::<c_void>() }
}

/// Sets a mark behind what the backend has to compute.
fn record(inner: ggml_backend_t, mark: &Mark) {
    let mut event = event(inner, mark);
    // SAFETY: a live backend, whose event is an event of CUDA's, as `Mark` is; asked for in
    // `can_be_gated`.
    unsafe { (*inner).iface.event_record.expect("asked for")(inner, &raw mut event) };
}

/// Has the backend wait for a mark before it computes what follows.
fn wait(inner: ggml_backend_t, mark: &Mark) {
    let mut event = event(inner, mark);
    // SAFETY: as above.
    unsafe { (*inner).iface.event_wait.expect("asked for")(inner, &raw mut event) };
}

//! The stand-in as a driver: one lock around everything, one thread for each stream.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::collections::HashMap;
use std::ptr::NonNull;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};

use super::Config;
use super::fault::{Fault, Faults};
use super::gate;
use super::memory::{Memory, failure, out_of_memory};
use super::queue::{Call, Op, Queues};
use crate::device;
use crate::driver::gate::{Gate, PLACE};
use crate::driver::{Address, Copy, Driver, Handle, Outcome, RawEvent, RawGraph, RawStream};
use crate::error::{Failure, ILLEGAL_ADDRESS};
use crate::sync::{lock, wait};

const PAGE: usize = 4096;

pub(crate) struct Shared {
    config: Config,
    pub(crate) state: Mutex<State>,
    /// Something in `state` is no longer what it was.
    changed: Condvar,
    threads: Mutex<HashMap<usize, JoinHandle<()>>>,
}

pub(crate) struct State {
    pub(crate) memory: Memory,
    pub(crate) faults: Faults,
    queues: Queues,
    /// Device ranges of the copies that are running.
    running: Vec<(Address, u64)>,
    /// What the device was lost of.
    lost: Option<Failure>,
}

impl Shared {
    pub(crate) fn new(config: Config) -> Self {
        let state = State {
            memory: Memory::new(config.memory_bytes),
            faults: Faults::default(),
            queues: Queues::default(),
            running: Vec::new(),
            lost: None,
        };
        Self {
            config,
            state: Mutex::new(state),
            changed: Condvar::new(),
            threads: Mutex::default(),
        }
    }

    pub(crate) fn hold(&self, stream: RawStream, held: bool) {
        lock(&self.state).queues.stream(stream).held = held;
        self.changed.notify_all();
    }

    /// Changes the state, unless the device is lost, and lets all who wait look again.
    fn change<T>(&self, change: impl FnOnce(&mut State) -> Outcome<T>) -> Outcome<T> {
        let mut state = lock(&self.state);
        state.alive()?;
        let changed = change(&mut state);
        self.changed.notify_all();
        changed
    }

    /// Waits until `ready`, or the device is lost.
    fn wait_until(&self, ready: impl Fn(&mut Queues) -> Outcome<bool>) -> Outcome<()> {
        let mut state = lock(&self.state);
        loop {
            state.alive()?;
            if ready(&mut state.queues)? {
                return Ok(());
            }
            state = wait(&self.changed, state);
        }
    }

    /// Works a stream's queue off, until the stream is ended or the device lost.
    fn work(&self, stream: RawStream) {
        let mut state = lock(&self.state);
        while state.lost.is_none() {
            let Some(op) = state.queues.take(stream) else {
                if state.queues.stream(stream).ended {
                    break;
                }
                state = wait(&self.changed, state);
                continue;
            };
            let started = state.start(&op);
            drop(state);
            if started.is_ok() {
                run(&op, || lock(&self.state).lost.is_some());
            }
            state = lock(&self.state);
            state.finish(stream, &op, started);
            self.changed.notify_all();
            // Outside of the lock: it may be the last that holds something of somebody else's.
            drop(state);
            drop(op);
            state = lock(&self.state);
        }
    }

    pub(crate) fn capture_of(&self, event: RawEvent) -> Option<usize> {
        lock(&self.state).queues.capture_of(event)
    }

    pub(crate) fn is_going_on(&self, capture: usize) -> bool {
        lock(&self.state).queues.is_going_on(capture)
    }

    pub(crate) fn add_call(&self, capture: usize, work: Arc<dyn Fn() + Send + Sync>) {
        lock(&self.state).queues.add_call(capture, Call(work));
    }

    pub(crate) fn set_in(&self, capture: usize, event: RawEvent) {
        lock(&self.state).queues.set_in(capture, event);
    }

    pub(crate) fn set(&self, event: RawEvent) {
        lock(&self.state).queues.set(event);
        self.changed.notify_all();
    }

    pub(crate) fn wait_for_event(&self, event: RawEvent) -> Outcome<()> {
        self.wait_until(|queues| queues.has_come(event))
    }
}

impl State {
    fn alive(&self) -> Outcome<()> {
        self.lost.clone().map_or(Ok(()), Err)
    }

    /// Checks what is to be run, and notes it.
    fn start(&mut self, op: &Op) -> Outcome<()> {
        if matches!(op, Op::Copy { .. }) && self.faults.strikes(Fault::CopyLost) {
            return Err(failure(ILLEGAL_ADDRESS, "ILLEGAL_ADDRESS", "an injected copy error"));
        }
        if let Op::Gate(gate) = op {
            self.check_gate(gate)?;
        }
        let ranges = device_ranges(op);
        ranges.iter().try_for_each(|(at, bytes)| self.memory.check(*at, *bytes))?;
        self.running.extend(ranges);
        Ok(())
    }

    /// Refuses a gate whose numbers, or whose place, are not there.
    fn check_gate(&self, gate: &Gate) -> Outcome<()> {
        let numbers = 4 * u64::from(gate.count);
        if self.memory.check(gate.numbers, numbers).is_err() {
            self.memory.check_pinned(gate.numbers, numbers)?;
        }
        self.memory.check_pinned(gate.host, PLACE as u64)
    }

    fn finish(&mut self, stream: RawStream, op: &Op, started: Outcome<()>) {
        match started {
            Err(failure) => self.lost = Some(failure),
            Ok(()) => {
                for range in device_ranges(op) {
                    let index = self.running.iter().position(|r| *r == range);
                    self.running.swap_remove(index.expect("noted by `start`"));
                }
            }
        }
        self.queues.done(stream, op);
    }

    /// Whether something that runs now uses a part of this.
    fn is_running(&self, at: Address, bytes: u64) -> bool {
        self.running.iter().any(|(start, len)| *start < at + bytes && at < start + len)
    }
}

fn device_ranges(op: &Op) -> Vec<(Address, u64)> {
    match *op {
        Op::Copy { copy: Copy::Up { to, .. }, bytes } => vec![(to, bytes as u64)],
        Op::Copy { copy: Copy::UpRows { to, rows, .. }, .. } => {
            let row = |i| (to + (i * rows.to_pitch) as u64, rows.width as u64);
            (0..rows.count).map(row).collect()
        }
        Op::Copy { copy: Copy::Down { from, .. }, bytes } => vec![(from, bytes as u64)],
        Op::Copy { copy: Copy::Within { from, to }, bytes } => {
            vec![(from, bytes as u64), (to, bytes as u64)]
        }
        Op::Fill { to, bytes, .. } => vec![(to, bytes as u64)],
        Op::Gate(Gate { table, entries, slots, count, passes, .. }) => {
            vec![(table, 4 * u64::from(entries)), (slots, 4 * u64::from(count)), (passes, 16)]
        }
        Op::Record { .. } | Op::Wait { .. } | Op::Call(_) => Vec::new(),
    }
}

/// Does what is to be done outside of the lock. `lost` says whether the device is.
fn run(op: &Op, lost: impl Fn() -> bool) {
    let (from, to, bytes) = match *op {
        Op::Copy { copy: Copy::Up { from, to }, bytes } => (from, to as *mut u8, bytes),
        Op::Copy { copy: Copy::Down { from, to }, bytes } => (from as *const u8, to, bytes),
        Op::Copy { copy: Copy::Within { from, to }, bytes } => {
            (from as *const u8, to as *mut u8, bytes)
        }
        Op::Copy { copy: Copy::UpRows { from, to, rows }, .. } => {
            for i in 0..rows.count {
                let from = from.wrapping_add(i * rows.from_pitch);
                let to = (to as *mut u8).wrapping_add(i * rows.to_pitch);
                // SAFETY: as below, for each row.
                unsafe { std::ptr::copy(from, to, rows.width) };
            }
            return;
        }
        Op::Fill { to, bytes, value } => {
            // SAFETY: `start` has seen memory there, and lets nobody unmap it meanwhile.
            return unsafe { (to as *mut u8).write_bytes(value, bytes) };
        }
        // SAFETY: `start` has seen memory there. It is used as the contract says by the host's side,
        // and by gates, which come one after the other.
        Op::Gate(ref gate) => return unsafe { gate::run(gate, lost) },
        Op::Call(ref call) => return call.0(),
        Op::Record { .. } | Op::Wait { .. } => return,
    };
    // SAFETY: for the device's side as above, for the host's by the driver's contract. Both sides
    // may overlap.
    unsafe { std::ptr::copy(from, to, bytes) };
}

fn host_layout(bytes: usize) -> Outcome<Layout> {
    Layout::from_size_align(bytes, PAGE).map_err(|_| out_of_memory())
}

impl Driver for Arc<Shared> {
    fn memory(&self) -> Outcome<device::Memory> {
        self.change(|state| Ok(state.memory.free()))
    }

    fn as_current(&self, call: &mut dyn FnMut()) -> Outcome<()> {
        self.change(|_| Ok(()))?;
        call();
        Ok(())
    }

    fn pin(&self, bytes: usize) -> Outcome<NonNull<u8>> {
        let layout = host_layout(bytes)?;
        self.change(|state| {
            if bytes == 0 || state.faults.strikes(Fault::PinRefused) {
                return Err(out_of_memory());
            }
            // SAFETY: a layout of more than no bytes.
            let base = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(out_of_memory)?;
            state.memory.pin(base, bytes)?;
            Ok(base)
        })
    }

    unsafe fn unpin(&self, base: NonNull<u8>, bytes: usize) {
        lock(&self.state).memory.unpin(base);
        let layout = host_layout(bytes).expect("as in `pin`");
        // SAFETY: from `pin`, with the same layout.
        unsafe { dealloc(base.as_ptr(), layout) };
    }

    unsafe fn register(&self, base: NonNull<u8>, bytes: usize) -> Outcome<()> {
        self.change(|state| {
            if state.faults.strikes(Fault::PinRefused) {
                return Err(out_of_memory());
            }
            state.memory.pin(base, bytes)
        })
    }

    unsafe fn unregister(&self, base: NonNull<u8>) {
        lock(&self.state).memory.unpin(base);
    }

    fn allocate(&self, bytes: u64) -> Outcome<Address> {
        self.change(|state| match state.faults.strikes(Fault::OutOfMemory) {
            true => Err(out_of_memory()),
            false => state.memory.allocate(bytes),
        })
    }

    unsafe fn free(&self, at: Address) {
        let mut state = lock(&self.state);
        // What a lost device works on stays, as with CUDA.
        if state.alive().is_ok() {
            state.memory.release(at);
        }
    }

    fn granularity(&self) -> Outcome<u64> {
        Ok(self.config.granularity)
    }

    fn reserve(&self, bytes: u64) -> Outcome<Address> {
        self.change(|state| state.memory.reserve(bytes))
    }

    unsafe fn unreserve(&self, at: Address, _bytes: u64) {
        lock(&self.state).memory.unreserve(at);
    }

    fn create(&self, bytes: u64) -> Outcome<Handle> {
        self.change(|state| match state.faults.strikes(Fault::OutOfMemory) {
            true => Err(out_of_memory()),
            false => state.memory.create(bytes),
        })
    }

    unsafe fn destroy(&self, handle: Handle) {
        lock(&self.state).memory.destroy(handle);
    }

    unsafe fn map(&self, at: Address, bytes: u64, handle: Handle) -> Outcome<()> {
        self.change(|state| match state.faults.strikes(Fault::MapRefused) {
            true => Err(failure(205, "MAP_FAILED", "mapping of buffer object failed")),
            false => state.memory.map(at, bytes, handle),
        })
    }

    unsafe fn unmap(&self, at: Address, bytes: u64) -> Outcome<()> {
        self.change(|state| {
            assert!(!state.is_running(at, bytes), "unmapped under a copy");
            state.memory.unmap(at, bytes)
        })
    }

    fn stream(&self) -> Outcome<RawStream> {
        let stream = self.change(|state| Ok(state.queues.new_stream()))?;
        let shared = Arc::clone(self);
        let thread = thread::Builder::new().name("stand-in stream".to_owned());
        let thread = thread.spawn(move || shared.work(stream)).map_err(|_| out_of_memory())?;
        lock(&self.threads).insert(stream.0, thread);
        Ok(stream)
    }

    unsafe fn end_stream(&self, stream: RawStream) {
        lock(&self.state).queues.stream(stream).ended = true;
        self.changed.notify_all();
        let thread = lock(&self.threads).remove(&stream.0);
        thread.expect("ended once").join().expect("a stream's thread does not panic");
        let queue = lock(&self.state).queues.forget_stream(stream);
        drop(queue);
    }

    unsafe fn copy(&self, stream: RawStream, copy: Copy, bytes: usize) -> Outcome<()> {
        self.change(|state| {
            if state.faults.strikes(Fault::CopyRefused) {
                return Err(failure(1, "INVALID_VALUE", "an injected refusal"));
            }
            state.queues.push(stream, Op::Copy { copy, bytes });
            Ok(())
        })
    }

    unsafe fn fill(&self, stream: RawStream, to: Address, bytes: usize, value: u8) -> Outcome<()> {
        self.change(|state| {
            state.queues.push(stream, Op::Fill { to, bytes, value });
            Ok(())
        })
    }

    unsafe fn synchronize(&self, stream: RawStream) -> Outcome<()> {
        // CUDA promises nothing of what others queue meanwhile.
        let end = self.change(|state| {
            state.queues.check_not_captured(stream)?;
            Ok(state.queues.stream(stream).end())
        })?;
        self.wait_until(|queues| Ok(queues.has_done(stream, end)))
    }

    fn event(&self) -> Outcome<RawEvent> {
        self.change(|state| Ok(state.queues.new_event()))
    }

    unsafe fn end_event(&self, event: RawEvent) {
        lock(&self.state).queues.end_event(event);
    }

    unsafe fn record(&self, event: RawEvent, stream: RawStream) -> Outcome<()> {
        self.change(|state| {
            let fault = state.faults.next(|fault| matches!(fault, Fault::LateEvent { .. }));
            let late = match fault {
                Some(Fault::LateEvent { queries }) => queries,
                _ => 0,
            };
            state.queues.record(event, stream, late);
            Ok(())
        })
    }

    unsafe fn wait_on(&self, stream: RawStream, event: RawEvent) -> Outcome<()> {
        self.change(|state| state.queues.wait_on(stream, event))
    }

    unsafe fn is_done(&self, event: RawEvent) -> Outcome<bool> {
        self.change(|state| state.queues.is_seen(event))
    }

    unsafe fn wait_for(&self, event: RawEvent) -> Outcome<()> {
        self.wait_for_event(event)
    }

    unsafe fn begin_capture(&self, stream: RawStream) -> Outcome<()> {
        self.change(|state| match state.faults.strikes(Fault::CaptureRefused) {
            true => Err(failure(1, "INVALID_VALUE", "an injected refusal")),
            false => state.queues.begin_capture(stream),
        })
    }

    unsafe fn end_capture(&self, stream: RawStream) -> Outcome<RawGraph> {
        let (ended, lost) = {
            let mut state = lock(&self.state);
            (state.queues.end_capture(stream), state.alive())
        };
        lost.and(ended)
    }

    unsafe fn abandon_capture(&self, stream: RawStream) {
        let mut state = lock(&self.state);
        if let Ok(graph) = state.queues.end_capture(stream) {
            let ops = state.queues.end_graph(graph);
            drop(state);
            drop(ops);
        }
    }

    unsafe fn launch(&self, graph: RawGraph, stream: RawStream) -> Outcome<()> {
        self.change(|state| {
            if state.faults.strikes(Fault::LaunchRefused) {
                return Err(failure(1, "INVALID_VALUE", "an injected refusal"));
            }
            state.queues.launch(graph, stream);
            Ok(())
        })
    }

    unsafe fn end_graph(&self, graph: RawGraph) {
        let ops = lock(&self.state).queues.end_graph(graph);
        drop(ops);
    }

    fn has_gates(&self) -> Outcome<bool> {
        Ok(true)
    }

    fn prepare_gates(&self) -> Outcome<()> {
        self.change(|_| Ok(()))
    }

    unsafe fn gate(&self, stream: RawStream, gate: Gate) -> Outcome<()> {
        self.change(|state| {
            state.queues.push(stream, Op::Gate(gate));
            Ok(())
        })
    }
}

//! The stand-in's streams and events: queues, and how far they have come.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fmt;
use std::sync::Arc;

use super::memory::failure;
use crate::driver::gate::Gate;
use crate::driver::{Copy, Outcome, RawEvent, RawGraph, RawStream};
use crate::error::Failure;

/// One thing for a stream to do.
#[derive(Debug, Clone)]
pub(crate) enum Op {
    Copy {
        copy: Copy,
        bytes: usize,
    },
    Fill {
        to: u64,
        bytes: usize,
        value: u8,
    },
    /// The event comes for the `turn`th time.
    Record {
        event: usize,
        turn: u64,
        late: u32,
    },
    /// Goes on when it has come so often.
    Wait {
        event: usize,
        turn: u64,
    },
    Gate(Gate),
    /// Captured work of somebody else.
    Call(Call),
}

// SAFETY: addresses of memory that, by the driver's contract, is left alone until the copy is done;
// the stream's thread is the one that copies. Calls may come from any thread.
unsafe impl Send for Op {}

#[derive(Clone)]
pub(crate) struct Call(pub(crate) Arc<dyn Fn() + Send + Sync>);

impl fmt::Debug for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Call")
    }
}

#[derive(Debug, Default)]
pub(crate) struct Queue {
    ops: VecDeque<Op>,
    /// Number of operations that were ever done.
    done: u64,
    /// An operation has left `ops` and is not done.
    running: bool,
    pub(crate) held: bool,
    pub(crate) ended: bool,
    /// The capture that it is part of.
    capture: Option<usize>,
}

impl Queue {
    /// How many operations are done when all that are queued now are.
    pub(crate) fn end(&self) -> u64 {
        self.done + u64::from(self.running) + self.ops.len() as u64
    }
}

/// An event is recorded again and again in CUDA; who asks or waits means the last time.
#[derive(Debug, Default)]
struct Event {
    recorded: u64,
    done: u64,
    /// Queries that are still to be answered with "not yet".
    late: u32,
    /// Gone for the program; streams may wait for it still.
    ended: bool,
    /// Recorded last in this capture, by this stream.
    captured: Option<(usize, usize)>,
}

/// A capture that is going on. What is captured stands in the order in which it was queued, which no
/// waiting contradicts.
#[derive(Debug)]
struct Capture {
    ops: Vec<Op>,
    /// The stream that it was begun on.
    origin: usize,
    /// Streams in it that have done something which the others do not wait for yet.
    open: HashSet<usize>,
    /// Something was asked for that no capture can take.
    invalid: bool,
}

/// In place of a stream: all that the stand-in does not know.
const FOREIGN: usize = 0;

#[derive(Debug)]
struct Graph {
    ops: Vec<Op>,
    /// Its last launch is done.
    done: RawEvent,
}

#[derive(Debug, Default)]
pub(crate) struct Queues {
    streams: HashMap<usize, Queue>,
    events: HashMap<usize, Event>,
    captures: HashMap<usize, Capture>,
    graphs: HashMap<usize, Graph>,
    next: usize,
}

const ALIVE: &str = "streams and events are used while they are alive";

impl Queues {
    pub(crate) fn new_stream(&mut self) -> RawStream {
        self.next += 1;
        self.streams.insert(self.next, Queue::default());
        RawStream(self.next)
    }

    pub(crate) fn new_event(&mut self) -> RawEvent {
        self.next += 1;
        self.events.insert(self.next, Event::default());
        RawEvent(self.next)
    }

    pub(crate) fn stream(&mut self, stream: RawStream) -> &mut Queue {
        self.streams.get_mut(&stream.0).expect(ALIVE)
    }

    /// What is left to do is given back, to be dropped outside of the lock.
    pub(crate) fn forget_stream(&mut self, stream: RawStream) -> Option<Queue> {
        let queue = self.streams.remove(&stream.0);
        self.forget_events();
        queue
    }

    fn event(&mut self, event: RawEvent) -> &mut Event {
        self.events.get_mut(&event.0).expect(ALIVE)
    }

    pub(crate) fn end_event(&mut self, event: RawEvent) {
        self.event(event).ended = true;
        self.forget_events();
    }

    /// Forgets the events that are gone and that no queue names.
    fn forget_events(&mut self) {
        let Self { streams, events, .. } = self;
        if !events.values().any(|event| event.ended) {
            return;
        }
        let ops = || streams.values().flat_map(|queue| &queue.ops);
        let named = |id: usize| {
            ops().any(|op| {
                matches!(op, Op::Record { event, .. } | Op::Wait { event, .. } if *event == id)
            })
        };
        events.retain(|id, event| !event.ended || named(*id));
    }

    /// Puts something behind what the stream has to do, or captures it.
    pub(crate) fn push(&mut self, stream: RawStream, op: Op) {
        match self.capture_on(stream) {
            Some(id) => self.add(id, stream.0, op),
            None => self.stream(stream).ops.push_back(op),
        }
    }

    pub(crate) fn record(&mut self, event: RawEvent, stream: RawStream, late: u32) {
        let capture = self.capture_on(stream);
        if let Some(id) = capture {
            return self.record_in(id, event, stream.0);
        }
        let event_of = self.event(event);
        event_of.captured = None;
        event_of.recorded += 1;
        let turn = event_of.recorded;
        self.push(stream, Op::Record { event: event.0, turn, late });
    }

    /// What somebody else has recorded, and what has come already.
    pub(crate) fn set(&mut self, event: RawEvent) {
        let event = self.event(event);
        event.captured = None;
        event.recorded += 1;
        event.done = event.recorded;
    }

    pub(crate) fn wait_on(&mut self, stream: RawStream, event: RawEvent) -> Outcome<()> {
        let within = self.capture_on(stream);
        let Some((id, by)) = self.event(event).captured else {
            if let Some(capture) = within.and_then(|id| self.captures.get_mut(&id)) {
                capture.invalid = true;
                let text = "a captured stream cannot wait for what is not captured";
                return Err(failure(905, "STREAM_CAPTURE_ISOLATION", text));
            }
            let turn = self.event(event).recorded;
            self.push(stream, Op::Wait { event: event.0, turn });
            return Ok(());
        };
        let Some(capture) = self.captures.get_mut(&id) else { return Err(captured_event()) };
        if within.is_some_and(|within| within != id) {
            let text = "streams of two captures cannot wait for each other";
            return Err(failure(902, "STREAM_CAPTURE_MERGE", text));
        }
        if by != stream.0 {
            capture.open.remove(&by);
        }
        if stream.0 != capture.origin {
            capture.open.insert(stream.0);
        }
        self.stream(stream).capture = Some(id);
        Ok(())
    }

    /// The capture that a stream is part of.
    pub(crate) fn capture_on(&mut self, stream: RawStream) -> Option<usize> {
        self.stream(stream).capture
    }

    /// The capture that an event was recorded in last, if it is going on.
    pub(crate) fn capture_of(&mut self, event: RawEvent) -> Option<usize> {
        let (id, _) = self.event(event).captured?;
        self.is_going_on(id).then_some(id)
    }

    pub(crate) fn is_going_on(&self, id: usize) -> bool {
        self.captures.contains_key(&id)
    }

    fn add(&mut self, id: usize, by: usize, op: Op) {
        let Some(capture) = self.captures.get_mut(&id) else { return };
        capture.ops.push(op);
        if by != capture.origin {
            capture.open.insert(by);
        }
    }

    pub(crate) fn add_call(&mut self, id: usize, call: Call) {
        self.add(id, FOREIGN, Op::Call(call));
    }

    fn record_in(&mut self, id: usize, event: RawEvent, by: usize) {
        self.event(event).captured = Some((id, by));
    }

    /// Sets an event of somebody else in a capture.
    pub(crate) fn set_in(&mut self, id: usize, event: RawEvent) {
        self.record_in(id, event, FOREIGN);
    }

    pub(crate) fn begin_capture(&mut self, stream: RawStream) -> Outcome<()> {
        if self.capture_on(stream).is_some() {
            return Err(failure(401, "ILLEGAL_STATE", "the stream is being captured"));
        }
        self.next += 1;
        let (ops, open) = (Vec::new(), HashSet::new());
        let capture = Capture { ops, origin: stream.0, open, invalid: false };
        self.captures.insert(self.next, capture);
        self.stream(stream).capture = Some(self.next);
        Ok(())
    }

    pub(crate) fn end_capture(&mut self, stream: RawStream) -> Outcome<RawGraph> {
        let id = self.capture_on(stream);
        let Some(capture) = id.and_then(|id| self.captures.remove(&id)) else {
            return Err(failure(401, "ILLEGAL_STATE", "the stream is not being captured"));
        };
        self.streams
            .values_mut()
            .filter(|queue| queue.capture == id)
            .for_each(|queue| queue.capture = None);
        if capture.invalid {
            let text = "something was asked for that cannot be captured";
            return Err(failure(901, "STREAM_CAPTURE_INVALIDATED", text));
        }
        if !capture.open.is_empty() {
            let text = "a stream does something that the first one does not wait for";
            return Err(failure(904, "STREAM_CAPTURE_UNJOINED", text));
        }
        let done = self.new_event();
        self.next += 1;
        self.graphs.insert(self.next, Graph { ops: capture.ops, done });
        Ok(RawGraph(self.next))
    }

    /// Refuses what makes a capture of the stream invalid.
    pub(crate) fn check_not_captured(&mut self, stream: RawStream) -> Outcome<()> {
        let id = self.capture_on(stream);
        let Some(capture) = id.and_then(|id| self.captures.get_mut(&id)) else { return Ok(()) };
        capture.invalid = true;
        let text = "not while the stream is being captured";
        Err(failure(900, "STREAM_CAPTURE_UNSUPPORTED", text))
    }

    pub(crate) fn launch(&mut self, graph: RawGraph, stream: RawStream) {
        let Graph { ops, done } = self.graphs.get(&graph.0).expect(ALIVE);
        let (ops, done) = (ops.clone(), *done);
        let turn = self.event(done).recorded;
        self.push(stream, Op::Wait { event: done.0, turn });
        ops.into_iter().for_each(|op| self.push(stream, op));
        self.record(done, stream, 0);
    }

    pub(crate) fn end_graph(&mut self, graph: RawGraph) -> Vec<Op> {
        let graph = self.graphs.remove(&graph.0).expect(ALIVE);
        self.end_event(graph.done);
        graph.ops
    }

    /// The next thing for a stream to do now, which is taken out of its queue.
    pub(crate) fn take(&mut self, stream: RawStream) -> Option<Op> {
        let queue = self.streams.get(&stream.0)?;
        let next = queue.ops.front().filter(|_| !queue.held)?;
        if let Op::Wait { event, turn } = *next
            && self.events.get(&event).is_some_and(|event| event.done < turn)
        {
            return None;
        }
        let queue = self.stream(stream);
        let op = queue.ops.pop_front()?;
        queue.running = true;
        Some(op)
    }

    /// Notes that what `take` gave is done.
    pub(crate) fn done(&mut self, stream: RawStream, op: &Op) {
        let queue = self.stream(stream);
        queue.running = false;
        queue.done += 1;
        if let Op::Record { event, turn, late } = *op
            && let Some(event) = self.events.get_mut(&event)
        {
            event.done = event.done.max(turn);
            event.late = late;
        }
        self.forget_events();
    }

    /// Whether a stream has done so many operations.
    pub(crate) fn has_done(&mut self, stream: RawStream, count: u64) -> bool {
        self.stream(stream).done >= count
    }

    /// Whether an event has come.
    pub(crate) fn has_come(&mut self, event: RawEvent) -> Outcome<bool> {
        let event = self.event(event);
        if event.captured.is_some() {
            return Err(captured_event());
        }
        Ok(event.done >= event.recorded)
    }

    /// Whether an event is seen to have come; a late one only after some queries.
    pub(crate) fn is_seen(&mut self, event: RawEvent) -> Outcome<bool> {
        let come = self.has_come(event)?;
        let late = &mut self.event(event).late;
        if come && *late > 0 {
            *late -= 1;
            return Ok(false);
        }
        Ok(come)
    }
}

fn captured_event() -> Failure {
    failure(907, "CAPTURED_EVENT", "the event was recorded in a capture")
}

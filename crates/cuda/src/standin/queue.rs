//! The stand-in's streams and events: queues, and how far they have come.

use std::collections::{HashMap, VecDeque};

use crate::driver::{Copy, RawEvent, RawStream};

/// One thing for a stream to do.
#[derive(Debug, Clone, Copy)]
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
}

// SAFETY: addresses of memory that, by the driver's contract, is left alone until the copy is done;
// the stream's thread is the one that copies.
unsafe impl Send for Op {}

#[derive(Debug, Default)]
pub(crate) struct Queue {
    ops: VecDeque<Op>,
    /// Number of operations that were ever done.
    done: u64,
    /// An operation has left `ops` and is not done.
    running: bool,
    pub(crate) held: bool,
    pub(crate) ended: bool,
}

impl Queue {
    pub(crate) fn push(&mut self, op: Op) {
        self.ops.push_back(op);
    }

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
}

#[derive(Debug, Default)]
pub(crate) struct Queues {
    streams: HashMap<usize, Queue>,
    events: HashMap<usize, Event>,
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

    pub(crate) fn forget_stream(&mut self, stream: RawStream) {
        self.streams.remove(&stream.0);
        self.forget_events();
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
        let ops = || streams.values().flat_map(|queue| &queue.ops);
        let named = |id: usize| {
            ops().any(|op| {
                matches!(op, Op::Record { event, .. } | Op::Wait { event, .. } if *event == id)
            })
        };
        events.retain(|id, event| !event.ended || named(*id));
    }

    pub(crate) fn record(&mut self, event: RawEvent, stream: RawStream, late: u32) {
        let turn = {
            let event = self.event(event);
            event.recorded += 1;
            event.recorded
        };
        self.stream(stream).push(Op::Record { event: event.0, turn, late });
    }

    pub(crate) fn wait_on(&mut self, stream: RawStream, event: RawEvent) {
        let turn = self.event(event).recorded;
        self.stream(stream).push(Op::Wait { event: event.0, turn });
    }

    /// The next thing for a stream to do now, which is taken out of its queue.
    pub(crate) fn take(&mut self, stream: RawStream) -> Option<Op> {
        let queue = self.streams.get(&stream.0)?;
        let op = *queue.ops.front().filter(|_| !queue.held)?;
        if let Op::Wait { event, turn } = op
            && self.events.get(&event).is_some_and(|event| event.done < turn)
        {
            return None;
        }
        let queue = self.stream(stream);
        queue.ops.pop_front();
        queue.running = true;
        Some(op)
    }

    /// Notes that what `take` gave is done.
    pub(crate) fn done(&mut self, stream: RawStream, op: Op) {
        let queue = self.stream(stream);
        queue.running = false;
        queue.done += 1;
        if let Op::Record { event, turn, late } = op
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
    pub(crate) fn has_come(&mut self, event: RawEvent) -> bool {
        let event = self.event(event);
        event.done >= event.recorded
    }

    /// Whether an event is seen to have come; a late one only after some queries.
    pub(crate) fn is_seen(&mut self, event: RawEvent) -> bool {
        let come = self.has_come(event);
        let late = &mut self.event(event).late;
        if come && *late > 0 {
            *late -= 1;
            return false;
        }
        come
    }
}

//! Streams that wait for each other's events do what one stream would do.

mod support;

use proptest::prelude::*;
use support::{everywhere, read};
use tierstream_cuda::standin::{Config, Held, StandIn};
use tierstream_cuda::{Block, Device, Event, Span, Stream};

const STREAMS: usize = 3;
const CELLS: usize = 5;
const CELL_BYTES: usize = 3000;

#[derive(Debug, Clone, Copy)]
enum Work {
    Upload { to: usize, value: u8 },
    Fill { to: usize, value: u8 },
    Copy { from: usize, to: usize },
}

#[derive(Debug, Clone, Copy)]
enum Op {
    Work {
        stream: usize,
        work: Work,
    },
    /// Of the stand-in's streams.
    Hold(usize),
    Release(usize),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let (stream, cell) = (0..STREAMS, 0..CELLS);
    let work = prop_oneof![
        (cell.clone(), any::<u8>()).prop_map(|(to, value)| Work::Upload { to, value }),
        (cell.clone(), any::<u8>()).prop_map(|(to, value)| Work::Fill { to, value }),
        (cell.clone(), cell)
            .prop_filter("onto itself", |(from, to)| from != to)
            .prop_map(|(from, to)| Work::Copy { from, to }),
    ];
    let op = prop_oneof![
        6 => (stream.clone(), work).prop_map(|(stream, work)| Op::Work { stream, work }),
        1 => stream.clone().prop_map(Op::Hold),
        1 => stream.prop_map(Op::Release),
    ];
    prop::collection::vec(op, 1..60)
}

/// What has to come before the next that reads or writes a cell: events, by number.
#[derive(Default, Clone)]
struct Cell {
    written: Option<usize>,
    read: Vec<usize>,
}

struct Run {
    streams: Vec<Stream>,
    block: Block,
    cells: Vec<Cell>,
    events: Vec<Event>,
}

impl Run {
    fn new(device: &Device) -> Self {
        let block = device.allocate((CELLS * CELL_BYTES) as u64).unwrap();
        let streams: Vec<Stream> = (0..STREAMS).map(|_| device.stream().unwrap()).collect();
        streams[0].fill(block.span(0, block.bytes()).unwrap(), 0).unwrap();
        let start = streams[0].record().unwrap();
        let cells = vec![Cell { written: Some(0), read: Vec::new() }; CELLS];
        Self { streams, block, cells, events: vec![start] }
    }

    fn cell(&self, cell: usize) -> Span {
        self.block.span((cell * CELL_BYTES) as u64, CELL_BYTES as u64).unwrap()
    }

    fn queue(&mut self, stream: usize, work: Work) {
        let (from, to) = match work {
            Work::Upload { to, .. } | Work::Fill { to, .. } => (None, to),
            Work::Copy { from, to } => (Some(from), to),
        };
        let mut before: Vec<usize> = self.cells[to].read.clone();
        before.extend(self.cells[to].written);
        before.extend(from.and_then(|from| self.cells[from].written));
        let queue = &self.streams[stream];
        before.iter().for_each(|event| queue.wait_for(&self.events[*event]).unwrap());
        match work {
            Work::Upload { value, .. } => queue.upload(vec![value; CELL_BYTES], self.cell(to)),
            Work::Fill { value, .. } => queue.fill(self.cell(to), value),
            Work::Copy { from, .. } => queue.copy_within(self.cell(from), self.cell(to)),
        }
        .unwrap();
        let number = self.events.len();
        self.events.push(queue.record().unwrap());
        if let Some(from) = from {
            self.cells[from].read.push(number);
        }
        self.cells[to] = Cell { written: Some(number), read: Vec::new() };
    }
}

/// What the cells are full of when everything is done in order.
fn serial(ops: &[Op]) -> [u8; CELLS] {
    let mut cells = [0; CELLS];
    for op in ops {
        match *op {
            Op::Work { work: Work::Upload { to, value } | Work::Fill { to, value }, .. } => {
                cells[to] = value;
            }
            Op::Work { work: Work::Copy { from, to }, .. } => cells[to] = cells[from],
            Op::Hold(_) | Op::Release(_) => {}
        }
    }
    cells
}

fn check(device: &Device, standin: Option<&StandIn>, ops: &[Op]) {
    let mut run = Run::new(device);
    // After `run`, so that streams are released before they are dropped.
    let mut held: [Option<Held>; STREAMS] = [const { None }; STREAMS];
    for op in ops {
        match (*op, standin) {
            (Op::Work { stream, work }, _) => run.queue(stream, work),
            (Op::Hold(stream), Some(standin)) => {
                held[stream].get_or_insert_with(|| standin.hold(&run.streams[stream]));
            }
            (Op::Release(stream), _) => held[stream] = None,
            (Op::Hold(_), None) => {}
        }
    }
    drop(held);
    run.streams.iter().for_each(|stream| stream.synchronize().unwrap());
    let expected = serial(ops);
    for (cell, value) in expected.iter().enumerate() {
        assert!(read(device, run.cell(cell)).iter().all(|b| b == value), "cell {cell}");
    }
    assert!(run.streams.iter().all(|stream| stream.pending() == 0));
    assert!(run.events.iter().all(|event| event.is_done().unwrap()));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn held_streams_change_no_result(ops in ops()) {
        let standin = StandIn::new(Config::default()).unwrap();
        check(&standin.device(), Some(&standin), &ops);
    }

    #[test]
    fn every_device_keeps_the_order(ops in ops()) {
        everywhere(|device| check(device, None, &ops));
    }
}

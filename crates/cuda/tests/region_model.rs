//! A region against a naive model of it: any order of growing, shrinking, using and failing.

mod support;

use proptest::prelude::*;
use support::{everywhere, read, write};
use tierstream_cuda::standin::{Config, Fault, StandIn};
use tierstream_cuda::{Device, Error, Region, Span, Stream};

const GRANULES: usize = 8;

/// Granules that the stand-in has memory for.
const ROOM: usize = 6;

#[derive(Debug, Clone)]
enum Op {
    Map(usize),
    Unmap(usize),
    Resize(usize),
    /// Writes a byte all over a granule.
    Write(usize, u8),
    /// Takes a span over a seam, or within a granule.
    Hold {
        granule: usize,
        two: bool,
    },
    /// Drops the oldest span.
    Drop,
    /// The next but so many is out of memory, or not mapped.
    Fail {
        map: bool,
        after: u64,
    },
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let granule = 0..GRANULES;
    let op = prop_oneof![
        4 => granule.clone().prop_map(Op::Map),
        3 => granule.clone().prop_map(Op::Unmap),
        3 => (0..=GRANULES).prop_map(Op::Resize),
        4 => (granule.clone(), any::<u8>()).prop_map(|(g, value)| Op::Write(g, value)),
        2 => (granule, any::<bool>()).prop_map(|(granule, two)| Op::Hold { granule, two }),
        2 => Just(Op::Drop),
        1 => (any::<bool>(), 0..3u64).prop_map(|(map, after)| Op::Fail { map, after }),
    ];
    prop::collection::vec(op, 1..60)
}

/// What a region should be.
#[derive(Default)]
struct Model {
    /// What the granule is full of, if anyone has written there.
    mapped: [Option<Option<u8>>; GRANULES],
    /// First and last granule of each span.
    held: Vec<(usize, usize)>,
    /// Granules that there is memory for; no limit for a GPU.
    room: Option<usize>,
    /// Operations until they fail: taking memory, mapping it.
    failures: [Vec<u64>; 2],
}

#[derive(Debug, PartialEq)]
enum Outcome {
    Done,
    Failed,
    Busy(usize),
}

impl Model {
    fn count(&self) -> usize {
        self.mapped.iter().flatten().count()
    }

    fn is_held(&self, granule: usize) -> bool {
        self.held.iter().any(|(first, last)| (*first..=*last).contains(&granule))
    }

    /// Whether an operation of this kind fails.
    fn fails(&mut self, kind: usize) -> bool {
        let due = self.failures[kind].contains(&0);
        self.failures[kind].retain(|left| *left > 0);
        self.failures[kind].iter_mut().for_each(|left| *left -= 1);
        due
    }

    fn map(&mut self, granule: usize) -> Outcome {
        if self.mapped[granule].is_some() {
            return Outcome::Done;
        }
        if self.fails(0) || self.room.is_some_and(|room| self.count() >= room) || self.fails(1) {
            return Outcome::Failed;
        }
        self.mapped[granule] = Some(None);
        Outcome::Done
    }

    fn unmap(&mut self, granule: usize) -> Outcome {
        if self.is_held(granule) {
            return Outcome::Busy(granule);
        }
        self.mapped[granule] = None;
        Outcome::Done
    }

    fn resize(&mut self, count: usize) -> Outcome {
        if let Some(granule) = (count..GRANULES).find(|granule| self.is_held(*granule)) {
            return Outcome::Busy(granule);
        }
        let before = self.mapped;
        for granule in 0..count {
            if self.map(granule) != Outcome::Done {
                self.mapped = before;
                return Outcome::Failed;
            }
        }
        self.mapped[count..].fill(None);
        Outcome::Done
    }
}

fn outcome(result: Result<(), Error>) -> Outcome {
    match result {
        Ok(()) => Outcome::Done,
        Err(Error::Busy { granule }) => Outcome::Busy(granule),
        Err(Error::OutOfMemory { .. } | Error::Driver { .. }) => Outcome::Failed,
        Err(error) => panic!("{error}"),
    }
}

struct Real<'a> {
    device: &'a Device,
    stream: Stream,
    region: Region,
    held: Vec<Span>,
}

impl Real<'_> {
    fn granule(&self, granule: usize) -> Result<Span, Error> {
        let size = self.region.granule_bytes();
        self.region.span(granule as u64 * size, size)
    }

    fn hold(&mut self, first: usize, last: usize) -> bool {
        let size = self.region.granule_bytes();
        let (start, end) = (first as u64 * size + 1, (last as u64 + 1) * size - 1);
        self.region.span(start, end - start).map(|span| self.held.push(span)).is_ok()
    }
}

/// Does `ops` to a region of `device` and to the model, and compares after each.
fn check(device: &Device, standin: Option<&StandIn>, ops: Vec<Op>) {
    let granularity = device.granularity().unwrap();
    let region = device.reserve(GRANULES as u64 * granularity, granularity).unwrap();
    let stream = device.stream().unwrap();
    let mut real = Real { device, stream, region, held: Vec::new() };
    let mut model = Model { room: standin.map(|_| ROOM), ..Model::default() };
    for op in ops {
        match op {
            Op::Map(granule) => {
                assert_eq!(outcome(real.region.map(granule)), model.map(granule));
            }
            Op::Unmap(granule) => {
                assert_eq!(outcome(real.region.unmap(granule)), model.unmap(granule));
            }
            Op::Resize(count) => {
                assert_eq!(outcome(real.region.resize(count)), model.resize(count));
            }
            Op::Write(granule, value) => {
                match (&mut model.mapped[granule], real.granule(granule)) {
                    (Some(content), Ok(span)) => {
                        *content = Some(value);
                        let bytes = vec![value; span.bytes() as usize];
                        write(&real.stream, span, bytes);
                    }
                    (None, Err(Error::Range { .. })) => {}
                    (model, real) => panic!("{model:?} and {real:?}"),
                }
            }
            Op::Hold { granule, two } => {
                let last = (granule + usize::from(two)).min(GRANULES - 1);
                let mapped = model.mapped[granule..=last].iter().all(Option::is_some);
                assert_eq!(real.hold(granule, last), mapped);
                if mapped {
                    model.held.push((granule, last));
                }
            }
            Op::Drop if model.held.is_empty() => {}
            Op::Drop => {
                model.held.remove(0);
                drop(real.held.remove(0));
            }
            Op::Fail { map, after } => {
                let Some(standin) = standin else { continue };
                standin.inject(if map { Fault::MapRefused } else { Fault::OutOfMemory }, after);
                model.failures[usize::from(map)].push(after);
            }
        }
        compare(&real, &model, standin.is_some());
    }
    drop(real);
    if standin.is_some() {
        let memory = device.memory().unwrap();
        assert_eq!(memory.free_bytes, memory.total_bytes);
    }
}

fn compare(real: &Real<'_>, model: &Model, counted: bool) {
    let bytes = model.count() as u64 * real.region.granule_bytes();
    assert_eq!(real.region.mapped_bytes(), bytes);
    if counted {
        let memory = real.device.memory().unwrap();
        assert_eq!(memory.total_bytes - memory.free_bytes, bytes);
    }
    for (granule, content) in model.mapped.iter().enumerate() {
        assert_eq!(real.region.is_mapped(granule), content.is_some());
        if let Some(Some(value)) = content {
            let span = real.granule(granule).unwrap();
            assert!(read(real.device, span).iter().all(|b| b == value), "granule {granule}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_stand_in_is_like_the_model(ops in ops()) {
        let config = Config { memory_bytes: ROOM as u64 * 8192, granularity: 8192 };
        let standin = StandIn::new(config).unwrap();
        check(&standin.device(), Some(&standin), ops);
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 16,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn every_device_is_like_the_model(ops in ops()) {
        everywhere(|device| check(device, None, ops.clone()));
    }
}

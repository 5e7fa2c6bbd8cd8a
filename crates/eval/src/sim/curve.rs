//! Hit rates of pools of several sizes.

use std::num::NonZero;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use serde::ser::{Serialize, SerializeStruct, Serializer};

use super::{Counting, Eviction, PoolKind, Setup, Size, Steps, bytes, direct, queues, stack};
use crate::error::{Error, Result};
use crate::header::Header;
use crate::trace::Trace;

/// Hit rates of one policy.
#[derive(Debug, Clone, PartialEq)]
pub struct Curve {
    /// What was simulated.
    pub setup: Setup,
    /// Counted tokens.
    pub tokens: u64,
    /// One for each size, in their order.
    pub points: Vec<Point>,
}

/// A pool of one size.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Point {
    /// Slots as a multiple of the experts that a token uses.
    pub rho: f64,
    /// Slots of a layer, on average.
    pub slots_per_layer: f64,
    /// Bytes of all slots; 0 if sizes are not known.
    pub bytes: u64,
    /// Records asked for.
    pub requests: u64,
    /// Hits, as [`Setup::counting`] counts them.
    pub hits: u64,
}

/// As `docs/json.md` has it.
impl Serialize for Curve {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let mut object = serializer.serialize_struct("Curve", 6)?;
        object.serialize_field("policy", &self.setup.eviction.to_string())?;
        object.serialize_field("pool", &self.setup.pool.to_string())?;
        object.serialize_field("start", &self.setup.start.to_string())?;
        object.serialize_field("counting", &self.setup.counting.to_string())?;
        object.serialize_field("tokens", &self.tokens)?;
        object.serialize_field("points", &self.points)?;
        object.end()
    }
}

impl Serialize for Point {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let mut object = serializer.serialize_struct("Point", 6)?;
        object.serialize_field("rho", &self.rho)?;
        object.serialize_field("slots_per_layer", &self.slots_per_layer)?;
        object.serialize_field("bytes", &self.bytes)?;
        object.serialize_field("hit_rate", &self.hit_rate())?;
        object.serialize_field("requests", &self.requests)?;
        object.serialize_field("hits", &self.hits)?;
        object.end()
    }
}

impl Point {
    /// Hits per request, from 0 to 1; none without requests.
    #[must_use]
    pub fn hit_rate(&self) -> Option<f64> {
        (self.requests > 0).then(|| self.hits as f64 / self.requests as f64)
    }
}

/// Simulates a policy with pools of several sizes.
///
/// # Errors
///
/// If a pool of one of the sizes cannot be made or simulated: the message says which and why.
pub fn curve(trace: &Trace, setup: &Setup, sizes: &[Size]) -> Result<Curve> {
    let steps = Steps::of(trace, setup);
    let plain = setup.ahead.is_none() && setup.below.is_none();
    let widest = steps.widest();
    let shapes: Vec<Shape> = sizes.iter().map(|&size| Shape::new(trace.header(), size)).collect();
    let holds = |shape: &Shape| shape.slots.iter().zip(&widest).all(|(&s, &w)| s as usize >= w);
    let at_once = |shape: &Shape| {
        plain
            && setup.pool == PoolKind::PerLayer
            && shape.budget.is_none()
            && (setup.eviction == Eviction::BeladyLeave || holds(shape))
    };
    let places = match shapes.iter().any(at_once) {
        true => stack::places(trace, setup, &steps),
        false => None,
    };
    let mut queued = match queues::knows(setup.eviction) {
        true => of_queues(trace, setup, &steps, shapes.iter().filter(|shape| at_once(shape))),
        false => Vec::new().into_iter(),
    };
    let done: Vec<Option<Point>> = shapes
        .iter()
        .map(|shape| match &places {
            _ if !at_once(shape) => None,
            Some(places) => Some(of_places(places, shape, setup)),
            None => queued.next(),
        })
        .collect();
    let points = in_parallel(shapes.len(), |index| match done[index] {
        Some(point) => Ok(point),
        None => point(trace, setup, &steps, &shapes[index], plain && holds(&shapes[index])),
    });
    let points = points.into_iter().collect::<Result<_>>()?;
    Ok(Curve { setup: *setup, tokens: steps.counted(), points })
}

/// A size, made into what pools want.
struct Shape {
    slots: Vec<u32>,
    /// Instead of slots.
    budget: Option<u64>,
    rho: f64,
    slots_per_layer: f64,
    bytes: u64,
}

impl Shape {
    fn new(header: &Header, size: Size) -> Self {
        let layers = &header.layers;
        let used: u64 = layers.iter().map(|layer| u64::from(layer.used)).sum();
        let count = layers.len() as f64;
        let of_slots = |slots: Vec<u32>| {
            let total: u64 = slots.iter().map(|&slots| u64::from(slots)).sum();
            let bytes =
                slots.iter().zip(layers).map(|(&s, layer)| u64::from(s) * layer.record_bytes);
            Self {
                budget: None,
                rho: total as f64 / used as f64,
                slots_per_layer: total as f64 / count,
                bytes: bytes.sum(),
                slots,
            }
        };
        match size {
            Size::Rho(rho) => of_slots(
                layers.iter().map(|layer| (rho * f64::from(layer.used)).round() as u32).collect(),
            ),
            Size::Slots(slots) => of_slots(vec![slots; layers.len()]),
            Size::Bytes(bytes) => {
                let token = header.token_bytes().max(1) as f64;
                let mean = header.total_bytes().max(1) as f64
                    / layers.iter().map(|layer| f64::from(layer.experts)).sum::<f64>();
                Self {
                    slots: vec![0; layers.len()],
                    budget: Some(bytes),
                    rho: bytes as f64 / token,
                    slots_per_layer: bytes as f64 / mean / count,
                    bytes,
                }
            }
        }
    }

    fn point(&self, requests: u64, hits: u64) -> Point {
        let &Self { rho, slots_per_layer, bytes, .. } = self;
        Point { rho, slots_per_layer, bytes, requests, hits }
    }
}

fn of_places(places: &[stack::Places], shape: &Shape, setup: &Setup) -> Point {
    let requests = places.iter().flatten().sum();
    let hits = places.iter().zip(&shape.slots);
    let hits = hits.map(|(places, &slots)| stack::hits(places, slots as usize, setup.counting));
    shape.point(requests, hits.sum())
}

fn of_queues<'a>(
    trace: &Trace,
    setup: &Setup,
    steps: &Steps<'_>,
    shapes: impl Iterator<Item = &'a Shape>,
) -> std::vec::IntoIter<Point> {
    let shapes: Vec<&Shape> = shapes.collect();
    let slots: Vec<&[u32]> = shapes.iter().map(|shape| &shape.slots[..]).collect();
    let (hits, requests) = match slots.is_empty() {
        true => return Vec::new().into_iter(),
        false => queues::hits(trace, setup, steps, &slots),
    };
    let points = shapes.iter().zip(hits).map(|(shape, hits)| {
        let fills = if setup.counting == Counting::Fill { hits.fills } else { 0 };
        shape.point(requests, hits.hits + fills)
    });
    points.collect::<Vec<_>>().into_iter()
}

fn point(
    trace: &Trace,
    setup: &Setup,
    steps: &Steps<'_>,
    shape: &Shape,
    roomy: bool,
) -> Result<Point> {
    let layers = &trace.header().layers;
    let total: u64 = shape.slots.iter().map(|&slots| u64::from(slots)).sum();
    let counted = |hits: bytes::Hits| match setup.counting {
        Counting::Strict => shape.point(hits.requests, hits.hits),
        Counting::Fill => shape.point(hits.requests, hits.hits + hits.fills),
    };
    if let Some(budget) = shape.budget {
        let sizes: Vec<u64> = layers.iter().map(|layer| layer.record_bytes).collect();
        if sizes.contains(&0) {
            return Err(Error::file(
                "the trace does not tell the size of records; give slots or rho",
            ));
        }
        return bytes::replay(trace, setup, steps, budget, &sizes).map(counted);
    }
    match setup.eviction {
        Eviction::Online(_) => {
            let outcome = direct::replay(trace, setup, &shape.slots)?;
            let fills = if setup.counting == Counting::Fill { outcome.fills } else { 0 };
            Ok(shape.point(outcome.requests, outcome.hits_total() + fills))
        }
        Eviction::Belady | Eviction::BeladyLeave => {
            if setup.ahead.is_some() || setup.below.is_some() {
                return Err(Error::file(format!("{} reads nothing ahead", setup.eviction)));
            }
            if setup.eviction == Eviction::Belady && !roomy && setup.pool == PoolKind::PerLayer {
                let reason = "belady needs slots for all experts of a step; belady-leave does not";
                return Err(Error::file(reason));
            }
            let sizes = vec![1; layers.len()];
            bytes::replay(trace, setup, steps, total, &sizes).map(counted)
        }
    }
}

/// Calls `of` with each number below `count`, on all processors.
pub(crate) fn in_parallel<T: Send>(count: usize, of: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let threads = thread::available_parallelism().map_or(1, NonZero::get).min(count);
    if threads <= 1 {
        return (0..count).map(of).collect();
    }
    let next = AtomicUsize::new(0);
    let done = Mutex::new(Vec::with_capacity(count));
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    if index >= count {
                        return;
                    }
                    let value = of(index);
                    done.lock().expect("no thread panics with it").push((index, value));
                }
            });
        }
    });
    let mut done = done.into_inner().expect("no thread panics with it");
    done.sort_unstable_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, value)| value).collect()
}

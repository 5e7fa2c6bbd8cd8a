//! `monitor`: counts what passes through an engine.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hdrhistogram::Histogram;

use crate::engine::{Engine, RawDone, RawRead};
use crate::sync::lock;

/// Latencies above this count as this.
const LATENCY_MAX_NS: u64 = 60_000_000_000;

/// Times from the making of a read to its arrival.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Latency {
    /// Half of the reads took no longer.
    pub p50: Duration,
    /// 99 of 100 reads took no longer.
    pub p99: Duration,
    /// The slowest read.
    pub max: Duration,
}

/// What a [`Monitor`] has seen so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Reads that came back, failed ones included.
    pub reads: u64,
    /// Bytes that came back.
    pub bytes: u64,
    /// Reads that failed.
    pub errors: u64,
    /// Reads in flight now.
    pub in_flight: usize,
    /// Most reads ever in flight.
    pub in_flight_max: usize,
    /// Their latency, to about 1 %.
    pub latency: Latency,
}

/// The counters of a [`Monitor`], to be read while it runs.
#[derive(Debug)]
pub struct Counts {
    reads: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
    in_flight: AtomicUsize,
    in_flight_max: AtomicUsize,
    latency_ns: Mutex<Histogram<u64>>,
}

impl Counts {
    fn new() -> Self {
        let latency = Histogram::new_with_bounds(1, LATENCY_MAX_NS, 2);
        Self {
            reads: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            in_flight: AtomicUsize::new(0),
            in_flight_max: AtomicUsize::new(0),
            latency_ns: Mutex::new(latency.expect("constant bounds are valid")),
        }
    }

    /// The counters now. Each is exact; together they may be a read apart.
    pub fn snapshot(&self) -> Snapshot {
        let latency = lock(&self.latency_ns);
        let at = |quantile| Duration::from_nanos(latency.value_at_quantile(quantile));
        Snapshot {
            reads: self.reads.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
            errors: self.errors.load(Ordering::Relaxed),
            in_flight: self.in_flight.load(Ordering::Relaxed),
            in_flight_max: self.in_flight_max.load(Ordering::Relaxed),
            latency: Latency {
                p50: at(0.5),
                p99: at(0.99),
                max: Duration::from_nanos(latency.max()),
            },
        }
    }

    fn starts(&self) {
        let now = self.in_flight.fetch_add(1, Ordering::Relaxed) + 1;
        self.in_flight_max.fetch_max(now, Ordering::Relaxed);
    }

    fn count(&self, done: &[RawDone]) {
        if done.is_empty() {
            return;
        }
        let mut latency = lock(&self.latency_ns);
        for done in done {
            self.in_flight.fetch_sub(1, Ordering::Relaxed);
            self.reads.fetch_add(1, Ordering::Relaxed);
            match &done.result {
                Ok(bytes) => self.bytes.fetch_add(*bytes as u64, Ordering::Relaxed),
                Err(_) => self.errors.fetch_add(1, Ordering::Relaxed),
            };
            let took = done.read.issued().elapsed().as_nanos();
            latency.saturating_record(u64::try_from(took).unwrap_or(u64::MAX));
        }
    }
}

/// Counts reads, bytes, errors and latency of an engine.
pub struct Monitor<E> {
    inner: E,
    counts: Arc<Counts>,
}

impl<E: Engine> Monitor<E> {
    /// Wraps `inner`.
    pub fn new(inner: E) -> Self {
        Self { inner, counts: Arc::new(Counts::new()) }
    }

    /// The counters; they outlive the engine.
    pub fn counts(&self) -> Arc<Counts> {
        Arc::clone(&self.counts)
    }
}

impl<E: Engine> Engine for Monitor<E> {
    pass_on!();

    fn submit(&self, reads: &mut dyn Iterator<Item = RawRead>) {
        self.inner.submit(&mut reads.inspect(|_| self.counts.starts()));
    }

    fn wait(&self, done: &mut Vec<RawDone>) {
        let before = done.len();
        self.inner.wait(done);
        self.counts.count(&done[before..]);
    }
}

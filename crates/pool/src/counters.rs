//! What a pool counts, per layer.

use std::iter::Sum;
use std::ops::{Add, Sub};

/// What happened to one layer since the pool was made.
///
/// `requests == hits + hits_in_flight + faults` always holds. Subtract an earlier copy to get the
/// figures of an interval, for instance decode without prefill.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LayerCounters {
    /// Calls of [`Pool::request`](crate::Pool::request).
    pub requests: u64,
    /// Requests that found their record resident.
    pub hits: u64,
    /// Requests that found their record being loaded for somebody else: they wait, but read nothing.
    pub hits_in_flight: u64,
    /// Requests that found no slot.
    pub faults: u64,
    /// Records of this layer that made room for another one, of this layer or not, or whose slots
    /// went out of use.
    pub evictions: u64,
    /// Bytes that arrived for this layer, into slots or through staging.
    pub bytes_faulted: u64,
    /// Records that arrived for the first time: no pool of any size avoids reading these.
    pub first_touches: u64,
}

impl LayerCounters {
    /// The share of requests that found their record resident, 0 to 1; 0 without requests.
    #[must_use]
    pub fn hit_rate(&self) -> f64 {
        if self.requests == 0 { 0.0 } else { self.hits as f64 / self.requests as f64 }
    }
}

impl Add for LayerCounters {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            requests: self.requests + other.requests,
            hits: self.hits + other.hits,
            hits_in_flight: self.hits_in_flight + other.hits_in_flight,
            faults: self.faults + other.faults,
            evictions: self.evictions + other.evictions,
            bytes_faulted: self.bytes_faulted + other.bytes_faulted,
            first_touches: self.first_touches + other.first_touches,
        }
    }
}

impl Sub for LayerCounters {
    type Output = Self;

    /// # Panics
    ///
    /// If `earlier` is not an earlier copy of the same counters.
    fn sub(self, earlier: Self) -> Self {
        Self {
            requests: self.requests - earlier.requests,
            hits: self.hits - earlier.hits,
            hits_in_flight: self.hits_in_flight - earlier.hits_in_flight,
            faults: self.faults - earlier.faults,
            evictions: self.evictions - earlier.evictions,
            bytes_faulted: self.bytes_faulted - earlier.bytes_faulted,
            first_touches: self.first_touches - earlier.first_touches,
        }
    }
}

impl Sum for LayerCounters {
    fn sum<I: Iterator<Item = Self>>(counters: I) -> Self {
        counters.fold(Self::default(), Add::add)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_and_intervals() {
        let early = LayerCounters { requests: 4, hits: 1, faults: 3, ..Default::default() };
        let step = LayerCounters { requests: 4, hits: 3, faults: 1, ..Default::default() };
        let late: LayerCounters = [early, step].into_iter().sum();
        assert_eq!(late.requests, 8);
        assert_eq!(late - early, step);
        assert_eq!(late.hit_rate(), 0.5);
        assert_eq!(LayerCounters::default().hit_rate(), 0.0);
    }
}

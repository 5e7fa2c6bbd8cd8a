//! Wrappers: engines over an engine, for limits, faults and counters.

mod delay;
mod fault;
mod monitor;
mod throttle;

pub use fault::{Action, Fault, Rule};
pub use monitor::{Counts, Latency, Monitor, Snapshot};
pub use throttle::{Drive, Throttle};

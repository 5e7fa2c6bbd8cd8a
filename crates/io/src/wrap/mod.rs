//! Wrappers: engines over an engine, for limits, faults and counters.

/// The methods of an engine that a wrapper passes on to its field `inner` as they are: all but
/// `submit` and `wait`. One that has a default would not be missed if it were left out.
macro_rules! pass_on {
    () => {
        fn name(&self) -> &'static str {
            self.inner.name()
        }
        fn depth(&self) -> usize {
            self.inner.depth()
        }
        fn direct(&self) -> bool {
            self.inner.direct()
        }
        fn remark(&self) -> Option<String> {
            self.inner.remark()
        }
        fn wake(&self) {
            self.inner.wake();
        }
    };
}

mod delay;
mod fault;
mod monitor;
mod throttle;

pub use fault::{Action, Fault, Rule};
pub use monitor::{Counts, Latency, Monitor, Snapshot};
pub use throttle::{Drive, Throttle};

//! Executors: ways to compute a graph whose expert weights are in a pool, behind one trait.
//!
//! The planner ([`crate::plan`]) finds the expert matmuls, the pool ([`crate::residency`]) their
//! records; an executor brings the two together on one kind of memory. There is [`crate::host`].

use crate::abi::*;
use crate::error::Result;
use crate::pooled::Pooled;

/// Computes graphs on an inner backend. One per context, used by one thread at a time.
pub(crate) trait Executor {
    /// Computes `graph` to its end. Fails, rather than compute with bytes that did not arrive.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io) of a record that could not be read,
    /// [`Error::Cancelled`](crate::Error::Cancelled), [`Error::Graph`](crate::Error::Graph) for
    /// one that the executor cannot serve.
    fn compute(&mut self, pooled: &Pooled, graph: *mut ggml_cgraph) -> Result<ggml_status>;
}

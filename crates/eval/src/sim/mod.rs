//! What pools of expert records would have done with a trace.
//!
//! A *step* is one MoE layer of one batch: the layer's distinct experts are looked up at once, then the
//! missing ones are brought, and none of them goes before the step is over. That is what the runtime
//! does, and for the online policies it is done by the runtime's own code: [`replay`] drives
//! `tierstream_pool`. [`curve`] gets the same numbers faster where it can: for policies that keep in
//! a large pool all that they keep in a small one, one pass tells the hits of all sizes (Mattson et
//! al., "Evaluation techniques for storage hierarchies", IBM Systems Journal 9(2), 1970).

mod bytes;
mod curve;
mod direct;
pub(crate) mod predict;
mod queues;
mod setup;
mod stack;
mod steps;

pub use curve::{Curve, Point, curve};
pub use direct::{Ahead, Below, Outcome, StepFaults, replay, step_faults};
pub use predict::Predictor;
pub use setup::{Counting, Eviction, PoolKind, Setup, Size, Start, Tier, UnknownEviction};
pub use stack::{Sch, sch};

pub(crate) use curve::in_parallel;
pub(crate) use steps::Steps;

//! How local a model's routing is.
//!
//! `docs/evaluation.md` has the formulas and where they come from. Shares are from 0 to 1. What needs
//! more tokens than there are is `None`.

mod bootstrap;
mod compare;
mod controls;
mod predict;
mod report;
mod sequences;
mod tally;
mod usage;

pub use compare::{Difference, compare};
pub use predict::{NextLayer, Prediction, PreviousToken};
pub use report::{
    Controls, Distance, Faults, Headline, Interval, Intervals, Locality, LocalityIntervals,
    OfDomain, OfLayer, OfPrompt, Options, Report, SchRate, Srp, Tokens, metrics,
};

pub(crate) use report::{Counts, STEPS_MAX, counted, shuffled, uniform};

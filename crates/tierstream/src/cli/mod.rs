//! The `tierstream` program: flags and glue over the library.

pub(crate) mod args;
pub(crate) mod bench;
pub(crate) mod chat;
pub(crate) mod client;
pub(crate) mod config;
pub(crate) mod doctor;
pub(crate) mod gave_up;
pub(crate) mod interrupt;
mod keys;
pub(crate) mod list;
pub(crate) mod man;
mod named;
pub(crate) mod open;
pub(crate) mod output;
pub(crate) mod pack;
mod preset;
pub(crate) mod progress;
pub(crate) mod pull;
mod reply;
mod report;
mod routing;
pub(crate) mod run;
pub(crate) mod serve;
pub(crate) mod show;
pub(crate) mod trace;
pub(crate) mod verify;
mod wrap;

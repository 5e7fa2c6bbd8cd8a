//! The real program, end to end.

mod backends;
mod bad_input;
mod bench_load;
mod chat;
mod client;
mod docs;
mod doctor;
mod eval;
mod files;
mod flags;
#[path = "../../../pull/tests/support/mod.rs"]
mod hub;
mod install;
mod json;
mod list;
mod pack;
mod plan;
mod pull;
mod run;
mod serve;
mod server;
mod show;
mod signals;
mod stores;
mod support;
mod trace;
mod verify;
mod weights;

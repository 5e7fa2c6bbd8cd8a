//! The real program, end to end.

mod backends;
mod bad_input;
mod bench_load;
mod chat;
mod docs;
mod doctor;
mod files;
mod flags;
mod install;
mod json;
mod list;
mod pack;
mod run;
mod show;
mod signals;
mod stores;
mod support;
mod verify;
mod weights;

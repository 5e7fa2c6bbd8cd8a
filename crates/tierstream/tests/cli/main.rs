//! The real program, end to end.

mod bad_input;
mod chat;
mod docs;
mod doctor;
mod json;
mod run;
mod show;
mod support;
mod verify;

//! What the crate does, by what it exports.

mod chats;
mod common;

mod chunks;
mod go;
mod grammar;
mod jinja;
mod limits;
mod parser;

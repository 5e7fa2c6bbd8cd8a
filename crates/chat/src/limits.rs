//! What templates and models' text may take.

/// A template's length, in bytes. Large ones have 30 KB.
pub const TEMPLATE_BYTES: usize = 1 << 20;
/// What rendering may take whatever the messages are: one unit is an instruction of the template, or 64
/// bytes of text that it makes. What minijinja does not count is a list that a Jinja template adds to itself
/// again and again.
pub const FUEL: u64 = 2_000_000;
/// What each message adds to that.
pub const FUEL_PER_MESSAGE: u64 = 4_000;
/// How deep blocks and expressions of a Go template may nest.
pub const GO_DEPTH: usize = 64;
/// How deep a Jinja template's calls and blocks may nest.
pub const JINJA_DEPTH: usize = 200;
/// Words of one tag of a Jinja template; each letter of an operator is one, a string is one.
pub const JINJA_TAG_WORDS: usize = 1000;
/// How many `elif` a Jinja template may have.
pub const JINJA_ALTERNATIVES: usize = 500;
/// Length of a tool's name in a call, in bytes.
pub const NAME_BYTES: usize = 256;
/// What stands before a call's arguments, in bytes: its name, its id, markers.
pub const CALL_HEADER_BYTES: usize = 1024;
/// How deep the JSON of a call's arguments may nest. `serde_json` reads up to 128.
pub const JSON_DEPTH: usize = 100;
/// How many calls one reply may have; what comes after is content.
pub const CALLS: usize = 256;
/// The text of one call, in bytes. What is longer is no call.
pub const CALL_BYTES: usize = 8 << 20;

/// What rendering messages of so many bytes may take.
pub(crate) fn fuel(messages: usize, bytes: usize) -> u64 {
    FUEL.saturating_add(FUEL_PER_MESSAGE.saturating_mul(messages as u64))
        .saturating_add(bytes as u64)
}

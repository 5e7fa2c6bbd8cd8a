//! ggml's private structs, generated from the vendored headers (see `build.rs`), over the public
//! API of llama-cpp-sys-2. Where both have a type, llama-cpp-sys-2 knows it as opaque only, so
//! its functions take our pointers through `.cast()`. And the guard that functions of ours need
//! that C calls.

#![allow(
    non_camel_case_types,
    dead_code,
    unreachable_pub,
    missing_docs,
    clippy::undocumented_unsafe_blocks,
    clippy::pub_underscore_fields,
    unnameable_types
)]

use std::panic::{AssertUnwindSafe, catch_unwind};

pub use llama_cpp_sys_2::*;

include!(concat!(env!("OUT_DIR"), "/abi.rs"));

// We fill every slot of these vtables by name; a new version may add required ones.
const _: () = assert!(
    GGML_BACKEND_API_VERSION == 3,
    "ggml's backend API changed: review proxy.rs, proxy/*.rs, capture.rs, late.rs, weights.rs"
);

/// Runs `f` and turns a panic into `default`: no panic may cross a C frame.
pub(crate) fn contain<T>(default: T, f: impl FnOnce() -> T) -> T {
    catch_unwind(AssertUnwindSafe(f)).unwrap_or(default)
}

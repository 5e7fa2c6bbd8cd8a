//! What cannot be tested everywhere.

use std::fmt::Display;

/// Says what is not tested here, and why. Panics instead where `TIERSTREAM_TEST_STRICT` is 1, as it
/// is in CI: there nothing may pass because it was not tested.
#[allow(clippy::print_stdout)]
pub(crate) fn skip(what: impl Display) {
    let strict = std::env::var_os("TIERSTREAM_TEST_STRICT").is_some_and(|value| value == "1");
    assert!(!strict, "not tested: {what}");
    println!("not tested: {what}");
}

//! llama.cpp gives up in the middle of its work: an error as any other, as far as that goes.

use std::sync::atomic::{AtomicBool, Ordering};

use super::output::{self, Failure};

static JSON: AtomicBool = AtomicBool::new(false);

/// Tells of it as of other errors, and ends the program with exit code 1.
pub(crate) fn install(json: bool) {
    JSON.store(json, Ordering::Relaxed);
    tierstream::ggml::on_abort(on_abort);
}

fn on_abort(message: &str) {
    let error = Failure::error(
        format!("llama.cpp gave up: {}", message.trim()),
        "the file is damaged, or this llama.cpp has a bug with it",
    );
    output::report(&error, JSON.load(Ordering::Relaxed));
    // Not `exit`, which would run destructors while other threads still compute.
    signal_hook::low_level::exit(1)
}

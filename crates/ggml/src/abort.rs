//! The last words of llama.cpp: `GGML_ASSERT` and `GGML_ABORT` end the process.

use std::ffi::{CStr, c_char};
use std::sync::{PoisonError, RwLock};

use crate::abi::*;
use crate::log;

static CALLBACK: RwLock<Option<fn(&str)>> = RwLock::new(None);

/// For programs: calls `callback` with the message (`file.c:12: GGML_ASSERT(x) failed`), and with
/// what was complained of on the thread before, when llama.cpp gives up inside a call of ours, on the thread that met the fault, in place of ggml's
/// own message and backtrace.
///
/// The process cannot go on: ggml calls `abort()` when `callback` returns. A program that wants to
/// end in another way ends itself in `callback`, with `_exit` rather than `exit`, because locks of
/// llama.cpp may be held and other threads are computing. A C++ exception that nobody catches
/// also ends the process and does not come through here. A later call replaces the callback.
pub fn on_abort(callback: fn(&str)) {
    *CALLBACK.write().unwrap_or_else(PoisonError::into_inner) = Some(callback);
    // SAFETY: ggml stores the pointer; `on_message` lives for ever.
    unsafe { ggml_set_abort_callback(Some(on_message)) };
}

unsafe extern "C" fn on_message(message: *const c_char) {
    contain((), || {
        let callback = *CALLBACK.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(callback) = callback
            && !message.is_null()
        {
            // SAFETY: ggml passes a NUL-terminated string.
            let message = unsafe { CStr::from_ptr(message) }.to_string_lossy();
            // A GPU's backend says only in the log what went wrong.
            match log::complaints() {
                none if none == log::NO_REASON => callback(&message),
                complaints => callback(&format!("{message}: {complaints}")),
            }
        }
    });
}

//! llama.cpp's log: the last complaints are kept, because its C API returns no reasons.

use std::collections::VecDeque;
use std::ffi::{CStr, c_char, c_void};
use std::sync::{Mutex, Once, PoisonError};

use crate::abi::*;

/// What [`complaints`] says when there are none.
pub(crate) const NO_REASON: &str = "no reason given";

/// Complaints kept.
const KEPT: usize = 8;

static COMPLAINTS: Mutex<VecDeque<String>> = Mutex::new(VecDeque::new());
static VERBOSE: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);

/// Sends llama.cpp's whole log to stderr, or nothing of it.
pub fn set_verbose(on: bool) {
    VERBOSE.store(on, std::sync::atomic::Ordering::Relaxed);
}

/// Initialises llama.cpp and takes over its log. Idempotent.
pub(crate) fn init() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: plain global set-up; the callback takes no data.
        unsafe {
            llama_log_set(Some(callback), std::ptr::null_mut());
            llama_backend_init();
        }
    });
}

/// Forgets earlier complaints.
pub(crate) fn clear() {
    COMPLAINTS.lock().unwrap_or_else(PoisonError::into_inner).clear();
}

/// The complaints since [`clear`], oldest first, as one line.
pub(crate) fn complaints() -> String {
    let mut kept = COMPLAINTS.lock().unwrap_or_else(PoisonError::into_inner);
    let lines: Vec<String> = kept.drain(..).collect();
    if lines.is_empty() { NO_REASON.to_owned() } else { lines.join("; ") }
}

unsafe extern "C" fn callback(level: ggml_log_level, text: *const c_char, _: *mut c_void) {
    contain((), || {
        if text.is_null() {
            return;
        }
        // SAFETY: llama.cpp passes a NUL-terminated string.
        let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
        if VERBOSE.load(std::sync::atomic::Ordering::Relaxed) {
            eprint!("{text}");
        }
        if level == GGML_LOG_LEVEL_ERROR {
            let mut kept = COMPLAINTS.lock().unwrap_or_else(PoisonError::into_inner);
            if kept.len() == KEPT {
                kept.pop_front();
            }
            kept.push_back(text.trim().to_owned());
        }
    });
}

//! llama.cpp's log: the last complaints are kept, because its C API returns no reasons.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::ffi::{CStr, c_char, c_void};
use std::sync::Once;

use crate::abi::*;

/// What [`complaints`] says when there are none.
pub(crate) const NO_REASON: &str = "no reason given";

/// Complaints kept.
const KEPT: usize = 8;

thread_local! {
    /// llama.cpp complains on the thread that has called it, so contexts on other threads have
    /// complaints of their own.
    static COMPLAINTS: RefCell<VecDeque<String>> = const { RefCell::new(VecDeque::new()) };
}

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

thread_local! {
    /// The largest compute buffer, MiB, that llama.cpp has told of on this thread.
    static COMPUTE_MIB: Cell<f64> = const { Cell::new(0.0) };
}

/// Bytes of the compute buffer of the context that this thread has made since it asked last.
/// llama.cpp tells nobody else of sizes that it only simulates. It names them for each backend;
/// those of host memory share one buffer.
pub(crate) fn take_compute_bytes() -> u64 {
    (COMPUTE_MIB.take() * f64::from(1 << 20)).ceil() as u64
}

/// `CPU compute buffer size =    12.34 MiB`, as `llama_context::sched_reserve` prints it.
fn compute_mib(line: &str) -> Option<f64> {
    let (_, size) = line.split_once(" compute buffer size =")?;
    size.trim().strip_suffix("MiB")?.trim().parse().ok()
}

/// Forgets this thread's earlier complaints.
pub(crate) fn clear() {
    COMPLAINTS.take();
}

/// This thread's complaints since [`clear`], oldest first, as one line.
pub(crate) fn complaints() -> String {
    let lines = Vec::from(COMPLAINTS.take());
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
        if let Some(mib) = compute_mib(&text) {
            COMPUTE_MIB.set(COMPUTE_MIB.get().max(mib));
        }
        if level == GGML_LOG_LEVEL_ERROR {
            COMPLAINTS.with_borrow_mut(|kept| {
                if kept.len() == KEPT {
                    kept.pop_front();
                }
                kept.push_back(text.trim().to_owned());
            });
        }
    });
}

#[cfg(test)]
mod tests {
    use std::ffi::CStr;

    use super::{NO_REASON, callback, clear, complaints, compute_mib};
    use crate::abi::*;

    fn complain(text: &CStr) {
        // SAFETY: as llama.cpp calls it; the text is NUL-terminated.
        unsafe { callback(GGML_LOG_LEVEL_ERROR, text.as_ptr(), std::ptr::null_mut()) };
    }

    #[test]
    fn each_thread_has_its_own_complaints() {
        complain(c"one\n");
        let other = std::thread::spawn(|| {
            clear();
            assert_eq!(complaints(), NO_REASON);
            complain(c"two");
            complaints()
        });
        assert_eq!(other.join().unwrap(), "two");
        assert_eq!(complaints(), "one");
        assert_eq!(complaints(), NO_REASON, "they are told once");
    }

    #[test]
    fn reads_the_size_of_a_compute_buffer() {
        let line = "sched_reserve:        CPU compute buffer size =   301.75 MiB\n";
        assert_eq!(compute_mib(line), Some(301.75));
        assert_eq!(compute_mib("CPU compute buffer size is 1.0000 MiB, matches expectation"), None);
        assert_eq!(compute_mib("CPU output buffer size = 0.58 MiB"), None);
    }
}

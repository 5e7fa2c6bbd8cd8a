//! How CUDA loads kernels.

use std::env;
use std::fs;

const VARIABLE: &str = "CUDA_MODULE_LOADING";

/// Lets the driver load all kernels of a module when the module is loaded; to be called first in
/// `main`. By default a kernel is loaded when it is first started, and that waits for the device:
/// for ever, if on the device something waits for the program meanwhile.
///
/// Sets `CUDA_MODULE_LOADING`, which the driver reads once, unless the user has. False when loading
/// stays lazy: the user wants it so, or the process has threads already, which must not see the
/// environment change. What the driver really does is [`Info::eager_modules`](crate::Info).
pub fn load_modules_eagerly() -> bool {
    if let Some(value) = env::var_os(VARIABLE) {
        return value == "EAGER";
    }
    let threads = fs::read_dir("/proc/self/task").map_or(usize::MAX, Iterator::count);
    if threads != 1 {
        return false;
    }
    // SAFETY: this is the only thread, so nothing reads the environment meanwhile.
    unsafe { env::set_var(VARIABLE, "EAGER") };
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn with_threads_the_environment_stays_as_it_is() {
        // The test harness has a thread of its own.
        let before = env::var_os(VARIABLE);
        assert_eq!(load_modules_eagerly(), before.as_deref() == Some("EAGER".as_ref()));
        assert_eq!(env::var_os(VARIABLE), before);
    }
}

//! The devices that ggml finds on this machine.

use std::ffi::{CStr, c_char};

use crate::abi::*;
use crate::log;

/// A device of a ggml backend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// `CPU`, `CUDA0`.
    pub name: String,
    /// What the backend calls it, usually the product's name.
    pub description: String,
    /// `cpu`, `gpu`, `igpu` (shares the host's memory), `accel` (works beside the CPU), `other`.
    pub kind: &'static str,
    /// Free memory, bytes.
    pub memory_free_bytes: u64,
    /// All memory, bytes.
    pub memory_total_bytes: u64,
}

/// The version of ggml, and so of llama.cpp, in this build.
pub fn ggml_version() -> String {
    // SAFETY: a constant string.
    unsafe { text(crate::abi::ggml_version()) }
}

/// Every device of every backend of this build, in ggml's order.
pub fn devices() -> Vec<DeviceInfo> {
    log::init();
    // SAFETY: the registry is set up and only grows.
    let count = unsafe { ggml_backend_dev_count() };
    (0..count)
        .map(|index| {
            let (mut free, mut total) = (0, 0);
            // SAFETY: `index` is below the count; devices and their strings live for ever.
            unsafe {
                let device = ggml_backend_dev_get(index);
                ggml_backend_dev_memory(device, &raw mut free, &raw mut total);
                DeviceInfo {
                    name: text(ggml_backend_dev_name(device)),
                    description: text(ggml_backend_dev_description(device)),
                    kind: kind(ggml_backend_dev_type(device)),
                    memory_free_bytes: free as u64,
                    memory_total_bytes: total as u64,
                }
            }
        })
        .collect()
}

/// # Safety
/// Null or a NUL-terminated string.
unsafe fn text(string: *const c_char) -> String {
    if string.is_null() {
        return String::new();
    }
    // SAFETY: the caller's.
    unsafe { CStr::from_ptr(string) }.to_string_lossy().into_owned()
}

fn kind(kind: ggml_backend_dev_type) -> &'static str {
    match kind {
        GGML_BACKEND_DEVICE_TYPE_CPU => "cpu",
        GGML_BACKEND_DEVICE_TYPE_GPU => "gpu",
        GGML_BACKEND_DEVICE_TYPE_IGPU => "igpu",
        GGML_BACKEND_DEVICE_TYPE_ACCEL => "accel",
        _ => "other",
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn there_is_a_cpu() {
        assert!(super::devices().iter().any(|d| d.kind == "cpu" && d.memory_total_bytes > 0));
    }
}

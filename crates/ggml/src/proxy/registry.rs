//! The registry entry of the proxy's device, which backends' further functions are asked of.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr;

use super::Device;
use super::backend::inner_of;
use crate::abi::*;

pub(super) fn iface() -> ggml_backend_reg_i {
    ggml_backend_reg_i {
        get_name: Some(reg_name),
        get_device_count: Some(reg_device_count),
        get_device: Some(reg_device),
        get_proc_address: Some(reg_proc_address),
    }
}

extern "C" fn reg_name(_: ggml_backend_reg_t) -> *const c_char {
    c"tierstream".as_ptr()
}

extern "C" fn reg_device_count(_: ggml_backend_reg_t) -> usize {
    1
}

extern "C" fn reg_device(reg: ggml_backend_reg_t, _: usize) -> ggml_backend_dev_t {
    // SAFETY: the context of our registry entry is its `Device`.
    unsafe { (*(*reg).context.cast::<Device>()).handle() }
}

/// Functions that take a backend must reach the inner one; others need no proxy.
extern "C" fn reg_proc_address(reg: ggml_backend_reg_t, name: *const c_char) -> *mut c_void {
    // SAFETY: the context of our registry entry is its `Device`; `name` is NUL-terminated.
    let (inner, name) =
        unsafe { ((*(*(*reg).context.cast::<Device>()).inner).reg, CStr::from_ptr(name)) };
    // SAFETY: a registry entry lives for ever.
    let theirs = unsafe { ggml_backend_reg_get_proc_address(inner.cast(), name.as_ptr()) };
    if theirs.is_null() {
        return ptr::null_mut();
    }
    match name.to_bytes() {
        b"ggml_backend_set_n_threads" => set_n_threads as *mut c_void,
        b"ggml_backend_set_abort_callback" => set_abort_callback as *mut c_void,
        _ => ptr::null_mut(),
    }
}

extern "C" fn set_n_threads(backend: ggml_backend_t, n_threads: c_int) {
    let inner = inner_of(backend);
    if let Some(f) = proc_of(inner, c"ggml_backend_set_n_threads") {
        // SAFETY: ggml gives this name this type (`ggml_backend_set_n_threads_t`).
        let f: extern "C" fn(ggml_backend_t, c_int) = unsafe { std::mem::transmute(f) };
        f(inner, n_threads);
    }
}

extern "C" fn set_abort_callback(
    backend: ggml_backend_t,
    callback: ggml_abort_callback,
    data: *mut c_void,
) {
    type Set = extern "C" fn(ggml_backend_t, ggml_abort_callback, *mut c_void);
    let inner = inner_of(backend);
    if let Some(f) = proc_of(inner, c"ggml_backend_set_abort_callback") {
        // SAFETY: ggml gives this name this type (`ggml_backend_set_abort_callback_t`).
        let f: Set = unsafe { std::mem::transmute(f) };
        f(inner, callback, data);
    }
}

/// A function that the registry of `backend`'s device exports by name.
pub(crate) fn proc_of(backend: ggml_backend_t, name: &CStr) -> Option<ptr::NonNull<c_void>> {
    // SAFETY: a live backend; devices and registries live for ever.
    let f = unsafe {
        let reg = (*(*backend).device).reg;
        ggml_backend_reg_get_proc_address(reg.cast(), name.as_ptr())
    };
    ptr::NonNull::new(f)
}

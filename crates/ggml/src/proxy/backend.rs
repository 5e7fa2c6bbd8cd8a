//! One backend (stream) of the proxy: `graph_compute` goes to the executor, all else to the inner
//! backend.

use std::ffi::{c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::Arc;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use super::{Device, device};
use crate::abi::*;
use crate::control::Control;
use crate::error::Error;
use crate::executor::Executor;
use crate::gpu::{Miss, OnGpu, look_for_chains};
use crate::host::Host;
use crate::probe;

/// One backend (stream) of the proxy: what llama.cpp holds per context.
struct Backend {
    abi: ggml_backend,
    inner: ggml_backend_t,
    device: *const Device,
    control: Arc<Control>,
    executor: Box<dyn Executor>,
}

/// Marks our backends, so that `cpy_tensor_async` can tell them from others.
static mut GUID: ggml_guid = *b"tierstream-proxy";

fn guid() -> *mut ggml_guid {
    &raw mut GUID
}

pub(super) fn inner_of(backend: ggml_backend_t) -> ggml_backend_t {
    // SAFETY: a live backend; ours carry our guid and their `Backend` as context.
    unsafe {
        if (*backend).guid == guid() {
            (*(*backend).context.cast::<Backend>()).inner
        } else {
            backend
        }
    }
}

/// The inner backend of `$backend` and the function that fills `$slot` of its vtable. The slot is
/// filled: ours is filled only where the inner one is.
macro_rules! delegate {
    ($backend:expr, $slot:ident ( $($arg:expr),* )) => {{
        let inner = inner_of($backend);
        // SAFETY: a live backend of ggml, arguments passed on as they came.
        unsafe {
            let function = (*inner).iface.$slot.expect("filled only where the inner slot is");
            function(inner $(, $arg)*)
        }
    }};
}

pub(super) extern "C" fn init_backend(
    dev: ggml_backend_dev_t,
    params: *const c_char,
) -> ggml_backend_t {
    contain(ptr::null_mut(), || {
        let device = device(dev);
        // SAFETY: the inner device lives for ever.
        let inner: ggml_backend_t =
            unsafe { ggml_backend_dev_init(device.inner.cast(), params) }.cast();
        if inner.is_null() {
            return ptr::null_mut();
        }
        // SAFETY: just made.
        let has = unsafe { (*inner).iface };
        let control = Arc::new(Control::new(inner, device.next_born()));
        let executor: Box<dyn Executor> = if device.on_gpu {
            Box::new(OnGpu::new(inner, control.clone()))
        } else {
            Box::new(Host::new(inner, control.clone()))
        };
        device.newborn.lock().unwrap_or_else(PoisonError::into_inner).push(control.clone());
        let raw = Box::into_raw(Box::new(Backend {
            abi: ggml_backend {
                guid: guid(),
                iface: ggml_backend_i {
                    get_name: Some(backend_name),
                    free: Some(backend_free),
                    set_tensor_async: has.set_tensor_async.and(Some(set_tensor_async)),
                    get_tensor_async: has.get_tensor_async.and(Some(get_tensor_async)),
                    set_tensor_2d_async: has.set_tensor_2d_async.and(Some(set_tensor_2d_async)),
                    get_tensor_2d_async: has.get_tensor_2d_async.and(Some(get_tensor_2d_async)),
                    cpy_tensor_async: has.cpy_tensor_async.and(Some(cpy_tensor_async)),
                    synchronize: has.synchronize.and(Some(synchronize)),
                    graph_plan_create: None,
                    graph_plan_free: None,
                    graph_plan_update: None,
                    graph_plan_compute: None,
                    graph_compute: Some(graph_compute),
                    event_record: has.event_record.and(Some(event_record)),
                    event_wait: has.event_wait.and(Some(event_wait)),
                    graph_optimize: Some(graph_optimize),
                },
                device: dev,
                context: ptr::null_mut(),
            },
            inner,
            device,
            control,
            executor,
        }));
        // SAFETY: `raw` is live and ours alone; `abi` stays where it is until `backend_free`.
        unsafe {
            (*raw).abi.context = raw.cast();
            &raw mut (*raw).abi
        }
    })
}

extern "C" fn backend_free(backend: ggml_backend_t) {
    contain((), || {
        // SAFETY: ggml frees a backend once; the box is the one `init_backend` leaked.
        let backend = unsafe { Box::from_raw((*backend).context.cast::<Backend>()) };
        let inner = backend.inner;
        backend.control.detach();
        drop(backend); // the executor's buffers go before the inner backend
        // SAFETY: the inner backend is ours and nobody else's.
        unsafe { ggml_backend_free(inner.cast()) };
    });
}

extern "C" fn graph_compute(backend: ggml_backend_t, graph: *mut ggml_cgraph) -> ggml_status {
    contain(GGML_STATUS_FAILED, || {
        // SAFETY: ggml calls this with our backend; llama.cpp uses a context, and so its backend,
        // from one thread at a time. Field by field: ggml has a pointer to `abi`. The device
        // outlives its backends: `Model` frees contexts first.
        let (executor, control, device) = unsafe {
            let this = (*backend).context.cast::<Backend>();
            (&mut (*this).executor, &(*this).control, &*(*this).device)
        };
        let run = AssertUnwindSafe(|| executor.compute(device.pooled(), graph));
        let done = catch_unwind(run)
            .unwrap_or_else(|panic| Err(Error::Internal(panic_text(panic.as_ref()))));
        match done {
            Ok(status) => status,
            Err(Error::Cancelled) => {
                control.fail(Error::Cancelled);
                GGML_STATUS_ABORTED
            }
            Err(error) => {
                control.fail(error);
                GGML_STATUS_FAILED
            }
        }
    })
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("a panic without a message").to_owned()
}

extern "C" fn backend_name(_: ggml_backend_t) -> *const c_char {
    c"tierstream".as_ptr()
}

extern "C" fn set_tensor_async(
    b: ggml_backend_t,
    t: *mut ggml_tensor,
    data: *const c_void,
    offset: usize,
    size: usize,
) {
    delegate!(b, set_tensor_async(t, data, offset, size));
}

extern "C" fn get_tensor_async(
    b: ggml_backend_t,
    t: *const ggml_tensor,
    data: *mut c_void,
    offset: usize,
    size: usize,
) {
    delegate!(b, get_tensor_async(t, data, offset, size));
}

extern "C" fn set_tensor_2d_async(
    b: ggml_backend_t,
    t: *mut ggml_tensor,
    data: *const c_void,
    offset: usize,
    size: usize,
    n_copies: usize,
    stride_tensor: usize,
    stride_data: usize,
) {
    delegate!(b, set_tensor_2d_async(t, data, offset, size, n_copies, stride_tensor, stride_data));
}

extern "C" fn get_tensor_2d_async(
    b: ggml_backend_t,
    t: *const ggml_tensor,
    data: *mut c_void,
    offset: usize,
    size: usize,
    n_copies: usize,
    stride_tensor: usize,
    stride_data: usize,
) {
    delegate!(b, get_tensor_2d_async(t, data, offset, size, n_copies, stride_tensor, stride_data));
}

extern "C" fn cpy_tensor_async(
    from: ggml_backend_t,
    to: ggml_backend_t,
    src: *const ggml_tensor,
    dst: *mut ggml_tensor,
) -> bool {
    let (from, to) = (inner_of(from), inner_of(to));
    // SAFETY: live backends; ggml calls the destination's function (ggml-backend.cpp,
    // `ggml_backend_tensor_copy_async`), which may be missing in a foreign destination.
    unsafe { (*to).iface.cpy_tensor_async.is_some_and(|copy| copy(from, to, src, dst)) }
}

extern "C" fn synchronize(b: ggml_backend_t) {
    delegate!(b, synchronize());
}

extern "C" fn event_record(b: ggml_backend_t, event: ggml_backend_event_t) {
    delegate!(b, event_record(event));
}

extern "C" fn event_wait(b: ggml_backend_t, event: ggml_backend_event_t) {
    delegate!(b, event_wait(event));
}

/// The scheduler calls this with every part of a graph that it gives to us, also while a context
/// only measures its graphs: the place to learn what they need, and which layers cannot be served,
/// before anything is computed. (The inner backend may have no such function.)
extern "C" fn graph_optimize(
    b: ggml_backend_t,
    graph: *mut ggml_cgraph,
    params: *mut ggml_backend_graph_optimize_params,
) {
    let inner = inner_of(b);
    // SAFETY: a live backend of ggml, arguments passed on as they came.
    unsafe {
        if let Some(optimize) = (*inner).iface.graph_optimize {
            optimize(inner, graph, params);
        }
    }
    contain((), || {
        // SAFETY: ggml calls this with our backend, whose device outlives it, and a live graph.
        let (device, control, graph) = unsafe {
            let this = (*b).context.cast::<Backend>();
            (&*(*this).device, &(*this).control, &*graph)
        };
        control.include(graph, &|tensor| device.is_expert(tensor), device.slots);
        control.look_for_routers(graph, &device.pooled().table());
        if device.on_gpu && control.miss() != Miss::Copy && control.is_being_made() {
            look_for_chains(graph, &device.pooled().table(), control);
        }
        if device.pooled().residency().is_none() {
            let refused = probe::refused(graph, &device.pooled().table());
            refused.into_iter().for_each(|(layer, why)| device.refuse(layer, why));
            device.seen_graph.store(true, Ordering::Release);
        }
    });
}

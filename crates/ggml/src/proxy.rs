//! The proxy device: a ggml device that wraps a real one and hands every call on to it, except
//! that `graph_compute` is ours.
//!
//! llama.cpp gets it as its only device and so schedules the whole forward pass on it. It hands
//! out the inner device's own buffer types, so that KV cache and activations are the inner
//! device's genuine buffers, and accepts one more: the reservation for expert weights
//! ([`crate::weights`]). Nothing is registered globally; one [`Device`] belongs to one model.

use std::collections::HashMap;
use std::ffi::{c_char, c_int, c_void};
use std::ops::Deref;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use tierstream_io::Ticket;

use crate::abi::*;
use crate::error::{Error, Result};
use crate::host::Executor;
use crate::probe;
use crate::residency::Residency;
use crate::weights::{PartRef, WeightTable, buffer_type_iface};

/// Runs `f` and turns a panic into `default`: no panic may cross a C frame.
pub(crate) fn contain<T>(default: T, f: impl FnOnce() -> T) -> T {
    catch_unwind(AssertUnwindSafe(f)).unwrap_or(default)
}

/// The proxy of one model: registry entry, device and weight buffer type, at a fixed address.
pub(crate) struct Device {
    reg: ggml_backend_reg,
    device: ggml_backend_device,
    buft: ggml_backend_buffer_type,
    inner: ggml_backend_dev_t,
    weights: Mutex<WeightTable>,
    residency: OnceLock<Arc<Residency>>,
    /// Held while a context is made, so that it finds its own backend among the newborn.
    birth: Mutex<()>,
    /// Controls of backends made since the last [`Device::take_newborn`].
    newborn: Mutex<Vec<Arc<Control>>>,
    /// MoE layers that cannot be streamed, and why.
    foreign: Mutex<Vec<(usize, String)>>,
    /// Whether a graph has been looked at for such layers.
    seen_graph: AtomicBool,
}

/// Owns a [`Device`]. A raw pointer, not a box: ggml holds pointers into the device, which moving
/// a box would invalidate.
pub(crate) struct OwnedDevice(NonNull<Device>);

// SAFETY: as a box of a `Device`, which is `Send` and `Sync`.
unsafe impl Send for OwnedDevice {}
// SAFETY: as above.
unsafe impl Sync for OwnedDevice {}

impl Deref for OwnedDevice {
    type Target = Device;

    fn deref(&self) -> &Device {
        // SAFETY: live until `drop`; nobody has it exclusively.
        unsafe { self.0.as_ref() }
    }
}

impl Drop for OwnedDevice {
    fn drop(&mut self) {
        // SAFETY: `Device::new` has leaked this box; whoever drops the owner has freed the model
        // and the contexts that refer to it.
        drop(unsafe { Box::from_raw(self.0.as_ptr()) });
    }
}

// SAFETY: the ggml structs are constant after `new`; all else is behind locks. ggml's own device
// functions may be called from any thread.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

impl Device {
    /// Wraps `inner`; `names` are the expert tensors that will live in the pool.
    pub(crate) fn wrap(inner: ggml_backend_dev_t, names: HashMap<String, PartRef>) -> OwnedDevice {
        // SAFETY: `inner` is a device of ggml's registry, which lives for ever.
        let has = unsafe { (*inner).iface };
        let this = Box::new(Device {
            reg: ggml_backend_reg {
                api_version: GGML_BACKEND_API_VERSION as c_int,
                iface: ggml_backend_reg_i {
                    get_name: Some(reg_name),
                    get_device_count: Some(reg_device_count),
                    get_device: Some(reg_device),
                    get_proc_address: Some(reg_proc_address),
                },
                context: ptr::null_mut(),
            },
            device: ggml_backend_device {
                iface: ggml_backend_device_i {
                    get_name: Some(device_name),
                    get_description: Some(device_description),
                    get_memory: Some(device_memory),
                    get_type: Some(device_type),
                    get_props: Some(device_props),
                    init_backend: Some(init_backend),
                    get_buffer_type: Some(device_buffer_type),
                    get_host_buffer_type: has
                        .get_host_buffer_type
                        .and(Some(device_host_buffer_type)),
                    buffer_from_host_ptr: has.buffer_from_host_ptr.and(Some(buffer_from_host_ptr)),
                    supports_op: Some(supports_op),
                    supports_buft: Some(supports_buft),
                    offload_op: has.offload_op.and(Some(offload_op)),
                    event_new: has.event_new.and(Some(event_new)),
                    event_free: has.event_free.and(Some(event_free)),
                    event_synchronize: has.event_synchronize.and(Some(event_synchronize)),
                },
                reg: ptr::null_mut(),
                context: ptr::null_mut(),
            },
            buft: ggml_backend_buffer_type {
                iface: buffer_type_iface(),
                device: ptr::null_mut(),
                context: ptr::null_mut(),
            },
            inner,
            weights: Mutex::new(WeightTable::new(names)),
            residency: OnceLock::new(),
            birth: Mutex::default(),
            newborn: Mutex::default(),
            foreign: Mutex::default(),
            seen_graph: AtomicBool::new(false),
        });
        let this = Box::into_raw(this);
        // SAFETY: live, and ours alone until it is returned.
        unsafe {
            (*this).reg.context = this.cast();
            (*this).device.context = this.cast();
            (*this).device.reg = &raw mut (*this).reg;
            (*this).buft.context = this.cast();
            (*this).buft.device = &raw mut (*this).device;
            OwnedDevice(NonNull::new_unchecked(this))
        }
    }

    /// For llama.cpp's list of devices.
    pub(crate) fn handle(&self) -> ggml_backend_dev_t {
        self.buft.device.cast()
    }

    /// For llama.cpp's list of buffer type overrides.
    pub(crate) fn buffer_type(&self) -> ggml_backend_buffer_type_t {
        let this = self.buft.context.cast::<Device>();
        // SAFETY: the pointer that `new` made, to `self`.
        unsafe { &raw mut (*this).buft }
    }

    /// The device that computes.
    pub(crate) fn inner(&self) -> ggml_backend_dev_t {
        self.inner
    }

    pub(crate) fn weights(&self) -> &Mutex<WeightTable> {
        &self.weights
    }

    pub(crate) fn weight_table(&self) -> MutexGuard<'_, WeightTable> {
        self.weights.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the device its pool, and says whether it had none. Before that, graphs with expert
    /// weights fail.
    #[must_use]
    pub(crate) fn attach(&self, residency: Arc<Residency>) -> bool {
        self.residency.set(residency).is_ok()
    }

    pub(crate) fn residency(&self) -> Option<&Arc<Residency>> {
        self.residency.get()
    }

    /// To be held from making a context to [`Device::take_newborn`].
    pub(crate) fn birth(&self) -> MutexGuard<'_, ()> {
        self.birth.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Controls of the backends made since the last call, oldest first.
    pub(crate) fn take_newborn(&self) -> Vec<Arc<Control>> {
        std::mem::take(&mut *self.newborn.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether ggml has shown us a graph before there was a pool.
    pub(crate) fn has_seen_graph(&self) -> bool {
        self.seen_graph.load(Ordering::Acquire)
    }

    /// MoE layers whose use in the graphs built so far the proxy cannot serve, and why.
    pub(crate) fn foreign_users(&self) -> Vec<(usize, String)> {
        self.foreign.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// What a context and its backend share.
#[derive(Debug)]
pub(crate) struct Control {
    /// The inner backend, until ggml frees ours.
    inner: AtomicPtr<ggml_backend>,
    cancel: AtomicBool,
    /// The reads that the compute thread waits for.
    awaited: Mutex<Option<Arc<Ticket>>>,
    error: Mutex<Option<Error>>,
    /// Time that the compute thread waited for reads, nanoseconds.
    pub(crate) stall_ns: AtomicU64,
}

impl Control {
    /// The wrapped backend, null once it is freed.
    pub(crate) fn inner(&self) -> ggml_backend_t {
        self.inner.load(Ordering::Acquire)
    }

    /// Makes the running and every later graph end with [`Error::Cancelled`] until reset.
    pub(crate) fn cancel(&self, on: bool) {
        self.cancel.store(on, Ordering::Release);
        if on && let Some(ticket) = &*self.awaited() {
            ticket.cancel();
        }
    }

    /// Waits for reads, until somebody cancels.
    pub(crate) fn wait_for(&self, ticket: &Arc<Ticket>) -> Result<()> {
        *self.awaited() = Some(ticket.clone());
        // Whoever cancels from here on finds the ticket; who did so before is seen here.
        let arrived = if self.is_cancelled() { Ok(()) } else { ticket.wait() };
        *self.awaited() = None;
        match arrived {
            _ if self.is_cancelled() => Err(Error::Cancelled),
            // Reset already, but the reads are cancelled.
            Err(tierstream_io::Error::Cancelled) => Err(Error::Cancelled),
            arrived => Ok(arrived?),
        }
    }

    fn awaited(&self) -> MutexGuard<'_, Option<Arc<Ticket>>> {
        self.awaited.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancel.load(Ordering::Acquire)
    }

    /// Why the last graph failed.
    pub(crate) fn take_error(&self) -> Option<Error> {
        self.error.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn fail(&self, error: Error) {
        *self.error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
    }
}

/// One backend (stream) of the proxy: what llama.cpp holds per context.
struct Backend {
    abi: ggml_backend,
    inner: ggml_backend_t,
    device: *const Device,
    control: Arc<Control>,
    executor: Executor,
}

/// Marks our backends, so that `cpy_tensor_async` can tell them from others.
static mut GUID: ggml_guid = *b"tierstream-proxy";

fn guid() -> *mut ggml_guid {
    &raw mut GUID
}

fn inner_of(backend: ggml_backend_t) -> ggml_backend_t {
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
        unsafe { (*inner).iface.$slot.expect("filled only where the inner slot is")(inner $(, $arg)*) }
    }};
}

extern "C" fn init_backend(dev: ggml_backend_dev_t, params: *const c_char) -> ggml_backend_t {
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
        let control = Arc::new(Control {
            inner: AtomicPtr::new(inner),
            cancel: AtomicBool::new(false),
            awaited: Mutex::new(None),
            error: Mutex::new(None),
            stall_ns: AtomicU64::new(0),
        });
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
            control: control.clone(),
            executor: Executor::new(inner, control),
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
        backend.control.inner.store(ptr::null_mut(), Ordering::Release);
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
        let run = AssertUnwindSafe(|| executor.compute(device, graph));
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
/// only measures its graphs: the place to learn which layers cannot be served, before anything is
/// computed. (The inner backend may have no such function.)
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
        let (device, graph) = unsafe { (&*(*(*b).context.cast::<Backend>()).device, &*graph) };
        if device.residency().is_none() {
            let refused = probe::refused(graph, &device.weight_table());
            refused.into_iter().for_each(|(layer, why)| device.refuse(layer, why));
            device.seen_graph.store(true, Ordering::Release);
        }
    });
}

// Device.

fn device<'a>(dev: ggml_backend_dev_t) -> &'a Device {
    // SAFETY: the context of our device is its `Device`, which outlives the model.
    unsafe { &*(*dev).context.cast::<Device>() }
}

/// The inner device of `$dev` and the function that fills `$slot` of its vtable.
macro_rules! delegate_device {
    ($dev:expr, $slot:ident ( $($arg:expr),* )) => {{
        let inner = device($dev).inner;
        // SAFETY: ggml's devices live for ever; arguments passed on as they came.
        unsafe { (*inner).iface.$slot.expect("filled only where the inner slot is")(inner $(, $arg)*) }
    }};
}

extern "C" fn device_name(_: ggml_backend_dev_t) -> *const c_char {
    c"tierstream".as_ptr()
}

extern "C" fn device_description(dev: ggml_backend_dev_t) -> *const c_char {
    delegate_device!(dev, get_description())
}

extern "C" fn device_memory(dev: ggml_backend_dev_t, free: *mut usize, total: *mut usize) {
    delegate_device!(dev, get_memory(free, total));
}

/// llama.cpp gives layers to devices of type GPU only.
extern "C" fn device_type(_: ggml_backend_dev_t) -> ggml_backend_dev_type {
    GGML_BACKEND_DEVICE_TYPE_GPU
}

extern "C" fn device_props(dev: ggml_backend_dev_t, props: *mut ggml_backend_dev_props) {
    delegate_device!(dev, get_props(props));
    // SAFETY: ggml passes a props to fill.
    unsafe {
        (*props).name = device_name(dev);
        (*props).type_ = device_type(dev);
    }
}

extern "C" fn device_buffer_type(dev: ggml_backend_dev_t) -> ggml_backend_buffer_type_t {
    delegate_device!(dev, get_buffer_type())
}

extern "C" fn device_host_buffer_type(dev: ggml_backend_dev_t) -> ggml_backend_buffer_type_t {
    delegate_device!(dev, get_host_buffer_type())
}

extern "C" fn buffer_from_host_ptr(
    dev: ggml_backend_dev_t,
    data: *mut c_void,
    size: usize,
    max_tensor_size: usize,
) -> ggml_backend_buffer_t {
    delegate_device!(dev, buffer_from_host_ptr(data, size, max_tensor_size))
}

/// Everything that the inner device supports. ggml aborts the process when no device takes an
/// operation on a placed weight, so an operation on expert weights that we cannot serve is
/// accepted here, noted, and the model is loaded again with that layer resident.
extern "C" fn supports_op(dev: ggml_backend_dev_t, op: *const ggml_tensor) -> bool {
    contain(false, || {
        let this = device(dev);
        // SAFETY: a live graph node and its sources.
        let node = unsafe { &*op };
        let expert = node.src.iter().enumerate().find(|&(_, &src)| this.is_expert(src));
        // SAFETY: a source of a live node is live. A view of an expert tensor is not in the table.
        let whole = |src: *mut ggml_tensor| unsafe { (*src).view_src.is_null() };
        match expert {
            Some((0, &src)) if node.op == GGML_OP_MUL_MAT_ID && whole(src) => {}
            Some((_, &src)) if node.op != GGML_OP_NONE => this.note_foreign(src, node.op),
            _ => {}
        }
        delegate_device!(dev, supports_op(op))
    })
}

impl Device {
    fn is_expert(&self, tensor: *const ggml_tensor) -> bool {
        // SAFETY: a source of a live graph node is null or a live tensor.
        unsafe {
            !tensor.is_null()
                && !(*tensor).buffer.is_null()
                && (*(*tensor).buffer.cast::<ggml_backend_buffer>()).buft == self.buffer_type()
        }
    }

    fn note_foreign(&self, expert: *const ggml_tensor, op: ggml_op) {
        // A view of an expert tensor stands for the tensor itself.
        // SAFETY: a live tensor.
        let base =
            unsafe { if (*expert).view_src.is_null() { expert } else { (*expert).view_src } };
        let Some(part) = self.weight_table().part(base) else { return };
        // SAFETY: ggml returns a static string for every operation.
        let name = unsafe { std::ffi::CStr::from_ptr(ggml_op_name(op)) };
        self.refuse(
            part.layer,
            format!("operation {} reads its expert weights", name.to_string_lossy()),
        );
    }

    fn refuse(&self, layer: usize, why: String) {
        let mut foreign = self.foreign.lock().unwrap_or_else(PoisonError::into_inner);
        if !foreign.iter().any(|(known, _)| *known == layer) {
            foreign.push((layer, why));
        }
    }
}

extern "C" fn supports_buft(dev: ggml_backend_dev_t, buft: ggml_backend_buffer_type_t) -> bool {
    buft == device(dev).buffer_type() || delegate_device!(dev, supports_buft(buft))
}

extern "C" fn offload_op(dev: ggml_backend_dev_t, op: *const ggml_tensor) -> bool {
    delegate_device!(dev, offload_op(op))
}

extern "C" fn event_new(dev: ggml_backend_dev_t) -> ggml_backend_event_t {
    delegate_device!(dev, event_new())
}

extern "C" fn event_free(dev: ggml_backend_dev_t, event: ggml_backend_event_t) {
    delegate_device!(dev, event_free(event));
}

extern "C" fn event_synchronize(dev: ggml_backend_dev_t, event: ggml_backend_event_t) {
    delegate_device!(dev, event_synchronize(event));
}

// Registry entry.

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
    let (inner, name) = unsafe {
        ((*(*(*reg).context.cast::<Device>()).inner).reg, std::ffi::CStr::from_ptr(name))
    };
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
pub(crate) fn proc_of(
    backend: ggml_backend_t,
    name: &std::ffi::CStr,
) -> Option<ptr::NonNull<c_void>> {
    // SAFETY: a live backend; devices and registries live for ever.
    let f = unsafe {
        let reg = (*(*backend).device).reg;
        ggml_backend_reg_get_proc_address(reg.cast(), name.as_ptr())
    };
    ptr::NonNull::new(f)
}

/// Fails with the note of a callback, if there is one.
pub(crate) fn check_callbacks(device: &Device) -> Result<()> {
    match device.weight_table().take_faults().first() {
        Some(what) => Err(Error::SelfCheck(what.clone())),
        None => Ok(()),
    }
}

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
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use self::backend::init_backend;
pub(crate) use self::registry::proc_of;
use crate::abi::*;
use crate::control::{Control, Manner};
use crate::error::{Error, Result};
use crate::placement::Placement;
use crate::pooled::Pooled;
use crate::weights::{PartRef, buffer_type_iface};

mod backend;
mod registry;

/// The proxy of one model: registry entry, device and weight buffer type, at a fixed address.
pub(crate) struct Device {
    reg: ggml_backend_reg,
    device: ggml_backend_device,
    buft: ggml_backend_buffer_type,
    inner: ggml_backend_dev_t,
    /// Whether experts are in memory of a GPU.
    on_gpu: bool,
    /// What executors need of the model; `buft` points to its table.
    pooled: Pooled,
    /// Held while a context is made, so that it finds its own backend among the newborn.
    birth: Mutex<()>,
    /// How that context will compute.
    next_born: Mutex<Manner>,
    /// The most slots that a window of the pool can have.
    slots: usize,
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
        // SAFETY: `Device::wrap` has leaked this box; whoever drops the owner has freed the model
        // and the contexts that refer to it.
        drop(unsafe { Box::from_raw(self.0.as_ptr()) });
    }
}

// SAFETY: the ggml structs are constant after `wrap`; all else is behind locks. ggml's own device
// functions may be called from any thread.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

impl Device {
    /// Wraps the device of `placement`; `names` are the expert tensors that will live in the pool, `slots` the most
    /// records that one of its size classes can hold.
    ///
    /// # Errors
    /// [`Error::Backend`] if ggml has no such device.
    pub(crate) fn wrap(
        placement: &Placement,
        names: HashMap<String, PartRef>,
        slots: usize,
    ) -> Result<OwnedDevice> {
        let inner = placement.inner()?;
        // SAFETY: `inner` is a device of ggml's registry, which lives for ever.
        let has = unsafe { (*inner).iface };
        let this = Box::new(Device {
            reg: ggml_backend_reg {
                api_version: GGML_BACKEND_API_VERSION as c_int,
                iface: registry::iface(),
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
            on_gpu: placement.gpu().is_some(),
            pooled: Pooled::new(names),
            birth: Mutex::default(),
            next_born: Mutex::default(),
            slots,
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
            (*this).buft.context = ptr::from_ref((*this).pooled.weights()).cast_mut().cast();
            (*this).buft.device = &raw mut (*this).device;
            Ok(OwnedDevice(NonNull::new_unchecked(this)))
        }
    }

    /// For llama.cpp's list of devices.
    pub(crate) fn handle(&self) -> ggml_backend_dev_t {
        self.buft.device.cast()
    }

    /// For llama.cpp's list of buffer type overrides.
    pub(crate) fn buffer_type(&self) -> ggml_backend_buffer_type_t {
        let this = self.device.context.cast::<Device>();
        // SAFETY: the pointer that `wrap` made, to `self`.
        unsafe { &raw mut (*this).buft }
    }

    /// For llama.cpp's list of buffer type overrides: where weights go that are not in the pool.
    pub(crate) fn plain_buffer_type(&self) -> ggml_backend_buffer_type_t {
        // SAFETY: a device of ggml's registry, which lives for ever.
        unsafe { ggml_backend_dev_buffer_type(self.inner.cast()) }.cast()
    }

    /// The expert tensors, and their pool.
    pub(crate) fn pooled(&self) -> &Pooled {
        &self.pooled
    }

    /// Whether experts are in memory of a GPU.
    pub(crate) fn on_gpu(&self) -> bool {
        self.on_gpu
    }

    /// Fails with the note of a callback of the weights' buffer type, if there is one.
    pub(crate) fn check_callbacks(&self) -> Result<()> {
        match self.pooled.table().take_faults().first() {
            Some(what) => Err(Error::SelfCheck(what.clone())),
            None => Ok(()),
        }
    }

    /// To be held from making a context, which will compute so, to [`Device::take_newborn`].
    pub(crate) fn birth(&self, manner: Manner) -> MutexGuard<'_, ()> {
        let guard = self.birth.lock().unwrap_or_else(PoisonError::into_inner);
        *self.next_born.lock().unwrap_or_else(PoisonError::into_inner) = manner;
        guard
    }

    /// How the context will compute that is being made.
    fn next_born(&self) -> Manner {
        *self.next_born.lock().unwrap_or_else(PoisonError::into_inner)
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
        unsafe {
            let function = (*inner).iface.$slot.expect("filled only where the inner slot is");
            function(inner $(, $arg)*)
        }
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
    contain(ptr::null_mut(), || device(dev).plain_buffer_type())
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
        let viewed = unsafe { (*expert).view_src };
        let base = if viewed.is_null() { expert } else { viewed };
        let Some(part) = self.pooled.table().part(base) else { return };
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

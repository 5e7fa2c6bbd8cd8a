//! The buffer type that weights are given which go to a GPU's memory, while llama.cpp loads: the
//! GPU's own, but that what is allocated with it is not read by llama.cpp.
//!
//! It is a copy of the inner device's buffer type, name function and context included, so that ggml
//! takes it for that one. Only its `alloc_buffer_n` is ours: it lets ggml allocate genuine buffers
//! of the genuine type, notes where each tensor is, and hides the tensors' names, as in
//! [`crate::weights`], so that llama.cpp's loader finds nothing to read. After the load nothing
//! refers to this type but llama.cpp's lists of types to choose from; it then allocates what the
//! genuine one does.

use std::ffi::{CStr, c_int};
use std::ptr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::abi::*;
use crate::weights::HiddenNames;

/// The buffer type, and what was allocated with it.
#[repr(C)]
pub(super) struct Loading {
    /// First: ggml has a pointer to it, which stands for the whole.
    buft: ggml_backend_buffer_type,
    /// The genuine one.
    inner: ggml_backend_buffer_type_t,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Whether llama.cpp loads.
    on: bool,
    placed: Vec<PlacedTensor>,
    hidden: HiddenNames,
    /// Buffers that say they are of our type, to be corrected.
    buffers: Vec<ggml_backend_buffer_t>,
    /// What could not be allocated, bytes.
    refused_bytes: Option<usize>,
    /// What went wrong inside a callback.
    faults: Vec<String>,
}

/// A tensor in the GPU's memory that nobody has filled yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PlacedTensor {
    /// Its name in the file.
    pub(crate) name: String,
    /// Where it begins in the device's address space.
    pub(crate) address: u64,
    pub(crate) bytes: u64,
}

impl Loading {
    /// For the memory of `device`, which lives for ever.
    pub(super) fn new(device: ggml_backend_dev_t, on: bool) -> Self {
        // SAFETY: a device of ggml's registry; its buffer type lives for ever.
        let (inner, genuine) = unsafe {
            let inner: ggml_backend_buffer_type_t =
                ggml_backend_dev_buffer_type(device.cast()).cast();
            (inner, ptr::read(inner))
        };
        let mut buft = genuine;
        buft.iface.alloc_buffer = Some(alloc_buffer);
        buft.iface.alloc_buffer_n = Some(alloc_buffer_n);
        Self { buft, inner, state: Mutex::new(State { on, ..State::default() }) }
    }

    /// Whether llama.cpp is to be given this type.
    pub(super) fn is_on(&self) -> bool {
        self.state().on
    }

    /// The load is over, and the model lives: from now on everything is genuine. Returns what is to
    /// be filled.
    pub(super) fn end(&self) -> Vec<PlacedTensor> {
        let mut state = self.state();
        state.on = false;
        state.hidden.restore();
        for buffer in state.buffers.drain(..) {
            // SAFETY: a buffer of the model.
            unsafe { (*buffer).buft = self.inner };
        }
        std::mem::take(&mut state.placed)
    }

    /// What was asked for when there was no memory for it, bytes.
    pub(super) fn refused_bytes(&self) -> Option<usize> {
        self.state().refused_bytes
    }

    /// What callbacks have noted, emptied.
    pub(super) fn take_faults(&self) -> Vec<String> {
        std::mem::take(&mut self.state().faults)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn loading<'a>(buft: ggml_backend_buffer_type_t) -> &'a Loading {
    // SAFETY: the type is the first field of its `Loading`, and the pointer to it was made from one
    // to the whole, which outlives the model.
    unsafe { &*buft.cast::<Loading>() }
}

/// What is allocated without tensors is nothing of ours.
extern "C" fn alloc_buffer(buft: ggml_backend_buffer_type_t, size: usize) -> ggml_backend_buffer_t {
    // SAFETY: the genuine type lives for ever.
    contain(ptr::null_mut(), || unsafe {
        ggml_backend_buft_alloc_buffer(loading(buft).inner.cast(), size).cast()
    })
}

extern "C" fn alloc_buffer_n(
    buft: ggml_backend_buffer_type_t,
    tensors: *mut *mut ggml_tensor,
    n_tensors: c_int,
) -> ggml_backend_buffer_t {
    contain(ptr::null_mut(), || {
        let this = loading(buft);
        // SAFETY: the genuine type lives for ever; arguments passed on as they came.
        let buffer: ggml_backend_buffer_t = unsafe {
            ggml_backend_buft_alloc_buffer_n(this.inner.cast(), tensors, n_tensors).cast()
        };
        let mut state = this.state();
        if !state.on {
            return buffer;
        }
        if buffer.is_null() {
            // SAFETY: as above.
            let bytes = unsafe {
                ggml_backend_buft_get_alloc_size_n(this.inner.cast(), tensors, n_tensors)
            };
            state.refused_bytes = Some(bytes);
            return buffer;
        }
        // With a buffer of the device's own type in sight, llama.cpp's loader would pin 256 MiB to
        // copy from (llama-model-loader.cpp, `load_all_data`), for nothing.
        // SAFETY: just made.
        unsafe { (*buffer).buft = buft };
        state.buffers.push(buffer);
        // SAFETY: ggml passes an array of `n_tensors` live tensors.
        let tensors =
            unsafe { std::slice::from_raw_parts(tensors, usize::try_from(n_tensors).unwrap_or(0)) };
        for &tensor in tensors {
            state.place(tensor);
        }
        buffer
    })
}

impl State {
    /// Notes a live tensor that has its place, and hides its name.
    fn place(&mut self, tensor: *mut ggml_tensor) {
        // SAFETY: live; names are NUL-terminated.
        let (name, address, bytes, viewed) = unsafe {
            let name = CStr::from_ptr((*tensor).name.as_ptr());
            (name, (*tensor).data.addr(), ggml_nbytes(tensor), !(*tensor).view_src.is_null())
        };
        if viewed {
            return;
        }
        let name = name.to_string_lossy().into_owned();
        if address == 0 {
            self.faults.push(format!("ggml has allocated no memory for {name}"));
        }
        self.placed.push(PlacedTensor { name, address: address as u64, bytes: bytes as u64 });
        // SAFETY: live as long as the model; the loader reads the name only after this.
        unsafe { self.hidden.hide(tensor) };
    }
}

#[cfg(test)]
mod tests {
    use std::mem::MaybeUninit;

    use tierstream_cuda::standin::{Config, Fault, GARBAGE, StandIn};

    use super::*;
    use crate::placement::Gpu;

    /// A context with tensors of these types and row lengths, three rows each.
    fn tensors(shapes: &[(ggml_type, i64)]) -> *mut ggml_context {
        // SAFETY: a context without data.
        unsafe {
            let size = ggml_tensor_overhead() * shapes.len();
            let params =
                ggml_init_params { mem_size: size, mem_buffer: ptr::null_mut(), no_alloc: true };
            let ctx = ggml_init(params);
            for (n, &(type_, ne0)) in shapes.iter().enumerate() {
                let tensor = ggml_new_tensor_2d(ctx, type_, ne0, 3);
                let name = std::ffi::CString::new(format!("t{n}")).unwrap();
                ggml_set_name(tensor, name.as_ptr());
            }
            ctx
        }
    }

    fn names(ctx: *mut ggml_context) -> Vec<String> {
        let mut names = Vec::new();
        // SAFETY: a live context.
        unsafe {
            let mut tensor = ggml_get_first_tensor(ctx);
            while !tensor.is_null() {
                names.push(CStr::from_ptr((*tensor).name.as_ptr()).to_string_lossy().into_owned());
                tensor = ggml_get_next_tensor(ctx, tensor);
            }
        }
        names
    }

    fn byte(address: u64) -> u8 {
        let at = ptr::with_exposed_provenance::<MaybeUninit<u8>>(usize::try_from(address).unwrap());
        // SAFETY: memory of a stand-in that is allocated, and was written to.
        unsafe { (*at).assume_init() }
    }

    #[test]
    fn tensors_lie_where_the_device_wants_them_and_are_hidden_until_the_end() {
        let stand_in = StandIn::new(Config::default()).unwrap();
        let gpu = Gpu::stand_in(stand_in.device()).unwrap();
        let loading = Box::into_raw(Box::new(Loading::new(gpu.inner(), true)));
        let ctx = tensors(&[(GGML_TYPE_Q4_0, 96), (GGML_TYPE_F32, 5), (GGML_TYPE_Q8_0, 512)]);
        // SAFETY: all live until they are freed below.
        unsafe {
            let buffer: ggml_backend_buffer_t =
                ggml_backend_alloc_ctx_tensors_from_buft(ctx.cast(), loading.cast()).cast();
            assert_eq!((*buffer).buft, loading.cast());
            assert!(names(ctx).iter().all(|name| name.starts_with('\u{1}')), "{:?}", names(ctx));
            let placed = (*loading).end();
            assert_eq!(names(ctx), ["t0", "t1", "t2"]);
            let inner = ggml_backend_dev_buffer_type(gpu.inner().cast()).cast();
            assert_eq!((*buffer).buft, inner);
            let told: Vec<_> = placed.iter().map(|t| (t.name.as_str(), t.bytes)).collect();
            assert_eq!(told, [("t0", 3 * 54), ("t1", 60), ("t2", 3 * 544)]);
            // Of rows of 96, with room for one of 512 behind, zeros; nothing else is written to.
            let (first, second) = (placed[0].address, placed[1].address);
            assert_eq!(second, (first + 162 + 416 / 32 * 18).next_multiple_of(128));
            assert!((first..first + 162).all(|at| byte(at) == GARBAGE));
            assert!((first + 162..first + 162 + 416 / 32 * 18).all(|at| byte(at) == 0));
            assert!((second..second + 60).all(|at| byte(at) == GARBAGE));
            ggml_backend_buffer_free(buffer.cast());
            ggml_free(ctx);
            // What comes later is genuine, and nobody's names are touched.
            let ctx = tensors(&[(GGML_TYPE_F32, 5)]);
            let buffer: ggml_backend_buffer_t =
                ggml_backend_alloc_ctx_tensors_from_buft(ctx.cast(), loading.cast()).cast();
            let other: ggml_backend_buffer_t =
                ggml_backend_buft_alloc_buffer(loading.cast(), 100).cast();
            assert_eq!(((*buffer).buft, (*other).buft), (inner, inner));
            assert_eq!((names(ctx), (*loading).end()), (vec!["t0".to_owned()], Vec::new()));
            ggml_backend_buffer_free(buffer.cast());
            ggml_backend_buffer_free(other.cast());
            ggml_free(ctx);
            drop(Box::from_raw(loading));
        }
        let memory = stand_in.device().memory().unwrap();
        assert_eq!(memory.free_bytes, memory.total_bytes);
    }

    #[test]
    fn want_of_memory_is_noted() {
        let stand_in = StandIn::new(Config::default()).unwrap();
        let gpu = Gpu::stand_in(stand_in.device()).unwrap();
        let loading = Box::into_raw(Box::new(Loading::new(gpu.inner(), true)));
        let ctx = tensors(&[(GGML_TYPE_F32, 5)]);
        stand_in.inject(Fault::OutOfMemory, 0);
        // SAFETY: as above.
        unsafe {
            assert!(ggml_backend_alloc_ctx_tensors_from_buft(ctx.cast(), loading.cast()).is_null());
            assert_eq!((*loading).refused_bytes(), Some(128));
            assert_eq!((names(ctx), (*loading).end()), (vec!["t0".to_owned()], Vec::new()));
            ggml_free(ctx);
            drop(Box::from_raw(loading));
        }
    }
}

//! The buffer type that expert weights are given while llama.cpp loads: address space, no memory.
//!
//! llama.cpp allocates each tensor in it and then looks the tensor's bytes up in the file by
//! name. We overwrite the first byte of the name as soon as the tensor is allocated, so that the
//! loader finds nothing to read (it skips unknown names: llama-model-loader.cpp, `load_all_data`),
//! and put it back after the load. The addresses are reserved without access rights: whoever
//! reads an expert tensor other than through the pool dies at once instead of computing on
//! nothing.

use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::abi::*;

/// Stands for the first byte of a tensor's name while llama.cpp loads.
const RENAMED: c_char = 1;

/// Tensors start at multiples of this in the reserved address space, bytes.
const ALIGNMENT: usize = 256;

/// Which part of which MoE layer a pooled tensor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PartRef {
    /// Index among the MoE layers of the model.
    pub(crate) layer: usize,
    /// Index among the parts of that layer's records.
    pub(crate) part: usize,
}

/// Tensors whose names llama.cpp's loader does not find in the file.
#[derive(Default)]
pub(crate) struct HiddenNames {
    /// Addresses of tensors, and the first bytes of their names, to be put back.
    renamed: Vec<(usize, c_char)>,
}

impl HiddenNames {
    /// Hides the name of a tensor.
    ///
    /// # Safety
    /// It lives until [`HiddenNames::restore`] is called, or that never is; nobody else looks at its
    /// name meanwhile.
    pub(crate) unsafe fn hide(&mut self, tensor: *mut ggml_tensor) {
        // SAFETY: live, by contract.
        unsafe {
            self.renamed.push((tensor.expose_provenance(), (*tensor).name[0]));
            (*tensor).name[0] = RENAMED;
        }
    }

    /// Puts the names back. Call after the load, while the model lives.
    pub(crate) fn restore(&mut self) {
        for (addr, byte) in self.renamed.drain(..) {
            let tensor = ptr::with_exposed_provenance_mut::<ggml_tensor>(addr);
            // SAFETY: live, by the contract of `hide`.
            unsafe { (*tensor).name[0] = byte };
        }
    }
}

/// The tensors that llama.cpp has placed in our buffer type.
#[derive(Default)]
pub(crate) struct WeightTable {
    /// Every expert tensor by its name in the file.
    names: HashMap<String, PartRef>,
    /// Parts of each MoE layer's records.
    parts: Vec<usize>,
    /// Every expert tensor by its address, once llama.cpp has allocated it.
    tensors: HashMap<usize, PartRef>,
    hidden: HiddenNames,
    /// What went wrong inside a callback.
    faults: Vec<String>,
}

impl WeightTable {
    pub(crate) fn new(names: HashMap<String, PartRef>) -> Self {
        let layers = names.values().map(|p| p.layer + 1).max().unwrap_or(0);
        let mut parts = vec![0; layers];
        for part in names.values() {
            parts[part.layer] += 1;
        }
        Self { names, parts, ..Self::default() }
    }

    /// How many parts the records of a MoE layer have.
    pub(crate) fn parts_of(&self, layer: usize) -> usize {
        self.parts[layer]
    }

    /// How many MoE layers there are.
    pub(crate) fn layers(&self) -> usize {
        self.parts.len()
    }

    /// The same table, as if only the tensors of some layers were ours.
    pub(crate) fn limited_to(&self, layers: &[usize]) -> WeightTable {
        let kept = self.tensors.iter().filter(|(_, part)| layers.contains(&part.layer));
        WeightTable {
            parts: self.parts.clone(),
            tensors: kept.map(|(&address, &part)| (address, part)).collect(),
            ..WeightTable::default()
        }
    }

    /// The part that `tensor` is, if it is one of ours.
    pub(crate) fn part(&self, tensor: *const ggml_tensor) -> Option<PartRef> {
        self.tensors.get(&tensor.addr()).copied()
    }

    /// Puts the names back. Call once, after the load, while the model lives.
    pub(crate) fn restore_names(&mut self) {
        self.hidden.restore();
    }

    /// Names that the file has and llama.cpp never allocated with us.
    pub(crate) fn missing(&self) -> Vec<&str> {
        let placed: std::collections::HashSet<_> =
            self.tensors.values().map(|p| (p.layer, p.part)).collect();
        let mut names: Vec<_> = self
            .names
            .iter()
            .filter(|(_, p)| !placed.contains(&(p.layer, p.part)))
            .map(|(n, _)| n.as_str())
            .collect();
        names.sort_unstable();
        names
    }

    /// What callbacks have noted, emptied.
    pub(crate) fn take_faults(&mut self) -> Vec<String> {
        std::mem::take(&mut self.faults)
    }

    /// Takes `tensor`, which must be live, for the expert weights of its name.
    pub(crate) fn place(&mut self, tensor: *mut ggml_tensor) -> Result<(), String> {
        // SAFETY: called from `alloc_buffer_n` with a live tensor; names are NUL-terminated.
        let name = unsafe { CStr::from_ptr((*tensor).name.as_ptr()) };
        let name = name.to_str().map_err(|_| "a tensor name is not UTF-8".to_owned())?;
        let part = *self.names.get(name).ok_or_else(|| format!("{name} is no expert weight"))?;
        self.tensors.insert(tensor.expose_provenance(), part);
        // SAFETY: it lives as long as the model, and the loader reads the name only after this.
        unsafe { self.hidden.hide(tensor) };
        Ok(())
    }
}

/// The vtable of the buffer type, whose context is a `Mutex<WeightTable>`.
pub(crate) fn buffer_type_iface() -> ggml_backend_buffer_type_i {
    ggml_backend_buffer_type_i {
        get_name: Some(name),
        alloc_buffer: Some(alloc_buffer),
        alloc_buffer_n: Some(alloc_buffer_n),
        get_alignment: Some(alignment),
        get_max_size: None,
        get_alloc_size: None,
        get_alloc_size_n: None,
        is_host: None,
    }
}

extern "C" fn name(_: ggml_backend_buffer_type_t) -> *const c_char {
    c"tierstream experts".as_ptr()
}

extern "C" fn alignment(_: ggml_backend_buffer_type_t) -> usize {
    ALIGNMENT
}

/// ggml calls this for graphs that reserve room without tensors; there is nothing to hold then.
extern "C" fn alloc_buffer(buft: ggml_backend_buffer_type_t, size: usize) -> ggml_backend_buffer_t {
    contain(ptr::null_mut(), || reserve(buft, size))
}

extern "C" fn alloc_buffer_n(
    buft: ggml_backend_buffer_type_t,
    tensors: *mut *mut ggml_tensor,
    n_tensors: c_int,
) -> ggml_backend_buffer_t {
    contain(ptr::null_mut(), || {
        let n = usize::try_from(n_tensors).unwrap_or(0);
        // SAFETY: ggml passes an array of `n_tensors` live tensors.
        let tensors = unsafe { std::slice::from_raw_parts(tensors, n) };
        // SAFETY: reading the shape of a live tensor.
        let padded = |t: *mut ggml_tensor| unsafe { ggml_nbytes(t) }.next_multiple_of(ALIGNMENT);
        let total = tensors.iter().map(|&t| padded(t)).sum();
        let buffer = reserve(buft, total);
        if buffer.is_null() {
            return buffer;
        }
        // SAFETY: `reserve` has just made it; its context is the base address.
        let mut at = unsafe { (*buffer).context }.cast::<u8>();
        let mut table = table(buft);
        for &tensor in tensors {
            // SAFETY: `at` stays inside the reservation of `total` bytes.
            unsafe {
                ggml_backend_tensor_alloc(buffer.cast(), tensor, at.cast());
                at = at.add(padded(tensor));
            }
            if let Err(what) = table.place(tensor) {
                table.faults.push(what);
            }
        }
        buffer
    })
}

fn reserve(buft: ggml_backend_buffer_type_t, size: usize) -> ggml_backend_buffer_t {
    let size = size.max(ALIGNMENT);
    // SAFETY: a fresh anonymous reservation; no access rights, no memory.
    let base = unsafe {
        libc::mmap(
            ptr::null_mut(),
            size,
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if base == libc::MAP_FAILED {
        return ptr::null_mut();
    }
    let iface = ggml_backend_buffer_i {
        free_buffer: Some(free_buffer),
        get_base: Some(get_base),
        init_tensor: None,
        memset_tensor: Some(memset_tensor),
        set_tensor: Some(set_tensor),
        get_tensor: Some(get_tensor),
        set_tensor_2d: None,
        get_tensor_2d: None,
        cpy_tensor: None,
        clear: Some(clear),
        reset: None,
    };
    // SAFETY: all required slots are filled; the buffer takes `base` as its context.
    unsafe { ggml_backend_buffer_init(buft, iface, base, size) }
}

extern "C" fn free_buffer(buffer: ggml_backend_buffer_t) {
    // SAFETY: the mapping that `reserve` made, given back once.
    unsafe { libc::munmap((*buffer).context, (*buffer).size) };
}

extern "C" fn get_base(buffer: ggml_backend_buffer_t) -> *mut c_void {
    // SAFETY: a live buffer of ours.
    unsafe { (*buffer).context }
}

// The four below are never called with the rename in place. Should a new llama.cpp do so, the
// start-up check reports it; the reservation itself must not be touched.

extern "C" fn set_tensor(
    b: ggml_backend_buffer_t,
    t: *mut ggml_tensor,
    _: *const c_void,
    _: usize,
    _: usize,
) {
    note(b, t, "wrote");
}

extern "C" fn get_tensor(
    b: ggml_backend_buffer_t,
    t: *const ggml_tensor,
    _: *mut c_void,
    _: usize,
    _: usize,
) {
    note(b, t, "read");
}

extern "C" fn memset_tensor(
    b: ggml_backend_buffer_t,
    t: *mut ggml_tensor,
    _: u8,
    _: usize,
    _: usize,
) {
    note(b, t, "filled");
}

extern "C" fn clear(_: ggml_backend_buffer_t, _: u8) {}

fn note(buffer: ggml_backend_buffer_t, tensor: *const ggml_tensor, verb: &str) {
    contain((), || {
        // SAFETY: live objects that ggml passed in.
        let (buft, name) =
            unsafe { ((*buffer).buft, CStr::from_ptr((*tensor).name.as_ptr().add(1))) };
        let what = format!("llama.cpp {verb} expert tensor ?{}", name.to_string_lossy());
        table(buft).faults.push(what);
    });
}

fn table<'a>(buft: ggml_backend_buffer_type_t) -> MutexGuard<'a, WeightTable> {
    // SAFETY: the proxy device sets the context of its buffer type to its table, and outlives it.
    let table = unsafe { &*(*buft).context.cast::<Mutex<WeightTable>>() };
    table.lock().unwrap_or_else(PoisonError::into_inner)
}

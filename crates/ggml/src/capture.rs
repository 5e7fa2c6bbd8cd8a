//! What llama.cpp allocates for weights while it loads: where the tensors lie, and that it reads
//! none of them.
//!
//! ggml allocates the tensors of a model one buffer type at a time, through an optional slot of the
//! type's vtable, `alloc_buffer_n`. We fill that slot, once for each type that weights may go to.
//! On a thread that [loads](capture), what is put there then notes each tensor and hides its name,
//! so that llama.cpp's loader finds nothing to read (see [`HiddenNames`]); everywhere else it does
//! what ggml does with an empty slot. Buffers are genuine ones of their types.
//!
//! Tensors in plain host memory lie there as they do in their file: neighbours are neighbours, and
//! each is as far behind the start of a page. So whole blocks of the file can be read straight to
//! them, or mapped.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{CStr, c_int, c_void};
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Mutex, PoisonError};

use tierstream_io::PAGE;

use crate::abi::*;
use crate::error::{Error, Result};
use crate::memory::{self, HUGE_PAGE};
use crate::placement::{Placement, cpu};
use crate::weights::HiddenNames;

/// A tensor that nobody has filled yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Unread {
    /// Its name in the file.
    pub(crate) name: String,
    pub(crate) bytes: u64,
    pub(crate) at: At,
}

/// Where a tensor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum At {
    /// An address in the memory of a GPU.
    Device(u64),
    /// An address in host memory. `in_file_order`: it lies as it does in its file, page by page, and
    /// the pages at its ends hold only what is next to it there, or nothing.
    Host { address: usize, in_file_order: bool },
    /// In memory of a type that has a layout of its own: what writes to this live tensor converts.
    Converted { tensor: usize },
}

impl At {
    /// So many bytes further on.
    pub(crate) fn further(self, bytes: u64) -> Self {
        match self {
            At::Device(address) => At::Device(address + bytes),
            At::Host { address, in_file_order } => {
                let bytes = usize::try_from(bytes).expect("it is in memory");
                At::Host { address: address + bytes, in_file_order }
            }
            converted => converted,
        }
    }
}

/// What a load has left to do.
#[derive(Debug, Default)]
pub(crate) struct Captured {
    pub(crate) unread: Vec<Unread>,
    /// What went wrong inside a callback.
    pub(crate) faults: Vec<String>,
}

/// The buffer types that weights may go to: of the device that computes, of the host, and with
/// `converted` those in which the CPU's kernels have layouts of their own.
pub(crate) fn types_of(placement: &Placement, converted: bool) -> Result<Types> {
    let cpu = cpu()?;
    let mut types: Types = Vec::new();
    let mut add = |buft: ggml_backend_buffer_type_t, kind| {
        if !buft.is_null() && !types.iter().any(|(known, _)| *known == buft) {
            types.push((buft, kind));
        }
    };
    // SAFETY: devices of ggml's registry and their buffer types live for ever.
    unsafe {
        add(ggml_backend_dev_buffer_type(cpu.cast()).cast(), Kind::Plain);
        if let Some(gpu) = placement.gpu() {
            add(ggml_backend_dev_buffer_type(gpu.inner().cast()).cast(), Kind::Device);
            add(ggml_backend_dev_host_buffer_type(gpu.inner().cast()).cast(), Kind::Host);
        }
    }
    if converted {
        extra_types(cpu).into_iter().for_each(|buft| add(buft, Kind::Converted));
    }
    Ok(types)
}

/// Buffer types, and what memory each is of.
pub(crate) type Types = Vec<(ggml_backend_buffer_type_t, Kind)>;

/// What memory a buffer type is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The host's, as ggml has it for the CPU.
    Plain,
    /// The host's, allocated by somebody else: a GPU's driver.
    Host,
    Converted,
    Device,
}

/// The buffer types of a device that have layouts of their own.
fn extra_types(device: ggml_backend_dev_t) -> Vec<ggml_backend_buffer_type_t> {
    type Get = extern "C" fn(ggml_backend_dev_t) -> *mut ggml_backend_buffer_type_t;
    // SAFETY: a device of the registry; ggml gives this name this type
    // (`ggml_backend_dev_get_extra_bufts_t`).
    let get: Option<Get> = unsafe {
        let name = c"ggml_backend_dev_get_extra_bufts".as_ptr();
        let reg = ggml_backend_dev_backend_reg(device.cast());
        std::mem::transmute(ggml_backend_reg_get_proc_address(reg, name))
    };
    let mut types = Vec::new();
    let mut next = get.map_or(ptr::null_mut(), |get| get(device));
    // SAFETY: null, or an array that ends with a null.
    unsafe {
        while !next.is_null() && !(*next).is_null() {
            types.push(*next);
            next = next.add(1);
        }
    }
    types
}

/// Calls `load`, which has llama.cpp load `file` on this thread. What it allocates with one of
/// `types` is not read, but returned.
///
/// # Errors
/// Those of `load`; [`Error::WeightsTooLarge`] and [`Error::OutOfMemory`] if that was for want of
/// memory.
pub(crate) fn capture<T>(
    file: &tierstream_gguf::Model,
    types: Types,
    load: impl FnOnce() -> Result<T>,
) -> Result<(T, Captured)> {
    types.iter().for_each(|&(buft, _)| hook(buft));
    // What lies in several pieces has no such place.
    let whole = file.tensors().iter().filter(|t| t.stride.is_none());
    let places = whole.map(|t| (t.name.clone(), (t.file, t.offset))).collect();
    LOAD.set(Some(Load { types, places, ..Load::default() }));
    // Also if `load` panics.
    let end = End;
    let loaded = load();
    let state = LOAD.take();
    drop(end);
    let state = state.ok_or_else(|| Error::Internal("a load within a load".into()))?;
    match loaded {
        Ok(value) => Ok((value, state.end())),
        Err(error) => Err(state.refused.unwrap_or(error)),
    }
}

struct End;

impl Drop for End {
    fn drop(&mut self) {
        LOAD.set(None);
    }
}

thread_local! {
    /// The load that this thread is in.
    static LOAD: RefCell<Option<Load>> = const { RefCell::new(None) };
}

#[derive(Default)]
struct Load {
    types: Types,
    /// The file of each tensor, and where it begins there.
    places: HashMap<String, (usize, u64)>,
    unread: Vec<Unread>,
    hidden: HiddenNames,
    /// Buffers that say they are of another type, and their own.
    disguised: Vec<(ggml_backend_buffer_t, ggml_backend_buffer_type_t)>,
    /// The types that they say. Boxes: ggml has pointers to them.
    #[expect(clippy::vec_box)]
    disguises: Vec<Box<ggml_backend_buffer_type>>,
    /// What could not be allocated.
    refused: Option<Error>,
    faults: Vec<String>,
}

impl Load {
    /// The load is over, and the model lives.
    fn end(mut self) -> Captured {
        self.hidden.restore();
        for (buffer, buft) in self.disguised {
            // SAFETY: a buffer of the model.
            unsafe { (*buffer).buft = buft };
        }
        Captured { unread: self.unread, faults: self.faults }
    }

    /// What memory a type is of that weights of this load may go to.
    fn kind_of(&self, buft: ggml_backend_buffer_type_t) -> Option<Kind> {
        self.types.iter().find(|(known, _)| *known == buft).map(|(_, kind)| *kind)
    }

    /// Where a tensor begins in which file.
    fn place_of(&self, tensor: *const ggml_tensor) -> Option<(usize, u64)> {
        self.places.get(&*name_of(tensor)).copied()
    }

    /// Notes what a buffer has been allocated for.
    fn note(
        &mut self,
        buft: ggml_backend_buffer_type_t,
        buffer: ggml_backend_buffer_t,
        tensors: &[*mut ggml_tensor],
        kind: Kind,
    ) {
        if kind == Kind::Device {
            // With a buffer of a GPU's own type in sight, llama.cpp's loader would pin 256 MiB to
            // copy from (llama-model-loader.cpp, `load_all_data`), for nothing.
            // SAFETY: a live type, and a buffer that was just made.
            unsafe {
                let mut disguise = Box::new(ptr::read(buft));
                (*buffer).buft = &raw mut *disguise;
                self.disguises.push(disguise);
            }
            self.disguised.push((buffer, buft));
        }
        for &tensor in tensors {
            // SAFETY: live.
            let (address, bytes, viewed) = unsafe {
                ((*tensor).data.addr(), ggml_nbytes(tensor), !(*tensor).view_src.is_null())
            };
            if viewed {
                continue;
            }
            let name = name_of(tensor);
            if address == 0 {
                self.faults.push(format!("ggml has allocated no memory for {name}"));
            }
            let at = match kind {
                Kind::Device => At::Device(address as u64),
                Kind::Converted => At::Converted { tensor: tensor.expose_provenance() },
                Kind::Host | Kind::Plain => {
                    // SAFETY: as above.
                    let address = unsafe { (*tensor).data.expose_provenance() };
                    let place = self.places.get(&name).filter(|_| kind == Kind::Plain);
                    let in_file_order =
                        place.is_some_and(|&(_, offset)| address % PAGE == offset as usize % PAGE);
                    At::Host { address, in_file_order }
                }
            };
            self.unread.push(Unread { name, bytes: bytes as u64, at });
            // SAFETY: live as long as the model; the loader reads the name only after this.
            unsafe { self.hidden.hide(tensor) };
        }
    }
}

fn name_of(tensor: *const ggml_tensor) -> String {
    // SAFETY: a live tensor; names are NUL-terminated.
    unsafe { CStr::from_ptr((*tensor).name.as_ptr()) }.to_string_lossy().into_owned()
}

type AllocBufferN = unsafe extern "C" fn(
    ggml_backend_buffer_type_t,
    *mut *mut ggml_tensor,
    c_int,
) -> ggml_backend_buffer_t;

/// The types that are hooked, by address, and what their slots held.
static HOOKED: Mutex<Vec<(usize, Option<AllocBufferN>)>> = Mutex::new(Vec::new());

/// Has what is allocated for tensors with a type go through us. For good: the type lives for ever.
fn hook(buft: ggml_backend_buffer_type_t) {
    // A type with a largest size splits its tensors over several buffers, which are not told apart
    // here; llama.cpp reads those itself.
    // SAFETY: a live type.
    if unsafe { ggml_backend_buft_get_max_size(buft.cast()) } != usize::MAX {
        return;
    }
    let mut hooked = HOOKED.lock().unwrap_or_else(PoisonError::into_inner);
    if hooked.iter().any(|(known, _)| *known == buft.addr()) {
        return;
    }
    // SAFETY: the slot of a live type, as large as a pointer; null is the empty one. Whoever reads it
    // meanwhile gets the one or the other, which do the same on a thread that does not load.
    let before = unsafe {
        let slot = (&raw mut (*buft).iface.alloc_buffer_n).cast::<*mut c_void>();
        hooked.push((buft.addr(), (*buft).iface.alloc_buffer_n));
        AtomicPtr::from_ptr(slot)
    };
    before.store(alloc_buffer_n as *mut c_void, Ordering::Release);
}

extern "C" fn alloc_buffer_n(
    buft: ggml_backend_buffer_type_t,
    tensors: *mut *mut ggml_tensor,
    n_tensors: c_int,
) -> ggml_backend_buffer_t {
    contain(ptr::null_mut(), || {
        let kind = LOAD.with_borrow(|load| load.as_ref().and_then(|load| load.kind_of(buft)));
        let Some(kind) = kind else { return genuine(buft, tensors, n_tensors) };
        let count = usize::try_from(n_tensors).unwrap_or(0);
        // SAFETY: ggml passes an array of `n_tensors` live tensors.
        let all = unsafe { std::slice::from_raw_parts(tensors, count) };
        let buffer = match kind {
            Kind::Plain => LOAD.with_borrow(|load| {
                load.as_ref().map_or(ptr::null_mut(), |load| in_file_order(load, all))
            }),
            _ => genuine(buft, tensors, n_tensors),
        };
        LOAD.with_borrow_mut(|load| {
            let Some(load) = load else { return };
            if buffer.is_null() {
                let size_of = ggml_backend_buft_get_alloc_size_n;
                // SAFETY: a live type; arguments passed on as they came.
                let bytes = unsafe { size_of(buft.cast(), tensors, n_tensors) };
                load.refused = Some(match kind {
                    Kind::Device => Error::WeightsTooLarge { bytes },
                    _ => Error::OutOfMemory { bytes, what: "weights" },
                });
            } else {
                load.note(buft, buffer, all, kind);
            }
        });
        buffer
    })
}

/// What ggml does without us.
fn genuine(
    buft: ggml_backend_buffer_type_t,
    tensors: *mut *mut ggml_tensor,
    n_tensors: c_int,
) -> ggml_backend_buffer_t {
    let hooked = HOOKED.lock().unwrap_or_else(PoisonError::into_inner);
    let before = hooked.iter().find(|(known, _)| *known == buft.addr()).and_then(|(_, f)| *f);
    drop(hooked);
    // SAFETY: arguments passed on as they came. A copy of the type with the slot empty has ggml do
    // by itself; no buffer keeps a pointer to it.
    unsafe {
        if let Some(before) = before {
            return before(buft, tensors, n_tensors);
        }
        let mut plain = ptr::read(buft);
        plain.iface.alloc_buffer_n = None;
        let buffer: ggml_backend_buffer_t =
            ggml_backend_buft_alloc_buffer_n((&raw mut plain).cast(), tensors, n_tensors).cast();
        if !buffer.is_null() {
            (*buffer).buft = buft;
        }
        buffer
    }
}

/// A buffer of host memory with `tensors` as they lie in their files.
fn in_file_order(load: &Load, tensors: &[*mut ggml_tensor]) -> ggml_backend_buffer_t {
    // SAFETY: live tensors; the type lives for ever.
    let (align, mut items) = unsafe {
        let own = |t: &*mut ggml_tensor| (**t).view_src.is_null() && (**t).data.is_null();
        let item = |&t: &*mut ggml_tensor| (load.place_of(t), ggml_nbytes(t), t);
        let items: Vec<_> = tensors.iter().filter(|t| own(t)).map(item).collect();
        (ggml_backend_buft_get_alignment(ggml_backend_cpu_buffer_type()), items)
    };
    items.sort_by_key(|(place, ..)| *place);
    let (offsets, bytes) = lay_out(items.iter().map(|&(place, bytes, _)| (place, bytes)), align);
    let buffer = memory::mapped_buffer(bytes);
    if buffer.is_null() {
        return buffer;
    }
    // SAFETY: the buffer was just made, and `lay_out` has given each tensor its room.
    unsafe {
        let base = ggml_backend_buffer_get_base(buffer.cast()).cast::<u8>();
        for ((.., tensor), offset) in items.iter().zip(offsets) {
            ggml_backend_tensor_alloc(buffer.cast(), *tensor, base.add(offset).cast());
        }
        for &tensor in tensors {
            if !(*tensor).view_src.is_null() && (*tensor).buffer.is_null() {
                ggml_backend_view_init(tensor);
            }
        }
    }
    buffer
}

/// From this size on, bytes that lie together in a file do so in huge pages as there.
const HUGE_RUN_BYTES: usize = 32 * HUGE_PAGE;

/// Offsets from the start of a huge page for tensors with these places in files and lengths, in order,
/// and the bytes of all. Neighbours in a file stay neighbours, as far behind the start of a page as
/// there, and of a huge page where there are enough of them: the page cache has such, too, and they can
/// be mapped as they are. Others share no page. A tensor that would not lie on a multiple of `align` that
/// way lies somewhere by itself.
fn lay_out(
    tensors: impl Iterator<Item = (Option<(usize, u64)>, usize)>,
    align: usize,
) -> (Vec<usize>, usize) {
    // What lies together: bytes from its start to each tensor, and to its end.
    let mut runs: Vec<(Option<u64>, Vec<usize>, usize)> = Vec::new();
    let mut before: Option<(usize, u64)> = None;
    for (place, bytes) in tensors {
        // Of the page that it begins in.
        let place = place.filter(|(_, offset)| offset.is_multiple_of(align as u64));
        let gap = match (before, place) {
            (Some((file, after)), Some((this, offset))) if file == this => {
                offset.checked_sub(after).and_then(|gap| usize::try_from(gap).ok())
            }
            _ => None,
        };
        match (gap.filter(|gap| *gap < PAGE), runs.last_mut()) {
            (Some(gap), Some((_, starts, end))) => {
                starts.push(*end + gap);
                *end += gap + bytes;
            }
            _ => runs.push((place.map(|(_, offset)| offset), vec![0], bytes)),
        }
        before = place.map(|(file, offset)| (file, offset + bytes as u64));
    }
    let mut offsets = Vec::new();
    let mut all = 0usize;
    for (offset, starts, bytes) in runs {
        // A huge page that is used in part costs memory.
        let page = if bytes >= HUGE_RUN_BYTES { HUGE_PAGE } else { PAGE };
        let start = all.next_multiple_of(page) + offset.map_or(0, |offset| offset as usize % page);
        offsets.extend(starts.into_iter().map(|at| start + at));
        all = start + bytes;
    }
    (offsets, all.next_multiple_of(PAGE))
}

#[cfg(test)]
mod tests;

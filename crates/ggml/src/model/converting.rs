//! Weights that the CPU's kernels have layouts of their own for: read some rows at a time, and
//! converted by ggml as they come, on several threads.

use std::ffi::CStr;
use std::num::NonZero;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use tierstream_io::{Extent, Reader};

use crate::abi::*;
use crate::error::{Error, Result};
use crate::verified::{Of, Stream};

/// Bytes that are read and converted together, about: a thread's memory for it.
const PART_BYTES: u64 = 4 << 20;

/// Of parts that are larger, one is read and converted at a time: whole tensors, in layouts that cannot be
/// made of some of the rows.
const ALONE_BYTES: u64 = 2 * PART_BYTES;

/// ggml's "repack" layouts weave 8 or 16 rows together, and nothing beyond these.
const ROWS_MULTIPLE: u64 = 64;

/// The most threads that convert.
const THREADS_MAX: usize = 8;

/// What is to be read and converted.
#[derive(Default)]
pub(super) struct Converting {
    parts: Vec<Part>,
    next: AtomicUsize,
    done_bytes: AtomicU64,
    stopped: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
    /// Held by who has a large part.
    alone: Mutex<()>,
    /// Of tensors that are compared with their checksums.
    checks: Vec<InTurn>,
}

#[derive(Default)]
struct State {
    done: usize,
    failed: Option<Error>,
}

/// Some rows of a tensor.
struct Part {
    extent: Extent,
    /// A tensor of just these rows.
    rows: ggml_tensor,
    /// Index of what its tensor is compared by, and where in the tensor it begins.
    check: Option<(usize, u64)>,
}

// SAFETY: a tensor of a model that is being loaded, which nobody computes with.
unsafe impl Send for Part {}
// SAFETY: distinct parts cover distinct memory.
unsafe impl Sync for Part {}

impl Converting {
    /// Adds a tensor that is read from `extent`, each part of it from where `source` says, and compared
    /// with its checksum if there is one.
    ///
    /// # Safety
    /// `tensor` is the address of a live, allocated tensor of `extent`'s length that lives as long as
    /// this.
    pub(super) unsafe fn add(
        &mut self,
        extent: Extent,
        tensor: usize,
        check: Option<Of>,
        source: impl Fn(Extent) -> Extent,
    ) {
        let check = check.map(|of| {
            self.checks.push(InTurn::new(Stream::from(of, 0)));
            self.checks.len() - 1
        });
        let tensor = ptr::with_exposed_provenance::<ggml_tensor>(tensor);
        // SAFETY: live, by contract; strings of ggml's are static.
        let (whole, buft) = unsafe {
            let buft = ggml_backend_buffer_get_type((*tensor).buffer);
            (ptr::read(tensor), CStr::from_ptr(ggml_backend_buft_name(buft)))
        };
        let all = u64::try_from(whole.ne[1]).unwrap_or(0);
        let is_matrix = whole.ne[2] == 1 && whole.ne[3] == 1 && all > 0;
        // Other layouts may depend on all rows.
        let rows = match buft.to_bytes() {
            b"CPU_REPACK" if is_matrix => {
                let row_bytes = (extent.len / all).max(1);
                (PART_BYTES / row_bytes).max(1).next_multiple_of(ROWS_MULTIPLE)
            }
            _ => all.max(1),
        };
        let row_bytes = extent.len / all.max(1);
        let mut first = 0;
        while first < all.max(1) {
            let count = rows.min(all.max(1) - first);
            let is_whole = count == all.max(1);
            let mut part = whole;
            let mut part_extent = extent;
            if !is_whole {
                part.ne[1] = i64::try_from(count).expect("fewer than the tensor has");
                part.nb[2] = part.nb[1] * count as usize;
                part.nb[3] = part.nb[2];
                part.data = part.data.wrapping_byte_add(part.nb[1] * first as usize);
                part_extent.offset += first * row_bytes;
                part_extent.len = count * row_bytes;
            }
            let check = check.map(|check| (check, part_extent.offset - extent.offset));
            self.parts.push(Part { extent: source(part_extent), rows: part, check });
            first += count;
        }
    }

    /// Bytes to be read.
    pub(super) fn bytes(&self) -> u64 {
        self.parts.iter().map(|part| part.extent.len).sum()
    }

    /// Bytes that are converted.
    pub(super) fn done_bytes(&self) -> u64 {
        self.done_bytes.load(Ordering::Relaxed)
    }

    /// Reads and converts until all is done, or `wait` gives up.
    pub(super) fn while_working<T>(
        &self,
        reader: &Reader,
        wait: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let cores = thread::available_parallelism().map_or(1, NonZero::get);
        thread::scope(|scope| {
            for _ in 0..cores.min(THREADS_MAX).min(self.parts.len()) {
                scope.spawn(|| self.work(reader));
            }
            // Also if it panics.
            let _stop = Stop(self);
            wait()
        })
    }

    /// Whether all is done, waiting for so long at most.
    ///
    /// # Errors
    /// Of a read.
    pub(super) fn wait_timeout(&self, most: Duration) -> Result<bool> {
        let open = |state: &mut State| state.failed.is_none() && state.done < self.parts.len();
        let state = self.changed.wait_timeout_while(self.state(), most, open);
        let (state, _) = state.unwrap_or_else(PoisonError::into_inner);
        match &state.failed {
            Some(error) => Err(error.clone()),
            None => Ok(state.done == self.parts.len()),
        }
    }

    fn work(&self, reader: &Reader) {
        let mut bytes = Vec::new();
        while !self.stopped.load(Ordering::Relaxed)
            && let Some(part) = self.parts.get(self.next.fetch_add(1, Ordering::Relaxed))
        {
            let is_large = part.extent.len > ALONE_BYTES;
            let alone = is_large.then(|| self.alone.lock().unwrap_or_else(PoisonError::into_inner));
            bytes.resize(part.extent.len as usize, 0);
            let read = reader.read(part.extent, &mut bytes).map_err(Error::from);
            let read = read.and_then(|()| self.check(part, &bytes));
            if read.is_ok() {
                let mut rows = part.rows;
                // SAFETY: rows of a live tensor, and as many bytes as they take.
                unsafe {
                    ggml_backend_tensor_set(&raw mut rows, bytes.as_ptr().cast(), 0, bytes.len());
                }
                self.done_bytes.fetch_add(part.extent.len, Ordering::Relaxed);
            }
            if is_large {
                bytes = Vec::new();
            }
            drop(alone);
            let mut state = self.state();
            match read {
                Ok(()) => state.done += 1,
                Err(error) => _ = state.failed.get_or_insert(error),
            }
            let failed = state.failed.is_some();
            drop(state);
            if failed {
                self.stop();
            }
            self.changed.notify_all();
        }
    }

    /// Compares a part when those before it in its tensor have been; nothing when all has stopped.
    fn check(&self, part: &Part, bytes: &[u8]) -> Result<()> {
        let Some((check, at)) = part.check else { return Ok(()) };
        let InTurn { state, changed } = &self.checks[check];
        let state = state.lock().unwrap_or_else(PoisonError::into_inner);
        // Parts are taken in order: what this one waits for is with another thread.
        let early =
            |(next, _): &mut (u64, Stream)| *next != at && !self.stopped.load(Ordering::Relaxed);
        let waited = changed.wait_while(state, early);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner);
        let (next, stream) = &mut *state;
        if *next != at {
            return Ok(());
        }
        *next += bytes.len() as u64;
        changed.notify_all();
        stream.update(bytes)
    }

    /// Nothing more is read.
    fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
        for InTurn { state, changed } in &self.checks {
            // So that nobody is between looking and waiting.
            drop(state.lock().unwrap_or_else(PoisonError::into_inner));
            changed.notify_all();
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A tensor whose parts are compared one after the other, whichever threads have them.
struct InTurn {
    /// Where the next part begins in the tensor.
    state: Mutex<(u64, Stream)>,
    changed: Condvar,
}

impl InTurn {
    fn new(stream: Stream) -> Self {
        Self { state: Mutex::new((0, stream)), changed: Condvar::new() }
    }
}

struct Stop<'a>(&'a Converting);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.stop();
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tierstream_io::Config;

    use super::*;
    use crate::capture::{Kind, types_of};
    use crate::placement::Placement;

    /// Bytes that have a pattern of their own everywhere.
    fn pattern(bytes: usize) -> Vec<u8> {
        (0..bytes).map(|i| (i * 7 + i / 251) as u8).collect()
    }

    /// A matrix in memory of a type, and what is in there after `fill`.
    fn filled(
        buft: ggml_backend_buffer_type_t,
        type_: ggml_type,
        (ne0, ne1): (i64, i64),
        fill: impl FnOnce(*mut ggml_tensor),
    ) -> Vec<u8> {
        // SAFETY: a context of one tensor, which is allocated and freed here.
        unsafe {
            let params = ggml_init_params {
                mem_size: ggml_tensor_overhead(),
                mem_buffer: ptr::null_mut(),
                no_alloc: true,
            };
            let ctx = ggml_init(params);
            let tensor: *mut ggml_tensor = ggml_new_tensor_2d(ctx, type_, ne0, ne1).cast();
            let buffer = ggml_backend_alloc_ctx_tensors_from_buft(ctx, buft.cast());
            fill(tensor);
            let data = (*tensor).data.cast::<u8>();
            let all = std::slice::from_raw_parts(data, ggml_nbytes(tensor)).to_vec();
            ggml_backend_buffer_free(buffer);
            ggml_free(ctx);
            all
        }
    }

    /// Rows at a time give what ggml makes of the whole, whatever the number of rows.
    #[test]
    fn parts_are_converted_as_the_whole_is() {
        let types = types_of(&Placement::Cpu, true).unwrap();
        let name = |buft: ggml_backend_buffer_type_t| {
            // SAFETY: a live type; its name lives for ever.
            unsafe { CStr::from_ptr(ggml_backend_buft_name(buft.cast())) }
        };
        let repack = types.iter().find(|(buft, _)| name(*buft) == c"CPU_REPACK");
        let &(repack, kind) = repack.expect("a CPU with AVX2, or NEON");
        assert_eq!(kind, Kind::Converted);
        let dir = tempfile::tempdir_in(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target"));
        let path = dir.as_ref().unwrap().path().join("weights");
        for (type_, ne0) in [(GGML_TYPE_Q4_0, 4096), (GGML_TYPE_Q4_K, 8192)] {
            for ne1 in [8, 64, 2048 + 8, 4096] {
                // SAFETY: a pure function.
                let bytes = unsafe { ggml_row_size(type_, ne0) } * ne1 as usize;
                let source = pattern(bytes);
                let offset = 1234;
                std::fs::write(&path, [&vec![0; offset][..], &source].concat()).unwrap();
                let reader = Reader::new(Config::default()).unwrap();
                let file = reader.open(&path).unwrap();
                let extent = Extent { file, offset: offset as u64, len: bytes as u64 };
                let whole = filled(repack, type_, (ne0, ne1), |tensor| {
                    // SAFETY: as many bytes as the tensor takes.
                    unsafe {
                        ggml_backend_tensor_set(tensor, source.as_ptr().cast(), 0, bytes);
                    }
                });
                let parts = filled(repack, type_, (ne0, ne1), |tensor| {
                    let mut converting = Converting::default();
                    // SAFETY: a live tensor, which outlives this.
                    unsafe {
                        converting.add(extent, tensor.expose_provenance(), None, |extent| extent);
                    }
                    assert_eq!(converting.bytes(), bytes as u64);
                    assert_eq!(converting.parts.len() > 1, ne1 > 2048);
                    let wait = || converting.wait_timeout(Duration::from_secs(60));
                    assert!(converting.while_working(&reader, wait).unwrap());
                    assert_eq!(converting.done_bytes(), bytes as u64);
                });
                assert!(whole == parts, "{ne0} x {ne1}");
                assert!(whole != source);
            }
        }
    }
}

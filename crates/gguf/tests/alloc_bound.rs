//! Memory stays proportional to the bytes of a file that are really there, whatever it claims.
//!
//! A test binary of its own, because the counting allocator sees the whole process.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{Raw, counts, string};
use tierstream_gguf::{Header, limits};

struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes on to `System` unchanged; the counters allocate nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(live, Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `GlobalAlloc::alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: `pointer` came from `alloc` above, and so from `System`, with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Peak bytes allocated while the header of `bytes` is read.
fn peak_of(bytes: &[u8]) -> usize {
    let before = LIVE.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    drop(Header::read(std::io::Cursor::new(bytes)));
    PEAK.load(Ordering::Relaxed) - before
}

const STR: u32 = 8;
const ARRAY: u32 = 9;

fn array(element: u32, count: u64, body: &[u8]) -> Vec<u8> {
    [&element.to_le_bytes()[..], &count.to_le_bytes(), body].concat()
}

#[test]
fn memory_is_bounded_by_the_file() {
    let zeros = vec![0u8; 1 << 20];
    let mut files = vec![
        counts(3, limits::MAX_TENSORS, 0),
        counts(3, 0, limits::MAX_METADATA_PAIRS),
        counts(3, u64::MAX, u64::MAX),
        [counts(3, 40_000, 0), zeros.clone()].concat(),
        [counts(3, 0, 60_000), zeros.clone()].concat(),
        Raw::default().pair("k", STR, (1u64 << 25).to_le_bytes()).bytes(),
        // The densest forms: empty strings, empty inner arrays, pairs and tensors with short names.
        Raw::default().pair("k", ARRAY, array(STR, 1 << 17, &zeros)).bytes(),
        Raw::default().pair("k", ARRAY, array(ARRAY, (1 << 20) / 12, &zeros)).bytes(),
    ];
    for element in [0, 1, 4, 6, 7, STR, ARRAY, 10, 12] {
        files.push(
            Raw::default()
                .pair("k", ARRAY, array(element, limits::MAX_ARRAY_ELEMENTS, &zeros))
                .bytes(),
        );
        files.push(Raw::default().pair("k", ARRAY, array(element, (1 << 20) / 8, &zeros)).bytes());
    }
    let mut pairs = Raw::default();
    let mut tensors = Raw::default();
    for number in 0..20_000u32 {
        pairs.pairs.push([&string(format!("{number:x}"))[..], &0u32.to_le_bytes(), &[0]].concat());
        tensors = tensors.tensor(format!("{number:x}"), &[], 0, u64::from(number) * 32);
    }
    files.push(pairs.bytes());
    files.push(tensors.data(20_000 * 32).bytes());

    for (index, bytes) in files.iter().enumerate() {
        let peak = peak_of(bytes);
        // The reader's own buffer, the first allocation of a long field, and an error.
        let bound = 16 * bytes.len() + (160 << 10);
        assert!(peak <= bound, "file {index} of {} bytes: {peak} bytes", bytes.len());
    }
}

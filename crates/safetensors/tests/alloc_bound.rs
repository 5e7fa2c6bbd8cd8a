//! Memory stays proportional to the bytes of a header that are really there, whatever it claims.
//!
//! A test binary of its own, because the counting allocator sees the whole process.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use common::raw;
use tierstream_safetensors::{Header, Index};

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

/// Peak bytes allocated while `read` runs.
fn peak_of(read: impl FnOnce()) -> usize {
    let before = LIVE.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    read();
    PEAK.load(Ordering::Relaxed) - before
}

/// The densest forms of everything that is kept.
#[test]
fn memory_is_bounded_by_the_file() {
    let many = |count: usize, one: &dyn Fn(usize) -> String| {
        (0..count).map(one).collect::<Vec<String>>().join(",")
    };
    let tensor = "{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}";
    let headers = [
        format!("{{{}}}", many(40_000, &|n| format!("\"{n:x}\":{tensor}"))),
        format!("{{\"__metadata__\":{{{}}}}}", many(60_000, &|n| format!("\"{n:x}\":\"\""))),
        format!("{{\"t\":{{\"shape\":[{}]}}}}", many(500_000, &|_| "1".to_owned())),
        format!("{{\"t\":{{\"x\":[{}]}}}}", many(500_000, &|_| "{}".to_owned())),
        format!("{{\"{}\":1}}", "\\u0001".repeat(100_000)),
        format!("{{\"t\":{{\"dtype\":\"{}\"}}}}", "x".repeat(1_000_000)),
    ];
    for (number, header) in headers.iter().enumerate() {
        let bytes = raw(header, &[]);
        let peak = peak_of(|| drop(Header::from_bytes(&bytes)));
        let bound = 16 * bytes.len() + (64 << 10);
        assert!(peak <= bound, "header {number} of {} bytes: {peak}", bytes.len());
    }
    let claims = [&(1u64 << 26).to_le_bytes()[..], b"{"].concat();
    let peak = peak_of(|| drop(Header::from_bytes(&claims)));
    assert!(peak < 64 << 10, "{peak}");

    let map = many(60_000, &|n| format!("\"{n:x}\":\"a\""));
    let index = format!("{{\"weight_map\":{{{map}}},\"x\":[{}]}}", many(100_000, &|_| "[]".into()));
    let peak = peak_of(|| drop(Index::from_bytes(index.as_bytes())));
    assert!(peak <= 16 * index.len(), "{} bytes: {peak}", index.len());
}

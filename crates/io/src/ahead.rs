//! Memory that is got before it is read to.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use rustix::mm::Advice;

use crate::ring::PAGE;

/// From this size on, memory is got ahead, in bytes. Below, a thread costs more than it saves.
const LEAST_BYTES: usize = 32 << 20;

/// How much memory is got at a time, in bytes: little enough to be stopped soon.
const STEP_BYTES: usize = 8 << 20;

/// A thread that makes the system find physical memory for what reads are about to write to.
///
/// Otherwise the first write to a page does, and with direct reads that is all on the one thread that
/// submits them: the drive waits while it clears page after page.
#[derive(Debug)]
pub struct Ahead {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Ahead {
    /// Starts with the first of `ranges`, of addresses, whoever writes there meanwhile: no contents
    /// change. Ends with the last, with addresses that are nobody's, or when this is dropped.
    pub fn start(ranges: Vec<Range<usize>>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let bytes = ranges.iter().map(ExactSizeIterator::len).fold(0, usize::saturating_add);
        let thread = (bytes >= LEAST_BYTES).then(|| {
            let stop = Arc::clone(&stop);
            let thread = std::thread::Builder::new().name("io-ahead".to_owned());
            // Without it, the memory is got as it is read to.
            thread.spawn(move || get(&ranges, &stop)).ok()
        });
        Self { stop, thread: thread.flatten() }
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn get(ranges: &[Range<usize>], stop: &AtomicBool) {
    for range in ranges.iter().filter(|range| !range.is_empty()) {
        let mut at = range.start - range.start % PAGE;
        let end = range.end.next_multiple_of(PAGE);
        while at < end {
            let step = STEP_BYTES.min(end - at);
            if stop.load(Ordering::Relaxed) || !populate(at, step) {
                return;
            }
            at += step;
        }
    }
}

/// Gets the pages of these addresses, the first a multiple of [`PAGE`]; says whether the kernel does
/// that.
pub(crate) fn populate(at: usize, bytes: usize) -> bool {
    let at = std::ptr::without_provenance_mut(at);
    // SAFETY: populating keeps contents, also those that are being written, whoever's they are;
    // addresses without memory are an error.
    unsafe { rustix::mm::madvise(at, bytes, Advice::LinuxPopulateWrite) }.is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pages::Pages;

    /// Pages of this memory that the system has found.
    fn resident(pages: &Pages) -> usize {
        let mut vec = vec![0u8; pages.len() / PAGE];
        // SAFETY: a mapping of this length, and a byte for each of its pages.
        let rc = unsafe {
            libc::mincore(pages.as_ptr().cast_mut().cast(), pages.len(), vec.as_mut_ptr().cast())
        };
        assert_eq!(rc, 0);
        vec.iter().filter(|byte| **byte & 1 == 1).count()
    }

    #[test]
    fn all_of_it_is_got_and_none_of_it_changed() {
        let mut pages = Pages::new(40 << 20).unwrap();
        pages[7] = 7;
        let start = pages.as_ptr().addr();
        assert!(resident(&pages) < pages.len() / PAGE);
        let mut ahead =
            Ahead::start(vec![start + 5..start + 5, start + 1..start + pages.len() - 1]);
        ahead.thread.take().unwrap().join().unwrap();
        assert_eq!(resident(&pages), pages.len() / PAGE);
        assert_eq!(pages[7], 7);
    }

    #[test]
    fn little_memory_needs_no_thread_and_nobodys_stops_it() {
        assert!(Ahead::start(vec![PAGE..2 * PAGE, PAGE..PAGE]).thread.is_none());
        let mut ahead = Ahead::start(vec![0..LEAST_BYTES, 0..PAGE]);
        ahead.thread.take().unwrap().join().unwrap();
    }
}

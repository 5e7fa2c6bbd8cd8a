//! Reads of mapped files that fail: the file was cut, or the drive did not give a page back.
//!
//! The kernel ends a program that such a thing happens to, with SIGBUS. Where the pages are watched, zeros
//! take the place of them instead, from the one that cannot be had on, and a flag says so: whoever has read
//! there is to throw away what came of it, and to read there no more.

use std::ffi::{c_int, c_void};
use std::io;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use crate::ring::PAGE;
use crate::sync::lock;

/// Ranges in a block of the list that the handler goes through.
const SLOTS: usize = 64;

/// What is watched: blocks that are never freed, since the handler may be in them at any time.
static WATCHED: Block = Block::new();

/// Who changes [`WATCHED`].
static CHANGING: Mutex<()> = Mutex::new(());

/// What was to be done about SIGBUS before.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

struct Block {
    slots: [Slot; SLOTS],
    next: AtomicPtr<Block>,
}

/// Addresses, and what is set when something there is lost. Free when it ends at 0.
struct Slot {
    start: AtomicUsize,
    end: AtomicUsize,
    lost: AtomicPtr<AtomicBool>,
}

impl Block {
    const fn new() -> Self {
        let slots = [const { Slot::new() }; SLOTS];
        Self { slots, next: AtomicPtr::new(ptr::null_mut()) }
    }

    fn all() -> impl Iterator<Item = &'static Slot> {
        let mut block = Some(&WATCHED);
        let blocks = std::iter::from_fn(move || {
            let this = block?;
            // SAFETY: null, or a block that was leaked.
            block = unsafe { this.next.load(Ordering::Acquire).as_ref() };
            Some(this)
        });
        blocks.flat_map(|block| &block.slots)
    }
}

impl Slot {
    const fn new() -> Self {
        let lost = AtomicPtr::new(ptr::null_mut());
        Self { start: AtomicUsize::new(0), end: AtomicUsize::new(0), lost }
    }
}

/// Addresses of mapped files that are watched until this is dropped. Nobody reads there any more then.
#[derive(Debug)]
pub(crate) struct Watched {
    slots: Vec<&'static Slot>,
    lost: Arc<AtomicBool>,
}

impl std::fmt::Debug for Slot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (start, end) = (self.start.load(Ordering::Relaxed), self.end.load(Ordering::Relaxed));
        write!(f, "{start:x}..{end:x}")
    }
}

impl Watched {
    /// Of nothing yet. `lost` is set when something is.
    ///
    /// # Errors
    /// What the system says if the signal cannot be had.
    pub(crate) fn new(lost: Arc<AtomicBool>) -> io::Result<Self> {
        take_signal()?;
        Ok(Self { slots: Vec::new(), lost })
    }

    /// Watches these too, whole pages.
    pub(crate) fn add(&mut self, range: Range<usize>) {
        let _changing = lock(&CHANGING);
        // Mostly they follow on what was mapped before.
        if let Some(last) = self.slots.last()
            && last.end.load(Ordering::Relaxed) == range.start
        {
            last.end.store(range.end, Ordering::Release);
            return;
        }
        let free = Block::all().find(|slot| slot.end.load(Ordering::Relaxed) == 0);
        let slot = free.unwrap_or_else(|| {
            let block: &'static Block = Box::leak(Box::new(Block::new()));
            let next = WATCHED.next.load(Ordering::Relaxed);
            block.next.store(next, Ordering::Relaxed);
            WATCHED.next.store(ptr::from_ref(block).cast_mut(), Ordering::Release);
            &block.slots[0]
        });
        slot.start.store(range.start, Ordering::Relaxed);
        slot.lost.store(Arc::as_ptr(&self.lost).cast_mut(), Ordering::Relaxed);
        // Last: whoever sees it sees the others.
        slot.end.store(range.end, Ordering::Release);
        self.slots.push(slot);
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        let _changing = lock(&CHANGING);
        for slot in &self.slots {
            slot.end.store(0, Ordering::Release);
        }
    }
}

/// Has SIGBUS come to us, once, and to whoever had it what is not ours.
fn take_signal() -> io::Result<()> {
    let _changing = lock(&CHANGING);
    if BEFORE.get().is_some() {
        return Ok(());
    }
    let mut before = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: a plain struct, all of whose fields may be zero, and a handler that is one for SA_SIGINFO.
    // It is known as `BEFORE` before ours can be called: by this thread, which does not fault meanwhile,
    // or for pages that are watched, which nobody has yet.
    unsafe {
        let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
        action.sa_sigaction = on_sigbus as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigemptyset(&raw mut action.sa_mask);
        if libc::sigaction(libc::SIGBUS, &raw const action, before.as_mut_ptr()) != 0 {
            return Err(io::Error::last_os_error());
        }
        let _ = BEFORE.set(before.assume_init());
    }
    Ok(())
}

/// Calls nothing but what a signal's handler may.
extern "C" fn on_sigbus(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel's, of this signal.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr().addr()) };
    if code == libc::BUS_ADRERR && replace(address) {
        return;
    }
    let before = BEFORE.get();
    let handler = before.map_or(libc::SIG_DFL, |before| before.sa_sigaction);
    if handler == libc::SIG_DFL || handler == libc::SIG_IGN {
        // As without us: it comes again, and ends the program.
        // SAFETY: a plain struct, all of whose fields may be zero: the default.
        unsafe {
            let default: libc::sigaction = MaybeUninit::zeroed().assume_init();
            libc::sigaction(libc::SIGBUS, &raw const default, ptr::null_mut());
        }
        return;
    }
    let takes_info = before.is_some_and(|before| before.sa_flags & libc::SA_SIGINFO != 0);
    // SAFETY: the handler that was there, called as the kernel would.
    unsafe {
        if takes_info {
            type Handler = extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void);
            std::mem::transmute::<usize, Handler>(handler)(signal, info, context);
        } else {
            std::mem::transmute::<usize, extern "C" fn(c_int)>(handler)(signal);
        }
    }
}

/// Puts zeros in place of a watched page, and says whether it was one.
fn replace(address: usize) -> bool {
    let Some(slot) = Block::all().find(|slot| {
        let end = slot.end.load(Ordering::Acquire);
        (slot.start.load(Ordering::Relaxed)..end).contains(&address)
    }) else {
        return false;
    };
    // SAFETY: of whoever watches these addresses, and is there as long as somebody reads from them.
    if let Some(lost) = unsafe { slot.lost.load(Ordering::Relaxed).as_ref() } {
        // Before whoever reads the zeros goes on.
        lost.store(true, Ordering::SeqCst);
    }
    let start = address - address % PAGE;
    let bytes = slot.end.load(Ordering::Relaxed).saturating_sub(start).max(PAGE);
    let page = ptr::without_provenance_mut::<c_void>(start);
    let (protection, flags) =
        (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANON | libc::MAP_FIXED);
    // SAFETY: from a page of a mapped file that cannot be read, to the end of what is watched with it. Of
    // all that, the contents are as good as lost: the caller is told so once.
    unsafe { libc::mmap(page, bytes, protection, flags, -1, 0) != libc::MAP_FAILED }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    /// A mapping of a file of so many pages, which is then cut to nothing.
    fn cut(pages: usize) -> (*mut u8, Range<usize>) {
        let file = tempfile::tempfile().unwrap();
        file.set_len((pages * PAGE) as u64).unwrap();
        // SAFETY: a mapping of its own.
        let at = unsafe {
            let (protection, flags) = (libc::PROT_READ, libc::MAP_PRIVATE);
            libc::mmap(ptr::null_mut(), pages * PAGE, protection, flags, file.as_raw_fd(), 0)
        };
        assert_ne!(at, libc::MAP_FAILED);
        file.set_len(0).unwrap();
        let start = at.expose_provenance();
        (at.cast(), start..start + pages * PAGE)
    }

    #[test]
    fn what_cannot_be_read_is_zeros_and_told() {
        let lost = Arc::new(AtomicBool::new(false));
        let mut watched = Watched::new(lost.clone()).unwrap();
        // More than a block has slots, and not next to each other.
        let cut: Vec<_> = (0..2 * SLOTS + 2).map(|_| cut(3)).collect();
        for (_, range) in &cut {
            watched.add(range.start..range.start + PAGE);
            watched.add(range.start + 2 * PAGE..range.end);
        }
        for (at, _) in &cut {
            lost.store(false, Ordering::SeqCst);
            // SAFETY: mapped above, and watched.
            assert_eq!(unsafe { at.add(2 * PAGE + 7).read_volatile() }, 0);
            assert!(lost.load(Ordering::SeqCst));
        }
        assert_eq!(watched.slots.len(), 2 * cut.len());
        let first = watched.slots[0];
        drop(watched);
        // Free, or of another test's by now.
        let end = first.end.load(Ordering::SeqCst);
        assert!(end == 0 || end != cut[0].1.start + PAGE);
    }

    #[test]
    fn what_is_not_watched_ends_the_program_as_before() {
        const TOLD: &str = "TIERSTREAM_TEST_SIGBUS";
        if std::env::var_os(TOLD).is_some() {
            let lost = Arc::new(AtomicBool::new(false));
            let mut watched = Watched::new(lost).unwrap();
            let (at, range) = cut(2);
            watched.add(range.start..range.start + PAGE);
            // SAFETY: mapped above.
            unsafe { at.add(PAGE).read_volatile() };
            return;
        }
        let test = "sigbus::tests::what_is_not_watched_ends_the_program_as_before";
        let mut again = std::process::Command::new(std::env::current_exe().unwrap());
        let status = again.args(["--exact", test]).env(TOLD, "1").output().unwrap().status;
        let signal = std::os::unix::process::ExitStatusExt::signal(&status);
        assert_eq!(signal, Some(libc::SIGBUS), "{status:?}");
    }
}

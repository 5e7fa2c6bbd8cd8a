//! Parts of a file that the page cache has, in place of memory of the caller's.
//!
//! Such memory would change with the file, and be gone where the file is cut. So there is a lease on
//! it (fcntl(2), "Leases"): whoever wants to write to the file, or to cut it, has to wait until it is
//! given up, 45 s at most as systems come. That is done once there are copies of all pages, which are
//! then no file's any more. Nobody waits for more than that: renaming and removing change no contents.
//!
//! A process that stands still for longer loses the lease without being asked. So the file's size and time
//! of change are looked at after copies were made, and whenever somebody wants to know whether all is as it
//! was: [`Mapped::check_intact`]. What the drive does not give back, or was cut, reads as zeros by then
//! (`sigbus.rs`), and is no reason to end the program.
//!
//! Copies are made in any case when their owner finds time for that: reading anonymous memory in huge
//! pages is faster than reading the page cache (BENCHMARKS.md tells how much).

use std::ffi::c_void;
use std::fmt;
use std::fs;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::error::{Error, Result};
use crate::file::File;
use crate::map::HUGE_PAGE;
use crate::ring::PAGE;
use crate::sigbus::Watched;
use crate::sync::lock;

/// How often it is looked whether somebody wants to write to the file.
const LOOKED_EVERY: Duration = Duration::from_millis(200);

/// Time to spare when others wait.
const MARGIN: Duration = Duration::from_secs(1);

/// Memory whose pages are got at a time, in bytes.
const STEP_BYTES: usize = 8 << 20;

/// Memory that is copied at a time, in bytes: up to a multiple of it. So much more than the weights is
/// resident meanwhile.
pub const COPIED_BYTES: usize = 4 << 20;

/// From `linux/fcntl.h`; the libc crate lacks it.
const F_SETSIG: libc::c_int = 10;

/// Why what was mapped is not to be relied on.
const LOST: &str = "it was written to while it was mapped, or a page of it could not be read";

/// A file with parts mapped in memory, which keep their contents whatever happens to it.
///
/// Dropping it ends that, so the memory is not to be used any more.
pub struct Mapped {
    shared: Arc<Shared>,
    watcher: Option<JoinHandle<()>>,
}

struct Shared {
    path: Arc<Path>,
    /// Opened for this alone: a lease is of the opening.
    handle: fs::File,
    /// As it was when there was a lease.
    was: (u64, i64, i64),
    /// How long the system lets those wait who want to write.
    break_time: Duration,
    state: Mutex<State>,
    /// Told when it is to end.
    changed: Condvar,
    /// The contents may be others than they were.
    is_lost: Arc<AtomicBool>,
}

struct State {
    /// Addresses, whole pages.
    mapped: Vec<Range<usize>>,
    /// The same, and those that were copied.
    watched: Watched,
    /// All that was mapped has been copied, and was still the same after that.
    is_safe: bool,
    /// Nobody can write to the file.
    is_leased: bool,
    /// Copies are to be made though nobody wants to write.
    is_to_copy: bool,
    is_over: bool,
}

impl Mapped {
    /// Takes a lease on `file`, of which nothing is mapped yet.
    ///
    /// # Errors
    /// [`Error::Changed`] if the file was written to since it was opened; in the
    /// inner result why there is no lease: it is somebody else's file, somebody has it open for
    /// writing, or the filesystem has none.
    pub fn new(file: &File) -> Result<io::Result<Self>> {
        let leased = lease(file);
        // From here on it stays as it is.
        file.check_unchanged()?;
        Ok(leased.and_then(|handle| Self::watch(handle, file.shared_path(), break_time())))
    }

    fn watch(handle: fs::File, path: Arc<Path>, break_time: Duration) -> io::Result<Self> {
        let is_lost = Arc::new(AtomicBool::new(false));
        let state = State {
            mapped: Vec::new(),
            watched: Watched::new(Arc::clone(&is_lost))?,
            is_safe: false,
            is_leased: true,
            is_to_copy: false,
            is_over: false,
        };
        let shared = Arc::new(Shared {
            path,
            was: state_of(&handle)?,
            handle,
            break_time,
            state: Mutex::new(state),
            changed: Condvar::new(),
            is_lost,
        });
        let watched = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("io-lease".to_owned());
        let watcher = thread.spawn(move || watched.watch())?;
        Ok(Self { shared, watcher: Some(watcher) })
    }

    /// Puts `bytes` of the file from `offset` on at `address`, in place of what is there: private and
    /// writable, so that what is written there never comes to the file. The three are multiples of
    /// [`PAGE`], but that `bytes` may end where the file does.
    ///
    /// # Errors
    /// What the system says, and [`io::ErrorKind::Other`] if somebody writes to the file. The old
    /// memory may be gone then, so that nothing there is to be used.
    ///
    /// # Safety
    /// The pages are the caller's, who sees to it that nobody has a reference to their bytes, and that
    /// nobody reads there once this has been dropped, or unmaps them before.
    pub unsafe fn map(&self, address: NonNull<u8>, offset: u64, bytes: usize) -> io::Result<()> {
        let whole = address.addr().get().is_multiple_of(PAGE) && offset.is_multiple_of(PAGE as u64);
        if !whole || bytes == 0 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut state = lock(&self.shared.state);
        if !state.is_leased {
            return Err(io::Error::other("somebody writes to the file"));
        }
        let start = address.as_ptr();
        // SAFETY: pages of the caller's, by contract, in whose place others come.
        unsafe {
            rustix::mm::mmap(
                start.cast(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::FIXED,
                &self.shared.handle,
                offset,
            )?;
            // As it was before: reads may go there past the page cache. A refusal is harmless.
            let _ = rustix::mm::madvise(start.cast(), bytes, Advice::LinuxDontFork);
        }
        let start = start.expose_provenance();
        let pages = start..start + bytes.next_multiple_of(PAGE);
        state.watched.add(pages.clone());
        state.mapped.push(pages);
        Ok(())
    }

    /// Has copies of all that is mapped made in its place, on a thread of its own. What is asked for
    /// again is not done again.
    pub fn copy(&self) {
        let mut state = lock(&self.shared.state);
        if !state.is_to_copy {
            state.is_to_copy = true;
            self.shared.changed.notify_all();
        }
    }

    /// Whether nothing is mapped.
    pub fn is_empty(&self) -> bool {
        lock(&self.shared.state).mapped.is_empty()
    }

    /// Looks whether all that was read where it is mapped had the contents that it had at first. If there
    /// was no memory, or no time, for copies when somebody wanted to write to the file, it may not have had
    /// them, nor if the drive failed.
    ///
    /// # Errors
    /// [`Error::Changed`], from then on.
    pub fn check_intact(&self) -> Result<()> {
        let shared = &self.shared;
        if !lock(&shared.state).is_safe && shared.has_changed() {
            shared.is_lost.store(true, Ordering::Release);
        }
        if !shared.is_lost.load(Ordering::Acquire) {
            return Ok(());
        }
        Err(Error::Changed { path: Arc::clone(&shared.path), what: LOST.into() })
    }
}

/// Gets pages of mapped files that the page cache has, so that nobody waits for them later. `told`
/// gets the bytes step by step, and may end it.
///
/// # Errors
/// Of a page that could not be read.
pub fn populate(range: Range<usize>, mut told: impl FnMut(usize) -> bool) -> io::Result<()> {
    let mut at = range.start;
    while at < range.end {
        let step = STEP_BYTES.min(range.end - at);
        let address = std::ptr::without_provenance_mut(at);
        // SAFETY: pages are got, no contents change; addresses without memory are an error.
        match unsafe { rustix::mm::madvise(address, step, Advice::LinuxPopulateRead) } {
            // Linux before 5.14: they come when they are used.
            Ok(()) | Err(rustix::io::Errno::INVAL) => {}
            Err(errno) => return Err(errno.into()),
        }
        if !told(step) {
            return Ok(());
        }
        at += step;
    }
    Ok(())
}

impl Drop for Mapped {
    fn drop(&mut self) {
        lock(&self.shared.state).is_over = true;
        self.shared.changed.notify_all();
        if let Some(watcher) = self.watcher.take() {
            let _ = watcher.join();
        }
    }
}

#[cfg(test)]
impl Mapped {
    /// Until all is copied.
    fn wait(&self) {
        let state = lock(&self.shared.state);
        let waited = self
            .shared
            .changed
            .wait_while(state, |state| !state.mapped.is_empty() || state.is_leased);
        drop(waited.unwrap());
    }
}

impl fmt::Debug for Mapped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mapped").field("handle", &self.shared.handle).finish_non_exhaustive()
    }
}

impl Shared {
    /// Whether the file is not what it was any more.
    fn has_changed(&self) -> bool {
        state_of(&self.handle).is_ok_and(|now| now != self.was)
    }

    /// Until it is over, or nothing is mapped any more.
    fn watch(&self) {
        let mut state = lock(&self.state);
        let mut has_failed = false;
        while !state.is_over {
            let is_wanted = !is_leased(self.handle.as_raw_fd());
            if is_wanted || state.is_to_copy && !has_failed {
                // Nothing more is mapped from here on, and whoever drops this need not wait for all.
                state.is_leased = false;
                let mapped = std::mem::take(&mut state.mapped);
                drop(state);
                let rest = self.copy_all(mapped);
                // The lease may have run out before it was looked at.
                let is_same = !self.has_changed();
                if !is_same {
                    self.is_lost.store(true, Ordering::Release);
                }
                state = lock(&self.state);
                state.is_safe = is_same && rest.is_empty();
                state.mapped = rest;
                let is_wanted = is_wanted || !is_leased(self.handle.as_raw_fd());
                if state.mapped.is_empty() || is_wanted || state.is_over {
                    break;
                }
                // Without memory it stays mapped.
                has_failed = true;
            }
            let waited = self.changed.wait_timeout(state, LOOKED_EVERY);
            state = waited.unwrap_or_else(std::sync::PoisonError::into_inner).0;
        }
        state.is_leased = false;
        // Before whoever waits goes on.
        if !state.is_over && !state.mapped.is_empty() {
            self.is_lost.store(true, Ordering::Release);
        }
        let _ = fcntl(self.handle.as_raw_fd(), libc::F_SETLEASE, libc::F_UNLCK);
        drop(state);
        self.changed.notify_all();
    }

    /// Copies all of `mapped`, and returns what it could not, or not in time, or need not any more.
    fn copy_all(&self, mapped: Vec<Range<usize>>) -> Vec<Range<usize>> {
        let mut wanted_since = None;
        let mut rest = mapped.into_iter();
        while let Some(range) = rest.next() {
            let mut at = range.start;
            while at < range.end {
                if wanted_since.is_none() && !is_leased(self.handle.as_raw_fd()) {
                    wanted_since = Some(Instant::now());
                }
                let is_late = wanted_since.is_some_and(|since: Instant| {
                    since.elapsed() + LOOKED_EVERY + MARGIN >= self.break_time
                });
                let end = ((at / COPIED_BYTES + 1) * COPIED_BYTES).min(range.end);
                let is_over = lock(&self.state).is_over;
                if is_late || is_over || self.copy_in_place(at, end - at).is_err() {
                    return std::iter::once(at..range.end).chain(rest).collect();
                }
                at = end;
            }
        }
        Vec::new()
    }

    /// Puts a copy in anonymous memory in place of so many bytes of mapped pages. If that fails, they are
    /// as they were, or known to be lost.
    fn copy_in_place(&self, at: usize, bytes: usize) -> io::Result<()> {
        copy_in_place(at, bytes).inspect_err(|_| {
            let at = std::ptr::without_provenance_mut(at);
            let (protection, flags) =
                (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::FIXED_NOREPLACE);
            // SAFETY: where nothing is, or it is refused.
            let was_hole = unsafe { rustix::mm::mmap_anonymous(at, bytes, protection, flags) };
            if was_hole.is_ok() {
                self.is_lost.store(true, Ordering::Release);
            }
        })
    }
}

/// The same, without care for what is there if it fails: the kernel may have unmapped what was. (Writing to
/// each page makes copies too, but those go when the file is cut.)
fn copy_in_place(at: usize, bytes: usize) -> io::Result<()> {
    let from = std::ptr::with_exposed_provenance_mut::<u8>(at);
    // SAFETY: a fresh mapping, which is filled from mapped memory of this size whose contents the lease
    // keeps, and then moved there: whoever reads meanwhile finds the one or the other, which are the same.
    unsafe {
        // As far behind the start of a huge page as where it goes, so that huge pages stay such.
        let room = rustix::mm::mmap_anonymous(
            std::ptr::null_mut(),
            bytes + 2 * HUGE_PAGE,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE,
        )?;
        let before = room.align_offset(HUGE_PAGE) + at % HUGE_PAGE;
        let copy = room.wrapping_byte_add(before);
        let unmap = |from: *mut c_void, to: *mut c_void| {
            // What lies before and behind it, and nobody has seen.
            if from < to {
                let _ = rustix::mm::munmap(from, to.addr() - from.addr());
            }
        };
        unmap(room, copy);
        unmap(copy.wrapping_byte_add(bytes), room.wrapping_byte_add(bytes + 2 * HUGE_PAGE));
        let _ = rustix::mm::madvise(copy, bytes, Advice::LinuxHugepage);
        let _ = rustix::mm::madvise(copy, bytes, Advice::LinuxDontFork);
        std::ptr::copy_nonoverlapping(from, copy.cast(), bytes);
        let flags = rustix::mm::MremapFlags::MAYMOVE;
        if let Err(errno) = rustix::mm::mremap_fixed(copy, bytes, bytes, flags, from.cast()) {
            let _ = rustix::mm::munmap(copy, bytes);
            return Err(errno.into());
        }
    }
    Ok(())
}

/// How long the system lets those wait who want to write.
fn break_time() -> Duration {
    let seconds = fs::read_to_string("/proc/sys/fs/lease-break-time");
    Duration::from_secs(seconds.ok().and_then(|s| s.trim().parse().ok()).unwrap_or(45))
}

/// Bytes of a file, and when it was last written to, which is told no later than what was written.
fn state_of(file: &fs::File) -> io::Result<(u64, i64, i64)> {
    let stat = file.metadata()?;
    Ok((stat.size(), stat.mtime(), stat.mtime_nsec()))
}

/// The file once more, with a lease on it.
fn lease(file: &File) -> io::Result<fs::File> {
    let handle = fs::File::open(format!("/proc/self/fd/{}", file.handle().as_raw_fd()))?;
    let fd = handle.as_raw_fd();
    // Whoever wants to write is seen by asking. The signal that would tell, SIGIO, ends programs;
    // this one is ignored.
    fcntl(fd, F_SETSIG, libc::SIGURG)?;
    fcntl(fd, libc::F_SETLEASE, libc::F_RDLCK)?;
    Ok(handle)
}

fn is_leased(fd: RawFd) -> bool {
    fcntl(fd, libc::F_GETLEASE, 0).is_ok_and(|lease| lease == libc::F_RDLCK)
}

fn fcntl(fd: RawFd, command: libc::c_int, argument: libc::c_int) -> io::Result<libc::c_int> {
    // SAFETY: commands that take a number, and touch no memory.
    match unsafe { libc::fcntl(fd, command, argument) } {
        -1 => Err(io::Error::last_os_error()),
        value => Ok(value),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::pages::Pages;

    /// A file of three pages and a bit, and memory for it.
    fn sample() -> (tempfile::TempDir, std::path::PathBuf, Vec<u8>, Pages) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let bytes: Vec<u8> = (0..3 * PAGE + 100).map(|i| (i % 251) as u8).collect();
        fs::write(&path, &bytes).unwrap();
        (dir, path, bytes, Pages::new(4 * PAGE).unwrap())
    }

    fn map(file: &File, pages: &Pages, offset: usize, bytes: usize) -> Mapped {
        map_within(file, pages, offset, bytes, break_time())
    }

    fn map_within(
        file: &File,
        pages: &Pages,
        offset: usize,
        bytes: usize,
        break_time: Duration,
    ) -> Mapped {
        let handle = lease(file).unwrap();
        let mapped = Mapped::watch(handle, file.shared_path(), break_time).unwrap();
        // SAFETY: memory of the test's, which is dropped after.
        unsafe { mapped.map(pages.base(), offset as u64, bytes) }.unwrap();
        mapped
    }

    #[test]
    fn contents_stay_when_the_file_is_written_to_or_cut() {
        let change: [fn(&std::path::Path); 3] = [
            |path| fs::write(path, b"another").unwrap(),
            |path| fs::OpenOptions::new().write(true).open(path).unwrap().set_len(0).unwrap(),
            |path| {
                let file = fs::OpenOptions::new().write(true).open(path).unwrap();
                file.write_all_at(&[0; 5000], 10).unwrap();
            },
        ];
        for change in change {
            let (_dir, path, bytes, pages) = sample();
            let file = File::open(&path).unwrap();
            let mapped = map(&file, &pages, 0, bytes.len());
            assert!(pages[..bytes.len()] == bytes[..]);
            // Waits for the copies.
            change(&path);
            assert!(pages[..bytes.len()] == bytes[..]);
            mapped.check_intact().unwrap();
            // Nothing more is mapped of it.
            // SAFETY: memory of the test's.
            unsafe { mapped.map(pages.base(), 0, PAGE) }.unwrap_err();
            drop(mapped);
        }
    }

    /// As the kernel takes it away from who has not given it up in time.
    fn lose_lease(mapped: &Mapped) {
        fcntl(mapped.shared.handle.as_raw_fd(), libc::F_SETLEASE, libc::F_UNLCK).unwrap();
    }

    fn assert_lost(mapped: &Mapped) {
        // From then on, whoever looks.
        for _ in 0..2 {
            let lost = mapped.check_intact().unwrap_err();
            assert!(matches!(&lost, Error::Changed { what, .. } if **what == *LOST), "{lost:?}");
        }
    }

    #[test]
    fn what_changed_because_the_lease_ran_out_is_told() {
        let change: [fn(&fs::File); 2] =
            [|file| file.write_all_at(&[7; 5000], 10).unwrap(), |file| file.set_len(0).unwrap()];
        for change in change {
            let (_dir, path, bytes, pages) = sample();
            let file = File::open(&path).unwrap();
            let mapped = map(&file, &pages, 0, bytes.len());
            mapped.check_intact().unwrap();
            lose_lease(&mapped);
            // Nobody waits for copies.
            change(&fs::OpenOptions::new().write(true).open(&path).unwrap());
            assert_lost(&mapped);
            // Whatever it is: to read it is no end.
            std::hint::black_box(pages[..bytes.len()] == bytes[..]);
            assert_lost(&mapped);
        }
        // If it is the same, that it ran out does no harm.
        let (_dir, path, bytes, pages) = sample();
        let file = File::open(&path).unwrap();
        let mapped = map(&file, &pages, 0, bytes.len());
        lose_lease(&mapped);
        mapped.wait();
        fs::write(&path, b"another").unwrap();
        assert!(pages[..bytes.len()] == bytes[..]);
        mapped.check_intact().unwrap();
    }

    #[test]
    fn what_there_was_no_time_to_copy_is_told() {
        let (_dir, path, bytes, pages) = sample();
        let file = File::open(&path).unwrap();
        let mapped = map_within(&file, &pages, 0, bytes.len(), Duration::ZERO);
        fs::write(&path, b"another").unwrap();
        assert_lost(&mapped);
        std::hint::black_box(pages[..bytes.len()] == bytes[..]);
    }

    #[test]
    fn removing_and_renaming_change_nothing() {
        let (_dir, path, bytes, pages) = sample();
        let file = File::open(&path).unwrap();
        let mapped = map(&file, &pages, 0, bytes.len());
        let other = path.with_extension("other");
        fs::rename(&path, &other).unwrap();
        mapped.check_intact().unwrap();
        fs::remove_file(&other).unwrap();
        mapped.check_intact().unwrap();
        assert!(pages[..bytes.len()] == bytes[..]);
    }

    #[test]
    fn what_is_written_to_the_memory_never_comes_to_the_file() {
        let (_dir, path, bytes, mut pages) = sample();
        let file = File::open(&path).unwrap();
        let mapped = map(&file, &pages, PAGE, 2 * PAGE);
        assert!(
            pages[..2 * PAGE] == bytes[PAGE..3 * PAGE] && pages[2 * PAGE..].iter().all(|b| *b == 0)
        );
        let start = pages.base().as_ptr().addr();
        let mut got = 0;
        populate(start..start + 2 * PAGE, |bytes| {
            got += bytes;
            true
        })
        .unwrap();
        assert_eq!(got, 2 * PAGE);
        pages[3] = !pages[3];
        drop(mapped);
        assert!(fs::read(&path).unwrap() == bytes);
        // Nobody waits any more.
        fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"x").unwrap();
    }

    #[test]
    fn contents_stay_when_they_are_copied_and_then_nobody_waits() {
        let (_dir, path, ..) = sample();
        let bytes: Vec<u8> = (0..2 * HUGE_PAGE + 7 * PAGE + 9).map(|i| (i % 251) as u8).collect();
        fs::write(&path, &bytes).unwrap();
        let pages = Pages::new(4 * HUGE_PAGE).unwrap();
        let file = File::open(&path).unwrap();
        let mapped = Mapped::new(&file).unwrap().unwrap();
        // SAFETY: memory of the test's.
        let at = unsafe { pages.base().add(3 * PAGE) };
        // SAFETY: as above.
        unsafe { mapped.map(at, 0, bytes.len()) }.unwrap();
        mapped.copy();
        mapped.copy();
        mapped.wait();
        fs::write(&path, b"another").unwrap();
        assert!(pages[3 * PAGE..][..bytes.len()] == bytes[..]);
        mapped.check_intact().unwrap();
        assert!(pages[..3 * PAGE].iter().all(|b| *b == 0));
        drop(mapped);
        // Who drops it does not wait for all to be copied.
        let file = File::open(&path).unwrap();
        let mapped = Mapped::new(&file).unwrap().unwrap();
        // SAFETY: as above.
        unsafe { mapped.map(pages.base(), 0, 7) }.unwrap();
        mapped.copy();
        drop(mapped);
        assert!(pages[..7] == *b"another");
    }

    #[test]
    fn there_is_no_lease_while_somebody_writes_and_no_mapping_of_parts_of_pages() {
        let (_dir, path, _, pages) = sample();
        let file = File::open(&path).unwrap();
        let writer = fs::OpenOptions::new().append(true).open(&path).unwrap();
        Mapped::new(&file).unwrap().unwrap_err();
        drop(writer);
        let mapped = Mapped::new(&file).unwrap().unwrap();
        for (offset, bytes) in [(1, PAGE), (0, 0)] {
            // SAFETY: memory of the test's.
            let refused = unsafe { mapped.map(pages.base(), offset, bytes) }.unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
        }
    }

    #[test]
    fn a_file_that_was_written_to_since_it_was_opened_is_told() {
        let (_dir, path, ..) = sample();
        let file = File::open(&path).unwrap();
        fs::write(&path, b"another").unwrap();
        let changed = Mapped::new(&file).unwrap_err();
        assert!(matches!(changed, Error::Changed { .. }), "{changed:?}");
    }
}

//! What the page cache has of a file, for measurements that are to be cold, or warm.

use std::fs::File;
use std::io;
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::ptr::{self, NonNull};

use rustix::fs::Advice;
use rustix::mm::{MapFlags, ProtFlags};

use crate::ring::PAGE;

/// How much of a file is looked at at a time, in bytes.
const STEP_BYTES: usize = 256 << 20;

/// Bytes of `file` that the page cache has, in whole pages. The kernel tells it to those alone who own
/// the file or may write to it; to others, every page seems to be there.
///
/// # Errors
/// What the system says.
pub fn cached_bytes(file: &File) -> io::Result<u64> {
    let mut cached = 0;
    let len = each_step(file, |offset, bytes| {
        cached += (count(&pages(file, offset, bytes)?) * PAGE) as u64;
        Ok(())
    })?;
    Ok(cached.min(len))
}

/// Which bytes of `file` the page cache has, in whole pages and in order, no two ranges next to each other.
///
/// # Errors
/// [`io::ErrorKind::PermissionDenied`] if the kernel does not tell us; what the system says.
pub fn cached_ranges(file: &File) -> io::Result<Vec<Range<u64>>> {
    if !tells(file)? {
        let who = "the kernel tells it to those alone who own the file or may write to it";
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, who));
    }
    let mut ranges: Vec<Range<u64>> = Vec::new();
    let mut add = |start: u64, pages: usize| {
        let end = start + (pages * PAGE) as u64;
        match ranges.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => ranges.push(start..end),
        }
    };
    each_step(file, |offset, bytes| {
        // Mostly all is there, or nothing.
        match counted(file, offset, bytes) {
            Some(0) => return Ok(()),
            Some(count) if count == bytes.div_ceil(PAGE) => {
                add(offset, count);
                return Ok(());
            }
            _ => {}
        }
        let pages = pages(file, offset, bytes)?;
        for (index, _) in pages.iter().enumerate().filter(|(_, page)| **page & 1 == 1) {
            add(offset + (index * PAGE) as u64, 1);
        }
        Ok(())
    })?;
    Ok(ranges)
}

/// How many pages of the `bytes` from `offset` on are there, which the kernel tells much sooner than which
/// ones these are; none if it does not.
fn counted(file: &File, offset: u64, bytes: usize) -> Option<usize> {
    /// The system call, of Linux 6.5 and later, on the architectures that it has this number on.
    const CACHESTAT: libc::c_long = 451;
    if !cfg!(any(target_arch = "x86_64", target_arch = "aarch64", target_arch = "riscv64")) {
        return None;
    }
    /// What it tells, in pages.
    #[repr(C)]
    #[derive(Default)]
    struct CacheStat {
        cached: u64,
        _others: [u64; 4],
    }
    let range = [offset, bytes as u64];
    let mut stat = CacheStat::default();
    // SAFETY: both are of the sizes that the call reads and writes.
    let result = unsafe {
        libc::syscall(CACHESTAT, file.as_raw_fd(), range.as_ptr(), ptr::from_mut(&mut stat), 0)
    };
    (result == 0).then(|| usize::try_from(stat.cached).ok()).flatten()
}

/// Whether the kernel tells us what it has of `file`.
fn tells(file: &File) -> io::Result<bool> {
    let user = rustix::process::geteuid();
    if user.is_root() || file.metadata()?.uid() == user.as_raw() {
        return Ok(true);
    }
    let opened = format!("/proc/self/fd/{}", file.as_raw_fd());
    let may_write = rustix::fs::accessat(
        rustix::fs::CWD,
        opened,
        rustix::fs::Access::WRITE_OK,
        rustix::fs::AtFlags::EACCESS,
    );
    Ok(may_write.is_ok())
}

/// Bytes of the `len` bytes from `offset` on of which the page cache has something, in whole pages. `offset`
/// is a multiple of [`PAGE`], and the range lies in the file. See [`cached_bytes`] for who is told the truth.
///
/// # Errors
/// What the system says.
pub fn cached_in(file: &File, offset: u64, len: usize) -> io::Result<usize> {
    if len == 0 { Ok(0) } else { Ok(count(&pages(file, offset, len)?) * PAGE) }
}

/// Looks at all of `file`, so many bytes at a time, from an offset on. Returns the file's bytes.
fn each_step(file: &File, mut look: impl FnMut(u64, usize) -> io::Result<()>) -> io::Result<u64> {
    let len = file.metadata()?.len();
    for offset in (0..len).step_by(STEP_BYTES) {
        let bytes = usize::try_from(len - offset).unwrap_or(STEP_BYTES).min(STEP_BYTES);
        look(offset, bytes)?;
    }
    Ok(len)
}

fn count(pages: &[u8]) -> usize {
    pages.iter().filter(|page| **page & 1 == 1).count()
}

/// A byte for each page, whose lowest bit says whether it is there.
fn pages(file: &File, offset: u64, bytes: usize) -> io::Result<Vec<u8>> {
    // SAFETY: a mapping of its own that overlaps nothing. Nobody reads its memory.
    let map = unsafe {
        rustix::mm::mmap(ptr::null_mut(), bytes, ProtFlags::READ, MapFlags::SHARED, file, offset)
    }?;
    let map = NonNull::new(map).ok_or(io::ErrorKind::OutOfMemory)?;
    let mut pages = vec![0u8; bytes.div_ceil(PAGE)];
    // SAFETY: the mapping above, and a byte for each of its pages.
    let result = unsafe { libc::mincore(map.as_ptr(), bytes, pages.as_mut_ptr()) };
    let error = io::Error::last_os_error();
    // SAFETY: the mapping above, which nobody uses any more.
    unsafe { rustix::mm::munmap(map.as_ptr(), bytes) }?;
    if result != 0 {
        return Err(error);
    }
    Ok(pages)
}

/// Asks the kernel to drop the pages that lie wholly in a range of `file`. It keeps what somebody maps
/// or uses, and what is yet to be written.
///
/// # Errors
/// What the system says.
pub fn evict_in(file: &File, offset: u64, len: u64) -> io::Result<()> {
    match NonZeroU64::new(len) {
        Some(len) => Ok(rustix::fs::fadvise(file, offset, Some(len), Advice::DontNeed)?),
        // Of none, it would drop all that follows.
        None => Ok(()),
    }
}

/// Asks the kernel to drop `file` from the page cache, after what is still to be written of it. It
/// keeps what somebody maps or uses: [`cached_bytes`] tells how much.
///
/// # Errors
/// What the system says.
pub fn evict(file: &File) -> io::Result<()> {
    file.sync_data()?;
    Ok(rustix::fs::fadvise(file, 0, None, Advice::DontNeed)?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    #[allow(clippy::single_range_in_vec_init)]
    fn what_is_there_is_told_in_ranges() {
        let (page, whole) = (PAGE as u64, vec![0..41 * PAGE as u64]);
        let mut temp = tempfile::tempfile().unwrap();
        io::Write::write_all(&mut temp, &vec![1; 40 * PAGE + 5]).unwrap();
        assert_eq!(cached_ranges(&temp).unwrap(), whole);
        evict(&temp).unwrap();
        if cached_bytes(&temp).unwrap() > 0 {
            return assert_eq!(cached_ranges(&temp).unwrap(), whole, "tmpfs");
        }
        assert_eq!(cached_ranges(&temp).unwrap(), []);
        rustix::fs::fadvise(&temp, 0, None, Advice::Random).unwrap();
        for at in [3, 4, 40] {
            temp.read_at(&mut [0], at * page).unwrap();
        }
        assert_eq!(cached_ranges(&temp).unwrap(), [3 * page..5 * page, 40 * page..41 * page]);
    }
}

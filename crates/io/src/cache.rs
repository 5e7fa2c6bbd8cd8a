//! What the page cache has of a file, for measurements that are to be cold, or warm.

use std::fs::File;
use std::io;
use std::num::NonZeroU64;
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
    let len = file.metadata()?.len();
    let mut cached = 0;
    for offset in (0..len).step_by(STEP_BYTES) {
        let bytes = usize::try_from(len - offset).unwrap_or(STEP_BYTES).min(STEP_BYTES);
        cached += (cached_pages(file, offset, bytes)? * PAGE) as u64;
    }
    Ok(cached.min(len))
}

/// Whether the page cache has all of so many bytes of `file`; not if the kernel does not tell.
///
/// # Errors
/// What the system says.
pub fn is_cached(file: &File, offset: u64, bytes: usize) -> io::Result<bool> {
    let start = offset - offset % PAGE as u64;
    let bytes = bytes + usize::try_from(offset - start).unwrap_or(0);
    let pages = bytes.div_ceil(PAGE);
    Ok(bytes > 0 && tells(file)? && cached_pages(file, start, bytes)? == pages)
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
    if len == 0 { Ok(0) } else { Ok(cached_pages(file, offset, len)? * PAGE) }
}

fn cached_pages(file: &File, offset: u64, bytes: usize) -> io::Result<usize> {
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
    Ok(pages.iter().filter(|page| **page & 1 == 1).count())
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

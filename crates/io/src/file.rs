//! Files opened read-only for direct I/O, with the reason where that is refused.

use std::fmt;
use std::io;
use std::num::NonZeroU64;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{Advice, AtFlags, FileType, Mode, OFlags, Stat, StatxFlags};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::ring::{PAGE, Ring};

/// Names a file of one [`Reader`](crate::Reader).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId(pub u32);

impl fmt::Display for FileId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{}", self.0)
    }
}

/// Whether a file is read past the page cache, and what its reads must be aligned to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirectState {
    /// Reads go past the page cache.
    pub direct: bool,
    /// Alignment of memory addresses, in bytes. A power of two.
    pub mem_align: u32,
    /// Alignment of file offsets and lengths, in bytes. A power of two, no less than `mem_align`:
    /// memory that is aligned for the first block of a piece is so for every other.
    pub offset_align: u32,
    /// Why `direct` is false.
    pub reason: Option<String>,
}

impl DirectState {
    fn direct(mem_align: u32, offset_align: u32) -> Self {
        let offset_align = offset_align.max(mem_align);
        Self { direct: true, mem_align, offset_align, reason: None }
    }

    fn buffered(reason: impl Into<String>) -> Self {
        Self { direct: false, mem_align: 1, offset_align: 1, reason: Some(reason.into()) }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
}

impl Identity {
    #[allow(clippy::unnecessary_cast, clippy::useless_conversion)] // widths differ by platform
    fn of(stat: &Stat) -> Self {
        Self {
            device: stat.st_dev as u64,
            inode: stat.st_ino as u64,
            size: stat.st_size as u64,
            modified: (stat.st_mtime as i64, stat.st_mtime_nsec as i64),
        }
    }
}

/// A regular file, open for reading.
#[derive(Debug)]
pub struct File {
    path: Arc<Path>,
    handle: std::fs::File,
    identity: Identity,
    state: DirectState,
    drops_behind: bool,
    beside: bool,
}

impl File {
    /// Opens `path` for direct I/O, or through the page cache where direct I/O is refused:
    /// [`File::direct_state`] says which, and why.
    ///
    /// # Errors
    /// [`Error::Open`] when the file cannot be opened at all or is not a regular file.
    pub fn open(path: &Path) -> Result<Self> {
        let fail = open_error(path);
        match open_fd(path, OFlags::DIRECT) {
            Ok(handle) => match probe_direct(&handle) {
                Ok(state) => Self::finish(path, handle, state),
                Err(reason) => Self::reopen(path, reason),
            },
            Err(Errno::INVAL | Errno::OPNOTSUPP) => {
                Self::reopen(path, "the file system refuses O_DIRECT".to_owned())
            }
            Err(errno) => Err(fail(errno.into())),
        }
    }

    /// Opens `path` for reads through the page cache; `reason` says who wanted that.
    ///
    /// # Errors
    /// [`Error::Open`] when the file cannot be opened or is not a regular file.
    pub fn open_buffered(path: &Path, reason: &str) -> Result<Self> {
        Self::reopen(path, reason.to_owned())
    }

    /// The same file, whatever has become of its path, for reads of what the page cache has of it.
    ///
    /// # Errors
    /// [`Error::Open`].
    #[cfg(target_os = "linux")]
    pub(crate) fn through_cache(&self) -> Result<Self> {
        let opened = format!("/proc/self/fd/{}", self.handle.as_raw_fd());
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let handle = rustix::fs::open(opened, flags, Mode::empty());
        let handle = handle.map_err(|errno| open_error(&self.path)(errno.into()))?.into();
        let state = DirectState::buffered("the page cache has it");
        let (path, identity) = (self.path.clone(), self.identity);
        Ok(Self { path, handle, identity, state, drops_behind: false, beside: true })
    }

    /// Opens `path` for reads through the page cache that leave nothing there: whoever has read a
    /// range calls [`File::drop_behind`]. `reason` says why the cache is not passed.
    ///
    /// # Errors
    /// As [`File::open_buffered`].
    pub fn open_dropping(path: &Path, reason: &str) -> Result<Self> {
        let mut file = Self::reopen(path, reason.to_owned())?;
        file.drops_behind = true;
        // Nothing is read but what was asked for: what is read ahead would be left there.
        // A wish, which the kernel may refuse.
        let _ = rustix::fs::fadvise(&file.handle, 0, None, Advice::Random);
        Ok(file)
    }

    fn reopen(path: &Path, reason: String) -> Result<Self> {
        let handle = open_fd(path, OFlags::empty()).map_err(|e| open_error(path)(e.into()))?;
        Self::finish(path, handle, DirectState::buffered(reason))
    }

    fn finish(path: &Path, handle: std::fs::File, state: DirectState) -> Result<Self> {
        let fail = open_error(path);
        let stat = rustix::fs::fstat(&handle).map_err(|e| fail(e.into()))?;
        if !FileType::from_raw_mode(stat.st_mode).is_file() {
            return Err(fail(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file")));
        }
        block_again(&handle).map_err(|e| fail(e.into()))?;
        let identity = Identity::of(&stat);
        Ok(Self { path: path.into(), handle, identity, state, drops_behind: false, beside: false })
    }

    /// The path that the file was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn shared_path(&self) -> Arc<Path> {
        Arc::clone(&self.path)
    }

    /// Size in bytes when it was opened.
    pub fn size(&self) -> u64 {
        self.identity.size
    }

    /// When it was last modified, as it was when the file was opened: seconds since 1970 (before it
    /// when negative) and nanoseconds of the second.
    pub fn modified(&self) -> (i64, i64) {
        self.identity.modified
    }

    /// How this file is read.
    pub fn direct_state(&self) -> &DirectState {
        &self.state
    }

    /// Whether it is open a second time, for reads of what the page cache has.
    pub(crate) fn is_beside(&self) -> bool {
        self.beside
    }

    /// Takes the pages of a range that was read out of the page cache, if the file was opened with
    /// [`File::open_dropping`], also those that were there before. A page that the range ends in stays: it
    /// is the first one of whatever follows.
    pub fn drop_behind(&self, offset: u64, len: u64) {
        let start = offset - offset % PAGE as u64;
        // Of no bytes, the kernel would drop all that follows.
        if let (true, Some(len)) = (self.drops_behind, NonZeroU64::new(offset + len - start)) {
            // The pages would be reclaimed at some time anyhow: no error is worth failing a read.
            let _ = rustix::fs::fadvise(&self.handle, start, Some(len), Advice::DontNeed);
        }
    }

    /// The open file. Reads through it must keep to [`File::direct_state`].
    pub fn handle(&self) -> &std::fs::File {
        &self.handle
    }

    /// Compares the open file with what it was at open, at the price of one `fstat`.
    ///
    /// # Errors
    /// [`Error::Changed`] when size or modification time differ; [`Error::Read`] when the system
    /// cannot say.
    pub fn check_unchanged(&self) -> Result<()> {
        let stat = rustix::fs::fstat(&self.handle).map_err(|errno| Error::Read {
            path: self.shared_path(),
            offset: 0,
            len: 0,
            source: Arc::new(errno.into()),
        })?;
        let now = Identity::of(&stat);
        let was = &self.identity;
        let what = if now.size != was.size {
            format!("{} bytes at open, {} now", was.size, now.size)
        } else if now.modified != was.modified {
            "its modification time moved".to_owned()
        } else {
            return Ok(());
        };
        Err(Error::Changed { path: self.shared_path(), what: what.into() })
    }

    /// Whether the path leads to the open file no longer: nothing is found there, or another file.
    /// The bytes of the open one stay readable as long as it is open.
    pub fn is_replaced(&self) -> bool {
        let found = rustix::fs::stat(&*self.path).map(|stat| Identity::of(&stat));
        // While a file is open, no other gets its inode number.
        !found.is_ok_and(|now| (now.device, now.inode) == self.device_inode())
    }

    /// Device and inode number: the same pair is the same file, whatever its names.
    pub fn device_inode(&self) -> (u64, u64) {
        (self.identity.device, self.identity.inode)
    }
}

fn open_error(path: &Path) -> impl Fn(io::Error) -> Error {
    move |source| Error::Open { path: path.into(), source: Arc::new(source) }
}

fn open_fd(path: &Path, extra: OFlags) -> rustix::io::Result<std::fs::File> {
    // NONBLOCK: opening a FIFO by mistake must not hang. See `block_again`.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | extra;
    rustix::fs::open(path, flags, Mode::empty()).map(std::fs::File::from)
}

/// Takes `O_NONBLOCK` off again. pread(2) ignores it on regular files, io_uring does not: up to
/// Linux 6.4 its reads fail with `EAGAIN` where the block device (dm-crypt, loop) cannot promise
/// not to block.
fn block_again(handle: &std::fs::File) -> rustix::io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(handle)?;
    rustix::fs::fcntl_setfl(handle, flags - OFlags::NONBLOCK)
}

/// Alignment of direct reads, or why there can be none. What the kernel reports is tried too:
/// some file systems accept the flag and refuse the read.
fn probe_direct(handle: &std::fs::File) -> Result<DirectState, String> {
    if lives_in_memory(handle) {
        return Err("it lies in memory (tmpfs), there is no drive to read from".to_owned());
    }
    let (mem_align, offset_align) = match reported_alignment(handle) {
        Some((0, _) | (_, 0)) => {
            return Err("the kernel reports no direct I/O for this file".to_owned());
        }
        Some(reported) => reported,
        // Not 512, which drives may take: btrfs reads what is not aligned to its blocks through the page
        // cache, and does not say so.
        None => (PAGE as u32, PAGE as u32),
    };
    let probe = Ring::new(PAGE, 1).map_err(|e| format!("no memory to probe direct I/O: {e}"))?;
    let powers = mem_align.is_power_of_two() && offset_align.is_power_of_two();
    if mem_align as usize > PAGE || !powers {
        return Err(format!("it wants an alignment of {mem_align}/{offset_align} bytes"));
    }
    let state = DirectState::direct(mem_align, offset_align);
    if offset_align as usize > PAGE {
        // Too large for the probe's buffer; the report is believed.
        return Ok(state);
    }
    let mut buffer = probe.take(0).ok_or("no memory to probe direct I/O")?;
    match rustix::io::pread(handle.as_fd(), &mut buffer.as_mut_slice()[..offset_align as usize], 0)
    {
        Ok(_) => Ok(state),
        Err(errno) => Err(format!("a direct read was refused: {errno}")),
    }
}

/// tmpfs takes O_DIRECT since Linux 6.6, and ignores it.
fn lives_in_memory(handle: &std::fs::File) -> bool {
    const TMPFS_MAGIC: i64 = 0x0102_1994;
    const RAMFS_MAGIC: i64 = 0x8584_58f6;
    #[allow(clippy::unnecessary_cast)] // width differs by platform
    rustix::fs::fstatfs(handle)
        .is_ok_and(|stat| matches!(stat.f_type as i64, TMPFS_MAGIC | RAMFS_MAGIC))
}

/// `(memory, offset)` alignment from `STATX_DIOALIGN` (Linux 6.1), zero where there is no direct
/// I/O; `None` when the kernel or the file system does not say.
fn reported_alignment(handle: &std::fs::File) -> Option<(u32, u32)> {
    let stat = rustix::fs::statx(handle, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok()?;
    let said = StatxFlags::from_bits_retain(stat.stx_mask).contains(StatxFlags::DIOALIGN);
    said.then_some((stat.stx_dio_mem_align, stat.stx_dio_offset_align))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn directory_and_missing_file_are_open_errors() {
        let dir = tempfile::tempdir().unwrap();
        for path in [dir.path().to_owned(), dir.path().join("missing")] {
            let error = File::open(&path).unwrap_err();
            assert!(matches!(error, Error::Open { .. }), "{error:?}");
            assert_eq!(error.path(), Some(path.as_path()));
        }
    }

    /// Whoever opens a FIFO blocks until somebody writes to it.
    #[test]
    fn a_fifo_is_refused_and_does_not_block() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        let mode = Mode::RUSR | Mode::WUSR;
        rustix::fs::mknodat(rustix::fs::CWD, &path, FileType::Fifo, mode, 0).unwrap();
        for opened in [File::open(&path), File::open_buffered(&path, "asked")] {
            let Err(Error::Open { source, .. }) = opened else { panic!("{opened:?}") };
            assert_eq!(source.to_string(), "not a regular file");
        }
    }

    #[test]
    fn change_and_replacement_are_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, b"before").unwrap();
        let file = File::open(&path).unwrap();
        file.check_unchanged().unwrap();
        assert!(!file.is_replaced());

        // Whatever other names it has, under its own there is another file, or none.
        let (link, new) = (dir.path().join("link"), dir.path().join("g"));
        std::fs::hard_link(&path, &link).unwrap();
        assert!(!file.is_replaced());
        std::fs::write(&new, b"other").unwrap();
        std::fs::rename(&new, &path).unwrap();
        assert!(file.is_replaced());
        file.check_unchanged().unwrap();
        std::fs::rename(&link, &path).unwrap();
        assert!(!file.is_replaced());
        std::fs::remove_file(&path).unwrap();
        assert!(file.is_replaced());

        std::fs::write(&path, b"before").unwrap();

        let file = File::open(&path).unwrap();
        std::fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"more").unwrap();
        let error = file.check_unchanged().unwrap_err();
        assert!(matches!(error, Error::Changed { .. }), "{error:?}");
        assert_eq!(error.path(), Some(path.as_path()));
    }

    #[test]
    fn same_size_rewrite_is_noticed_by_its_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, b"before").unwrap();
        let file = File::open(&path).unwrap();
        let handle = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        let was = file.modified();
        handle.set_modified(std::time::UNIX_EPOCH).unwrap();
        assert_eq!((file.modified(), File::open(&path).unwrap().modified()), (was, (0, 0)));
        assert_ne!(was, (0, 0));
        assert!(matches!(file.check_unchanged(), Err(Error::Changed { .. })));
    }
}

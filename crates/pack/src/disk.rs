//! What making a packed file asks of a folder, and the system's answer. Tests have another one, which
//! loses power.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Advice, CWD, FallocateFlags, FlockOperation, RenameFlags};
use rustix::io::Errno;

/// A folder that files are written in.
pub(crate) trait Disk {
    type File: DiskFile;

    /// Opens a file to read and write, which is made if it is not there. Nobody else can until it is
    /// dropped: `None` if somebody has.
    fn open(&self, path: &Path) -> io::Result<Option<Self::File>>;
    fn exists(&self, path: &Path) -> io::Result<bool>;
    /// Fails if there is a file `to`.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Returns when names that were made, changed or removed are so after a loss of power.
    fn sync(&self) -> io::Result<()>;
    /// Bytes that may yet be written.
    fn free_bytes(&self) -> io::Result<u64>;
}

/// A file that is written.
pub(crate) trait DiskFile {
    fn len(&self) -> io::Result<u64>;
    /// Bytes that it takes of the drive.
    fn allocated_bytes(&self) -> io::Result<u64>;
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<()>;
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// What it gets longer by are zeros.
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// Takes the room for all of it, where the file system can.
    fn allocate(&self, len: u64) -> io::Result<()>;
    /// Returns when all that was written is so after a loss of power.
    fn sync(&self) -> io::Result<()>;
    /// Nobody will read what was written soon.
    fn forget(&self, offset: u64, len: u64);
}

/// A folder of the system's.
pub(crate) struct OsFolder(pub(crate) PathBuf);

impl Disk for OsFolder {
    type File = File;

    fn open(&self, path: &Path) -> io::Result<Option<File>> {
        let file =
            File::options().read(true).write(true).create(true).truncate(false).open(path)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => Ok(None),
            // There are file systems without locks.
            Ok(()) | Err(_) => Ok(Some(file)),
        }
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        match fs::symlink_metadata(path) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
            // Not every file system can.
            Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) if !self.exists(to)? => {
                fs::rename(from, to)
            }
            other => Ok(other?),
        }
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn sync(&self) -> io::Result<()> {
        File::open(&self.0)?.sync_all()
    }

    fn free_bytes(&self) -> io::Result<u64> {
        let stat = rustix::fs::statvfs(&self.0)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }
}

impl DiskFile for File {
    fn len(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        Ok(self.metadata()?.blocks() * 512)
    }

    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_exact_at(into, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        File::set_len(self, len)
    }

    fn allocate(&self, len: u64) -> io::Result<()> {
        match rustix::fs::fallocate(self, FallocateFlags::empty(), 0, len) {
            // Then it is taken as it is written.
            Err(Errno::NOTSUP | Errno::NOSYS | Errno::INVAL) => Ok(()),
            other => Ok(other?),
        }
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }

    fn forget(&self, offset: u64, len: u64) {
        // Advice: without it the page cache is fuller.
        let len = std::num::NonZero::new(len);
        let _ = rustix::fs::fadvise(self, offset, len, Advice::DontNeed);
    }
}

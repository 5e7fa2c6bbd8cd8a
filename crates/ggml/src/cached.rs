//! Weights that the page cache has: used where they are, or read from there. The drive has nothing to
//! do with them.

use std::cell::Cell;
use std::io;
use std::ops::{AddAssign, Range};
use std::ptr::NonNull;
use std::sync::Arc;

use tierstream_io::mapped::Mapped;
use tierstream_io::{Extent, FileId, PAGE, Reader, cache};

use crate::error::{Error, Result};

/// Weights that the page cache had.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FromCache {
    /// Bytes that were not read: the pages of the cache are mapped.
    pub mapped_bytes: u64,
    /// Bytes that were read from there.
    pub copied_bytes: u64,
}

impl FromCache {
    /// Of both kinds.
    pub fn bytes(self) -> u64 {
        self.mapped_bytes + self.copied_bytes
    }
}

impl AddAssign for FromCache {
    fn add_assign(&mut self, other: Self) {
        self.mapped_bytes += other.mapped_bytes;
        self.copied_bytes += other.copied_bytes;
    }
}

/// What the page cache may be asked for: the files of a model that are read past it.
pub(crate) struct Cached {
    files: Vec<File>,
    taken: Cell<FromCache>,
    /// Why it is not asked, or nothing is mapped.
    why: Option<String>,
}

struct File {
    direct: FileId,
    opened: Arc<tierstream_io::File>,
    /// The same file, for reads through the cache.
    through: FileId,
    /// What the cache had of it, as [`cache::cached_ranges`] tells.
    ranges: Vec<Range<u64>>,
    /// To map parts of it, if there is a lease.
    mapped: Option<Mapped>,
}

impl Cached {
    /// Of `files`, those that `reader` may take from the cache.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn new(reader: &Reader, files: &[FileId]) -> Result<Self> {
        let mut cached = Self { files: Vec::new(), taken: Cell::default(), why: None };
        if !reader.uses_cache() {
            return Ok(cached);
        }
        for &direct in files {
            let opened = reader.file(direct)?;
            let path = opened.path().display();
            match cache::cached_ranges(opened.handle()) {
                Ok(ranges) if ranges.is_empty() => {}
                Ok(ranges) => match reader.open_cached(direct) {
                    Ok(through) => {
                        cached.files.push(File { direct, opened, through, ranges, mapped: None });
                    }
                    Err(error) => cached.why = Some(format!("nothing comes from there: {error}")),
                },
                Err(error) => {
                    cached.why = Some(format!("what it has of {path} is not known: {error}"));
                }
            }
        }
        Ok(cached)
    }

    /// The same, of which parts can be mapped, as far as there are leases. Of the other files bytes are
    /// copied.
    ///
    /// # Errors
    /// [`Error::Io`] if one was written to since it was opened.
    pub(crate) fn leased(mut self) -> Result<Self> {
        for file in &mut self.files {
            match Mapped::new(&file.opened)? {
                Ok(mapped) => file.mapped = Some(mapped),
                Err(error) => {
                    let path = file.opened.path().display();
                    let what = format!("{path} is copied from there and not mapped");
                    self.why = Some(format!("{what}: no lease on it: {error}"));
                }
            }
        }
        Ok(self)
    }

    /// Why it is not asked for all that it may have, or that is not mapped.
    pub(crate) fn why(&self) -> Option<String> {
        self.why.as_ref().map(|why| format!("the page cache: {why}"))
    }

    /// The file with all of `extent` in the cache, if there is one.
    fn file_of(&self, extent: Extent) -> Option<&File> {
        let file = self.files.iter().find(|file| file.direct == extent.file)?;
        let next = file.ranges.partition_point(|range| range.end <= extent.offset);
        let range = file.ranges.get(next)?;
        let has_all = range.start <= extent.offset && extent.offset + extent.len <= range.end;
        has_all.then_some(file)
    }

    /// `extent`, of the file by which it is to be read.
    pub(crate) fn source(&self, extent: Extent) -> Extent {
        match self.file_of(extent) {
            Some(file) => {
                self.take(FromCache { copied_bytes: extent.len, ..FromCache::default() });
                Extent { file: file.through, ..extent }
            }
            None => extent,
        }
    }

    fn take(&self, more: FromCache) {
        let mut taken = self.taken.get();
        taken += more;
        self.taken.set(taken);
    }

    /// What it has been asked for, and had.
    pub(crate) fn taken(&self) -> FromCache {
        self.taken.get()
    }

    /// Puts the file's own pages at `address` if the cache has all of `extent`, and there is a lease.
    /// Returns the addresses of the pages, at whose ends there may be more than the extent.
    ///
    /// # Errors
    /// [`Error::Io`]; the memory is not to be used then.
    ///
    /// # Safety
    /// `address` is as far behind the start of a page as the extent is in its file. The pages are in a
    /// buffer that is given back after this, or [what it becomes](Self::into_mapped), is dropped; nobody
    /// looks there, or writes, and what else is on them is nobody's.
    pub(crate) unsafe fn map(
        &self,
        extent: Extent,
        address: NonNull<u8>,
    ) -> Result<Option<Range<usize>>> {
        let Some((file, mapped)) =
            self.file_of(extent).and_then(|file| Some((file, file.mapped.as_ref()?)))
        else {
            return Ok(None);
        };
        let before = extent.offset as usize % PAGE;
        // Without the part of the last page that no file has.
        let end = (extent.offset + extent.len).next_multiple_of(PAGE as u64);
        let offset = extent.offset - before as u64;
        let bytes = (end.min(file.opened.size()) - offset) as usize;
        // SAFETY: on the same page, by contract.
        let start = unsafe { address.sub(before) };
        // SAFETY: whole pages of a buffer, by contract.
        match unsafe { mapped.map(start, offset, bytes) } {
            Ok(()) => {
                self.take(FromCache { mapped_bytes: extent.len, ..FromCache::default() });
                let start = start.as_ptr().expose_provenance();
                Ok(Some(start..start + bytes.next_multiple_of(PAGE)))
            }
            Err(error) => Err(read_error(&file.opened, extent, error)),
        }
    }

    /// What holds the contents of all that was mapped.
    pub(crate) fn into_mapped(self) -> Vec<Mapped> {
        let mapped = self.files.into_iter().filter_map(|file| file.mapped);
        mapped.filter(|mapped| !mapped.is_empty()).collect()
    }
}

fn read_error(file: &tierstream_io::File, extent: Extent, source: io::Error) -> Error {
    Error::Io(tierstream_io::Error::Read {
        path: file.path().into(),
        offset: extent.offset,
        len: extent.len,
        source: Arc::new(source),
    })
}

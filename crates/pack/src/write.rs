//! Making a packed file: beside its final name, so that nothing under that is ever incomplete, with a
//! journal, so that what was interrupted goes on.
//!
//! The order is what makes it safe. The first block, without which nobody takes the file for a packed
//! one, is written last. Whatever the journal says is on the drive was synced before.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tierstream_gguf::{Experts, Model};
use tierstream_io::{Extent, FileId, Reader};

use crate::disk::{Disk, DiskFile, OsFolder};
use crate::error::{Error, Result};
use crate::feed::{self, Feed, Piece};
use crate::format::Checksum;
use crate::journal::Journal;
use crate::layout::{Layout, Sections, Unit};

/// Bytes that are written between two entries of the journal: what an interruption costs at most.
const SYNC_EVERY_BYTES: u64 = 256 << 20;

/// How a model is packed.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// Expert records only; all else stays in the GGUF files, which are needed beside it.
    pub experts_only: bool,
}

/// How far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes that are written, or read for their checksums, those of an earlier attempt among them.
    pub done_bytes: u64,
    /// Of those, bytes of an earlier attempt.
    pub resumed_bytes: u64,
    /// Bytes in all.
    pub total_bytes: u64,
}

/// What was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packed {
    /// The file.
    pub path: PathBuf,
    /// Its length.
    pub file_bytes: u64,
    /// Expert records in it.
    pub records: u64,
    /// Bytes that were written by an earlier attempt.
    pub resumed_bytes: u64,
    /// Bytes of weights in it, without what aligns them.
    pub total_bytes: u64,
}

/// The file that packing the model at `source` makes: `output` itself, or if that is a folder, one
/// there with the model's name.
pub fn target(source: &Path, output: &Path) -> PathBuf {
    if !output.is_dir() {
        return output.to_owned();
    }
    let stem = source.file_stem().unwrap_or_default();
    // Of a split model: model-00001-of-00003.
    let whole = stem.to_str().and_then(|stem| {
        let (name, count) = stem.rsplit_once("-of-")?;
        let (name, number) = name.rsplit_once('-')?;
        let is_number = |text: &str| text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
        (is_number(count) && is_number(number)).then_some(name)
    });
    let mut name = whole.map_or_else(|| stem.to_owned(), OsString::from);
    name.push(".tspack");
    output.join(name)
}

/// Packs a model.
pub struct Writer {
    layout: Layout,
    reader: Arc<Reader>,
    files: Vec<FileId>,
    headers: Vec<Arc<[u8]>>,
    target: PathBuf,
    /// Of the layout, and of the files as they are now.
    of: u64,
    sync_every_bytes: u64,
}

impl Writer {
    /// Gets ready to pack `model`, which lies in GGUF files that `reader` will read, to `target`.
    ///
    /// # Errors
    /// [`Error::IsPacked`], [`Error::NoExperts`], [`Error::Gguf`] for a model that llama.cpp refuses,
    /// and [`Error::Source`].
    pub fn new(
        model: &Model,
        target: &Path,
        options: Options,
        reader: Arc<Reader>,
    ) -> Result<Self> {
        let path = &model.files()[0].path;
        if model.originals().is_some() {
            return Err(Error::IsPacked { path: path.clone() });
        }
        model.check_ggml()?;
        let experts = Experts::group(model)?;
        if options.experts_only && !experts.layers().iter().any(|layer| layer.is_streamed()) {
            return Err(Error::NoExperts { path: path.clone() });
        }
        let folder = folder_of(target);
        let name = |file: &tierstream_gguf::FileInfo| match options.experts_only {
            true => relative(&file.path, &folder),
            false => Ok(bytes_of(file.path.file_name().unwrap_or_default().as_ref())),
        };
        let names = model.files().iter().map(name).collect::<Result<Vec<_>>>()?;
        let layout = Layout::new(model, &experts, names, options.experts_only);
        let files = model.files().iter().map(|file| feed::open(&reader, file));
        let files = files.collect::<Result<Vec<_>>>()?;
        let mut headers = Vec::with_capacity(files.len());
        for (&file, info) in files.iter().zip(&layout.index.files) {
            let len = info.header_len;
            let mut header = vec![0; usize::try_from(len).expect("limits bound headers")];
            reader.read(Extent { file, offset: 0, len }, &mut header)?;
            headers.push(header.into());
        }
        feed::check_unchanged(&reader, &files)?;
        let of = what(model, &layout, &headers);
        let (target, sync_every_bytes) = (target.to_owned(), SYNC_EVERY_BYTES);
        Ok(Self { layout, reader, files, headers, target, of, sync_every_bytes })
    }

    /// Bytes that the packed file will have.
    pub fn file_bytes(&self) -> u64 {
        self.layout.front.file_len
    }

    /// Makes the packed file. What an earlier attempt has written of the same is taken up. `progress`
    /// stops it by returning false; the next attempt goes on from there.
    ///
    /// # Errors
    /// [`Error::Exists`], [`Error::Busy`], [`Error::NoRoom`], [`Error::Source`] (read errors, and a
    /// file that has changed), [`Error::Io`] (write errors, a full drive) and [`Error::Cancelled`].
    /// Nothing has the final name then.
    pub fn write(self, progress: &mut dyn FnMut(Progress) -> bool) -> Result<Packed> {
        let folder = folder_of(&self.target);
        self.write_to(&OsFolder(folder), progress)
    }

    fn write_to<D: Disk>(
        self,
        disk: &D,
        progress: &mut dyn FnMut(Progress) -> bool,
    ) -> Result<Packed> {
        let target = self.target.clone();
        let (partial, journal) = (beside(&target, ".partial"), beside(&target, ".journal"));
        let io = |path: &Path, doing| {
            let path = path.to_owned();
            move |source| Error::Io { path: path.clone(), doing, source }
        };
        let refuse = || Error::Exists { path: target.clone() };
        if disk.exists(&target).map_err(io(&target, "look for the file"))? {
            return Err(refuse());
        }
        let held = disk.open(&journal).map_err(io(&journal, "open the file"))?;
        let held = held.ok_or_else(|| Error::Busy { path: partial.clone() })?;
        let file = disk.open(&partial).map_err(io(&partial, "open the file"))?;
        let file = file.ok_or_else(|| Error::Busy { path: partial.clone() })?;
        // Again, now that nobody else can make it.
        if disk.exists(&target).map_err(io(&target, "look for the file"))? {
            return Err(refuse());
        }
        let mut begun = match self.take_up(disk, &partial, &file, held)? {
            Ok(begun) => begun,
            Err(held) => self.start_over(disk, &partial, &file, held).inspect_err(|_| {
                // There is nothing in them.
                let _ = (disk.remove(&partial), disk.remove(&journal));
            })?,
        };
        self.copy(&file, &partial, &mut begun, progress)?;
        let sums = std::mem::take(&mut begun.sums);
        let units = &self.layout.units;
        let written = |units: &[Unit]| units.iter().filter(|u| !u.elsewhere).map(|u| u.len).sum();
        let (resumed_bytes, total_bytes) = (written(&units[..begun.resumed]), written(units));
        let file_bytes = self.file_bytes();
        let records = self.layout.index.layers.iter().map(|l| l.experts() as u64).sum();
        let Sections { front, headers, index } = self.layout.finish(&sums, &self.headers);
        let finish = || -> io::Result<()> {
            file.write_at(&headers, front.headers.offset)?;
            file.write_at(&index, front.index.offset)?;
            file.sync()?;
            // Only now is it a packed file.
            file.write_at(&front.encode(), 0)?;
            file.sync()
        };
        finish().map_err(io(&partial, "write the file"))?;
        disk.rename(&partial, &target).map_err(|source| match source.kind() {
            io::ErrorKind::AlreadyExists => refuse(),
            _ => Error::Io { path: target.clone(), doing: "give the file its name", source },
        })?;
        disk.sync().map_err(io(&target, "give the file its name"))?;
        // It is of no file any more: what is left of it does no harm.
        let _ = disk.remove(&journal);
        Ok(Packed { path: target, file_bytes, records, resumed_bytes, total_bytes })
    }

    /// Takes up what an earlier attempt has written of the same. If there is nothing of that, gives the
    /// journal's file back.
    fn take_up<F: DiskFile>(
        &self,
        disk: &impl Disk,
        partial: &Path,
        file: &F,
        journal: F,
    ) -> Result<Result<Begun<F>, F>> {
        let io = Error::io(partial, "read what was written of it");
        let journal = Journal::read(journal, self.of, self.layout.units.len()).map_err(&io)?;
        let journal = match journal {
            Ok(journal) if self.is_there(file, &journal.sums).map_err(&io)? => journal,
            Ok(journal) => return Ok(Err(journal.into_file())),
            Err(file) => return Ok(Err(file)),
        };
        self.check_room(disk, partial, file)?;
        let sums = journal.sums.clone();
        Ok(Ok(Begun { journal, resumed: sums.len(), sums }))
    }

    /// Makes `file` as long as it will be, of zeros, with a journal that says so.
    fn start_over<F: DiskFile>(
        &self,
        disk: &impl Disk,
        partial: &Path,
        file: &F,
        journal: F,
    ) -> Result<Begun<F>> {
        let clear = || -> io::Result<()> {
            // First: from here on, nothing that the file has is trusted.
            journal.set_len(0)?;
            journal.sync()?;
            file.set_len(0)
        };
        let io = Error::io(partial, "begin to write the file");
        clear().map_err(&io)?;
        self.check_room(disk, partial, file)?;
        let begin = || -> io::Result<_> {
            file.set_len(self.file_bytes())?;
            file.allocate(self.file_bytes())?;
            file.sync()?;
            let journal = Journal::begin(journal, self.of)?;
            disk.sync()?;
            Ok(journal)
        };
        let journal = begin().map_err(&io)?;
        Ok(Begun { journal, resumed: 0, sums: Vec::new() })
    }

    /// Whether `file` may have what the journal says: its length, and the last unit.
    fn is_there(&self, file: &impl DiskFile, sums: &[u64]) -> io::Result<bool> {
        if file.len()? != self.file_bytes() {
            return Ok(false);
        }
        let units = self.layout.units[..sums.len()].iter().zip(sums);
        let Some((last, expected)) = units.rev().find(|(unit, _)| !unit.elsewhere) else {
            return Ok(true);
        };
        let mut sum = Checksum::new();
        let mut at = 0;
        let mut bytes = Vec::new();
        while at < last.len {
            bytes.resize((last.len - at).min(1 << 20) as usize, 0);
            file.read_at(&mut bytes, last.offset + at)?;
            sum.update(&bytes);
            at += bytes.len() as u64;
        }
        Ok(sum.finish() == *expected)
    }

    fn check_room(&self, disk: &impl Disk, partial: &Path, file: &impl DiskFile) -> Result<()> {
        let folder = folder_of(partial);
        let io = |source| Error::Io { path: folder.clone(), doing: "ask for its room", source };
        let taken = file.allocated_bytes().map_err(io)?;
        let needed = self.file_bytes().saturating_sub(taken);
        let free = disk.free_bytes().map_err(io)?;
        if needed > free { Err(Error::NoRoom { path: folder, needed, free }) } else { Ok(()) }
    }

    /// Writes all units that are not there. Whole ones are kept, whatever happens to others.
    fn copy<F: DiskFile>(
        &self,
        file: &F,
        partial: &Path,
        begun: &mut Begun<F>,
        progress: &mut dyn FnMut(Progress) -> bool,
    ) -> Result<()> {
        let error =
            |source| Error::Io { path: partial.to_owned(), doing: "write the file", source };
        let copied = self.copy_some(file, error, begun, progress);
        let kept = self.keep(file, begun, error);
        copied.and(kept)?;
        let is_whole = begun.sums.len() == self.layout.units.len();
        if is_whole { Ok(()) } else { Err(Error::Cancelled) }
    }

    /// The same until `progress` stops it.
    fn copy_some<F: DiskFile>(
        &self,
        file: &F,
        error: impl Fn(io::Error) -> Error,
        begun: &mut Begun<F>,
        progress: &mut dyn FnMut(Progress) -> bool,
    ) -> Result<()> {
        let units = &self.layout.units;
        let resumed_bytes = self.bytes_of(begun.resumed);
        let total_bytes = self.bytes_of(units.len());
        let mut feed = Feed::new(self.reader.clone(), self.files.clone());
        feed.add((begun.resumed..units.len()).flat_map(|n| {
            let unit = &units[n];
            Piece::cut(n, unit.len, unit.pieces.clone())
        }));
        let mut sum = Checksum::new();
        let (mut done_bytes, mut unsynced_bytes) = (resumed_bytes, 0);
        while progress(Progress { done_bytes, resumed_bytes, total_bytes })
            && let Some((piece, bytes)) = feed.next()?
        {
            let unit = &units[piece.unit];
            if !unit.elsewhere {
                file.write_at(&bytes, unit.offset + piece.start).map_err(&error)?;
            }
            sum.update(&bytes);
            done_bytes += bytes.len() as u64;
            unsynced_bytes += bytes.len() as u64;
            if piece.is_last {
                begun.sums.push(std::mem::replace(&mut sum, Checksum::new()).finish());
                if unsynced_bytes >= self.sync_every_bytes {
                    self.keep(file, begun, &error)?;
                    unsynced_bytes = 0;
                }
            }
        }
        Ok(())
    }

    /// Makes sure that all whole units are on the drive, and only then says so in the journal.
    fn keep<F: DiskFile>(
        &self,
        file: &F,
        begun: &mut Begun<F>,
        error: impl Fn(io::Error) -> Error,
    ) -> Result<()> {
        feed::check_unchanged(&self.reader, &self.files)?;
        let known = begun.journal.sums.len();
        if begun.sums.len() == known {
            return Ok(());
        }
        file.sync().map_err(&error)?;
        let new = begun.sums[known..].to_vec();
        let new_units = &self.layout.units[known..begun.sums.len()];
        let mut written = new_units.iter().filter(|unit| !unit.elsewhere);
        if let Some(first) = written.next() {
            let last = written.next_back().unwrap_or(first);
            file.forget(first.offset, last.offset + last.len - first.offset);
        }
        begun.journal.add(&new).map_err(error)
    }

    /// Bytes of the first `count` units.
    fn bytes_of(&self, count: usize) -> u64 {
        self.layout.units[..count].iter().map(|unit| unit.len).sum()
    }
}

/// A file that is being written.
struct Begun<F> {
    journal: Journal<F>,
    /// Units that were there.
    resumed: usize,
    /// Of the units that are written.
    sums: Vec<u64>,
}

/// Stands for what is written: the layout, and the files that it is made of as they are now.
fn what(model: &Model, layout: &Layout, headers: &[Arc<[u8]>]) -> u64 {
    let mut sum = Checksum::new();
    sum.update(&layout.front.encode());
    sum.update(&layout.index.encode());
    headers.iter().for_each(|header| sum.update(header));
    for file in model.files() {
        let known = file.identity.map(|id| (id.device, id.inode, id.modified));
        sum.update(format!("{:?} {} {known:?}\n", file.path, file.len).as_bytes());
    }
    sum.finish()
}

/// `path` with `end` behind its name.
fn beside(path: &Path, end: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(end);
    path.with_file_name(name)
}

fn folder_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(folder) if folder != Path::new("") => folder.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// The way from `folder` to `file`.
fn relative(file: &Path, folder: &Path) -> Result<Vec<u8>> {
    let whole = |path: &Path| path.canonicalize().map_err(Error::io(path, "find the file"));
    // The file's own name is kept, should it be a link.
    let (from, to) = (whole(folder)?, whole(&folder_of(file))?);
    let shared = from.components().zip(to.components()).take_while(|(a, b)| a == b).count();
    let up = from.components().skip(shared).map(|_| Path::new(".."));
    let mut path: PathBuf = up.collect();
    path.extend(to.components().skip(shared));
    path.push(file.file_name().unwrap_or_default());
    Ok(bytes_of(&path))
}

fn bytes_of(path: &Path) -> Vec<u8> {
    path.as_os_str().as_encoded_bytes().to_vec()
}

#[cfg(test)]
mod tests;

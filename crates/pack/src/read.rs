//! Reading a packed file: what it holds and where, and whether all of it has its checksum.

use std::fs;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tierstream_gguf::{Extent, FileIdentity, FileInfo, Header, Model, Original, Place};
use tierstream_io::Reader;

use crate::error::{Error, Result};
use crate::feed::{Feed, Piece};
use crate::format::{self, ALIGN, Broken, Checksum, Front, Index, MAGIC, Refused, Section};
use crate::layout::{Of, Unit};

/// Opens the model at `path`: a packed one, or the (first) GGUF file of one.
///
/// # Errors
/// As [`Pack::open`] and [`Model::open`].
pub fn open(path: &Path) -> Result<Model> {
    if is_packed(path) { Ok(Pack::open(path)?.into_model()) } else { Ok(Model::open(path)?) }
}

/// Whether a file begins as a packed one does. Of what cannot be read, no.
pub fn is_packed(path: &Path) -> bool {
    // Before opening: opening a pipe would wait for a writer.
    let is_file = fs::metadata(path).is_ok_and(|file| file.is_file());
    let mut head = [0; MAGIC.len()];
    let mut read = || fs::File::open(path)?.read_exact(&mut head);
    is_file && read().is_ok() && head == MAGIC
}

/// A unit and its checksum.
type Summed = (Unit, u64);

/// A packed file. Holds no file open.
#[derive(Debug, Clone)]
pub struct Pack {
    path: PathBuf,
    model: Model,
    experts_only: bool,
    /// All that has a checksum. What lies in another file is dense.
    units: Vec<Summed>,
    /// The same by tensor: of the whole, or of each expert's share.
    sums: Vec<Vec<u64>>,
}

/// What was looked at.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Checked {
    /// Expert records.
    pub records: u64,
    /// Other tensors.
    pub tensors: u64,
    /// Bytes of both.
    pub bytes: u64,
}

impl Pack {
    /// Reads what the file at `path` says of itself; none of the weights. Of experts alone, also the
    /// headers of the files that the other weights are in.
    ///
    /// # Errors
    /// [`Error::Damaged`] and [`Error::Length`] for a file that breaks the format, [`Error::Version`]
    /// and [`Error::Flags`] for one that is not known, [`Error::Original`], [`Error::Io`], and
    /// [`Error::Gguf`] for the headers in it.
    pub fn open(path: &Path) -> Result<Self> {
        let io = |doing| Error::io(path, doing);
        let file = fs::File::open(path).map_err(io("open the file"))?;
        let metadata = file.metadata().map_err(io("open the file"))?;
        let identity = FileIdentity::of(&metadata);
        Self::read(path, file, metadata.len(), identity, original_file)
    }

    /// Reads what the first bytes of a packed file of `len` bytes say, up to the end of its index. Files
    /// that it needs besides are not looked at.
    ///
    /// # Errors
    /// As [`Pack::open`].
    pub fn parse(bytes: &[u8], len: u64) -> Result<Self> {
        let any = |_: &Path, _: &Original, info: &FileInfo| Ok(info.clone());
        Self::read(Path::new(""), io::Cursor::new(bytes), len, None, any)
    }

    fn read(
        path: &Path,
        mut file: impl Read + Seek,
        len: u64,
        identity: Option<FileIdentity>,
        original_file: impl Fn(&Path, &Original, &FileInfo) -> Result<FileInfo>,
    ) -> Result<Self> {
        let front = read_front(path, &mut file, len)?;
        let headers = read_section(path, &mut file, &front.headers, "its copy of the headers")?;
        let section = read_section(path, &mut file, &front.index, "its index")?;
        let damaged = |Broken(what)| damaged(path, &front.index, what);
        let index = Index::decode(&section).map_err(damaged)?;
        let originals = originals(&index, &headers).map_err(damaged)?;
        let mut parts = Vec::with_capacity(originals.len());
        for original in &originals {
            let header = Header::parse(&original.header[..], original.len)?;
            if header.data_offset().min(original.len) != original.header.len() as u64 {
                return Err(damaged(Broken("a header is not as long as the index says")));
            }
            parts.push((path.to_owned(), header));
        }
        let model = Model::from_parts(parts)?;
        let data_offset = front.data_offset();
        let own = FileInfo { path: path.to_owned(), len, data_offset, alignment: ALIGN, identity };
        let mut files = vec![own];
        if front.experts_only {
            for (original, info) in originals.iter().zip(model.files()) {
                files.push(original_file(path, original, info)?);
            }
        }
        let (places, units) = places(&model, &front, &index).map_err(damaged)?;
        let sums = sums(&model, &index);
        let model = model.relocated(files, &places, originals)?;
        Ok(Self { path: path.to_owned(), model, experts_only: front.experts_only, units, sums })
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The model.
    pub fn into_model(self) -> Model {
        self.model
    }

    /// Whether it holds the expert records only.
    pub fn is_experts_only(&self) -> bool {
        self.experts_only
    }

    /// The checksums of each tensor of [`Pack::model`], in their order: one of all its bytes, or one of
    /// each expert's share, from expert 0 on. XXH3, 64 bits, seed 0.
    pub fn checksums(&self) -> &[Vec<u64>] {
        &self.sums
    }

    /// Reads all weights through `reader`, and compares them with their checksums. `progress` gets the
    /// share that is done, and stops it by returning false.
    ///
    /// # Errors
    /// [`Error::Checksum`] for the first that differs, [`Error::Source`], [`Error::Cancelled`].
    pub fn check(
        &self,
        reader: &Arc<Reader>,
        progress: &mut dyn FnMut(f32) -> bool,
    ) -> Result<Checked> {
        let files = self.model.files().iter().map(|file| crate::feed::open(reader, file));
        let files = files.collect::<Result<Vec<_>>>()?;
        let extents = |(unit, _): &Summed| unit.pieces.clone();
        let pieces = self.units.iter().map(extents).enumerate();
        let lens: Vec<u64> = self.units.iter().map(|(unit, _)| unit.len).collect();
        let total: u64 = lens.iter().sum();
        let mut feed = Feed::new(reader.clone(), files.clone());
        let mut checked = Checked::default();
        feed.add(pieces.flat_map(|(unit, pieces)| Piece::cut(unit, lens[unit], pieces)));
        let mut sum = Checksum::new();
        while let Some((piece, bytes)) = feed.next()? {
            sum.update(&bytes);
            checked.bytes += bytes.len() as u64;
            if piece.is_last {
                let (unit, expected) = &self.units[piece.unit];
                if std::mem::replace(&mut sum, Checksum::new()).finish() != *expected {
                    return Err(self.differs(unit));
                }
                match unit.of {
                    Of::Dense(_) => checked.tensors += 1,
                    Of::Part { part: 0, .. } => checked.records += 1,
                    Of::Part { .. } => {}
                }
            }
            if !progress(checked.bytes as f32 / total.max(1) as f32) {
                return Err(Error::Cancelled);
            }
        }
        crate::feed::check_unchanged(reader, &files)?;
        Ok(checked)
    }

    fn differs(&self, unit: &Unit) -> Error {
        let file = unit.pieces.first().map_or(0, |(extent, _)| extent.file);
        let nth = if let Of::Part { expert, .. } = unit.of { expert } else { 0 };
        let begins = |e: Extent| (e.file, e.offset) == (file, unit.offset);
        let mut tensors = self.model.tensors().iter();
        let tensor = tensors.find(|t| t.extents().nth(nth).is_some_and(begins));
        let name = tensor.map_or("?", |tensor| &tensor.name);
        let what = match unit.of {
            Of::Part { expert, .. } => format!("expert {expert} of the tensor {name:?}"),
            Of::Dense(_) => format!("the tensor {name:?}"),
        };
        let path = self.model.files().get(file).map_or(&self.path, |file| &file.path);
        Error::Checksum { path: path.clone(), what, offset: unit.offset }
    }
}

fn damaged(path: &Path, section: &Section, what: &str) -> Error {
    Error::Damaged { path: path.to_owned(), what: what.to_owned(), offset: section.offset }
}

fn read_front(path: &Path, file: &mut impl Read, len: u64) -> Result<Front> {
    let front = Section::default();
    let mut block = [0; ALIGN as usize];
    if len < ALIGN {
        return Err(damaged(path, &front, "it ends in its first block"));
    }
    file.read_exact(&mut block).map_err(Error::io(path, "read the file"))?;
    if !block.starts_with(&MAGIC) {
        return Err(damaged(path, &front, "it does not begin as a packed file"));
    }
    let front = Front::decode(&block).map_err(|refused| match refused {
        Refused::Version(version) => Error::Version { path: path.to_owned(), version },
        Refused::Flags(flags) => Error::Flags { path: path.to_owned(), flags },
        Refused::Broken(Broken(what)) => damaged(path, &front, what),
    })?;
    if front.file_len != len {
        return Err(Error::Length { path: path.to_owned(), len, expected: front.file_len });
    }
    Ok(front)
}

/// A section, whose length the first block has bounded, and which lies in the file.
fn read_section(
    path: &Path,
    file: &mut (impl Read + Seek),
    section: &Section,
    what: &str,
) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let io = |doing| Error::io(path, doing);
    file.seek(SeekFrom::Start(section.offset)).map_err(io("read the file"))?;
    let read = file.take(section.len).read_to_end(&mut bytes).map_err(io("read the file"))?;
    if read as u64 != section.len {
        return Err(damaged(path, section, &format!("it ends in {what}")));
    }
    if format::checksum(&bytes) != section.checksum {
        return Err(damaged(path, section, &format!("{what} does not have its checksum")));
    }
    Ok(bytes)
}

/// The headers, each with its file.
fn originals(index: &Index, headers: &[u8]) -> Result<Vec<Original>, Broken> {
    let mut left = headers;
    let files = index.files.iter().map(|file| {
        let len = usize::try_from(file.header_len).ok().filter(|len| *len <= left.len());
        let (header, rest) = left.split_at(len.ok_or(Broken("the headers end too early"))?);
        left = rest;
        Ok(Original { name: name(&file.name)?, len: file.len, header: header.into() })
    });
    let files = files.collect::<Result<Vec<_>, Broken>>()?;
    if left.is_empty() { Ok(files) } else { Err(Broken("there are more headers than files")) }
}

#[cfg(unix)]
fn name(bytes: &[u8]) -> Result<PathBuf, Broken> {
    use std::os::unix::ffi::OsStrExt;
    if bytes.contains(&0) {
        return Err(Broken("a file's name has a NUL"));
    }
    Ok(std::ffi::OsStr::from_bytes(bytes).into())
}

#[cfg(not(unix))]
fn name(bytes: &[u8]) -> Result<PathBuf, Broken> {
    std::str::from_utf8(bytes).map(PathBuf::from).map_err(|_| Broken("a file's name is no text"))
}

/// The file beside the packed one that has the weights that are no experts'.
fn original_file(pack: &Path, original: &Original, info: &FileInfo) -> Result<FileInfo> {
    let path = pack.parent().unwrap_or(Path::new("")).join(&original.name);
    let refuse =
        |what: String| Err(Error::Original { path: pack.to_owned(), file: path.clone(), what });
    let metadata = match fs::metadata(&path) {
        Ok(metadata) if metadata.is_file() => metadata,
        Ok(_) => return refuse("is not a file".to_owned()),
        Err(error) => return refuse(format!("cannot be opened: {error}")),
    };
    let file = match fs::File::open(&path) {
        Ok(file) => file,
        Err(error) => return refuse(format!("cannot be opened: {error}")),
    };
    let identity = file.metadata().ok().and_then(|file| FileIdentity::of(&file));
    if metadata.len() != original.len {
        let (is, was) = (metadata.len(), original.len);
        return refuse(format!("has {is} bytes now, and had {was} when it was packed"));
    }
    let mut header = Vec::new();
    let read = file.take(original.header.len() as u64).read_to_end(&mut header);
    match read {
        Err(error) => refuse(format!("cannot be read: {error}")),
        Ok(_) if header[..] != original.header[..] => {
            refuse("has another header than when it was packed".to_owned())
        }
        Ok(_) => Ok(FileInfo { path, identity, ..info.clone() }),
    }
}

/// Where each tensor lies, and all that has a checksum. Every tensor has one place, and no two share a
/// byte.
fn places(
    model: &Model,
    front: &Front,
    index: &Index,
) -> Result<(Vec<Place>, Vec<Summed>), Broken> {
    let mut places: Vec<Option<Place>> = vec![None; model.tensors().len()];
    let mut units = Vec::new();
    let mut put = |tensor: u32, place: Place| match places.get_mut(tensor as usize) {
        Some(slot @ None) => {
            *slot = Some(place);
            Ok(&model.tensors()[tensor as usize])
        }
        Some(Some(_)) => Err(Broken("a tensor has two places")),
        None => Err(Broken("there is a place for a tensor that is not there")),
    };
    for (n, dense) in index.dense.iter().enumerate() {
        let file = dense.file as usize;
        let tensor = put(dense.tensor, Place { file, offset: dense.offset, stride: None })?;
        let elsewhere = (tensor.file + 1, tensor.offset);
        if front.experts_only && (file, dense.offset) != elsewhere {
            return Err(Broken("a tensor of another file does not lie where its header says"));
        }
        if !front.experts_only && file != 0 {
            return Err(Broken("a tensor lies in a file that is not needed"));
        }
        let (offset, len) = (dense.offset, tensor.len);
        let pieces = vec![(Extent { file, offset, len }, 0)];
        let unit = Unit { of: Of::Dense(n), offset, len, pieces, elsewhere: file != 0 };
        units.push((unit, dense.checksum));
    }
    for (n, layer) in index.layers.iter().enumerate() {
        let experts = layer.experts() as u64;
        if layer.checksums.len() != layer.experts() * layer.parts.len() {
            return Err(Broken("some parts of records have no checksum"));
        }
        let mut end = 0;
        for &(tensor, start) in &layer.parts {
            let offset = layer.offset.checked_add(start).ok_or(Broken("a record lies nowhere"))?;
            let tensor = put(tensor, Place { file: 0, offset, stride: Some(layer.stride) })?;
            let fits = tensor.dims.len() == 3 && tensor.dims[2] == experts;
            if !fits || !start.is_multiple_of(ALIGN) || start < end {
                return Err(Broken("a record's parts do not follow each other"));
            }
            // No overflow: both are of lengths that are less than 2^63.
            end = start.checked_add(tensor.len / experts).ok_or(Broken("a part is too long"))?;
        }
        if !layer.stride.is_multiple_of(ALIGN) || end > layer.stride {
            return Err(Broken("a record's parts are longer than the record"));
        }
        for (nth, &checksum) in layer.checksums.iter().enumerate() {
            let (expert, part) = (nth / layer.parts.len(), nth % layer.parts.len());
            let (tensor, start) = layer.parts[part];
            let offset = (expert as u64).checked_mul(layer.stride);
            let offset = offset.and_then(|at| at.checked_add(layer.offset)?.checked_add(start));
            let offset = offset.ok_or(Broken("a record lies nowhere"))?;
            let len = model.tensors()[tensor as usize].len / experts;
            let pieces = vec![(Extent { file: 0, offset, len }, 0)];
            let of = Of::Part { layer: n, expert, part };
            units.push((Unit { of, offset, len, pieces, elsewhere: false }, checksum));
        }
    }
    check_units(front, &units)?;
    let places = places.into_iter().collect::<Option<Vec<_>>>();
    Ok((places.ok_or(Broken("a tensor has no place"))?, units))
}

/// The checksums of each tensor of an index that was found right.
fn sums(model: &Model, index: &Index) -> Vec<Vec<u64>> {
    let mut sums = vec![Vec::new(); model.tensors().len()];
    for dense in &index.dense {
        sums[dense.tensor as usize] = vec![dense.checksum];
    }
    for layer in &index.layers {
        for (part, &(tensor, _)) in layer.parts.iter().enumerate() {
            let of_experts = layer.checksums.iter().skip(part).step_by(layer.parts.len());
            sums[tensor as usize] = of_experts.copied().collect();
        }
    }
    sums
}

/// What lies in the packed file begins at whole blocks, behind the index, ends in the file, and shares
/// no byte with anything else.
fn check_units(front: &Front, units: &[Summed]) -> Result<(), Broken> {
    let own = units.iter().filter(|(unit, _)| !unit.elsewhere);
    let mut ranges: Vec<(u64, u64)> = own.map(|(unit, _)| (unit.offset, unit.len)).collect();
    ranges.sort_unstable();
    let mut end = front.data_offset();
    for (offset, len) in ranges {
        if !offset.is_multiple_of(ALIGN) || offset < end {
            return Err(Broken("records or tensors share bytes, or do not begin at a block"));
        }
        end = offset.checked_add(len).ok_or(Broken("a record lies nowhere"))?;
    }
    if end > front.file_len {
        return Err(Broken("a record or tensor ends beyond the file"));
    }
    Ok(())
}

#[cfg(test)]
mod tests;

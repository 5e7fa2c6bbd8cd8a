//! The header of one file: what it says, checked against itself and against the length of the file.

use std::io::{Read, Seek, SeekFrom};

use crate::error::{Error, ErrorKind};
use crate::guess::{GUESS_BYTES, guess};
use crate::json::{self, RawTensor};
use crate::limits::MAX_HEADER_BYTES;
use crate::tensor::{Tensor, bytes_of, index_by_name};
use crate::{Metadata, Result};

/// Bytes in front of the header, which tell its length (little-endian).
const LENGTH_BYTES: usize = 8;

/// One file's header. See [`Checkpoint`](crate::Checkpoint) for several files.
///
/// What holds for every `Header`: tensor names are unique; a tensor has the bytes that its type and
/// shape want; all of them together fill the file from the header to its end, and share no byte.
#[derive(Clone, Debug)]
pub struct Header {
    tensors: Vec<Tensor>,
    metadata: Metadata,
    data_offset: u64,
    file_len: u64,
}

impl Header {
    /// Reads the header of the file that begins at byte 0 of `reader` and ends at its end.
    ///
    /// Reads at most [`MAX_HEADER_BYTES`]; the data is not touched. Where `reader` stands before and
    /// after does not matter.
    ///
    /// # Errors
    /// The kinds of [`ErrorKind`] that concern one file, without a path.
    pub fn read<R: Read + Seek>(mut reader: R) -> Result<Self> {
        let file_len = reader
            .seek(SeekFrom::End(0))
            .map_err(|source| Error::io("measure the file", source))?;
        reader.seek(SeekFrom::Start(0)).map_err(|source| Error::io("read the header", source))?;
        Self::parse(reader, file_len)
    }

    /// Reads the header of a whole file in memory.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn from_bytes(file: &[u8]) -> Result<Self> {
        Self::parse(file, file.len() as u64)
    }

    /// Reads a header from `reader`, which stands at its first byte, as one of a file of `file_len`
    /// bytes.
    fn parse<R: Read>(mut reader: R, file_len: u64) -> Result<Self> {
        let mut read = |bytes: &mut Vec<u8>, up_to: u64| {
            let left = up_to.saturating_sub(bytes.len() as u64);
            let read = reader.by_ref().take(left).read_to_end(bytes);
            read.map_err(|source| Error::io("read the header", source))
        };
        let mut bytes = Vec::with_capacity(GUESS_BYTES);
        read(&mut bytes, GUESS_BYTES as u64)?;
        let header_len = header_len(&bytes, file_len)?;
        let data_offset = LENGTH_BYTES as u64 + header_len;
        // Bounded by the limit; and by the file, as far as that is not a sparse one.
        bytes.reserve_exact((data_offset as usize).saturating_sub(bytes.len()));
        read(&mut bytes, data_offset)?;
        if (bytes.len() as u64) < data_offset {
            return Err(
                ErrorKind::HeaderPastEnd { header_len, file_len: bytes.len() as u64 }.into()
            );
        }
        let json = &bytes[LENGTH_BYTES..data_offset as usize];
        let raw = json::header(json, LENGTH_BYTES as u64)?;
        let tensors = place_all(raw.tensors, data_offset, file_len)?;
        let metadata = unique(raw.metadata.unwrap_or_default())?;
        Ok(Self { tensors, metadata, data_offset, file_len })
    }

    /// All tensors, in the order of their bytes in the file, with offsets from its start.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// What the file says of itself under `__metadata__`.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// First byte of the data, which is one past the last of the header.
    pub fn data_offset(&self) -> u64 {
        self.data_offset
    }

    /// Length of the file in bytes.
    pub fn file_len(&self) -> u64 {
        self.file_len
    }

    pub(crate) fn into_parts(self) -> (Vec<Tensor>, Metadata) {
        (self.tensors, self.metadata)
    }
}

/// The length of the header that `head` is the beginning of, if it can be one.
fn header_len(head: &[u8], file_len: u64) -> Result<u64> {
    let Some((length, json)) = head.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(ErrorKind::TooShort { file_len }.into());
    };
    let header_len = u64::from_le_bytes(*length);
    match json.first() {
        // The format says that it begins so, and nothing else would tell it from any other file.
        Some(b'{') => {}
        _ if json.is_empty() && header_len <= MAX_HEADER_BYTES => {
            return Err(ErrorKind::TooShort { file_len }.into());
        }
        _ => return Err(ErrorKind::NotSafetensors(guess(head)).into()),
    }
    if header_len > file_len.saturating_sub(LENGTH_BYTES as u64) {
        return Err(ErrorKind::HeaderPastEnd { header_len, file_len }.into());
    }
    if header_len > MAX_HEADER_BYTES {
        let what = "the length of the header in bytes";
        return Err(ErrorKind::Limit { what, value: header_len, limit: MAX_HEADER_BYTES }.into());
    }
    Ok(header_len)
}

/// Checks the tensors, and sorts them by where they lie.
fn place_all(mut raw: Vec<RawTensor>, data_offset: u64, file_len: u64) -> Result<Vec<Tensor>> {
    // As the package sorts them: of an empty tensor and another at one place, the empty one first.
    raw.sort_by_key(|tensor| tensor.data_offsets);
    let mut tensors: Vec<Tensor> = Vec::with_capacity(raw.len());
    for RawTensor { name, dtype, shape, data_offsets: (begin, end) } in raw {
        let refuse = |kind: ErrorKind| Err(Error::from(kind).in_tensor(&name));
        let Some(found) = end.checked_sub(begin) else {
            return refuse(ErrorKind::Reversed { begin, end });
        };
        let expected = match bytes_of(dtype, &shape) {
            Ok(expected) => expected,
            Err(kind) => return refuse(kind),
        };
        if found != expected {
            return refuse(ErrorKind::WrongBytes { dtype, shape, expected, found });
        }
        let before = tensors.last();
        let taken = before.map_or(0, |before| before.end() - data_offset);
        if begin < taken {
            let other = before.map(|before| before.name.clone()).unwrap_or_default();
            return refuse(ErrorKind::Overlap { other });
        }
        if begin > taken {
            return refuse(ErrorKind::Hole { begin: taken, end: begin });
        }
        let (offset, end) = (data_offset.saturating_add(begin), data_offset.saturating_add(end));
        // A saturated sum is beyond any file: lengths come from seeking or from memory.
        if end > file_len || end == u64::MAX {
            return refuse(ErrorKind::PastEnd { offset, end, file_len });
        }
        tensors.push(Tensor { name, dtype, shape, file: 0, offset, len: found });
    }
    let end = tensors.last().map_or(data_offset, Tensor::end);
    if end < file_len {
        return Err(ErrorKind::Trailing { end, file_len }.into());
    }
    index_by_name(&tensors)
        .map_err(|second| Error::from(ErrorKind::Duplicate).in_tensor(&tensors[second].name))?;
    Ok(tensors)
}

fn unique(pairs: Vec<(String, String)>) -> Result<Metadata> {
    let mut metadata = Metadata::new();
    for (key, value) in pairs {
        if metadata.contains_key(&key) {
            let key = json::shorten(&key).to_owned();
            return Err(ErrorKind::DuplicateMetadata { key }.into());
        }
        metadata.insert(key, value);
    }
    Ok(metadata)
}

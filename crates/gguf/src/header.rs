//! The header of one file: what it says, checked against itself and against the length of the file.

use std::io::{self, BufReader, Read, Seek, SeekFrom};

use crate::Result;
use crate::cursor::Cursor;
use crate::error::{Error, ErrorKind};
use crate::format::{Format, GUESS_BYTES};
use crate::limits;
use crate::parse::{self, TensorRow};
use crate::tensor::{Tensor, index_by_name};
use crate::value::{Metadata, Value, ValueType};

/// `GGUF` at the byte level (GGUF specification).
pub(crate) const MAGIC: [u8; 4] = *b"GGUF";

/// Where no `general.alignment` is given (GGUF specification).
pub(crate) const DEFAULT_ALIGNMENT: u32 = 32;

pub(crate) const KEY_ALIGNMENT: &str = "general.alignment";
pub(crate) const KEY_ARCHITECTURE: &str = "general.architecture";
pub(crate) const KEY_SPLIT_NO: &str = "split.no";
pub(crate) const KEY_SPLIT_COUNT: &str = "split.count";
pub(crate) const KEY_SPLIT_TENSORS: &str = "split.tensors.count";

const READ_BUFFER_BYTES: usize = 64 << 10;

/// One file's header, version 2 or 3, little-endian. See [`Model`](crate::Model) for models of
/// several files.
///
/// What holds for every `Header`: tensor names are unique; every tensor begins at a multiple of the
/// alignment, lies within the file and shares no byte with the header or with another tensor.
#[derive(Clone, Debug)]
pub struct Header {
    version: u32,
    metadata: Metadata,
    tensors: Vec<Tensor>,
    alignment: u64,
    data_offset: u64,
    file_len: u64,
}

impl Header {
    /// Reads the header of the file that begins at byte 0 of `reader` and ends at its end.
    ///
    /// Reads at most [`MAX_HEADER_BYTES`](crate::limits::MAX_HEADER_BYTES), through a buffer of its
    /// own; tensor data is not touched beyond that buffer. Where `reader` stands before and after
    /// does not matter.
    ///
    /// # Errors
    ///
    /// The kinds of [`ErrorKind`] that concern one file, without a path.
    pub fn read<R: Read + Seek>(mut reader: R) -> Result<Self> {
        let len = reader
            .seek(SeekFrom::End(0))
            .map_err(|source| Error::io("measure the file", source))?;
        reader.seek(SeekFrom::Start(0)).map_err(|source| Error::io("read the header", source))?;
        Self::parse(BufReader::with_capacity(READ_BUFFER_BYTES, reader), len)
    }

    /// Reads the header of a whole file in memory.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read).
    pub fn from_bytes(file: &[u8]) -> Result<Self> {
        Self::parse(file, file.len() as u64)
    }

    /// Reads a header from `reader`, which stands at its first byte, as that of a file of `file_len`
    /// bytes: headers are kept apart from their files, too.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read).
    pub fn parse<R: Read>(mut reader: R, file_len: u64) -> Result<Self> {
        let mut head = Vec::with_capacity(GUESS_BYTES);
        let guess_bytes = GUESS_BYTES as u64;
        reader
            .by_ref()
            .take(guess_bytes)
            .read_to_end(&mut head)
            .map_err(|source| Error::io("read the header", source))?;
        check_magic(&head)?;
        let mut cursor = Cursor::new(io::Cursor::new(head).chain(reader), file_len);
        cursor.array::<4>("the magic")?;

        let counts = parse::counts(&mut cursor)?;
        let metadata = parse::metadata(&mut cursor, counts.pairs)?;
        check_known_types(&metadata)?;
        let alignment = alignment(&metadata)?;
        let (mut tensors, mut table_offsets) = (Vec::new(), Vec::new());
        for _ in 0..counts.tensors {
            let TensorRow { at, name, ty, dims, offset, len } = parse::tensor(&mut cursor)?;
            tensors.push(Tensor { name, ty, dims, file: 0, offset, len, stride: None });
            table_offsets.push(at);
        }
        // No overflow: MAX_HEADER_BYTES and MAX_ALIGNMENT bound both.
        let data_offset = cursor.pos().next_multiple_of(alignment);
        for (tensor, &at) in tensors.iter_mut().zip(&table_offsets) {
            place(tensor, data_offset, alignment, file_len)
                .map_err(|kind| Error::from(kind).at(at).in_tensor(&tensor.name))?;
        }
        index_by_name(&tensors).map_err(|second| {
            let at = table_offsets[second];
            Error::from(ErrorKind::Duplicate).at(at).in_tensor(&tensors[second].name)
        })?;
        check_overlaps(&tensors)?;
        Ok(Self { version: counts.version, metadata, tensors, alignment, data_offset, file_len })
    }

    /// Version of the format: 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// All metadata, in file order.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// All tensors, in the order of the file's table, with offsets from the start of the file.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// `general.alignment` in bytes, a power of two; 32 where the file names none.
    pub fn alignment(&self) -> u64 {
        self.alignment
    }

    /// Where the data section begins, in bytes: the end of the tensor table, padded to the
    /// alignment.
    pub fn data_offset(&self) -> u64 {
        self.data_offset
    }

    /// Length of the file in bytes.
    pub fn file_len(&self) -> u64 {
        self.file_len
    }

    /// Splits into what a model keeps of a file.
    pub(crate) fn into_metadata_and_tensors(self) -> (Metadata, Vec<Tensor>) {
        (self.metadata, self.tensors)
    }
}

fn check_magic(head: &[u8]) -> Result<()> {
    if head.starts_with(&MAGIC) {
        return Ok(());
    }
    Err(if head.is_empty() {
        ErrorKind::Empty.into()
    } else if head.starts_with(b"FUGG") {
        ErrorKind::BigEndian.into()
    } else if MAGIC.starts_with(head) {
        let (needs, has) = (MAGIC.len() as u64, head.len() as u64);
        Error::from(ErrorKind::HeaderTruncated { what: "the magic", needs, has }).at(0)
    } else {
        ErrorKind::NotGguf(Format::guess(head)).into()
    })
}

/// Keys whose type the GGUF specification or llama.cpp's loader (`llama_model_loader`) fixes, where
/// they are present.
fn check_known_types(metadata: &Metadata) -> Result<()> {
    const KNOWN: &[(&str, ValueType, &str)] = &[
        (KEY_ARCHITECTURE, ValueType::Str, "a string"),
        ("general.name", ValueType::Str, "a string"),
        (KEY_ALIGNMENT, ValueType::U32, "u32"),
        ("general.quantization_version", ValueType::U32, "u32"),
        ("general.file_type", ValueType::U32, "u32"),
        (KEY_SPLIT_NO, ValueType::U16, "u16"),
        (KEY_SPLIT_COUNT, ValueType::U16, "u16"),
        (KEY_SPLIT_TENSORS, ValueType::I32, "i32"),
    ];
    for &(key, ty, expected) in KNOWN {
        match metadata.get(key).map(Value::value_type) {
            Some(found) if found != ty => {
                return Err(Error::from(ErrorKind::WrongType { expected, found }).in_key(key));
            }
            _ => {}
        }
    }
    Ok(())
}

fn alignment(metadata: &Metadata) -> Result<u64> {
    let value = metadata.u32(KEY_ALIGNMENT)?.unwrap_or(DEFAULT_ALIGNMENT);
    // The specification wants a multiple of 8, ggml any power of two; files of the latter kind load
    // everywhere.
    if !value.is_power_of_two() {
        return Err(Error::from(ErrorKind::InvalidAlignment { value }).in_key(KEY_ALIGNMENT));
    }
    let (value, limit) = (value.into(), limits::MAX_ALIGNMENT);
    if value > limit {
        let kind = ErrorKind::Limit { what: "the alignment in bytes", value, limit };
        return Err(Error::from(kind).in_key(KEY_ALIGNMENT));
    }
    Ok(value)
}

/// Has a tensor, whose offset is that of the file's table, begin where it does in the file.
fn place(
    tensor: &mut Tensor,
    data_offset: u64,
    alignment: u64,
    file_len: u64,
) -> std::result::Result<(), ErrorKind> {
    if !tensor.offset.is_multiple_of(alignment) {
        return Err(ErrorKind::Misaligned { offset: tensor.offset, alignment });
    }
    let offset = data_offset.saturating_add(tensor.offset);
    let end = offset.saturating_add(tensor.len);
    // A saturated sum is beyond any file: lengths come from seeking or from memory.
    if end > file_len || end == u64::MAX {
        return Err(ErrorKind::TensorPastEnd { offset, end, file_len });
    }
    tensor.offset = offset;
    Ok(())
}

fn check_overlaps(tensors: &[Tensor]) -> Result<()> {
    let mut by_offset: Vec<&Tensor> = tensors.iter().collect();
    by_offset.sort_by_key(|tensor| tensor.offset);
    match by_offset.windows(2).find(|pair| pair[0].end() > pair[1].offset) {
        Some(pair) => {
            let kind = ErrorKind::Overlap { other: pair[0].name.clone() };
            Err(Error::from(kind).at(pair[1].offset).in_tensor(&pair[1].name))
        }
        None => Ok(()),
    }
}

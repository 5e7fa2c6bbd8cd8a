//! Reading a trace file.

use std::fs::File;
use std::panic::{self, AssertUnwindSafe};

use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::{ByteArray, ByteArrayType, DataType, FloatType, Int32Type};
use parquet::errors::ParquetError;
use parquet::file::metadata::ParquetMetaData;
use parquet::file::reader::{FileReader, RowGroupReader, SerializedFileReader};

use super::schema::{COLUMNS, HEADER_KEY, Head, SCHEMA, VERSION};
use crate::error::{Error, Place, Result};
use crate::limits;
use crate::trace::{NO_EXPERT, Phase, Token, Trace};

/// Rows that are decoded at once.
const CHUNK_ROWS: usize = 1 << 14;

/// Reads a whole trace.
pub(crate) fn read(file: File) -> Result<Trace> {
    // The `parquet` crate panics at some of the files that are damaged inside of a page.
    let read = panic::catch_unwind(AssertUnwindSafe(|| read_all(file)));
    read.unwrap_or_else(|_| Err(Error::file("a page of the Parquet file is damaged")))
}

fn read_all(file: File) -> Result<Trace> {
    let file_bytes = file.metadata()?.len();
    let file = SerializedFileReader::new(file).map_err(damaged)?;
    let metadata = file.metadata();
    check_schema(metadata)?;
    check_sizes(metadata, file_bytes)?;
    let mut rows = Assembler::new(Trace::new(header(metadata)?)?);
    for index in 0..file.num_row_groups() {
        let group = file.get_row_group(index).map_err(damaged)?;
        read_group(group.as_ref(), &mut rows)?;
    }
    rows.finish()
}

fn damaged(error: ParquetError) -> Error {
    match error {
        ParquetError::External(source) => match source.downcast::<std::io::Error>() {
            Ok(source) => Error::Io(*source),
            Err(source) => Error::file(source),
        },
        error => Error::file(error),
    }
}

fn header(metadata: &ParquetMetaData) -> Result<crate::Header> {
    let entries = metadata.file_metadata().key_value_metadata();
    let entry = entries.into_iter().flatten().find(|entry| entry.key == HEADER_KEY);
    let Some(json) = entry.and_then(|entry| entry.value.as_deref()) else {
        return Err(Error::file(format!("a Parquet file, but no trace: it has no {HEADER_KEY}")));
    };
    Error::limit("bytes of the header", json.len() as u64, limits::HEADER_BYTES_MAX as u64)?;
    let bad = |error| Error::file(format!("{HEADER_KEY}: {error}"));
    #[derive(serde::Deserialize)]
    struct Version {
        version: u32,
    }
    let Version { version } = serde_json::from_str(json).map_err(bad)?;
    if version != VERSION {
        let reason = format!("a trace of version {version}; this program reads {VERSION}");
        return Err(Error::file(reason));
    }
    let Head { header, .. } = serde_json::from_str(json).map_err(bad)?;
    Ok(header)
}

/// Other programs may have rewritten a file, but the columns are these.
fn check_schema(metadata: &ParquetMetaData) -> Result<()> {
    let schema = metadata.file_metadata().schema_descr();
    let ours = parquet::schema::types::SchemaDescriptor::new(SCHEMA.clone());
    let mut columns = schema.columns().iter();
    for (expected, (path, _)) in ours.columns().iter().zip(COLUMNS) {
        let same = columns.next().is_some_and(|column| {
            column.path().parts().first() == expected.path().parts().first()
                && column.physical_type() == expected.physical_type()
                && column.max_rep_level() == expected.max_rep_level()
        });
        if !same {
            return Err(Error::file(format!("a Parquet file, but no trace: no column {path}")));
        }
    }
    Ok(())
}

/// What the file says of its sizes must be possible.
fn check_sizes(metadata: &ParquetMetaData, file_bytes: u64) -> Result<()> {
    for group in metadata.row_groups() {
        for column in group.columns() {
            let begin = column.dictionary_page_offset().unwrap_or(column.data_page_offset());
            let number = |number: i64| u64::try_from(number).ok();
            let end = number(begin).zip(number(column.compressed_size()));
            let end = end.and_then(|(begin, stored)| begin.checked_add(stored));
            if end.is_none_or(|end| end > file_bytes) || column.data_page_offset() < 0 {
                return Err(Error::file("a column does not lie in the file"));
            }
            let whole = number(column.uncompressed_size()).unwrap_or(u64::MAX);
            Error::limit("bytes of a column in a row group", whole, 1 << 31)?;
            let values = u64::try_from(column.num_values()).unwrap_or(u64::MAX);
            Error::limit("values of a column in a row group", values, limits::IDS_MAX as u64)?;
        }
    }
    Ok(())
}

/// A column, and what was decoded of it.
struct Column<T: DataType> {
    reader: ColumnReaderImpl<T>,
    /// Definition level of a value that is there.
    there: i16,
    values: Vec<T::T>,
    levels: Vec<i16>,
    begin: Vec<i16>,
}

impl<T: DataType> Column<T> {
    fn new(reader: ColumnReaderImpl<T>, there: i16) -> Self {
        Self { reader, there, values: Vec::new(), levels: Vec::new(), begin: Vec::new() }
    }

    /// Decodes so many rows, all that there are at the end.
    fn decode(&mut self, rows: usize) -> Result<usize> {
        self.values.clear();
        self.levels.clear();
        self.begin.clear();
        let (levels, begin) = (Some(&mut self.levels), Some(&mut self.begin));
        let (rows, _, _) =
            self.reader.read_records(rows, levels, begin, &mut self.values).map_err(damaged)?;
        Ok(rows)
    }

    fn value(&self, row: usize) -> Result<&T::T> {
        self.values.get(row).ok_or_else(|| Error::file("a value is missing"))
    }
}

/// Walks along a column of lists, or of values that may be missing.
#[derive(Default)]
struct Cursor {
    level: usize,
    value: usize,
}

impl Cursor {
    /// The values of the next row.
    fn next<'a, T: DataType>(&mut self, column: &'a Column<T>) -> &'a [T::T] {
        let first = self.value;
        loop {
            if column.levels.get(self.level).is_some_and(|&level| level >= column.there) {
                self.value += 1;
            }
            self.level += 1;
            if column.begin.get(self.level).is_none_or(|&begin| begin == 0) {
                return column.values.get(first..self.value).unwrap_or_default();
            }
        }
    }
}

struct Columns {
    prompt: Column<Int32Type>,
    domain: Column<ByteArrayType>,
    phase: Column<ByteArrayType>,
    batch: Column<Int32Type>,
    position: Column<Int32Type>,
    token: Column<Int32Type>,
    layer: Column<Int32Type>,
    experts: Column<Int32Type>,
    weights: Column<FloatType>,
}

impl Columns {
    fn new(group: &dyn RowGroupReader) -> Result<Self> {
        let schema = group.metadata().schema_descr();
        let open = |index: usize| group.get_column_reader(index).map_err(damaged);
        let there = |index: usize| schema.column(index).max_def_level();
        let int = |index| match open(index)? {
            ColumnReader::Int32ColumnReader(reader) => Ok(Column::new(reader, there(index))),
            _ => Err(Error::file("a column is of another type")),
        };
        let text = |index| match open(index)? {
            ColumnReader::ByteArrayColumnReader(reader) => Ok(Column::new(reader, there(index))),
            _ => Err(Error::file("a column is of another type")),
        };
        let number = |index| match open(index)? {
            ColumnReader::FloatColumnReader(reader) => Ok(Column::new(reader, there(index))),
            _ => Err(Error::file("a column is of another type")),
        };
        Ok(Self {
            prompt: int(0)?,
            domain: text(1)?,
            phase: text(2)?,
            batch: int(3)?,
            position: int(4)?,
            token: int(5)?,
            layer: int(6)?,
            experts: int(7)?,
            weights: number(8)?,
        })
    }

    fn decode(&mut self, rows: usize) -> Result<usize> {
        let counts = [
            self.prompt.decode(rows)?,
            self.domain.decode(rows)?,
            self.phase.decode(rows)?,
            self.batch.decode(rows)?,
            self.position.decode(rows)?,
            self.token.decode(rows)?,
            self.layer.decode(rows)?,
            self.experts.decode(rows)?,
            self.weights.decode(rows)?,
        ];
        match counts.iter().all(|&count| count == counts[0]) {
            true => Ok(counts[0]),
            false => Err(Error::file("columns of a row group have different numbers of rows")),
        }
    }
}

fn read_group(group: &dyn RowGroupReader, rows: &mut Assembler) -> Result<()> {
    let mut columns = Columns::new(group)?;
    loop {
        let count = columns.decode(CHUNK_ROWS)?;
        if count == 0 {
            return Ok(());
        }
        let (mut token, mut experts, mut weights) =
            (Cursor::default(), Cursor::default(), Cursor::default());
        for row in 0..count {
            let place = Place::Row(rows.row);
            let domain = rows.domain(columns.domain.value(row)?).map_err(|e| e.at(place))?;
            let found = Token {
                prompt: columns.prompt.value(row)?.cast_unsigned(),
                position: columns.position.value(row)?.cast_unsigned(),
                batch: columns.batch.value(row)?.cast_unsigned(),
                id: token.next(&columns.token).first().map(|id| id.cast_unsigned()),
                phase: phase(columns.phase.value(row)?).map_err(|e| e.at(place))?,
                domain,
            };
            let layer = columns.layer.value(row)?.cast_unsigned() as usize;
            let (experts, weights) =
                (experts.next(&columns.experts), weights.next(&columns.weights));
            rows.push(found, layer, experts, weights).map_err(|e| e.at(place))?;
            rows.row += 1;
        }
    }
}

fn phase(text: &ByteArray) -> Result<Phase> {
    match text.data() {
        b"decode" => Ok(Phase::Decode),
        b"prefill" => Ok(Phase::Prefill),
        other => Err(Error::file(format!("no phase: {}", String::from_utf8_lossy(other)))),
    }
}

/// Makes tokens of rows.
struct Assembler {
    trace: Trace,
    row: u64,
    token: Option<Token>,
    next_layer: usize,
    experts: Vec<u16>,
    weights: Vec<f32>,
    has_weights: bool,
    starts: Vec<usize>,
    /// The last domain that was looked up.
    domain: (ByteArray, u16),
}

impl Assembler {
    fn new(trace: Trace) -> Self {
        let len = trace.header().row_len();
        let mut starts = vec![0];
        starts.extend(trace.header().layers.iter().scan(0, |end, layer| {
            *end += layer.used as usize;
            Some(*end)
        }));
        Self {
            trace,
            row: 0,
            token: None,
            next_layer: 0,
            experts: vec![NO_EXPERT; len],
            weights: vec![f32::NAN; len],
            has_weights: false,
            starts,
            domain: (ByteArray::from(""), 0),
        }
    }

    fn domain(&mut self, text: &ByteArray) -> Result<u16> {
        if self.domain.0.data() != text.data() {
            let name = std::str::from_utf8(text.data()).map_err(Error::file)?;
            self.domain = (text.clone(), self.trace.domains_mut().number(name)?);
        }
        Ok(self.domain.1)
    }

    fn push(&mut self, token: Token, layer: usize, experts: &[i32], weights: &[f32]) -> Result<()> {
        let layers = self.starts.len() - 1;
        if layer >= layers {
            return Err(Error::file(format!("no MoE layer {layer}, there are {layers}")));
        }
        if self.token != Some(token) || layer < self.next_layer {
            self.end_token()?;
            self.token = Some(token);
        }
        self.next_layer = layer + 1;
        let places = self.starts[layer]..self.starts[layer + 1];
        if experts.len() > places.len() {
            let reason = format!(
                "{} experts in MoE layer {layer}, which uses {}",
                experts.len(),
                places.len()
            );
            return Err(Error::file(reason));
        }
        for (place, &expert) in self.experts[places.clone()].iter_mut().zip(experts) {
            let found = u16::try_from(expert).ok().filter(|&expert| expert != NO_EXPERT);
            *place = found.ok_or_else(|| Error::file(format!("no expert {expert}")))?;
        }
        if !weights.is_empty() {
            if weights.len() != experts.len() {
                let reason = format!("{} weights of {} experts", weights.len(), experts.len());
                return Err(Error::file(reason));
            }
            self.weights[places].iter_mut().zip(weights).for_each(|(place, w)| *place = *w);
            self.has_weights = true;
        }
        Ok(())
    }

    fn end_token(&mut self) -> Result<()> {
        let Some(token) = self.token.take() else { return Ok(()) };
        let weights = if self.has_weights { &self.weights[..] } else { &[] };
        self.trace.push(token, &self.experts, weights).map_err(|error| match error {
            Error::Damaged { reason, .. } => Error::file(reason),
            other => other,
        })?;
        self.experts.fill(NO_EXPERT);
        if self.has_weights {
            self.weights.fill(f32::NAN);
            self.has_weights = false;
        }
        self.next_layer = 0;
        Ok(())
    }

    fn finish(mut self) -> Result<Trace> {
        let place = Place::Row(self.row.saturating_sub(1));
        self.end_token().map_err(|e| e.at(place))?;
        Ok(self.trace)
    }
}

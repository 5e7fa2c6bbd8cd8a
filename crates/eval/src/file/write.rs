//! Writing a trace, token by token.

use std::io::Write;
use std::sync::Arc;

use parquet::basic::Compression;
use parquet::column::writer::ColumnWriter;
use parquet::data_type::ByteArray;
use parquet::errors::ParquetError;
use parquet::file::metadata::KeyValue;
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};
use parquet::schema::types::ColumnPath;

use super::schema::{HEADER_KEY, Head, SCHEMA, VERSION};
use crate::error::{Error, Place, Result};
use crate::header::Header;
use crate::limits;
use crate::trace::{Domains, NO_EXPERT, Phase, Token, check_row};

/// Rows after which a row group is written.
const GROUP_ROWS: usize = 1 << 17;

/// Expert ids after which it is, too: with the weights 8 MiB, and half as much again for levels.
const GROUP_IDS: usize = 1 << 20;

/// Writes a trace as its tokens are computed. What it holds in memory does not grow with their number:
/// at most 2^20 expert ids and their weights.
///
/// The file is one when [`finish`](Self::finish) has written its end; until then it cannot be read.
pub struct Writer<W: Write + Send> {
    file: SerializedFileWriter<W>,
    header: Header,
    domains: Domains,
    rows: Rows,
    tokens: u64,
    ids: u64,
    batch: u32,
}

/// The rows of a group, column by column.
#[derive(Default)]
struct Rows {
    prompt: Vec<i32>,
    domain: Vec<u16>,
    phase: Vec<Phase>,
    batch: Vec<i32>,
    position: Vec<i32>,
    token: Vec<i32>,
    token_levels: Vec<i16>,
    layer: Vec<i32>,
    experts: Vec<i32>,
    experts_begin: Vec<i16>,
    weights: Vec<f32>,
    weights_begin: Vec<i16>,
    weights_levels: Vec<i16>,
}

impl<W: Write + Send> Writer<W> {
    /// Begins a file.
    ///
    /// # Errors
    ///
    /// As [`Header::check`], or if it cannot be written.
    pub fn new(out: W, header: Header) -> Result<Self> {
        header.check()?;
        let head = Head { version: VERSION, header };
        let json = serde_json::to_string(&head).map_err(Error::file)?;
        let weights = ColumnPath::new(["weights", "list", "element"].map(str::to_owned).to_vec());
        let properties = WriterProperties::builder()
            .set_compression(Compression::SNAPPY)
            .set_statistics_enabled(EnabledStatistics::Chunk)
            .set_offset_index_disabled(true)
            // Hardly any weight comes twice, and their bits do not compress.
            .set_column_dictionary_enabled(weights.clone(), false)
            .set_column_compression(weights, Compression::UNCOMPRESSED)
            .set_key_value_metadata(Some(vec![KeyValue::new(HEADER_KEY.to_owned(), json)]))
            .build();
        let file = SerializedFileWriter::new(out, SCHEMA.clone(), Arc::new(properties));
        Ok(Self {
            file: file.map_err(failed)?,
            header: head.header,
            domains: Domains::default(),
            rows: Rows::default(),
            tokens: 0,
            ids: 0,
            batch: 0,
        })
    }

    /// The number of a domain's tag, for [`Token::domain`].
    ///
    /// # Errors
    ///
    /// As [`Domains::number`].
    pub fn domain(&mut self, name: &str) -> Result<u16> {
        self.domains.number(name)
    }

    /// Adds a token, as [`Trace::push`](crate::Trace::push) does.
    ///
    /// # Errors
    ///
    /// As there, or if the file cannot be written.
    pub fn push(&mut self, token: &Token, experts: &[u16], weights: &[f32]) -> Result<()> {
        let place = Place::Token(self.tokens);
        check_row(&self.header, experts, weights).map_err(|e| e.at(place))?;
        if token.batch < self.batch {
            return Err(Error::damaged(place, "its batch was before that of the last token"));
        }
        if usize::from(token.domain) >= self.domains.names().len() {
            return Err(Error::damaged(place, "its domain has no name"));
        }
        // What nobody could read again.
        self.ids += experts.len() as u64;
        Error::limit("tokens", self.tokens + 1, limits::TOKENS_MAX as u64)?;
        Error::limit("experts of all tokens", self.ids, limits::IDS_MAX as u64)?;
        self.batch = token.batch;
        self.tokens += 1;
        let mut begin = 0;
        for (index, layer) in self.header.layers.iter().enumerate() {
            let used = layer.used as usize;
            let row = &experts[begin..begin + used];
            let known = row.iter().position(|&expert| expert == NO_EXPERT).unwrap_or(used);
            if known > 0 {
                let weights = weights.get(begin..begin + known).unwrap_or_default();
                self.rows.push(token, index, &row[..known], weights);
            }
            begin += used;
        }
        if self.rows.layer.len() >= GROUP_ROWS || self.rows.experts.len() >= GROUP_IDS {
            self.flush()?;
        }
        Ok(())
    }

    /// Tokens so far.
    #[must_use]
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Writes what is left, and the end of the file.
    ///
    /// # Errors
    ///
    /// If it cannot be written.
    pub fn finish(mut self) -> Result<W> {
        self.flush()?;
        self.file.into_inner().map_err(failed)
    }

    fn flush(&mut self) -> Result<()> {
        if self.rows.layer.is_empty() {
            return Ok(());
        }
        let mut group = self.file.next_row_group().map_err(failed)?;
        self.rows.write(&mut group, self.domains.names()).map_err(failed)?;
        group.close().map_err(failed)?;
        self.rows.clear();
        Ok(())
    }
}

impl Rows {
    fn push(&mut self, token: &Token, layer: usize, experts: &[u16], weights: &[f32]) {
        self.prompt.push(token.prompt.cast_signed());
        self.domain.push(token.domain);
        self.phase.push(token.phase);
        self.batch.push(token.batch.cast_signed());
        self.position.push(token.position.cast_signed());
        self.token.extend(token.id.map(u32::cast_signed));
        self.token_levels.push(i16::from(token.id.is_some()));
        self.layer.push(layer as i32);
        let begin = |index| i16::from(index > 0);
        self.experts.extend(experts.iter().map(|&expert| i32::from(expert)));
        self.experts_begin.extend((0..experts.len()).map(begin));
        if weights.iter().all(|weight| weight.is_nan()) {
            self.weights_begin.push(0);
            self.weights_levels.push(0);
        } else {
            self.weights.extend_from_slice(weights);
            self.weights_begin.extend((0..weights.len()).map(begin));
            self.weights_levels.extend(weights.iter().map(|_| 2));
        }
    }

    fn write<W: Write + Send>(
        &self,
        group: &mut SerializedRowGroupWriter<'_, W>,
        domains: &[String],
    ) -> parquet::errors::Result<()> {
        let texts: Vec<ByteArray> = domains.iter().map(|name| name.as_str().into()).collect();
        let domain: Vec<ByteArray> =
            self.domain.iter().map(|&number| texts[usize::from(number)].clone()).collect();
        let names = [Phase::Prefill, Phase::Decode].map(|phase| ByteArray::from(phase.name()));
        let phase: Vec<ByteArray> =
            self.phase.iter().map(|&phase| names[phase as usize].clone()).collect();
        let levels = vec![1; self.experts.len()];
        ints(group, &self.prompt, None, None)?;
        texts_of(group, &domain)?;
        texts_of(group, &phase)?;
        ints(group, &self.batch, None, None)?;
        ints(group, &self.position, None, None)?;
        ints(group, &self.token, Some(&self.token_levels), None)?;
        ints(group, &self.layer, None, None)?;
        ints(group, &self.experts, Some(&levels), Some(&self.experts_begin))?;
        floats(group, &self.weights, &self.weights_levels, &self.weights_begin)
    }

    fn clear(&mut self) {
        self.prompt.clear();
        self.domain.clear();
        self.phase.clear();
        self.batch.clear();
        self.position.clear();
        self.token.clear();
        self.token_levels.clear();
        self.layer.clear();
        self.experts.clear();
        self.experts_begin.clear();
        self.weights.clear();
        self.weights_begin.clear();
        self.weights_levels.clear();
    }
}

fn ints<W: Write + Send>(
    group: &mut SerializedRowGroupWriter<'_, W>,
    values: &[i32],
    levels: Option<&[i16]>,
    begin: Option<&[i16]>,
) -> parquet::errors::Result<()> {
    let mut column = group.next_column()?.expect("a column for each of the schema");
    let ColumnWriter::Int32ColumnWriter(writer) = column.untyped() else {
        unreachable!("the schema has a whole number here");
    };
    writer.write_batch(values, levels, begin)?;
    column.close()
}

fn texts_of<W: Write + Send>(
    group: &mut SerializedRowGroupWriter<'_, W>,
    values: &[ByteArray],
) -> parquet::errors::Result<()> {
    let mut column = group.next_column()?.expect("a column for each of the schema");
    let ColumnWriter::ByteArrayColumnWriter(writer) = column.untyped() else {
        unreachable!("the schema has a text here");
    };
    writer.write_batch(values, None, None)?;
    column.close()
}

fn floats<W: Write + Send>(
    group: &mut SerializedRowGroupWriter<'_, W>,
    values: &[f32],
    levels: &[i16],
    begin: &[i16],
) -> parquet::errors::Result<()> {
    let mut column = group.next_column()?.expect("a column for each of the schema");
    let ColumnWriter::FloatColumnWriter(writer) = column.untyped() else {
        unreachable!("the schema has a number here");
    };
    writer.write_batch(values, Some(levels), Some(begin))?;
    column.close()
}

fn failed(error: ParquetError) -> Error {
    match error {
        ParquetError::External(source) => match source.downcast::<std::io::Error>() {
            Ok(source) => Error::Io(*source),
            Err(source) => Error::file(source),
        },
        error => Error::file(error),
    }
}

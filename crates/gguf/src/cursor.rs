//! Reads fields one after the other, never past the file's end and never allocating for bytes that
//! are not there.

use std::io::{self, Read};

use crate::Result;
use crate::error::{Error, ErrorKind};
use crate::limits::MAX_HEADER_BYTES;

/// Room set aside before the bytes of a long field have arrived; beyond it, buffers grow as they
/// fill.
const FIRST_ALLOCATION_BYTES: usize = 64 << 10;

pub(crate) struct Cursor<R> {
    reader: R,
    pos: u64,
    len: u64,
}

impl<R: Read> Cursor<R> {
    /// Reads from `reader`, which stands at byte 0 of a file of `len` bytes.
    pub(crate) fn new(reader: R, len: u64) -> Self {
        Self { reader, pos: 0, len }
    }

    /// The byte of the file that is read next.
    pub(crate) fn pos(&self) -> u64 {
        self.pos
    }

    /// Makes sure that `count` items of at least `item_bytes` each can still follow.
    pub(crate) fn expect(&self, count: u64, item_bytes: u64, what: &'static str) -> Result<()> {
        let needs = count.saturating_mul(item_bytes);
        let has = self.len - self.pos;
        if needs > has {
            return Err(Error::from(ErrorKind::HeaderTruncated { what, needs, has }).at(self.pos));
        }
        let end = self.pos.saturating_add(needs);
        if end > MAX_HEADER_BYTES {
            let kind = ErrorKind::Limit {
                what: "the header's length in bytes",
                value: end,
                limit: MAX_HEADER_BYTES,
            };
            return Err(Error::from(kind).at(self.pos));
        }
        Ok(())
    }

    /// The next `N` bytes.
    pub(crate) fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N]> {
        self.expect(N as u64, 1, what)?;
        let mut bytes = [0; N];
        self.reader.read_exact(&mut bytes).map_err(|source| self.failed(source))?;
        self.pos += N as u64;
        Ok(bytes)
    }

    pub(crate) fn u32(&mut self, what: &'static str) -> Result<u32> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self, what: &'static str) -> Result<u64> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// Appends the next `count` bytes to `into`.
    pub(crate) fn append(
        &mut self,
        count: u64,
        into: &mut Vec<u8>,
        what: &'static str,
    ) -> Result<()> {
        self.expect(count, 1, what)?;
        // `expect` bounds `count` by MAX_HEADER_BYTES, so it fits a usize everywhere.
        into.reserve((count as usize).min(FIRST_ALLOCATION_BYTES));
        let read = self
            .reader
            .by_ref()
            .take(count)
            .read_to_end(into)
            .map_err(|source| self.failed(source))?;
        if read as u64 != count {
            return Err(self.failed(io::ErrorKind::UnexpectedEof.into()));
        }
        self.pos += count;
        Ok(())
    }

    /// The next `count` items of `N` bytes each.
    pub(crate) fn items<T, const N: usize>(
        &mut self,
        count: u64,
        what: &'static str,
        mut decode: impl FnMut([u8; N]) -> Result<T>,
    ) -> Result<Vec<T>> {
        self.expect(count, N as u64, what)?;
        let mut items = Vec::with_capacity((count as usize).min(FIRST_ALLOCATION_BYTES / N));
        for _ in 0..count {
            let at = self.pos;
            items.push(decode(self.array(what)?).map_err(|error| error.at(at))?);
        }
        Ok(items)
    }

    fn failed(&self, source: io::Error) -> Error {
        Error::io("read the header", source).at(self.pos)
    }
}

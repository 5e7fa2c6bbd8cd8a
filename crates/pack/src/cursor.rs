//! Fields of a section that is in memory, one after the other, and never past its end.

use crate::format::Broken;

/// What is left of a section.
pub(crate) struct Cursor<'a> {
    left: &'a [u8],
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(section: &'a [u8]) -> Self {
        Self { left: section }
    }

    /// The next `len` bytes.
    pub(crate) fn bytes(&mut self, len: u64) -> Result<&'a [u8], Broken> {
        let len = usize::try_from(len).ok().filter(|len| *len <= self.left.len());
        let (bytes, left) = self.left.split_at(len.ok_or(Broken("the index ends too early"))?);
        self.left = left;
        Ok(bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, Broken> {
        let bytes = self.bytes(4)?;
        Ok(u32::from_le_bytes(bytes.try_into().expect("four bytes")))
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Broken> {
        let bytes = self.bytes(8)?;
        Ok(u64::from_le_bytes(bytes.try_into().expect("eight bytes")))
    }

    /// A count of items that take at least `item_bytes` each in what is left.
    pub(crate) fn count(&mut self, item_bytes: usize) -> Result<usize, Broken> {
        let count = self.u32()? as usize;
        match count.checked_mul(item_bytes) {
            Some(bytes) if bytes <= self.left.len() => Ok(count),
            _ => Err(Broken("the index ends before the items that it counts")),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.left.is_empty()
    }
}

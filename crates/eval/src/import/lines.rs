//! Lines of a text, with their numbers, none of them endless.

use std::io::{BufRead, Read};

use crate::error::{Error, Place, Result};
use crate::limits::LINE_BYTES_MAX;

/// Lines that are not blank.
pub(super) struct Lines<R> {
    reader: R,
    line: String,
    number: u64,
}

impl<R: BufRead> Lines<R> {
    pub(super) fn new(reader: R) -> Self {
        Self { reader, line: String::new(), number: 0 }
    }

    /// The next line and its number, from 1; None at the end.
    pub(super) fn next(&mut self) -> Result<Option<(u64, &str)>> {
        loop {
            self.line.clear();
            self.number += 1;
            let limit = LINE_BYTES_MAX as u64 + 1;
            let read = self.reader.by_ref().take(limit).read_line(&mut self.line);
            let read = read.map_err(|error| match error.kind() {
                std::io::ErrorKind::InvalidData => {
                    Error::damaged(Place::Line(self.number), "it is not UTF-8")
                }
                _ => Error::Io(error),
            })?;
            if read > LINE_BYTES_MAX {
                let reason = format!("it is longer than {LINE_BYTES_MAX} bytes");
                return Err(Error::damaged(Place::Line(self.number), reason));
            }
            if read == 0 {
                return Ok(None);
            }
            if !self.line.trim().is_empty() {
                return Ok(Some((self.number, self.line.trim())));
            }
        }
    }
}

//! Page-aligned memory of one's own, for reads that land where their bytes stay.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::map::Map;
use crate::ring::PAGE;

/// Bytes whose first is aligned to [`PAGE`], and to a huge page from 2 MiB on. Zeros at first.
///
/// All of it is allocated at once. Physical memory comes page by page, when it is first written.
pub struct Pages {
    map: Map,
}

impl Pages {
    /// Maps at least `bytes`, rounded up to whole pages, of which there is at least one.
    ///
    /// # Errors
    /// [`Error::Memory`].
    pub fn new(bytes: usize) -> Result<Self> {
        let rounded = bytes.max(1).checked_next_multiple_of(PAGE);
        let map = rounded.ok_or(rustix::io::Errno::NOMEM).and_then(Map::new);
        let map = map.map_err(|errno| Error::Memory { bytes, source: Arc::new(errno.into()) })?;
        Ok(Self { map })
    }

    /// What is to be read to them is not to meet a fork.
    pub(crate) fn begin_reads(&self) {
        self.map.withhold_from_forks();
    }

    /// No read goes to them any more.
    pub(crate) fn end_reads(&self) {
        self.map.allow_forks();
    }

    /// First byte, for those who have agreed on who writes where.
    pub(crate) fn base(&self) -> NonNull<u8> {
        self.map.base()
    }

    /// Size in bytes, a multiple of [`PAGE`].
    pub(crate) fn bytes(&self) -> usize {
        self.map.bytes()
    }
}

impl Deref for Pages {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: mapped and initialised until drop; whoever could write to them without a borrow
        // (`Landing`) owns them meanwhile and lends them to nobody.
        unsafe { std::slice::from_raw_parts(self.map.base().as_ptr(), self.map.bytes()) }
    }
}

impl DerefMut for Pages {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `&mut self` excludes every other access.
        unsafe { std::slice::from_raw_parts_mut(self.map.base().as_ptr(), self.map.bytes()) }
    }
}

impl fmt::Debug for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pages({} bytes)", self.bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_aligned_zeroed_and_writable() {
        for (asked, got) in [(0, PAGE), (1, PAGE), (PAGE, PAGE), (3 * PAGE + 1, 4 * PAGE)] {
            let mut pages = Pages::new(asked).unwrap();
            assert_eq!(pages.len(), got);
            assert!(pages.as_ptr().addr().is_multiple_of(PAGE));
            assert!(pages.iter().all(|byte| *byte == 0));
            pages.fill(7);
            assert!(pages.iter().all(|byte| *byte == 7));
        }
        let large = Pages::new(5 << 20).unwrap();
        assert!(large.as_ptr().addr().is_multiple_of(2 << 20));
    }

    #[test]
    fn what_no_machine_has_is_an_error() {
        for bytes in [usize::MAX, usize::MAX - PAGE, 1 << 62] {
            let error = Pages::new(bytes).unwrap_err();
            assert!(matches!(error, Error::Memory { bytes: b, .. } if b == bytes), "{error:?}");
        }
    }
}

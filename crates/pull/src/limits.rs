//! Upper bounds on what a server may send, each with its reason.

/// Bytes of the answer that lists a repository. The longest names are some hundred bytes, and the hub
/// advises against more than 100,000 files.
pub const MAX_LISTING_BYTES: u64 = 32 << 20;

/// Files of a repository.
pub const MAX_FILES: usize = 200_000;

/// Bytes of a file's name below its repository.
pub const MAX_PATH_BYTES: usize = 1024;

/// Bytes of one part of such a name: what file systems take.
pub const MAX_PATH_PART_BYTES: usize = 255;

/// Bytes of a file: more than any drive has.
pub const MAX_FILE_BYTES: u64 = 1 << 50;

/// Redirects before an answer.
pub const MAX_REDIRECTS: usize = 8;

/// Seconds that a server may ask to wait before the next try.
pub const MAX_RETRY_AFTER_S: u64 = 300;

/// Bytes of the record of what is there of a file. Ranges that touch are one, so that there are about as
/// many as connections.
pub(crate) const MAX_RECORD_BYTES: u64 = 1 << 20;

/// Bytes of an answer's headers. The addresses that files are redirected to have thousands.
pub(crate) const MAX_HEADER_BYTES: usize = 128 << 10;

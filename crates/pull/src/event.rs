//! What a pull tells while it runs.

use std::time::Duration;

/// Who is told how a pull gets on. It is called on the thread that pulls, which waits for it.
pub trait Observer {
    /// Something happened.
    fn report(&self, event: Event<'_>);
}

/// One that looks at nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Quiet;

impl Observer for Quiet {
    fn report(&self, _: Event<'_>) {}
}

/// What happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event<'a> {
    /// The hub is asked what the repository has.
    Asking,
    /// Another program fetches this file: it is waited for.
    Waiting(&'a str),
    /// How far the files are; about ten times a second, and once when all bytes are there.
    Fetching(&'a [FileState]),
    /// A request failed, and is made again after a time.
    Retrying {
        /// What happened.
        why: &'a str,
        /// The time.
        wait: Duration,
    },
    /// All bytes of this file are there, and its SHA-256 is compared.
    Checking(&'a FileState),
    /// All files are whole, and get their names.
    Linking,
}

/// A file, and how much of it is there.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct FileState {
    /// Its name below the repository.
    pub path: String,
    /// Its SHA-256, 64 digits.
    pub sha256: String,
    /// Its bytes.
    pub bytes: u64,
    /// Those that are there.
    pub done_bytes: u64,
}

//! A file that is not whole, and the record beside it of what there is.
//!
//! `huggingface_hub` takes `<etag>.incomplete` for a file of which the first bytes are there, as many as it
//! is long, and goes on behind them. This one has bytes in several places, and another name.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::cache::{Repo, replace, sync_folder};
use crate::error::{Error, Result};
use crate::hub::Remote;
use crate::limits;
use crate::ranges::Ranges;

/// What the names of the file and of the record have behind the blob's.
const PARTIAL: &str = ".tierstream.incomplete";
const RECORD: &str = ".tierstream.json";

/// The version of the record.
const VERSION: u32 = 1;

#[derive(Debug)]
pub(crate) struct Partial {
    file: File,
    path: PathBuf,
    record: PathBuf,
    blob: PathBuf,
    bytes: u64,
}

/// What there is of a file: only what is on the drive.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    version: u32,
    bytes: u64,
    done: Vec<[u64; 2]>,
}

impl Partial {
    /// The file, and what there is of it; all the rest of it is a hole.
    pub(crate) fn open(repo: &Repo, remote: &Remote) -> Result<(Self, Ranges)> {
        let blob = repo.blob(&remote.sha256);
        let (path, record) = (beside(&blob, PARTIAL), beside(&blob, RECORD));
        let options =
            File::options().create(true).truncate(false).read(true).write(true).open(&path);
        let file = options.map_err(Error::io(&path))?;
        let bytes = remote.bytes;
        let partial = Self { file, path, record, blob, bytes };
        let done = partial.recorded();
        if done.is_none() {
            partial.reset().map_err(Error::io(&partial.path))?;
        }
        Ok((partial, done.unwrap_or_default()))
    }

    /// Removes what is left of one whose blob another program has brought meanwhile.
    pub(crate) fn clear(repo: &Repo, etag: &str) -> io::Result<()> {
        let blob = repo.blob(etag);
        remove(&beside(&blob, RECORD)).and_then(|()| remove(&beside(&blob, PARTIAL)))
    }

    /// What is recorded, if that is about this file.
    fn recorded(&self) -> Option<Ranges> {
        if self.file.metadata().ok()?.len() != self.bytes {
            return None;
        }
        let is_small = |len: u64| len <= limits::MAX_RECORD_BYTES;
        fs::metadata(&self.record).ok().filter(|file| is_small(file.len()))?;
        let record: Record = serde_json::from_slice(&fs::read(&self.record).ok()?).ok()?;
        let is_ours = record.version == VERSION && record.bytes == self.bytes;
        Ranges::of_pairs(&record.done, self.bytes).filter(|_| is_ours)
    }

    /// Nothing is there. The record goes first, and for good: it would be about other bytes.
    fn reset(&self) -> io::Result<()> {
        remove(&self.record)?;
        sync_folder(&self.record)?;
        self.file.set_len(0)?;
        self.file.set_len(self.bytes)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn write(&self, bytes: &[u8], at: u64) -> Result<()> {
        self.file.write_all_at(bytes, at).map_err(Error::io(&self.path))
    }

    pub(crate) fn read(&self, bytes: &mut [u8], at: u64) -> Result<()> {
        self.file.read_exact_at(bytes, at).map_err(Error::io(&self.path))
    }

    /// Records what has been written, once it is on the drive.
    pub(crate) fn record(&self, done: &Ranges) -> Result<()> {
        let write = || {
            self.file.sync_data()?;
            let record = Record { version: VERSION, bytes: self.bytes, done: done.pairs() };
            replace(&self.record, &serde_json::to_vec(&record)?)
        };
        write().map_err(Error::io(&self.record))
    }

    /// It is whole, and right.
    pub(crate) fn finish(&self) -> Result<()> {
        let finish = || {
            self.file.sync_all()?;
            fs::rename(&self.path, &self.blob)?;
            sync_folder(&self.blob)?;
            remove(&self.record)
        };
        finish().map_err(Error::io(&self.blob))
    }

    /// It is not right.
    pub(crate) fn discard(&self) -> Result<()> {
        let discard = || remove(&self.record).and_then(|()| remove(&self.path));
        discard().map_err(Error::io(&self.path))
    }
}

fn beside(blob: &Path, ending: &str) -> PathBuf {
    let mut name = blob.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use tierstream_store::HubName;

    use super::*;

    fn remote(bytes: u64) -> Remote {
        let uri = "http://localhost/".parse().unwrap();
        Remote { path: "m.gguf".into(), uri, sha256: "ab".repeat(32), bytes }
    }

    fn repo(dir: &Path) -> Repo {
        Repo::create(dir, &HubName::parse("o/r").unwrap()).unwrap()
    }

    fn ranges(pairs: &[[u64; 2]]) -> Ranges {
        Ranges::of_pairs(pairs, u64::MAX).unwrap()
    }

    #[test]
    fn what_was_recorded_is_there_again() {
        let dir = tempfile::tempdir().unwrap();
        let repo = repo(dir.path());
        let (partial, done) = Partial::open(&repo, &remote(100)).unwrap();
        assert_eq!(done, Ranges::default());
        partial.write(&[7; 10], 20).unwrap();
        partial.record(&ranges(&[[20, 30]])).unwrap();
        // Without a record, it would be lost.
        partial.write(&[8; 10], 50).unwrap();
        drop(partial);
        let (partial, done) = Partial::open(&repo, &remote(100)).unwrap();
        assert_eq!(done, ranges(&[[20, 30]]));
        let mut bytes = [0; 10];
        partial.read(&mut bytes, 20).unwrap();
        assert_eq!(bytes, [7; 10]);
    }

    #[test]
    fn a_record_of_other_bytes_counts_for_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let repo = repo(dir.path());
        let begin = || {
            let (partial, _) = Partial::open(&repo, &remote(100)).unwrap();
            partial.record(&ranges(&[[0, 50]])).unwrap();
            partial
        };
        let opened = |bytes| Partial::open(&repo, &remote(bytes)).unwrap().1;
        begin();
        assert_eq!(opened(100), ranges(&[[0, 50]]));
        // Another size.
        assert_eq!(opened(101), Ranges::default());
        // The bytes are gone, and the record stayed.
        fs::remove_file(begin().path()).unwrap();
        assert_eq!(opened(100), Ranges::default());
        assert_eq!(opened(100), Ranges::default());
        // Damaged records.
        for text in ["", "{}", r#"{"version":2,"bytes":100,"done":[[0,50]]}"#, "[[0,50]]"] {
            fs::write(&begin().record, text).unwrap();
            assert_eq!(opened(100), Ranges::default(), "{text}");
        }
        for done in ["[[0,101]]", "[[5,5]]", "[[0,5],[5,9]]", "[[6,9],[0,5]]"] {
            let text = format!(r#"{{"version":1,"bytes":100,"done":{done}}}"#);
            fs::write(&begin().record, text).unwrap();
            assert_eq!(opened(100), Ranges::default(), "{done}");
        }
    }

    #[test]
    fn the_end_leaves_the_blob_alone() {
        let dir = tempfile::tempdir().unwrap();
        let repo = repo(dir.path());
        let names = || {
            let all = fs::read_dir(dir.path().join("models--o--r/blobs")).unwrap();
            all.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect::<Vec<_>>()
        };
        let (partial, _) = Partial::open(&repo, &remote(3)).unwrap();
        partial.record(&ranges(&[[0, 3]])).unwrap();
        partial.discard().unwrap();
        assert_eq!(names(), [""; 0]);
        let (partial, _) = Partial::open(&repo, &remote(3)).unwrap();
        partial.record(&ranges(&[[0, 3]])).unwrap();
        partial.finish().unwrap();
        assert_eq!(names(), ["ab".repeat(32)]);
        assert!(repo.has(&"ab".repeat(32), 3) && !repo.has(&"ab".repeat(32), 4));
    }
}

//! Where a repository's files are in the cache, by the rules of `huggingface_hub`: `blobs/<etag>`,
//! `snapshots/<commit>/<path>` that link to them, `refs/<revision>` that names a commit, and
//! `.locks/models--owner--repo/<etag>.lock`, which is held while a blob is fetched.

use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tierstream_store::HubName;

use crate::cancel::Cancel;
use crate::error::{Error, Result};
use crate::hub::REVISION;

/// How often is looked whether another program has given up a lock.
const LOCK_INTERVAL: Duration = Duration::from_millis(200);

/// A repository in the cache.
#[derive(Debug, Clone)]
pub(crate) struct Repo {
    pub(crate) folder: PathBuf,
    locks: PathBuf,
}

impl Repo {
    /// Makes its folders.
    pub(crate) fn create(cache: &Path, name: &HubName) -> Result<Self> {
        let own = format!("models--{}--{}", name.owner(), name.repo());
        let (folder, locks) = (cache.join(&own), cache.join(".locks").join(&own));
        for folder in [&folder.join("blobs"), &folder.join("refs"), &locks] {
            fs::create_dir_all(folder).map_err(Error::io(folder))?;
        }
        Ok(Self { folder, locks })
    }

    pub(crate) fn blob(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(etag)
    }

    /// Whether a blob is there as a whole.
    pub(crate) fn has(&self, etag: &str, bytes: u64) -> bool {
        fs::metadata(self.blob(etag)).is_ok_and(|file| file.is_file() && file.len() == bytes)
    }

    /// The lock on a blob; `waiting` is called once if another program has it.
    pub(crate) fn lock(&self, etag: &str, cancel: &Cancel, waiting: &dyn Fn()) -> Result<Lock> {
        let path = self.locks.join(format!("{etag}.lock"));
        let options = File::options().create(true).truncate(false).write(true).open(&path);
        let file = options.map_err(Error::io(&path))?;
        let mut has_waited = false;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Lock(file)),
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(error)) => return Err(Error::io(&path)(error)),
            }
            if !std::mem::replace(&mut has_waited, true) {
                waiting();
            }
            if cancel.wait(LOCK_INTERVAL) {
                return Err(Error::Cancelled);
            }
        }
    }

    /// Has a file of a commit's snapshot be a blob.
    pub(crate) fn link(&self, commit: &str, path: &str, etag: &str) -> Result<()> {
        let link = self.folder.join("snapshots").join(commit).join(path);
        let up = "../".repeat(2 + path.matches('/').count());
        let target = PathBuf::from(format!("{up}blobs/{etag}"));
        if fs::read_link(&link).is_ok_and(|old| old == target) {
            return Ok(());
        }
        let folder = link.parent().unwrap_or(&self.folder);
        fs::create_dir_all(folder).map_err(Error::io(folder))?;
        let new = folder.join(format!(".{etag}.link"));
        let _ = fs::remove_file(&new);
        std::os::unix::fs::symlink(&target, &new).map_err(Error::io(&new))?;
        fs::rename(&new, &link).map_err(Error::io(&link))
    }

    /// Has the revision be this commit.
    pub(crate) fn refer(&self, commit: &str) -> Result<()> {
        let path = self.folder.join("refs").join(REVISION);
        if fs::read(&path).is_ok_and(|old| old == commit.as_bytes()) {
            return Ok(());
        }
        replace(&path, commit.as_bytes()).map_err(Error::io(&path))
    }
}

/// A lock on a blob, as long as it lives.
#[derive(Debug)]
pub(crate) struct Lock(#[allow(dead_code, reason = "it is held")] File);

/// Has `path` be a file of these bytes: the old one, or the new one, whatever happens meanwhile.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let mut file = File::create(&new)?;
    file.write_all(bytes)?;
    file.sync_data()?;
    fs::rename(&new, path)
}

/// Has what happened in the folder of `path` be on the drive.
pub(crate) fn sync_folder(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all())
}

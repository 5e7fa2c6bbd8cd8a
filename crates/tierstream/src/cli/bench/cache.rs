//! The page cache before a measurement: emptied, or filled.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::PathBuf;

use anyhow::Context;
use serde::Serialize;
use tierstream::io::cache::{cached_bytes, evict};

use crate::cli::output;

/// What may be left of files in a cache that counts as cold, or may lack in one that counts as warm:
/// this share of them.
const TOLERANCE: f64 = 0.01;

/// What the page cache has of the files that a measurement reads, when it begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum State {
    Cold,
    Warm,
    /// Neither: some of them.
    Partly,
}

/// How it gets cold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) enum Emptied {
    /// All of the machine's, by `/proc/sys/vm/drop_caches`.
    #[serde(rename = "drop_caches")]
    DropCaches,
    /// The files alone, with posix_fadvise(2).
    #[serde(rename = "fadvise")]
    Fadvise,
}

/// Empties the page cache.
pub(super) fn drop_all() -> anyhow::Result<()> {
    drop_caches().context("--cold empties the page cache, as root")
}

fn drop_caches() -> io::Result<()> {
    rustix::fs::sync();
    fs::write("/proc/sys/vm/drop_caches", "3")
}

/// Brings files into the cache, or out of it, and looks whether that has worked. Says once what has
/// not.
#[derive(Debug, Default)]
pub(super) struct Caches {
    pub(super) emptied: Option<Emptied>,
    told: bool,
}

impl Caches {
    /// Takes `files` out of the cache.
    pub(super) fn empty(&mut self, files: &[PathBuf]) -> anyhow::Result<State> {
        if self.emptied != Some(Emptied::Fadvise) {
            self.emptied = Some(match drop_caches() {
                Ok(()) => Emptied::DropCaches,
                Err(error) => {
                    output::note(format!(
                        "the page cache cannot be emptied ({error}): only what is read is evicted from it"
                    ));
                    Emptied::Fadvise
                }
            });
        }
        if self.emptied == Some(Emptied::Fadvise) {
            each(files, evict)?;
        }
        let share = cached_share(files)?;
        if share <= TOLERANCE {
            return Ok(State::Cold);
        }
        self.tell(share, "the figures are NOT COLD: the page cache keeps");
        Ok(State::Partly)
    }

    /// Reads `files` once, so that they are in the cache.
    pub(super) fn fill(&mut self, files: &[PathBuf]) -> anyhow::Result<State> {
        let mut buffer = vec![0; 1 << 20];
        each(files, |file| {
            let mut file = file;
            while file.read(&mut buffer)? > 0 {}
            Ok(())
        })?;
        let share = cached_share(files)?;
        if share >= 1.0 - TOLERANCE {
            return Ok(State::Warm);
        }
        self.tell(share, "the figures are NOT WARM: the page cache holds no more than");
        Ok(State::Partly)
    }

    fn tell(&mut self, share: f64, what: &str) {
        if !std::mem::replace(&mut self.told, true) {
            output::note(format!("{what} {:.0} % of what is read", share * 100.0));
        }
    }
}

/// The share of `files` that is in the cache, 0 to 1.
pub(super) fn cached_share(files: &[PathBuf]) -> anyhow::Result<f64> {
    let (mut cached, mut all) = (0, 0);
    each(files, |file| {
        cached += cached_bytes(file)?;
        all += file.metadata()?.len();
        Ok(())
    })?;
    Ok(cached as f64 / (all as f64).max(1.0))
}

fn each(files: &[PathBuf], mut act: impl FnMut(&File) -> io::Result<()>) -> anyhow::Result<()> {
    for path in files {
        let failed = || format!("cannot tell what the page cache has of {}", path.display());
        File::open(path).and_then(|file| act(&file)).with_context(failed)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_warm_once_they_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let files: Vec<PathBuf> = ["a", "b"].iter().map(|name| dir.path().join(name)).collect();
        files.iter().for_each(|path| fs::write(path, vec![1; 100_000]).unwrap());
        assert_eq!(Caches::default().fill(&files).unwrap(), State::Warm);
        assert_eq!(cached_share(&files).unwrap(), 1.0);
        assert_eq!(cached_share(&[]).unwrap(), 0.0);
        let missing = [dir.path().join("missing")];
        let error = format!("{:#}", Caches::default().fill(&missing).unwrap_err());
        assert!(error.contains("missing: No such file"), "{error}");
    }
}

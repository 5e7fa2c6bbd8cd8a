//! What is remembered of a drive from one start to the next: a small file in the cache folder.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::gpu::GpuProbe;
use super::probe::Probe;
use crate::machine::{self, Filesystem};

/// Of the file's fields; another one is not read.
const VERSION: u32 = 1;

/// What was measured longer ago than this is measured again.
const AGE_MAX_S: u64 = 30 * 24 * 60 * 60;

/// Which drive, as its filesystem, and which kernel reads it. What was measured of another one does not
/// count.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Identity {
    /// Of the filesystem (statvfs(3)).
    id: u64,
    kind: String,
    source: String,
    kernel: String,
}

impl Identity {
    /// Of the drive that the file at `path` lies on, which is a part of `filesystem`.
    pub(crate) fn of(path: &Path, filesystem: Option<&Filesystem>) -> Option<Self> {
        let Filesystem { kind, source, .. } = filesystem?.clone();
        let id = rustix::fs::statvfs(path).ok()?.f_fsid;
        Some(Self { id, kind, source, kernel: machine::kernel()? })
    }

    fn path(&self, dir: &Path) -> PathBuf {
        // Some kinds have no ids: all of them are 0.
        let mut hasher = DefaultHasher::new();
        (self.id, &self.kind, &self.source).hash(&mut hasher);
        dir.join(format!("drive-{:016x}.json", hasher.finish()))
    }
}

/// Something, and when it was measured: seconds since 1970.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Dated<T> {
    at_s: u64,
    value: T,
}

impl<T> Dated<T> {
    fn now(value: T) -> Option<Self> {
        Some(Self { at_s: now_s(), value })
    }

    /// Neither too old nor of a time to come.
    fn is_fresh(&self, now_s: u64) -> bool {
        now_s.checked_sub(self.at_s).is_some_and(|age| age <= AGE_MAX_S)
    }
}

/// What is known of a drive.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Known {
    version: u32,
    drive: Identity,
    probe: Option<Dated<Probe>>,
    /// Of the way to a GPU.
    #[serde(default)]
    gpu_probe: Option<Dated<GpuProbe>>,
    /// 1e9 bytes per second.
    limit_gbps: Option<Dated<f64>>,
}

impl Known {
    /// What is remembered of `drive` in `dir`: nothing if the file there is missing, damaged, too old, of
    /// another version or another drive.
    pub(crate) fn load(dir: &Path, drive: Identity) -> Self {
        Self::load_at(dir, drive, now_s())
    }

    fn load_at(dir: &Path, drive: Identity, now_s: u64) -> Self {
        let read = fs::read(drive.path(dir)).ok();
        let known: Option<Self> = read.and_then(|bytes| serde_json::from_slice(&bytes).ok());
        match known.filter(|known| known.version == VERSION && known.drive == drive) {
            Some(known) => Self {
                probe: known.probe.filter(|probe| probe.is_fresh(now_s)),
                gpu_probe: known.gpu_probe.filter(|probe| probe.is_fresh(now_s)),
                limit_gbps: known.limit_gbps.filter(|limit| limit.is_fresh(now_s)),
                ..known
            },
            None => {
                let (version, probe, gpu_probe, limit_gbps) = (VERSION, None, None, None);
                Self { version, drive, probe, gpu_probe, limit_gbps }
            }
        }
    }

    /// Writes it to `dir`, which is made if it is not there: whoever reads meanwhile finds the old file or
    /// the new one.
    ///
    /// # Errors
    /// What the system says.
    pub(crate) fn save(&self, dir: &Path) -> io::Result<()> {
        fs::create_dir_all(dir)?;
        let path = self.drive.path(dir);
        let new = path.with_extension(format!("{}.new", std::process::id()));
        let written = fs::write(&new, serde_json::to_vec_pretty(self)?);
        written.and_then(|()| fs::rename(&new, &path)).inspect_err(|_| {
            let _ = fs::remove_file(&new);
        })
    }

    /// The measurement of both ways.
    pub(crate) fn probe(&self) -> Option<&Probe> {
        self.probe.as_ref().map(|probe| &probe.value)
    }

    pub(crate) fn set_probe(&mut self, probe: Probe) {
        self.probe = Dated::now(probe);
    }

    /// The measurement of both ways to a GPU.
    pub(crate) fn gpu_probe(&self) -> Option<&GpuProbe> {
        self.gpu_probe.as_ref().map(|probe| &probe.value)
    }

    pub(crate) fn set_gpu_probe(&mut self, probe: GpuProbe) {
        self.gpu_probe = Dated::now(probe);
    }

    /// The most that the drive is known to deliver, 1e9 bytes per second: by `doctor` and earlier loads, or
    /// else by the short measurement of both ways.
    pub(crate) fn limit_gbps(&self) -> Option<f64> {
        let probed = || self.probe().map(|p| p.direct_gbps.max(p.cached_gbps));
        self.limit_gbps.as_ref().map(|limit| limit.value).or_else(probed)
    }

    /// The drive was measured for long enough to believe it.
    pub(crate) fn set_limit(&mut self, gbps: f64) {
        self.limit_gbps = Dated::now(gbps);
    }

    /// The drive has delivered as much as this. Says whether that is news.
    pub(crate) fn raise_limit(&mut self, gbps: f64) -> bool {
        let news = self.limit_gbps.as_ref().is_none_or(|limit| limit.value < gbps);
        if news {
            self.set_limit(gbps);
        }
        news
    }
}

fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        Identity {
            id: 0x1234,
            kind: "btrfs".into(),
            source: "/dev/nvme0n1p2".into(),
            kernel: "6.18.0".into(),
        }
    }

    fn full() -> Known {
        let mut known = Known::load(Path::new("/nowhere"), identity());
        known.set_probe(Probe {
            direct_gbps: 1.5,
            cached_gbps: 3.0,
            ratio: 2.0,
            rounds: 12,
            rounds_won: 11,
            bypasses: Some(true),
            bytes: 48 << 20,
            seconds: 0.1,
        });
        known.set_gpu_probe(GpuProbe {
            of: "a GPU".into(),
            cufile_gbps: 6.0,
            ring_gbps: 5.0,
            ratio: 1.2,
            rounds: 8,
            rounds_won: 8,
            refused: None,
        });
        known.set_limit(2.5);
        known
    }

    #[test]
    fn it_is_read_as_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("deep/er");
        full().save(&dir).unwrap();
        assert_eq!(Known::load(&dir, identity()), full());
        // No other file is left.
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);
    }

    #[test]
    fn what_is_not_of_this_drive_is_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let empty = |known: &Known| {
            known.probe.is_none() && known.gpu_probe.is_none() && known.limit_gbps.is_none()
        };
        assert!(empty(&Known::load(dir, identity())));
        full().save(dir).unwrap();
        let other = |change: fn(&mut Identity)| {
            let mut identity = identity();
            change(&mut identity);
            Known::load(dir, identity)
        };
        assert!(empty(&other(|drive| drive.id += 1)));
        assert!(empty(&other(|drive| drive.kind = "ext4".into())));
        assert!(empty(&other(|drive| drive.source = "/dev/sda".into())));
        assert!(empty(&other(|drive| drive.kernel = "6.19.0".into())));
        assert!(!empty(&other(|_| {})));

        let path = identity().path(dir);
        let text = fs::read_to_string(&path).unwrap();
        let damages = [
            String::new(),
            text[..text.len() / 2].to_owned(),
            text.replace("\"version\": 1", "\"version\": 2"),
            text.replace("1.5", "\"fast\""),
            "null".to_owned(),
            "\0\u{1}".to_owned(),
        ];
        for damaged in damages {
            assert_ne!(damaged, text);
            fs::write(&path, &damaged).unwrap();
            assert!(empty(&Known::load(dir, identity())), "{damaged}");
        }
        // And is written anew.
        full().save(dir).unwrap();
        assert_eq!(Known::load(dir, identity()), full());
    }

    #[test]
    fn what_is_old_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let mut known = full();
        known.probe.as_mut().unwrap().at_s = 1_000_000;
        known.gpu_probe.as_mut().unwrap().at_s = 1_000_000;
        known.limit_gbps.as_mut().unwrap().at_s = 1_000_100;
        known.save(dir.path()).unwrap();
        let at = |now_s| {
            let known = Known::load_at(dir.path(), identity(), now_s);
            assert_eq!(known.probe.is_some(), known.gpu_probe.is_some());
            (known.probe.is_some(), known.limit_gbps.is_some())
        };
        assert_eq!(at(1_000_100), (true, true));
        assert_eq!(at(1_000_000 + AGE_MAX_S), (true, true));
        assert_eq!(at(1_000_001 + AGE_MAX_S), (false, true));
        assert_eq!(at(1_000_101 + AGE_MAX_S), (false, false));
        // A clock that was wrong.
        assert_eq!(at(1_000_050), (true, false));
        assert_eq!(at(0), (false, false));
    }

    #[test]
    fn limits_rise_with_what_was_seen() {
        let mut known = full();
        assert!(!known.raise_limit(2.0));
        assert_eq!(known.limit_gbps(), Some(2.5));
        assert!(known.raise_limit(2.6));
        assert_eq!(known.limit_gbps(), Some(2.6));
        known.set_limit(2.0);
        assert_eq!(known.limit_gbps(), Some(2.0));
        known.limit_gbps = None;
        assert_eq!(known.limit_gbps(), Some(3.0));
        known.probe = None;
        assert_eq!(known.limit_gbps(), None);
    }

    #[test]
    fn a_folder_that_takes_nothing_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(full().save(&file).is_err());
    }
}

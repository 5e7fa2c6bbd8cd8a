//! Past the page cache or through it: which way the files of a drive are read.

use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::Serialize;
use tierstream_io::{Config, EngineKind, File};

use super::gpu::GpuReads;
use super::known::{Identity, Known};
use super::probe::{Probe, probe};
use crate::machine::Filesystem;

/// Filesystems on a block device whose direct reads are the drive's own: nothing to measure.
const DIRECT_IS_BEST: &[&str] = &["ext2", "ext3", "ext4", "f2fs", "xfs"];

/// Filesystems in memory: there is no drive to read from.
const IN_MEMORY: &[&str] = &["ramfs", "tmpfs"];

/// How much faster reads through the page cache have to be, because they take memory and processor time
/// from others, and because a short measurement is a rough one.
const MARGIN: f64 = 1.25;

/// In how many rounds of four they have to be faster: others may use the drive meanwhile.
const ROUNDS_OF_FOUR: u32 = 3;

/// A measurement of fewer rounds is a guess.
const ROUNDS_MIN: u32 = 4;

/// How files are read, as a user asks for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Io {
    /// The faster way, for each drive.
    #[default]
    Auto,
    /// Past the page cache, with io_uring if there is one.
    Direct,
    /// Through the page cache, and what is read stays there.
    Buffered,
    /// Past the page cache, with io_uring.
    Uring,
    /// Past the page cache, with threads.
    Pread,
    /// Past the page cache, and to a GPU past host memory too: by cuFile (GPUDirect Storage).
    Cufile,
}

impl Io {
    /// Every value.
    pub const ALL: [Self; 6] =
        [Self::Auto, Self::Direct, Self::Buffered, Self::Uring, Self::Pread, Self::Cufile];

    /// Its name, as [`FromStr`] reads it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Direct => "direct",
            Self::Buffered => "buffered",
            Self::Uring => "uring",
            Self::Pread => "pread",
            Self::Cufile => "cufile",
        }
    }

    /// The engine that reads.
    pub const fn engine(self) -> EngineKind {
        match self {
            Self::Auto | Self::Direct | Self::Cufile => EngineKind::Auto,
            Self::Buffered => EngineKind::Buffered,
            Self::Uring => EngineKind::Uring,
            Self::Pread => EngineKind::Pread,
        }
    }

    /// Whether all reads are to go past the page cache wherever the filesystem lets them.
    pub const fn is_direct(self) -> bool {
        matches!(self, Self::Direct | Self::Cufile)
    }

    /// How weights reach a GPU.
    pub const fn gpu_reads(self) -> GpuReads {
        match self {
            Self::Auto => GpuReads::Auto,
            Self::Cufile => GpuReads::Cufile,
            Self::Direct | Self::Buffered | Self::Uring | Self::Pread => GpuReads::Ring,
        }
    }
}

impl fmt::Display for Io {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Io {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|io| io.name() == text).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            format!("there are {names}")
        })
    }
}

/// Which way the files of a drive are read, and why.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Way {
    /// Past the page cache.
    pub direct: bool,
    /// Why this one, in a few words.
    pub reason: String,
    /// The measurement behind it, if there was one.
    pub probe: Option<Probe>,
}

impl Way {
    /// The way for the file at `path`. Measures both for a moment (see [`Probe`]) where the filesystem
    /// leaves that open and no earlier measurement of this drive is in the [cache](crate::cache::dir).
    ///
    /// # Errors
    /// When the file cannot be opened.
    pub fn of(path: &Path) -> tierstream_io::Result<Way> {
        Self::with(path, Filesystem::of(path).as_ref(), crate::cache::dir().as_deref(), probe)
    }

    /// The same for a file without a name of its own on `filesystem`. Unless `measure` says so, only by what
    /// is known.
    ///
    /// # Errors
    /// As [`Way::of`].
    pub fn on(
        filesystem: Option<&Filesystem>,
        path: &Path,
        measure: bool,
    ) -> tierstream_io::Result<Way> {
        let look = |path: &Path| if measure { probe(path) } else { Err("--no-measure".to_owned()) };
        Self::with(path, filesystem, crate::cache::dir().as_deref(), look)
    }

    fn with(
        path: &Path,
        filesystem: Option<&Filesystem>,
        cache: Option<&Path>,
        measure: impl Fn(&Path) -> Result<Probe, String>,
    ) -> tierstream_io::Result<Way> {
        let kind = filesystem.map_or("unknown", |f| f.kind.as_str());
        if let Some(way) = by_kind(kind) {
            return Ok(way);
        }
        if let Some(refusal) = File::open(path)?.direct_state().reason.clone() {
            return Ok(Way { direct: false, reason: refusal, probe: None });
        }
        let identity = Identity::of(path, filesystem);
        let mut known = identity.zip(cache).map(|(of, dir)| (Known::load(dir, of), dir));
        if let Some(probe) = known.as_ref().and_then(|(known, _)| known.probe()) {
            return Ok(by_rates(kind, *probe));
        }
        let measured = match measure(path) {
            Ok(probe) => probe,
            Err(why) => {
                let reason =
                    format!("whether that is the faster way on {kind} was not measured: {why}");
                return Ok(Way { direct: true, reason, probe: None });
            }
        };
        if let Some((known, dir)) = known.as_mut().filter(|_| measured.rounds >= ROUNDS_MIN) {
            known.set_probe(measured);
            // Without it, the next start measures again.
            let _ = known.save(dir);
        }
        Ok(by_rates(kind, measured))
    }
}

/// What is known without measuring.
fn by_kind(kind: &str) -> Option<Way> {
    let (direct, reason) = match kind {
        _ if DIRECT_IS_BEST.contains(&kind) => (true, format!("the fastest way on {kind}")),
        _ if IN_MEMORY.contains(&kind) => {
            (false, format!("it lies in memory ({kind}), there is no drive to read from"))
        }
        _ => return None,
    };
    Some(Way { direct, reason, probe: None })
}

/// What a measurement says.
fn by_rates(kind: &str, probe: Probe) -> Way {
    let (direct_gbps, cached_gbps) = (probe.direct_gbps, probe.cached_gbps);
    let rates = format!("{direct_gbps:.2} GB/s past the page cache, {cached_gbps:.2} through it");
    let (direct, reason) = if probe.bypasses == Some(false) {
        (false, format!("{kind} takes direct reads of it through the page cache too ({rates})"))
    } else if probe.rounds < ROUNDS_MIN {
        (
            true,
            format!("whether that is the faster way on {kind} takes too long to measure ({rates})"),
        )
    } else if probe.ratio > MARGIN && 4 * probe.rounds_won >= ROUNDS_OF_FOUR * probe.rounds {
        (false, format!("the faster way on {kind} here ({rates})"))
    } else if probe.ratio > 1.0 {
        (true, format!("hardly slower on {kind} here, and takes no memory ({rates})"))
    } else {
        (true, format!("the faster way on {kind} here ({rates})"))
    };
    Way { direct, reason, probe: Some(probe) }
}

/// Completes `config`, which leaves the engine open, for the files at `paths`: by drive, past the page
/// cache or through it.
///
/// # Errors
/// When a file cannot be opened.
pub(crate) fn settle(config: &mut Config, paths: &[PathBuf]) -> tierstream_io::Result<()> {
    if config.engine != EngineKind::Auto {
        return Ok(());
    }
    let mut direct = Vec::new();
    for path in paths {
        // The reader says what is wrong with a file that is not there.
        let Ok(device) = fs::metadata(path).map(|m| m.dev()) else { continue };
        if direct.contains(&device) || config.dropping.contains_key(&device) {
            continue;
        }
        match Way::of(path)? {
            Way { direct: true, .. } => direct.push(device),
            Way { reason, .. } => _ = config.dropping.insert(device, reason),
        }
    }
    if direct.is_empty() && !config.dropping.is_empty() {
        // Whoever reads from the page cache copies: several threads do more of that than one.
        config.engine = EngineKind::Buffered;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::skip::skip;

    /// Of 12 rounds, in 10 of which the same way was faster.
    fn probed(direct_gbps: f64, cached_gbps: f64, bypasses: Option<bool>) -> Probe {
        let ratio = cached_gbps / direct_gbps;
        let rounds_won = if ratio > 1.0 { 10 } else { 2 };
        let (bytes, seconds) = (48 << 20, 0.04);
        Probe { direct_gbps, cached_gbps, ratio, rounds: 12, rounds_won, bypasses, bytes, seconds }
    }

    #[test]
    fn some_filesystems_need_no_measurement() {
        for (kind, direct) in [
            ("ext4", Some(true)),
            ("xfs", Some(true)),
            ("f2fs", Some(true)),
            ("tmpfs", Some(false)),
            ("ramfs", Some(false)),
            ("btrfs", None),
            ("zfs", None),
            ("nfs4", None),
            ("cifs", None),
            ("fuse.sshfs", None),
            ("fuseblk", None),
            ("overlay", None),
            ("9p", None),
            ("virtiofs", None),
            ("exfat", None),
            ("unknown", None),
        ] {
            assert_eq!(by_kind(kind).map(|way| way.direct), direct, "{kind}");
        }
    }

    #[test]
    fn rates_decide_where_the_filesystem_does_not() {
        for (direct, cached, bypasses, expected, why) in [
            (2.0, 1.2, Some(true), true, "the faster way on btrfs here (2.00 GB/s past the page"),
            (2.0, 1.2, None, true, "the faster way"),
            (2.0, 2.4, Some(true), true, "hardly slower"),
            (2.0, 2.6, Some(true), false, "the faster way on btrfs here (2.00 GB/s past the page"),
            (2.0, 6.0, None, false, "the faster way"),
            // What claims to pass the cache and fills it is no better for being fast.
            (6.0, 2.0, Some(false), false, "btrfs takes direct reads of it through the page cache"),
        ] {
            let way = by_rates("btrfs", probed(direct, cached, bypasses));
            assert_eq!(way.direct, expected, "{direct} {cached} {bypasses:?}");
            assert!(way.reason.starts_with(why), "{}", way.reason);
        }
        // Now this one and now that one: somebody else was busy there.
        for (rounds_won, direct) in [(12, false), (9, false), (8, true)] {
            let way = by_rates("btrfs", Probe { rounds_won, ..probed(1.0, 2.0, None) });
            assert_eq!(way.direct, direct, "{rounds_won}");
        }
        let few = Probe { rounds: 3, rounds_won: 3, ..probed(1.0, 2.0, None) };
        let way = by_rates("nfs", few);
        assert!(way.direct && way.reason.contains("too long to measure"), "{way:?}");
    }

    #[test]
    fn a_drive_is_measured_once() {
        // On the drive, where direct reads are not refused.
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = dir.path().join("f");
        fs::write(&path, [1; 9000]).unwrap();
        if !File::open(&path).unwrap().direct_state().direct {
            return skip("direct reads are refused here");
        }
        let cache = dir.path().join("cache");
        let filesystem =
            |kind: &str| Filesystem { kind: kind.into(), source: "/dev/x".into(), ..here(&path) };
        let measured = std::cell::Cell::new(0);
        let measure = |_: &Path| {
            measured.set(measured.get() + 1);
            Ok(probed(1.0, 3.0, Some(true)))
        };
        let way = |kind| Way::with(&path, Some(&filesystem(kind)), Some(&cache), measure).unwrap();
        assert!(way("ext4").direct);
        assert_eq!(measured.get(), 0);
        let (first, second) = (way("btrfs"), way("btrfs"));
        assert_eq!((measured.get(), first.direct), (1, false));
        assert_eq!(first, second);
        // Another filesystem on that device.
        way("zfs");
        assert_eq!(measured.get(), 2);
        // What is a guess is not remembered.
        let guess = |path: &Path| measure(path).map(|probe| Probe { rounds: 2, ..probe });
        for n in [3, 4] {
            Way::with(&path, Some(&filesystem("nfs")), Some(&cache), guess).unwrap();
            assert_eq!(measured.get(), n);
        }
        // Nor what cannot be measured, and that is told.
        let refuse = |_: &Path| Err("it is too small".to_owned());
        let other = filesystem("fuse");
        for _ in 0..2 {
            let way = Way::with(&path, Some(&other), Some(&cache), refuse).unwrap();
            assert!(way.direct && way.reason.ends_with("not measured: it is too small"), "{way:?}");
        }
        assert!(!Way::with(&path, Some(&other), Some(&cache), measure).unwrap().direct);
    }

    fn here(path: &Path) -> Filesystem {
        Filesystem::of(path).unwrap()
    }

    #[test]
    fn what_lies_in_memory_is_read_by_threads() {
        let memory = Path::new("/dev/shm");
        let Ok(dir) = tempfile::tempdir_in(memory) else { return skip("there is no /dev/shm") };
        if here(dir.path()).kind != "tmpfs" {
            return skip("/dev/shm is no tmpfs");
        }
        let path = dir.path().join("f");
        fs::write(&path, [1; 9000]).unwrap();
        let mut config = Config::default();
        settle(&mut config, std::slice::from_ref(&path)).unwrap();
        assert_eq!((config.engine, config.dropping.len()), (EngineKind::Buffered, 1));
        // Whoever names an engine gets it.
        let mut config = Config { engine: EngineKind::Uring, ..Config::default() };
        settle(&mut config, &[path]).unwrap();
        assert_eq!((config.engine, config.dropping.len()), (EngineKind::Uring, 0));
    }

    #[test]
    fn names_are_read_as_they_are_written() {
        for io in Io::ALL {
            assert_eq!(io.to_string().parse(), Ok(io));
        }
        assert_eq!(
            "mmap".parse::<Io>().unwrap_err(),
            "there are auto, direct, buffered, uring, pread, cufile"
        );
    }
}

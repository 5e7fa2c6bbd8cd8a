//! The machine that the program runs on: processor, kernel, filesystems.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::Serialize;

/// Processor features that ggml has kernels for, or will: names of `/proc/cpuinfo`.
const FEATURES: &[&str] = &[
    "avx",
    "avx2",
    "f16c",
    "fma",
    "bmi2",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx512_vbmi",
    "avx512_bf16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimdhp",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
    "sve2",
];

/// Processor and kernel.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    /// `linux`.
    pub os: &'static str,
    /// Its release.
    pub kernel: String,
    /// Name of the processor.
    pub cpu: String,
    /// Logical processors of the machine.
    pub processors: usize,
    /// Those that this process may use.
    pub processors_usable: usize,
    /// NUMA nodes.
    pub numa_nodes: Vec<u32>,
    /// Of the features that matter for inference, those that there are.
    pub features: Vec<&'static str>,
}

impl Machine {
    /// Asks `/proc`; empty where it does not say.
    pub fn here() -> Machine {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let usable = std::thread::available_parallelism().map_or(1, |n| n.get());
        let count = cpuinfo.lines().filter(|l| l.starts_with("processor")).count();
        Machine {
            os: std::env::consts::OS,
            kernel: kernel().unwrap_or_default(),
            cpu: cpu_field(&cpuinfo, "model name").unwrap_or_default().to_owned(),
            processors: count.max(usable),
            processors_usable: usable,
            numa_nodes: crate::numa::nodes(),
            features: features(&cpuinfo),
        }
    }
}

/// Release of the kernel.
pub(crate) fn kernel() -> Option<String> {
    first_line("/proc/sys/kernel/osrelease")
}

/// Why io_uring is switched off on this machine, if `kernel.io_uring_disabled` says so.
pub fn io_uring_disabled() -> Option<String> {
    let value = first_line("/proc/sys/kernel/io_uring_disabled")?;
    (value != "0").then(|| format!("kernel.io_uring_disabled is {value}"))
}

fn first_line(path: &str) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.lines().next()?.trim().to_owned())
}

fn cpu_field<'a>(cpuinfo: &'a str, name: &str) -> Option<&'a str> {
    let (_, value) = cpuinfo.lines().find(|l| l.starts_with(name))?.split_once(':')?;
    Some(value.trim())
}

fn features(cpuinfo: &str) -> Vec<&'static str> {
    // x86 and Arm.
    let flags = cpu_field(cpuinfo, "flags").or_else(|| cpu_field(cpuinfo, "Features"));
    let has: Vec<&str> = flags.unwrap_or_default().split_whitespace().collect();
    FEATURES.iter().copied().filter(|f| has.contains(f)).collect()
}

/// Where a file lies.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Filesystem {
    /// `ext4`, `overlay`.
    pub kind: String,
    /// Where it is mounted.
    pub mount: PathBuf,
    /// What is mounted there, usually a device.
    pub source: String,
    /// Whether the drive spins, where the kernel knows one drive behind it.
    pub rotational: Option<bool>,
}

impl Filesystem {
    /// The filesystem of `path`, which must exist.
    pub fn of(path: &Path) -> Option<Filesystem> {
        let path = fs::canonicalize(path).ok()?;
        let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
        let (mount, kind, source) = mount_of(&path, &mounts)?;
        Some(Filesystem { kind, mount, source, rotational: rotational(&path) })
    }
}

/// Mount point, type and source of the mount that holds `path`, from `/proc/self/mountinfo`
/// (proc_pid_mountinfo(5)). Of two mounts at one place the later hides the earlier.
fn mount_of(path: &Path, mounts: &str) -> Option<(PathBuf, String, String)> {
    let parsed = mounts.lines().filter_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let mount = PathBuf::from(unescaped(left.split(' ').nth(4)?));
        let mut right = right.split(' ');
        Some((mount, right.next()?.to_owned(), unescaped(right.next()?)))
    });
    parsed
        .filter(|(mount, ..)| path.starts_with(mount))
        .max_by_key(|(mount, ..)| mount.components().count())
}

/// Spaces and the like are written as `\040` there.
fn unescaped(text: &str) -> String {
    let mut parts = text.split('\\');
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        match part.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                out.push(char::from(byte));
                out.push_str(&part[3..]);
            }
            None => {
                out.push('\\');
                out.push_str(part);
            }
        }
    }
    out
}

fn rotational(path: &Path) -> Option<bool> {
    let device = fs::metadata(path).ok()?.dev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let block = fs::canonicalize(format!("/sys/dev/block/{major}:{minor}")).ok()?;
    // Virtual drives do not know what is below them, and some say that they spin.
    if block.components().any(|c| c.as_os_str().to_string_lossy().starts_with("virtio")) {
        return None;
    }
    // A partition's queue is that of its drive.
    let of = |dir: &Path| fs::read_to_string(dir.join("queue/rotational")).ok();
    let said = of(&block).or_else(|| of(block.parent()?))?;
    Some(said.trim() == "1")
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{Filesystem, Machine, cpu_field, features, mount_of};

    #[test]
    fn the_longest_and_latest_mount_counts() {
        let mounts = "\
1 0 8:1 / / rw shared:1 - ext4 /dev/sda1 rw
2 1 8:2 / /data rw - xfs /dev/sdb rw
3 1 8:3 / /data rw master:2 propagate_from:1 - btrfs /dev/sdc rw
4 1 8:4 / /my\\040files rw - vfat /dev/sdd rw";
        let kind = |path: &str| mount_of(Path::new(path), mounts).map(|m| m.1);
        assert_eq!(kind("/data/model.gguf").as_deref(), Some("btrfs"));
        assert_eq!(kind("/database").as_deref(), Some("ext4"));
        assert_eq!(kind("/my files/a").as_deref(), Some("vfat"));
        assert_eq!(kind("relative"), None);
    }

    #[test]
    fn features_are_whole_words() {
        let text = "processor : 0\nmodel name\t: A CPU\nflags\t\t: fpu avx2 avx512f avx512_vnni\n";
        assert_eq!(features(text), ["avx2", "avx512f", "avx512_vnni"]);
        assert_eq!(cpu_field(text, "model name"), Some("A CPU"));
    }

    #[test]
    fn there_is_a_machine() {
        let machine = Machine::here();
        assert!(!machine.kernel.is_empty());
        assert!(machine.processors >= machine.processors_usable);
        assert!(Filesystem::of(Path::new("/proc/self")).is_some_and(|f| f.kind == "proc"));
    }
}

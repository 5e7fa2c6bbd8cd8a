//! What memory there is, and what this process takes of it.

use std::fs;
use std::path::{Path, PathBuf};

/// What this process has resident, bytes, from `/proc/self/status`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Now.
    pub rss_bytes: u64,
    /// The most that ever was.
    pub peak_rss_bytes: u64,
}

impl Usage {
    /// Reads the figures; zeros where the kernel has none.
    pub fn now() -> Usage {
        let text = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let field = |name| kib_field(&text, name).unwrap_or(0);
        Usage { rss_bytes: field("VmRSS:"), peak_rss_bytes: field("VmHWM:") }
    }
}

/// Memory that a program started now may use without pushing others out, bytes: what the kernel
/// calls available, or what is left of this process's memory cgroup if that is less.
pub fn available_bytes() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let machine = kib_field(&text, "MemAvailable:").unwrap_or(0);
    cgroup_left_bytes().map_or(machine, |left| left.min(machine))
}

/// Memory that nobody uses for anything, bytes.
pub fn free_bytes() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    kib_field(&text, "MemFree:").unwrap_or(0)
}

/// Memory of the machine, bytes.
pub fn total_bytes() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    kib_field(&text, "MemTotal:").unwrap_or(0)
}

/// What is left of the tightest memory limit among this process's cgroups, if there is one.
pub fn cgroup_left_bytes() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    groups.lines().filter_map(left_in).min()
}

/// Of one line of `/proc/self/cgroup`: `id:controllers:path`; version 2 has no controllers.
fn left_in(line: &str) -> Option<u64> {
    let mut fields = line.splitn(3, ':').skip(1);
    let (controllers, path) = (fields.next()?, fields.next()?);
    let (root, limit, usage) = if controllers.is_empty() {
        ("/sys/fs/cgroup", "memory.max", "memory.current")
    } else if controllers.split(',').any(|c| c == "memory") {
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes")
    } else {
        return None;
    };
    // A limit holds for everything below it.
    let group: PathBuf = Path::new(root).join(path.trim_start_matches('/'));
    group
        .ancestors()
        .take_while(|g| g.starts_with(root))
        .filter_map(|g| {
            let number = |name| fs::read_to_string(g.join(name)).ok()?.trim().parse::<u64>().ok();
            let limit = number(limit).filter(|&l| l < 1 << 60)?;
            let cache = reclaimable(&g.join("memory.stat")).unwrap_or(0);
            Some(limit.saturating_sub(number(usage)?.saturating_sub(cache)))
        })
        .min()
}

/// Page cache that the group gives up before anything else, bytes.
fn reclaimable(stat: &Path) -> Option<u64> {
    let text = fs::read_to_string(stat).ok()?;
    let field = |name: &str| -> Option<u64> {
        text.lines().find_map(|l| l.strip_prefix(name))?.trim().parse().ok()
    };
    field("total_inactive_file ").or_else(|| field("inactive_file "))
}

fn kib_field(text: &str, name: &str) -> Option<u64> {
    let value = text.lines().find_map(|l| l.strip_prefix(name))?;
    Some(value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
}

#[cfg(test)]
mod tests {
    use super::{Usage, available_bytes, free_bytes, kib_field, total_bytes};

    #[test]
    fn reads_kib_fields() {
        assert_eq!(kib_field("VmRSS:\t  12 kB\nVmHWM:\t 34 kB\n", "VmHWM:"), Some(34 << 10));
        assert_eq!(kib_field("VmRSS:\t  x kB\n", "VmRSS:"), None);
    }

    #[test]
    fn a_running_process_has_memory() {
        let usage = Usage::now();
        assert!(usage.rss_bytes > 0 && usage.peak_rss_bytes >= usage.rss_bytes);
        assert!(available_bytes() > 0 && available_bytes() <= total_bytes());
        assert!(free_bytes() > 0 && free_bytes() <= total_bytes());
    }
}

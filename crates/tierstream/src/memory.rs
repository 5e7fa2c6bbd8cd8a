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

/// Memory that this process can have at most, bytes: the machine's, or the tightest limit of its cgroups.
pub fn most_bytes() -> u64 {
    let limit = least_of_groups(|group| Some(group.limit_bytes));
    limit.map_or_else(total_bytes, |limit| limit.min(total_bytes()))
}

/// What is left of the tightest memory limit among this process's cgroups, if there is one.
pub fn cgroup_left_bytes() -> Option<u64> {
    least_of_groups(|group| {
        let usage = number(&group.folder.join(group.usage))?;
        let cache = reclaimable(&group.folder.join("memory.stat")).unwrap_or(0);
        Some(group.limit_bytes.saturating_sub(usage.saturating_sub(cache)))
    })
}

/// A cgroup with a limit of memory.
struct Group {
    folder: PathBuf,
    limit_bytes: u64,
    /// The file of what it uses.
    usage: &'static str,
}

/// The least figure of this process's cgroups that have a limit.
fn least_of_groups(figure: impl Fn(&Group) -> Option<u64>) -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    groups.lines().flat_map(limited).filter_map(|group| figure(&group)).min()
}

/// Of one line of `/proc/self/cgroup`: `id:controllers:path`; version 2 has no controllers.
fn limited(line: &str) -> Vec<Group> {
    let mut fields = line.splitn(3, ':').skip(1);
    let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { return Vec::new() };
    let (root, limit, usage) = if controllers.is_empty() {
        ("/sys/fs/cgroup", "memory.max", "memory.current")
    } else if controllers.split(',').any(|c| c == "memory") {
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes")
    } else {
        return Vec::new();
    };
    // A limit holds for everything below it.
    let group = |folder: &Path| {
        let limit_bytes = number(&folder.join(limit)).filter(|&bytes| bytes < 1 << 60)?;
        Some(Group { folder: folder.to_owned(), limit_bytes, usage })
    };
    let path = Path::new(root).join(path.trim_start_matches('/'));
    path.ancestors().take_while(|g| g.starts_with(root)).filter_map(group).collect()
}

/// The number that a file has.
fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
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
    use super::{Usage, available_bytes, free_bytes, kib_field, most_bytes, total_bytes};

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
        assert!(most_bytes() > 0 && most_bytes() <= total_bytes());
        assert!(free_bytes() > 0 && free_bytes() <= total_bytes());
    }
}

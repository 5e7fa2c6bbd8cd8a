//! NUMA nodes: those of this machine, and the one that a drive is attached to.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::machine::Filesystem;

/// Most nodes that a list is read for: as many as Linux is built for.
const NODES_MAX: u32 = 1024;

/// The nodes of this machine: one where the kernel knows of none.
pub fn nodes() -> Vec<u32> {
    nodes_in(Path::new("/sys"))
}

/// The node that the drive of the file at `path` is attached to, if the kernel says.
pub fn node_of(path: &Path) -> Option<u32> {
    node_of_device(Path::new("/sys"), device_of(path)?)
}

/// The node for buffers that bytes of the file at `path` go through on their way to a GPU on node `gpu`,
/// or to the processors: the GPU's or else the drive's. None on a machine of one.
pub(crate) fn ring_node(path: &Path, gpu: Option<u32>) -> Option<u32> {
    choose(&nodes(), gpu, || node_of(path))
}

fn choose(nodes: &[u32], gpu: Option<u32>, drive: impl FnOnce() -> Option<u32>) -> Option<u32> {
    if nodes.len() < 2 {
        return None;
    }
    gpu.or_else(drive).filter(|node| nodes.contains(node))
}

fn nodes_in(sys: &Path) -> Vec<u32> {
    let online = fs::read_to_string(sys.join("devices/system/node/online")).unwrap_or_default();
    let nodes = numbers(online.trim());
    if nodes.is_empty() { vec![0] } else { nodes }
}

/// `0-1,4` (cpuset(7)); nothing if it is something else.
fn numbers(list: &str) -> Vec<u32> {
    let number = |text: &str| text.parse().ok().filter(|&n: &u32| n < NODES_MAX);
    let range = |part: &str| match part.split_once('-') {
        Some((first, last)) => Some(number(first)?..=number(last)?),
        None => number(part).map(|n| n..=n),
    };
    let ranges: Option<Vec<_>> = list.split(',').map(range).collect();
    ranges.unwrap_or_default().into_iter().flatten().collect()
}

/// The block device below the file at `path`: numbers of it.
fn device_of(path: &Path) -> Option<(u32, u32)> {
    let own = fs::metadata(path).ok()?.dev();
    let device = if rustix::fs::major(own) != 0 {
        own
    } else {
        // As of btrfs, whose devices have no number of their own.
        let source = Filesystem::of(path)?.source;
        fs::metadata(source).ok().map(|m| m.rdev()).filter(|&device| device != 0)?
    };
    Some((rustix::fs::major(device), rustix::fs::minor(device)))
}

/// A partition and its drive lie in the folder of what they are attached to, which has the node.
fn node_of_device(sys: &Path, (major, minor): (u32, u32)) -> Option<u32> {
    let device = fs::canonicalize(sys.join(format!("dev/block/{major}:{minor}"))).ok()?;
    let sys = fs::canonicalize(sys).ok()?;
    let folders = device.ancestors().take_while(|folder| folder.starts_with(&sys));
    let mut said = folders.filter_map(|folder| fs::read_to_string(folder.join("numa_node")).ok());
    // -1 where the kernel does not know.
    said.next()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// A machine of nodes as `online` says, with a partition 259:1 on an NVMe drive that says `node`.
    fn fake(online: Option<&str>, node: Option<&str>) -> tempfile::TempDir {
        let sys = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = sys.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        if let Some(online) = online {
            write("devices/system/node/online", online);
        }
        let controller = "devices/pci0000:40/0000:41:00.0";
        if let Some(node) = node {
            write(&format!("{controller}/numa_node"), node);
        }
        let partition = format!("{controller}/nvme/nvme0/nvme0n1/nvme0n1p1");
        fs::create_dir_all(sys.path().join(&partition)).unwrap();
        fs::create_dir_all(sys.path().join("dev/block")).unwrap();
        symlink(sys.path().join(&partition), sys.path().join("dev/block/259:1")).unwrap();
        sys
    }

    #[test]
    fn nodes_are_what_the_kernel_says() {
        for (online, nodes) in [
            (Some("0\n"), &[0][..]),
            (Some("0-1\n"), &[0, 1]),
            (Some("0-1,4"), &[0, 1, 4]),
            (Some("0,2-3"), &[0, 2, 3]),
            (Some(""), &[0]),
            (Some("0-99999999999"), &[0]),
            (Some("0-4000000000"), &[0]),
            (Some("one"), &[0]),
            (None, &[0]),
        ] {
            assert_eq!(nodes_in(fake(online, None).path()), nodes, "{online:?}");
        }
        assert!(!nodes().is_empty());
    }

    #[test]
    fn a_drive_is_on_the_node_of_what_it_is_attached_to() {
        for (said, node) in [(Some("1\n"), Some(1)), (Some("-1\n"), None), (None, None)] {
            assert_eq!(node_of_device(fake(None, said).path(), (259, 1)), node, "{said:?}");
        }
        assert_eq!(node_of_device(fake(None, Some("1")).path(), (8, 0)), None);
    }

    #[test]
    fn buffers_have_a_node_where_there_are_several() {
        let drive = |node| move || node;
        assert_eq!(choose(&[0], Some(0), drive(Some(0))), None);
        assert_eq!(choose(&[0, 1], Some(1), drive(Some(0))), Some(1));
        assert_eq!(choose(&[0, 1], None, drive(Some(1))), Some(1));
        assert_eq!(choose(&[0, 1], None, drive(None)), None);
        // What sysfs says and the machine has not.
        assert_eq!(choose(&[0, 1], Some(7), drive(None)), None);
    }
}

//! What Linux knows of a device: its PCI Express link, NUMA node and kernel driver.

use std::fs;
use std::path::{Path, PathBuf};

/// A PCI Express link. Idle devices may train down: the most is what counts, and what there is now
/// is worth a look while something is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    /// Generation now: 4 is 16 GT/s a lane.
    pub generation: u32,
    /// Lanes now.
    pub width: u32,
    /// Generation that the device can have.
    pub generation_max: u32,
    /// Lanes that the device can have.
    pub width_max: u32,
}

impl Link {
    /// The link of the device `bus` (`0000:01:00.0`), where the system tells of it.
    pub(crate) fn of(bus: &str) -> Option<Self> {
        Self::read(&folder(bus))
    }

    /// What the lanes that the device can have carry one way, without what packets add. (PCI Express Base
    /// Specification: 2.5 GT/s with ten bits a byte, 5, then 8 GT/s with 130 bits for 128, and twice that with
    /// each generation.)
    #[must_use]
    pub fn bytes_per_second_max(&self) -> f64 {
        let lane = match self.generation_max {
            0 | 1 => 2.5e9 / 10.0,
            2 => 5e9 / 10.0,
            later => 8e9 * 128.0 / 130.0 / 8.0 * f64::from(1_u32 << (later - 3).min(8)),
        };
        lane * f64::from(self.width_max)
    }

    fn read(folder: &Path) -> Option<Self> {
        let field = |name: &str| line(&folder.join(name));
        Some(Self {
            generation: generation(&field("current_link_speed")?)?,
            width: lanes(&field("current_link_width")?)?,
            generation_max: generation(&field("max_link_speed")?)?,
            width_max: lanes(&field("max_link_width")?)?,
        })
    }
}

/// The NUMA node that the device `bus` is near to, if there are several.
pub(crate) fn numa_node(bus: &str) -> Option<u32> {
    // -1 where there is one.
    line(&folder(bus).join("numa_node"))?.parse().ok()
}

/// Version of the NVIDIA kernel driver: `580.95.05`.
pub(crate) fn driver_version() -> Option<String> {
    line(Path::new("/sys/module/nvidia/version"))
}

fn folder(bus: &str) -> PathBuf {
    // The driver writes the domain with eight digits if it must, the system with four.
    let bus = bus.strip_prefix("0000").filter(|rest| rest.len() >= 12).unwrap_or(bus);
    Path::new("/sys/bus/pci/devices").join(bus)
}

fn line(path: &Path) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.lines().next()?.trim().to_owned())
}

/// Generation with the speed of `16.0 GT/s PCIe`. (PCI Express Base Specification, 1.1 Overview.)
fn generation(speed: &str) -> Option<u32> {
    let speed = speed.split_whitespace().next()?.parse::<f64>().ok()?;
    [2.5, 5.0, 8.0, 16.0, 32.0, 64.0].iter().position(|s| *s == speed).map(|i| i as u32 + 1)
}

/// Lanes; 0 and 255 mean that the system does not know.
fn lanes(width: &str) -> Option<u32> {
    width.parse().ok().filter(|lanes| (1..=32).contains(lanes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_read_where_all_of_it_is_known() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        write("current_link_speed", "2.5 GT/s PCIe\n");
        write("current_link_width", "8\n");
        write("max_link_speed", "32.0 GT/s PCIe\n");
        assert_eq!(Link::read(dir.path()), None);
        write("max_link_width", "16\n");
        let link = Link { generation: 1, width: 8, generation_max: 5, width_max: 16 };
        assert_eq!(Link::read(dir.path()), Some(link));
        assert_eq!((link.bytes_per_second_max() / 1e7).round(), 6302.0);
        let old = Link { generation_max: 2, width_max: 4, ..link };
        assert_eq!(old.bytes_per_second_max(), 2e9);
        write("max_link_speed", "Unknown\n");
        assert_eq!(Link::read(dir.path()), None);
        write("max_link_speed", "32.0 GT/s PCIe\n");
        write("current_link_width", "255\n");
        assert_eq!(Link::read(dir.path()), None);
    }

    #[test]
    fn the_folder_has_a_domain_of_four_digits() {
        let devices = Path::new("/sys/bus/pci/devices");
        assert_eq!(folder("00000000:17:00.0"), devices.join("0000:17:00.0"));
        assert_eq!(folder("0000:17:00.0"), devices.join("0000:17:00.0"));
        assert_eq!(folder("00010000:17:00.0"), devices.join("00010000:17:00.0"));
    }
}

//! What `doctor` tells of GPUs.

use serde::Serialize;
use tierstream::size::Bytes;
use tierstream_cuda::{Bandwidth, Device, Error};

use crate::cli::output;

/// Size of a measured copy: what it costs to start one does not show.
const COPY_BYTES: usize = 64 << 20;

/// Measured copies in each direction.
const COPIES: usize = 8;

/// The NVIDIA GPUs of this machine.
#[derive(Debug, Serialize)]
pub(super) struct Gpus {
    devices: Vec<Gpu>,
    /// Why there are none.
    reason: Option<String>,
}

#[derive(Debug, Serialize)]
struct Gpu {
    name: String,
    compute_capability: String,
    memory_free_bytes: Option<u64>,
    memory_total_bytes: u64,
    driver: Option<String>,
    cuda: String,
    eager_modules: bool,
    pci_bus_id: Option<String>,
    pcie: Option<Pcie>,
    numa_node: Option<u32>,
    map_granularity_bytes: Option<u64>,
    copies: Option<Copies>,
    /// Why something of this could not be had.
    reason: Option<String>,
}

#[derive(Debug, Serialize)]
struct Pcie {
    generation: u32,
    width: u32,
    generation_max: u32,
    width_max: u32,
}

/// Rates of copies between pinned memory and the GPU.
#[derive(Debug, Serialize)]
struct Copies {
    bytes: usize,
    rounds: usize,
    upload_gbps: f64,
    download_gbps: f64,
}

impl Gpus {
    pub(super) fn here(measure: bool) -> Self {
        match Device::all() {
            Ok(devices) => {
                let devices = devices.iter().map(|device| Gpu::of(device, measure)).collect();
                Self { devices, reason: None }
            }
            Err(Error::NoGpu { reason }) => Self { devices: Vec::new(), reason: Some(reason) },
            Err(error) => Self { devices: Vec::new(), reason: Some(error.to_string()) },
        }
    }

    pub(super) fn rows(&self) -> Vec<(&'static str, String)> {
        if let Some(reason) = &self.reason {
            return vec![("GPU", format!("none ({reason})"))];
        }
        self.devices.iter().flat_map(Gpu::rows).collect()
    }
}

impl Gpu {
    fn of(device: &Device, measure: bool) -> Self {
        let info = device.info().clone();
        let mut gpu = Self {
            name: info.name,
            compute_capability: format!(
                "{}.{}",
                info.compute_capability.0, info.compute_capability.1
            ),
            memory_free_bytes: None,
            memory_total_bytes: info.memory_bytes,
            driver: info.driver,
            cuda: info.cuda,
            eager_modules: info.eager_modules,
            pci_bus_id: info.pci_bus_id,
            pcie: info.link.map(|link| Pcie {
                generation: link.generation,
                width: link.width,
                generation_max: link.generation_max,
                width_max: link.width_max,
            }),
            numa_node: info.numa_node,
            map_granularity_bytes: None,
            copies: None,
            reason: None,
        };
        gpu.reason = gpu.ask(device, measure).err().map(|error| error.to_string());
        gpu
    }

    /// Asks what only a GPU that works can answer.
    fn ask(&mut self, device: &Device, measure: bool) -> tierstream_cuda::Result<()> {
        self.memory_free_bytes = Some(device.memory()?.free_bytes);
        self.map_granularity_bytes = Some(device.granularity()?);
        if measure {
            self.copies = Some(device.bandwidth(COPY_BYTES, COPIES)?.into());
        }
        Ok(())
    }

    fn rows(&self) -> Vec<(&'static str, String)> {
        let total = Bytes(self.memory_total_bytes);
        let memory = match self.memory_free_bytes {
            Some(free) => format!("{} free of {total}", Bytes(free)),
            None => total.to_string(),
        };
        let name = output::printable(&self.name);
        let mut rows = vec![
            ("GPU", format!("{name}, compute capability {}, {memory}", self.compute_capability)),
            ("GPU driver", self.driver_line()),
        ];
        let bus = self.bus_line();
        rows.extend((!bus.is_empty()).then_some(("GPU bus", bus)));
        if let Some(bytes) = self.map_granularity_bytes {
            rows.push(("GPU maps", format!("memory in granules of {}", Bytes(bytes))));
        }
        if let Some(copies) = &self.copies {
            let (up, down) =
                (output::rate(copies.upload_gbps * 1e9), output::rate(copies.download_gbps * 1e9));
            let size = Bytes(copies.bytes as u64);
            let way = format!("pinned memory, {size} at a time, median of {}", copies.rounds);
            rows.push(("GPU copies", format!("{up} to the GPU, {down} from it ({way})")));
        }
        rows.extend(self.reason.clone().map(|why| ("GPU fails", why)));
        rows
    }

    fn driver_line(&self) -> String {
        let driver = self.driver.as_deref().map_or_else(String::new, |v| format!("{v}, "));
        let modules = if self.eager_modules { "at once" } else { "LAZILY" };
        format!("{driver}CUDA {}, loads kernels {modules}", self.cuda)
    }

    fn bus_line(&self) -> String {
        let link = self.pcie.as_ref().map(|link| {
            let most = format!("PCIe {} x{}", link.generation_max, link.width_max);
            match (link.generation, link.width) {
                now if now == (link.generation_max, link.width_max) => most,
                (generation, width) => format!("{most}, now {generation} x{width}"),
            }
        });
        let node = self.numa_node.map(|node| format!("NUMA node {node}"));
        let parts: Vec<String> =
            [self.pci_bus_id.clone(), link, node].into_iter().flatten().collect();
        parts.join(", ")
    }
}

impl From<Bandwidth> for Copies {
    fn from(rates: Bandwidth) -> Self {
        Self {
            bytes: rates.bytes,
            rounds: rates.rounds,
            upload_gbps: rates.upload_gbps,
            download_gbps: rates.download_gbps,
        }
    }
}

#[cfg(test)]
mod tests {
    use tierstream_cuda::standin::{Config, Fault, StandIn};

    use super::*;
    use crate::cli::report::lines;

    fn standin() -> StandIn {
        StandIn::new(Config::default()).unwrap()
    }

    /// A GPU of which everything is known.
    fn known() -> Gpu {
        Gpu {
            name: "NVIDIA H200".to_owned(),
            compute_capability: "9.0".to_owned(),
            driver: Some("580.95.05".to_owned()),
            cuda: "13.0".to_owned(),
            pci_bus_id: Some("0000:17:00.0".to_owned()),
            pcie: Some(Pcie { generation: 1, width: 16, generation_max: 5, width_max: 16 }),
            numa_node: Some(1),
            copies: Some(Copies {
                bytes: COPY_BYTES,
                rounds: COPIES,
                upload_gbps: 55.25,
                download_gbps: 54.0,
            }),
            ..Gpu::of(&standin().device(), false)
        }
    }

    #[test]
    fn what_there_is() {
        let gpus = Gpus { devices: vec![known()], reason: None };
        insta::assert_snapshot!(lines(&gpus.rows()));
        insta::assert_json_snapshot!(gpus);
    }

    #[test]
    fn a_bus_at_its_best_is_told_once() {
        let pcie = Some(Pcie { generation: 4, width: 8, generation_max: 4, width_max: 8 });
        let gpu = Gpu { pcie, pci_bus_id: None, numa_node: None, ..known() };
        assert_eq!(gpu.bus_line(), "PCIe 4 x8");
    }

    #[test]
    fn copies_are_measured() {
        let gpu = Gpu::of(&standin().device(), true);
        let copies = gpu.copies.unwrap();
        assert!(copies.upload_gbps > 0.0 && copies.download_gbps > 0.0);
        assert_eq!(gpu.reason, None);
    }

    #[test]
    fn a_gpu_that_fails_is_told_of() {
        let standin = standin();
        standin.inject(Fault::PinRefused, 0);
        let gpu = Gpu::of(&standin.device(), true);
        let why =
            "cannot pin 67108864 bytes of memory: STANDIN_ERROR_OUT_OF_MEMORY (out of memory)";
        assert_eq!(gpu.reason.as_deref(), Some(why));
        assert!(gpu.copies.is_none() && gpu.memory_free_bytes.is_some());
        assert_eq!(gpu.rows().last().unwrap().1, why);
    }

    #[test]
    fn none_is_one_line() {
        let gpus = Gpus { devices: Vec::new(), reason: Some("the driver is missing".to_owned()) };
        assert_eq!(gpus.rows(), [("GPU", "none (the driver is missing)".to_owned())]);
    }

    #[test]
    fn every_field_is_documented() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/json.md");
        let text = std::fs::read_to_string(path).unwrap();
        let value = serde_json::to_value(known()).unwrap();
        let inner = |name: &str| value[name].as_object().unwrap().keys().cloned().collect();
        let all: Vec<Vec<String>> = vec![
            value.as_object().unwrap().keys().cloned().collect(),
            inner("pcie"),
            inner("copies"),
        ];
        for name in all.concat() {
            assert!(text.contains(&format!("`{name}`")), "docs/json.md does not tell of {name}");
        }
    }
}

//! Where a model computes, and in whose memory its experts lie.

use std::ffi::CStr;
use std::fmt;

use tierstream_cuda::Device;
use tierstream_cuda::standin::StandIn;

use crate::abi::*;
use crate::error::{Error, Result};
use crate::{late, log};

/// Where a model computes.
#[derive(Debug, Clone, Default)]
pub enum Placement {
    /// On the processor, with all weights in host memory.
    #[default]
    Cpu,
    /// On a GPU, with the weights in its memory: dense ones as a whole, experts as far as their pool
    /// reaches.
    Gpu(Gpu),
}

impl Placement {
    /// The device of ggml that computes.
    pub(crate) fn inner(&self) -> Result<ggml_backend_dev_t> {
        match self {
            Placement::Cpu => cpu(),
            Placement::Gpu(gpu) => Ok(gpu.inner),
        }
    }

    /// The GPU, if it is one.
    pub fn gpu(&self) -> Option<&Gpu> {
        match self {
            Placement::Cpu => None,
            Placement::Gpu(gpu) => Some(gpu),
        }
    }
}

/// ggml's CPU device.
pub(crate) fn cpu() -> Result<ggml_backend_dev_t> {
    log::init();
    let cpu: ggml_backend_dev_t =
        // SAFETY: the CPU device is part of the build and lives for ever.
        unsafe { ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU) }.cast();
    if cpu.is_null() {
        return Err(Error::Backend("ggml has no CPU backend".into()));
    }
    Ok(cpu)
}

/// A GPU that ggml computes on, and whose memory the driver lets us have.
#[derive(Clone)]
pub struct Gpu {
    inner: ggml_backend_dev_t,
    device: Device,
}

// SAFETY: a device of ggml's registry, which lives for ever and is used from any thread.
unsafe impl Send for Gpu {}
// SAFETY: as above.
unsafe impl Sync for Gpu {}

impl Gpu {
    /// The NVIDIA GPUs that ggml's CUDA backend, which has to be
    /// [loaded](crate::load_backends), and the driver both show; in ggml's order.
    ///
    /// # Errors
    /// [`Error::Gpu`] without a driver or a GPU, [`Error::Backend`] without the backend.
    pub fn all() -> Result<Vec<Gpu>> {
        log::init();
        let devices = Device::all()?;
        let mut all = Vec::new();
        // SAFETY: the registry is set up and only grows.
        for index in 0..unsafe { ggml_backend_dev_count() } {
            // SAFETY: below the count; devices, registries and their strings live for ever.
            let (inner, backend, bus) = unsafe {
                let inner = ggml_backend_dev_get(index);
                let reg = ggml_backend_dev_backend_reg(inner);
                let mut props: ggml_backend_dev_props = std::mem::zeroed();
                ggml_backend_dev_get_props(inner, &raw mut props);
                let bus = (!props.device_id.is_null()).then(|| CStr::from_ptr(props.device_id));
                (inner, CStr::from_ptr(ggml_backend_reg_name(reg)), bus)
            };
            if backend != c"CUDA" {
                continue;
            }
            let bus = bus.map(|bus| bus.to_string_lossy().to_lowercase());
            let device = devices.iter().find(|device| device.info().pci_bus_id == bus);
            all.extend(device.map(|d| Gpu { inner: inner.cast(), device: d.clone() }));
        }
        if all.is_empty() {
            return Err(Error::Backend(
                "ggml's CUDA backend (libggml-cuda.so) is not loaded, so that no GPU can compute"
                    .into(),
            ));
        }
        Ok(all)
    }

    /// Something with the face of a GPU and without one: ggml's CPU kernels compute on the memory of a
    /// stand-in, and no sooner than somebody waits for it. All buffers are there: weights, KV cache,
    /// intermediate results. For tests.
    ///
    /// # Errors
    /// [`Error::Backend`] if ggml has no CPU backend.
    pub fn stand_in(stand_in: &StandIn) -> Result<Gpu> {
        Ok(Gpu { inner: late::device(cpu()?, stand_in), device: stand_in.device() })
    }

    /// The driver's side of it.
    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    /// Bytes of its memory that nobody uses now, other programs included.
    ///
    /// # Errors
    /// [`Error::Gpu`]: what the driver says.
    pub fn free_bytes(&self) -> Result<u64> {
        Ok(self.device.memory()?.free_bytes)
    }

    /// Lets the driver and ggml take what they take of the device's memory before anything of a
    /// model is there: the context, and the kernels.
    ///
    /// # Errors
    /// [`Error::Backend`] if ggml cannot start on it.
    pub fn warm_up(&self) -> Result<()> {
        // SAFETY: a live device without parameters; what it made is freed at once.
        unsafe {
            let backend = ggml_backend_dev_init(self.inner.cast(), std::ptr::null());
            if backend.is_null() {
                return Err(Error::Backend(format!("ggml cannot start on {}", self.name())));
            }
            ggml_backend_free(backend);
        }
        Ok(())
    }

    /// Bytes per second of copies from pinned host memory, 64 MiB at a time, median of ten.
    ///
    /// # Errors
    /// [`Error::Gpu`]: what the driver says.
    pub fn copy_rate(&self) -> Result<f64> {
        Ok(self.device.bandwidth(64 << 20, 10)?.upload_gbps * 1e9)
    }

    /// Bytes per second that its link to the processor has by its generation and width, if the system tells
    /// them; copies get a tenth less.
    pub fn link_rate(&self) -> Option<f64> {
        self.device.info().link.map(|link| link.bytes_per_second_max())
    }

    /// The device's name: `NVIDIA H200`.
    pub fn name(&self) -> &str {
        &self.device.info().name
    }

    /// Whether single tokens can be computed as a whole on it: [`Execution`](crate::Execution).
    pub fn has_gates(&self) -> bool {
        self.device.has_gates()
    }

    /// Its name, and where on the bus it is: no other GPU of this machine has both.
    pub fn description(&self) -> String {
        let bus = self.device.info().pci_bus_id.as_deref().unwrap_or("nowhere");
        format!("{} at {bus}", self.name())
    }

    /// The NUMA node that it is attached to, if the kernel says.
    pub fn numa_node(&self) -> Option<u32> {
        self.device.info().numa_node
    }

    pub(crate) fn inner(&self) -> ggml_backend_dev_t {
        self.inner
    }
}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Gpu").field(&self.name()).finish()
    }
}

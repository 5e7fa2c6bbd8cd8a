//! A device through the NVIDIA driver, in the primary context of its device: the one that CUDA's
//! runtime, and with it ggml's CUDA backend, uses too.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr::{NonNull, null_mut};
use std::sync::{Mutex, OnceLock};

use cudarc::driver::sys::{self, CUcontext, CUdevice, CUdevice_attribute as Attribute, CUresult};

use super::gate::{self, Gate};
use super::{Address, Copy, Driver, Handle, Outcome, RawEvent, RawGraph, RawStream};
use crate::device::{Info, Memory};
use crate::error::{Error, Failure, Result};
use crate::pci;
use crate::sync::lock;

/// The oldest driver that has every function that is called here, as `cuDriverGetVersion` counts.
const DRIVER_NEEDED: c_int = 12_000;

/// For every context, not only the one that is current when memory is pinned. Not write-combined:
/// the processor reads this memory too.
const PORTABLE: c_uint = sys::CU_MEMHOSTALLOC_PORTABLE;
const REGISTER_PORTABLE: c_uint = sys::CU_MEMHOSTREGISTER_PORTABLE;

/// The gates' kernel.
pub(crate) const GATE_PTX: &str = concat!(include_str!("../gate.ptx"), "\0");
/// The oldest compute capability that has what it uses.
const GATES_NEED: i32 = 7;

/// One device of the NVIDIA driver.
pub(crate) struct Nvidia {
    device: CUdevice,
    /// The primary context, retained with the first call that needs it: it takes memory.
    context: Mutex<Option<Context>>,
    /// The gates' kernel in this context, loaded with the first gates.
    gates: Mutex<Option<Kernel>>,
}

#[derive(Clone, Copy)]
struct Context(CUcontext);

#[derive(Clone, Copy)]
struct Kernel {
    module: sys::CUmodule,
    function: sys::CUfunction,
}

// SAFETY: handles that the driver lets every thread use.
unsafe impl Send for Kernel {}

// SAFETY: a context is a handle that the driver lets every thread use.
unsafe impl Send for Context {}

/// The devices that the driver shows this process, at least one.
pub(crate) fn all() -> Result<Vec<(Nvidia, Info)>> {
    static LOADED: OnceLock<Result<c_int>> = OnceLock::new();
    let version = LOADED.get_or_init(load).clone()?;
    let mut count = 0;
    // SAFETY: the driver is initialised; `count` is there to be written.
    check(unsafe { sys::cuDeviceGetCount(&mut count) }).map_err(no_gpu)?;
    if count == 0 {
        return Err(Error::NoGpu { reason: "the NVIDIA driver has no device".to_owned() });
    }
    (0..count)
        .map(|ordinal| {
            let mut device = 0;
            // SAFETY: as above.
            check(unsafe { sys::cuDeviceGet(&mut device, ordinal) }).map_err(no_gpu)?;
            let info = info(device, version).map_err(|f| f.doing("ask a device what it is"))?;
            Ok((Nvidia { device, context: Mutex::new(None), gates: Mutex::new(None) }, info))
        })
        .collect()
}

fn no_gpu(failure: Failure) -> Error {
    Error::NoGpu { reason: format!("{} ({})", failure.name, failure.text) }
}

/// Loads and initialises the driver; its version.
fn load() -> Result<c_int> {
    // SAFETY: loading the driver's library runs nothing but its own constructors. Asked first
    // because the calls below panic without it.
    if !unsafe { sys::is_culib_present() } {
        let reason = "the NVIDIA driver's library (libcuda.so.1) cannot be loaded".to_owned();
        return Err(Error::NoGpu { reason });
    }
    let mut version = 0;
    // SAFETY: allowed before initialising; `version` is there to be written.
    check(unsafe { sys::cuDriverGetVersion(&mut version) }).map_err(no_gpu)?;
    if version < DRIVER_NEEDED {
        let (has, needed) = (cuda_version(version), cuda_version(DRIVER_NEEDED));
        let reason = format!("the NVIDIA driver is too old: it has CUDA {has}, {needed} is needed");
        return Err(Error::NoGpu { reason });
    }
    // SAFETY: no flags are known to the driver but 0.
    check(unsafe { sys::cuInit(0) }).map_err(no_gpu)?;
    Ok(version)
}

/// `13.0` of 13000.
fn cuda_version(version: c_int) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

fn info(device: CUdevice, version: c_int) -> Outcome<Info> {
    let mut total = 0;
    // SAFETY: a device of this driver; `total` is there to be written.
    check(unsafe { sys::cuDeviceTotalMem_v2(&mut total, device) })?;
    let name = text(|buffer, len| {
        // SAFETY: `buffer` has room for `len`.
        unsafe { sys::cuDeviceGetName(buffer, len, device) }
    })?;
    let bus = text(|buffer, len| {
        // SAFETY: `buffer` has room for `len`.
        unsafe { sys::cuDeviceGetPCIBusId(buffer, len, device) }
    })?
    .to_lowercase();
    let mut mode = sys::CUmoduleLoadingMode::CU_MODULE_LAZY_LOADING;
    // SAFETY: the driver is initialised; `mode` is there to be written.
    check(unsafe { sys::cuModuleGetLoadingMode(&mut mode) })?;
    let (link, numa_node) = (pci::Link::of(&bus), pci::numa_node(&bus));
    Ok(Info {
        name,
        compute_capability: (
            attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        memory_bytes: total as u64,
        cuda: cuda_version(version),
        driver: pci::driver_version(),
        pci_bus_id: Some(bus),
        link,
        numa_node,
        eager_modules: mode == sys::CUmoduleLoadingMode::CU_MODULE_EAGER_LOADING,
    })
}

fn attribute(device: CUdevice, attribute: Attribute) -> Outcome<i32> {
    let mut value = 0;
    // SAFETY: a device of this driver; `value` is there to be written.
    check(unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, device) })?;
    Ok(value)
}

/// What `ask` writes to a buffer of its second argument's length.
fn text(ask: impl FnOnce(*mut c_char, c_int) -> CUresult) -> Outcome<String> {
    let mut buffer = [0u8; 256];
    check(ask(buffer.as_mut_ptr().cast(), buffer.len() as c_int))?;
    let text = CStr::from_bytes_until_nul(&buffer).unwrap_or_default();
    Ok(text.to_string_lossy().into_owned())
}

fn check(code: CUresult) -> Outcome<()> {
    if code == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let word = |ask: unsafe fn(CUresult, *mut *const c_char) -> CUresult| {
        let mut text = std::ptr::null();
        // SAFETY: `text` is there to be written, with the address of a constant of the driver.
        match unsafe { ask(code, &mut text) } {
            // SAFETY: on success a C string that lives as long as the driver.
            CUresult::CUDA_SUCCESS => unsafe { CStr::from_ptr(text) }.to_string_lossy(),
            _ => "unknown to the driver".into(),
        }
    };
    let (name, text) = (word(sys::cuGetErrorName), word(sys::cuGetErrorString));
    Err(Failure { code: code as u32, name, text })
}

/// While it lives, the device's context is this thread's current one.
struct Current {
    pushed: bool,
}

impl Drop for Current {
    fn drop(&mut self) {
        if self.pushed {
            // SAFETY: pops what `Nvidia::current` has pushed on this thread.
            let _ = unsafe { sys::cuCtxPopCurrent_v2(&mut null_mut()) };
        }
    }
}

impl Nvidia {
    fn context(&self) -> Outcome<CUcontext> {
        let mut context = lock(&self.context);
        if let Some(context) = *context {
            return Ok(context.0);
        }
        let mut retained = null_mut();
        // SAFETY: a device of this driver; released in `drop`.
        check(unsafe { sys::cuDevicePrimaryCtxRetain(&mut retained, self.device) })?;
        *context = Some(Context(retained));
        Ok(retained)
    }

    /// Makes the context current, and what was current before again when the guard is dropped:
    /// llama.cpp's threads have a device of their own choice.
    fn current(&self) -> Outcome<Current> {
        let ours = self.context()?;
        let mut now = null_mut();
        // SAFETY: the driver is initialised; `now` is there to be written.
        check(unsafe { sys::cuCtxGetCurrent(&mut now) })?;
        if now == ours {
            return Ok(Current { pushed: false });
        }
        // SAFETY: a context that is retained until `drop`.
        check(unsafe { sys::cuCtxPushCurrent_v2(ours) })?;
        Ok(Current { pushed: true })
    }

    /// Runs a call that gives nothing back and of whose failure nothing follows.
    fn quietly(&self, call: impl FnOnce() -> CUresult) {
        if let Ok(_current) = self.current() {
            let _ = call();
        }
    }

    fn location(&self) -> sys::CUmemLocation {
        let type_ = sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE;
        sys::CUmemLocation { type_, id: self.device }
    }

    fn allocation(&self) -> sys::CUmemAllocationProp {
        sys::CUmemAllocationProp {
            type_: sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
            requestedHandleTypes: sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_NONE,
            location: self.location(),
            win32HandleMetaData: null_mut(),
            allocFlags: sys::CUmemAllocationProp_st__bindgen_ty_1 {
                compressionType: 0,
                gpuDirectRDMACapable: 0,
                usage: 0,
                reserved: [0; 4],
            },
        }
    }
}

impl Drop for Nvidia {
    fn drop(&mut self) {
        let gates = lock(&self.gates).take();
        if let Some(Kernel { module, .. }) = gates {
            // SAFETY: loaded in `prepare_gates`; streams hold the device, so no gate is under way.
            self.quietly(|| unsafe { sys::cuModuleUnload(module) });
        }
        if lock(&self.context).take().is_some() {
            // SAFETY: gives back what `context` has retained, once.
            let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
        }
    }
}

fn stream(raw: RawStream) -> sys::CUstream {
    raw.0 as sys::CUstream
}

fn event(raw: RawEvent) -> sys::CUevent {
    raw.0 as sys::CUevent
}

fn graph(raw: RawGraph) -> sys::CUgraphExec {
    raw.0 as sys::CUgraphExec
}

// Without a reason of its own, an unsafe block below is sound by the trait's contract: handles and
// addresses are the driver's, and memory outlives its copies. Results are written to locals.
impl Driver for Nvidia {
    fn memory(&self) -> Outcome<Memory> {
        let _current = self.current()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: writes two locals.
        check(unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) })?;
        Ok(Memory { free_bytes: free as u64, total_bytes: total as u64 })
    }

    fn as_current(&self, call: &mut dyn FnMut()) -> Outcome<()> {
        let _current = self.current()?;
        call();
        Ok(())
    }

    fn pin(&self, bytes: usize) -> Outcome<NonNull<u8>> {
        let _current = self.current()?;
        let mut base = null_mut();
        // SAFETY: writes a local.
        check(unsafe { sys::cuMemHostAlloc(&mut base, bytes, PORTABLE) })?;
        NonNull::new(base.cast()).ok_or_else(null)
    }

    unsafe fn unpin(&self, base: NonNull<u8>, _bytes: usize) {
        // SAFETY: by contract.
        self.quietly(|| unsafe { sys::cuMemFreeHost(base.as_ptr().cast()) });
    }

    unsafe fn register(&self, base: NonNull<u8>, bytes: usize) -> Outcome<()> {
        let _current = self.current()?;
        let base: *mut c_void = base.as_ptr().cast();
        // SAFETY: by contract.
        check(unsafe { sys::cuMemHostRegister_v2(base, bytes, REGISTER_PORTABLE) })
    }

    unsafe fn unregister(&self, base: NonNull<u8>) {
        // SAFETY: by contract.
        self.quietly(|| unsafe { sys::cuMemHostUnregister(base.as_ptr().cast()) });
    }

    fn allocate(&self, bytes: u64) -> Outcome<Address> {
        let _current = self.current()?;
        let mut at = 0;
        // SAFETY: writes a local.
        check(unsafe { sys::cuMemAlloc_v2(&mut at, bytes as usize) })?;
        Ok(at)
    }

    unsafe fn free(&self, at: Address) {
        // SAFETY: by contract.
        self.quietly(|| unsafe { sys::cuMemFree_v2(at) });
    }

    fn granularity(&self) -> Outcome<u64> {
        let _current = self.current()?;
        let supported = Attribute::CU_DEVICE_ATTRIBUTE_VIRTUAL_ADDRESS_MANAGEMENT_SUPPORTED;
        if attribute(self.device, supported)? == 0 {
            check(CUresult::CUDA_ERROR_NOT_SUPPORTED)?;
        }
        let minimum = sys::CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_MINIMUM;
        let mut bytes = 0;
        // SAFETY: reads and writes locals.
        check(unsafe {
            sys::cuMemGetAllocationGranularity(&mut bytes, &self.allocation(), minimum)
        })?;
        Ok(bytes as u64)
    }

    fn reserve(&self, bytes: u64) -> Outcome<Address> {
        let _current = self.current()?;
        let mut at = 0;
        // SAFETY: writes a local; addresses of the driver's choice.
        check(unsafe { sys::cuMemAddressReserve(&mut at, bytes as usize, 0, 0, 0) })?;
        Ok(at)
    }

    unsafe fn unreserve(&self, at: Address, bytes: u64) {
        // SAFETY: by contract.
        self.quietly(|| unsafe { sys::cuMemAddressFree(at, bytes as usize) });
    }

    fn create(&self, bytes: u64) -> Outcome<Handle> {
        let _current = self.current()?;
        let mut handle = 0;
        // SAFETY: reads and writes locals.
        check(unsafe { sys::cuMemCreate(&mut handle, bytes as usize, &self.allocation(), 0) })?;
        Ok(Handle(handle))
    }

    unsafe fn destroy(&self, handle: Handle) {
        // SAFETY: by contract.
        self.quietly(|| unsafe { sys::cuMemRelease(handle.0) });
    }

    unsafe fn map(&self, at: Address, bytes: u64, handle: Handle) -> Outcome<()> {
        let _current = self.current()?;
        let bytes = bytes as usize;
        // SAFETY: by contract.
        check(unsafe { sys::cuMemMap(at, bytes, 0, handle.0, 0) })?;
        let flags = sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
        let access = sys::CUmemAccessDesc { location: self.location(), flags };
        // SAFETY: by contract; reads a local.
        check(unsafe { sys::cuMemSetAccess(at, bytes, &access, 1) }).inspect_err(|_| {
            // SAFETY: mapped above, and nobody has had access yet.
            let _ = unsafe { sys::cuMemUnmap(at, bytes) };
        })
    }

    unsafe fn unmap(&self, at: Address, bytes: u64) -> Outcome<()> {
        let _current = self.current()?;
        // SAFETY: by contract.
        check(unsafe { sys::cuMemUnmap(at, bytes as usize) })
    }

    fn stream(&self) -> Outcome<RawStream> {
        let _current = self.current()?;
        let mut stream = null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as c_uint;
        // SAFETY: writes a local.
        check(unsafe { sys::cuStreamCreate(&mut stream, flags) })?;
        Ok(RawStream(stream as usize))
    }

    unsafe fn end_stream(&self, raw: RawStream) {
        // SAFETY: by contract.
        self.quietly(|| unsafe { sys::cuStreamDestroy_v2(stream(raw)) });
    }

    unsafe fn copy(&self, raw: RawStream, copy: Copy, bytes: usize) -> Outcome<()> {
        let _current = self.current()?;
        let stream = stream(raw);
        // SAFETY: by contract.
        check(unsafe {
            match copy {
                Copy::Up { from, to } => sys::cuMemcpyHtoDAsync_v2(to, from.cast(), bytes, stream),
                Copy::UpRows { from, to, rows } => {
                    let copy = sys::CUDA_MEMCPY2D {
                        srcXInBytes: 0,
                        srcY: 0,
                        srcMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_HOST,
                        srcHost: from.cast(),
                        srcDevice: 0,
                        srcArray: null_mut(),
                        srcPitch: rows.from_pitch,
                        dstXInBytes: 0,
                        dstY: 0,
                        dstMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
                        dstHost: null_mut(),
                        dstDevice: to,
                        dstArray: null_mut(),
                        dstPitch: rows.to_pitch,
                        WidthInBytes: rows.width,
                        Height: rows.count,
                    };
                    sys::cuMemcpy2DAsync_v2(&raw const copy, stream)
                }
                Copy::Down { from, to } => {
                    sys::cuMemcpyDtoHAsync_v2(to.cast(), from, bytes, stream)
                }
                Copy::Within { from, to } => sys::cuMemcpyDtoDAsync_v2(to, from, bytes, stream),
            }
        })
    }

    unsafe fn fill(&self, raw: RawStream, to: Address, bytes: usize, value: u8) -> Outcome<()> {
        let _current = self.current()?;
        // SAFETY: by contract.
        check(unsafe { sys::cuMemsetD8Async(to, value, bytes, stream(raw)) })
    }

    unsafe fn synchronize(&self, raw: RawStream) -> Outcome<()> {
        let _current = self.current()?;
        // SAFETY: by contract.
        check(unsafe { sys::cuStreamSynchronize(stream(raw)) })
    }

    fn event(&self) -> Outcome<RawEvent> {
        let _current = self.current()?;
        let mut event = null_mut();
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as c_uint;
        // SAFETY: writes a local.
        check(unsafe { sys::cuEventCreate(&mut event, flags) })?;
        Ok(RawEvent(event as usize))
    }

    unsafe fn end_event(&self, raw: RawEvent) {
        // SAFETY: by contract.
        self.quietly(|| unsafe { sys::cuEventDestroy_v2(event(raw)) });
    }

    unsafe fn record(&self, raw: RawEvent, on: RawStream) -> Outcome<()> {
        let _current = self.current()?;
        // SAFETY: by contract.
        check(unsafe { sys::cuEventRecord(event(raw), stream(on)) })
    }

    unsafe fn wait_on(&self, on: RawStream, raw: RawEvent) -> Outcome<()> {
        let _current = self.current()?;
        // SAFETY: by contract.
        check(unsafe { sys::cuStreamWaitEvent(stream(on), event(raw), 0) })
    }

    unsafe fn is_done(&self, raw: RawEvent) -> Outcome<bool> {
        let _current = self.current()?;
        // SAFETY: by contract.
        match unsafe { sys::cuEventQuery(event(raw)) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            code => check(code).map(|()| true),
        }
    }

    unsafe fn wait_for(&self, raw: RawEvent) -> Outcome<()> {
        let _current = self.current()?;
        // SAFETY: by contract.
        check(unsafe { sys::cuEventSynchronize(event(raw)) })
    }

    unsafe fn begin_capture(&self, raw: RawStream) -> Outcome<()> {
        let _current = self.current()?;
        // Relaxed: threads that load and copy meanwhile are no business of the capture.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: by contract.
        check(unsafe { sys::cuStreamBeginCapture_v2(stream(raw), mode) })
    }

    unsafe fn end_capture(&self, raw: RawStream) -> Outcome<RawGraph> {
        let _current = self.current()?;
        let mut captured = null_mut();
        // SAFETY: by contract; writes a local.
        check(unsafe { sys::cuStreamEndCapture(stream(raw), &mut captured) })?;
        let mut graph = null_mut();
        // SAFETY: captured above; writes a local.
        let made = check(unsafe { sys::cuGraphInstantiateWithFlags(&mut graph, captured, 0) });
        // SAFETY: captured above; what was made of it stands for itself.
        let _ = unsafe { sys::cuGraphDestroy(captured) };
        made?;
        // Now, rather than with the first launch, when gates of other streams may be waiting.
        // SAFETY: made above, and launched nowhere; the stream by contract.
        let uploaded = check(unsafe { sys::cuGraphUpload(graph, stream(raw)) });
        if let Err(failure) = uploaded {
            // SAFETY: as above.
            let _ = unsafe { sys::cuGraphExecDestroy(graph) };
            return Err(failure);
        }
        Ok(RawGraph(graph as usize))
    }

    unsafe fn abandon_capture(&self, raw: RawStream) {
        let mut captured = null_mut();
        // SAFETY: by contract; writes a local.
        self.quietly(|| unsafe { sys::cuStreamEndCapture(stream(raw), &mut captured) });
        if !captured.is_null() {
            // SAFETY: captured above.
            self.quietly(|| unsafe { sys::cuGraphDestroy(captured) });
        }
    }

    unsafe fn launch(&self, raw: RawGraph, on: RawStream) -> Outcome<()> {
        let _current = self.current()?;
        // SAFETY: by contract.
        check(unsafe { sys::cuGraphLaunch(graph(raw), stream(on)) })
    }

    unsafe fn end_graph(&self, raw: RawGraph) {
        // SAFETY: by contract.
        self.quietly(|| unsafe { sys::cuGraphExecDestroy(graph(raw)) });
    }

    fn has_gates(&self) -> Outcome<bool> {
        let major = Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR;
        Ok(attribute(self.device, major)? >= GATES_NEED)
    }

    fn prepare_gates(&self) -> Outcome<()> {
        if !self.has_gates()? {
            check(CUresult::CUDA_ERROR_NOT_SUPPORTED)?;
        }
        let _current = self.current()?;
        let mut gates = lock(&self.gates);
        if gates.is_some() {
            return Ok(());
        }
        let (mut module, mut function) = (null_mut(), null_mut());
        // SAFETY: a text that ends with 0; writes a local.
        check(unsafe { sys::cuModuleLoadData(&mut module, GATE_PTX.as_ptr().cast()) })?;
        // SAFETY: the module was loaded above; writes a local.
        let found =
            check(unsafe { sys::cuModuleGetFunction(&mut function, module, c"gate".as_ptr()) });
        if let Err(failure) = found {
            // SAFETY: loaded above, and nobody else has it.
            let _ = unsafe { sys::cuModuleUnload(module) };
            return Err(failure);
        }
        *gates = Some(Kernel { module, function });
        Ok(())
    }

    unsafe fn gate(&self, raw: RawStream, mut gate: Gate) -> Outcome<()> {
        let _current = self.current()?;
        let Some(Kernel { function, .. }) = *lock(&self.gates) else {
            return check(CUresult::CUDA_ERROR_NOT_INITIALIZED);
        };
        let long = |value: &mut u64| std::ptr::from_mut(value).cast::<c_void>();
        let short = |value: &mut u32| std::ptr::from_mut(value).cast::<c_void>();
        let mut parameters = [
            long(&mut gate.numbers),
            long(&mut gate.tables),
            long(&mut gate.table),
            long(&mut gate.slots),
            long(&mut gate.passes),
            long(&mut gate.begun),
            long(&mut gate.host),
            long(&mut gate.longest),
            short(&mut gate.count),
            short(&mut gate.entries),
        ];
        let (threads, parameters) = (gate::WIDTH as c_uint, parameters.as_mut_ptr());
        // SAFETY: the kernel has these parameters, which the driver reads before it returns; the
        // memory behind them by contract.
        check(unsafe {
            let stream = stream(raw);
            sys::cuLaunchKernel(function, 1, 1, 1, threads, 1, 1, 0, stream, parameters, null_mut())
        })
    }
}

/// Success without memory, which no driver should give.
fn null() -> Failure {
    Failure { code: 999, name: "CUDA_SUCCESS".into(), text: "but the address is null".into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_written_as_users_know_them() {
        assert_eq!(cuda_version(13_000), "13.0");
        assert_eq!(cuda_version(12_080), "12.8");
    }
}

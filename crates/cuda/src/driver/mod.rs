//! What the safe face needs of a device, in the driver's terms: [`nvidia`] has it from CUDA, the
//! stand-in from host memory and threads.

use std::ptr::NonNull;

use crate::device::Memory;
use crate::error::Failure;

pub(crate) mod gate;
pub(crate) mod nvidia;

/// What a call to the driver gives.
pub(crate) type Outcome<T> = std::result::Result<T, Failure>;

/// Where something lies in the device's address space.
pub(crate) type Address = u64;

/// Physical memory on the device, by the driver's handle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Handle(pub(crate) u64);

/// A stream, by the driver's handle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RawStream(pub(crate) usize);

/// An event, by the driver's handle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RawEvent(pub(crate) usize);

/// Captured work that can be launched, by the driver's handle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RawGraph(pub(crate) usize);

/// From where to where a stream copies.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Copy {
    /// From the host to the device.
    Up { from: *const u8, to: Address },
    /// The same, row by row; rows begin at other distances on either side.
    UpRows { from: *const u8, to: Address, rows: Rows },
    /// From the device to the host.
    Down { from: Address, to: *mut u8 },
    /// On the device.
    Within { from: Address, to: Address },
}

/// Rows of bytes with something else between them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rows {
    pub(crate) count: usize,
    /// Bytes of a row.
    pub(crate) width: usize,
    /// Bytes from the start of one row to that of the next, at the source.
    pub(crate) from_pitch: usize,
    /// The same at the destination.
    pub(crate) to_pitch: usize,
}

/// One device. Every call may come from any thread.
///
/// # Safety
/// Of the unsafe calls: handles and addresses are this driver's own and not yet ended; host memory
/// stays valid, and nobody else uses it in a way that disturbs the copy, until the copy is done;
/// mapped memory is not unmapped before copies that use it are done.
pub(crate) trait Driver: Send + Sync {
    /// Free and total memory of the device.
    fn memory(&self) -> Outcome<Memory>;

    /// Calls with this device as the thread's current one, as other libraries want it.
    fn as_current(&self, call: &mut dyn FnMut()) -> Outcome<()>;

    /// Pinned host memory, aligned to a page, of unknown contents.
    fn pin(&self, bytes: usize) -> Outcome<NonNull<u8>>;
    /// Frees what `pin` gave.
    unsafe fn unpin(&self, base: NonNull<u8>, bytes: usize);
    /// Pins memory that there is already.
    unsafe fn register(&self, base: NonNull<u8>, bytes: usize) -> Outcome<()>;
    /// Takes `register` back.
    unsafe fn unregister(&self, base: NonNull<u8>);

    /// Ordinary device memory, of unknown contents.
    fn allocate(&self, bytes: u64) -> Outcome<Address>;
    /// Frees what `allocate` gave.
    unsafe fn free(&self, at: Address);

    /// What sizes of physical memory are multiples of.
    fn granularity(&self) -> Outcome<u64>;
    /// Addresses without memory.
    fn reserve(&self, bytes: u64) -> Outcome<Address>;
    /// Gives addresses back that have no memory.
    unsafe fn unreserve(&self, at: Address, bytes: u64);
    /// Physical memory without an address, of unknown contents.
    fn create(&self, bytes: u64) -> Outcome<Handle>;
    /// Frees what `create` gave and nothing maps.
    unsafe fn destroy(&self, handle: Handle);
    /// Puts physical memory of `bytes` behind reserved addresses, to be read and written.
    unsafe fn map(&self, at: Address, bytes: u64, handle: Handle) -> Outcome<()>;
    /// Takes `map` back.
    unsafe fn unmap(&self, at: Address, bytes: u64) -> Outcome<()>;

    /// A new stream, which waits for no other.
    fn stream(&self) -> Outcome<RawStream>;
    /// Ends a stream on which nothing is left to do.
    unsafe fn end_stream(&self, stream: RawStream);
    /// Puts a copy behind what the stream has to do.
    unsafe fn copy(&self, stream: RawStream, copy: Copy, bytes: usize) -> Outcome<()>;
    /// Puts the writing of `bytes` equal bytes behind what the stream has to do.
    unsafe fn fill(&self, stream: RawStream, to: Address, bytes: usize, value: u8) -> Outcome<()>;
    /// Waits until the stream has done everything.
    unsafe fn synchronize(&self, stream: RawStream) -> Outcome<()>;

    /// A new event.
    fn event(&self) -> Outcome<RawEvent>;
    /// Ends an event; what waits for it still gets it.
    unsafe fn end_event(&self, event: RawEvent);
    /// Puts the event behind what the stream has to do.
    unsafe fn record(&self, event: RawEvent, stream: RawStream) -> Outcome<()>;
    /// Makes what comes next on `stream` wait for the event.
    unsafe fn wait_on(&self, stream: RawStream, event: RawEvent) -> Outcome<()>;
    /// Whether the event has come.
    unsafe fn is_done(&self, event: RawEvent) -> Outcome<bool>;
    /// Waits until it has.
    unsafe fn wait_for(&self, event: RawEvent) -> Outcome<()>;

    /// Begins to capture what is queued on the stream, and on those that join it.
    unsafe fn begin_capture(&self, stream: RawStream) -> Outcome<()>;
    /// Ends what `begin_capture` began, also when it fails.
    unsafe fn end_capture(&self, stream: RawStream) -> Outcome<RawGraph>;
    /// The same, and forgets what was captured.
    unsafe fn abandon_capture(&self, stream: RawStream);
    /// Puts a graph behind what the stream has to do, and behind its launches before.
    unsafe fn launch(&self, graph: RawGraph, stream: RawStream) -> Outcome<()>;
    /// Ends a graph of which no launch is under way.
    unsafe fn end_graph(&self, graph: RawGraph);

    /// Does what can be done once so that gates start fast, and never wait for the device.
    fn prepare_gates(&self) -> Outcome<()>;
    /// Whether the device is new enough for that.
    fn has_gates(&self) -> Outcome<bool>;
    /// Puts a gate behind what the stream has to do, after `prepare_gates`.
    unsafe fn gate(&self, stream: RawStream, gate: gate::Gate) -> Outcome<()>;
}

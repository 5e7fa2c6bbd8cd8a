//! Streams: copies in order, on the device's own time. What a copy works on belongs to the stream
//! until an event behind the copy is seen done.

use std::collections::VecDeque;
use std::fmt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use crate::device::Device;
use crate::driver::gate::Gate;
use crate::driver::{Copy, Outcome, RawEvent, RawStream, Rows};
use crate::error::{Error, Result};
use crate::graph::Capturing;
use crate::memory::Span;
use crate::sync::lock;

/// A queue of copies, which the device works off in order, beside what other streams do.
///
/// Every call only queues, but for [`synchronize`](Self::synchronize). What was queued is seen done
/// through an [`Event`]; only then is the memory of its copies given up, by the thread that sees it.
/// A stream may be used by several threads. Dropping the last handle of it and its events waits.
pub struct Stream {
    shared: Arc<Shared>,
}

struct Shared {
    device: Device,
    raw: RawStream,
    kept: Mutex<Kept>,
}

/// What copies use that are not seen done.
#[derive(Default)]
struct Kept {
    /// Number of the next event: with it, what was queued before it is done.
    next: u64,
    items: VecDeque<(u64, Item)>,
    /// The capture that the stream is part of, or was.
    capture: Option<Arc<Capturing>>,
}

impl Kept {
    /// The number that everything queued so far is done with. What is queued from now on has a
    /// higher one: who waits for a stream does not wait for what others queue meanwhile.
    fn pass(&mut self) -> u64 {
        self.next += 1;
        self.next - 1
    }
}

/// Memory of a copy, held to be dropped later: the host's, and the device's.
pub(crate) struct Item(
    Option<Box<dyn Send>>,
    #[expect(dead_code, reason = "held for its drop")] Vec<Span>,
);

impl Device {
    /// A new stream.
    ///
    /// # Errors
    /// What the driver says.
    pub fn stream(&self) -> Result<Stream> {
        let raw = self.driver().stream().map_err(|f| f.doing("make a stream"))?;
        let shared = Shared { device: self.clone(), raw, kept: Mutex::default() };
        Ok(Stream { shared: Arc::new(shared) })
    }
}

impl Stream {
    /// Copies host memory to the device. Pinned memory: at full speed. Other memory is read, or
    /// staged by the driver, before this returns or later, as it likes.
    ///
    /// # Errors
    /// [`Error::Range`] if the lengths differ, [`Error::Config`] for memory of another device; what the driver says. `from` is dropped then.
    pub fn upload<T: AsRef<[u8]> + Send + 'static>(&self, from: T, to: Span) -> Result<()> {
        let from = Lent::new(from);
        // SAFETY: nobody uses the value through another path while it is lent.
        let bytes = unsafe { from.value.as_ref() }.as_ref();
        self.check(&to, bytes.len())?;
        let (len, copy) = (bytes.len(), Copy::Up { from: bytes.as_ptr(), to: to.address() });
        // SAFETY: the item keeps both sides in place; the host's is only read.
        unsafe { self.copy(copy, len, Item(Some(Box::new(from)), vec![to])) }
    }

    /// The same with rows of `width` bytes, as one copy: at the source they begin every `from_pitch`
    /// bytes, at the destination every `to_pitch`; each side ends with its last row. What lies
    /// between them there is not touched.
    ///
    /// # Errors
    /// As [`upload`](Self::upload); [`Error::Config`] for rows that overlap, or sides that do not
    /// have the same number of whole rows.
    pub fn upload_rows<T: AsRef<[u8]> + Send + 'static>(
        &self,
        from: T,
        from_pitch: usize,
        to: Span,
        to_pitch: usize,
        width: usize,
    ) -> Result<()> {
        self.shared.device.check_same(to.device())?;
        let from = Lent::new(from);
        // SAFETY: as in `upload`.
        let bytes = unsafe { from.value.as_ref() }.as_ref();
        let rows_of = |bytes: usize, pitch: usize| {
            let before = bytes.checked_sub(width).filter(|_| width > 0 && pitch >= width)?;
            before.is_multiple_of(pitch).then_some(before / pitch + 1)
        };
        let there = rows_of(usize::try_from(to.bytes()).unwrap_or(usize::MAX), to_pitch);
        let count = rows_of(bytes.len(), from_pitch).filter(|&count| there == Some(count));
        let Some(count) = count else {
            let (from, to) = (bytes.len(), to.bytes());
            let what = format!("{from} and {to} bytes are not the same rows of {width}");
            return Err(Error::Config(what));
        };
        let rows = Rows { count, width, from_pitch, to_pitch };
        let copy = Copy::UpRows { from: bytes.as_ptr(), to: to.address(), rows };
        // SAFETY: the item keeps both sides in place; the host's is only read.
        unsafe { self.copy(copy, count * width, Item(Some(Box::new(from)), vec![to])) }
    }

    /// Copies from the device to host memory, which comes back through [`Pending::wait`].
    ///
    /// # Errors
    /// [`Error::Range`] if the lengths differ, [`Error::Config`] for memory of another device, or a
    /// stream that is being captured; what the driver says. `to` is dropped then.
    pub fn download<T: AsMut<[u8]> + Send + 'static>(
        &self,
        from: Span,
        to: T,
    ) -> Result<Pending<T>> {
        self.check_not_capturing()?;
        let mut to = Lent::new(to);
        // SAFETY: as in `upload`.
        let bytes = unsafe { to.value.as_mut() }.as_mut();
        self.check(&from, bytes.len())?;
        let (len, copy) =
            (bytes.len(), Copy::Down { from: from.address(), to: bytes.as_mut_ptr() });
        let to = Arc::new(to);
        let item = Item(Some(Box::new(Arc::clone(&to))), vec![from]);
        // SAFETY: the item keeps both sides in place, and `Pending` looks at the host's only when
        // the copy is done.
        unsafe { self.copy(copy, len, item) }?;
        Ok(Pending { event: self.record()?, lent: to })
    }

    /// Copies on the device.
    ///
    /// # Errors
    /// [`Error::Range`] if the lengths differ, [`Error::Config`] for memory of another device; what the driver says.
    pub fn copy_within(&self, from: Span, to: Span) -> Result<()> {
        let len = usize::try_from(from.bytes()).unwrap_or(usize::MAX);
        self.check(&from, len)?;
        self.check(&to, len)?;
        let copy = Copy::Within { from: from.address(), to: to.address() };
        // SAFETY: the item keeps both sides in place.
        unsafe { self.copy(copy, len, Item(None, vec![from, to])) }
    }

    /// Sets every byte to `value`.
    ///
    /// # Errors
    /// [`Error::Config`] for memory of another device; what the driver says.
    pub fn fill(&self, to: Span, value: u8) -> Result<()> {
        self.shared.device.check_same(to.device())?;
        let (at, bytes) = (to.address(), to.bytes());
        let doing = || format!("fill {bytes} bytes of GPU memory");
        let Shared { device, raw, .. } = &*self.shared;
        // SAFETY: the span stays in place, as it is kept.
        let fill = || unsafe { device.driver().fill(*raw, at, bytes as usize, value) };
        if bytes == 0 { Ok(()) } else { self.queue(fill, doing, Item(None, vec![to])) }
    }

    /// An event behind everything that was queued so far.
    ///
    /// # Errors
    /// [`Error::Config`] for a stream that is being captured; what the driver says.
    pub fn record(&self) -> Result<Event> {
        self.check_not_capturing()?;
        let Shared { device, raw, kept } = &*self.shared;
        let created = device.driver().event().map_err(|f| f.doing("make an event"))?;
        let mut kept = lock(kept);
        let event = Event {
            stream: Arc::clone(&self.shared),
            raw: created,
            number: kept.pass(),
            done: AtomicBool::new(false),
        };
        // SAFETY: both are alive, the event with `Event`.
        let recorded = unsafe { device.driver().record(created, *raw) };
        drop(kept);
        recorded.map_err(|f| f.doing("record an event"))?;
        Ok(event)
    }

    /// Makes everything that is queued from now on wait for an event of another stream, without
    /// the program waiting.
    ///
    /// # Errors
    /// [`Error::Config`] for an event of another device; what the driver says.
    pub fn wait_for(&self, event: &Event) -> Result<()> {
        let Shared { device, raw, .. } = &*self.shared;
        device.check_same(&event.stream.device)?;
        // SAFETY: both are alive; the driver keeps what it needs of the event.
        let waits = unsafe { device.driver().wait_on(*raw, event.raw) };
        waits.map_err(|f| f.doing("let a stream wait for an event"))
    }

    /// Waits until everything that was queued is done, and gives up its memory.
    ///
    /// # Errors
    /// [`Error::Config`] for a stream that is being captured; what the driver says: an error of anything
    /// that the device did before.
    pub fn synchronize(&self) -> Result<()> {
        self.check_not_capturing()?;
        let number = lock(&self.shared.kept).pass();
        self.shared.synchronize()?;
        self.shared.give_up(number);
        Ok(())
    }

    /// Number of copies that are not seen done.
    pub fn pending(&self) -> usize {
        lock(&self.shared.kept).items.len()
    }

    /// The driver's handle of it.
    pub(crate) fn raw(&self) -> RawStream {
        self.shared.raw
    }

    pub(crate) fn device(&self) -> &Device {
        &self.shared.device
    }

    /// Queues a gate, with what has to live as long as it may run.
    ///
    /// # Safety
    /// As the driver's: `memory` keeps all memory of the gate in place, but for its numbers.
    pub(crate) unsafe fn gate<T: Send + Sync + 'static>(
        &self,
        gate: Gate,
        of: &Device,
        memory: Arc<T>,
    ) -> Result<()> {
        let Shared { device, raw, .. } = &*self.shared;
        device.check_same(of)?;
        let item = Item(Some(Box::new(memory)), Vec::new());
        // SAFETY: by contract, as the item is kept.
        self.queue(|| unsafe { device.driver().gate(*raw, gate) }, || "launch a gate".into(), item)
    }

    /// The capture that the stream is part of now.
    pub(crate) fn capturing(&self) -> Option<Arc<Capturing>> {
        let capture = lock(&self.shared.kept).capture.clone()?;
        let goes_on = lock(&capture.items).is_some();
        goes_on.then_some(capture)
    }

    /// Refuses what a capture cannot take, before the driver does, which would end the capture.
    pub(crate) fn check_not_capturing(&self) -> Result<()> {
        match self.capturing() {
            Some(_) => Err(Error::Config("not for a stream that is being captured".to_owned())),
            None => Ok(()),
        }
    }

    pub(crate) fn begin_capture(&self) -> Result<()> {
        self.check_not_capturing()?;
        let Shared { device, raw, kept } = &*self.shared;
        let mut kept = lock(kept);
        // SAFETY: the stream is alive.
        let begun = unsafe { device.driver().begin_capture(*raw) };
        begun.map_err(|f| f.doing("capture what a stream has to do"))?;
        kept.capture = Some(Arc::new(Capturing { items: Mutex::new(Some(Vec::new())) }));
        Ok(())
    }

    /// Lets `end` end the capture that was begun on this stream; with what it uses.
    pub(crate) fn end_capture<T>(&self, end: impl FnOnce() -> T) -> (T, Vec<Item>) {
        // Held over the call, so that nothing is captured whose item is not.
        let mut kept = lock(&self.shared.kept);
        let capture = kept.capture.take();
        let mut items = capture.as_ref().map(|capture| lock(&capture.items));
        let ended = end();
        let items = items.as_mut().and_then(|items| items.take()).unwrap_or_default();
        (ended, items)
    }

    /// Lets `wait` make the stream wait for something in `capture`, which it is part of from then on.
    pub(crate) fn join(
        &self,
        capture: Option<Arc<Capturing>>,
        wait: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let mut kept = lock(&self.shared.kept);
        wait()?;
        if let Some(capture) = capture.filter(|capture| lock(&capture.items).is_some()) {
            kept.capture = Some(capture);
        }
        Ok(())
    }

    /// Whether a side of a copy is of this device, and of this length.
    fn check(&self, span: &Span, bytes: usize) -> Result<()> {
        self.shared.device.check_same(span.device())?;
        if span.bytes() == bytes as u64 {
            return Ok(());
        }
        let what = format!("the other side has {bytes}");
        Err(Error::Range { offset: 0, bytes: span.bytes(), what })
    }

    /// # Safety
    /// `item` keeps the memory of both sides in place.
    unsafe fn copy(&self, copy: Copy, bytes: usize, item: Item) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let doing = || match copy {
            Copy::Up { .. } | Copy::UpRows { .. } => format!("copy {bytes} bytes to the GPU"),
            Copy::Down { .. } => format!("copy {bytes} bytes from the GPU"),
            Copy::Within { .. } => format!("copy {bytes} bytes on the GPU"),
        };
        let Shared { device, raw, .. } = &*self.shared;
        // SAFETY: by contract, as the item is kept until the copy is seen done.
        self.queue(|| unsafe { device.driver().copy(*raw, copy, bytes) }, doing, item)
    }

    /// Queues, and keeps `item` until that is seen done.
    fn queue(
        &self,
        call: impl FnOnce() -> Outcome<()>,
        doing: impl FnOnce() -> String,
        item: Item,
    ) -> Result<()> {
        // Held over the call, so that no event comes between the copy and its item.
        let mut kept = lock(&self.shared.kept);
        let capture = kept.capture.clone();
        let mut captured = capture.as_ref().map(|capture| lock(&capture.items));
        let queued = call();
        if queued.is_ok() {
            if let Some(items) = captured.as_mut().and_then(|items| items.as_mut()) {
                items.push(item);
            } else {
                let number = kept.next;
                kept.items.push_back((number, item));
            }
        }
        drop(captured);
        drop(kept);
        queued.map_err(|f| f.doing(doing()))
    }
}

impl Shared {
    fn synchronize(&self) -> Result<()> {
        // SAFETY: the stream is alive.
        let done = unsafe { self.device.driver().synchronize(self.raw) };
        done.map_err(|f| f.doing("wait for a stream"))
    }

    /// Drops what was queued before event `number`.
    fn give_up(&self, number: u64) {
        let mut kept = lock(&self.kept);
        let count = kept.items.partition_point(|(event, _)| *event <= number);
        let items = kept.items.drain(..count);
        // The device's memory within the lock: when this returns it is given up, also if another
        // thread has seen a later event. The host's outside, since that may run code of the caller's.
        let host: Vec<_> = items.map(|(_, Item(host, _))| host).collect();
        drop(kept);
        drop(host);
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // A lost device may still be copying for all we know: what it works on is never freed.
        if self.synchronize().is_err() {
            std::mem::take(&mut lock(&self.kept).items).into_iter().for_each(std::mem::forget);
        }
        // SAFETY: done with everything, or the device is lost; events hold this, so none is left.
        unsafe { self.device.driver().end_stream(self.raw) };
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Stream({} copies pending)", self.pending())
    }
}

/// A point in a stream's queue.
pub struct Event {
    stream: Arc<Shared>,
    raw: RawEvent,
    number: u64,
    done: AtomicBool,
}

impl Event {
    /// Whether the stream has come here. If so, the memory of the copies before is given up.
    ///
    /// # Errors
    /// What the driver says: an error of anything that the device did before.
    pub fn is_done(&self) -> Result<bool> {
        if self.done.load(Ordering::Acquire) {
            return Ok(true);
        }
        // SAFETY: the event is alive.
        let done = unsafe { self.stream.device.driver().is_done(self.raw) };
        let done = done.map_err(|f| f.doing("look at an event"))?;
        if done {
            self.seen();
        }
        Ok(done)
    }

    /// Waits until the stream has come here, and gives up the memory of the copies before.
    ///
    /// # Errors
    /// As [`is_done`](Self::is_done).
    pub fn wait(&self) -> Result<()> {
        if !self.done.load(Ordering::Acquire) {
            // SAFETY: the event is alive.
            let waited = unsafe { self.stream.device.driver().wait_for(self.raw) };
            waited.map_err(|f| f.doing("wait for an event"))?;
            self.seen();
        }
        Ok(())
    }

    fn seen(&self) {
        self.stream.give_up(self.number);
        self.done.store(true, Ordering::Release);
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: from `record`; the driver keeps what waiting streams need of it.
        unsafe { self.stream.device.driver().end_event(self.raw) };
    }
}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Event").field("done", &self.done).finish_non_exhaustive()
    }
}

/// A copy to host memory that is under way. Dropping it does not stop the copy.
#[derive(Debug)]
pub struct Pending<T> {
    event: Event,
    lent: Arc<Lent<T>>,
}

impl<T> Pending<T> {
    /// Whether the copy is done.
    ///
    /// # Errors
    /// As [`Event::is_done`].
    pub fn is_done(&self) -> Result<bool> {
        self.event.is_done()
    }

    /// Waits for the copy, and gives the memory back.
    ///
    /// # Errors
    /// As [`Event::wait`].
    pub fn wait(self) -> Result<T> {
        self.event.wait()?;
        Ok(self.lent.take())
    }
}

/// A value that the device may use. In a raw place of its own, because a `Box` that moves tells the
/// compiler that nobody else looks at what is in it.
#[derive(Debug)]
struct Lent<T> {
    value: NonNull<T>,
    taken: AtomicBool,
}

// SAFETY: owns the value as a box would.
unsafe impl<T: Send> Send for Lent<T> {}
// SAFETY: of what a shared reference can do, only `take` reaches the value, and that moves it to
// the one thread that is first.
unsafe impl<T: Send> Sync for Lent<T> {}

impl<T> Lent<T> {
    fn new(value: T) -> Self {
        let value = NonNull::from(Box::leak(Box::new(value)));
        Self { value, taken: AtomicBool::new(false) }
    }

    /// The value, when the device is done with it. Only once.
    fn take(&self) -> T {
        assert!(!self.taken.swap(true, Ordering::AcqRel), "a pending copy is waited for once");
        // SAFETY: from a box, and with `taken` nobody else frees it.
        *unsafe { Box::from_raw(self.value.as_ptr()) }
    }
}

impl<T> Drop for Lent<T> {
    fn drop(&mut self) {
        if !*self.taken.get_mut() {
            // SAFETY: as in `take`.
            drop(unsafe { Box::from_raw(self.value.as_ptr()) });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::standin::{Config, StandIn};

    /// Another thread's copy, queued after the waiting and before the giving up.
    #[test]
    fn what_is_queued_after_synchronizing_is_kept() {
        let stand_in = StandIn::new(Config::default()).unwrap();
        let device = stand_in.device();
        let stream = device.stream().unwrap();
        let block = device.allocate(8).unwrap();
        let upload = |at| stream.upload(vec![1; 4], block.span(at, 4).unwrap()).unwrap();
        upload(0);
        let number = lock(&stream.shared.kept).pass();
        stream.shared.synchronize().unwrap();
        let held = stand_in.hold(&stream);
        upload(4);
        stream.shared.give_up(number);
        assert_eq!(stream.pending(), 1);
        drop(held);
        stream.synchronize().unwrap();
        assert_eq!(stream.pending(), 0);
    }
}

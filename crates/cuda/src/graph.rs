//! Graphs: work that is queued once, captured, and then launched as a whole, again and again.

use std::fmt;
use std::sync::Mutex;

use crate::device::Device;
use crate::driver::{RawEvent, RawGraph};
use crate::error::{Error, Result};
use crate::stream::{Item, Stream};
use crate::sync::lock;

/// A capture, for the streams that are part of it.
#[derive(Default)]
pub(crate) struct Capturing {
    /// What the captured work uses; none when the capture has ended.
    pub(crate) items: Mutex<Option<Vec<Item>>>,
}

/// Captured work. It holds the memory of its copies, and its gates.
///
/// Dropping it waits for its last launch.
pub struct Graph {
    device: Device,
    raw: RawGraph,
    /// Comes when the last launch is done.
    done: RawEvent,
    launches: Mutex<Launches>,
    items: Vec<Item>,
}

#[derive(Default)]
struct Launches {
    any: bool,
    /// There is a launch whose end will not be known.
    lost: bool,
}

/// Ends a capture that is not ended properly.
struct Abandon<'a>(&'a Stream);

impl Drop for Abandon<'_> {
    fn drop(&mut self) {
        let (stream, driver) = (self.0, self.0.device().driver());
        stream.end_capture(|| {
            // SAFETY: the stream is alive, and its capture begun.
            unsafe { driver.abandon_capture(stream.raw()) };
        });
    }
}

impl Stream {
    /// Captures what `work` queues on this stream, and on others that wait for a [`Mark`](crate::Mark)
    /// of it and that it waits for in the end. Nothing of it runs. What has to be waited for, events
    /// and downloads, cannot be captured.
    ///
    /// # Errors
    /// That of `work`: the capture has ended then. [`Error::Config`] for a stream that is being captured;
    /// what the driver says.
    pub fn capture<E: From<Error>>(
        &self,
        work: impl FnOnce() -> Result<(), E>,
    ) -> Result<Graph, E> {
        self.begin_capture()?;
        let abandon = Abandon(self);
        work()?;
        let (device, raw) = (self.device(), self.raw());
        let done = device.driver().event().map_err(|f| f.doing("make an event"))?;
        std::mem::forget(abandon);
        // SAFETY: the stream is alive, and its capture begun.
        let (captured, items) = self.end_capture(|| unsafe { device.driver().end_capture(raw) });
        match captured {
            Ok(raw) => {
                let (device, launches) = (device.clone(), Mutex::default());
                Ok(Graph { device, raw, done, launches, items })
            }
            Err(failure) => {
                // SAFETY: from above, and never used.
                unsafe { device.driver().end_event(done) };
                Err(failure.doing("capture what a stream has to do").into())
            }
        }
    }

    /// Puts the graph behind what the stream has to do, and behind its launches before.
    ///
    /// # Errors
    /// [`Error::Config`] for a graph of another device, or a stream that is being captured; what the
    /// driver says.
    pub fn launch(&self, graph: &Graph) -> Result<()> {
        self.device().check_same(&graph.device)?;
        self.check_not_capturing()?;
        let driver = self.device().driver();
        let mut launches = lock(&graph.launches);
        // SAFETY: both are alive; the graph waits for the launch before it goes, and holds what the
        // captured work uses.
        let launched = unsafe { driver.launch(graph.raw, self.raw()) };
        launched.map_err(|f| f.doing("launch a graph"))?;
        launches.any = true;
        // SAFETY: both are alive.
        let recorded = unsafe { driver.record(graph.done, self.raw()) };
        launches.lost |= recorded.is_err();
        recorded.map_err(|f| f.doing("record an event"))
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        let driver = self.device.driver();
        let launches = std::mem::take(&mut *lock(&self.launches));
        // SAFETY: the event is alive.
        let wait = || unsafe { driver.wait_for(self.done) };
        // As with streams: a lost device may still be at work for all we know.
        if launches.lost || launches.any && wait().is_err() {
            std::mem::take(&mut self.items).into_iter().for_each(std::mem::forget);
        }
        // SAFETY: no launch is under way, or the device is lost.
        unsafe {
            driver.end_graph(self.raw);
            driver.end_event(self.done);
        }
    }
}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Graph").finish_non_exhaustive()
    }
}

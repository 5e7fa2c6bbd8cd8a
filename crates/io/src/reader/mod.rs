//! The face of the crate: open files, submit extents, receive bytes.

mod job;
mod queue;
mod reaper;

use std::collections::BTreeMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};
use std::thread::{JoinHandle, ThreadId};

pub use job::Ticket;
pub use queue::Priority;

use self::job::{Job, sink_panicked};
use self::queue::{Chore, Queue};
use self::reaper::Shared;
use crate::engine::{self, Engine, EngineKind};
use crate::error::{Error, Result};
use crate::file::{DirectState, File, FileId};
use crate::plan::{Layout, Plan, Wanted};
use crate::ring::{PAGE, Ring};
use crate::sink::{Chunk, Place, Sink};
use crate::sync::lock;
use crate::wrap::{Latency, Monitor};

/// A byte range of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Extent {
    /// The file, from [`Reader::open`].
    pub file: FileId,
    /// First byte.
    pub offset: u64,
    /// Length in bytes; may be zero.
    pub len: u64,
}

/// The [reason](Status::reason) of reads that go through the page cache because the engine that was asked
/// for does so.
pub const AS_ASKED: &str = "reading through the page cache, as asked";

/// Puts wrappers around the engine that was started.
pub type Wrap = Box<dyn FnOnce(Box<dyn Engine>) -> Box<dyn Engine> + Send>;

/// How a [`Reader`] is built.
pub struct Config {
    /// The mechanism.
    pub engine: EngineKind,
    /// Upper bound of the ring, in bytes. Rounded down to whole buffers; allocated at once.
    pub ring_bytes: usize,
    /// Size of a buffer, and so of the largest read, in bytes: a multiple of [`PAGE`].
    pub buffer_bytes: usize,
    /// Most reads in flight; [`Status::depth`] says how many the engine allows, which are no more
    /// than the ring has buffers. From 4 on, one of them is kept for [`Priority::Demand`].
    pub depth: usize,
    /// Registers the ring with the kernel (`uring` only). Needs room in `RLIMIT_MEMLOCK`; where
    /// that is refused the engine runs without, and [`Status::reason`] says so.
    pub register_buffers: bool,
    /// Whether weights that the page cache has may be taken from there: what is loaded once and for
    /// all, not what is streamed.
    pub use_cache: bool,
    /// Devices (`st_dev`) whose files are read through the page cache, though they could be read past
    /// it, and why. What was read is dropped from the cache, so that streaming fills no memory.
    pub dropping: BTreeMap<u64, String>,
    /// The NUMA node that the ring is to be on.
    pub numa_node: Option<u32>,
    /// Wrappers to put around the engine, see [`wrap`](crate::wrap).
    pub wrap: Option<Wrap>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            engine: EngineKind::Auto,
            ring_bytes: 64 << 20,
            buffer_bytes: 1 << 20,
            depth: 8,
            register_buffers: false,
            use_cache: true,
            dropping: BTreeMap::new(),
            numa_node: None,
            wrap: None,
        }
    }
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Config")
            .field("engine", &self.engine)
            .field("ring_bytes", &self.ring_bytes)
            .field("buffer_bytes", &self.buffer_bytes)
            .field("depth", &self.depth)
            .field("register_buffers", &self.register_buffers)
            .field("dropping", &self.dropping)
            .field("numa_node", &self.numa_node)
            .finish_non_exhaustive()
    }
}

/// The path that reads really take.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Status {
    /// The engine that runs.
    pub engine: &'static str,
    /// The engine that was asked for.
    pub requested: EngineKind,
    /// Reads of every open file go past the page cache, but for those of what it [has](Reader::open_cached).
    pub direct: bool,
    /// Why it is not all that was asked for.
    pub reason: Option<String>,
    /// Size of the ring, in bytes.
    pub ring_bytes: usize,
    /// Size of a buffer, in bytes.
    pub buffer_bytes: usize,
    /// Most reads in flight.
    pub depth: usize,
    /// Open files.
    pub files: usize,
}

/// Counters since the reader was built.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Reads that came back, failed ones included.
    pub reads: u64,
    /// Bytes that came from the drive, alignment and gaps included.
    pub bytes_read: u64,
    /// Bytes that sinks were given.
    pub bytes_wanted: u64,
    /// Reads that failed.
    pub errors: u64,
    /// Reads in flight now.
    pub in_flight: usize,
    /// Most reads ever in flight.
    pub in_flight_max: usize,
    /// Time from submission to arrival of single reads; time in the queue is not in it.
    pub latency: Latency,
}

/// Reads byte ranges of files. To be shared between threads in an [`Arc`].
///
/// Dropping it fails every unfinished request with [`Error::Closed`], waits for the drive and ends
/// its threads. Chunks that are still held stay valid.
pub struct Reader {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    thread_id: ThreadId,
    requested: EngineKind,
    fallback: Option<String>,
    uses_cache: bool,
    dropping: BTreeMap<u64, String>,
}

impl Reader {
    /// Maps the ring, starts the engine and the reader's thread.
    ///
    /// # Errors
    /// [`Error::Config`], [`Error::Ring`], or [`Error::Engine`] when an engine that was asked for
    /// by name cannot be started; `Auto` falls back.
    pub fn new(config: Config) -> Result<Self> {
        let Config { engine: requested, ring_bytes, buffer_bytes, depth, .. } = config;
        if buffer_bytes == 0 || buffer_bytes > ring_bytes {
            return Err(Error::config(format!(
                "a ring of {ring_bytes} bytes with buffers of {buffer_bytes}"
            )));
        }
        if depth == 0 {
            return Err(Error::config("no read may be in flight (depth 0)"));
        }
        let ring = Ring::on_node(buffer_bytes, ring_bytes / buffer_bytes, config.numa_node)?;
        // Reads into places need no buffer, but are held to the same number: one depth for a drive.
        let depth = depth.min(ring.count());
        let (engine, fallback) = engine::build(requested, &ring, depth, config.register_buffers)?;
        // Who wraps the engine wants to have all reads.
        let uses_cache = config.use_cache && config.wrap.is_none();
        let engine = match config.wrap {
            Some(wrap) => wrap(engine),
            None => engine,
        };
        let depth = engine.depth().clamp(1, depth);
        let shared = Arc::new(Shared {
            engine: Monitor::new(engine),
            ring: Arc::clone(&ring),
            files: RwLock::default(),
            queue: Mutex::new(Queue::new(depth)),
            bytes_wanted: AtomicU64::new(0),
            death: OnceLock::new(),
        });
        let weak = Arc::downgrade(&shared);
        ring.on_return(Box::new(move || {
            if let Some(shared) = weak.upgrade() {
                shared.wake();
            }
        }));
        let of_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("io-reader".to_owned())
            .spawn(move || of_thread.run())
            .map_err(|e| Error::Engine { engine: "reader", source: Arc::new(e) })?;
        let thread_id = thread.thread().id();
        let dropping = config.dropping;
        Ok(Self {
            shared,
            thread: Some(thread),
            thread_id,
            requested,
            fallback,
            uses_cache,
            dropping,
        })
    }

    /// Opens a file, for direct I/O where engine, file system and [`Config::dropping`] allow it;
    /// [`Reader::status`] and [`File::direct_state`] say so. It stays open as long as the reader.
    ///
    /// # Errors
    /// [`Error::Open`].
    pub fn open(&self, path: &Path) -> Result<FileId> {
        let file = if self.shared.engine.direct() {
            self.open_direct(path)?
        } else {
            File::open_buffered(path, "the engine reads through the page cache")?
        };
        let file = match self.dropping.get(&file.device_inode().0) {
            Some(why) => File::open_dropping(path, why)?,
            None => file,
        };
        self.add(file)
    }

    /// Whether weights may be [taken from the page cache](Config::use_cache); not with a
    /// [wrapper](Config::wrap).
    pub fn uses_cache(&self) -> bool {
        self.uses_cache
    }

    /// The same file once more, for reads of what the page cache has of it.
    ///
    /// # Errors
    /// [`Error::UnknownFile`] when `id` is not of this reader; [`Error::Open`].
    #[cfg(target_os = "linux")]
    pub fn open_cached(&self, id: FileId) -> Result<FileId> {
        let file = self.file(id)?;
        self.add(file.through_cache()?)
    }

    fn add(&self, file: File) -> Result<FileId> {
        let mut files = self.shared.files.write().unwrap_or_else(PoisonError::into_inner);
        let id = u32::try_from(files.len()).map_err(|_| Error::config("too many open files"))?;
        files.push(Arc::new(file));
        Ok(FileId(id))
    }

    fn open_direct(&self, path: &Path) -> Result<File> {
        let file = File::open(path)?;
        let state = file.direct_state();
        let (mem_align, align) = (state.mem_align as usize, state.offset_align as usize);
        if mem_align <= PAGE && self.shared.ring.buffer_bytes().is_multiple_of(align) {
            return Ok(file);
        }
        let reason = format!("direct reads of it want an alignment of {mem_align}/{align} bytes");
        File::open_buffered(path, &reason)
    }

    /// An open file.
    ///
    /// # Errors
    /// [`Error::UnknownFile`] when `id` is not of this reader.
    pub fn file(&self, id: FileId) -> Result<Arc<File>> {
        self.shared.file(id).ok_or(Error::UnknownFile(id))
    }

    /// The ring, to pin or register it elsewhere.
    pub fn ring(&self) -> &Arc<Ring> {
        &self.shared.ring
    }

    /// Starts reading `pieces` and returns at once. Their bytes go to `sink` as they arrive;
    /// neighbours are read together, whatever their order here. Errors go to [`Sink::done`] of
    /// the piece, those of a bad extent too.
    pub fn submit(&self, priority: Priority, pieces: Vec<Extent>, sink: Arc<dyn Sink>) -> Ticket {
        let mut settled = Vec::new();
        let mut wanted = Vec::with_capacity(pieces.len());
        // Before any lock is taken: the sink's code may use the reader.
        let asked = (0..pieces.len()).map(|piece| ask_for_place(&*sink, piece));
        let mut places: Vec<Result<Option<Place>>> = asked.collect();
        let plan = {
            let files = self.shared.files.read().unwrap_or_else(PoisonError::into_inner);
            for (piece, extent) in pieces.iter().enumerate() {
                let Extent { file, offset, len } = *extent;
                match check(extent, files.get(file.0 as usize)) {
                    Ok(_) if len == 0 => settled.push((piece, Ok(()))),
                    Ok(state) => match &mut places[piece] {
                        Err(error) => settled.push((piece, Err(error.clone()))),
                        Ok(place) => {
                            *place = place.filter(|p| p.suits(offset, len, state));
                            let in_place = place.as_ref().map(Place::in_place);
                            wanted.push(Wanted { piece, file, offset, len, in_place });
                        }
                    },
                    Err(error) => settled.push((piece, Err(error))),
                }
            }
            let layout = |id: FileId| {
                let file = &files[id.0 as usize];
                Layout { align: file.direct_state().offset_align, size: file.size() }
            };
            Plan::new(wanted, layout, self.shared.ring.buffer_bytes())
        };
        let job = Arc::new(Job::new(
            plan,
            places.into_iter().map(|p| p.unwrap_or_default()).collect(),
            pieces.iter().map(|p| p.len),
            sink,
            self.thread_id,
        ));
        let ticket = Ticket { job: Arc::clone(&job), shared: Arc::downgrade(&self.shared) };
        let has_chore = !settled.is_empty();
        let mut queue = lock(&self.shared.queue);
        if queue.closed {
            // The reader's thread died. Nobody else has seen the job.
            drop(queue);
            job.settle_all(&Error::Closed);
            return ticket;
        }
        if has_chore {
            queue.chores.push_back(Chore::Settle(Arc::clone(&job), settled));
        }
        queue.push(priority, job);
        drop(queue);
        if has_chore {
            self.shared.wake();
        }
        self.shared.pump();
        ticket
    }

    /// Reads one extent into `into`, as `Demand`, and blocks until it is there. The copy happens
    /// on the calling thread. After an error the contents of `into` are unspecified.
    ///
    /// # Errors
    /// Those of the read; [`Error::Config`] when the lengths differ; [`Error::InsideSink`].
    pub fn read(&self, extent: Extent, into: &mut [u8]) -> Result<()> {
        struct Pass(mpsc::Sender<Chunk>);
        impl Sink for Pass {
            fn chunk(&self, chunk: Chunk) {
                // The receiver lives until the sink is gone.
                let _ = self.0.send(chunk);
            }
            fn done(&self, _piece: usize, _result: Result<()>) {}
        }
        if std::thread::current().id() == self.thread_id {
            return Err(Error::InsideSink);
        }
        if into.len() as u64 != extent.len {
            let text = format!("{} bytes of room for {} bytes", into.len(), extent.len);
            return Err(Error::config(text));
        }
        let (sender, receiver) = mpsc::channel();
        let ticket = self.submit(Priority::Demand, vec![extent], Arc::new(Pass(sender)));
        for chunk in receiver {
            let at = chunk.offset as usize;
            into[at..at + chunk.len()].copy_from_slice(&chunk);
        }
        ticket.wait()
    }

    /// The path that reads really take.
    pub fn status(&self) -> Status {
        let files = self.shared.files.read().unwrap_or_else(PoisonError::into_inner);
        let engine = &self.shared.engine;
        let mut reasons: Vec<String> = self.fallback.iter().cloned().collect();
        reasons.extend(engine.remark());
        reasons.extend(self.shared.ring.remark().map(str::to_owned));
        let mut own = files.iter().filter(|file| !file.is_beside());
        match own.clone().find(|file| !file.direct_state().direct) {
            Some(file) if self.is_as_asked(file) => {
                reasons.push(AS_ASKED.to_owned());
            }
            Some(file) => {
                let why = file.direct_state().reason.as_deref().unwrap_or("unknown");
                let path = file.path().display();
                reasons.push(format!("{path} is read through the page cache: {why}"));
            }
            None => {}
        }
        Status {
            engine: engine.name(),
            requested: self.requested,
            direct: engine.direct() && own.all(|file| file.direct_state().direct),
            reason: (!reasons.is_empty()).then(|| reasons.join("; ")),
            ring_bytes: self.shared.ring.bytes(),
            buffer_bytes: self.shared.ring.buffer_bytes(),
            depth: lock(&self.shared.queue).depth,
            files: files.len(),
        }
    }

    /// Whether `file` is read through the page cache because of the engine alone.
    fn is_as_asked(&self, file: &File) -> bool {
        let by_device = self.dropping.contains_key(&file.device_inode().0);
        self.requested == EngineKind::Buffered && !by_device
    }

    /// Counters since the reader was built.
    pub fn stats(&self) -> Stats {
        let seen = self.shared.engine.counts().snapshot();
        Stats {
            reads: seen.reads,
            bytes_read: seen.bytes,
            bytes_wanted: self.shared.bytes_wanted.load(Ordering::Relaxed),
            errors: seen.errors,
            in_flight: seen.in_flight,
            in_flight_max: seen.in_flight_max,
            latency: seen.latency,
        }
    }

    /// Reads in flight now; cheaper than [`Reader::stats`].
    pub fn in_flight(&self) -> usize {
        lock(&self.shared.queue).in_flight()
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.shared.add_chore(Chore::Close);
        if let Some(thread) = self.thread.take()
            // A sink may hold the last handle; its thread cannot wait for itself.
            && thread.thread().id() != std::thread::current().id()
        {
            let _ = thread.join();
        }
    }
}

impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reader").field("status", &self.status()).finish_non_exhaustive()
    }
}

/// The place that a sink has for a piece; an error if it panics.
fn ask_for_place(sink: &dyn Sink, piece: usize) -> Result<Option<Place>> {
    let asked = catch_unwind(AssertUnwindSafe(|| sink.place(piece)));
    asked.map_err(|panic| sink_panicked(&*panic))
}

/// How `file` is read, if `extent` lies within it as it was at open.
fn check<'f>(extent: &Extent, file: Option<&'f Arc<File>>) -> Result<&'f DirectState> {
    let Extent { file: id, offset, len } = *extent;
    let file = file.ok_or(Error::UnknownFile(id))?;
    let end = offset.checked_add(len).ok_or(Error::Overflow { file: id, offset, len })?;
    if end > file.size() {
        let got = file.size().saturating_sub(offset);
        return Err(Error::Truncated { path: file.shared_path(), offset, wanted: len, got });
    }
    Ok(file.direct_state())
}

//! Engines to test, files to read, sinks that check what they are given, an engine that holds its
//! reads until told.

#![allow(dead_code)] // each file of tests uses a part

mod skip;

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::{Arc, Condvar, Mutex, OnceLock};

use tierstream_io::engine::{RawDone, RawRead};
use tierstream_io::{
    Chunk, Config, Engine, EngineKind, Error, Extent, FileId, Place, Priority, Reader, Sink, Wrap,
};

pub(crate) use self::skip::skip;

/// Engines whose bytes are checked. `Noop` is exempt: it reads nothing.
pub(crate) const READING: [EngineKind; 3] =
    [EngineKind::Uring, EngineKind::Pread, EngineKind::Buffered];

/// A reader, unless it is to run on an io_uring that the kernel refuses.
pub(crate) fn start(config: Config) -> Option<Reader> {
    match Reader::new(config) {
        Err(Error::Engine { engine: "uring", source }) => {
            skip(format_args!("no io_uring: {source}"));
            None
        }
        other => Some(other.unwrap()),
    }
}

/// A reader for tests of queues, where the mechanism does not matter.
pub(crate) fn small(buffers: usize, depth: usize, wrap: Option<Wrap>) -> Reader {
    let config = Config {
        engine: EngineKind::Pread,
        ring_bytes: buffers * 4096,
        buffer_bytes: 4096,
        depth,
        use_cache: true,
        wrap,
        ..Config::default()
    };
    Reader::new(config).unwrap()
}

pub(crate) fn extent(file: FileId, offset: u64, len: u64) -> Extent {
    Extent { file, offset, len }
}

/// Extents too far apart to share a read.
pub(crate) fn apart(file: FileId, count: u64) -> Vec<Extent> {
    (0..count).map(|n| extent(file, n * 65536, 100)).collect()
}

/// Gathers pieces; panics on a byte that arrives twice and on any call after `done`.
#[derive(Debug, Default)]
pub(crate) struct Collect(Mutex<Vec<Piece>>);

#[derive(Debug, Default)]
pub(crate) struct Piece {
    pub(crate) bytes: Vec<u8>,
    seen: Vec<bool>,
    pub(crate) result: Option<Result<(), Error>>,
}

impl Collect {
    pub(crate) fn new(lens: impl IntoIterator<Item = u64>) -> Arc<Self> {
        let piece = |len| Piece { bytes: vec![0; len], seen: vec![false; len], result: None };
        Arc::new(Self(Mutex::new(lens.into_iter().map(|len| piece(len as usize)).collect())))
    }

    /// The pieces; those that succeeded must be whole.
    pub(crate) fn take(&self) -> Vec<Piece> {
        let pieces = std::mem::take(&mut *self.0.lock().unwrap());
        for (n, piece) in pieces.iter().enumerate() {
            if let Some(Ok(())) = piece.result {
                assert!(piece.seen.iter().all(|seen| *seen), "piece {n} has holes");
            }
        }
        pieces
    }
}

impl Sink for Collect {
    fn chunk(&self, chunk: Chunk) {
        let mut pieces = self.0.lock().unwrap();
        let piece = &mut pieces[chunk.piece];
        assert!(piece.result.is_none(), "chunk after done");
        let range = chunk.offset as usize..chunk.offset as usize + chunk.len();
        assert!(!chunk.is_empty());
        assert!(piece.seen[range.clone()].iter().all(|seen| !seen), "byte given twice");
        piece.seen[range.clone()].fill(true);
        piece.bytes[range].copy_from_slice(&chunk);
    }

    fn done(&self, piece: usize, result: Result<(), Error>) {
        let before = self.0.lock().unwrap()[piece].result.replace(result);
        assert!(before.is_none(), "done called twice");
    }
}

/// Gives every piece a place, every third one that suits no drive's alignment, and looks after the
/// bytes around them.
pub(crate) struct Places {
    memory: *mut u8,
    bytes: usize,
    pieces: Vec<PlacedPiece>,
    /// Pieces of one record are this many neighbours.
    record_parts: Option<usize>,
    chunks: Mutex<Vec<usize>>,
    results: Mutex<Vec<Option<Result<(), Error>>>>,
}

struct PlacedPiece {
    at: usize,
    len: usize,
    room: usize,
}

// SAFETY: the memory is written through the places, which do not overlap, and by chunks, which come
// one at a time; it is looked at when the request is finished.
unsafe impl Send for Places {}
// SAFETY: as above.
unsafe impl Sync for Places {}

impl Places {
    const ALIGN: usize = 4096;
    const UNTOUCHED: u8 = 0xEE;

    pub(crate) fn new(extents: &[Extent]) -> Arc<Self> {
        Self::with(extents, None)
    }

    /// Every `parts` pieces are a record, and all places suit.
    pub(crate) fn of_records(extents: &[Extent], parts: usize) -> Arc<Self> {
        Self::with(extents, Some(parts))
    }

    fn with(extents: &[Extent], record_parts: Option<usize>) -> Arc<Self> {
        let mut pieces = Vec::new();
        let mut end = Self::ALIGN;
        for (n, extent) in extents.iter().enumerate() {
            let (phase, len) = (extent.offset as usize % Self::ALIGN, extent.len as usize);
            let suits = record_parts.is_some() || n % 3 < 2;
            let (phase, room) = if suits { (phase, Self::ALIGN) } else { (phase + 1, 0) };
            // A guard of a page at least in front of the room.
            let at = (end + 2 * Self::ALIGN).next_multiple_of(Self::ALIGN) + phase;
            pieces.push(PlacedPiece { at, len, room });
            end = at + len + room;
        }
        let bytes = end + 2 * Self::ALIGN;
        let layout = std::alloc::Layout::from_size_align(bytes, Self::ALIGN).unwrap();
        // SAFETY: the size is not zero.
        let memory = unsafe { std::alloc::alloc(layout) };
        // SAFETY: just allocated.
        unsafe { memory.write_bytes(Self::UNTOUCHED, bytes) };
        let chunks = Mutex::new(vec![0; extents.len()]);
        let results = Mutex::new((0..extents.len()).map(|_| None).collect());
        Arc::new(Self { memory, bytes, pieces, record_parts, chunks, results })
    }

    /// How each piece ended.
    pub(crate) fn results(&self) -> Vec<Option<Result<(), Error>>> {
        self.results.lock().unwrap().clone()
    }

    /// The bytes of a piece. Only after the end of the request.
    pub(crate) fn piece(&self, piece: usize) -> &[u8] {
        &self.all()[self.pieces[piece].at..][..self.pieces[piece].len]
    }

    /// Pieces that came in chunks.
    pub(crate) fn chunked(&self) -> Vec<bool> {
        self.chunks.lock().unwrap().iter().map(|bytes| *bytes > 0).collect()
    }

    /// Nothing was written outside of places and their rooms.
    pub(crate) fn check_guards(&self) {
        let mut at = 0;
        for piece in &self.pieces {
            let guard = &self.all()[at..piece.at - piece.room];
            assert!(guard.iter().all(|byte| *byte == Self::UNTOUCHED), "written to a guard");
            at = piece.at + piece.len + piece.room;
        }
        assert!(self.all()[at..].iter().all(|byte| *byte == Self::UNTOUCHED), "written to the end");
    }

    fn all(&self) -> &[u8] {
        // SAFETY: allocated and initialised; nobody writes any more.
        unsafe { std::slice::from_raw_parts(self.memory, self.bytes) }
    }
}

impl Sink for Places {
    fn chunk(&self, chunk: Chunk) {
        let piece = &self.pieces[chunk.piece];
        assert!(chunk.offset as usize + chunk.len() <= piece.len);
        self.chunks.lock().unwrap()[chunk.piece] += chunk.len();
        // SAFETY: within the piece.
        unsafe {
            let at = self.memory.add(piece.at + chunk.offset as usize);
            at.copy_from_nonoverlapping(chunk.as_ptr(), chunk.len());
        }
    }

    fn place(&self, piece: usize) -> Option<Place> {
        let PlacedPiece { at, room, .. } = self.pieces[piece];
        // SAFETY: each piece has its own memory, which lives as long as this sink.
        let place = unsafe { Place::new(NonNull::new(self.memory.add(at)).unwrap(), room, room) };
        let record = self.record_parts.map(|parts| (piece / parts) as u32);
        Some(record.map_or(place, |record| place.of_record(record)))
    }

    fn done(&self, piece: usize, result: Result<(), Error>) {
        if result.is_ok() {
            let chunked = self.chunks.lock().unwrap()[piece];
            assert!(chunked == 0 || chunked == self.pieces[piece].len, "partly in chunks");
        }
        let before = self.results.lock().unwrap()[piece].replace(result);
        assert!(before.is_none(), "done called twice");
    }
}

impl Drop for Places {
    fn drop(&mut self) {
        let layout = std::alloc::Layout::from_size_align(self.bytes, Self::ALIGN).unwrap();
        // SAFETY: allocated with this layout.
        unsafe { std::alloc::dealloc(self.memory, layout) };
    }
}

/// Holds submitted reads back until it is told to pass them on.
#[derive(Default)]
pub(crate) struct Gate {
    inner: OnceLock<Box<dyn Engine>>,
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Default)]
struct GateState {
    held: VecDeque<RawRead>,
    open: bool,
}

impl Gate {
    pub(crate) fn new() -> (Arc<Self>, Option<Wrap>) {
        let gate = Arc::new(Self::default());
        let inside = Arc::clone(&gate);
        let wrap: Wrap = Box::new(move |inner| {
            assert!(inside.inner.set(inner).is_ok());
            Box::new(Handle(inside))
        });
        (gate, Some(wrap))
    }

    fn inner(&self) -> &dyn Engine {
        &**self.inner.get().unwrap()
    }

    /// Waits until `count` reads are held; returns their offsets in order of submission.
    pub(crate) fn wait_held(&self, count: usize) -> Vec<u64> {
        let mut state = self.state.lock().unwrap();
        while state.held.len() < count {
            state = self.changed.wait(state).unwrap();
        }
        state.held.iter().map(RawRead::offset).collect()
    }

    pub(crate) fn release_one(&self) {
        let read = self.state.lock().unwrap().held.pop_front().expect("no read is held");
        self.inner().submit(&mut std::iter::once(read));
    }

    pub(crate) fn open(&self) {
        let held = {
            let mut state = self.state.lock().unwrap();
            state.open = true;
            std::mem::take(&mut state.held)
        };
        self.inner().submit(&mut held.into_iter());
    }
}

struct Handle(Arc<Gate>);

impl Engine for Handle {
    fn name(&self) -> &'static str {
        self.0.inner().name()
    }
    fn depth(&self) -> usize {
        self.0.inner().depth()
    }
    fn direct(&self) -> bool {
        self.0.inner().direct()
    }
    fn submit(&self, reads: &mut dyn Iterator<Item = RawRead>) {
        let mut state = self.0.state.lock().unwrap();
        if state.open {
            drop(state);
            return self.0.inner().submit(reads);
        }
        state.held.extend(reads);
        self.0.changed.notify_all();
        drop(state);
        self.0.inner().submit(&mut std::iter::empty());
    }
    fn wait(&self, done: &mut Vec<RawDone>) {
        self.0.inner().wait(done);
    }
    fn wake(&self) {
        self.0.inner().wake();
    }
}

/// Deterministic, so that a failure repeats.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

/// A file of rubbish, and the same rubbish in memory.
pub(crate) struct Fixture {
    _dir: tempfile::TempDir,
    pub(crate) path: PathBuf,
    pub(crate) bytes: Vec<u8>,
}

impl Fixture {
    pub(crate) fn new(len: usize) -> Self {
        // Not the system's folder for temporary files: that may lie in memory.
        Self::within(Path::new(env!("CARGO_TARGET_TMPDIR")), len)
    }

    pub(crate) fn within(parent: &Path, len: usize) -> Self {
        let dir = tempfile::tempdir_in(parent).unwrap();
        let path = dir.path().join("weights");
        let mut random = Random(0x9E37_79B9_7F4A_7C15);
        let bytes: Vec<u8> = (0..len).map(|_| random.below(256) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        Self { _dir: dir, path, bytes }
    }

    pub(crate) fn slice(&self, extent: &Extent) -> &[u8] {
        &self.bytes[extent.offset as usize..(extent.offset + extent.len) as usize]
    }

    /// Reads `extents` in one request, then again into places, and compares every byte.
    pub(crate) fn check(&self, reader: &Reader, priority: Priority, extents: Vec<Extent>) {
        let sink = Collect::new(extents.iter().map(|e| e.len));
        let ticket = reader.submit(priority, extents.clone(), sink.clone());
        ticket.wait().unwrap();
        for (extent, piece) in extents.iter().zip(sink.take()) {
            assert!(matches!(piece.result, Some(Ok(()))), "{extent:?} {:?}", piece.result);
            assert!(piece.bytes == self.slice(extent), "{extent:?}");
        }
        let sink = Places::new(&extents);
        reader.submit(priority, extents.clone(), sink.clone()).wait().unwrap();
        for (n, (extent, chunked)) in extents.iter().zip(sink.chunked()).enumerate() {
            assert!(matches!(sink.results()[n], Some(Ok(()))));
            assert!(sink.piece(n) == self.slice(extent), "{extent:?} in place");
            let state = reader.file(extent.file).unwrap().direct_state().clone();
            let suits = n % 3 < 2 || state.offset_align == 1;
            assert!(!(suits && chunked), "{extent:?} took the way round");
            assert!(suits || state.mem_align == 1 || chunked || extent.len == 0);
        }
        sink.check_guards();
    }
}

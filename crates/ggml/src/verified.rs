//! Weights that are compared with their checksums as they come from the drive.
//!
//! Bytes are hashed where somebody looks at them anyhow, or where they lie: in host memory when a
//! tensor, or a part of a record, has arrived there; on their way to a GPU in the ring, in the order of
//! the file.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hasher;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tierstream_io::Chunk;
use twox_hash::XxHash3_64;

use crate::error::{Error, Result};

/// What a model's weights are compared with while they are read, and how much has been.
#[derive(Debug)]
pub struct Checksums {
    /// By name.
    tensors: HashMap<String, Arc<Expected>>,
    source: Arc<ChecksumSource>,
    bytes: AtomicU64,
    nanoseconds: AtomicU64,
}

/// Where checksums are from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChecksumSource {
    /// To stand behind "does not have the checksum": `recorded on ...`.
    pub what: String,
    /// The record that they are in, if they are in one.
    pub record: Option<PathBuf>,
}

/// The checksums of a tensor, and what it takes to tell of one that is not right.
#[derive(Debug)]
struct Expected {
    name: String,
    path: PathBuf,
    /// N of `blk.N`.
    block: Option<u32>,
    /// Where each share with a checksum begins in the file, its length, and the checksum.
    offset: u64,
    stride: u64,
    share_bytes: u64,
    sums: Vec<u64>,
}

impl Checksums {
    /// `sums` are those of each tensor of `file`, in their order: of all its bytes, or of as many equal
    /// shares as there are; none if it is not compared. XXH3, 64 bits, seed 0.
    ///
    /// # Errors
    /// [`Error::Internal`] for sums of another model.
    pub fn new(
        file: &tierstream_gguf::Model,
        sums: &[Vec<u64>],
        source: ChecksumSource,
    ) -> Result<Arc<Self>> {
        let mut tensors = HashMap::with_capacity(sums.len());
        for (tensor, sums) in file.tensors().iter().zip(sums) {
            let count = sums.len() as u64;
            let extents = tensor.extents().len() as u64;
            let is_cut = count == 0 || tensor.len.is_multiple_of(count);
            if !is_cut || count > 0 && extents > 1 && extents != count {
                let what = format!("{} has {count} checksums", tensor.name);
                return Err(Error::Internal(what));
            }
            let share_bytes = tensor.len / count.max(1);
            let block = tensor.name.strip_prefix("blk.").and_then(|n| n.split('.').next());
            let expected = Expected {
                name: tensor.name.clone(),
                path: file.files()[tensor.file].path.clone(),
                block: block.and_then(|n| n.parse().ok()),
                offset: tensor.offset,
                stride: tensor.stride.unwrap_or(share_bytes),
                share_bytes,
                sums: sums.clone(),
            };
            tensors.insert(tensor.name.clone(), Arc::new(expected));
        }
        if tensors.len() != file.tensors().len() {
            return Err(Error::Internal("checksums of another model".into()));
        }
        let (bytes, nanoseconds) = (AtomicU64::new(0), AtomicU64::new(0));
        Ok(Arc::new(Self { tensors, source: source.into(), bytes, nanoseconds }))
    }

    /// Bytes of weights that had their checksums so far; what was read again counts again.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Time that this took, of all threads together.
    pub fn time(&self) -> Duration {
        Duration::from_nanos(self.nanoseconds.load(Ordering::Relaxed))
    }

    /// Of this tensor, if it is compared.
    pub(crate) fn of(self: &Arc<Self>, tensor: &str) -> Result<Option<Of>> {
        let expected = self.tensors.get(tensor);
        let expected =
            expected.ok_or_else(|| Error::Internal(format!("no checksum of {tensor}")))?;
        let of = || Of { all: self.clone(), expected: expected.clone() };
        Ok((!expected.sums.is_empty()).then(of))
    }

    fn count(&self, bytes: usize, since: Instant) {
        let took = u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        self.nanoseconds.fetch_add(took, Ordering::Relaxed);
    }
}

/// The checksums of one tensor.
#[derive(Debug, Clone)]
pub(crate) struct Of {
    all: Arc<Checksums>,
    expected: Arc<Expected>,
}

impl Of {
    /// Shares with a checksum of their own: experts, or one.
    pub(crate) fn shares(&self) -> usize {
        self.expected.sums.len()
    }

    /// Bytes of a share.
    pub(crate) fn share_bytes(&self) -> u64 {
        self.expected.share_bytes
    }

    /// Compares a share, all of whose bytes are there.
    ///
    /// # Errors
    /// [`Error::Checksum`].
    pub(crate) fn check(&self, share: usize, bytes: &[u8]) -> Result<()> {
        let start = Instant::now();
        let found = XxHash3_64::oneshot(bytes);
        self.all.count(bytes.len(), start);
        self.compare(share, found)
    }

    fn compare(&self, share: usize, found: u64) -> Result<()> {
        let Expected { name, path, block, offset, stride, share_bytes, sums } = &*self.expected;
        if sums[share] == found {
            return Ok(());
        }
        let offset = offset + share as u64 * stride;
        Err(Error::Checksum(Box::new(Mismatch {
            path: path.clone(),
            tensor: name.clone(),
            expert: (sums.len() > 1).then_some(share),
            block: *block,
            offset,
            end: offset + share_bytes,
            source: self.all.source.clone(),
        })))
    }
}

/// Weights that do not have their checksum.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Mismatch {
    /// The file.
    pub path: PathBuf,
    /// Which tensor.
    pub tensor: String,
    /// Which expert's share of it, of one that has a checksum for each.
    pub expert: Option<usize>,
    /// The N of `blk.N`, of a tensor that is a block's.
    pub block: Option<u32>,
    /// The first of the bytes that have the checksum, from the start of the file.
    pub offset: u64,
    /// One past the last of them.
    pub end: u64,
    /// Where the checksum is from.
    pub source: Arc<ChecksumSource>,
}

impl std::fmt::Display for Mismatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { path, tensor, expert, block, offset, end, source } = self;
        write!(f, "{}: damaged weights: ", path.display())?;
        match (expert, block) {
            (Some(expert), Some(block)) => write!(f, "expert {expert} of block {block}, ")?,
            (Some(expert), None) => write!(f, "expert {expert}, ")?,
            (None, _) => {}
        }
        let (end, source) = (end - 1, &source.what);
        write!(f, "tensor {tensor} (bytes {offset} to {end}) does not have the checksum {source}")
    }
}

/// Bytes of a tensor that come in its order, or of some shares of it.
pub(crate) struct Stream {
    of: Of,
    share: usize,
    /// Bytes of the share that were taken.
    taken: u64,
    sum: XxHash3_64,
}

impl Stream {
    /// Those from this share on.
    pub(crate) fn from(of: Of, share: usize) -> Self {
        Self { of, share, taken: 0, sum: XxHash3_64::new() }
    }

    /// Takes the next bytes.
    ///
    /// # Errors
    /// [`Error::Checksum`], as soon as a share is whole.
    pub(crate) fn update(&mut self, mut bytes: &[u8]) -> Result<()> {
        let start = Instant::now();
        let all = bytes.len();
        while !bytes.is_empty() {
            let left = usize::try_from(self.of.share_bytes() - self.taken).unwrap_or(usize::MAX);
            let (now, later) = bytes.split_at(left.min(bytes.len()));
            self.sum.write(now);
            self.taken += now.len() as u64;
            if self.taken == self.of.share_bytes() {
                let found = std::mem::replace(&mut self.sum, XxHash3_64::new()).finish();
                self.of.compare(self.share, found)?;
                (self.share, self.taken) = (self.share + 1, 0);
            }
            bytes = later;
        }
        self.of.all.count(all, start);
        Ok(())
    }
}

/// The same of chunks that come in any order. Those that come early are held, with their buffers of
/// the ring: what they wait for is in flight, and has a buffer.
pub(crate) struct Chunks(Mutex<(Stream, Early)>);

#[derive(Default)]
struct Early {
    next: u64,
    chunks: BTreeMap<u64, Chunk>,
}

impl Chunks {
    pub(crate) fn new(stream: Stream) -> Self {
        Self(Mutex::new((stream, Early::default())))
    }

    /// Takes a chunk of the piece.
    ///
    /// # Errors
    /// [`Error::Checksum`].
    pub(crate) fn take(&self, chunk: &Chunk) -> Result<()> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (stream, early) = &mut *state;
        if chunk.offset != early.next {
            early.chunks.insert(chunk.offset, chunk.share());
            return Ok(());
        }
        stream.update(chunk)?;
        early.next += chunk.len() as u64;
        while let Some(chunk) = early.chunks.remove(&early.next) {
            stream.update(&chunk)?;
            early.next += chunk.len() as u64;
        }
        Ok(())
    }

    /// Nothing more comes of the piece, whether all has come or not.
    pub(crate) fn end(&self) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.1.chunks.clear();
    }
}

/// The first error of several that may come.
#[derive(Debug, Default)]
pub(crate) struct First(Mutex<Option<Error>>);

impl First {
    /// Keeps an error, if it is the first.
    pub(crate) fn note(&self, result: Result<()>) {
        if let Err(error) = result {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        }
    }

    /// The error, if there is one.
    pub(crate) fn check(&self) -> Result<()> {
        let first = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        first.map_or(Ok(()), Err)
    }
}

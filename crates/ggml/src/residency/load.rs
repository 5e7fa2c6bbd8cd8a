//! Reads of records to where kernels will find them.

use std::ptr::{self, NonNull};
use std::sync::{Arc, Once};

use tierstream_io::{Chunk, Extent, FileId, Place, Priority, Sink, Ticket};

use super::below::Below;
use super::layer::Reading;
use super::{Placed, Residency, Store, index32};
use crate::error::Result;
use crate::verified::{Chunks, First, Of, Stream};

/// Parts of some records of a layer on their way.
pub(super) enum Load {
    /// Reads that are under way.
    Reads(Reads),
    /// Records that come from the tier below: when they are waited for, unless they were begun before.
    Below(Below),
}

/// What the slots of a [`Load`]'s records are numbers in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Destination {
    /// The pool.
    Slots,
    /// The area for whole layers: which of its rooms.
    Area(usize),
}

/// By which opened file an extent is read.
type Source<'a> = &'a dyn Fn(Extent) -> Extent;

/// How somebody waits.
pub(crate) struct Waits<'a> {
    /// Whether they want to give up.
    pub(crate) cancelled: &'a dyn Fn() -> bool,
    /// Waits for reads.
    pub(crate) ticket: &'a mut dyn FnMut(&Arc<Ticket>) -> Result<()>,
    /// Called once, when there is nothing left but to wait.
    pub(crate) meanwhile: &'a mut dyn FnMut() -> Result<()>,
}

impl Load {
    /// Starts to bring `parts` of the records in `placed`, whose slots are reserved for them, and
    /// backed by memory, until it has been waited for.
    pub(super) fn start(
        residency: &Arc<Residency>,
        layer: usize,
        parts: &[usize],
        placed: &[Placed],
        to: Destination,
        priority: Priority,
    ) -> Self {
        Self::start_from(residency, (layer, &|extent| extent), parts, placed, to, priority)
    }

    /// The same, of the files that the layer's source says.
    pub(super) fn start_from(
        residency: &Arc<Residency>,
        (layer, source): (usize, Source<'_>),
        parts: &[usize],
        placed: &[Placed],
        to: Destination,
        priority: Priority,
    ) -> Self {
        match &residency.below {
            None => {
                let from = (layer, source);
                Load::Reads(Reads::start(residency, from, parts, placed, to, priority))
            }
            Some(_) => Load::Below(Below::new(layer, parts, placed, to)),
        }
    }

    /// The same for nobody who waits, into slots. None if that had to wait for another context, or if
    /// the copies cannot be started.
    pub(super) fn ahead(
        residency: &Arc<Residency>,
        layer: usize,
        parts: &[usize],
        placed: &[Placed],
    ) -> Option<Self> {
        let to = Destination::Slots;
        let load = Self::start(residency, layer, parts, placed, to, Priority::Prefetch);
        if let Load::Below(below) = &load {
            // Whoever needs them there next finds room.
            let spare = residency.layers[layer].used;
            if !matches!(below.begin(residency, Priority::Prefetch, spare), Ok(true)) {
                return None;
            }
        }
        Some(load)
    }

    /// Starts what comes without waiting for another context. Whether everything is on its way.
    pub(super) fn begin(&self, residency: &Residency) -> Result<bool> {
        match self {
            Load::Reads(_) => Ok(true),
            Load::Below(below) => below.begin(residency, Priority::Demand, 0),
        }
    }

    /// Whether nothing is read or copied any more.
    pub(super) fn is_idle(&self) -> bool {
        let read = self.ticket().is_none_or(|ticket| ticket.is_finished());
        match self {
            Load::Reads(_) => read,
            Load::Below(below) => read && below.is_copied(),
        }
    }

    /// Whether there is nothing to wait for.
    pub(super) fn is_over(&self) -> bool {
        match self {
            Load::Reads(reads) => reads.ticket.is_finished(),
            Load::Below(below) => below.is_over(),
        }
    }

    /// Waits until nothing is on its way any more, without bringing what is not. Whether everything is
    /// where it was to go.
    pub(super) fn close(&self, residency: &Residency) -> bool {
        let there = match self {
            Load::Reads(_) => self.arrived(residency).is_ok(),
            Load::Below(below) => below.close(residency),
        };
        if !there && matches!(self, Load::Reads(_)) {
            // Chunks that have come are copied still. An error is met by who uses the device next.
            let _ = residency.settle();
        }
        there
    }

    /// Of its reads, to wait for them or to cancel them.
    pub(super) fn ticket(&self) -> Option<&Arc<Ticket>> {
        match self {
            Load::Reads(reads) => Some(&reads.ticket),
            Load::Below(below) => below.ticket(),
        }
    }

    /// Waits until all is where it was to go. Fails also if the file was written to since it was
    /// opened, and if something does not have its checksum.
    pub(super) fn arrived(&self, residency: &Residency) -> Result<()> {
        self.wait(
            residency,
            Waits {
                cancelled: &|| false,
                ticket: &mut |ticket| Ok(ticket.wait()?),
                meanwhile: &mut || Ok(()),
            },
        )
    }

    /// The same, waiting as `waits` does.
    pub(super) fn wait(&self, residency: &Residency, waits: Waits<'_>) -> Result<()> {
        match self {
            Load::Reads(reads) => {
                (waits.meanwhile)()?;
                (waits.ticket)(&reads.ticket)?;
                reads.arrived(residency)
            }
            Load::Below(below) => below.bring(residency, waits),
        }
    }
}

/// Reads of some parts of some records of a layer, under way.
pub(super) struct Reads {
    ticket: Arc<Ticket>,
    /// Where the parts are; almost always one file.
    files: Vec<FileId>,
    arrival: Arc<dyn Arrive>,
}

impl Reads {
    fn start(
        residency: &Arc<Residency>,
        (layer, from): (usize, Source<'_>),
        parts: &[usize],
        placed: &[Placed],
        to: Destination,
        priority: Priority,
    ) -> Self {
        let mut extents = Vec::with_capacity(placed.len() * parts.len());
        let mut targets = Vec::with_capacity(placed.len() * parts.len());
        let mut files = Vec::with_capacity(1);
        for &part in parts {
            let source = &residency.layers[layer].parts[part];
            if !files.contains(&source.file) {
                files.push(source.file);
            }
            let reading = residency.layers[layer].reading(part);
            let check = residency.checks.as_ref().map(|checks| &checks[layer][part]);
            for (record, p) in placed.iter().enumerate() {
                extents.push(from(Extent {
                    file: source.file,
                    offset: source.offset_of(p.expert),
                    len: source.bytes as u64,
                }));
                targets.push(Target {
                    data: residency.part_in(layer, part, to, p.slot),
                    record: index32(record),
                    reading,
                    bytes: source.bytes,
                    before: source.slot.position,
                    after: source.slot.room(source.bytes),
                    check: check.map(|of| (of.clone(), p.expert as usize)),
                });
            }
        }
        let residency = residency.clone();
        let arrival: Arc<dyn Arrive> = match &residency.store {
            Store::Host { .. } => {
                // The reader's thread may have all hands full with new memory while a pool is filled,
                // which somebody waits for and does nothing.
                let checked =
                    if priority == Priority::Bulk { Checked::Later } else { Checked::AtOnce };
                let (failed, later) = (First::default(), Once::new());
                Arc::new(InMemory {
                    targets,
                    checked,
                    failed,
                    later,
                    _residency: residency.clone(),
                })
            }
            Store::Vram(_) => {
                let chunks = |target: &Target| {
                    let (of, expert) = target.check.clone()?;
                    Some(Chunks::new(Stream::from(of, expert)))
                };
                let checks = targets.iter().map(chunks).collect();
                let failed = First::default();
                Arc::new(Upload { targets, checks, residency: residency.clone(), failed })
            }
        };
        let ticket = Arc::new(residency.reader.submit(priority, extents, arrival.clone()));
        Self { ticket, files, arrival }
    }

    /// Of reads that are over.
    fn arrived(&self, residency: &Residency) -> Result<()> {
        self.ticket.wait()?;
        self.arrival.settle()?;
        for &file in &self.files {
            residency.reader.file(file)?.check_unchanged()?;
        }
        Ok(())
    }
}

/// Takes records to their slots.
trait Arrive: Sink {
    /// Waits until everything that has been read, with success, is there. Fails if it is not as it
    /// should be.
    fn settle(&self) -> Result<()>;
}

/// One part of a slot.
struct Target {
    data: *mut u8,
    /// Which record of the request it is a part of.
    record: u32,
    reading: Reading,
    bytes: usize,
    /// Room of the slot in front of the part and behind it.
    before: usize,
    after: usize,
    /// What it is compared with, and which share of that it is.
    check: Option<(Of, usize)>,
}

impl Target {
    /// Where a chunk goes that begins `offset` bytes after the part.
    fn at(&self, chunk: &Chunk) -> *mut u8 {
        let offset = usize::try_from(chunk.offset).expect("a piece is smaller than memory");
        assert!(offset + chunk.len() <= self.bytes, "a chunk lies inside its piece");
        self.data.wrapping_add(offset)
    }
}

/// Slots in host memory: records are read to them, or copied there when they come another way.
struct InMemory {
    /// Where each piece goes.
    targets: Vec<Target>,
    checked: Checked,
    /// What does not have its checksum.
    failed: First,
    /// Comparing what was left to who waits.
    later: Once,
    /// Keeps the pool's memory while reads are under way.
    _residency: Arc<Residency>,
}

/// When parts of records are compared with their checksums.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Checked {
    /// As each arrives, by the reader's thread, while others are read.
    AtOnce,
    /// When all have arrived, by who waits for them.
    Later,
}

impl InMemory {
    /// Compares a piece, all of which has arrived.
    fn check(&self, piece: usize) {
        let Target { data, bytes, check, .. } = &self.targets[piece];
        let Some((of, share)) = check else { return };
        // SAFETY: a part in a slot that is reserved, all of which has arrived: nobody writes to it any
        // more, nor is the slot given away before this returns: the request is not finished before the
        // reader's thread has called this, and who waits for it holds the slot.
        let bytes = unsafe { std::slice::from_raw_parts(*data, *bytes) };
        self.failed.note(of.check(*share, bytes));
    }
}

// SAFETY: the targets are slots that this step has reserved and that nobody reads before the
// ticket is finished; the residency that owns their memory is held.
unsafe impl Send for InMemory {}
// SAFETY: distinct chunks cover distinct bytes.
unsafe impl Sync for InMemory {}

impl Sink for InMemory {
    fn chunk(&self, chunk: Chunk) {
        let to = self.targets[chunk.piece].at(&chunk);
        // SAFETY: in bounds of the slot (see `at`); see the `Send` argument.
        unsafe { ptr::copy_nonoverlapping(chunk.as_ptr(), to, chunk.len()) };
    }

    fn place(&self, piece: usize) -> Option<Place> {
        let &Target { data, record, reading, before, after, .. } = &self.targets[piece];
        // SAFETY: the slot, room and all, is reserved for this step, which does not give it back
        // before the request is finished; kernels get it when the piece has arrived. The sink
        // holds the memory. A reader that is dead fills no slot any more.
        let place = NonNull::new(data).map(|at| unsafe { Place::new(at, before, after) })?;
        match reading {
            Reading::WithRecord => Some(place.of_record(record)),
            Reading::Alone => Some(place),
            Reading::ThroughRing => None,
        }
    }

    /// What is not right is told to who asks for the record.
    fn done(&self, piece: usize, result: Result<(), tierstream_io::Error>) {
        if result.is_ok() && self.checked == Checked::AtOnce {
            self.check(piece);
        }
    }
}

impl Arrive for InMemory {
    fn settle(&self) -> Result<()> {
        if self.checked == Checked::Later {
            self.later.call_once(|| (0..self.targets.len()).for_each(|piece| self.check(piece)));
        }
        self.failed.check()
    }
}

/// Slots on a GPU: chunks are copied there as they arrive.
struct Upload {
    targets: Vec<Target>,
    /// What each piece is compared by, on its way.
    checks: Vec<Option<Chunks>>,
    residency: Arc<Residency>,
    /// What went wrong first; the reader has no place for it.
    failed: First,
}

// SAFETY: the targets are addresses on a device, which nobody reads or writes here.
unsafe impl Send for Upload {}
// SAFETY: as above.
unsafe impl Sync for Upload {}

impl Sink for Upload {
    fn chunk(&self, chunk: Chunk) {
        let Store::Vram(vram) = &self.residency.store else { return };
        let offset = self.residency.store.offset(self.targets[chunk.piece].at(&chunk));
        let check = self.checks[chunk.piece].as_ref().map(|check| (check, chunk.share()));
        self.failed.note(vram.upload_chunk(chunk, offset));
        // The copy is under way meanwhile.
        self.failed.note(check.map_or(Ok(()), |(check, chunk)| check.take(&chunk)));
    }

    fn done(&self, piece: usize, _result: Result<(), tierstream_io::Error>) {
        self.checks[piece].iter().for_each(Chunks::end);
    }
}

impl Arrive for Upload {
    fn settle(&self) -> Result<()> {
        self.failed.check()?;
        match &self.residency.store {
            Store::Host { .. } => Ok(()),
            Store::Vram(vram) => vram.settle(),
        }
    }
}

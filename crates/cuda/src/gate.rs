//! Gates: small kernels in the midst of a captured graph. A gate maps numbers (a layer's routed
//! experts) through a table in device memory to others (their slots). If all are in the table the
//! stream goes on at once, else the gate asks the host and waits for its answer, a bounded time.
//!
//! While a gate waits, nothing may be asked of the driver that waits for the whole device, loading a
//! kernel among it: see [`load_modules_eagerly`](crate::load_modules_eagerly).

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use crate::device::Device;
use crate::driver::gate as place;
use crate::error::{Error, Result};
use crate::host::Pinned;
use crate::memory::Block;
use crate::stream::{Event, Stream};

/// Numbers that one gate maps at most.
pub const GATE_WIDTH: usize = place::WIDTH;

/// Bytes of a row of numbers or slots.
const ROW: usize = 4 * GATE_WIDTH;
/// Device memory before the slots: the pass, and the last that was given up.
const PASSES: usize = ROW;

/// What a gate has come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum At {
    /// The stream has gone on: all numbers had slots, or the answer was taken.
    Passed,
    /// Some number has no slot: the gate waits for [`Gates::answer`].
    Asks,
    /// Nobody answered in time: it and all later gates of the pass have gone on with slot 0. What is
    /// computed is void, and which changes of the pass's answers are in the device's tables is not
    /// known: [`Gates::set_tables`] before the next pass.
    GaveUp,
}

/// Gates that are passed one after the other, again and again.
///
/// One pass: [`begin`](Self::begin), the launch of a graph with all gates, [`poll`](Self::poll) of
/// each gate, [`answer`](Self::answer) to those that ask. The pass was good if the last gate has
/// [passed](At::Passed). Passes do not overlap: the next begins when the last gate has passed or
/// given up.
pub struct Gates {
    memory: Arc<Memory>,
    /// Number of the pass that has begun; none is 0.
    pass: u64,
    /// The pass that each gate was answered in last.
    answered: Vec<u64>,
    /// Behind the last upload of tables, which reads `Memory::staged`.
    uploaded: Option<Event>,
}

/// What the device works with. Graphs keep it.
struct Memory {
    device: Device,
    /// The pass, the slots, the tables.
    block: Block,
    /// Where passes are begun, the gates' places, entries on their way to the device. Reached only by
    /// address.
    host: Pinned,
    tables: Vec<Table>,
    /// Entries of all tables.
    entries: usize,
}

#[derive(Debug, Clone, Copy)]
struct Table {
    /// Index of its first entry in all tables.
    start: usize,
    entries: u32,
}

impl Device {
    /// Whether there can be gates on this device: it is new enough, and kernels are loaded
    /// [before](crate::load_modules_eagerly) something waits.
    pub fn has_gates(&self) -> bool {
        self.info().eager_modules && self.driver().has_gates().unwrap_or(false)
    }

    /// Gates, one for each of `tables`, with so many entries each; all entries are -1.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::Config`] for no gates or too many entries; what the driver
    /// says, of a GPU that is older than compute capability 7.0 among it.
    pub fn gates(&self, tables: &[u32]) -> Result<Gates> {
        let mut entries = 0;
        let table = |&table: &u32| {
            let start = entries;
            entries += table as usize;
            Table { start, entries: table }
        };
        let tables: Vec<Table> = tables.iter().map(table).collect();
        if tables.is_empty() || u32::try_from(entries).is_err() {
            return Err(Error::Config(format!("{} gates of {entries} entries", tables.len())));
        }
        let prepared = self.driver().prepare_gates();
        prepared.map_err(|f| f.doing("load the gates' kernel"))?;
        let count = tables.len();
        let memory = Memory {
            device: self.clone(),
            block: self.allocate((PASSES + count * ROW + 4 * entries) as u64)?,
            host: self.pin(place::PLACES + count * place::PLACE + 4 * entries)?,
            tables,
            entries,
        };
        let gates =
            Gates { memory: Arc::new(memory), pass: 0, answered: vec![0; count], uploaded: None };
        gates.warm_up()?;
        Ok(gates)
    }
}

impl Gates {
    /// Fills the memory, and runs the kernel once: whatever the driver does only with the first
    /// launch, it does now.
    fn warm_up(&self) -> Result<()> {
        let Memory { device, block, .. } = &*self.memory;
        let stream = device.stream()?;
        let (before, tables) = (PASSES + self.len() * ROW, 4 * self.memory.entries);
        // No pass has number 0, and no pass is given up.
        stream.fill(block.span(0, before as u64)?, 0)?;
        stream.fill(block.span(8, 8)?, 0xff)?;
        stream.fill(block.span(before as u64, tables as u64)?, 0xff)?;
        let mut gate = self.gate(0, self.given(0), 0, Duration::ZERO);
        gate.begun = 0;
        // SAFETY: no numbers are read, and the stream is done before the memory can go.
        let warmed = unsafe { device.driver().gate(stream.raw(), gate) };
        warmed.map_err(|f| f.doing("launch a gate"))?;
        stream.synchronize()?;
        self.memory.place(0).word64(place::POSTED).store(0, Ordering::Relaxed);
        Ok(())
    }

    /// How many gates there are: at least one.
    #[allow(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> usize {
        self.memory.tables.len()
    }

    /// Where gate `gate` writes its slots: [`GATE_WIDTH`] i32 in device memory. Stays for as long as
    /// the gates, and graphs with them, live.
    ///
    /// # Panics
    /// If there is no such gate, as in all calls that name one.
    pub fn slots(&self, gate: usize) -> u64 {
        assert!(gate < self.len(), "gate {gate} of {}", self.len());
        self.memory.block.address() + (PASSES + gate * ROW) as u64
    }

    /// Where the device reads the numbers that were [given](Self::give): [`GATE_WIDTH`] i32 in host
    /// memory.
    ///
    /// # Panics
    /// If there is no such gate.
    pub fn given(&self, gate: usize) -> u64 {
        self.memory.place(gate).address(place::GIVEN)
    }

    /// Gives numbers in place of a router's, before the pass begins.
    ///
    /// # Panics
    /// For more than [`GATE_WIDTH`], or if there is no such gate.
    pub fn give(&mut self, gate: usize, numbers: &[i32]) {
        assert!(numbers.len() <= GATE_WIDTH, "{} numbers for a gate", numbers.len());
        self.memory.place(gate).write(place::GIVEN, numbers);
    }

    /// Puts gate `gate` behind what the stream has to do: it maps the `count` i32 at `numbers`, an
    /// address of the device or what [`given`](Self::given) says. It waits no longer than `longest`.
    /// To be captured, with the gates of a graph in their order, each once, gate 0 among them.
    ///
    /// # Safety
    /// The numbers are readable by the device whenever the gate runs.
    ///
    /// # Errors
    /// [`Error::Config`] for a stream of another device, more than [`GATE_WIDTH`] numbers, or an
    /// address that is no multiple of 4; what the driver says.
    ///
    /// # Panics
    /// If there is no such gate.
    pub unsafe fn put(
        &self,
        stream: &Stream,
        gate: usize,
        numbers: u64,
        count: usize,
        longest: Duration,
    ) -> Result<()> {
        if count > GATE_WIDTH || !numbers.is_multiple_of(4) {
            let what = format!("a gate cannot map {count} numbers at {numbers:#x}");
            return Err(Error::Config(what));
        }
        let gate = self.gate(gate, numbers, count, longest);
        // SAFETY: the stream, or its graph, keeps the memory; the numbers by contract.
        unsafe { stream.gate(gate, &self.memory.device, Arc::clone(&self.memory)) }
    }

    fn gate(&self, gate: usize, numbers: u64, count: usize, longest: Duration) -> place::Gate {
        let (memory, slots) = (&*self.memory, self.slots(gate));
        let tables = memory.block.address() + (PASSES + self.len() * ROW) as u64;
        let Table { start, entries } = memory.tables[gate];
        place::Gate {
            numbers,
            tables,
            table: tables + 4 * start as u64,
            slots,
            passes: memory.block.address(),
            begun: if gate == 0 { memory.host.base().addr().get() as u64 } else { 0 },
            host: memory.place(gate).address(0),
            longest: u64::try_from(longest.as_nanos()).unwrap_or(u64::MAX),
            count: count as u32,
            entries,
        }
    }

    /// Uploads all entries, of all tables one after the other, behind what the stream has to do.
    /// Negative ones have no slot. Waits for the upload before, if that is not done.
    ///
    /// # Errors
    /// [`Error::Config`] for another number of entries, for a stream of another device, or for one that
    /// is being captured; what the driver says.
    pub fn set_tables(&mut self, stream: &Stream, entries: &[i32]) -> Result<()> {
        if entries.len() != self.memory.entries {
            let (has, needs) = (entries.len(), self.memory.entries);
            return Err(Error::Config(format!("{has} entries for tables of {needs}")));
        }
        stream.check_not_capturing()?;
        if let Some(uploaded) = &self.uploaded {
            uploaded.wait()?;
        }
        self.uploaded = None;
        let staged = Staged(Arc::clone(&self.memory));
        // SAFETY: room for all entries; nothing reads it, the upload before is done.
        unsafe {
            let to = staged.base().cast::<i32>();
            std::ptr::copy_nonoverlapping(entries.as_ptr(), to, entries.len());
        }
        let (at, bytes) = (PASSES + self.len() * ROW, 4 * entries.len());
        stream.upload(staged, self.memory.block.span(at as u64, bytes as u64)?)?;
        self.uploaded = Some(stream.record()?);
        Ok(())
    }

    /// The next pass: before each launch of a graph with all of these gates, and after all calls of
    /// [`give`](Self::give) for it. A pass that no launch follows does no harm; a launch that follows
    /// no `begin` is void.
    pub fn begin(&mut self) {
        self.pass += 1;
        // The launch makes this, and the numbers that were given, seen by the device.
        self.memory.word64(place::BEGUN).store(self.pass, Ordering::Relaxed);
    }

    /// What gate `gate` has come to in this pass, with its numbers; none, and `numbers` as they were,
    /// if it has not been reached, or has been answered and not gone on yet.
    ///
    /// # Panics
    /// If there is no such gate.
    pub fn poll(&self, gate: usize, numbers: &mut Vec<i32>) -> Option<At> {
        let place = self.memory.place(gate);
        let place::Posted { pass, count, state } = place.posted()?;
        if pass != self.pass {
            return None;
        }
        let at = match state {
            place::State::Passed => At::Passed,
            place::State::Asks if self.answered[gate] == pass => return None,
            place::State::Asks => At::Asks,
            place::State::GaveUp => At::GaveUp,
        };
        let words = (0..count).map(|i| place.word64(place::NUMBERS + 8 * i));
        let number = |word: &AtomicU64| place::number(word.load(Ordering::Relaxed), pass);
        if words.clone().any(|word| number(word).is_none()) {
            return None;
        }
        numbers.clear();
        numbers.extend(words.filter_map(number));
        Some(at)
    }

    /// Lets a gate go on that asks: with these slots, one for each number, after the device's tables
    /// were changed: (index into all tables, entry). Of several changes of one entry the last counts.
    /// Does nothing if the gate has given up, or does not ask.
    ///
    /// # Panics
    /// For another number of slots, for more than `2 * GATE_WIDTH` changes, for one of an entry that
    /// there is not, or if there is no such gate.
    pub fn answer(&mut self, gate: usize, slots: &[i32], changes: &[(u32, i32)]) {
        let place = self.memory.place(gate);
        let (pass, asks) = (self.pass, place::State::Asks);
        let count = match place.posted() {
            Some(posted) if posted.pass == pass && posted.state == asks => posted.count,
            _ => return,
        };
        if self.answered[gate] == pass {
            return;
        }
        assert_eq!(slots.len(), count, "slots for the numbers of gate {gate}");
        assert!(changes.len() <= place::CHANGES, "{} changes in an answer", changes.len());
        place.write(place::SLOTS, slots);
        for (i, (entry, _)) in changes.iter().enumerate() {
            assert!((*entry as usize) < self.memory.entries, "entry {entry} in all tables");
            // The device makes all changes at once.
            let last = changes.iter().rev().find(|(other, _)| other == entry);
            let value = last.map_or(-1, |(_, value)| *value);
            place.write(place::CHANGE + 8 * i, &[entry.cast_signed(), value]);
        }
        place.word32(place::CHANGED).store(changes.len() as u32, Ordering::Relaxed);
        place.word64(place::ANSWERED).store(pass, Ordering::Release);
        self.answered[gate] = pass;
    }
}

impl fmt::Debug for Gates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gates({}, in pass {})", self.len(), self.pass)
    }
}

/// A gate's place on the host.
#[derive(Clone, Copy)]
struct Place<'a> {
    memory: &'a Memory,
    start: usize,
}

impl Memory {
    fn place(&self, gate: usize) -> Place<'_> {
        assert!(gate < self.tables.len(), "gate {gate} of {}", self.tables.len());
        Place { memory: self, start: place::PLACES + gate * place::PLACE }
    }

    fn word64(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: within the pinned memory, on which nobody has a reference; aligned, as all offsets
        // of u64 are multiples of 8 and the memory begins with a page. The device, and the stand-in's
        // threads, use it with atomic operations too.
        unsafe { AtomicU64::from_ptr(self.host.base().as_ptr().add(offset).cast()) }
    }

    fn word32(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: as in `word64`, for multiples of 4.
        unsafe { AtomicU32::from_ptr(self.host.base().as_ptr().add(offset).cast()) }
    }
}

impl<'a> Place<'a> {
    fn address(self, offset: usize) -> u64 {
        (self.memory.host.base().addr().get() + self.start + offset) as u64
    }

    fn word64(self, offset: usize) -> &'a AtomicU64 {
        self.memory.word64(self.start + offset)
    }

    fn word32(self, offset: usize) -> &'a AtomicU32 {
        self.memory.word32(self.start + offset)
    }

    fn posted(self) -> Option<place::Posted> {
        place::Posted::of(self.word64(place::POSTED).load(Ordering::Acquire))
    }

    fn write(self, row: usize, values: &[i32]) {
        for (i, value) in values.iter().enumerate() {
            self.word32(row + 4 * i).store(value.cast_unsigned(), Ordering::Relaxed);
        }
    }
}

/// Entries on their way to the device.
struct Staged(Arc<Memory>);

impl Staged {
    fn base(&self) -> *mut u8 {
        let offset = place::PLACES + self.0.tables.len() * place::PLACE;
        // SAFETY: within the pinned memory, or at its end if there are no entries.
        unsafe { self.0.host.base().as_ptr().add(offset) }
    }
}

impl AsRef<[u8]> for Staged {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: room for all entries, which only `set_tables` writes, when nothing reads it.
        unsafe { std::slice::from_raw_parts(self.base(), 4 * self.0.entries) }
    }
}

//! Records of a GPU's pool that come from a pool in host memory below it, and from there are copied.
//!
//! What the pool below does not have either is read into its slots first, so that it has the record
//! when the GPU's pool gives it up and asks for it again.

use std::sync::{Arc, Mutex, OnceLock};

use tierstream_cuda::Event;
use tierstream_io::{Priority, Ticket};

use super::load::{Destination, Waits};
use super::step::{Need, Placed, Step};
use super::vram::lock;
use super::{Part, Residency, Store};
use crate::error::{Error, Result};

/// Parts of records that are to come from the tier below.
pub(super) struct Below {
    layer: usize,
    parts: Vec<usize>,
    /// Where they go.
    placed: Vec<Placed>,
    to: Destination,
    state: Mutex<State>,
    /// Of the reads below, if it was begun with some.
    ticket: OnceLock<Arc<Ticket>>,
}

enum State {
    /// Nothing is on its way.
    Asked,
    Begun(Box<Begun>),
    Brought,
}

/// Records on their way.
struct Begun {
    /// Holds them below.
    step: Step,
    /// Those that are read first, and copied by who waits for them.
    load: Option<usize>,
    /// Behind the copies of the others.
    copied: Event,
}

impl Below {
    pub(super) fn new(layer: usize, parts: &[usize], placed: &[Placed], to: Destination) -> Self {
        Self {
            layer,
            parts: parts.to_vec(),
            placed: placed.to_vec(),
            to,
            state: Mutex::new(State::Asked),
            ticket: OnceLock::new(),
        }
    }

    /// Of the reads below that were begun.
    pub(super) fn ticket(&self) -> Option<&Arc<Ticket>> {
        self.ticket.get()
    }

    /// Starts to bring them, unless that has been done, and if it waits for no other context: copies
    /// what is there below, and has the rest read. Whether it has been started. `spare` slots are left to
    /// others below.
    pub(super) fn begin(&self, above: &Residency, priority: Priority, spare: u32) -> Result<bool> {
        let mut state = lock(&self.state);
        if !matches!(*state, State::Asked) {
            return Ok(true);
        }
        let below = Self::tier(above)?;
        let Some(mut step) = below.acquire_now(self.layer, &self.need(), spare) else {
            return Ok(false);
        };
        let load = (!step.arriving().is_empty()).then(|| step.load(&self.parts, 0, priority));
        let begun = self.upload(above, below, step.hits()).and_then(|()| above.uploaded());
        match begun {
            Ok(copied) => {
                if let Some(ticket) = load.and_then(|load| step.tickets(load).next()) {
                    self.ticket.get_or_init(|| ticket.clone());
                }
                *state = State::Begun(Box::new(Begun { step, load, copied }));
                Ok(true)
            }
            Err(error) => {
                // Some may have been started.
                above.settle()?;
                Err(error)
            }
        }
    }

    /// Brings them: those that are there at once, the others as they are read.
    pub(super) fn bring(&self, above: &Residency, mut waits: Waits<'_>) -> Result<()> {
        let before = std::mem::replace(&mut *lock(&self.state), State::Asked);
        match before {
            State::Asked => self.bring_all(above, &mut waits)?,
            State::Begun(begun) => self.bring_rest(above, *begun, &mut waits)?,
            State::Brought => {}
        }
        *lock(&self.state) = State::Brought;
        Ok(())
    }

    /// Whether there is nothing to wait for.
    pub(super) fn is_over(&self) -> bool {
        let read_first = matches!(&*lock(&self.state), State::Begun(begun) if begun.load.is_some());
        !read_first && self.is_copied()
    }

    /// Whether the copies that were begun are done.
    pub(super) fn is_copied(&self) -> bool {
        match &*lock(&self.state) {
            // An error is met by who waits.
            State::Begun(begun) => begun.copied.is_done().unwrap_or(true),
            State::Asked | State::Brought => true,
        }
    }

    /// Nobody waits for them: nothing is on its way any more when this returns. What was read below
    /// stays there. Whether they have been brought nevertheless.
    pub(super) fn close(&self, above: &Residency) -> bool {
        let begun = match std::mem::replace(&mut *lock(&self.state), State::Asked) {
            State::Asked => return false,
            State::Begun(begun) => *begun,
            State::Brought => return true,
        };
        let Begun { step, load, copied } = begun;
        let copied = match copied.wait() {
            Ok(()) => true,
            Err(_) => {
                // On a lost device nothing is copied any more, whatever this says.
                let _ = above.settle();
                false
            }
        };
        step.finish().is_ok() && copied && load.is_none()
    }

    fn need(&self) -> Vec<Need> {
        let need = self.placed.iter().map(|p| Need { expert: p.expert, last_row: 0 });
        let mut need: Vec<Need> = need.collect();
        need.sort_unstable_by_key(|n| n.expert);
        need
    }

    fn tier(above: &Residency) -> Result<&Arc<Residency>> {
        above.below.as_ref().ok_or_else(|| Error::Internal("no tier below".into()))
    }

    fn bring_rest(&self, above: &Residency, begun: Begun, waits: &mut Waits<'_>) -> Result<()> {
        let below = Self::tier(above)?;
        let Begun { step, load, copied } = begun;
        let brought = (waits.meanwhile)().and_then(|()| {
            let Some(load) = load else { return Ok(()) };
            step.tickets(load).try_for_each(&mut *waits.ticket)?;
            step.arrived(load)?;
            self.upload(above, below, &step.arriving()[0])
        });
        // As with all, below; there is no need to wait for what others copy.
        let settled = match load {
            None => copied.wait().map_err(Error::from),
            Some(_) => above.settle(),
        };
        brought.and(settled)?;
        step.finish()
    }

    fn bring_all(&self, above: &Residency, waits: &mut Waits<'_>) -> Result<()> {
        let below = Self::tier(above)?;
        let mut step = below.acquire(self.layer, &self.need(), None, waits.cancelled)?;
        let brought = self.bring_from(above, below, &mut step, waits);
        // The slots below are not filled anew, nor those above used, before the copies are done.
        let settled = above.settle();
        brought.and(settled)?;
        step.finish()
    }

    fn bring_from(
        &self,
        above: &Residency,
        below: &Arc<Residency>,
        step: &mut Step,
        waits: &mut Waits<'_>,
    ) -> Result<()> {
        let groups = step.arriving().to_vec();
        let start = |step: &mut Step, group| step.load(&self.parts, group, Priority::Demand);
        let mut loads = Vec::with_capacity(groups.len());
        if !groups.is_empty() {
            loads.push(start(step, 0));
        }
        self.upload(above, below, step.hits())?;
        (waits.meanwhile)()?;
        for (index, group) in groups.iter().enumerate() {
            // Groups take turns in the same slots: neighbours in different ones, unless there is
            // but one slot.
            let next = groups.get(index + 1);
            let apart =
                |next: &[Placed]| !next.iter().any(|n| group.iter().any(|p| p.slot == n.slot));
            let ahead = next.is_some_and(|next| apart(next));
            if ahead {
                loads.push(start(step, index + 1));
            }
            let (cancelled, ticket) = (waits.cancelled, &mut *waits.ticket);
            step.wait(loads[index], Waits { cancelled, ticket, meanwhile: &mut || Ok(()) })?;
            self.upload(above, below, group)?;
            if next.is_some() {
                above.settle()?;
            }
            if next.is_some() && !ahead {
                loads.push(start(step, index + 1));
            }
        }
        Ok(())
    }

    /// Starts to copy records that are in slots below: those of neighbours to neighbours together,
    /// since a copy has a cost of its own.
    pub(super) fn upload(
        &self,
        above: &Residency,
        below: &Arc<Residency>,
        there: &[Placed],
    ) -> Result<()> {
        let Store::Vram(vram) = &above.store else { return Ok(()) };
        let mut pairs: Vec<(u32, u32)> = Vec::with_capacity(there.len());
        for from in there {
            let to = self.placed.iter().find(|p| p.expert == from.expert);
            let to = to.expect("only what is to be placed was asked for");
            pairs.push((from.slot, to.slot));
        }
        pairs.sort_unstable();
        for run in pairs.chunk_by(|a, b| (a.0 + 1, a.1 + 1) == *b) {
            for &part in &self.parts {
                let (from_slot, to_slot) = run[0];
                let Part { bytes, slot, .. } = below.layers[self.layer].parts[part];
                let source = InSlots {
                    data: below.part_in(self.layer, part, Destination::Slots, from_slot),
                    bytes: (run.len() - 1) * slot.stride + bytes,
                    _residency: below.clone(),
                };
                let offset = above.store.offset(above.part_in(self.layer, part, self.to, to_slot));
                let to_stride = above.layers[self.layer].parts[part].slot.stride;
                vram.upload_rows(source, slot.stride, offset, to_stride, (run.len(), bytes))?;
            }
        }
        Ok(())
    }
}

/// A part of the records in neighbouring slots in host memory, as the source of a copy.
struct InSlots {
    data: *const u8,
    bytes: usize,
    /// Keeps the slots' memory.
    _residency: Arc<Residency>,
}

// SAFETY: nobody writes to the slots while they are pinned, which they are until the copies are done.
unsafe impl Send for InSlots {}

impl AsRef<[u8]> for InSlots {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: a part of resident records, and what lies between them in their slots: mapped
        // memory that is held, and not written to while they are pinned. After an error a slot may be
        // filled anew while the copy is under way; the driver reads it then, no code of ours, and
        // what it brings is used by nobody.
        unsafe { std::slice::from_raw_parts(self.data, self.bytes) }
    }
}

//! Residency of expert records: which record sits in which slot, and who goes when room is needed.
//!
//! Pure logic. There is no I/O, no clock and no thread in here: the caller holds a mutex, says when
//! a step begins, and moves the bytes. The runtime and the trace simulator drive the same code, so
//! what the simulator predicts is what the runtime does. Nothing allocates after [`Pool::new`], but
//! for [`Pool::resize`], and equal calls on an equal [`Config`] give equal answers.
//!
//! # Words
//!
//! A *record* is one expert of one layer, a *slot* is room for one record, a *class* is a set of
//! slots of one size: slots of a class hold records of any layer of that class. A *step* is the
//! caller's unit of time, one MoE layer of one batch. A *fault* is a request of a record that has
//! no slot.
//!
//! # The life of a slot
//!
//! ```text
//!            reserve             commit
//!     free ----------> loading ----------> resident --+
//!      ^ ^                |                           | evicted by a reserve: loading again
//!      | +---- abandon ---+                           |
//!      +----------------- evict, clear ---------------+
//! ```
//!
//! # Pins
//!
//! [`Pool::request`] (when it answers with a slot) and [`Pool::reserve`] each take one pin, and
//! every pin is given back by exactly one [`Pool::unpin`]; for the owner of a load that failed,
//! [`Pool::abandon`] is that one. A pinned slot is never evicted. Several contexts may pin one slot.
//!
//! # Floor and overflow
//!
//! A global LRU smaller than one token cycle hits nothing: each layer evicts what the next token
//! asks for first. Separate pools per layer waste room as soon as the layers differ. So each layer
//! has a *floor* of slots that no other layer can take from it, and shares the rest:
//!
//! - a free slot goes to a layer below its floor, or to any layer as long as the free slots exceed
//!   what the other layers still lack to their floors;
//! - the candidates for eviction are the unpinned residents of the layer that asks and of every
//!   layer that holds more than its floor. The [`Policy`] chooses among them, and takes a record
//!   that was used in the current step only when there is no other.
//!
//! # Slots out of use
//!
//! [`Pool::resize`] changes the number of slots while they are used. The highest go out of use, at
//! once or with their last pin: that is `free` without being given to anybody. [`Pool::end`] tells
//! from where on what is behind the slots can be taken away.
//!
//! # Where a layer's records lie
//!
//! A kernel that gets the slots from a layer's lowest to its highest pays for all that lie between,
//! so a layer's slots should lie close together. The slots of a class are divided into one
//! *region* per layer, in order, of its [even share](Pool::even_shares). A layer takes the lowest
//! free slot of its region, or when there is none the free slot nearest to it. Only the choice
//! among free slots follows the regions: the victims, and so the hit rates, are the same without
//! them. What holds:
//!
//! - In a class with a slot for every record, the record of expert `e` lies at the base of its
//!   layer's region plus `e`, and the regions are as large as the layers: the order is that of the
//!   weights in the model file. It does not matter in which order the records came. The one
//!   exception are slots of failed loads that are still pinned ([`Pool::abandon`]): a record whose
//!   place is such a slot goes elsewhere.
//! - With floors of [`Pool::even_shares`], every record lies in the region of its layer for ever
//!   (with the same exception): no layer can hold more than its floor.
//! - With lower floors a layer that takes a free slot gets one of its own region if there is one.
//!   A layer that evicts another layer's record gets that one's slot, wherever it lies; every such
//!   eviction mixes the regions, and only [`Pool::clear`] puts them in order again.
//! - After a [`Pool::resize`] all this holds of the records that came since the next
//!   [`Pool::clear`]: those from before lie where the regions were then.
//!
//! # Example
//!
//! ```
//! use tierstream_pool::{Config, LayerSpec, Lookup, Policy, Pool, Record};
//!
//! let layer = LayerSpec { class: 0, experts: 8, floor: 2, record_bytes: 1 << 20 };
//! let mut pool = Pool::new(Config {
//!     layers: vec![layer; 2],
//!     slots: vec![6],
//!     policy: Policy::Lru,
//!     seed: 0,
//! })?;
//!
//! pool.begin_step();
//! let record = Record { layer: 0, expert: 3 };
//! let slot = match pool.request(record) {
//!     Lookup::Resident(slot) => slot,
//!     Lookup::Loading(_) => unreachable!("nobody else loads here"),
//!     Lookup::Absent => {
//!         let reservation = pool.reserve(record).expect("a layer below its floor has room");
//!         // ... read the record into reservation.slot ...
//!         pool.commit(reservation.slot);
//!         reservation.slot
//!     }
//! };
//! // ... compute with the slot ...
//! pool.unpin(slot);
//! assert_eq!(pool.peek(record), Lookup::Resident(slot));
//! # Ok::<(), tierstream_pool::Error>(())
//! ```

#![forbid(unsafe_code)]

mod class;
mod config;
mod counters;
mod free;
mod policy;
mod pool;

pub use config::{Config, EVEN_CYCLES, Error, LayerSpec};
pub use counters::LayerCounters;
pub use policy::{Policy, UnknownPolicy};
pub use pool::{Lookup, Pool, Record, Reservation, Slot};

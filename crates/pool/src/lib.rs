//! Residency of expert records: which record sits in which slot, and who goes when room is needed.
//!
//! Pure logic. There is no I/O, no clock and no thread in here: the caller holds a mutex, says when
//! a step begins, and moves the bytes. The runtime and the trace simulator drive the same code, so
//! what the simulator predicts is what the runtime does. Nothing allocates after [`Pool::new`], and
//! equal calls on an equal [`Config`] give equal answers.
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
//!      +-------------- evict_layer, clear ------------+
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
mod policy;
mod pool;

pub use config::{Config, Error, LayerSpec};
pub use counters::LayerCounters;
pub use policy::{Policy, UnknownPolicy};
pub use pool::{Lookup, Pool, Record, Reservation, Slot};

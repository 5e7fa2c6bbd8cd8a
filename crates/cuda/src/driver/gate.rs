//! What a gate is to a driver, and what lies where in the memory that the host and the kernel share.
//!
//! The kernel is `gate.ptx`; the stand-in does the same in Rust. A *pass* is one run of all gates in
//! their order, and has a number. Who writes what:
//!
//! * The host begins a pass by storing its number ([`BEGUN`]). The first gate takes it from there to
//!   the device, where all others find it. If it is that of the pass before, nobody began this one:
//!   it is void.
//! * A gate writes its numbers and their count, then stores [`POSTED`], with release: the pass and a
//!   [`State`]. One that asks waits until [`ANSWERED`] is the pass, takes the answer, and posts again.
//! * The host writes an answer, then stores [`ANSWERED`], with release.
//! * A gate that nobody answers in time notes on the device that the pass is void. It and all later
//!   gates of the pass post that they have given up.

use super::Address;

/// Numbers that one gate maps at most.
pub(crate) const WIDTH: usize = 64;
/// Entries of tables that one answer changes at most.
pub(crate) const CHANGES: usize = 2 * WIDTH;

// Of a gate's place on the host, in bytes. What the device writes and what the host writes are no
// neighbours in a cache line.

/// u64: pass * 4 + [`State`].
pub(crate) const POSTED: usize = 0;
/// u32
pub(crate) const COUNT: usize = 8;
/// i32 each
pub(crate) const NUMBERS: usize = 64;
/// u64
pub(crate) const ANSWERED: usize = 320;
/// u32
pub(crate) const CHANGED: usize = 328;
/// i32 each
pub(crate) const SLOTS: usize = 384;
/// Index into all tables and value, u32 and i32 each
pub(crate) const CHANGE: usize = 640;
/// i32 each: numbers that the host gives.
pub(crate) const GIVEN: usize = 1664;
/// All of it.
pub(crate) const PLACE: usize = 2048;

/// Of the host's memory: u64, the number of the pass. The gates' places follow.
pub(crate) const BEGUN: usize = 0;
/// Where the first gate's place is.
pub(crate) const PLACES: usize = 64;

/// What a gate has come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    Passed = 1,
    Asks = 2,
    GaveUp = 3,
}

impl State {
    /// The pass and the state of what was posted; none if nothing ever was.
    pub(crate) fn of(posted: u64) -> Option<(u64, Self)> {
        let state = match posted & 3 {
            1 => Self::Passed,
            2 => Self::Asks,
            3 => Self::GaveUp,
            _ => return None,
        };
        Some((posted >> 2, state))
    }

    pub(crate) fn post(self, pass: u64) -> u64 {
        pass << 2 | self as u64
    }
}

/// One gate, in the order of the kernel's parameters.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Gate {
    /// i32 each, on the device or in pinned memory.
    pub(crate) numbers: Address,
    /// i32 each: the tables of all gates.
    pub(crate) tables: Address,
    /// i32 each: this gate's.
    pub(crate) table: Address,
    /// i32 each: what comes of the numbers.
    pub(crate) slots: Address,
    /// Two u64 on the device: the pass, and the last that was given up.
    pub(crate) passes: Address,
    /// Where the host begins passes, for the first gate; 0 for the others.
    pub(crate) begun: Address,
    /// Its place on the host.
    pub(crate) host: Address,
    /// How long it waits for an answer, in nanoseconds.
    pub(crate) longest: u64,
    /// How many numbers.
    pub(crate) count: u32,
    /// Entries of its table.
    pub(crate) entries: u32,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::nvidia::GATE_PTX;

    #[test]
    fn the_kernel_and_the_host_agree_where_everything_lies() {
        let code: String = GATE_PTX
            .lines()
            .map(|line| line.split("//").next().unwrap_or_default().to_owned() + "\n")
            .collect();
        let offsets: Vec<usize> = code
            .match_indices("%host+")
            .chain(code.match_indices("%from+"))
            .map(|(at, found)| {
                let rest = &code[at + found.len()..];
                rest[..rest.find(']').unwrap()].parse().unwrap()
            })
            .collect();
        assert_eq!(offsets, [COUNT, ANSWERED, CHANGED, NUMBERS, SLOTS]);
        assert_eq!(POSTED, 0);
        let change = [CHANGE, CHANGE + 4, CHANGE + 8 * WIDTH, CHANGE + 8 * WIDTH + 4];
        for offset in change {
            assert!(code.contains(&format!("[%at+{offset}]")), "{offset}");
        }
        assert_eq!(code.matches("[%at+").count(), change.len());
        assert!(code.contains(&format!(".reqntid {WIDTH}\n")));
        for state in [State::Passed, State::Asks, State::GaveUp] {
            assert!(code.contains(&format!("or.b64 %state, %posted, {};", state as u32)));
        }
    }

    #[test]
    fn parts_of_a_place_do_not_overlap() {
        let parts = [
            (POSTED, 8),
            (COUNT, 4),
            (NUMBERS, 4 * WIDTH),
            (ANSWERED, 8),
            (CHANGED, 4),
            (SLOTS, 4 * WIDTH),
            (CHANGE, 8 * CHANGES),
            (GIVEN, 4 * WIDTH),
            (PLACE, 0),
        ];
        assert!(parts.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0));
    }
}

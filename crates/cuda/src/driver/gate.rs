//! What a gate is to a driver, and what lies where in the memory that the host and the kernel share.
//!
//! The kernel is `gate.ptx`; the stand-in does the same in Rust. A *pass* is one run of all gates in
//! their order, and has a number. Who writes what:
//!
//! * The host begins a pass by storing its number ([`BEGUN`]). The first gate takes it from there to
//!   the device, where all others find it. If it is that of the pass before, nobody began this one:
//!   it is void.
//! * A gate writes its numbers, each with the pass, and stores [`POSTED`]: the pass, how many numbers
//!   there are, and a [`State`]. These words may be seen to come in any order. One that asks waits until
//!   [`ANSWERED`] is the pass, takes the answer, and posts again.
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

/// u64: see [`Posted`].
pub(crate) const POSTED: usize = 0;
/// u64 each: a number, and above it the lower half of the pass.
pub(crate) const NUMBERS: usize = 64;
/// u64
pub(crate) const ANSWERED: usize = 576;
/// u32
pub(crate) const CHANGED: usize = 584;
/// i32 each
pub(crate) const SLOTS: usize = 640;
/// Index into all tables and value, u32 and i32 each
pub(crate) const CHANGE: usize = 896;
/// i32 each: numbers that the host gives.
pub(crate) const GIVEN: usize = 1920;
/// All of it.
pub(crate) const PLACE: usize = 2176;

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

/// What a gate posts: the pass, 7 bits of count, 2 bits of state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Posted {
    pub(crate) pass: u64,
    pub(crate) count: usize,
    pub(crate) state: State,
}

impl Posted {
    /// None if nothing was ever posted.
    pub(crate) fn of(word: u64) -> Option<Self> {
        let state = match word & 3 {
            1 => State::Passed,
            2 => State::Asks,
            3 => State::GaveUp,
            _ => return None,
        };
        let count = (word >> 2 & 0x7f) as usize;
        Some(Self { pass: word >> 9, count: count.min(WIDTH), state })
    }

    pub(crate) fn word(self) -> u64 {
        self.pass << 9 | (self.count as u64) << 2 | self.state as u64
    }
}

/// A number as a gate writes it.
pub(crate) fn traced(number: i32, pass: u64) -> u64 {
    pass << 32 | u64::from(number.cast_unsigned())
}

/// The number, if it is of this pass.
pub(crate) fn number(traced: u64, pass: u64) -> Option<i32> {
    (traced >> 32 == pass & 0xffff_ffff).then_some((traced as u32).cast_signed())
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
        let line = |line: &'static str| line.split("//").next().unwrap_or_default();
        let code: Vec<&str> = GATE_PTX.lines().map(line).collect();
        let offsets = |of: &str| -> Vec<usize> {
            let offset = |line: &&str| {
                let rest = &line[line.find(of)? + of.len()..];
                rest[..rest.find(']')?].parse().ok()
            };
            code.iter().filter_map(offset).collect()
        };
        assert_eq!(offsets("[%host+"), [ANSWERED, CHANGED]);
        assert_eq!(offsets("[%from4+"), [SLOTS]);
        let second = CHANGE + 8 * WIDTH;
        let words = [NUMBERS, CHANGE, CHANGE + 4, second, second + 4];
        assert_eq!(offsets("[%from8+"), words);
        assert_eq!((POSTED, BEGUN), (0, 0));
        let has = |text: &str| code.iter().any(|line| line.contains(text));
        assert!(has(&format!(".reqntid {WIDTH}")));
        assert!(has("shl.b64 %posted, %pass, 9;") && has("mul.wide.u32 %at, %count, 4;"));
        for state in [State::Passed, State::Asks, State::GaveUp] {
            assert!(has(&format!("or.b64 %state, %posted, {};", state as u32)));
        }
    }

    #[test]
    fn words_say_which_pass_they_are_of() {
        for (pass, count, state) in
            [(1, 0, State::Passed), (7, WIDTH, State::Asks), (1 << 54, 1, State::GaveUp)]
        {
            let posted = Posted { pass, count, state };
            assert_eq!(Posted::of(posted.word()), Some(posted));
            for number_of in [0, -1, i32::MIN, 5] {
                let traced = traced(number_of, pass);
                assert_eq!(number(traced, pass), Some(number_of));
                assert_eq!(number(traced, pass + 1), None);
            }
        }
        assert_eq!(Posted::of(0), None);
    }

    #[test]
    fn parts_of_a_place_do_not_overlap() {
        let parts = [
            (POSTED, 8),
            (NUMBERS, 8 * WIDTH),
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

//! The stand-in's gate: what `gate.ptx` does, step by step, with one thread for all numbers.

use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::driver::Address;
use crate::driver::gate::*;

/// How often the gate only yields before it sleeps between looks.
const YIELDS: u32 = 100;
const NAP: Duration = Duration::from_micros(50);

/// Runs a gate; one that waits ends, too, when the device is `lost`.
///
/// # Safety
/// All memory of the gate is there, and aligned. What is the host's is used with atomic operations
/// alone; what is the device's by nobody else meanwhile.
pub(crate) unsafe fn run(gate: &Gate, lost: impl Fn() -> bool) {
    let device = |at: Address| at as *mut u64;
    // SAFETY: by contract.
    let [word, given_up] = [device(gate.passes), device(gate.passes + 8)];
    // SAFETY: by contract.
    let mut pass = unsafe { word.read() };
    if gate.begun != 0 {
        // SAFETY: by contract.
        let begun = unsafe { host64(gate.begun) }.load(Ordering::Relaxed);
        if begun == pass {
            // SAFETY: by contract.
            unsafe { given_up.write(pass) };
        }
        pass = begun;
        // SAFETY: by contract.
        unsafe { word.write(pass) };
    }
    // SAFETY: by contract; offsets are aligned.
    let place = |offset: usize| unsafe { host64(gate.host + offset as u64) };
    let count = gate.count as usize;
    let post = |state| place(POSTED).store(Posted { pass, count, state }.word(), Ordering::Relaxed);
    let mut slots = Vec::with_capacity(count);
    for i in 0..count {
        // SAFETY: as above. Numbers may be the host's.
        let number = unsafe { AtomicI32::from_ptr((gate.numbers + 4 * i as u64) as *mut i32) };
        let number = number.load(Ordering::Relaxed);
        place(NUMBERS + 8 * i).store(traced(number, pass), Ordering::Relaxed);
        slots.push(match number.cast_unsigned() {
            // SAFETY: within the table.
            known if known < gate.entries => unsafe {
                (gate.table as *const i32).add(known as usize).read()
            },
            _ => -1,
        });
    }
    // SAFETY: by contract.
    let void = unsafe { given_up.read() } == pass;
    let state = if void {
        State::GaveUp
    } else if slots.iter().all(|slot| *slot >= 0) {
        State::Passed
    } else {
        let start = Instant::now();
        post(State::Asks);
        let answered = place(ANSWERED);
        if wait(|| answered.load(Ordering::Acquire) == pass, start, gate.longest, lost) {
            // SAFETY: as above.
            unsafe { take_answer(gate, &mut slots) };
            State::Passed
        } else {
            // SAFETY: by contract.
            unsafe { given_up.write(pass) };
            State::GaveUp
        }
    };
    if state == State::GaveUp {
        slots.fill(0);
    }
    for (i, slot) in slots.iter().enumerate() {
        // SAFETY: as above.
        unsafe { (gate.slots as *mut i32).add(i).write(*slot) };
    }
    post(state);
}

/// Waits until `ready`, for `longest` nanoseconds; whether it came.
fn wait(ready: impl Fn() -> bool, start: Instant, longest: u64, lost: impl Fn() -> bool) -> bool {
    let mut looks = 0;
    loop {
        if ready() {
            return true;
        }
        if start.elapsed() > Duration::from_nanos(longest) || lost() {
            return false;
        }
        looks += 1;
        if looks < YIELDS { thread::yield_now() } else { thread::sleep(NAP) }
    }
}

/// # Safety
/// As [`run`].
unsafe fn take_answer(gate: &Gate, slots: &mut [i32]) {
    // SAFETY: by contract.
    let word = |offset| unsafe { host32(gate.host, offset) }.load(Ordering::Relaxed);
    for (i, slot) in slots.iter_mut().enumerate() {
        *slot = word(SLOTS + 4 * i).cast_signed();
    }
    for i in 0..word(CHANGED) as usize {
        let (entry, value) = (word(CHANGE + 8 * i), word(CHANGE + 8 * i + 4).cast_signed());
        // SAFETY: the host changes only entries that there are.
        unsafe { (gate.tables as *mut i32).add(entry as usize).write(value) };
    }
}

/// # Safety
/// A u64 of the host, aligned.
unsafe fn host64<'a>(at: Address) -> &'a AtomicU64 {
    // SAFETY: by contract.
    unsafe { AtomicU64::from_ptr(at as *mut u64) }
}

/// # Safety
/// A u32 of the host, aligned.
unsafe fn host32<'a>(place: Address, offset: usize) -> &'a AtomicU32 {
    // SAFETY: by contract.
    unsafe { AtomicU32::from_ptr((place + offset as u64) as *mut u32) }
}

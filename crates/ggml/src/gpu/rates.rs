//! How fast experts are copied to the GPU, and how fast the processor computes them: what `auto`
//! decides by.

use std::time::Duration;

use super::miss::Miss;

/// The first times of each are slow (buffers are allocated, threads woken): not counted.
const FIRST_LEFT_OUT: u32 = 1;

/// So many times of each are looked at before there is a decision.
const TRIALS: u32 = 4;

/// What seems slower is tried as often again after so many layers, since the bus and the processor
/// may have become busy or idle.
const TRIED_AGAIN_AFTER: u32 = 512;

/// Weight of a new observation.
const LEARNING: f64 = 1.0 / 8.0;

/// What was seen so far.
#[derive(Debug, Default)]
pub(super) struct Rates {
    copying: Rate,
    computing: Rate,
    /// Layers since the slower way was tried.
    since: u32,
}

#[derive(Debug, Default)]
struct Rate {
    seen: u32,
    s_per_byte: f64,
}

impl Rate {
    fn learn(&mut self, bytes: u64, time: Duration) {
        if bytes == 0 {
            return;
        }
        self.seen += 1;
        let new = time.as_secs_f64() / bytes as f64;
        if self.seen <= FIRST_LEFT_OUT + 1 {
            self.s_per_byte = new;
        } else {
            self.s_per_byte += (new - self.s_per_byte) * LEARNING;
        }
    }

    fn is_known(&self) -> bool {
        self.seen >= FIRST_LEFT_OUT + TRIALS
    }
}

impl Rates {
    /// So many bytes of experts came over the bus in this time.
    pub(super) fn copied(&mut self, bytes: u64, time: Duration) {
        self.copying.learn(bytes, time);
    }

    /// So many bytes of experts were computed with in this time.
    pub(super) fn computed(&mut self, bytes: u64, time: Duration) {
        self.computing.learn(bytes, time);
    }

    /// What to do with the next layer's misses: copy them or compute them.
    pub(super) fn choose(&mut self) -> Miss {
        if !self.copying.is_known() {
            return Miss::Copy;
        }
        if !self.computing.is_known() {
            return Miss::Compute;
        }
        let copying_is_faster = self.copying.s_per_byte <= self.computing.s_per_byte;
        self.since += 1;
        let other = self.since > TRIED_AGAIN_AFTER;
        if self.since == TRIED_AGAIN_AFTER + TRIALS {
            self.since = 0;
        }
        if copying_is_faster == other { Miss::Compute } else { Miss::Copy }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECORD: u64 = 2_600_000;

    /// Ways that are chosen with a bus and a processor of so many us a record.
    fn choices(rates: &mut Rates, copy_us: u64, compute_us: u64, layers: usize) -> [usize; 2] {
        let mut counts = [0; 2];
        for _ in 0..layers {
            match rates.choose() {
                Miss::Copy => {
                    rates.copied(3 * RECORD, Duration::from_micros(3 * copy_us));
                    counts[0] += 1;
                }
                _ => {
                    rates.computed(RECORD, Duration::from_micros(compute_us));
                    counts[1] += 1;
                }
            }
        }
        counts
    }

    #[test]
    fn the_faster_way_is_taken_after_a_few_trials() {
        let trials = (FIRST_LEFT_OUT + TRIALS) as usize;
        let slow_bus = choices(&mut Rates::default(), 200, 50, 500);
        assert_eq!(slow_bus, [trials, 500 - trials]);
        let slow_processor = choices(&mut Rates::default(), 50, 200, 500);
        assert_eq!(slow_processor, [500 - trials, trials]);
    }

    #[test]
    fn the_first_times_do_not_count() {
        let mut rates = Rates::default();
        rates.computed(RECORD, Duration::from_secs(1));
        assert_eq!(choices(&mut rates, 200, 50, 500)[0], 5);
    }

    #[test]
    fn what_has_become_faster_is_noticed() {
        let mut rates = Rates::default();
        choices(&mut rates, 200, 50, 1000);
        // The other way is tried now and then, and one good time is not trusted at once.
        let later = choices(&mut rates, 10, 50, 8 * TRIED_AGAIN_AFTER as usize);
        assert!(later[0] > 2000 && later[1] > 1000, "{later:?}");
        let busy = choices(&mut rates, 500, 50, 1000);
        assert!(busy[1] > 900, "{busy:?}");
    }

    #[test]
    fn nothing_is_learned_from_nothing() {
        let mut rates = Rates::default();
        (0..10).for_each(|_| rates.copied(0, Duration::ZERO));
        assert_eq!(rates.choose(), Miss::Copy);
        assert!(!rates.copying.is_known());
    }
}

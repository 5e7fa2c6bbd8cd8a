//! How far a load is, told from a thread of its own while the model loads.

use std::collections::VecDeque;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tierstream_io::Reader;

/// How often is told.
const EVERY: Duration = Duration::from_millis(50);

/// The rate that is told is that of so long a time.
const RATE_TIME: Duration = Duration::from_secs(1);

/// A rate of a shorter time than this is no sign of what the drive can do.
const PEAK_TIME: Duration = Duration::from_millis(500);

/// What is being loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoadStage {
    /// All that is not streamed.
    Weights,
    /// Experts that fit, read ahead of their use.
    Experts,
}

/// How far a load is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Loading {
    /// What is being loaded. The bytes are those of the stage.
    pub stage: LoadStage,
    /// Bytes that are there. Never fewer than before in the same stage.
    pub bytes_done: u64,
    /// All of them; 0 as long as that is not known.
    pub bytes_total: u64,
    /// Of the last second.
    pub bytes_per_s: f64,
    /// The most that the drive is known to deliver.
    pub limit_bytes_per_s: Option<f64>,
}

/// Is told how far a load is, twenty times a second and when it is over, on a thread of its own; returning false
/// stops the load.
pub type LoadProgress<'a> = &'a mut (dyn FnMut(Loading) -> bool + Send);

/// What a load has taken from the drive, or from the page cache.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoadRate {
    /// Bytes that were read from the drive, headers apart.
    pub bytes: u64,
    /// Bytes that the page cache had.
    pub cached_bytes: u64,
    /// Both over the time of the load, in which a GPU's start does not count: 1e9 bytes per second.
    pub gbps: f64,
    /// The most that was seen of the drive, by `doctor`, earlier loads and, if it was faster, this one. None
    /// where nothing was known before, the load was too short to compare, or the page cache had some of it.
    pub limit_gbps: Option<f64>,
}

/// Rates of what only grows.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    seen: VecDeque<(Duration, u64)>,
}

impl Meter {
    /// At `time`, there are so many bytes. Returns bytes per second of the last [`RATE_TIME`].
    pub(crate) fn push(&mut self, time: Duration, bytes: u64) -> f64 {
        self.seen.push_back((time, bytes));
        while self.seen.len() > 2 && time.saturating_sub(self.seen[1].0) >= RATE_TIME {
            self.seen.pop_front();
        }
        self.rate().unwrap_or(0.0)
    }

    fn rate(&self) -> Option<f64> {
        let ((from, had), (to, has)) = (*self.seen.front()?, *self.seen.back()?);
        let seconds = to.saturating_sub(from).as_secs_f64();
        (seconds > 0.0).then(|| has.saturating_sub(had) as f64 / seconds)
    }

    fn span(&self) -> Duration {
        match (self.seen.front(), self.seen.back()) {
            (Some(first), Some(last)) => last.0.saturating_sub(first.0),
            _ => Duration::ZERO,
        }
    }
}

/// What the loading thread and the one that tells share.
#[derive(Debug)]
pub(crate) struct Watch {
    state: Mutex<State>,
    changed: Condvar,
    stopped: AtomicBool,
    limit_bytes_per_s: Option<f64>,
}

#[derive(Debug, Clone, Copy)]
struct State {
    stage: LoadStage,
    total: u64,
    /// What the reader had given out when the stage began.
    given_before: u64,
    /// By the loader's own account, which knows of bytes that need not be read.
    share: f32,
    over: bool,
}

impl Watch {
    /// Runs `load`, and tells `progress` meanwhile what `reader` has given out. Returns the most bytes per
    /// second that it gave out for a while, too. None if `progress` says no, if only at the end.
    pub(crate) fn over<T>(
        reader: &Reader,
        limit_bytes_per_s: Option<f64>,
        progress: LoadProgress<'_>,
        load: impl FnOnce(&Watch) -> T,
    ) -> Option<(T, f64)> {
        let state = State {
            stage: LoadStage::Weights,
            total: 0,
            given_before: reader.stats().bytes_wanted,
            share: 0.0,
            over: false,
        };
        let watch = Watch {
            state: Mutex::new(state),
            changed: Condvar::new(),
            stopped: AtomicBool::new(false),
            limit_bytes_per_s,
        };
        thread::scope(|scope| {
            let telling = scope.spawn(|| watch.tell(reader, progress));
            // Also when the load panics: the scope waits for its threads.
            let ends = Ends(&watch);
            let loaded = load(&watch);
            drop(ends);
            match telling.join() {
                Ok(peak) => (!watch.stopped.load(Ordering::Relaxed)).then_some((loaded, peak)),
                Err(panic) => resume_unwind(panic),
            }
        })
    }

    /// A stage of so many bytes begins.
    pub(crate) fn begin(&self, stage: LoadStage, total: u64, reader: &Reader) {
        let given_before = reader.stats().bytes_wanted;
        *self.lock() = State { stage, total, given_before, share: 0.0, over: false };
    }

    /// The loader says that it is so far, 0 to 1. Returns whether it is to go on.
    pub(crate) fn heard(&self, share: f32) -> bool {
        let mut state = self.lock();
        state.share = state.share.max(share);
        !self.stopped.load(Ordering::Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, reader: &Reader, progress: LoadProgress<'_>) -> f64 {
        // Also if `progress` panics: nobody hears any more what it would say.
        let _stops = Stops(self);
        let (start, mut peak) = (Instant::now(), 0.0_f64);
        let (mut meter, mut last) = (Meter::default(), None);
        loop {
            let state = self.lock();
            let (state, _) = self
                .changed
                .wait_timeout_while(state, EVERY, |state| !state.over)
                .unwrap_or_else(PoisonError::into_inner);
            let now = *state;
            drop(state);
            if last.is_some_and(|(stage, _)| stage != now.stage) {
                (meter, last) = (Meter::default(), None);
            }
            let read = reader.stats().bytes_wanted - now.given_before;
            let before = last.map_or(0, |(_, done)| done);
            let done = done_bytes(&now, read).max(before);
            let bytes_per_s = meter.push(start.elapsed(), done);
            if meter.span() >= PEAK_TIME {
                peak = peak.max(bytes_per_s);
            }
            last = Some((now.stage, done));
            let loading = Loading {
                stage: now.stage,
                bytes_done: done,
                bytes_total: now.total,
                bytes_per_s,
                limit_bytes_per_s: self.limit_bytes_per_s,
            };
            if !progress(loading) {
                self.stopped.store(true, Ordering::Relaxed);
            }
            if now.over {
                return peak;
            }
        }
    }
}

/// What came from the drive, or what the loader says if that is more.
fn done_bytes(state: &State, read: u64) -> u64 {
    let told = (f64::from(state.share.clamp(0.0, 1.0)) * state.total as f64) as u64;
    read.max(told).min(state.total)
}

struct Ends<'a>(&'a Watch);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.lock().over = true;
        self.0.changed.notify_all();
    }
}

struct Stops<'a>(&'a Watch);

impl Drop for Stops<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.stopped.store(true, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use tierstream_io::{Config, EngineKind, Extent};

    use super::*;

    #[test]
    fn a_rate_is_that_of_the_last_second() {
        let mut meter = Meter::default();
        let ms = Duration::from_millis;
        assert_eq!(meter.push(ms(0), 0), 0.0);
        assert_eq!(meter.push(ms(500), 500), 1000.0);
        assert_eq!(meter.push(ms(1000), 1000), 1000.0);
        // The first second is forgotten.
        assert_eq!(meter.push(ms(1500), 3000), 2500.0);
        assert_eq!(meter.push(ms(2000), 5000), 4000.0);
        assert_eq!(meter.push(ms(9000), 5000), 0.0);
        assert_eq!(meter.push(ms(9000), 5000), 0.0);
    }

    #[test]
    fn bytes_are_those_read_or_those_that_need_not_be() {
        let state = |share| State {
            stage: LoadStage::Weights,
            total: 1000,
            given_before: 0,
            share,
            over: false,
        };
        for (share, read, done) in
            [(0.0, 0, 0), (0.0, 300, 300), (0.5, 300, 500), (1.0, 0, 1000), (0.1, 5000, 1000)]
        {
            assert_eq!(done_bytes(&state(share), read), done, "{share} {read}");
        }
        assert_eq!(done_bytes(&state(f32::NAN), 7), 7);
    }

    fn reader() -> Reader {
        let engine = EngineKind::Noop;
        Reader::new(Config {
            engine,
            ring_bytes: 64 << 10,
            buffer_bytes: 4096,
            ..Config::default()
        })
        .unwrap()
    }

    #[test]
    fn what_is_told_grows_to_the_whole_of_each_stage() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, [0; 10_000]).unwrap();
        let (reader, seen) = (reader(), Mutex::new(Vec::new()));
        let file = reader.open(&path).unwrap();
        let read = |len| reader.read(Extent { file, offset: 0, len }, &mut vec![0; len as usize]);
        read(5000).unwrap();
        let mut progress = |loading: Loading| {
            seen.lock().unwrap().push(loading);
            true
        };
        let wait_for = |bytes| {
            while seen.lock().unwrap().last().is_none_or(|l: &Loading| l.bytes_done < bytes) {
                thread::yield_now();
            }
        };
        let told = Watch::over(&reader, Some(2e9), &mut progress, |watch| {
            watch.begin(LoadStage::Weights, 4000, &reader);
            read(1000).unwrap();
            wait_for(1000);
            assert!(watch.heard(1.0));
            wait_for(4000);
            watch.begin(LoadStage::Experts, 6000, &reader);
            read(6000).unwrap();
        });
        assert!(told.is_some());
        let seen = seen.into_inner().unwrap();
        let of = |stage| -> Vec<u64> {
            seen.iter().filter(|l| l.stage == stage).map(|l| l.bytes_done).collect()
        };
        for (stage, total) in [(LoadStage::Weights, 4000), (LoadStage::Experts, 6000)] {
            assert!(of(stage).is_sorted(), "{seen:?}");
            assert_eq!(of(stage).last(), Some(&total), "{seen:?}");
        }
        assert!(seen.iter().all(|l| l.limit_bytes_per_s == Some(2e9)));
    }

    #[test]
    fn who_says_no_is_heard_by_the_loader() {
        let reader = reader();
        let mut rounds = 0;
        let told = Watch::over(&reader, None, &mut |_| false, |watch| {
            while watch.heard(0.0) {
                rounds += 1;
                thread::yield_now();
            }
        });
        assert!(told.is_none() && rounds > 0);
        // One that is over before anybody was asked.
        assert!(Watch::over(&reader, None, &mut |_| false, |_| ()).is_none());
    }

    #[test]
    fn panics_reach_the_caller_and_end_the_load() {
        let reader = reader();
        let panic = catch_unwind(AssertUnwindSafe(|| {
            Watch::over(&reader, None, &mut |_| panic!("no more"), |watch| {
                while watch.heard(0.0) {
                    thread::yield_now();
                }
            })
        }));
        assert_eq!(panic.unwrap_err().downcast_ref(), Some(&"no more"));
        let panic = catch_unwind(AssertUnwindSafe(|| {
            Watch::over(&reader, None, &mut |_| true, |_| -> () { panic!("damaged") })
        }));
        assert_eq!(panic.unwrap_err().downcast_ref(), Some(&"damaged"));
    }
}

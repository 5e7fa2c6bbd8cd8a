//! What happens when reads fail, files change or somebody cancels: a clear error, never a wrong
//! logit, and the context works again.

mod common;

use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::{Duration, UNIX_EPOCH};

use common::{
    Room, Run, Synth, assert_same_bits, config, faulty, go_on, load_with, reader, reads_of_a_load,
    stock, streamed, streamed_with, watched, wrapped,
};
use tierstream_ggml::{Error, Keep, Model, Placement, PoolOptions, PoolSize, Prefetch, Weights};
use tierstream_io::engine::{Engine, RawDone, RawRead};
use tierstream_io::wrap::{Action, Drive, Rule, Throttle};
use tierstream_io::{Config, EngineKind, Reader};
use tierstream_pool::Policy;

const EIO: i32 = 5;

/// A model, what stock llama.cpp makes of it, and how long that takes in reads.
struct Case {
    synth: Synth,
    run: Run,
    reference: Vec<f32>,
    vocab: u32,
}

impl Case {
    fn new() -> Self {
        let synth = Synth::qwen();
        let model = stock(&synth.path);
        let run = Run::new(&model, 24, 16, 16);
        let reference = run.logits(&model);
        Self { run, reference, vocab: model.vocab().len(), synth }
    }

    fn path(&self) -> &Path {
        &self.synth.path
    }

    #[track_caller]
    fn assert_exact(&self, logits: &[f32], what: &str) {
        assert_same_bits(&self.reference, logits, self.vocab, what);
    }

    /// Runs `model` until it fails; what it said until then must be right.
    #[track_caller]
    fn run_to_error(&self, model: &Model) -> Error {
        let mut context = self.run.context(model);
        self.run_to_error_in(&mut context)
    }

    #[track_caller]
    fn run_to_error_in(&self, context: &mut tierstream_ggml::Context) -> Error {
        let mut seen = Vec::new();
        let mut decode = |context: &mut tierstream_ggml::Context, tokens: &[_]| {
            context.decode(tokens, Keep::All, |_, row| seen.extend_from_slice(row))?;
            Ok(common::argmax(&seen[seen.len() - self.vocab as usize..]))
        };
        let mut next = decode(context, &self.run.prompt);
        for _ in 0..self.run.generate {
            let Ok(token) = next else { break };
            next = decode(context, &[token]);
        }
        let error = next.expect_err("the run was to fail");
        assert!(!context.has_logits());
        assert_same_bits(&self.reference[..seen.len()], &seen, self.vocab, "before the error");
        error
    }

    /// After an error: the same context, cleared, is exact.
    #[track_caller]
    fn assert_recovers(&self, context: &mut tierstream_ggml::Context, what: &str) {
        context.clear();
        let logits = self.run.logits_in(context).unwrap();
        self.assert_exact(&logits, what);
    }
}

/// Number of reads that one whole run makes.
fn reads_of_a_run(case: &Case, room: Room) -> u64 {
    let reader = reader();
    let model = streamed_with(case.path(), room, Policy::Lru, reader.clone());
    let loaded = reader.stats().reads;
    case.run.logits(&model);
    reader.stats().reads - loaded
}

/// Some of the reads after the load go wrong.
fn fails_at(path: &Path, nth: Range<u64>, action: Action) -> Arc<Reader> {
    let loaded = reads_of_a_load(path);
    faulty(vec![Rule::all(action).nth(loaded + nth.start..loaded + nth.end)])
}

#[test]
fn a_failed_read_anywhere_is_an_error_with_its_place_and_then_all_is_well() {
    let case = Case::new();
    for room in [Room::Share(0.5), Room::Floor(0)] {
        let reads = reads_of_a_run(&case, room);
        assert!(reads > 100, "{reads}");
        for eighth in 0..8 {
            let nth = reads * eighth / 8 + eighth;
            let model = streamed_with(
                case.path(),
                room,
                Policy::Lru,
                fails_at(case.path(), nth..nth + 1, Action::Errno(EIO)),
            );
            let mut context = case.run.context(&model);
            let what = format!("{room:?}, read {nth} of {reads}");
            match case.run_to_error_in(&mut context) {
                Error::Io(tierstream_io::Error::Read { path, offset, len, .. }) => {
                    assert_eq!(&*path, case.path(), "{what}");
                    let bytes = fs::metadata(case.path()).unwrap().len();
                    assert!(len > 0 && offset < bytes, "{what}: {offset} {len}");
                }
                other => panic!("{what}: {other:?}"),
            }
            case.assert_recovers(&mut context, &what);
        }
    }
}

/// The context keeps the batches before the failed one, and goes on from there.
#[test]
fn the_failed_batch_can_be_decoded_again() {
    let case = Case::new();
    let room = Room::Share(0.25);
    let nth = reads_of_a_run(&case, room) * 3 / 4;
    let model = streamed_with(
        case.path(),
        room,
        Policy::Lru,
        fails_at(case.path(), nth..nth + 1, Action::Errno(EIO)),
    );
    let mut context = case.run.context(&model);
    let mut all = Vec::new();
    let mut errors = 0;
    let mut decode = |tokens: &[_]| {
        loop {
            let position = context.position();
            match context.decode(tokens, Keep::All, |_, row| all.extend_from_slice(row)) {
                Ok(()) => return common::argmax(&all[all.len() - case.vocab as usize..]),
                Err(_) => {
                    errors += 1;
                    assert_eq!(context.position(), position, "the failed batch is forgotten");
                }
            }
        }
    };
    let mut token = 0;
    for batch in case.run.prompt.chunks(case.run.n_batch as usize) {
        token = decode(batch);
    }
    for _ in 0..case.run.generate {
        token = decode(&[token]);
    }
    assert_eq!(errors, 1);
    case.assert_exact(&all, "with a batch decoded again");
}

#[test]
fn a_failed_read_while_preloading_leaves_a_model_without_pool() {
    let case = Case::new();
    let model = load_with(
        case.path(),
        Weights::Streamed,
        fails_at(case.path(), 20..21, Action::Errno(EIO)),
    );
    let pool = PoolOptions {
        size: PoolSize::Share(1.0),
        policy: Policy::Lru,
        seed: 1,
        preload: true,
        below: None,
        staged: 2,
    };
    let error = model.attach_pool(&pool, &mut go_on).unwrap_err();
    assert!(matches!(error, Error::Io(tierstream_io::Error::Read { .. })), "{error:?}");
    assert_eq!(model.pool_bytes(), (0, 0));
    assert!(matches!(case.run_to_error(&model), Error::SelfCheck(_)), "no pool, no decoding");
    model.attach_pool(&pool, &mut go_on).unwrap();
    case.assert_exact(&case.run.logits(&model), "the second try");
}

#[test]
fn short_reads_are_read_on_and_false_lengths_refused() {
    let case = Case::new();
    let room = Room::Share(0.25);
    // Half of every read, again and again, arrives in the end.
    let model = streamed_with(
        case.path(),
        room,
        Policy::Lru,
        fails_at(case.path(), 0..1000, Action::Short(8192)),
    );
    case.assert_exact(&case.run.logits(&model), "short reads");
    // An engine that claims more than was asked for is not believed.
    let model = streamed_with(
        case.path(),
        room,
        Policy::Lru,
        fails_at(case.path(), 50..51, Action::WrongLength(1 << 30)),
    );
    let mut context = case.run.context(&model);
    let error = case.run_to_error_in(&mut context);
    assert!(matches!(error, Error::Io(tierstream_io::Error::Read { .. })), "{error:?}");
    case.assert_recovers(&mut context, "after a false length");
}

#[test]
fn a_truncated_file_is_an_error() {
    let case = Case::new();
    let model = streamed(case.path(), Room::Floor(0));
    let mut context = case.run.context(&model);
    context.decode(&case.run.prompt, Keep::All, |_, _| ()).unwrap();
    let bytes = fs::metadata(case.path()).unwrap().len();
    OpenOptions::new().write(true).open(case.path()).unwrap().set_len(bytes / 2).unwrap();
    context.clear();
    let error = case.run_to_error_in(&mut context);
    let named = match &error {
        Error::Io(
            e @ (tierstream_io::Error::Truncated { .. } | tierstream_io::Error::Changed { .. }),
        ) => e.path(),
        other => panic!("{other:?}"),
    };
    assert_eq!(named, Some(case.path()));
}

/// Writes into the last bytes of the file, which are some expert's, and sets another time, as a
/// write some time later would.
fn modify(path: &Path) {
    let mut file = OpenOptions::new().write(true).open(path).unwrap();
    file.seek(SeekFrom::End(-1)).unwrap();
    file.write_all(&[0]).unwrap();
    file.set_modified(UNIX_EPOCH).unwrap();
}

#[test]
fn a_modified_file_is_an_error() {
    let case = Case::new();
    let model = streamed(case.path(), Room::Floor(0));
    modify(case.path());
    let error = case.run_to_error(&model);
    assert!(matches!(error, Error::Io(tierstream_io::Error::Changed { .. })), "{error:?}");
}

#[test]
fn a_file_modified_before_the_preload_is_an_error() {
    let case = Case::new();
    let model = load_with(case.path(), Weights::Streamed, reader());
    modify(case.path());
    let pool = PoolOptions {
        size: PoolSize::Share(1.0),
        policy: Policy::Lru,
        seed: 1,
        preload: true,
        below: None,
        staged: 2,
    };
    let error = model.attach_pool(&pool, &mut go_on).unwrap_err();
    assert!(matches!(error, Error::Io(tierstream_io::Error::Changed { .. })), "{error:?}");
}

/// Header of one file, weights of another: the file was exchanged before llama.cpp opened it.
#[test]
fn a_file_exchanged_before_the_load_is_an_error() {
    let case = Case::new();
    let file = tierstream_gguf::Model::open(case.path()).unwrap();
    let mut spec = tierstream_synth::Spec::new(tierstream_synth::Arch::Qwen3Moe);
    spec.n_layer -= 1;
    fs::remove_file(case.path()).unwrap();
    spec.write(case.path()).unwrap();
    let error =
        Model::load(&file, Weights::Streamed, &Placement::Cpu, reader(), &mut go_on).err().unwrap();
    assert!(
        matches!(
            error,
            Error::Io(
                tierstream_io::Error::Truncated { .. } | tierstream_io::Error::Changed { .. }
            )
        ),
        "{error:?}"
    );
}

#[test]
fn a_file_replaced_after_the_load_is_still_read_as_it_was() {
    let case = Case::new();
    let model = streamed(case.path(), Room::Floor(0));
    let other = case.synth.dir().join("other");
    let mut file = File::create(&other).unwrap();
    file.write_all(&vec![0xFF; fs::metadata(case.path()).unwrap().len() as usize]).unwrap();
    drop(file);
    fs::rename(&other, case.path()).unwrap();
    case.assert_exact(&case.run.logits(&model), "the old file");
    fs::remove_file(case.path()).unwrap();
    case.assert_exact(&case.run.logits(&model), "the old file, removed");
}

/// An engine that cancels when it has been given so many reads.
struct Trip<E> {
    inner: E,
    left: AtomicU64,
    tripped: mpsc::Sender<()>,
}

impl<E: Engine> Engine for Trip<E> {
    fn name(&self) -> &'static str {
        self.inner.name()
    }
    fn depth(&self) -> usize {
        self.inner.depth()
    }
    fn submit(&self, reads: &mut dyn Iterator<Item = RawRead>) {
        let mut reads = reads.inspect(|_| {
            if self.left.fetch_sub(1, Ordering::Relaxed) == 1 {
                self.tripped.send(()).unwrap();
            }
        });
        self.inner.submit(&mut reads);
    }
    fn wait(&self, done: &mut Vec<RawDone>) {
        self.inner.wait(done);
    }
    fn wake(&self) {
        self.inner.wake();
    }
}

/// Another thread cancels while reads are slow, at many places of prefill and generation.
#[test]
fn cancelled_anywhere_and_then_all_is_well() {
    let case = Case::new();
    for room in [Room::Share(1.0), Room::Share(0.25), Room::Floor(0)] {
        let reads = reads_of_a_run(&case, room);
        for eighth in 0..8 {
            let nth = reads * eighth / 8 + 1 + eighth;
            let (tripped, trip) = mpsc::channel();
            let reader = wrapped(move |engine| {
                let drive = Drive { bytes_per_s: 100e6, latency: Duration::from_millis(1) };
                let inner = Throttle::new(engine, drive).unwrap();
                Trip { inner, left: AtomicU64::new(nth), tripped }
            });
            let model = streamed_with(case.path(), room, Policy::Lru, reader);
            let mut context = case.run.context(&model);
            let cancel = context.cancel_handle();
            let canceller = cancel.clone();
            let what = format!("{room:?}, at read {nth} of {reads}");
            watched(&what, || {
                std::thread::scope(|s| {
                    s.spawn(move || {
                        trip.recv().unwrap();
                        canceller.cancel();
                    });
                    let error = case.run_to_error_in(&mut context);
                    assert!(matches!(error, Error::Cancelled), "{what}: {error:?}");
                });
                let again = context.decode(&case.run.prompt, Keep::All, |_, _| ());
                assert!(matches!(again, Err(Error::Cancelled)), "{what}: until it is reset");
                cancel.reset();
                case.assert_recovers(&mut context, &what);
            });
        }
    }
}

/// An engine whose reads never come back until they are let.
struct Stuck<E> {
    inner: E,
    /// Reads that get through.
    left: AtomicU64,
    stuck: std::sync::Mutex<(Option<mpsc::Sender<()>>, Vec<RawRead>)>,
    open: Arc<std::sync::atomic::AtomicBool>,
}

impl<E: Engine> Engine for Stuck<E> {
    fn name(&self) -> &'static str {
        self.inner.name()
    }
    fn depth(&self) -> usize {
        self.inner.depth()
    }
    fn submit(&self, reads: &mut dyn Iterator<Item = RawRead>) {
        for read in reads {
            let left = self.left.load(Ordering::Relaxed);
            let mut stuck = self.stuck.lock().unwrap();
            if left > 0 || self.open.load(Ordering::Acquire) {
                self.left.store(left.saturating_sub(1), Ordering::Relaxed);
                self.inner.submit(&mut std::iter::once(read));
            } else {
                stuck.1.push(read);
                if let Some(tell) = stuck.0.take() {
                    tell.send(()).unwrap();
                }
            }
        }
        if self.open.load(Ordering::Acquire) {
            let freed = std::mem::take(&mut self.stuck.lock().unwrap().1);
            self.inner.submit(&mut freed.into_iter());
        }
    }
    fn wait(&self, done: &mut Vec<RawDone>) {
        self.inner.wait(done);
    }
    fn wake(&self) {
        self.inner.wake();
    }
}

/// A drive that hangs does not keep a cancelled decode whose reads go through the ring, as those of
/// small parts do: it ends as soon as the flag is set, while the reads are still out.
#[test]
fn cancelling_does_not_wait_for_a_hanging_drive() {
    let case = Case::new();
    let (tell, told) = mpsc::channel();
    let open = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let gate = open.clone();
    let reader = wrapped(move |inner| Stuck {
        inner,
        left: AtomicU64::new(40),
        stuck: std::sync::Mutex::new((Some(tell), Vec::new())),
        open: gate,
    });
    let model = streamed_with(case.path(), Room::Share(0.25), Policy::Lru, reader.clone());
    let mut context = case.run.context(&model);
    let cancel = context.cancel_handle();
    let canceller = cancel.clone();
    watched("a hanging drive", || {
        std::thread::scope(|s| {
            s.spawn(move || {
                told.recv().unwrap();
                canceller.cancel();
            });
            let error = case.run_to_error_in(&mut context);
            assert!(matches!(error, Error::Cancelled), "{error:?}");
        });
        open.store(true, Ordering::Release);
        cancel.reset();
        case.assert_recovers(&mut context, "after the drive came back");
    });
}

/// An engine that panics kills the reader's thread; every later decode says so.
struct Panicking<E> {
    inner: E,
    left: AtomicU64,
}

impl<E: Engine> Engine for Panicking<E> {
    fn name(&self) -> &'static str {
        self.inner.name()
    }
    fn depth(&self) -> usize {
        self.inner.depth()
    }
    fn submit(&self, reads: &mut dyn Iterator<Item = RawRead>) {
        self.inner.submit(reads);
    }
    fn wait(&self, done: &mut Vec<RawDone>) {
        self.inner.wait(done);
        let n = done.len() as u64;
        let left = self.left.load(Ordering::Relaxed);
        assert!(left >= n, "this engine has had enough");
        self.left.store(left - n, Ordering::Relaxed);
    }
    fn wake(&self) {
        self.inner.wake();
    }
}

#[test]
fn a_panic_of_the_reader_is_an_error() {
    let case = Case::new();
    let reader = wrapped(|inner| Panicking { inner, left: AtomicU64::new(200) });
    let model = streamed_with(case.path(), Room::Share(0.25), Policy::Lru, reader);
    let mut context = case.run.context(&model);
    watched("a panic of the reader", || {
        for _ in 0..2 {
            let error = case.run_to_error_in(&mut context);
            use tierstream_io::Error::{Closed, EnginePanicked};
            // Which one depends on whether the reads were submitted before the panic.
            assert!(matches!(error, Error::Io(Closed | EnginePanicked { .. })), "{error:?}");
            context.clear();
        }
    });
}

#[test]
fn progress_that_panics_reaches_its_caller() {
    let case = Case::new();
    let file = tierstream_gguf::Model::open(case.path()).unwrap();
    for weights in [common::STOCK, Weights::Streamed] {
        let load = || {
            Model::load(&file, weights, &Placement::Cpu, reader(), &mut |_| {
                panic!("no more progress")
            })
        };
        let panic = std::panic::catch_unwind(load).err().expect("a panic");
        assert_eq!(panic.downcast_ref(), Some(&"no more progress"));
    }
}

#[test]
fn progress_that_stops_cancels() {
    let case = Case::new();
    let file = tierstream_gguf::Model::open(case.path()).unwrap();
    for weights in [common::STOCK, Weights::Streamed] {
        let error =
            Model::load(&file, weights, &Placement::Cpu, reader(), &mut |_| false).err().unwrap();
        assert!(matches!(error, Error::Cancelled), "{error:?}");
    }
    let model = load_with(case.path(), Weights::Streamed, reader());
    let pool = PoolOptions {
        size: PoolSize::Share(1.0),
        policy: Policy::Lru,
        seed: 1,
        preload: true,
        below: None,
        staged: 2,
    };
    let error = model.attach_pool(&pool, &mut |done| done < 0.5).unwrap_err();
    assert!(matches!(error, Error::Cancelled), "{error:?}");
}

/// Every engine that the reader can run on, and a ring of one buffer.
#[test]
fn other_engines_and_the_smallest_ring() {
    let case = Case::new();
    for engine in [EngineKind::Pread, EngineKind::Buffered, EngineKind::Auto] {
        let small = Config { engine, ring_bytes: 4096, buffer_bytes: 4096, ..config() };
        let reader = Arc::new(Reader::new(small).unwrap());
        let model = streamed_with(case.path(), Room::Share(0.25), Policy::Lru, reader);
        case.assert_exact(&case.run.logits(&model), engine.name());
    }
}

/// What was being read ahead when a request failed is in nobody's way.
#[test]
fn nothing_read_ahead_stays_behind_an_error() {
    let mut case = Case::new();
    case.run.prefetch = Prefetch::Lookahead;
    let room = Room::Share(0.5);
    let reads = reads_of_a_run(&case, room);
    for eighth in 4..8 {
        let nth = reads * eighth / 8;
        let faulty = fails_at(case.path(), nth..nth + 20, Action::Errno(EIO));
        let model = streamed_with(case.path(), room, Policy::Lru, faulty);
        let mut context = case.run.context(&model);
        let error = case.run_to_error_in(&mut context);
        assert!(matches!(error, Error::Io(_)), "{error}");
        assert!(model.expert_counters().read_ahead > 0);
        model.clear_pool();
        assert_eq!(model.pool_bytes().1, 0, "slots are held");
        // Reads fail a few times more.
        let mut other = case.run.context(&model);
        let again = |_| {
            other.clear();
            case.run.logits_in(&mut other).ok()
        };
        let logits = watched("another context", || (0..20).find_map(again));
        case.assert_exact(&logits.expect("reads succeed in the end"), "another context");
        case.assert_recovers(&mut context, "the same context");
    }
}

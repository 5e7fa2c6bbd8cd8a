//! A pool on a GPU that changes its size while it is used, over the stand-in: whatever it gets or
//! loses, the output is that of the resident model, bit for bit. What is not mapped kills whoever
//! computes with it, and new memory is full of NaNs.

mod common;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use common::{
    Room, Run, Synth, assert_same_bits, attach, load_on_stand_in, reader, stock, watched,
};
use tierstream_cuda::standin::{Config, Fault, StandIn};
use tierstream_ggml::{Context, Error, Miss, Model, PoolOptions, PoolSize, Prefetch};
use tierstream_pool::Policy;
use tierstream_synth::{Arch, Quant, Spec};

/// A device with memory for so many MiB, in fine granules.
fn stand_in(mib: u64) -> StandIn {
    StandIn::new(Config { memory_bytes: mib << 20, granularity: 16 << 10 }).unwrap()
}

fn streamed(path: &Path, device: &StandIn, room: Room) -> Model {
    let model = load_on_stand_in(path, device, reader());
    attach(&model, room, Policy::Lru);
    model
}

fn free_bytes(device: &StandIn) -> u64 {
    device.device().memory().unwrap().free_bytes
}

fn share_bytes(model: &Model, share: f64) -> u64 {
    model.pool_bytes_of(PoolSize::Share(share)).unwrap()
}

/// What the pool may have mapped when it has `pool_bytes` of slots.
fn most_mapped(model: &Model, pool_bytes: u64) -> u64 {
    pool_bytes + 2 * model.area_bytes() + model.rounding_bytes().unwrap()
}

/// Runs over a model, with the bits that they must give.
struct Checked {
    vocab: u32,
    runs: Vec<(Run, Vec<f32>)>,
}

impl Checked {
    /// Each run is a prompt, tokens to generate, and a batch size.
    fn new(path: &Path, runs: &[(usize, usize, u32)]) -> Self {
        let model = stock(path);
        let run = |&(prompt, generate, n_batch)| {
            let run = Run::new(&model, prompt, generate, n_batch);
            let logits = run.logits(&model);
            (run, logits)
        };
        Self { vocab: model.vocab().len(), runs: runs.iter().map(run).collect() }
    }

    /// The same, reading ahead.
    fn reading_ahead(mut self) -> Self {
        self.runs.iter_mut().for_each(|(run, _)| run.prefetch = Prefetch::Lookahead);
        self
    }

    /// The same, with misses that the processor computes.
    fn computing(mut self) -> Self {
        self.runs.iter_mut().for_each(|(run, _)| run.miss = Miss::Compute);
        self
    }

    fn check(&self, model: &Model, index: usize, what: &str) {
        let (run, expected) = &self.runs[index];
        assert_same_bits(expected, &run.logits(model), self.vocab, &format!("run {index}, {what}"));
    }

    fn check_all(&self, model: &Model, what: &str) {
        (0..self.runs.len()).for_each(|index| self.check(model, index, what));
    }

    /// A context for each run: what they take of the device's memory is taken from now on.
    fn contexts(&self, model: &Model) -> Vec<Context> {
        self.runs.iter().map(|(run, _)| run.context(model)).collect()
    }

    fn check_in(&self, contexts: &mut [Context], index: usize, what: &str) {
        let (run, expected) = &self.runs[index];
        let context = &mut contexts[index];
        context.clear();
        let logits = run.logits_in(context).unwrap_or_else(|e| panic!("run {index}, {what}: {e}"));
        assert_same_bits(expected, &logits, self.vocab, &format!("run {index}, {what}"));
    }

    fn check_all_in(&self, contexts: &mut [Context], what: &str) {
        (0..self.runs.len()).for_each(|index| self.check_in(contexts, index, what));
    }
}

#[test]
fn memory_falls_and_rises_with_the_size() {
    for spec in [Spec::new(Arch::Qwen3Moe), Spec::new(Arch::Qwen3Moe).quant(Quant::Q4_K_M)] {
        let synth = Synth::new(&spec);
        let checked = Checked::new(&synth.path, &[(40, 12, 1), (60, 4, 32)]);
        for room in [Room::Preloaded, Room::Share(1.0)] {
            let device = stand_in(512);
            let model = load_on_stand_in(&synth.path, &device, reader());
            let without = free_bytes(&device);
            attach(&model, room, Policy::Lru);
            checked.check_all(&model, "before");
            let whole = model.pool_bytes().0;
            assert_eq!(whole, model.whole_pool_bytes());
            let mut mapped = model.vram_bytes().unwrap();
            for share in [0.7, 0.4, 0.25] {
                let reached = model.resize_pool(PoolSize::Share(share)).unwrap();
                assert_eq!(reached, share_bytes(&model, share), "{room:?}");
                assert_eq!(model.pool_bytes().0, reached);
                assert!(model.pool_bytes().1 <= reached);
                let now = model.vram_bytes().unwrap();
                assert!(now < mapped && now <= most_mapped(&model, reached), "{now} of {mapped}");
                // The pool has a small buffer of ggml's beside.
                assert!(without - now - free_bytes(&device) < 16 << 10);
                mapped = now;
                checked.check_all(&model, &format!("{room:?}, down to {share}"));
                assert!(model.vram_bytes().unwrap() <= most_mapped(&model, reached));
            }
            // Memory comes with the records, not with the number.
            let before = model.vram_bytes().unwrap();
            assert_eq!(model.resize_pool(PoolSize::Bytes(u64::MAX)).unwrap(), whole);
            assert!(model.vram_bytes().unwrap() <= before);
            let evictions = model.expert_counters().evictions;
            checked.check_all(&model, &format!("{room:?}, up again"));
            assert!(model.vram_bytes().unwrap() > before);
            assert_eq!(model.expert_counters().evictions, evictions, "there is a slot for each");
            drop(model);
            assert_eq!(free_bytes(&device), 512 << 20);
        }
    }
}

#[test]
fn what_one_token_needs_is_not_given_up() {
    let synth = Synth::qwen();
    let checked = Checked::new(&synth.path, &[(12, 4, 1), (40, 2, 32)]);
    let device = stand_in(512);
    let model = streamed(&synth.path, &device, Room::Share(0.5));
    checked.check_all(&model, "before");
    let (before, least) = (model.pool_bytes(), model.least_pool_bytes());
    let error = model.resize_pool(PoolSize::Bytes(least - 1)).unwrap_err();
    match error {
        Error::PoolTooSmall { bytes, least_bytes } => {
            assert_eq!((bytes, least_bytes), (least - 1, least));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(model.pool_bytes(), before);
    assert_eq!(model.resize_pool(PoolSize::Bytes(least)).unwrap(), least);
    assert!(model.vram_bytes().unwrap() <= most_mapped(&model, least));
    checked.check_all(&model, "at the floor");
}

#[test]
fn only_a_pool_on_a_gpu_changes_its_size() {
    let synth = Synth::qwen();
    let on_host = common::streamed(&synth.path, Room::Share(0.5));
    let without_pool = load_on_stand_in(&synth.path, &stand_in(64), reader());
    for model in [on_host, without_pool, stock(&synth.path)] {
        let error = model.resize_pool(PoolSize::Share(0.7)).unwrap_err();
        assert!(matches!(error, Error::NotElastic), "{error:?}");
    }
}

/// Sizes change from another thread while two contexts generate, one of them with prompts.
fn resized_during(path: &Path, pool: &PoolOptions) {
    let checked = Checked::new(path, &[(6, 40, 1), (70, 6, 32), (90, 2, 90)]);
    resized_while_checked(&checked, path, pool);
    resized_while_checked(&checked.reading_ahead(), path, pool);
}

fn resized_while_checked(checked: &Checked, path: &Path, pool: &PoolOptions) {
    let device = stand_in(512);
    let model = load_on_stand_in(path, &device, reader());
    model.attach_pool(pool, &mut |_| true).unwrap();
    let least = model.least_pool_bytes();
    let over = AtomicBool::new(false);
    let resizes = watched("resizes while contexts generate", || {
        std::thread::scope(|s| {
            let resizer = s.spawn(|| {
                let sizes = [0.9, 0.3, 0.6, 1.0, 0.2].map(|share| share_bytes(&model, share));
                let sizes = [sizes[0], least, sizes[1], sizes[2], sizes[3], sizes[4]];
                let mut resizes = 0;
                while !over.load(Ordering::Relaxed) {
                    let size = sizes[resizes % sizes.len()].max(least);
                    let reached = model.resize_pool(PoolSize::Bytes(size)).unwrap();
                    assert!(reached <= size, "{reached} instead of {size}");
                    assert!(model.vram_bytes().unwrap() <= most_mapped(&model, size));
                    resizes += 1;
                    std::thread::sleep(std::time::Duration::from_millis(3));
                }
                resizes
            });
            let contexts = (0..checked.runs.len()).map(|index| {
                let model = &model;
                s.spawn(move || {
                    for round in 0..4 {
                        checked.check(model, index, &format!("round {round}"));
                    }
                })
            });
            let contexts: Vec<_> = contexts.collect();
            let failed = contexts.into_iter().map(|context| context.join());
            let failed: Vec<_> = failed.filter_map(Result::err).collect();
            over.store(true, Ordering::Relaxed);
            let resizes = resizer.join().unwrap();
            if let Some(panic) = failed.into_iter().next() {
                std::panic::resume_unwind(panic);
            }
            resizes
        })
    });
    assert!(resizes >= 6, "{resizes} resizes are not all sizes");
    drop(model);
    assert_eq!((free_bytes(&device), device.pinned_bytes()), (512 << 20, 0));
}

fn options(preload: bool, below: Option<PoolSize>) -> PoolOptions {
    PoolOptions {
        size: PoolSize::Share(1.0),
        policy: Policy::Lru,
        seed: 1,
        staged: 2,
        preload,
        below,
    }
}

#[test]
fn resized_while_contexts_generate() {
    resized_during(&Synth::qwen().path, &options(false, None));
}

/// At first all records are computed with as they lie, without pins.
#[test]
fn resized_while_contexts_generate_with_everything_resident() {
    resized_during(&Synth::qwen().path, &options(true, None));
}

/// The same, in the middle of a batch: what computes by no more than a lock is waited for.
#[test]
fn slots_that_are_computed_with_without_pins_are_waited_for() {
    let synth = Synth::qwen();
    let checked = Checked::new(&synth.path, &[(250, 0, 250)]);
    for round in 0..6 {
        let device = stand_in(64);
        let model = streamed(&synth.path, &device, Room::Preloaded);
        let (run, expected) = &checked.runs[0];
        let mut context = run.context(&model);
        watched("a batch and a resize", || {
            std::thread::scope(|s| {
                let logits = s.spawn(|| run.logits_in(&mut context).unwrap());
                std::thread::sleep(std::time::Duration::from_millis(2 + 3 * round));
                model.resize_pool(PoolSize::Bytes(model.least_pool_bytes())).unwrap();
                let logits = logits.join().unwrap();
                assert_same_bits(expected, &logits, checked.vocab, &format!("round {round}"));
            });
        });
    }
}

#[test]
fn resized_while_contexts_generate_with_several_size_classes() {
    let synth = Synth::new(&Spec::new(Arch::Qwen3Moe).quant(Quant::Q4_K_M));
    resized_during(&synth.path, &options(false, None));
}

#[test]
fn resized_while_contexts_generate_over_a_pool_in_host_memory() {
    for below in [0.5, 1.0] {
        let size = PoolSize::Share(0.95);
        let pool = PoolOptions { size, ..options(true, Some(PoolSize::Share(below))) };
        resized_during(&Synth::qwen().path, &pool);
    }
}

/// What the processor computes with, and what comes to slots beside it.
#[test]
fn resized_while_misses_are_computed() {
    let synth = Synth::qwen();
    let runs = [(6, 40, 1), (9, 40, 1), (70, 6, 32)];
    for below in [0.4, 1.0] {
        let size = PoolSize::Share(0.95);
        let pool = PoolOptions { size, ..options(true, Some(PoolSize::Share(below))) };
        let checked = Checked::new(&synth.path, &runs).computing();
        resized_while_checked(&checked, &synth.path, &pool);
        resized_while_checked(&checked.reading_ahead(), &synth.path, &pool);
    }
}

/// Another program takes memory, all but a few MiB: the pool gets as large as what is left, whatever
/// it met that with, and larger again when there is more.
#[test]
fn without_memory_the_pool_is_smaller_and_grows_when_there_is_some() {
    let synth = Synth::qwen();
    let checked = Checked::new(&synth.path, &[(30, 12, 1), (60, 4, 32)]);
    let ahead = Checked::new(&synth.path, &[(30, 12, 1), (60, 4, 32)]).reading_ahead();
    for (first, checked) in [(0, &checked), (1, &checked), (0, &ahead)] {
        let device = stand_in(64);
        let model = streamed(&synth.path, &device, Room::Share(1.0));
        let least = model.least_pool_bytes() + 2 * model.area_bytes();
        let left = least + model.rounding_bytes().unwrap() + (3 << 20);
        assert!(left < model.whole_pool_bytes(), "{left}");
        let mut contexts = checked.contexts(&model);
        let other = device.device().allocate(free_bytes(&device) - left).unwrap();
        watched("a pool without memory", || {
            let what = format!("run {first} first");
            checked.check_in(&mut contexts, first, &what);
            checked.check_in(&mut contexts, 1 - first, &what);
            checked.check_all_in(&mut contexts, &what);
            let (slots, mapped) = (model.pool_bytes().0, model.vram_bytes().unwrap());
            assert!(slots < model.whole_pool_bytes(), "{slots}");
            assert_eq!(model.pool_shortage_bytes(), model.whole_pool_bytes() - slots);
            assert!(mapped <= left && most_mapped(&model, slots) <= left + (1 << 20), "{slots}");
            drop(other);
            while model.pool_bytes().0 < model.whole_pool_bytes() {
                checked.check_all_in(&mut contexts, "grown");
            }
        });
        checked.check_all_in(&mut contexts, "grown");
        assert!(model.vram_bytes().unwrap() > left && model.pool_shortage_bytes() == 0);
    }
}

/// The same, while misses are computed: what has no memory in the GPU's stays where it is.
#[test]
fn without_memory_misses_are_computed() {
    let synth = Synth::qwen();
    for ahead in [false, true] {
        let checked = Checked::new(&synth.path, &[(30, 12, 1), (60, 4, 32)]).computing();
        let checked = if ahead { checked.reading_ahead() } else { checked };
        let device = stand_in(64);
        let model = load_on_stand_in(&synth.path, &device, reader());
        let size = PoolSize::Share(0.95);
        let pool = PoolOptions { size, ..options(true, Some(PoolSize::Share(1.0))) };
        model.attach_pool(&pool, &mut |_| true).unwrap();
        let whole = model.pool_bytes().0;
        let least = model.least_pool_bytes() + 2 * model.area_bytes();
        let left = least + model.rounding_bytes().unwrap() + (3 << 20);
        let mut contexts = checked.contexts(&model);
        let other = device.device().allocate(free_bytes(&device) - left).unwrap();
        watched("a pool without memory", || {
            (0..3).for_each(|_| checked.check_all_in(&mut contexts, "short"));
            let (slots, mapped) = (model.pool_bytes().0, model.vram_bytes().unwrap());
            assert!(slots < whole && mapped <= left, "{slots}, {mapped}");
            assert!(model.expert_counters().computed > 0);
            drop(other);
            while model.pool_bytes().0 < whole {
                checked.check_all_in(&mut contexts, "grown");
            }
        });
        checked.check_all_in(&mut contexts, "grown");
        drop(contexts);
        model.clear_pool();
        assert_eq!((model.pool_bytes().1, model.pool_below_bytes().unwrap().1), (0, 0));
    }
}

/// The device has memory for the pool, but less than is agreeable is left to others: the pool gives
/// some back between two tokens.
#[test]
fn memory_is_given_back_before_there_is_none() {
    let synth = Synth::qwen();
    let checked = Checked::new(&synth.path, &[(30, 12, 1), (60, 4, 32)]);
    for room in [Room::Preloaded, Room::Share(1.0)] {
        let device = stand_in(64);
        let model = streamed(&synth.path, &device, room);
        let mut contexts = checked.contexts(&model);
        checked.check_all_in(&mut contexts, "before");
        let before = model.vram_bytes().unwrap();
        let other = device.device().allocate(free_bytes(&device) - (100 << 10)).unwrap();
        watched("memory is given back", || {
            while free_bytes(&device) < 1 << 20 {
                checked.check_all_in(&mut contexts, "scarce");
            }
        });
        assert!(model.vram_bytes().unwrap() <= before - (1 << 20));
        assert!(model.pool_bytes().0 < model.whole_pool_bytes());
        drop(other);
    }
}

/// Not even the smallest pool has room: that is said, and when there is memory again, the same
/// context goes on.
#[test]
fn no_memory_at_all_is_an_error_that_passes() {
    let synth = Synth::qwen();
    let checked = Checked::new(&synth.path, &[(30, 4, 1), (60, 4, 32)]);
    for (run, expected) in &checked.runs {
        let device = stand_in(64);
        let model = streamed(&synth.path, &device, Room::Share(0.5));
        let mut context = run.context(&model);
        let other = device.device().allocate(free_bytes(&device) - (256 << 10)).unwrap();
        let error = run.logits_in(&mut context).map(drop).unwrap_err();
        match &error {
            Error::GpuMemoryTaken { least_bytes, had_bytes, .. } => {
                assert!(*least_bytes >= model.least_pool_bytes());
                assert!(had_bytes < least_bytes, "{error}");
            }
            other => panic!("{other:?}"),
        }
        drop(other);
        context.clear();
        let logits = run.logits_in(&mut context).unwrap();
        assert_same_bits(expected, &logits, checked.vocab, "afterwards");
    }
}

/// The driver refuses memory once, wherever that is met.
#[test]
fn one_refusal_is_met_with_less() {
    let synth = Synth::qwen();
    let checked = Checked::new(&synth.path, &[(40, 8, 1), (60, 4, 32)]);
    let ahead = Checked::new(&synth.path, &[(40, 8, 1)]).reading_ahead();
    for (index, checked) in [(0, &checked), (1, &checked), (0, &ahead)] {
        for after in [0, 1, 2, 5, 10, 20, 40] {
            let device = stand_in(512);
            let model = streamed(&synth.path, &device, Room::Share(0.8));
            let asked = model.pool_bytes().0;
            let mut contexts = checked.contexts(&model);
            device.inject(Fault::OutOfMemory, after);
            let what = format!("after {after}");
            checked.check_in(&mut contexts, index, &what);
            assert!(model.pool_bytes().0 <= asked, "{what}");
        }
        // Where nothing can be given up, it is tried once more.
        let device = stand_in(512);
        let model = streamed(&synth.path, &device, Room::Floor(0));
        let mut contexts = checked.contexts(&model);
        device.inject(Fault::OutOfMemory, 3);
        checked.check_in(&mut contexts, index, "the smallest pool");
    }
}

/// Records read beforehand, as far as there turns out to be memory.
#[test]
fn a_preload_ends_where_memory_does() {
    let synth = Synth::qwen();
    let checked = Checked::new(&synth.path, &[(30, 8, 1), (60, 4, 32)]);
    let device = stand_in(64);
    let left = 6 << 20;
    let model = load_on_stand_in(&synth.path, &device, reader());
    let mut contexts = checked.contexts(&model);
    let other = device.device().allocate(free_bytes(&device) - left).unwrap();
    attach(&model, Room::Preloaded, Policy::Lru);
    let (slots, resident) = model.pool_bytes();
    assert!(resident > 0 && slots < model.whole_pool_bytes(), "{resident} of {slots}");
    checked.check_all_in(&mut contexts, "preloaded in part");
    drop(other);
}

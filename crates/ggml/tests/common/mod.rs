//! What the tests of this crate share: models, readers, runs and their comparison.

#![allow(dead_code, reason = "each test file uses its own part")]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use tierstream_cuda::standin::StandIn;
use tierstream_ggml::{
    Context, ContextOptions, Execution, Gpu, Keep, Miss, Model, Placement, PoolOptions, PoolSize,
    Prefetch, Token, Weights,
};
use tierstream_io::wrap::{Fault, Rule};
use tierstream_io::{Config, Reader, engine::Engine};
use tierstream_pool::Policy;
use tierstream_synth::{Arch, Spec};

/// Stock llama.cpp with the kernels that streaming uses too.
pub(crate) const STOCK: Weights = Weights::Stock { mmap: true, repack: false, cpu_experts: false };

/// Progress that never stops.
pub(crate) fn go_on(_: f32) -> bool {
    true
}

/// The demo model of the repository.
pub(crate) fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/novelist-moe-31m-q4_0.gguf")
}

/// A folder with a synthetic model in it, beside the build: where temporary files are there is often
/// no drive, and nothing to read past the page cache.
pub(crate) struct Synth {
    _dir: tempfile::TempDir,
    /// The (first) file.
    pub(crate) path: PathBuf,
}

impl Synth {
    pub(crate) fn new(spec: &Spec) -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let written = spec.write(dir.path().join("model.gguf")).unwrap();
        Self { path: written.files[0].clone(), _dir: dir }
    }

    /// The model that most tests use: 6 layers of 64 experts, 8 used.
    pub(crate) fn qwen() -> Self {
        Self::new(&Spec::new(Arch::Qwen3Moe))
    }

    pub(crate) fn dir(&self) -> &Path {
        self._dir.path()
    }
}

/// A small ring: records come in several chunks.
pub(crate) fn config() -> Config {
    Config { ring_bytes: 4 << 20, buffer_bytes: 256 << 10, use_cache: false, ..Config::default() }
}

pub(crate) fn reader() -> Arc<Reader> {
    Arc::new(Reader::new(config()).unwrap())
}

/// A reader with something around its engine.
pub(crate) fn wrapped<E: Engine + 'static>(
    wrap: impl FnOnce(Box<dyn Engine>) -> E + Send + 'static,
) -> Arc<Reader> {
    let wrap: tierstream_io::Wrap = Box::new(move |engine| Box::new(wrap(engine)));
    Arc::new(Reader::new(Config { wrap: Some(wrap), ..config() }).unwrap())
}

/// A reader some of whose reads fail.
pub(crate) fn faulty(rules: Vec<Rule>) -> Arc<Reader> {
    wrapped(move |engine| Fault::new(engine, rules).unwrap())
}

/// Number of reads that loading a model to host memory takes.
pub(crate) fn reads_of_a_load(path: &Path) -> u64 {
    let reader = reader();
    load_with(path, Weights::Streamed, reader.clone());
    reader.stats().reads
}

pub(crate) fn load_with(path: &Path, weights: Weights, reader: Arc<Reader>) -> Model {
    let file = tierstream_pack::open(path).unwrap();
    Model::load(&file, weights, &Placement::Cpu, reader, &mut go_on).unwrap()
}

/// A model on the stand-in for a GPU: CPU kernels over its memory.
pub(crate) fn load_on_stand_in(path: &Path, stand_in: &StandIn, reader: Arc<Reader>) -> Model {
    let file = tierstream_pack::open(path).unwrap();
    let gpu = Placement::Gpu(Gpu::stand_in(stand_in).unwrap());
    Model::load(&file, Weights::Streamed, &gpu, reader, &mut go_on).unwrap()
}

pub(crate) fn stock(path: &Path) -> Model {
    load_with(path, STOCK, reader())
}

/// Size of a pool in tests.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Room {
    /// All records, read beforehand.
    Preloaded,
    /// This share of all records.
    Share(f64),
    /// The smallest pool that works, and this many bytes.
    Floor(u64),
}

pub(crate) fn attach(model: &Model, room: Room, policy: Policy) {
    let size = match room {
        Room::Preloaded => PoolSize::Share(1.0),
        Room::Share(share) => PoolSize::Share(share),
        Room::Floor(more) => PoolSize::Bytes(model.least_pool_bytes() + more),
    };
    let pool = PoolOptions {
        size,
        policy,
        seed: 1,
        preload: room == Room::Preloaded,
        below: None,
        staged: 2,
    };
    model.attach_pool(&pool, &mut go_on).unwrap();
}

/// A streamed model with its pool.
pub(crate) fn streamed_with(path: &Path, room: Room, policy: Policy, reader: Arc<Reader>) -> Model {
    let model = load_with(path, Weights::Streamed, reader);
    assert!(model.is_streamed() && model.resident_blocks().is_empty());
    let status = model.reader().unwrap().status();
    // As with the tests of reading: a machine on which nothing may be left out.
    if std::env::var_os("TIERSTREAM_TEST_STRICT").is_some() && status.engine == "uring" {
        assert!(status.direct, "{:?}", status.reason);
    }
    attach(&model, room, policy);
    model
}

pub(crate) fn streamed(path: &Path, room: Room) -> Model {
    streamed_with(path, room, Policy::Lru, reader())
}

/// Random tokens of a vocabulary of `vocab`.
pub(crate) fn tokens(vocab: u32, n: usize, seed: u64) -> Vec<Token> {
    let mut state = seed;
    let mut next = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        Token::try_from((state >> 33) % u64::from(vocab)).unwrap()
    };
    (0..n).map(|_| next()).collect()
}

/// A prompt and what follows it, and how it is computed.
#[derive(Debug, Clone)]
pub(crate) struct Run {
    pub(crate) prompt: Vec<Token>,
    /// Tokens generated greedily after the prompt.
    pub(crate) generate: usize,
    pub(crate) n_batch: u32,
    pub(crate) n_threads: u32,
    pub(crate) prefetch: Prefetch,
    pub(crate) miss: Miss,
    pub(crate) execution: Execution,
}

impl Run {
    pub(crate) fn new(model: &Model, prompt: usize, generate: usize, n_batch: u32) -> Self {
        let prompt = tokens(model.vocab().len(), prompt, 7);
        let (prefetch, miss, execution) = (Prefetch::Off, Miss::Copy, Execution::Auto);
        Self { prompt, generate, n_batch, n_threads: 1, prefetch, miss, execution }
    }

    pub(crate) fn context(&self, model: &Model) -> Context {
        let n_ctx = u32::try_from(self.prompt.len() + self.generate).unwrap();
        let n_ctx = n_ctx.next_multiple_of(256);
        let options = ContextOptions {
            n_ctx,
            n_batch: self.n_batch,
            n_threads: self.n_threads,
            keep: Keep::All,
            prefetch: self.prefetch,
            miss: self.miss,
            execution: self.execution,
            ..ContextOptions::default()
        };
        Context::new(model.clone(), &options).unwrap()
    }

    /// All logits of prompt and generation, in a context of its own.
    pub(crate) fn logits(&self, model: &Model) -> Vec<f32> {
        self.logits_in(&mut self.context(model)).unwrap()
    }

    /// All logits of prompt and generation, in an empty context.
    pub(crate) fn logits_in(&self, context: &mut Context) -> tierstream_ggml::Result<Vec<f32>> {
        let vocab = context.model().vocab().len() as usize;
        let mut all = Vec::with_capacity((self.prompt.len() + self.generate) * vocab);
        context.decode(&self.prompt, Keep::All, |_, row| all.extend_from_slice(row))?;
        for _ in 0..self.generate {
            let token = argmax(&all[all.len() - vocab..]);
            context.decode(&[token], Keep::All, |_, row| all.extend_from_slice(row))?;
        }
        assert_eq!(all.len(), (self.prompt.len() + self.generate) * vocab);
        Ok(all)
    }
}

pub(crate) fn argmax(row: &[f32]) -> Token {
    let best = (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap();
    Token::try_from(best).unwrap()
}

/// Compares bits, row by row of `vocab`.
#[track_caller]
pub(crate) fn assert_same_bits(reference: &[f32], got: &[f32], vocab: u32, what: &str) {
    assert_eq!(reference.len(), got.len(), "{what}: number of logits");
    let differs = reference.iter().zip(got).position(|(a, b)| a.to_bits() != b.to_bits());
    if let Some(at) = differs {
        let (row, column) = (at / vocab as usize, at % vocab as usize);
        panic!("{what}: row {row}, token {column}: {} instead of {}", got[at], reference[at]);
    }
}

/// Ends the whole process, with a message, when `body` takes longer than two minutes: a deadlock
/// must not hang the test run, and its threads cannot be unwound.
pub(crate) fn watched<T>(what: &str, body: impl FnOnce() -> T) -> T {
    let (done, ended) = mpsc::channel::<()>();
    let name = what.to_owned();
    std::thread::spawn(move || {
        if ended.recv_timeout(Duration::from_secs(120)) == Err(mpsc::RecvTimeoutError::Timeout) {
            eprintln!("{name}: still not done after 120 s: a deadlock");
            std::process::abort();
        }
    });
    let result = body();
    drop(done);
    result
}

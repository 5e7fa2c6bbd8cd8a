//! The budget of a GPU's memory, changed while a model is used; over the stand-in for a GPU.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use tierstream::costs::{self, Below};
use tierstream::{Engine, Error, Generate, Gpu, Options, Placement, Sampling, Token};
use tierstream::{Keep, gguf, io, pack, size::PoolShare};
use tierstream_cuda::standin::{Config, StandIn};
use tierstream_synth::{Arch, Quant, Spec};

const BUDGET_BYTES: u64 = 2 << 30;

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/novelist-moe-31m-q4_0.gguf")
}

fn engine(device: &StandIn, vram_bytes: u64) -> Result<Engine, Error> {
    let gpu = Gpu::stand_in(device).unwrap();
    let options = Options {
        placement: Placement::Gpu(gpu),
        vram_bytes: Some(vram_bytes),
        ram_bytes: Some(0),
        ..Options::default()
    };
    Engine::load(&demo(), options, &mut |_| true)
}

/// Generates, and calls `meanwhile` with the number of tokens so far.
fn generate(engine: &mut Engine, mut meanwhile: impl FnMut(usize)) -> Vec<Token> {
    let prompt = engine.model().vocab().tokenize("It was a cold evening", true, false).unwrap();
    let sampling = Sampling { temperature: 0.0, ..Sampling::default() };
    let mut came = Vec::new();
    engine.clear();
    let made = engine.generate(&prompt, &Generate { max_tokens: 60, sampling }, |token, _| {
        came.push(token);
        meanwhile(came.len());
        ControlFlow::Continue(())
    });
    made.unwrap();
    came
}

#[test]
fn a_budget_changes_while_a_model_generates() {
    let device = StandIn::new(Config::default()).unwrap();
    let mut engine = engine(&device, BUDGET_BYTES).unwrap();
    let budget = engine.vram_budget().unwrap();
    let model = engine.model().clone();
    let whole = model.pool_bytes().0;
    assert_eq!(whole, model.whole_pool_bytes());
    let expected = generate(&mut engine, |_| {});

    // Too little says how much is enough, which is enough.
    let least = match budget.set(1 << 20) {
        Err(Error::Vram { vram_bytes: 0x10_0000, least_bytes }) => least_bytes,
        other => panic!("{other:?}"),
    };
    assert_eq!(model.pool_bytes().0, whole);
    let before = model.vram_bytes().unwrap();
    assert!(budget.set(least).unwrap() <= least);
    assert!(model.pool_bytes().0 < model.least_pool_bytes() + (1 << 20));
    assert!(model.vram_bytes().unwrap() < before);
    assert_eq!(generate(&mut engine, |_| {}), expected);

    // From another thread, in the middle of a generation.
    let middle = least + (whole - model.least_pool_bytes()) / 2;
    let budgets = [BUDGET_BYTES, middle, least];
    let came = generate(&mut engine, |tokens| {
        if tokens % 10 == 0 {
            let bytes = budgets[tokens / 10 % 3];
            let budget = budget.clone();
            let reached = std::thread::spawn(move || budget.set(bytes).unwrap()).join().unwrap();
            assert!(reached <= bytes, "{reached} of {bytes}");
        }
    });
    assert_eq!(came, expected);
    let all = budget.set(BUDGET_BYTES).unwrap();
    assert!(all < BUDGET_BYTES);
    assert_eq!(model.pool_bytes().0, whole);
    assert_eq!(generate(&mut engine, |_| {}), expected);
}

#[test]
fn the_least_budget_of_a_load_works() {
    let device = StandIn::new(Config::default()).unwrap();
    let least = match engine(&device, 1 << 20).map(drop) {
        Err(Error::Vram { least_bytes, .. }) => least_bytes,
        other => panic!("{other:?}"),
    };
    let mut engine = engine(&device, least).unwrap();
    generate(&mut engine, |_| {});
    assert!(engine.model().vram_bytes().unwrap() <= least);
}

/// Straight from the drive, through buffers that hold a record.
#[test]
fn a_miss_of_a_packed_model_is_one_read() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut spec = Spec::big(Arch::Qwen3Moe).quant(Quant::Q4_K_M).experts(32, 4);
    spec.n_layer = 2;
    let path = spec.write(dir.path().join("model.gguf")).unwrap().files.remove(0);
    let packed = dir.path().join("model.tspack");
    let reader = std::sync::Arc::new(io::Reader::new(io::Config::default()).unwrap());
    let model = gguf::Model::open(&path).unwrap();
    let options = pack::Options { experts_only: false };
    pack::Writer::new(&model, &packed, options, reader).unwrap().write(&mut |_| true).unwrap();

    let faults_and_reads = |path: &Path| {
        let device = StandIn::new(Config::default()).unwrap();
        let options = Options {
            placement: Placement::Gpu(Gpu::stand_in(&device).unwrap()),
            ram_bytes: Some(0),
            experts: Some(PoolShare::Share(0.25)),
            ..Options::default()
        };
        let mut engine = Engine::load(path, options, &mut |_| true).unwrap();
        let reader = engine.model().reader().unwrap().clone();
        let (before, faults) = (reader.stats().reads, engine.expert_counters().faults);
        for token in 1..30 {
            engine.context().decode(&[token], Keep::Last, |_, _| {}).unwrap();
        }
        (engine.expert_counters().faults - faults, reader.stats().reads - before)
    };
    let (faults, reads) = faults_and_reads(&path);
    assert!(faults > 50 && reads > 2 * faults, "{faults} {reads}");
    let (faults, reads) = faults_and_reads(&packed);
    // Neighbours come with one.
    assert!(faults > 50 && reads <= faults, "{faults} {reads}");
}

#[test]
fn there_is_no_budget_without_a_gpu() {
    let engine = Engine::load(&demo(), Options::default(), &mut |_| true).unwrap();
    assert!(engine.vram_budget().is_none());
}

#[test]
fn costs_are_of_as_many_missing_records_as_wanted() {
    let device = StandIn::new(Config::default()).unwrap();
    let experts = gguf::Experts::group(&pack::open(&demo()).unwrap()).unwrap();
    for below in [Below::Drive, Below::Ram] {
        let gpu = Gpu::stand_in(&device).unwrap();
        let options = Options {
            placement: Placement::Gpu(gpu),
            vram_bytes: Some(BUDGET_BYTES),
            ..Options::default()
        };
        let options = costs::options(options, &experts, below);
        let mut engine = Engine::load(&demo(), options, &mut |_| true).unwrap();
        let costs = costs::measure(&mut engine, below).unwrap();
        let had: Vec<f64> = costs.faults_s.iter().map(|(faults, _)| *faults).collect();
        assert_eq!(had, [1.0, 4.0, 8.0], "{below:?}");
        let used = engine.expert_counters();
        let read = used.faults - used.ram_hits;
        match below {
            Below::Drive => assert!(used.ram_hits == 0 && !costs.bursts_s.is_empty()),
            // What five tokens use of six layers, once.
            Below::Ram => assert!(read <= 6 * 40 && used.ram_hits > read, "{used:?}"),
        }
    }
}

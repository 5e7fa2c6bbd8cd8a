//! Experts that the CPU computes beside a GPU; over the stand-in for a GPU, where both have the same
//! kernels.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use tierstream::size::PoolShare;
use tierstream::{
    Engine, Error, Generate, Generation, Gpu, Miss, Options, Placement, Sampling, default_threads,
};
use tierstream_cuda::standin::{Config, StandIn};

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/novelist-moe-31m-q4_0.gguf")
}

/// With experts in the GPU's memory, and in as much of the host's.
fn engine(miss: Miss, share: f64, ram_bytes: u64) -> Result<Engine, Error> {
    let device = StandIn::new(Config::default()).unwrap();
    let options = Options {
        placement: Placement::Gpu(Gpu::stand_in(&device).unwrap()),
        vram_bytes: Some(2 << 30),
        experts: Some(PoolShare::Share(share)),
        ram_bytes: Some(ram_bytes),
        miss,
        ..Options::default()
    };
    Engine::load(&demo(), options, &mut |_| true)
}

fn generate(engine: &mut Engine) -> Generation {
    let prompt = engine.model().vocab().tokenize("It was a cold evening", true, false).unwrap();
    let sampling = Sampling { temperature: 0.0, ..Sampling::default() };
    let options = Generate { max_tokens: 40, sampling };
    engine.generate(&prompt, &options, |_, _| ControlFlow::Continue(())).unwrap()
}

fn notes_of_misses(engine: &Engine) -> Vec<&String> {
    engine.notes().iter().filter(|note| note.starts_with("--miss")).collect()
}

#[test]
fn misses_are_computed_counted_and_told() {
    let mut copying = engine(Miss::Copy, 0.3, 1 << 30).unwrap();
    let expected = generate(&mut copying);
    assert_eq!(expected.experts.computed, 0);
    assert!(notes_of_misses(&copying).is_empty());
    assert_eq!(copying.context().options().n_threads, 1);

    let mut computing = engine(Miss::Compute, 0.3, 1 << 30).unwrap();
    let made = generate(&mut computing);
    assert_eq!(made.tokens, expected.tokens);
    assert!(0 < made.experts.computed && made.experts.computed <= made.experts.faults);
    let [note] = notes_of_misses(&computing)[..] else { panic!("{:?}", computing.notes()) };
    assert!(note.contains("not, bit for bit,"), "{note}");
    assert_eq!(computing.miss(), Miss::Compute);
    assert_eq!(computing.context().options().n_threads, default_threads());

    let mut either = engine(Miss::Auto, 0.3, 1 << 30).unwrap();
    assert_eq!(generate(&mut either).tokens, expected.tokens);
    assert_eq!(notes_of_misses(&either).len(), 1);
}

#[test]
fn there_has_to_be_something_to_compute_from() {
    let error = engine(Miss::Compute, 0.3, 0).map(drop).unwrap_err();
    assert!(matches!(error, Error::NothingToCompute), "{error:?}");
    assert!(error.to_string().contains("--miss compute"));
    let hint = error.hint().unwrap();
    assert!(hint.contains("--ram") && hint.contains("--miss copy"), "{hint}");

    let mut either = engine(Miss::Auto, 0.3, 0).unwrap();
    assert_eq!(generate(&mut either).experts.computed, 0);
    assert!(notes_of_misses(&either)[0].contains("all are read"), "{:?}", either.notes());
}

#[test]
fn a_pool_of_all_experts_has_no_misses() {
    let mut whole = engine(Miss::Compute, 1.0, 1 << 30).unwrap();
    assert_eq!(generate(&mut whole).experts.computed, 0);
    assert!(notes_of_misses(&whole).is_empty());
}

/// As a layer would say it whose graph has an operation that is not known to go row by row.
#[test]
fn layers_that_only_a_gpu_computes_have_a_hint() {
    let reason = "operation CUMSUM cannot be computed row by row".to_owned();
    let error = Error::from(tierstream::ggml::Error::OnlyOnGpu { layer: 7, reason });
    assert!(error.to_string().contains("layer 7") && error.to_string().contains("CUMSUM"));
    assert!(error.hint().unwrap().contains("--miss copy"));
}

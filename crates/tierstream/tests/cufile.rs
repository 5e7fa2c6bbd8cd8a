//! Which way weights take to a GPU, and that it is told; with a libcufile for tests, over the stand-in.

#[path = "../../cuda/tests/support/cufile.rs"]
mod stub;

use std::fs::File;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use stub::Stub;
use tierstream::drive::{GpuReads, GpuWay, Io, Measure};
use tierstream::ggml::CufilePlaces;
use tierstream::machine::Filesystem;
use tierstream::{Engine, Error, Generate, Gpu, Options, Placement, Sampling, Token, io_config};
use tierstream_cuda::standin::{Config, StandIn};

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/novelist-moe-31m-q4_0.gguf")
}

fn places(stub: &Stub) -> CufilePlaces {
    CufilePlaces {
        libraries: vec![stub.path()],
        nvidia_fs: stub.nvidia_fs(),
        ..CufilePlaces::here()
    }
}

fn no_library() -> CufilePlaces {
    CufilePlaces { libraries: vec!["libcufile-of-nobody.so".into()], ..CufilePlaces::here() }
}

fn gpu() -> Gpu {
    Gpu::stand_in(&StandIn::new(Config::default()).unwrap()).unwrap()
}

fn options(io: Io, cufile: CufilePlaces) -> Options {
    Options {
        placement: Placement::Gpu(gpu()),
        vram_bytes: Some(2 << 30),
        ram_bytes: Some(0),
        io: io_config(io),
        io_direct: io.is_direct(),
        gpu_reads: io.gpu_reads(),
        cufile,
        ..Options::default()
    }
}

fn load(options: Options) -> Result<Engine, Error> {
    Engine::load(&demo(), options, &mut |_| true)
}

fn generate(engine: &mut Engine) -> Vec<Token> {
    let prompt = engine.model().vocab().tokenize("It was a cold evening", true, false).unwrap();
    let sampling = Sampling { temperature: 0.0, ..Sampling::default() };
    let what = Generate { max_tokens: 40, sampling };
    engine.generate(&prompt, &what, |_, _| ControlFlow::Continue(())).unwrap().tokens
}

#[test]
fn named_cufile_reads_the_weights_or_says_why_not() {
    let mut other = load(options(Io::Direct, no_library())).unwrap();
    assert_eq!(other.gpu_way().unwrap().reason, "as asked");
    assert!(other.model().gds_read().is_none());
    let expected = generate(&mut other);

    let stub = Stub::new();
    let mut engine = load(options(Io::Cufile, places(&stub))).unwrap();
    let way = engine.gpu_way().unwrap();
    assert_eq!((way.cufile, &*way.reason), (true, "as asked"));
    let read = engine.model().gds_read().unwrap();
    assert!(read.bytes > 0 && read.failed.is_none());
    assert_eq!(stub.get("compat"), 0);
    // They count as read.
    assert_eq!(engine.load_rate().unwrap().bytes, other.load_rate().unwrap().bytes);
    assert_eq!(generate(&mut engine), expected);
    stub.assert_ended();

    let why = |options| match load(options).map(drop).unwrap_err() {
        Error::Cufile { reason } => reason,
        error => panic!("{error:?}"),
    };
    let reason = why(options(Io::Cufile, no_library()));
    assert!(reason.contains("libcufile cannot be loaded (libcufile-of-nobody.so"), "{reason}");
    stub.set("open_fails", 5001);
    assert!(why(options(Io::Cufile, places(&stub))).contains("cuFile error 5001"));
    let cpu = Options { gpu_reads: GpuReads::Cufile, ..Options::default() };
    assert_eq!(why(cpu), "it reads to a GPU, and none is to be used");
}

#[test]
fn auto_says_why_it_is_not_cufile() {
    let engine = load(options(Io::Auto, no_library())).unwrap();
    let way = engine.gpu_way().unwrap();
    assert!(!way.cufile && way.reason.contains("libcufile cannot be loaded"), "{way:?}");
    // Nothing to tell in a normal run.
    assert!(engine.notes().iter().all(|note| !note.contains("cuFile")), "{:?}", engine.notes());

    let stub = Stub::new();
    let nothing = "/no/such/file";
    let without =
        CufilePlaces { nvidia_fs: nothing.into(), kernel_symbols: nothing.into(), ..places(&stub) };
    let engine = load(options(Io::Auto, without)).unwrap();
    let way = engine.gpu_way().unwrap();
    assert!(!way.cufile && way.reason.contains("nvidia-fs"), "{way:?}");
    assert_eq!(stub.get("opens"), 0);

    let cpu = Engine::load(&demo(), Options::default(), &mut |_| true).unwrap();
    assert!(cpu.gpu_way().is_none());
}

#[test]
fn verified_weights_are_hashed_in_host_memory() {
    let stub = Stub::new();
    let records = tempfile::tempdir().unwrap();
    let sums = || {
        let records = Some(records.path());
        let sums = tierstream::WeightSums::of(&demo(), records, Io::Auto, &mut |_| true);
        Some(Arc::new(sums.unwrap()))
    };
    let engine = load(Options { weight_sums: sums(), ..options(Io::Auto, places(&stub)) });
    let engine = engine.unwrap();
    assert!(engine.gpu_way().unwrap().reason.contains("compared with checksums"));
    assert!(engine.model().gds_read().is_none());
    let asked = Options { weight_sums: sums(), ..options(Io::Cufile, places(&stub)) };
    let error = load(asked).map(drop).unwrap_err();
    assert!(error.to_string().contains("--verify-weights"), "{error}");
    assert_eq!(stub.get("opens"), 0);
}

/// A file that is large enough to measure, on the drive.
fn large(dir: &Path) -> PathBuf {
    let path = dir.join("f");
    File::create(&path).unwrap().set_len(300 << 20).unwrap();
    path
}

#[test]
fn a_drive_is_measured_once_and_what_was_found_is_kept() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (path, cache) = (large(dir.path()), dir.path().join("cache"));
    let (stub, gpu) = (Stub::new(), gpu());
    let filesystem = Filesystem::of(&path);
    let way = |measure| {
        let (filesystem, cache) = (filesystem.as_ref(), Some(&*cache));
        GpuWay::of(&path, filesystem, &gpu, &places(&stub), cache, measure)
    };
    let unknown = way(Measure::Never);
    assert!(!unknown.cufile && unknown.reason.contains("not measured"), "{unknown:?}");
    assert_eq!(stub.get("opens"), 0);

    // What is slower is left alone: this one gives a page at a time.
    stub.set("short_bytes", 4096);
    let first = way(Measure::IfUnknown);
    let probe = first.probe.clone().unwrap();
    assert!(probe.rounds > 0 && probe.cufile_gbps > 0.0 && probe.ring_gbps > 0.0, "{probe:?}");
    let faster =
        probe.ratio > 1.05 && probe.rounds >= 4 && 4 * probe.rounds_won >= 3 * probe.rounds;
    assert_eq!(first.cufile, faster, "{first:?}");
    let reads = stub.get("reads");
    assert!(reads >= i64::from(probe.rounds) * 8);
    for measure in [Measure::IfUnknown, Measure::Never] {
        let again = way(measure);
        // Numbers may differ in their last bits, written and read again.
        assert_eq!((again.cufile, again.reason), (first.cufile, first.reason.clone()));
    }
    assert_eq!(stub.get("reads"), reads);
    // Not by `doctor`.
    way(Measure::Again);
    assert!(stub.get("reads") > reads);

    // What does not read this drive is not tried again either.
    stub.set("needs_compat", 1);
    let refused = way(Measure::Again);
    assert!(!refused.cufile && refused.reason.contains("cuFile error 5008"), "{refused:?}");
    let opens = stub.get("opens");
    assert_eq!(way(Measure::IfUnknown), refused);
    assert_eq!(stub.get("opens"), opens);
    // It says nothing of another library.
    let other = Stub::new();
    let way = GpuWay::of(
        &path,
        filesystem.as_ref(),
        &gpu,
        &places(&other),
        Some(&cache),
        Measure::IfUnknown,
    );
    assert!(way.probe.unwrap().refused.is_none());
    stub.assert_ended();
    other.assert_ended();
}

#[test]
fn a_small_file_tells_nothing() {
    let stub = Stub::new();
    let way = GpuWay::of(&demo(), None, &gpu(), &places(&stub), None, Measure::Again);
    assert!(!way.cufile && way.reason.contains("too small"), "{way:?}");
    assert_eq!(stub.get("reads"), 0);
    stub.assert_ended();
}

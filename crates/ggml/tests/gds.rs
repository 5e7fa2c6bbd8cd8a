//! Weights that are read to a GPU past host memory, by a libcufile for tests and over the stand-in:
//! the model is the one that the ring brings, and what goes wrong is told, or done the other way.

mod common;
#[path = "../../cuda/tests/support/cufile.rs"]
mod cufile;

use std::fs;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use common::{Room, Run, Synth, assert_same_bits, attach, go_on, load_on_stand_in, reader};
use cufile::Stub;
use tierstream_cuda::standin::{Config, Fault, StandIn};
use tierstream_ggml::{
    ChecksumSource, Checksums, Cufile, CufilePlaces, Error, Gds, Gpu, Model, Placement, Result,
    Source, Weights,
};
use tierstream_io::Reader;
use tierstream_pool::Policy;
use tierstream_synth::{Arch, Spec};

/// A GPU, and a library that reads to it.
struct Bed {
    stub: Stub,
    stand_in: StandIn,
    required: bool,
}

impl Bed {
    fn new(required: bool) -> Self {
        let stand_in = StandIn::new(Config::default()).unwrap();
        Self { stub: Stub::new(), stand_in, required }
    }

    fn gpu(&self) -> Gpu {
        Gpu::stand_in(&self.stand_in).unwrap()
    }

    fn gds(&self) -> Gds {
        let places = CufilePlaces {
            libraries: vec![self.stub.path()],
            nvidia_fs: self.stub.nvidia_fs(),
            ..CufilePlaces::here()
        };
        let gds = Gds::open(Cufile::find(&places).unwrap(), &self.gpu()).unwrap();
        if self.required { gds.required() } else { gds }
    }

    fn load(&self, file: &tierstream_gguf::Model) -> Result<Model> {
        self.load_telling(file, &mut go_on)
    }

    fn load_telling(
        &self,
        file: &tierstream_gguf::Model,
        progress: &mut dyn FnMut(f32) -> bool,
    ) -> Result<Model> {
        let source = Source { gds: Some(self.gds()), ..Source::of(reader()) };
        self.load_from(file, source, progress)
    }

    fn load_from(
        &self,
        file: &tierstream_gguf::Model,
        source: Source,
        progress: &mut dyn FnMut(f32) -> bool,
    ) -> Result<Model> {
        Model::load_from(file, Weights::Streamed, &Placement::Gpu(self.gpu()), source, progress)
    }

    /// Nothing of a load is left.
    #[track_caller]
    fn assert_given_back(&self) {
        self.stub.assert_ended();
        let memory = self.stand_in.device().memory().unwrap();
        let left = (memory.total_bytes - memory.free_bytes, self.stand_in.pinned_bytes());
        assert_eq!(left, (0, 0));
    }
}

/// A model, and what it computes when the ring brings it.
struct Case {
    file: tierstream_gguf::Model,
    run: Run,
    logits: Vec<f32>,
    vocab: u32,
    /// Bytes that the ring has brought to the GPU.
    bytes: u64,
    _synth: Synth,
}

impl Case {
    fn new(spec: &Spec) -> Self {
        let synth = Synth::new(spec);
        let stand_in = StandIn::new(Config::default()).unwrap();
        let reader = reader();
        let model = load_on_stand_in(&synth.path, &stand_in, reader.clone());
        let bytes = reader.stats().bytes_wanted;
        if model.is_streamed() {
            attach(&model, Room::Share(0.5), Policy::Lru);
        }
        let run = Run::new(&model, 20, 4, 16);
        let logits = run.logits(&model);
        let vocab = model.vocab().len();
        let file = tierstream_gguf::Model::open(&synth.path).unwrap();
        Self { file, run, logits, vocab, bytes, _synth: synth }
    }

    #[track_caller]
    fn check(&self, model: &Model, what: &str) {
        if model.is_streamed() {
            attach(model, Room::Share(0.5), Policy::Lru);
        }
        assert_same_bits(&self.logits, &self.run.logits(model), self.vocab, what);
    }
}

fn dense() -> Case {
    Case::new(&Spec::new(Arch::Llama))
}

#[test]
fn the_model_is_the_same() {
    let mut split = Spec::new(Arch::Llama);
    split.split_bytes = Some(1 << 20);
    for spec in [Spec::new(Arch::Llama), Spec::new(Arch::Qwen3Moe), split] {
        let case = Case::new(&spec);
        for short_bytes in [0, 40_000] {
            let bed = Bed::new(true);
            bed.stub.set("short_bytes", short_bytes);
            bed.stub.set("interrupt", 2);
            let reader = reader();
            let source = Source { gds: Some(bed.gds()), ..Source::of(reader.clone()) };
            let mut told = Vec::new();
            let model = bed.load_from(&case.file, source, &mut |done| {
                told.push(done);
                true
            });
            let model = model.unwrap();
            assert!(told.is_sorted() && told.last() == Some(&1.0), "{told:?}");
            let read = model.gds_read().unwrap();
            // All that goes to the GPU, and nothing of it through the ring.
            let wanted = reader.stats().bytes_wanted;
            assert_eq!((read.bytes + wanted, &read.failed), (case.bytes, &None));
            assert!(read.bytes > wanted, "{read:?}, {wanted}");
            assert!(bed.stub.get("reads") > 0 && bed.stub.get("compat") == 0);
            // The library is not needed any more.
            bed.stub.assert_ended();
            case.check(&model, &format!("{:?}, {short_bytes}", spec.arch));
            drop(model);
            drop(reader);
            bed.assert_given_back();
        }
    }
}

/// What is compared with its checksum is hashed in host memory.
#[test]
fn verified_weights_go_through_the_ring() {
    let case = dense();
    let first = tierstream_sums::reference(&case.file, None, &reader(), &mut |_| true).unwrap();
    let from = ChecksumSource { what: "of this test".to_owned(), record: None };
    let checksums = Checksums::new(&case.file, &first.sums, from).unwrap();
    let bed = Bed::new(true);
    let (checksums, gds) = (Some(checksums), Some(bed.gds()));
    let source = Source { reader: reader(), checksums, gds };
    let model = bed.load_from(&case.file, source, &mut go_on).unwrap();
    assert_eq!((model.gds_read().unwrap().bytes, bed.stub.get("reads")), (0, 0));
    assert!(model.checksums().unwrap().bytes() >= case.file.tensor_bytes());
    case.check(&model, "verified");
}

/// What the page cache has need not be read from the drive.
#[test]
fn cached_weights_go_through_the_ring() {
    let case = dense();
    let bed = Bed::new(true);
    let config = tierstream_io::Config { use_cache: true, ..common::config() };
    let reader = Arc::new(Reader::new(config).unwrap());
    let path = &case.file.files()[0].path;
    fs::read(path).unwrap();
    let cached = tierstream_io::cache::cached_bytes(&fs::File::open(path).unwrap()).unwrap();
    assert_eq!(cached, fs::metadata(path).unwrap().len());
    let source = Source { gds: Some(bed.gds()), ..Source::of(reader) };
    let model = bed.load_from(&case.file, source, &mut go_on).unwrap();
    assert_eq!((model.gds_read().unwrap().bytes, bed.stub.get("reads")), (0, 0));
    case.check(&model, "cached");
}

/// Settings of the library with which some or all reads fail.
const FAILURES: [&[(&str, i64)]; 8] = [
    &[("fail_errno", libc::EIO as i64)],
    &[("fail_after", 3), ("fail_errno", libc::EIO as i64)],
    &[("fail_code", 5008)],
    &[("fail_after", 5), ("fail_code", 5030)],
    &[("needs_compat", 1)],
    // As at the end of a file that is too short.
    &[("short_bytes", 1)],
    &[("file_refused", 5020)],
    &[("buffer_refused", 5036)],
];

#[test]
fn what_fails_goes_through_the_ring_and_is_told() {
    for spec in [Spec::new(Arch::Llama), Spec::new(Arch::Qwen3Moe)] {
        let case = Case::new(&spec);
        for settings in FAILURES {
            let what = format!("{:?}, {settings:?}", spec.arch);
            let bed = Bed::new(false);
            settings.iter().for_each(|(name, value)| bed.stub.set(name, *value));
            let model = bed.load(&case.file).unwrap();
            let read = model.gds_read().unwrap();
            assert!(read.failed.is_some(), "{what}");
            // Not all, but what came before.
            assert!(read.bytes < case.bytes, "{what}: {read:?}");
            match settings[0].0 {
                "fail_after" => assert!(read.bytes > 0, "{what}: {read:?}"),
                // Others were under way.
                "fail_errno" | "fail_code" => {}
                _ => assert_eq!(read.bytes, 0, "{what}"),
            }
            case.check(&model, &what);
            drop(model);
            bed.assert_given_back();
        }
    }
}

#[test]
fn what_fails_and_is_required_is_an_error() {
    let case = dense();
    let path = case.file.files()[0].path.clone();
    let tensors = case.file.tensors();
    for settings in FAILURES {
        let what = format!("{settings:?}");
        let bed = Bed::new(true);
        settings.iter().for_each(|(name, value)| bed.stub.set(name, *value));
        let error = bed.load(&case.file).map(drop).unwrap_err();
        use tierstream_io::Error::{Read, Truncated};
        let (source, at) = match &error {
            Error::Io(Read { path: of, offset, len, source }) => {
                assert_eq!(**of, path, "{what}");
                (source.to_string(), Some((*offset, *len)))
            }
            Error::Io(Truncated { path: of, offset, wanted, got }) => {
                assert!(**of == path && got < wanted, "{what}: {error:?}");
                ("truncated".to_owned(), Some((*offset, *wanted)))
            }
            Error::Gpu(tierstream_cuda::Error::NoGds { reason }) => (reason.clone(), None),
            _ => panic!("{what}: {error:?}"),
        };
        // A part of a tensor.
        assert!(at.is_none_or(|(offset, len)| {
            tensors.iter().any(|t| t.offset <= offset && offset + len <= t.offset + t.len)
        }));
        let words = match settings {
            [.., ("fail_errno", _)] => "os error 5",
            [("fail_code", _)] | [("needs_compat", _)] => "cuFile error 5008",
            [.., ("fail_code", _)] => "cuFile error 5030",
            [("short_bytes", _)] => "truncated",
            [("file_refused", _)] => "libcufile does not take the file: cuFile error 5020",
            _ => "libcufile does not take a buffer of the GPU: cuFile error 5036",
        };
        assert!(source.contains(words), "{what}: {source}");
        bed.assert_given_back();
    }
}

/// A GPU that has no room for buffers, or is lost.
#[test]
fn a_gpu_that_fails_is_told() {
    let case = dense();
    let bed = Bed::new(true);
    bed.stand_in.inject(Fault::CopyLost, 0);
    let error = bed.load(&case.file).map(drop).unwrap_err();
    assert!(matches!(error, Error::Gpu(tierstream_cuda::Error::Lost { .. })), "{error:?}");

    let bed = Bed::new(false);
    bed.stand_in.inject(Fault::CopyRefused, 2);
    let error = bed.load(&case.file).map(drop).unwrap_err();
    assert!(matches!(error, Error::Gpu(tierstream_cuda::Error::Driver { .. })), "{error:?}");
    bed.assert_given_back();
}

/// Who stops a load waits for the reads that are under way: they would write to memory that is gone.
#[test]
fn a_load_that_is_stopped_waits_for_its_reads() {
    let case = dense();
    for panics in [false, true] {
        let bed = Bed::new(true);
        bed.stub.set("hold", 1);
        let stopped = std::thread::scope(|scope| {
            let load = || {
                bed.load_telling(&case.file, &mut |_| {
                    let under_way = bed.stub.get("waiting") == 1;
                    if under_way {
                        // Later, and whoever returns before has not waited.
                        scope.spawn(|| {
                            std::thread::yield_now();
                            bed.stub.set("hold", 0);
                        });
                    }
                    assert!(!(under_way && panics), "on purpose");
                    !under_way
                })
                .map(drop)
            };
            let stopped = std::panic::catch_unwind(std::panic::AssertUnwindSafe(load));
            assert_eq!(bed.stub.get("hold"), 0);
            stopped
        });
        match stopped {
            Ok(stopped) => assert!(!panics && matches!(stopped, Err(Error::Cancelled))),
            Err(_) => assert!(panics),
        }
        bed.assert_given_back();
    }
}

/// Written to while it is read.
#[test]
fn a_file_that_changes_meanwhile_is_refused() {
    let case = dense();
    let bed = Bed::new(true);
    bed.stub.set("hold", 1);
    let error = bed.load_telling(&case.file, &mut |_| {
        // By then, llama.cpp is through with the file.
        if bed.stub.get("waiting") == 1 && bed.stub.get("hold") == 1 {
            let file = fs::File::options().append(true).open(&case.file.files()[0].path).unwrap();
            file.set_modified(SystemTime::now() + Duration::from_secs(5)).unwrap();
            bed.stub.set("hold", 0);
        }
        true
    });
    let error = error.map(drop).unwrap_err();
    assert!(matches!(error, Error::Io(tierstream_io::Error::Changed { .. })), "{error:?}");
    bed.assert_given_back();
}

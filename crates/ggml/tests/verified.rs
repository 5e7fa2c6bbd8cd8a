//! Weights that are compared with their checksums: one byte that a drive brings damaged, wherever it is,
//! is found and named, or is one that nobody computes with.

mod common;

use std::cell::Cell;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::{
    Room, Run, STOCK, Synth, assert_same_bits, config, faulty, go_on, reader, streamed_with,
    tokens, watched,
};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use tierstream_cuda::standin::{self, StandIn};
use tierstream_ggml::{
    ChecksumSource, Checksums, Context, ContextOptions, Error, Gpu, Keep, Mismatch, Model,
    Placement, PoolOptions, PoolSize, Prefetch, Result, Source, Weights,
};
use tierstream_gguf::Tensor;
use tierstream_io::wrap::{Action, Fault, Rule};
use tierstream_io::{Config, EngineKind, Reader};
use tierstream_pack::{Pack, Writer, target};
use tierstream_pool::Policy;
use tierstream_synth::{Arch, Quant, Spec, TensorType};

/// Where a model computes, and with which pool.
#[derive(Debug, Clone, Copy)]
enum Where {
    Cpu(Room),
    Gpu(Room),
    /// With a pool of half of the experts in host memory below.
    GpuAbove(Room),
}

const EVERYWHERE: [Where; 6] = [
    Where::Cpu(Room::Preloaded),
    Where::Cpu(Room::Share(0.25)),
    Where::Cpu(Room::Floor(0)),
    Where::Gpu(Room::Preloaded),
    Where::Gpu(Room::Share(0.25)),
    Where::GpuAbove(Room::Share(0.25)),
];

/// A model, its checksums, and what it computes.
struct Case {
    path: PathBuf,
    file: tierstream_gguf::Model,
    sums: Vec<Vec<u64>>,
    run: Run,
    reference: Vec<f32>,
    vocab: u32,
    _synth: Synth,
}

impl Case {
    fn new(spec: &Spec) -> Self {
        let synth = Synth::new(spec);
        let file = tierstream_gguf::Model::open(&synth.path).unwrap();
        let first = tierstream_sums::reference(&file, None, &reader(), &mut |_| true).unwrap();
        Self::of(synth.path.clone(), synth, file, first.sums)
    }

    /// The same model, packed.
    fn packed(spec: &Spec) -> Self {
        let synth = Synth::new(spec);
        let model = tierstream_gguf::Model::open(&synth.path).unwrap();
        let dir = synth.dir().join("packed");
        std::fs::create_dir(&dir).unwrap();
        let target = target(&synth.path, &dir);
        let options = tierstream_pack::Options::default();
        Writer::new(&model, &target, options, reader()).unwrap().write(&mut |_| true).unwrap();
        let pack = Pack::open(&target).unwrap();
        let sums = pack.checksums().to_vec();
        Self::of(target, synth, pack.into_model(), sums)
    }

    fn of(path: PathBuf, synth: Synth, file: tierstream_gguf::Model, sums: Vec<Vec<u64>>) -> Self {
        let placement = Placement::Cpu;
        let resident =
            Model::load(&file, Weights::Streamed, &placement, reader(), &mut go_on).unwrap();
        common::attach(&resident, Room::Preloaded, Policy::Lru);
        // Every expert of every layer comes to be asked for by some of so many tokens, or nearly.
        let run = Run::new(&resident, 48, 4, 16);
        let reference = run.logits(&resident);
        let vocab = resident.vocab().len();
        Self { path, file, sums, run, reference, vocab, _synth: synth }
    }

    fn checksums(&self) -> Arc<Checksums> {
        let source = ChecksumSource { what: "of this test".to_owned(), record: None };
        Checksums::new(&self.file, &self.sums, source).unwrap()
    }

    fn load(&self, at: Where, reader: Arc<Reader>) -> Result<Model> {
        let (placement, room, below) = match at {
            Where::Cpu(room) => (Placement::Cpu, room, None),
            Where::Gpu(room) => (gpu(), room, None),
            Where::GpuAbove(room) => (gpu(), room, Some(PoolSize::Share(0.5))),
        };
        let source = Source { checksums: Some(self.checksums()), ..Source::of(reader) };
        let model =
            Model::load_from(&self.file, Weights::Streamed, &placement, source, &mut go_on)?;
        let size = match room {
            Room::Preloaded => PoolSize::Share(1.0),
            Room::Share(share) => PoolSize::Share(share),
            Room::Floor(more) => PoolSize::Bytes(model.least_pool_bytes() + more),
        };
        let preload = room == Room::Preloaded;
        let (policy, seed, staged) = (Policy::Lru, 1, 2);
        model
            .attach_pool(&PoolOptions { size, policy, seed, preload, below, staged }, &mut go_on)?;
        Ok(model)
    }

    fn logits(&self, at: Where, reader: Arc<Reader>) -> Result<Vec<f32>> {
        let model = self.load(at, reader)?;
        self.run.logits_in(&mut self.run.context(&model))
    }

    /// The file of a model's file with this index.
    fn file_path(&self, file: usize) -> &Path {
        &self.file.files()[file].path
    }

    /// Reads in which a byte of the model's (first) file is damaged.
    fn damaged(&self, at: u64) -> Arc<Reader> {
        faulty(vec![Rule::flip(self.file_path(0), at)])
    }

    /// The tensor that a byte of the first file is of, and which share of it.
    fn owner(&self, at: u64) -> Option<(&Tensor, usize)> {
        self.file.tensors().iter().zip(&self.sums).find_map(|(tensor, sums)| {
            let share_bytes = tensor.len / sums.len() as u64;
            let starts = (0..sums.len()).map(|n| (n, self.share(&tensor.name, n)));
            let mut holds = starts.filter(|(_, start)| (*start..start + share_bytes).contains(&at));
            holds.next().filter(|_| tensor.file == 0).map(|(n, _)| (tensor, n))
        })
    }

    /// Where a share of a tensor begins.
    fn share(&self, tensor: &str, nth: usize) -> u64 {
        let index = self.file.tensor_index(tensor).unwrap();
        let tensor = &self.file.tensors()[index];
        let share_bytes = tensor.len / self.sums[index].len() as u64;
        tensor.offset + nth as u64 * tensor.stride.unwrap_or(share_bytes)
    }

    /// One damaged byte: an error that names its tensor, or, if nobody needs it, what is always computed there.
    /// Whether it was the error.
    fn check(&self, at: Where, byte: u64, expected: &[f32]) -> bool {
        let what = format!("{at:?}, byte {byte}");
        let owner = self.owner(byte);
        match self.logits(at, self.damaged(byte)) {
            Err(Error::Checksum(mismatch)) => {
                let Mismatch { path, tensor, expert, block, offset, end, .. } = *mismatch;
                let (owner, share) = owner.unwrap_or_else(|| panic!("{what}: {tensor}"));
                assert_eq!((&*tensor, &*path), (&*owner.name, self.file_path(0)), "{what}");
                assert!((offset..end).contains(&byte), "{what}: {offset} to {end}");
                let is_expert = self.sums[self.file.tensor_index(&tensor).unwrap()].len() > 1;
                assert_eq!(expert, is_expert.then_some(share), "{what}");
                let number = tensor.strip_prefix("blk.").and_then(|n| n.split('.').next());
                assert_eq!(block, number.map(|n| n.parse().unwrap()), "{what}");
                true
            }
            Err(other) => panic!("{what}: {other:?}"),
            Ok(logits) => {
                assert_same_bits(expected, &logits, self.vocab, &what);
                // All that is read at the load is found then.
                let preloaded =
                    matches!(at, Where::Cpu(Room::Preloaded) | Where::Gpu(Room::Preloaded));
                let is_dense = owner.is_some_and(|(owner, _)| !owner.name.contains("_exps.weight"));
                assert!(owner.is_none() || !(preloaded || is_dense), "{what} was not noticed");
                false
            }
        }
    }

    /// The first and the last byte of each tensor, and the bytes beside them.
    fn ends(&self) -> Vec<u64> {
        let mut ends = Vec::new();
        for tensor in self.file.tensors().iter().filter(|t| t.file == 0) {
            let (start, end) = (tensor.offset, tensor.end());
            ends.extend([start.saturating_sub(1), start, end - 1, end]);
        }
        let (first, last) = (self.file.files()[0].data_offset, self.file.files()[0].len);
        ends.retain(|at| (first..last).contains(at));
        ends.sort_unstable();
        ends.dedup();
        ends
    }

    /// Damages some of the ends of tensors, and bytes from anywhere.
    fn check_all(&self, places: &[Where], cases: u32) {
        let data = self.file.files()[0].data_offset..self.file.files()[0].len;
        for &at in places {
            let healthy = self.logits(at, reader()).unwrap();
            // Dense models have other kernels on the CPU than on the stand-in.
            if self.file.tensor("blk.0.ffn_up_exps.weight").is_some() {
                assert_same_bits(&self.reference, &healthy, self.vocab, &format!("{at:?}"));
            }
            let mut config = ProptestConfig::with_cases(cases);
            config.failure_persistence = None;
            let bytes = prop_oneof![
                prop::sample::select(self.ends()),
                data.clone(),
                data.clone().prop_map(|at| at & !4095)
            ];
            let found = Cell::new(0);
            let mut runner = TestRunner::new(config);
            let result = runner.run(&bytes, |byte| {
                found.set(found.get() + u32::from(self.check(at, byte, &healthy)));
                Ok(())
            });
            result.unwrap();
            let found = found.get();
            assert!(found > cases / 4, "{at:?}: {found} of {cases} were damaged weights");
        }
    }
}

fn gpu() -> Placement {
    let stand_in = StandIn::new(standin::Config::default()).unwrap();
    Placement::Gpu(Gpu::stand_in(&stand_in).unwrap())
}

/// Parts that are read in place, and of no whole blocks; with room between the tensors.
fn experts() -> Spec {
    let mut spec = Spec::new(Arch::Qwen3Moe).experts(12, 3).width(544).quant(TensorType::Q8_0);
    (spec.n_ff_exp, spec.n_layer, spec.alignment) = (288, 3, 256);
    spec
}

#[test]
fn a_damaged_byte_of_a_model_with_experts_is_found_and_named() {
    Case::new(&experts()).check_all(&EVERYWHERE, 40);
}

/// Parts that come through the ring, several in a read.
#[test]
fn a_damaged_byte_of_small_experts_is_found_and_named() {
    Case::new(&Spec::new(Arch::Qwen3Moe).quant(Quant::Q4_K_M)).check_all(&EVERYWHERE, 20);
}

#[test]
fn a_damaged_byte_of_a_packed_model_is_found_and_named() {
    Case::packed(&experts()).check_all(&EVERYWHERE, 40);
    Case::packed(&Spec::new(Arch::GptOss)).check_all(&EVERYWHERE, 12);
}

/// With weights that are converted for the CPU's kernels, in parts of 4 MiB.
#[test]
fn a_damaged_byte_of_a_dense_model_is_found_and_named() {
    let mut spec = Spec::new(Arch::Llama).quant(TensorType::Q4_0);
    spec.vocab = 32_000;
    let places = [Where::Cpu(Room::Preloaded), Where::Gpu(Room::Preloaded)];
    Case::new(&spec).check_all(&places, 30);
    Case::packed(&spec).check_all(&places, 15);
}

/// Of experts that are not streamed, all lie in one tensor: each has its checksum there.
#[test]
fn packed_experts_that_are_resident_are_compared_one_by_one() {
    let case = Case::packed(&experts());
    let load = |reader| {
        let source = Source { checksums: Some(case.checksums()), ..Source::of(reader) };
        Model::load_from(&case.file, STOCK, &Placement::Cpu, source, &mut go_on)
    };
    let model = load(reader()).unwrap();
    assert!(model.checksums().unwrap().bytes() == case.file.tensor_bytes());
    let tensor = case.file.tensor("blk.1.ffn_up_exps.weight").unwrap();
    let byte = case.share(&tensor.name, 7) + 5;
    let error = load(case.damaged(byte)).map(drop).unwrap_err();
    let Error::Checksum(mismatch) = error else { panic!("{error:?}") };
    assert_eq!((mismatch.tensor, mismatch.expert), (tensor.name.clone(), Some(7)));
}

#[test]
fn with_every_engine_and_through_the_page_cache() {
    let case = Case::new(&experts());
    for engine in [EngineKind::Pread, EngineKind::Buffered] {
        for at in EVERYWHERE {
            let reader = || Arc::new(Reader::new(Config { engine, ..config() }).unwrap());
            let logits = case.logits(at, reader()).unwrap();
            assert_same_bits(&case.reference, &logits, case.vocab, &format!("{engine:?}, {at:?}"));
        }
    }
}

/// What goes to a GPU is hashed in the order of the file, whatever order it comes in.
#[test]
fn reads_that_come_late_are_hashed_in_their_place() {
    let mut spec = experts();
    spec.vocab = 4096;
    for case in [Case::new(&spec), Case::packed(&spec)] {
        // Reads of a quarter of what they are else, so that most tensors take several.
        let late = |wrapped| Fault::new(wrapped, (0..400).step_by(3).map(nth_is_late).collect());
        fn nth_is_late(nth: u64) -> Rule {
            Rule::all(Action::Delay(Duration::from_millis(2))).nth(nth..nth + 1)
        }
        let wrap: tierstream_io::Wrap = Box::new(move |engine| Box::new(late(engine).unwrap()));
        let config = Config { wrap: Some(wrap), buffer_bytes: 64 << 10, ..config() };
        let reader = Arc::new(Reader::new(config).unwrap());
        let at = Where::Gpu(Room::Preloaded);
        let model = watched("late reads", || case.load(at, reader)).unwrap();
        assert_eq!(model.checksums().unwrap().bytes(), case.file.tensor_bytes());
    }
}

/// The request fails at the damaged record, and the next one, whose reads bring it as it is, is right.
#[test]
fn a_request_that_meets_damage_fails_and_the_next_one_works() {
    let case = Case::new(&experts());
    for at in [
        Where::Cpu(Room::Share(0.25)),
        Where::Gpu(Room::Share(0.25)),
        Where::GpuAbove(Room::Share(0.25)),
    ] {
        for prefetch in [Prefetch::Off, Prefetch::Lookahead] {
            watched(&format!("{at:?}, {prefetch:?}"), || {
                let run = Run { prefetch, ..case.run.clone() };
                let on = Arc::new(AtomicBool::new(false));
                let tensor = case.file.tensor("blk.2.ffn_down_exps.weight").unwrap();
                let rules = (0..12).map(|expert| {
                    let byte = case.share(&tensor.name, expert) + 1000;
                    Rule::flip(&case.path, byte).switch(on.clone())
                });
                let model = case.load(at, faulty(rules.collect())).unwrap();
                let mut context = run.context(&model);
                for _ in 0..2 {
                    on.store(true, Ordering::Relaxed);
                    model.clear_pool();
                    context.clear();
                    let error = run.logits_in(&mut context).unwrap_err();
                    let text = error.to_string();
                    let Error::Checksum(mismatch) = error else { panic!("{error:?}") };
                    assert_eq!((&mismatch.tensor, mismatch.block), (&tensor.name, Some(2)));
                    let expert = mismatch.expert.unwrap();
                    assert!(text.contains(&format!("expert {expert} of block 2")), "{text}");
                    assert!(text.contains("blk.2.ffn_down_exps.weight (bytes "), "{text}");
                    on.store(false, Ordering::Relaxed);
                    context.clear();
                    let logits = run.logits_in(&mut context).unwrap();
                    let what = format!("{at:?}, {prefetch:?}");
                    assert_same_bits(&case.reference, &logits, case.vocab, &what);
                }
            });
        }
    }
}

/// A prompt that needs more experts than there are slots reads records part by part.
#[test]
fn prompts_in_waves_are_compared_too() {
    for case in [Case::new(&experts()), Case::packed(&experts())] {
        let at = Where::Cpu(Room::Floor(0));
        let model = case.load(at, reader()).unwrap();
        let prompt = tokens(case.vocab, 64, 3);
        let options = ContextOptions { n_ctx: 256, n_batch: 64, ..ContextOptions::default() };
        let decode = |model: &Model| {
            let mut context = Context::new(model.clone(), &options).unwrap();
            let mut rows = Vec::new();
            context.decode(&prompt, Keep::All, |_, row| rows.extend_from_slice(row)).map(|()| rows)
        };
        let before = model.checksums().unwrap().bytes();
        let rows = decode(&model).unwrap();
        let read = model.expert_counters().bytes_read;
        assert_eq!(model.checksums().unwrap().bytes() - before, read);
        let all = streamed_with(&case.path, Room::Preloaded, Policy::Lru, reader());
        assert_same_bits(&decode(&all).unwrap(), &rows, case.vocab, "in waves");
        for name in ["blk.0.ffn_gate_exps.weight", "blk.0.ffn_down_exps.weight"] {
            let byte = case.share(name, 5);
            let model = case.load(at, case.damaged(byte)).unwrap();
            let error = decode(&model).unwrap_err();
            let Error::Checksum(mismatch) = error else { panic!("{error:?}") };
            assert_eq!((&*mismatch.tensor, mismatch.expert), (name, Some(5)));
        }
    }
}

#[test]
fn what_llama_reads_by_itself_is_not_said_to_be_verified() {
    let case = Case::new(&experts());
    let source = Source { checksums: Some(case.checksums()), ..Source::of(reader()) };
    let load = Model::load_from(&case.file, STOCK, &Placement::Cpu, source, &mut go_on);
    assert!(matches!(load.map(drop), Err(Error::NotVerified { tensor: None, .. })));
}

/// What the page cache has is compared where it is mapped.
#[test]
fn what_is_cached_is_compared_too() {
    let mut case = Case::new(&Spec::new(Arch::Qwen3Moe));
    let cached = || Arc::new(Reader::new(Config { use_cache: true, ..config() }).unwrap());
    std::fs::read(&case.path).unwrap();
    let load = |case: &Case| watched("a load", || case.load(Where::Cpu(Room::Preloaded), cached()));
    let model = load(&case).unwrap();
    assert_same_bits(&case.reference, &case.run.logits(&model), case.vocab, "cached");
    drop(model);
    let tensors = case.file.tensors().to_vec().into_iter();
    let mut damaged = false;
    for tensor in tensors.filter(|t| t.name.contains("attn_q.") || t.name.contains("ffn_up_exps")) {
        let at = tensor.offset + tensor.len / 2;
        for _ in ["damage", "repair"] {
            // Closed again: there is no mapping while somebody may write.
            let file = OpenOptions::new().read(true).write(true).open(&case.path).unwrap();
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
            drop(file);
            damaged = !damaged;
            case.file = tierstream_gguf::Model::open(&case.path).unwrap();
            match load(&case) {
                Err(Error::Checksum(mismatch)) if damaged => {
                    assert_eq!(mismatch.tensor, tensor.name);
                }
                loaded => {
                    assert!(loaded.is_ok() && !damaged, "{}: {:?}", tensor.name, loaded.err())
                }
            }
        }
    }
}

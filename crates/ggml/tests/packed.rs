//! Packed models: the same logits as those of the GGUF that they were made of, bit for bit, and a
//! read for each record that is missing.

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::{
    Room, Run, STOCK, Synth, assert_same_bits, attach, config, faulty, load_on_stand_in, load_with,
    reader, stock, streamed_with,
};
use tierstream_cuda::standin::{Config, StandIn};
use tierstream_ggml::{Error, Model, Placement, PoolOptions, PoolSize, Prefetch, Weights};
use tierstream_io::Reader;
use tierstream_io::wrap::{Action, Rule};
use tierstream_pack::{Options, Pack, Writer, target};
use tierstream_pool::Policy;
use tierstream_synth::{Arch, Quant, Spec, TensorType};

const ROOMS: [Room; 4] = [Room::Preloaded, Room::Share(1.0), Room::Share(0.25), Room::Floor(0)];

/// Packs a model, into a folder of its own.
fn packed(synth: &Synth, experts_only: bool) -> PathBuf {
    let model = tierstream_gguf::Model::open(&synth.path).unwrap();
    let dir = synth.dir().join(if experts_only { "alone" } else { "whole" });
    std::fs::create_dir(&dir).unwrap();
    let target = target(&synth.path, &dir);
    let options = Options { experts_only };
    Writer::new(&model, &target, options, reader()).unwrap().write(&mut |_| true).unwrap();
    target
}

/// The GGUF files are not there any more.
fn hide(synth: &Synth) {
    for file in tierstream_gguf::Model::open(&synth.path).unwrap().files() {
        std::fs::rename(&file.path, file.path.with_extension("away")).unwrap();
    }
}

/// A packed model of `spec`, over all pool sizes, resident, and on a GPU.
fn check(spec: &Spec) {
    let synth = Synth::new(spec);
    let reference_model = stock(&synth.path);
    let vocab = reference_model.vocab().len();
    let alone = packed(&synth, true);
    let whole = packed(&synth, false);
    for (prompt, n_batch) in [(10, 1), (70, 64)] {
        let run = Run::new(&reference_model, prompt, 8, n_batch);
        let run = Run { prefetch: Prefetch::Lookahead, ..run };
        let reference = run.logits(&reference_model);
        for room in ROOMS {
            let what = format!("experts alone, batch {n_batch}, {room:?}");
            let model = streamed_with(&alone, room, Policy::Lru, reader());
            assert_same_bits(&reference, &run.logits(&model), vocab, &what);
        }
    }
    hide(&synth);
    for (prompt, n_batch) in [(10, 1), (70, 64)] {
        let run = Run::new(&reference_model, prompt, 8, n_batch);
        let run = Run { prefetch: Prefetch::Lookahead, ..run };
        let reference = run.logits(&reference_model);
        for room in ROOMS {
            let what = format!("batch {n_batch}, {room:?}");
            let model = streamed_with(&whole, room, Policy::Lru, reader());
            assert_same_bits(&reference, &run.logits(&model), vocab, &what);
            let counters = model.expert_counters();
            assert!(counters.requests == counters.hits + counters.faults, "{what}: {counters:?}");

            let run = Run { prefetch: Prefetch::Off, ..run.clone() };
            let stand_in = StandIn::new(Config::default()).unwrap();
            let model = load_on_stand_in(&whole, &stand_in, reader());
            attach(&model, room, Policy::Lru);
            assert_same_bits(&reference, &run.logits(&model), vocab, &format!("GPU, {what}"));
        }
        let resident = load_with(&whole, STOCK, reader());
        assert!(!resident.is_streamed());
        assert_same_bits(&reference, &run.logits(&resident), vocab, "resident");
    }
}

#[test]
fn qwen3moe_q4_k_m_of_several_size_classes() {
    check(&Spec::new(Arch::Qwen3Moe).quant(Quant::Q4_K_M));
}

/// Parts that are read in place, and of no whole blocks.
fn large_odd_parts() -> Spec {
    let mut spec = Spec::new(Arch::Qwen3Moe).experts(12, 3).width(544).quant(TensorType::Q8_0);
    spec.n_ff_exp = 288;
    spec
}

#[test]
fn qwen3moe_large_odd_parts() {
    check(&large_odd_parts());
}

#[test]
fn olmoe_split_into_files() {
    let mut spec = Spec::new(Arch::Olmoe);
    spec.split_bytes = Some(1 << 20);
    spec.split_empty_first = true;
    check(&spec);
}

#[test]
fn gpt_oss_with_biases() {
    check(&Spec::new(Arch::GptOss));
}

#[test]
fn deepseek2_fused_q4_k_m() {
    let mut spec = Spec::new(Arch::DeepSeek2).quant(Quant::Q4_K_M);
    spec.fused_gate_up = true;
    check(&spec);
}

#[test]
fn llama4_scaled_inputs() {
    check(&Spec::new(Arch::Llama4));
}

/// With kernels of their own layouts, too.
#[test]
fn a_dense_model() {
    let synth = Synth::new(&Spec::new(Arch::Llama));
    let repacked = Weights::Stock { mmap: false, repack: true, cpu_experts: false };
    let references = [STOCK, repacked].map(|weights| load_with(&synth.path, weights, reader()));
    let run = Run::new(&references[0], 40, 8, 16);
    let logits = references.each_ref().map(|model| run.logits(model));
    let alone = Writer::new(
        &tierstream_gguf::Model::open(&synth.path).unwrap(),
        &synth.dir().join("x.tspack"),
        Options { experts_only: true },
        reader(),
    );
    assert!(matches!(alone.err(), Some(tierstream_pack::Error::NoExperts { .. })));
    let whole = packed(&synth, false);
    hide(&synth);
    let vocab = references[0].vocab().len();
    for (weights, reference) in [(Weights::Streamed, 1), (repacked, 1)] {
        let model = load_with(&whole, weights, reader());
        assert_same_bits(&logits[reference], &run.logits(&model), vocab, &format!("{weights:?}"));
    }
}

/// Faults and reads of a run of single tokens with a small pool, after the load.
fn faults_and_reads(path: &Path) -> (u64, u64) {
    let reader = reader();
    let model = streamed_with(path, Room::Floor(0), Policy::Lru, reader.clone());
    let run = Run::new(&model, 24, 8, 1);
    let mut context = run.context(&model);
    let before = reader.stats().reads;
    run.logits_in(&mut context).unwrap();
    (model.expert_counters().faults, reader.stats().reads - before)
}

#[test]
fn a_miss_is_one_read() {
    let synth = Synth::new(&large_odd_parts());
    let (faults, reads) = faults_and_reads(&synth.path);
    // Parts that are read through the ring share a read with a neighbour now and then.
    assert!(faults > 100 && 2 * reads >= 5 * faults, "{faults} {reads}");
    assert_eq!(faults_and_reads(&packed(&synth, false)), (faults, faults));
    assert_eq!(faults_and_reads(&packed(&synth, true)), (faults, faults));
}

/// In host memory below a GPU's as well; with buffers smaller than a record.
#[test]
fn a_miss_of_the_pool_below_a_gpus_is_one_read() {
    let synth = Synth::new(&large_odd_parts());
    let run_on = |path: &Path| {
        let reader: Arc<Reader> = reader();
        assert!(config().buffer_bytes < 3 * 544 * 288);
        let stand_in = StandIn::new(Config::default()).unwrap();
        let model = load_on_stand_in(path, &stand_in, reader.clone());
        let least = PoolSize::Bytes(model.below_bytes().0);
        let pool = PoolOptions {
            size: PoolSize::Bytes(model.least_pool_bytes()),
            policy: Policy::Lru,
            seed: 1,
            preload: false,
            below: Some(least),
            staged: 1,
        };
        model.attach_pool(&pool, &mut |_| true).unwrap();
        let run = Run::new(&model, 24, 8, 1);
        let mut context = run.context(&model);
        let before = reader.stats().reads;
        let logits = run.logits_in(&mut context).unwrap();
        let counters = model.expert_counters();
        let records = counters.bytes_read / (3 * 544 * 288 / 32 * 34);
        (logits, records, reader.stats().reads - before, model.vocab().len())
    };
    let (expected, records, reads, vocab) = run_on(&synth.path);
    assert!(2 * reads >= 5 * records);
    let (logits, records, reads, _) = run_on(&packed(&synth, false));
    assert!(records > 100);
    assert_eq!(reads, records);
    assert_same_bits(&expected, &logits, vocab, "packed");
}

/// A prompt that needs more records than there are slots computes in waves, stage by stage.
#[test]
fn waves_read_a_record_once_or_by_stages() {
    let synth = Synth::new(&large_odd_parts());
    let whole = packed(&synth, false);
    let reader = reader();
    let model = streamed_with(&whole, Room::Floor(0), Policy::Lru, reader.clone());
    let run = Run::new(&model, 64, 2, 64);
    let reference = run.logits(&stock(&synth.path));
    let mut context = run.context(&model);
    let before = reader.stats().reads;
    let logits = run.logits_in(&mut context).unwrap();
    assert_same_bits(&reference, &logits, model.vocab().len(), "waves");
    let (faults, reads) = (model.expert_counters().faults, reader.stats().reads - before);
    // Gate and up together, and down.
    assert!(reads >= faults && reads <= 2 * faults, "{faults} {reads}");
}

#[test]
fn a_read_error_fails_the_request_and_not_the_model() {
    let synth = Synth::new(&large_odd_parts());
    let whole = packed(&synth, false);
    let pack = Pack::open(&whole).unwrap();
    let experts = tierstream_gguf::Experts::group(pack.model()).unwrap();
    let layer = &experts.layers()[1].parts[0];
    let bad = layer.offset..layer.offset + 12 * layer.stride;
    let rule = Rule::all(Action::Errno(5)).bytes(bad).nth(3..4);
    let model = streamed_with(&whole, Room::Floor(0), Policy::Lru, faulty(vec![rule]));
    let run = Run::new(&model, 24, 4, 1);
    let error = run.logits_in(&mut run.context(&model)).unwrap_err();
    assert!(matches!(error, Error::Io(_)) && error.to_string().contains("whole"), "{error}");
    let reference = run.logits(&stock(&synth.path));
    assert_same_bits(&reference, &run.logits(&model), model.vocab().len(), "again");
}

#[test]
fn stock_layouts_need_the_gguf() {
    let synth = Synth::qwen();
    let file = tierstream_pack::open(&packed(&synth, false)).unwrap();
    for (repack, cpu_experts) in [(true, false), (false, true)] {
        let weights = Weights::Stock { mmap: false, repack, cpu_experts };
        let loaded = Model::load(&file, weights, &Placement::Cpu, reader(), &mut |_| true);
        assert!(matches!(loaded.err(), Some(Error::PackedForStock { .. })));
    }
}

#[test]
fn a_pack_that_is_exchanged_is_noticed() {
    let synth = Synth::qwen();
    let whole = packed(&synth, false);
    let file = tierstream_pack::open(&whole).unwrap();
    let bytes = std::fs::read(&whole).unwrap();
    std::fs::remove_file(&whole).unwrap();
    std::fs::write(&whole, bytes).unwrap();
    let loaded = Model::load(&file, Weights::Streamed, &Placement::Cpu, reader(), &mut |_| true);
    assert!(matches!(loaded.err(), Some(Error::Io(tierstream_io::Error::Changed { .. }))));
}

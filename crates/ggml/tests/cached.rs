//! Weights that the page cache has: they are not read from the drive, and stay what they were when
//! somebody writes to the file.

mod common;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use common::{Run, STOCK, Synth, assert_same_bits, load_on_stand_in, load_with, watched};
use tierstream_cuda::standin::{Config as Gpu, StandIn};
use tierstream_ggml::{Model, Weights};
use tierstream_io::{Config, EngineKind, Reader, cache};
use tierstream_synth::{Arch, Quant, Spec, TensorType};

fn reader() -> Arc<Reader> {
    Arc::new(Reader::new(Config { use_cache: true, ..common::config() }).unwrap())
}

/// Has all, or nothing, of a file in the page cache.
fn warm(path: &Path) {
    let file = fs::File::open(path).unwrap();
    file.sync_all().unwrap();
    fs::read(path).unwrap();
    assert_eq!(cache::cached_bytes(&file).unwrap(), file.metadata().unwrap().len());
}

fn cool(path: &Path) {
    let file = fs::File::open(path).unwrap();
    cache::evict(&file).unwrap();
    assert_eq!(cache::cached_bytes(&file).unwrap(), 0);
}

/// Dense models: weights that stay as they are, and those that are converted; and a mixture.
fn specs() -> [Spec; 3] {
    let dense = || Spec::new(Arch::Llama);
    [dense().quant(TensorType::F16), dense().quant(Quant::Q4_K_M), Spec::new(Arch::Qwen3Moe)]
}

/// What came from the cache: mapped, copied.
fn from_cache(model: &Model) -> (u64, u64) {
    let from = model.from_cache();
    (from.mapped_bytes, from.copied_bytes)
}

/// The bytes that lie in the memory of a model are those of the file, wherever they came from.
fn check(model: &Model, run: &Run, expected: &[f32], what: &str) {
    let vocab = model.vocab().len();
    if model.is_streamed() {
        // Experts are copied from there when all are read at once.
        common::attach(model, common::Room::Preloaded, tierstream_pool::Policy::Lru);
    }
    assert_same_bits(expected, &run.logits(model), vocab, what);
}

/// What [`Weights::Streamed`] computes with kernels of the same layouts.
fn reference(path: &Path) -> (Run, Vec<f32>) {
    let file = tierstream_pack::open(path).unwrap();
    let is_dense = tierstream_gguf::Experts::group(&file).unwrap().is_empty();
    let stock = if is_dense {
        Weights::Stock { mmap: false, repack: true, cpu_experts: false }
    } else {
        STOCK
    };
    let model = load_with(path, stock, common::reader());
    let run = Run::new(&model, 12, 4, 16);
    let logits = run.logits(&model);
    (run, logits)
}

#[test]
fn what_is_cached_is_not_read_from_the_drive() {
    // Some of the second one's weights are converted.
    for (spec, is_converted) in specs().into_iter().zip([false, true, false]) {
        let synth = Synth::new(&spec);
        let (run, expected) = reference(&synth.path);
        cool(&synth.path);
        let cold = reader();
        let model = load_with(&synth.path, Weights::Streamed, cold.clone());
        let read = cold.stats().bytes_wanted;
        check(&model, &run, &expected, "cold");
        // The kernel has read the header, and may have read ahead of it.
        let all = tierstream_pack::open(&synth.path).unwrap().tensor_bytes();
        assert!(model.from_cache().bytes() < all, "{:?} of {all}", model.from_cache());
        drop(model);
        warm(&synth.path);
        let mapped = reader();
        let model = load_with(&synth.path, Weights::Streamed, mapped.clone());
        let (mapped_bytes, copied_bytes) = from_cache(&model);
        assert!(mapped_bytes > 0 && (copied_bytes > 0) == is_converted, "{spec:?}");
        check(&model, &run, &expected, "cached");
        // All of it, with the experts that were read at once; the drive was asked for nothing.
        let (mapped_bytes, copied_bytes) = from_cache(&model);
        assert_eq!(mapped_bytes + copied_bytes, all, "{spec:?}");
        assert_eq!(mapped.stats().bytes_wanted, copied_bytes, "{spec:?}");
        assert_eq!(model.cache_remark(), None);
        // An engine that is named has all reads.
        let named = Config { engine: EngineKind::Pread, use_cache: false, ..common::config() };
        let named = Arc::new(Reader::new(named).unwrap());
        let model = load_with(&synth.path, Weights::Streamed, named.clone());
        assert!(named.stats().bytes_wanted >= read);
        assert_eq!(from_cache(&model), (0, 0));
        check(&model, &run, &expected, "named");
    }
}

#[test]
fn part_of_a_file_is_cached() {
    let spec = Spec::new(Arch::Llama).quant(TensorType::F16).scale_to(80 << 20);
    let synth = Synth::new(&spec);
    let (run, expected) = reference(&synth.path);
    let bytes = fs::metadata(&synth.path).unwrap().len();
    for (from, to) in [(0, bytes / 3), (bytes / 3, bytes), (bytes / 4, 3 * bytes / 4)] {
        cool(&synth.path);
        let file = fs::File::open(&synth.path).unwrap();
        file.read_exact_at(&mut vec![0; (to - from) as usize], from).unwrap();
        let reader = reader();
        let model = load_with(&synth.path, Weights::Streamed, reader.clone());
        let (mapped, copied) = from_cache(&model);
        assert!((16 << 20..bytes - (16 << 20)).contains(&mapped), "{mapped} of {from}..{to}");
        assert!(reader.stats().bytes_wanted > copied);
        check(&model, &run, &expected, &format!("{from}..{to}"));
    }
}

#[test]
fn weights_stay_when_somebody_writes_to_the_file() {
    for spec in specs() {
        let synth = Synth::new(&spec);
        let (run, expected) = reference(&synth.path);
        let original = fs::read(&synth.path).unwrap();
        type Change = fn(&Path, &[u8]);
        let changes: [Change; 3] = [
            |path, original| fs::write(path, vec![0x55; original.len()]).unwrap(),
            |path, _| fs::OpenOptions::new().write(true).open(path).unwrap().set_len(4096).unwrap(),
            |path, _| fs::remove_file(path).unwrap(),
        ];
        // Before something was computed with them, or after it.
        for (change, is_computed) in changes.into_iter().flat_map(|c| [(c, false), (c, true)]) {
            fs::write(&synth.path, &original).unwrap();
            warm(&synth.path);
            let model = load_with(&synth.path, Weights::Streamed, reader());
            assert!(from_cache(&model).0 > 0, "{spec:?}");
            if model.is_streamed() {
                // All experts are in memory of their own.
                common::attach(&model, common::Room::Preloaded, tierstream_pool::Policy::Lru);
            }
            let vocab = model.vocab().len();
            if is_computed {
                assert_same_bits(&expected, &run.logits(&model), vocab, "before");
            }
            watched("a writer", || change(&synth.path, &original));
            assert_same_bits(&expected, &run.logits(&model), vocab, "after");
        }
    }
}

#[test]
fn weights_of_a_gpu_come_from_the_cache() {
    let synth = Synth::qwen();
    let model = common::stock(&synth.path);
    let run = Run::new(&model, 12, 4, 16);
    let expected = run.logits(&model);
    warm(&synth.path);
    let device = StandIn::new(Gpu { memory_bytes: 256 << 20, ..Gpu::default() }).unwrap();
    let reader = reader();
    let model = load_on_stand_in(&synth.path, &device, reader.clone());
    check(&model, &run, &expected, "on the stand-in");
    // Embeddings are looked up in host memory.
    let (mapped, copied) = from_cache(&model);
    assert!(copied > mapped && copied == reader.stats().bytes_wanted, "{mapped} {copied}");
    assert!(mapped + copied >= tierstream_pack::open(&synth.path).unwrap().tensor_bytes());
}

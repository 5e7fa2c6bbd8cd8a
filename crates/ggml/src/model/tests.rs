//! Models of which not all is streamed, or nothing is there.

use tierstream_cuda::standin::{Config as StandInConfig, StandIn};
use tierstream_io::Config;
use tierstream_synth::{Arch, Spec};

use super::*;
use crate::context::{Context, ContextOptions, Keep};

fn logits(model: &Model) -> Vec<u32> {
    let options = ContextOptions { n_ctx: 256, n_batch: 16, ..ContextOptions::default() };
    let mut context = Context::new(model.clone(), &options).unwrap();
    let tokens: Vec<i32> = (1..40).collect();
    let mut all = Vec::new();
    let row = |_, row: &[f32]| all.extend(row.iter().map(|x| x.to_bits()));
    context.decode(&tokens, Keep::All, row).unwrap();
    all
}

/// Layers that cannot be streamed are loaded with the dense weights, and named; the output is the
/// same.
#[test]
fn layers_that_stay_resident() {
    stay_resident(&|| Placement::Cpu);
}

#[test]
fn layers_that_stay_resident_on_a_gpu() {
    stay_resident(&|| {
        let stand_in = StandIn::new(StandInConfig::default()).unwrap();
        Placement::Gpu(Gpu::stand_in(&stand_in).unwrap())
    });
}

fn stay_resident(placement: &dyn Fn() -> Placement) {
    let dir = tempfile::tempdir().unwrap();
    let spec = Spec::new(Arch::Qwen3Moe);
    let written = spec.write(dir.path().join("model.gguf")).unwrap();
    let file = tierstream_gguf::Model::open(&written.files[0]).unwrap();
    let experts = tierstream_gguf::Experts::group(&file).unwrap();
    // It has all reads, so that they can be counted.
    let reader =
        || Arc::new(Reader::new(Config { use_cache: false, ..Config::default() }).unwrap());
    let stock = Weights::Stock { mmap: true, repack: false, cpu_experts: false };
    let expected =
        logits(&Model::load(&file, stock, &Placement::Cpu, reader(), &mut |_| true).unwrap());
    let all: Vec<u32> = experts.layers().iter().map(|l| l.layer).collect();
    for blocks in [&all[1..2], &all[..all.len() - 1], &all[..]] {
        let resident: Vec<_> = blocks.iter().map(|&b| (b, format!("reason {b}"))).collect();
        let (placement, reader) = (placement(), reader());
        let go_on = &mut |_| true;
        let source = Source::of(reader.clone());
        let model = Model::load_ours(&file, &experts, &placement, source, resident, go_on);
        let model = model.unwrap();
        // And what lies between neighbours in the file.
        let ours = file.tensor_bytes() - model.expert_bytes();
        let most = ours + file.tensors().len() as u64 * file.alignment();
        assert!((ours..most).contains(&reader.stats().bytes_wanted), "{blocks:?}");
        let named: Vec<u32> = model.resident_blocks().iter().map(|(block, _)| *block).collect();
        assert_eq!(named, blocks);
        assert_eq!(model.is_streamed(), blocks.len() < all.len());
        let streamed = all.len() - blocks.len();
        let records: u64 = experts.expert_bytes() / all.len() as u64;
        assert_eq!(model.expert_bytes(), records * streamed as u64);
        let size = PoolSize::Share(0.25);
        let pool = PoolOptions {
            size,
            policy: Policy::Lru,
            seed: 1,
            preload: false,
            below: None,
            staged: 2,
        };
        model.attach_pool(&pool, &mut |_| true).unwrap();
        assert!(logits(&model) == expected, "{blocks:?}");
    }
}

#[test]
fn a_rehearsed_model_computes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let reader = Arc::new(Reader::new(Config::default()).unwrap());
    for arch in [Arch::Qwen3Moe, Arch::Llama] {
        let written = Spec::new(arch).write(dir.path().join("model.gguf")).unwrap();
        let file = tierstream_gguf::Model::open(&written.files[0]).unwrap();
        let options = ContextOptions { n_ctx: 256, n_batch: 16, ..ContextOptions::default() };
        let rehearsal = crate::Rehearsal::new(&file, &reader, &options).unwrap();
        let model = rehearsal.model().clone();
        let mut context = Context::new(model.clone(), &options).unwrap();
        let decoded = context.decode(&[1], Keep::Last, |_, _| ());
        assert!(matches!(decoded, Err(Error::Rehearsal)), "{decoded:?}");
        let size = PoolSize::Share(1.0);
        let pool = PoolOptions {
            size,
            policy: Policy::Lru,
            seed: 1,
            preload: true,
            below: None,
            staged: 2,
        };
        let attached = model.attach_pool(&pool, &mut |_| true);
        assert!(matches!(attached, Err(Error::Rehearsal)), "{attached:?}");
    }
}

/// What is not the pool's takes memory: the pool gives way by half of what it can spare, or by all.
#[test]
fn a_pool_on_a_gpu_makes_room_for_others() {
    let dir = tempfile::tempdir().unwrap();
    let written = Spec::new(Arch::Qwen3Moe).write(dir.path().join("model.gguf")).unwrap();
    let file = tierstream_gguf::Model::open(&written.files[0]).unwrap();
    let config = StandInConfig { memory_bytes: 64 << 20, granularity: 16 << 10 };
    // Tenths of what the pool can spare, how often it is tried, and whether it works.
    for (tenths, tries, works) in [(0, 1, true), (4, 2, true), (8, 3, true), (12, 3, false)] {
        let stand_in = StandIn::new(config).unwrap();
        let gpu = Placement::Gpu(Gpu::stand_in(&stand_in).unwrap());
        let reader = Arc::new(Reader::new(Config::default()).unwrap());
        let model = Model::load(&file, Weights::Streamed, &gpu, reader, &mut |_| true).unwrap();
        let size = PoolSize::Share(1.0);
        let pool = PoolOptions {
            size,
            policy: Policy::Lru,
            seed: 1,
            preload: true,
            below: None,
            staged: 1,
        };
        model.attach_pool(&pool, &mut |_| true).unwrap();
        let free_bytes = || stand_in.device().memory().unwrap().free_bytes;
        let _others = stand_in.device().allocate(free_bytes() - (16 << 10)).unwrap();
        let spare = model.vram_bytes().unwrap()
            - model.least_pool_bytes()
            - model.rounding_bytes().unwrap();
        let mut tried = 0;
        let made = model.with_room(|| {
            tried += 1;
            stand_in.device().allocate((spare * tenths / 10).max(1)).ok()
        });
        let made = made.unwrap();
        assert_eq!((tried, made.is_some()), (tries, works), "{tenths} tenths");
        let least = model.least_pool_bytes();
        let slots = model.pool_bytes().0;
        match tries {
            1 => assert_eq!(slots, model.whole_pool_bytes()),
            2 => assert!(least * 2 < slots && slots < model.whole_pool_bytes()),
            // Or a few more, in the granules that those take.
            _ => assert!(slots <= least + model.rounding_bytes().unwrap()),
        }
    }
}

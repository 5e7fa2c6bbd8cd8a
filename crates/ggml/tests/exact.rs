//! Streamed output equals the resident run of stock llama.cpp, bit for bit.

use std::path::Path;
use std::sync::Arc;

use tierstream_ggml::{
    Context, ContextOptions, Keep, Model, PoolOptions, PoolSize, Token, Weights,
};
use tierstream_io::{Config, Reader};
use tierstream_pool::Policy;

fn go_on(_: f32) -> bool {
    true
}

fn reader() -> Arc<Reader> {
    Arc::new(Reader::new(Config { ring_bytes: 8 << 20, ..Config::default() }).unwrap())
}

fn load(path: &Path, weights: Weights) -> Model {
    let file = tierstream_gguf::Model::open(path).unwrap();
    Model::load(&file, weights, reader(), &mut go_on).unwrap()
}

fn logits(model: &Model, prompt: &[Token], generate: usize, n_batch: u32) -> Vec<f32> {
    let n_ctx = u32::try_from(prompt.len() + generate).unwrap().next_multiple_of(256);
    let options = ContextOptions { n_ctx, n_batch, n_threads: 2 };
    let mut context = Context::new(model.clone(), &options).unwrap();
    let mut all = Vec::new();
    context.decode(prompt, Keep::All, |_, row| all.extend_from_slice(row)).unwrap();
    for _ in 0..generate {
        let row = &all[all.len() - model.vocab().len() as usize..];
        let best = (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap();
        let token = Token::try_from(best).unwrap();
        context.decode(&[token], Keep::All, |_, row| all.extend_from_slice(row)).unwrap();
    }
    all
}

fn prompt(model: &Model, n: usize) -> Vec<Token> {
    let vocab = u64::from(model.vocab().len());
    let mut state = 7u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        Token::try_from((state >> 33) % vocab).unwrap()
    };
    (0..n).map(|_| next()).collect()
}

fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

#[test]
fn demo_model() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/novelist-moe-31m-q4_0.gguf");
    let stock = load(&path, Weights::Stock { mmap: true, repack: false });
    let prompt = prompt(&stock, 96);
    for n_batch in [1, 64, 512] {
        let reference = logits(&stock, &prompt, 48, n_batch);
        assert!(reference.iter().all(|x| x.is_finite()));
        for (share, preload) in [(1.0, true), (1.0, false), (0.5, false), (0.25, false), (0.125, false)] {
            let model = load(&path, Weights::Streamed);
            let pool = PoolOptions { size: PoolSize::Share(share), policy: Policy::Lru, seed: 1, preload };
            model.attach_pool(&pool, &mut go_on).unwrap();
            let streamed = logits(&model, &prompt, 48, n_batch);
            println!("{n_batch} {share} {preload}: {:?}", model.expert_counters());
            assert!(same_bits(&reference, &streamed), "batch {n_batch}, share {share}");
        }
    }
}

//! A pool on a GPU that shrinks and grows while a model generates: compares every logit with those of
//! the pool of all experts, and tells what it costs. Fails at the first other bit.
//!
//!     TIERSTREAM_BACKENDS=... cargo run --release -p tierstream-ggml --example elastic -- [MODEL.gguf] [CTX]
//!
//! Without a model, a qwen3moe of 300 MB with random weights is made; without a GPU, the stand-in
//! is used. Takes nearly all of the GPU's memory for a while, so run it alone. With CTX, a second
//! context of so many tokens is made when there is no memory for it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tierstream_cuda::standin::{self, StandIn};
use tierstream_cuda::{Block, Device};
use tierstream_ggml::{
    Context, ContextOptions, Gpu, Keep, Model, Placement, PoolOptions, PoolSize, Weights,
};
use tierstream_io::{Config, Reader};
use tierstream_pool::Policy;
use tierstream_synth::{Arch, Spec};

const PROMPT: i32 = 64;
const TOKENS: usize = 96;
const MIB: u64 = 1 << 20;

type Outcome<T = ()> = Result<T, Box<dyn std::error::Error>>;

fn main() -> Outcome {
    // A gate of the driver's: before its first call.
    tierstream_cuda::load_modules_eagerly();
    tierstream_ggml::on_abort(|message| eprintln!("{message}"));
    let mut arguments = std::env::args().skip(1);
    let dir = tempfile::tempdir()?;
    let path = match arguments.next() {
        Some(path) => PathBuf::from(path),
        None => {
            let spec = Spec::big(Arch::Qwen3Moe).scale_to(300 << 20);
            spec.write(dir.path().join("model.gguf"))?.files.remove(0)
        }
    };
    let ctx: Option<u32> = arguments.next().map(|text| text.parse()).transpose()?;
    let (device, gpu) = gpu()?;
    println!("on {}", gpu.name());
    let start = Instant::now();
    for _ in 0..100 {
        gpu.free_bytes()?;
    }
    println!("to ask for its free memory takes {:?}", start.elapsed() / 100);

    let model = load(&path, &gpu)?;
    let (expected, rate) = decode(&model)?;
    println!("all experts: {rate:.1} tok/s, {} mapped", mib(model.vram_bytes().unwrap_or(0)));
    for share in [0.75, 0.5, 0.25, 1.0] {
        let before = gpu.free_bytes()?;
        let start = Instant::now();
        model.resize_pool(PoolSize::Share(share))?;
        let (took, after) = (start.elapsed(), gpu.free_bytes()?);
        println!("resized to {share}: {took:?}, {} given back", mib(after.saturating_sub(before)));
        let rate = same(&expected, decode(&model)?, "resized");
        println!("  {rate:.1} tok/s, {} mapped", mib(model.vram_bytes().unwrap_or(0)));
    }
    during(&model, &expected)?;
    without_memory(&model, &gpu, &device, &expected)?;
    if let Some(ctx) = ctx {
        second_context(&model, &gpu, &device, &expected, ctx)?;
    }
    println!("all bits are the same");
    Ok(())
}

/// Sizes change all the time.
fn during(model: &Model, expected: &[f32]) -> Outcome {
    let over = AtomicBool::new(false);
    let (rate, resizes) = std::thread::scope(|s| {
        let resizer = s.spawn(|| {
            let mut resizes = 0;
            while !over.load(Ordering::Relaxed) {
                let share = [0.3, 1.0, 0.5, 0.8][resizes % 4];
                model.resize_pool(PoolSize::Share(share)).expect("the sizes are possible");
                resizes += 1;
                std::thread::sleep(Duration::from_millis(20));
            }
            resizes
        });
        let decoded = (0..3).map(|_| decode(model)).collect::<Outcome<Vec<_>>>();
        over.store(true, Ordering::Relaxed);
        let resizes = resizer.join().expect("it does not panic");
        let mut rate = 0.0;
        for decoded in decoded? {
            rate = same(expected, decoded, "during resizes");
        }
        Outcome::Ok((rate, resizes))
    })?;
    println!("{resizes} resizes during three generations: {rate:.1} tok/s");
    model.resize_pool(PoolSize::Share(1.0))?;
    Ok(())
}

/// Somebody else takes all memory but a little, and gives it back.
fn without_memory(model: &Model, gpu: &Gpu, device: &Device, expected: &[f32]) -> Outcome {
    same(expected, decode(model)?, "grown");
    let other = all_but(gpu, device, 8 * MIB)?;
    std::thread::sleep(Duration::from_millis(300));
    let rate = same(expected, decode(model)?, "scarce memory");
    println!(
        "another one has all but 8 MiB: {} of slots less, {} free, {rate:.1} tok/s",
        mib(model.pool_shortage_bytes()),
        mib(gpu.free_bytes()?)
    );
    model.resize_pool(PoolSize::Bytes(model.least_pool_bytes()))?;
    let room = (model.whole_pool_bytes() - model.least_pool_bytes()) / 3;
    // Each context takes some 300 MiB beside, when it first computes.
    let more = all_but(gpu, device, room + 384 * MIB)?;
    model.resize_pool(PoolSize::Share(1.0))?;
    let rate = same(expected, decode(model)?, "no memory to grow");
    println!(
        "{} to grow in: {} of slots less, {} free, {rate:.1} tok/s",
        mib(room),
        mib(model.pool_shortage_bytes()),
        mib(gpu.free_bytes()?)
    );
    drop((other, more));
    let start = Instant::now();
    while model.pool_shortage_bytes() > 0 && start.elapsed() < Duration::from_secs(60) {
        same(expected, decode(model)?, "memory again");
    }
    let shortage = model.pool_shortage_bytes();
    println!("given back: {} less after {:?}", mib(shortage), start.elapsed());
    Ok(())
}

/// The pool makes room for the KV cache of a second context.
fn second_context(
    model: &Model,
    gpu: &Gpu,
    device: &Device,
    expected: &[f32],
    n_ctx: u32,
) -> Outcome {
    same(expected, decode(model)?, "filled");
    let other = all_but(gpu, device, 300 * MIB)?;
    let options = ContextOptions { n_ctx, n_batch: 64, ..ContextOptions::default() };
    let before = model.pool_bytes().0;
    let context = Context::new(model.clone(), &options)?;
    let given = before - model.pool_bytes().0;
    println!("a context of {n_ctx} tokens, {} given up for it", mib(given));
    same(expected, decode(model)?, "beside another context");
    drop((context, other));
    Ok(())
}

/// Everything that is free but so many bytes.
fn all_but(gpu: &Gpu, device: &Device, bytes: u64) -> Outcome<Option<Block>> {
    let take = gpu.free_bytes()?.saturating_sub(bytes);
    Ok(if take > 0 { Some(device.allocate(take)?) } else { None })
}

fn gpu() -> Outcome<(Device, Gpu)> {
    for refused in tierstream_ggml::load_backends(None).into_iter().filter_map(Result::err) {
        println!("{refused}");
    }
    match Gpu::all() {
        Ok(gpus) => {
            let gpu = gpus.into_iter().next().ok_or("no GPU")?;
            gpu.warm_up()?;
            let mut devices = Device::all()?;
            let index = devices.iter().position(|device| device.info().name == gpu.name());
            Ok((devices.swap_remove(index.ok_or("the driver shows another GPU")?), gpu))
        }
        Err(why) => {
            println!("{why}");
            let config = standin::Config { memory_bytes: 2 << 30, ..standin::Config::default() };
            let stand_in = StandIn::new(config)?;
            Ok((stand_in.device(), Gpu::stand_in(&stand_in)?))
        }
    }
}

fn load(path: &Path, gpu: &Gpu) -> Outcome<Model> {
    let file = tierstream_gguf::Model::open(path)?;
    let reader = Arc::new(Reader::new(Config::default())?);
    let placement = Placement::Gpu(gpu.clone());
    let model = Model::load(&file, Weights::Streamed, &placement, reader, &mut |_| true)?;
    let size = PoolSize::Share(1.0);
    let pool =
        PoolOptions { size, policy: Policy::Lru, seed: 1, preload: true, below: None, staged: 2 };
    model.attach_pool(&pool, &mut |_| true)?;
    Ok(model)
}

/// All logits of a prompt and of what follows it, and tokens a second.
fn decode(model: &Model) -> Outcome<(Vec<f32>, f64)> {
    let options = ContextOptions { n_ctx: 512, n_batch: 64, ..ContextOptions::default() };
    let mut context = Context::new(model.clone(), &options)?;
    let vocab = model.vocab().len() as usize;
    let prompt: Vec<i32> = (1..=PROMPT).collect();
    let mut all = Vec::new();
    context.decode(&prompt, Keep::All, |_, row| all.extend_from_slice(row))?;
    let start = Instant::now();
    for _ in 0..TOKENS {
        let last = &all[all.len() - vocab..];
        let best = (0..vocab).max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap_or(0);
        context.decode(&[i32::try_from(best)?], Keep::Last, |_, row| all.extend_from_slice(row))?;
    }
    Ok((all, TOKENS as f64 / start.elapsed().as_secs_f64()))
}

/// The rate, of logits that are those that are expected.
fn same(expected: &[f32], (logits, rate): (Vec<f32>, f64), what: &str) -> f64 {
    let vocab = expected.len() / (PROMPT as usize + TOKENS);
    let differs = expected.iter().zip(&logits).position(|(a, b)| a.to_bits() != b.to_bits());
    if let Some(at) = differs {
        panic!("{what}: token {} differs: {} is {}", at / vocab, logits[at], expected[at]);
    }
    rate
}

fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes / MIB)
}

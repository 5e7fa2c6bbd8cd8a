//! How fast the executor decodes: streamed with all records preloaded against stock llama.cpp with
//! the same kernels, interleaved; and from a cold pool of 50 % and 25 %.
//!
//!     cargo run --release -p tierstream-ggml --example pace -- [MODEL.gguf]
//!
//! Without a model, a qwen3moe of 300 MB with random weights is made. Drops the page cache where
//! it may, so run it alone.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use tierstream_ggml::{
    Context, ContextOptions, Keep, Model, Placement, PoolOptions, PoolSize, Weights,
};
use tierstream_io::{Config, Reader};
use tierstream_pool::Policy;
use tierstream_synth::{Arch, Spec};

const PROMPT: i32 = 32;
const TOKENS: i32 = 96;
const REPEATS: usize = 3;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let dir = tempfile::tempdir()?;
    let path = match std::env::args_os().nth(1) {
        Some(path) => PathBuf::from(path),
        None => {
            let spec = Spec::big(Arch::Qwen3Moe).scale_to(300 << 20);
            println!(
                "qwen3moe, {} layers, {} experts, {} used",
                spec.n_layer, spec.n_expert, spec.n_used
            );
            spec.write(dir.path().join("model.gguf"))?.files.remove(0)
        }
    };
    // SAFETY: takes nothing, writes dirty pages.
    unsafe { libc::sync() };
    let stock = load(&path, Weights::Stock { mmap: true, repack: false, cpu_experts: false })?;
    let resident = load(&path, Weights::Streamed)?;
    attach(&resident, 1.0, true)?;
    for round in 0..REPEATS {
        for (name, model) in [("stock", &stock), ("preloaded", &resident)] {
            let (tokens_per_s, _) = decode(model)?;
            println!("round {round}, {name}: {tokens_per_s:.1} tok/s");
        }
    }
    drop((stock, resident));
    for share in [0.5, 0.25] {
        for round in 0..REPEATS {
            let dropped = std::fs::write("/proc/sys/vm/drop_caches", "3").is_ok();
            let model = load(&path, Weights::Streamed)?;
            attach(&model, share, false)?;
            let (tokens_per_s, stalled) = decode(&model)?;
            let c = model.expert_counters();
            println!(
                "round {round}, pool {share}, cache dropped {dropped}: {tokens_per_s:.1} tok/s, \
                 hit rate {:.2}, stalled {:.0} %, {:.1} MB/token, {:.2} GB/s while stalled, most in flight {}",
                c.hit_rate().unwrap_or(1.0),
                100.0 * stalled.share,
                stalled.bytes_per_token / 1e6,
                stalled.bytes_per_s / 1e9,
                model.reader().map_or(0, |r| r.stats().in_flight_max),
            );
        }
    }
    Ok(())
}

/// Waiting for reads while tokens were generated.
struct Stalled {
    share: f64,
    bytes_per_token: f64,
    bytes_per_s: f64,
}

fn load(path: &Path, weights: Weights) -> Result<Model, Box<dyn std::error::Error>> {
    let file = tierstream_gguf::Model::open(path)?;
    let reader = Arc::new(Reader::new(Config::default())?);
    Ok(Model::load(&file, weights, &Placement::Cpu, reader, &mut |_| true)?)
}

fn attach(model: &Model, share: f64, preload: bool) -> tierstream_ggml::Result<()> {
    let pool = PoolOptions {
        size: PoolSize::Share(share),
        policy: Policy::Lru,
        seed: 1,
        preload,
        below: None,
        staged: 2,
    };
    model.attach_pool(&pool, &mut |_| true)
}

/// Tokens per second of generation after a prompt.
fn decode(model: &Model) -> tierstream_ggml::Result<(f64, Stalled)> {
    let options = ContextOptions { n_ctx: 512, n_threads: 2, ..ContextOptions::default() };
    let mut context = Context::new(model.clone(), &options)?;
    let token = |i: i32| i * 37 % 1000;
    context.decode(&(0..PROMPT).map(token).collect::<Vec<_>>(), Keep::Last, |_, _| ())?;
    let (before, stall) = (model.expert_counters(), context.stall());
    let start = Instant::now();
    for i in 0..TOKENS {
        context.decode(&[token(i * i + 7)], Keep::Last, |_, _| ())?;
    }
    let seconds = start.elapsed().as_secs_f64();
    let stall = (context.stall() - stall).as_secs_f64();
    let bytes = model.expert_counters().since(&before).bytes_read as f64;
    let stalled = Stalled {
        share: stall / seconds,
        bytes_per_token: bytes / f64::from(TOKENS),
        bytes_per_s: bytes / stall.max(1e-9),
    };
    Ok((f64::from(TOKENS) / seconds, stalled))
}

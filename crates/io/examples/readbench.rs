//! Reads a file once per engine, block size and depth, and tells bandwidth, latency and CPU time.
//!
//! ```text
//! readbench FILE [--engines uring,uring-registered,pread,buffered,noop] [--blocks 128,1024,4096]
//!                [--depths 1,4,16] [--rounds 3] [--sequential]
//! ```
//! Blocks are KiB. Every block of the file is read once, in random order unless `--sequential`
//! says otherwise. Rounds are interleaved: every combination runs once before any runs again. The
//! page cache is dropped before each run where that is allowed, and the table says whether it was.
//! Bytes are not copied out of the ring: this measures the way into it.

use std::collections::BTreeMap;
use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tierstream_io::{Chunk, Config, EngineKind, Extent, Priority, Reader, Result, Sink};

struct Options {
    file: PathBuf,
    engines: Vec<String>,
    blocks: Vec<usize>,
    depths: Vec<usize>,
    rounds: usize,
    sequential: bool,
}

#[derive(Clone, Copy)]
struct Run {
    gb_per_s: f64,
    p50: Duration,
    p99: Duration,
    cpu_s_per_gb: f64,
}

struct Discard;

impl Sink for Discard {
    fn chunk(&self, _: Chunk) {}
    fn done(&self, _: usize, _: Result<()>) {}
}

fn main() -> Result<(), Box<dyn Error>> {
    let options = parse()?;
    let mut results: BTreeMap<(usize, usize, usize), Vec<Run>> = BTreeMap::new();
    let mut cold = true;
    for round in 0..options.rounds {
        for (b, &block) in options.blocks.iter().enumerate() {
            for (d, &depth) in options.depths.iter().enumerate() {
                for (e, engine) in options.engines.iter().enumerate() {
                    cold &= std::fs::write("/proc/sys/vm/drop_caches", "3").is_ok();
                    let run = measure(&options, engine, block << 10, depth)?;
                    eprintln!("round {round}: {engine} {block} KiB x {depth}: {:.3}", run.gb_per_s);
                    results.entry((b, d, e)).or_default().push(run);
                }
            }
        }
    }
    let order = if options.sequential { "sequential" } else { "random" };
    let cache = if cold { "cache dropped" } else { "CACHE NOT DROPPED" };
    println!("{order}, {} rounds, {cache}; median (min-max)", options.rounds);
    println!("| block | depth | engine | GB/s | p50 ms | p99 ms | CPU-s/GB |");
    println!("|---|---|---|---|---|---|---|");
    for ((b, d, e), runs) in results {
        let (low, mid, high) = spread(&runs, |run| run.gb_per_s);
        println!(
            "| {} KiB | {} | {} | {mid:.2} ({low:.2}-{high:.2}) | {:.2} | {:.2} | {:.3} |",
            options.blocks[b],
            options.depths[d],
            options.engines[e],
            spread(&runs, |run| run.p50.as_secs_f64() * 1e3).1,
            spread(&runs, |run| run.p99.as_secs_f64() * 1e3).1,
            spread(&runs, |run| run.cpu_s_per_gb).1,
        );
    }
    Ok(())
}

fn measure(
    options: &Options,
    engine: &str,
    block: usize,
    depth: usize,
) -> Result<Run, Box<dyn Error>> {
    let (name, register_buffers) = match engine.strip_suffix("-registered") {
        Some(name) => (name, true),
        None => (engine, false),
    };
    let reader = Reader::new(Config {
        engine: name.parse::<EngineKind>()?,
        ring_bytes: block * depth * 2,
        buffer_bytes: block,
        depth,
        register_buffers,
        wrap: None,
    })?;
    let file = reader.open(&options.file)?;
    let status = reader.status();
    if status.reason.is_some() && name != "buffered" {
        return Err(format!("{engine} does not run as asked: {:?}", status.reason).into());
    }
    let size = reader.file(file)?.size();
    let mut extents: Vec<Extent> = (0..size / block as u64)
        .map(|n| Extent { file, offset: n * block as u64, len: block as u64 })
        .collect();
    let wanted: u64 = extents.iter().map(|extent| extent.len).sum();
    let requests: Vec<Vec<Extent>> = if options.sequential {
        vec![extents]
    } else {
        shuffle(&mut extents);
        // One request each: within a request the planner would sort them.
        extents.into_iter().map(|extent| vec![extent]).collect()
    };

    let (start, cpu) = (Instant::now(), cpu_time());
    let tickets: Vec<_> = requests
        .into_iter()
        .map(|pieces| reader.submit(Priority::Demand, pieces, Arc::new(Discard)))
        .collect();
    for ticket in tickets {
        ticket.wait()?;
    }
    let (seconds, cpu) = (start.elapsed().as_secs_f64(), cpu_time() - cpu);
    let latency = reader.stats().latency;
    let gb = wanted as f64 / 1e9;
    Ok(Run {
        gb_per_s: gb / seconds,
        p50: latency.p50,
        p99: latency.p99,
        cpu_s_per_gb: cpu.as_secs_f64() / gb,
    })
}

fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// The same order in every run.
fn shuffle(extents: &mut [Extent]) {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    for n in (1..extents.len()).rev() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        extents.swap(n, (state % (n as u64 + 1)) as usize);
    }
}

/// Least, median and most.
fn spread(runs: &[Run], of: impl Fn(&Run) -> f64) -> (f64, f64, f64) {
    let mut values: Vec<f64> = runs.iter().map(of).collect();
    values.sort_by(f64::total_cmp);
    (values[0], values[values.len() / 2], values[values.len() - 1])
}

fn parse() -> Result<Options, Box<dyn Error>> {
    fn list<T: std::str::FromStr<Err: Error + 'static>>(text: &str) -> Result<Vec<T>, T::Err> {
        text.split(',').map(str::parse).collect()
    }
    let mut options = Options {
        file: PathBuf::new(),
        engines: list("uring,uring-registered,pread,buffered")?,
        blocks: vec![128, 1024, 4096],
        depths: vec![1, 4, 16],
        rounds: 3,
        sequential: false,
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{argument} wants a value"));
        match argument.as_str() {
            "--engines" => options.engines = list(&value()?)?,
            "--blocks" => options.blocks = list(&value()?)?,
            "--depths" => options.depths = list(&value()?)?,
            "--rounds" => options.rounds = value()?.parse::<usize>()?.max(1),
            "--sequential" => options.sequential = true,
            path => options.file = path.into(),
        }
    }
    Ok(options)
}

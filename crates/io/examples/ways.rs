//! How fast a file is read past the page cache and through it, and what is left there:
//! `ways FILE [ROUNDS]`, as its owner. In each round every way is measured once, in an order of its own.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use tierstream_io::cache::{cached_bytes, evict};
use tierstream_io::{Chunk, Config, EngineKind, Extent, Priority, Reader, Result, Sink};

/// Bytes of a record, and how many are read of a file at most.
const RECORD_BYTES: u64 = 1_271_808;
const RECORDS: u64 = 400;

struct Discard;

impl Sink for Discard {
    fn chunk(&self, _: Chunk) {}
    fn done(&self, _: usize, _: Result<()>) {}
}

/// A way to read.
struct Way {
    name: &'static str,
    engine: EngineKind,
    /// Through the page cache, whatever the engine; what was read is dropped from it.
    drops: bool,
}

const WAYS: [Way; 5] = [
    Way { name: "direct, io_uring", engine: EngineKind::Uring, drops: false },
    Way { name: "direct, threads", engine: EngineKind::Pread, drops: false },
    Way { name: "cached, threads", engine: EngineKind::Buffered, drops: false },
    Way { name: "cached, threads, dropped", engine: EngineKind::Buffered, drops: true },
    Way { name: "cached, io_uring, dropped", engine: EngineKind::Uring, drops: true },
];

#[derive(Default)]
struct Seen {
    gbps: Vec<f64>,
    cpu_s_per_gb: Vec<f64>,
    left_mb: f64,
}

fn main() -> std::result::Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let path = args.next().ok_or("ways FILE [ROUNDS]")?;
    let rounds: usize = args.next().map_or(Ok(6), |n| n.parse())?;
    let path = Path::new(&path);
    let file = File::open(path)?;
    let size = file.metadata()?.len();
    let records = size / RECORD_BYTES;
    for order in ["in file order", "records in random order"] {
        let mut seen: BTreeMap<usize, Seen> = BTreeMap::new();
        for round in 0..rounds {
            let offsets: Vec<u64> = match order {
                "in file order" => (0..records).collect(),
                // Every record once, a prime apart from the last one.
                _ => (0..records.min(RECORDS))
                    .map(|n| (n * 7919 + round as u64 * 101) % records)
                    .collect(),
            };
            for at in 0..WAYS.len() {
                // Everybody comes after everybody.
                let at = (at * (1 + round % (WAYS.len() - 1)) + round) % WAYS.len();
                evict(&file)?;
                // What lies below the filesystem may have a cache of its own. Only root may do that.
                let _ = std::fs::write("/proc/sys/vm/drop_caches", "1");
                let before = cached_bytes(&file)?;
                let (gbps, cpu) = measure(&WAYS[at], path, &file, &offsets)?;
                let seen = seen.entry(at).or_default();
                seen.gbps.push(gbps);
                seen.cpu_s_per_gb.push(cpu);
                seen.left_mb = cached_bytes(&file)?.saturating_sub(before) as f64 / 1e6;
            }
        }
        println!("{order}, {} x {RECORD_BYTES} bytes, {rounds} rounds", records.min(RECORDS));
        let first = seen[&0].gbps.clone();
        for (at, Seen { gbps, cpu_s_per_gb, left_mb }) in seen {
            let ratios = gbps.iter().zip(&first).map(|(a, b)| a / b).collect();
            println!(
                "{:26} {:5.2} GB/s ({:.2}-{:.2})  x {:.2}  {:.2} CPU-s/GB  {left_mb:6.1} MB left",
                WAYS[at].name,
                median(gbps.clone()),
                gbps.iter().copied().fold(f64::INFINITY, f64::min),
                gbps.iter().copied().fold(0.0, f64::max),
                median(ratios),
                median(cpu_s_per_gb),
            );
        }
    }
    Ok(())
}

fn measure(way: &Way, path: &Path, of: &File, offsets: &[u64]) -> Result<(f64, f64)> {
    let device = of.metadata().map(|m| m.dev()).unwrap_or_default();
    let dropping = way.drops.then(|| (device, "to compare".to_owned())).into_iter().collect();
    let reader = Reader::new(Config { engine: way.engine, dropping, ..Config::default() })?;
    let file = reader.open(path)?;
    let (start, cpu) = (Instant::now(), cpu_time());
    let extent = |n: &u64| Extent { file, offset: n * RECORD_BYTES, len: RECORD_BYTES };
    if offsets.is_sorted() {
        let all = offsets.iter().map(extent).collect();
        reader.submit(Priority::Bulk, all, Arc::new(Discard)).wait()?;
    } else {
        // As a token's layer: eight records at a time.
        for records in offsets.chunks(8) {
            let all = records.iter().map(extent).collect();
            reader.submit(Priority::Demand, all, Arc::new(Discard)).wait()?;
        }
    }
    let gb = offsets.len() as f64 * RECORD_BYTES as f64 / 1e9;
    let cpu = (cpu_time() - cpu).as_secs_f64();
    Ok((gb / start.elapsed().as_secs_f64(), cpu / gb))
}

fn cpu_time() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ProcessCPUTime)).unwrap_or_default()
}

fn median(mut all: Vec<f64>) -> f64 {
    all.sort_unstable_by(f64::total_cmp);
    (all[(all.len() - 1) / 2] + all[all.len() / 2]) / 2.0
}

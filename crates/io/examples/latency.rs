//! What the reader adds to a read: microseconds from submit to the end of wait, of one request of
//! 512 KiB at a time through the engine that reads nothing.
//!
//! ```text
//! cargo run --release -p tierstream-io --example latency [rounds]
//! ```

use std::sync::Arc;
use std::time::{Duration, Instant};

use tierstream_io::{Chunk, Config, EngineKind, Extent, Priority, Reader, Result, Sink};

const LEN: u64 = 512 << 10;

struct Nobody;

impl Sink for Nobody {
    fn chunk(&self, _: Chunk) {}
    fn done(&self, _: usize, _: Result<()>) {}
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let rounds: usize = std::env::args().nth(1).map_or(Ok(20_000), |text| text.parse())?;
    let path = std::env::temp_dir().join(format!("tierstream-latency-{}", std::process::id()));
    std::fs::File::create(&path)?.set_len(LEN)?;
    let reader = Reader::new(Config { engine: EngineKind::Noop, ..Config::default() })?;
    let file = reader.open(&path)?;
    std::fs::remove_file(&path)?;
    let mut took = Vec::with_capacity(rounds);
    for _ in 0..rounds {
        let extent = Extent { file, offset: 0, len: LEN };
        let start = Instant::now();
        reader.submit(Priority::Demand, vec![extent], Arc::new(Nobody)).wait()?;
        took.push(start.elapsed());
    }
    took.sort();
    let us = |took: Option<&Duration>| took.map_or(0.0, |took| took.as_secs_f64() * 1e6);
    println!(
        "submit to wait: {:.1} us p50, {:.1} us p90, {:.1} us p99",
        us(took.get(rounds / 2)),
        us(took.get(rounds * 9 / 10)),
        us(took.get(rounds * 99 / 100)),
    );
    Ok(())
}

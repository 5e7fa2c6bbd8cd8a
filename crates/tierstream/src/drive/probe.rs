//! A short measurement of a file: past the page cache, and through it.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::Access;
use serde::{Deserialize, Serialize};
use tierstream_io::cache::{cached_in, evict_in};
use tierstream_io::{Config, EngineKind, Extent, FileId, Priority, Reader};

use super::Discard;
use crate::random::Random;

/// Bytes of one read.
const BLOCK_BYTES: usize = 256 << 10;

/// Reads of a turn, all in flight together.
const DEPTH: usize = 8;

/// Turns of either way, at most: 48 MiB are read in all.
const ROUNDS_MAX: usize = 12;

/// No further turn begins that may end later than this.
const TIME_MAX: Duration = Duration::from_millis(120);

/// Places that are looked at for ones that are not in the page cache.
const CANDIDATES_MAX: usize = 256;

/// What both ways brought, of the file's own bytes, where the page cache had none of them.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Probe {
    /// Past the page cache: 1e9 bytes per second, median of the turns.
    pub direct_gbps: f64,
    /// Through it.
    pub cached_gbps: f64,
    /// Through it over past it, median of neighbouring turns.
    pub ratio: f64,
    /// Pairs of turns.
    pub rounds: u32,
    /// Of those, the ones in which reads through the page cache were faster.
    pub rounds_won: u32,
    /// Whether direct reads leave nothing in the page cache; none where the kernel does not tell.
    pub bypasses: Option<bool>,
    /// Bytes read, both ways.
    pub bytes: u64,
    /// How long all of it took.
    pub seconds: f64,
}

/// Measures the file at `path`, both ways by turns. What that brings into the page cache is dropped.
///
/// # Errors
/// Why nothing was measured, in words.
pub(super) fn probe(path: &Path) -> Result<Probe, String> {
    let start = Instant::now();
    let file = File::open(path).map_err(|e| e.to_string())?;
    let places = Places::of(path, &file)?;
    let measured = places.measure(path, &file, start);
    for &offset in &places.offsets {
        // They would be reclaimed at some time anyhow.
        let _ = evict_in(&file, offset, BLOCK_BYTES as u64);
    }
    measured.map_err(|error| error.to_string())
}

/// Where is read.
struct Places {
    offsets: Vec<u64>,
    /// Whether the kernel says what the page cache has of the file.
    told: bool,
}

impl Places {
    /// Places that the page cache has nothing of, in random order.
    fn of(path: &Path, file: &File) -> Result<Self, String> {
        let size = file.metadata().map_err(|e| e.to_string())?.len();
        let blocks = size / BLOCK_BYTES as u64;
        if blocks < 2 * DEPTH as u64 {
            return Err(format!("it is smaller than {} MiB", (2 * DEPTH * BLOCK_BYTES) >> 20));
        }
        let told = is_told(path, file);
        let mut order = Random::new(size ^ u64::from(std::process::id())).shuffled(blocks);
        order.truncate(CANDIDATES_MAX);
        // Drawn from a huge file, a place may come twice, and then from the page cache.
        order.sort_unstable();
        order.dedup();
        let order =
            Random::new(size).shuffled(order.len() as u64).into_iter().map(|n| order[n as usize]);
        let mut offsets = Vec::new();
        for offset in order.map(|block| block * BLOCK_BYTES as u64) {
            if offsets.len() == 2 * DEPTH * ROUNDS_MAX {
                break;
            }
            if told {
                let cached = cached_in(file, offset, BLOCK_BYTES).map_err(|e| e.to_string())?;
                if cached > 0 {
                    continue;
                }
            } else {
                evict_in(file, offset, BLOCK_BYTES as u64).map_err(|e| e.to_string())?;
            }
            offsets.push(offset);
        }
        if offsets.len() < 2 * DEPTH {
            return Err("the page cache has it already".to_owned());
        }
        Ok(Self { offsets, told })
    }

    fn measure(&self, path: &Path, file: &File, start: Instant) -> tierstream_io::Result<Probe> {
        let config = |engine| Config {
            engine,
            ring_bytes: DEPTH * BLOCK_BYTES,
            buffer_bytes: BLOCK_BYTES,
            depth: DEPTH,
            ..Config::default()
        };
        let direct = Turn::new(config(EngineKind::Auto), path)?;
        // As it is done if this is the way: see `settle`.
        let device = file.metadata().map(|m| m.dev()).unwrap_or_default();
        let dropping = [(device, "to compare".to_owned())].into();
        let cached = Turn::new(Config { dropping, ..config(EngineKind::Buffered) }, path)?;
        let (mut direct_gbps, mut cached_gbps) = (Vec::new(), Vec::new());
        let mut bypasses = None;
        let mut places = self.offsets.chunks_exact(DEPTH);
        let (mut bytes, begun) = (0, Instant::now());
        for round in 0.. {
            let (Some(one), Some(other)) = (places.next(), places.next()) else { break };
            let rounds = u32::try_from(round).unwrap_or(u32::MAX);
            let next = begun.elapsed().checked_div(rounds).unwrap_or_default();
            if round > 0 && start.elapsed() + next > TIME_MAX {
                break;
            }
            // Whoever comes second may find the drive awake, or busy with what was read ahead.
            if round % 2 == 0 {
                direct_gbps.push(direct.gbps(one)?);
                cached_gbps.push(cached.gbps(other)?);
            } else {
                cached_gbps.push(cached.gbps(other)?);
                direct_gbps.push(direct.gbps(one)?);
            }
            if round == 0 && self.told {
                let left = one.iter().map(|&at| cached_in(file, at, BLOCK_BYTES).unwrap_or(0));
                // Pages at the ends may have come with a neighbour, or for somebody else.
                bypasses = Some(left.sum::<usize>() < DEPTH * BLOCK_BYTES / 2);
            }
            bytes += 2 * (DEPTH * BLOCK_BYTES) as u64;
        }
        let ratios: Vec<f64> = cached_gbps.iter().zip(&direct_gbps).map(|(c, d)| c / d).collect();
        Ok(Probe {
            rounds: ratios.len() as u32,
            rounds_won: ratios.iter().filter(|ratio| **ratio > 1.0).count() as u32,
            ratio: median(ratios),
            direct_gbps: median(direct_gbps),
            cached_gbps: median(cached_gbps),
            bypasses,
            bytes,
            seconds: start.elapsed().as_secs_f64(),
        })
    }
}

/// The kernel tells what the page cache has of a file to who owns it or may write to it (mincore(2)); to
/// others, all of it seems to be there.
fn is_told(path: &Path, file: &File) -> bool {
    let me = rustix::process::geteuid();
    let owner = file.metadata().is_ok_and(|m| m.uid() == me.as_raw());
    me.is_root() || owner || rustix::fs::access(path, Access::WRITE_OK).is_ok()
}

/// One of the two ways.
struct Turn {
    reader: Reader,
    file: FileId,
}

impl Turn {
    fn new(config: Config, path: &Path) -> tierstream_io::Result<Self> {
        let reader = Reader::new(config)?;
        let file = reader.open(path)?;
        Ok(Self { reader, file })
    }

    /// Reads a block at each of `offsets`, all at once: 1e9 bytes per second.
    fn gbps(&self, offsets: &[u64]) -> tierstream_io::Result<f64> {
        let len = BLOCK_BYTES as u64;
        let extents =
            offsets.iter().map(|&offset| Extent { file: self.file, offset, len }).collect();
        let start = Instant::now();
        self.reader.submit(Priority::Demand, extents, Arc::new(Discard)).wait()?;
        let seconds = start.elapsed().as_secs_f64().max(1e-9);
        Ok((offsets.len() * BLOCK_BYTES) as f64 / 1e9 / seconds)
    }
}

pub(super) fn median(mut rates: Vec<f64>) -> f64 {
    rates.sort_unstable_by(f64::total_cmp);
    let (low, high) = (rates.len().saturating_sub(1) / 2, rates.len() / 2);
    let at = |n: usize| rates.get(n).copied().unwrap_or(0.0);
    (at(low) + at(high)) / 2.0
}

#[cfg(test)]
mod tests {
    use tierstream_io::cache::{cached_bytes, evict};

    use super::*;
    use crate::skip::skip;

    #[test]
    fn both_ways_are_measured_and_leave_nothing() {
        // On the drive.
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, vec![1; 4]).unwrap();
        assert_eq!(probe(&path).unwrap_err(), "it is smaller than 4 MiB");

        std::fs::write(&path, vec![1; 10 << 20]).unwrap();
        let file = File::open(&path).unwrap();
        if cached_bytes(&file).unwrap() == 10 << 20 {
            assert_eq!(probe(&path).unwrap_err(), "the page cache has it already");
        }
        evict(&file).unwrap();
        if cached_bytes(&file).unwrap() > 0 {
            return skip("temporary files lie in memory here");
        }
        let measured = probe(&path).unwrap();
        assert!(measured.direct_gbps > 0.0 && measured.cached_gbps > 0.0, "{measured:?}");
        // 40 blocks are two turns of each, if there is time for them.
        assert!((1..=2).contains(&measured.rounds), "{measured:?}");
        assert_eq!(measured.bytes, u64::from(measured.rounds) * (4 << 20));
        assert_eq!(cached_bytes(&file).unwrap(), 0);
    }

    #[test]
    fn medians_are_between_two() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(vec![]), 0.0);
    }
}

//! Measuring how fast tokens come, and how fast the drive could have delivered what they took.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tierstream_ggml::{Keep, Sampling, Token};
use tierstream_io::{Extent, Priority, Status};

use crate::drive::Discard;
use crate::engine::{Engine, Generate};
use crate::error::Result;
use crate::memory::Usage;
use crate::random::{Random, drawn_tokens};

pub mod load;

/// Most bytes read to measure the drive.
const DRIVE_BYTES_MAX: u64 = 2 << 30;

/// One measurement of decoding.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Turn {
    /// Tokens per second over the measured part.
    pub tok_s: f64,
    /// Requests answered without a read, 0 to 1; none without requests.
    pub hit_rate: Option<f64>,
    /// Records read per token.
    pub faults_per_token: f64,
    /// Records per token that the processor computed with, beside a GPU.
    pub computed_per_token: f64,
    /// Bytes of records read per token.
    pub bytes_per_token: f64,
    /// Records read per token before their layer asked for them.
    pub read_ahead_per_token: f64,
    /// The share of those that was asked for then, 0 to 1; 1 if there were none.
    pub read_ahead_used: f64,
    /// Share of the time that computing waited for reads.
    pub stall_share: f64,
    /// Bytes per second of the same reads without computing, right after; absent when nothing
    /// was read.
    pub drive_bytes_per_s: Option<f64>,
    /// Share of all experts that the pool holds, 0 to 1; none if nothing streams.
    pub pool_share: Option<f64>,
    /// The most that the process had resident.
    pub peak_rss_bytes: u64,
    /// The path of the reads; none if nothing streams.
    pub io: Option<ReadPath>,
}

/// The path that reads really took.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadPath {
    /// The storage engine.
    pub engine: String,
    /// Whether reads pass the page cache.
    pub direct: bool,
    /// Why it is not the fastest path.
    pub reason: Option<String>,
}

impl From<Status> for ReadPath {
    fn from(status: Status) -> Self {
        let Status { engine, direct, reason, .. } = status;
        Self { engine: engine.to_owned(), direct, reason }
    }
}

/// Time that processors have spent on this process so far, all its threads and the kernel for them.
pub fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

/// The numbers below `n` in an order of its own for each `round`, the same every time: so that nothing
/// is always measured after the same.
pub fn order(round: u32, n: usize) -> Vec<usize> {
    let shuffled = Random::new(u64::from(round)).shuffled(n as u64);
    shuffled.into_iter().map(|index| index as usize).collect()
}

/// Decodes `tokens` one by one, whatever the model would have said, and measures those after the
/// first `warmup`.
///
/// # Errors
/// As [`Engine::generate`].
pub fn turn(engine: &mut Engine, tokens: &[Token], warmup: usize) -> Result<Turn> {
    engine.check_room(tokens.len())?;
    let (before, measured) = tokens.split_at(warmup.min(tokens.len()));
    for &token in before {
        engine.context().decode(&[token], Keep::Last, |_, _| {})?;
    }
    let counted = engine.expert_counters();
    let stalled = engine.context().stall();
    let mut total = 0.0;
    let mut bursts = Vec::new();
    let mut arrived = arrived_by_block(engine);
    for &token in measured {
        let start = Instant::now();
        engine.context().decode(&[token], Keep::Last, |_, _| {})?;
        total += start.elapsed().as_secs_f64();
        let now = arrived_by_block(engine);
        let grown = now.iter().zip(&arrived).map(|(&(block, now), &(_, was))| (block, now - was));
        bursts.extend(grown.filter(|&(_, records)| records > 0));
        arrived = now;
    }
    let used = engine.expert_counters().since(&counted);
    let stall = engine.context().stall() - stalled;
    engine.context().rest();
    let n = measured.len().max(1) as f64;
    let drive_bytes_per_s = drive_rate(engine, &bursts)?;
    let status = engine.model().reader().map(|r| r.status());
    Ok(Turn {
        tok_s: if total > 0.0 { measured.len() as f64 / total } else { 0.0 },
        hit_rate: used.hit_rate(),
        faults_per_token: used.faults as f64 / n,
        computed_per_token: used.computed as f64 / n,
        bytes_per_token: used.bytes_read as f64 / n,
        read_ahead_per_token: used.read_ahead as f64 / n,
        read_ahead_used: match used.read_ahead {
            0 => 1.0,
            all => used.read_ahead_used as f64 / all as f64,
        },
        stall_share: if total > 0.0 { stall.as_secs_f64() / total } else { 0.0 },
        drive_bytes_per_s,
        pool_share: engine.model().pool_share(),
        peak_rss_bytes: Usage::now().peak_rss_bytes,
        io: status.map(ReadPath::from),
    })
}

/// One measurement of a prompt.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Prefill {
    /// Tokens that were computed at once.
    pub batch: u32,
    /// Tokens of the prompt per second.
    pub tok_s: f64,
    /// Bytes of records that came into the pool for it.
    pub bytes_brought: u64,
    /// Bytes of records that were read for it.
    pub bytes_read: u64,
    /// Bytes per second of copies to the GPU and nothing else, right after; none on the CPU.
    pub bus_bytes_per_s: Option<f64>,
    /// Share of all experts that the pool holds, 0 to 1; none if nothing streams.
    pub pool_share: Option<f64>,
    /// The most that the process had resident.
    pub peak_rss_bytes: u64,
}

/// Computes two prompts of `n` tokens drawn from `seed`, and measures the second one: with the first
/// come the kernels of a GPU.
///
/// # Errors
/// As [`Engine::generate`].
pub fn prefill(engine: &mut Engine, n: usize, seed: u32) -> Result<Prefill> {
    engine.check_room(n)?;
    let tokens = drawn_tokens(2 * n, engine.model().vocab().len(), seed);
    let (first, second) = tokens.split_at(n);
    engine.context().decode(first, Keep::Last, |_, _| {})?;
    engine.clear();
    let counted = engine.expert_counters();
    let start = Instant::now();
    engine.context().decode(second, Keep::Last, |_, _| {})?;
    let seconds = start.elapsed().as_secs_f64();
    engine.context().rest();
    let used = engine.expert_counters().since(&counted);
    let batch = engine.context().options().n_batch;
    let gpu = engine.model().gpu();
    Ok(Prefill {
        batch,
        tok_s: n as f64 / seconds,
        bytes_brought: used.bytes_brought,
        bytes_read: used.bytes_read,
        bus_bytes_per_s: gpu.map(|gpu| gpu.copy_rate()).transpose()?,
        pool_share: engine.model().pool_share(),
        peak_rss_bytes: Usage::now().peak_rss_bytes,
    })
}

/// Records read so far, asked for or ahead, by block.
fn arrived_by_block(engine: &Engine) -> Vec<(u32, u64)> {
    let records = |block, bytes: u64| {
        let layer = engine.experts().layers().iter().position(|l| l.layer == block);
        let layer = layer.expect("what is counted is a layer of the model");
        let record = engine.experts().record(layer, 0).into_iter().flatten();
        bytes / record.map(|extent| extent.len).sum::<u64>().max(1)
    };
    let counters = engine.model().layer_counters().into_iter();
    counters.map(|(block, c)| (block, records(block, c.bytes_faulted))).collect()
}

/// Bytes per second of `bursts` without computing: for each a number of random records of a block,
/// read at one time through the same reader, and copied nowhere. At most [`DRIVE_BYTES_MAX`]. None
/// without bursts.
fn drive_rate(engine: &Engine, bursts: &[(u32, u64)]) -> Result<Option<f64>> {
    let mut random = Random::new(1);
    let (mut bytes, mut time) = (0, Duration::ZERO);
    for &(block, records) in bursts {
        let found = engine.experts().layers().iter().position(|l| l.layer == block);
        let layer = found.expect("what is counted is a layer of the model");
        let burst = read_burst(engine, layer, records as usize, false, &mut random)?;
        let Some((read, took)) = burst else { return Ok(None) };
        (bytes, time) = (bytes + read, time + took);
        if bytes >= DRIVE_BYTES_MAX {
            break;
        }
    }
    Ok((bytes > 0).then(|| bytes as f64 / time.as_secs_f64()))
}

/// Reads so many random records of a layer (its index) at one time, through the model's reader, and
/// copies them nowhere; `packed`: as many bytes for each, in one piece. Tells the bytes and how long it
/// took; none of a model without a reader.
pub(crate) fn read_burst(
    engine: &Engine,
    layer: usize,
    records: usize,
    packed: bool,
    random: &mut Random,
) -> Result<Option<(u64, Duration)>> {
    let Some(reader) = engine.model().reader().cloned() else { return Ok(None) };
    let (files, experts) = (engine.model().files(), engine.experts());
    let all = u64::from(experts.layers()[layer].experts);
    let mut extents = Vec::new();
    for expert in random.shuffled(all).into_iter().take(records) {
        let expert = u32::try_from(expert).expect("experts are u32");
        let parts = experts.record(layer, expert).into_iter().flatten();
        let parts = parts.map(|e| Extent { file: files[e.file], offset: e.offset, len: e.len });
        if packed {
            extents.extend(in_one_piece(engine, parts.collect())?);
        } else {
            extents.extend(parts);
        }
    }
    let bytes = extents.iter().map(|extent| extent.len).sum();
    let start = Instant::now();
    reader.submit(Priority::Demand, extents, Arc::new(Discard)).wait()?;
    Ok(Some((bytes, start.elapsed())))
}

/// As many bytes of the first part's file, from there on or, near its end, before.
fn in_one_piece(engine: &Engine, parts: Vec<Extent>) -> Result<Option<Extent>> {
    let (Some(&first), Some(reader)) = (parts.first(), engine.model().reader()) else {
        return Ok(None);
    };
    let len = parts.iter().map(|part| part.len).sum();
    let size = reader.file(first.file)?.size();
    let offset = first.offset.min(size.saturating_sub(len));
    Ok(Some(Extent { file: first.file, offset, len: len.min(size) }))
}

/// Token ids to measure with: what the model itself writes after `prompt`, since routing follows
/// the text; drawn from the seed for models without a tokenizer.
///
/// # Errors
/// As [`Engine::generate`].
pub fn tokens(engine: &mut Engine, prompt: &str, n: usize, seed: u32) -> Result<Vec<Token>> {
    let vocab = engine.model().vocab();
    if !vocab.has_text() {
        return Ok(drawn_tokens(n, vocab.len(), seed));
    }
    let mut tokens = vocab.tokenize(prompt, true, false)?;
    while tokens.len() < n {
        let rest = u32::try_from(n - tokens.len()).unwrap_or(u32::MAX);
        let options =
            Generate { max_tokens: rest, sampling: Sampling { seed, ..Sampling::default() } };
        engine.clear();
        let go_on = |_, _: &[u8]| std::ops::ControlFlow::Continue(());
        let made = engine.generate(&tokens, &options, go_on)?;
        // A text that has ended goes on with another beginning.
        if made.tokens.is_empty() {
            tokens.extend(engine.model().vocab().tokenize(prompt, false, false)?);
        }
        tokens.extend(made.tokens);
    }
    tokens.truncate(n);
    engine.clear();
    Ok(tokens)
}

/// The middle of `values`, their least and their greatest.
pub fn median_min_max(values: impl IntoIterator<Item = f64>) -> (f64, f64, f64) {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let middle = match values.len() {
        0 => return (0.0, 0.0, 0.0),
        n if n % 2 == 1 => values[n / 2],
        n => f64::midpoint(values[n / 2 - 1], values[n / 2]),
    };
    (middle, values[0], values[values.len() - 1])
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::{median_min_max, order};

    #[test]
    fn nothing_is_always_measured_after_the_same() {
        let orders: Vec<_> = (0..5).map(|round| order(round, 6)).collect();
        for index in 0..6 {
            let before = orders.iter().filter_map(|order| {
                let at = order.iter().position(|&other| other == index).unwrap();
                at.checked_sub(1).map(|at| order[at])
            });
            assert!(before.collect::<BTreeSet<_>>().len() > 1, "{orders:?}");
        }
    }

    #[test]
    fn median_of_odd_even_and_none() {
        assert_eq!(median_min_max([3.0, 1.0, 2.0]), (2.0, 1.0, 3.0));
        assert_eq!(median_min_max([4.0, 1.0, 2.0, 3.0]), (2.5, 1.0, 4.0));
        assert_eq!(median_min_max([]), (0.0, 0.0, 0.0));
    }
}

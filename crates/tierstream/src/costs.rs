//! What tokens cost on this machine: measured with routing that is chosen, so that as many records are
//! missing as wanted.
//!
//! A pool has room for a few tokens' records. In each layer, a token uses so many experts that the last
//! tokens have used, in turns, so that all of the pool is computed with, and so many that nobody has used
//! for longest: with LRU these are faults, and no others.

use std::time::{Duration, Instant};

use tierstream_ggml::{Keep, Replay, Token};
use tierstream_gguf::experts::MoeLayer;

use crate::bench::{read_burst, turn};
use crate::engine::{Engine, Options};
use crate::error::Result;
use crate::random::{Random, drawn_tokens};
use crate::size::PoolShare;

/// Tokens whose records the pool has room for, if there are enough experts, and this many bytes.
const CYCLES_MAX: u32 = 4;
const POOL_BYTES_MAX: u64 = 1 << 30;

/// Bytes that a number of faults is measured with, in each round.
const BLOCK_BYTES: u64 = 128 << 20;

/// Tokens of a block that are measured.
const TOKENS: std::ops::RangeInclusive<u64> = 2..=32;

/// Rounds: at least so many, and no more after this time.
const ROUNDS: std::ops::RangeInclusive<usize> = 3..=9;
const TIME: Duration = Duration::from_secs(4);

/// What was measured. Times are in seconds, one for each round.
#[derive(Debug, Clone)]
pub struct Costs {
    /// Of a token whose experts are all in the pool.
    pub hit_s: Vec<f64>,
    /// Faults of a layer, and what they add to the time of a token in which each layer has so many, for
    /// each layer. Ascending.
    pub faults_s: Vec<(f64, Vec<f64>)>,
    /// What it takes to read records of a layer, and nothing else; empty where they come from memory.
    pub bursts_s: Bursts,
    /// The same for as many bytes that lie in one piece each, as in a packed model; empty where records
    /// are in one piece.
    pub packed_s: Bursts,
}

/// Records that are read at one time, and how long that took, time by time.
pub type Bursts = Vec<(u32, Vec<f64>)>;

/// Layers that stream, in the order in which they are computed.
pub fn streamed_layers(experts: &tierstream_gguf::Experts) -> Vec<&MoeLayer> {
    experts.layers().iter().filter(|layer| layer.is_streamed()).collect()
}

/// The pool that [`measure`] wants: none if each token uses all experts.
pub fn pool_share(experts: &tierstream_gguf::Experts) -> Option<PoolShare> {
    let layers = streamed_layers(experts);
    let cycles = cycles(&layers)?;
    let share = |layer: &&MoeLayer| f64::from(cycles * layer.used) / f64::from(layer.experts);
    layers.iter().map(share).max_by(f64::total_cmp).map(PoolShare::Share)
}

/// None if a token uses all experts of some layer.
fn cycles(layers: &[&MoeLayer]) -> Option<u32> {
    let token: u64 = layers.iter().map(|l| u64::from(l.used) * l.record_bytes).sum();
    // Beside them, there are as many that are missing.
    let room = layers.iter().map(|l| (l.experts / l.used).saturating_sub(1)).min()?;
    let bytes = u32::try_from(POOL_BYTES_MAX / token.max(1)).unwrap_or(u32::MAX);
    let some = layers.iter().all(|l| l.experts > l.used);
    some.then(|| room.min(bytes).clamp(1, CYCLES_MAX))
}

/// Where what a pool lacks comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Below {
    /// The drive.
    Drive,
    /// With a GPU, a pool in host memory.
    Ram,
}

/// Options for an engine to [`measure`] with: `options` with a small pool that starts empty, and with a
/// GPU one below that has room for all that is asked for, or none.
pub fn options(mut options: Options, experts: &tierstream_gguf::Experts, below: Below) -> Options {
    options.experts = pool_share(experts);
    options.preload = false;
    options.prefetch = tierstream_ggml::Prefetch::Off;
    options.policy = tierstream_pool::Policy::Lru;
    options.ctx = Some(4096);
    if options.placement.gpu().is_some() {
        let layers = streamed_layers(experts);
        let cycles = cycles(&layers).unwrap_or(1);
        // Of slots that are longer than records.
        let bytes = |l: &&MoeLayer| u64::from((cycles + 1) * l.used) * (l.record_bytes + 4096);
        options.ram_bytes = Some(match below {
            Below::Drive => 0,
            Below::Ram => layers.iter().map(bytes).sum::<u64>() * 11 / 10,
        });
    }
    options
}

/// Measures with an engine that was loaded with [`options`]; it must have a pool.
///
/// # Errors
/// As [`Engine::generate`].
pub fn measure(engine: &mut Engine, below: Below) -> Result<Costs> {
    let experts = engine.experts().clone();
    let layers = streamed_layers(&experts);
    let mut run = Run::new(engine, &layers, below);
    let used = layers.iter().map(|layer| layer.used).max().unwrap_or(0);
    let beside = layers.iter().map(|l| l.experts - (run.cycles * l.used).min(l.experts)).min();
    let mut faults = vec![0, 1, used.div_ceil(2), used];
    faults.retain(|&faults| faults <= beside.unwrap_or(0));
    faults.dedup();
    let most = faults.last().copied().unwrap_or(0);
    let mut found = vec![(0.0, Vec::new()); faults.len()];
    let bursts = || faults[1..].iter().map(|&n| (n, Vec::new())).collect();
    let in_parts = layers.iter().any(|layer| layer.parts.len() > 1);
    let (mut bursts_s, mut packed_s): (Bursts, Bursts) = (Vec::new(), Vec::new());
    if below == Below::Drive {
        bursts_s = bursts();
        if in_parts && run.engine.file().originals().is_none() {
            packed_s = bursts();
        }
    }
    // All that is asked for is in a pool below after that, and kernels are loaded.
    run.block(most)?;
    let (start, mut rounds) = (Instant::now(), 0);
    while rounds < *ROUNDS.start() || (rounds < *ROUNDS.end() && start.elapsed() < TIME) {
        for index in crate::bench::order(rounds as u32, faults.len()) {
            let (had, seconds) = run.block(faults[index])?;
            found[index].0 += had;
            found[index].1.push(seconds);
        }
        for (n, times) in &mut bursts_s {
            times.push(run.burst(*n, false)?);
        }
        for (n, times) in &mut packed_s {
            times.push(run.burst(*n, true)?);
        }
        rounds += 1;
    }
    run.engine.context().replay(None);
    run.engine.context().rest();
    run.engine.clear();
    let (hits, rest) = found.split_first().expect("0 faults were measured");
    let count = layers.len().max(1) as f64;
    let added = rest.iter().map(|(had, times)| {
        // Against the token without faults of the same round: rates wander.
        let added = times.iter().zip(&hits.1).map(|(with, without)| (with - without) / count);
        (had / rounds as f64, added.collect())
    });
    Ok(Costs { hit_s: hits.1.clone(), faults_s: added.collect(), bursts_s, packed_s })
}

/// Seconds of a token with the model loaded as `engine` has it.
///
/// # Errors
/// As [`Engine::generate`].
pub fn token_s(engine: &mut Engine, rounds: usize) -> Result<Vec<f64>> {
    let tokens = drawn_tokens(40, engine.model().vocab().len(), 1);
    let mut times = Vec::new();
    for _ in 0..rounds {
        engine.clear();
        times.push(1.0 / turn(engine, &tokens, 8)?.tok_s);
    }
    Ok(times)
}

struct Run<'a> {
    engine: &'a mut Engine,
    /// Of each layer: experts that are asked for, and those that a token uses.
    shapes: Vec<(u32, u32)>,
    cycles: u32,
    /// Tokens of a block that are not measured, and those that are.
    warm: u32,
    tokens: u32,
    ids: Vec<Token>,
    /// The next expert of each layer that nobody has used for longest.
    cold: Vec<u32>,
    /// Which experts the numbers of [`routing`] stand for, layer by layer: neighbours in a file are read
    /// faster.
    names: Vec<Vec<u64>>,
    random: Random,
}

impl<'a> Run<'a> {
    fn new(engine: &'a mut Engine, layers: &[&MoeLayer], below: Below) -> Self {
        let cycles = cycles(layers).unwrap_or(1);
        let token: u64 = layers.iter().map(|l| u64::from(l.used) * l.record_bytes).sum();
        let tokens = (BLOCK_BYTES / token.max(1)).clamp(*TOKENS.start(), *TOKENS.end()) as u32;
        let warm = cycles + 1;
        let asked_for = |l: &&MoeLayer| match below {
            Below::Drive => l.experts,
            Below::Ram => l.experts.min((cycles + 1) * l.used),
        };
        let mut random = Random::new(1);
        Self {
            ids: drawn_tokens((warm + tokens) as usize, engine.model().vocab().len(), 1),
            cold: vec![0; layers.len()],
            names: layers.iter().map(|l| random.shuffled(l.experts.into())).collect(),
            shapes: layers.iter().map(|l| (asked_for(l), l.used)).collect(),
            random,
            engine,
            cycles,
            warm,
            tokens,
        }
    }

    /// Faults that a layer really had, and seconds of a token.
    fn block(&mut self, faults: u32) -> Result<(f64, f64)> {
        // All are of one length, so that each begins with its first token.
        let tokens = self.ids.len() as u32;
        let mut routing = routing(&self.shapes, self.cycles, faults, tokens, &mut self.cold);
        for (expert, names) in
            routing.iter_mut().flat_map(|token| token.iter_mut().zip(&self.names))
        {
            expert.iter_mut().for_each(|expert| *expert = names[*expert as usize] as u32);
        }
        self.engine.clear();
        self.engine.context().replay(Some(Replay::new(routing)));
        let (before, measured) = self.ids.split_at(self.warm as usize);
        for &token in before {
            self.engine.context().decode(&[token], Keep::Last, |_, _| {})?;
        }
        let counted = self.engine.expert_counters();
        let start = Instant::now();
        for &token in measured {
            self.engine.context().decode(&[token], Keep::Last, |_, _| {})?;
        }
        let seconds = start.elapsed().as_secs_f64() / f64::from(self.tokens);
        let had = self.engine.expert_counters().since(&counted).faults as f64;
        Ok((had / f64::from(self.tokens) / self.shapes.len() as f64, seconds))
    }

    /// Seconds to read so many records of a layer, whichever these are.
    fn burst(&mut self, records: u32, packed: bool) -> Result<f64> {
        let layers: Vec<usize> = (0..self.engine.experts().layers().len())
            .filter(|&layer| self.engine.experts().layers()[layer].is_streamed())
            .collect();
        let count = (self.tokens as usize * layers.len()).min(64);
        let mut seconds = 0.0;
        for _ in 0..count {
            let layer = layers[self.random.below(layers.len() as u64) as usize];
            let (engine, random) = (&*self.engine, &mut self.random);
            let Some(burst) = read_burst(engine, layer, records as usize, packed, random)? else {
                return Ok(0.0);
            };
            seconds += burst.1.as_secs_f64();
        }
        Ok(seconds / count as f64)
    }
}

/// Routing of `tokens` tokens in layers of these numbers of experts and of those that are used, for a pool
/// of LRU with room for `cycles` tokens, beside whose experts there must be `faults` others. After as many
/// tokens, each has `faults` faults in each layer, or all that the layer uses: the others it shares with one
/// of the last tokens. `cold` is where those who are missing go on, layer by layer.
fn routing(
    shapes: &[(u32, u32)],
    cycles: u32,
    faults: u32,
    tokens: u32,
    cold: &mut [u32],
) -> Vec<Vec<Vec<u32>>> {
    let layer = |token: u32, (&(experts, used), cold): (&(u32, u32), &mut u32)| {
        let missing = faults.min(used);
        let kept = used - missing;
        let hot = kept * cycles;
        let turn = token % cycles * kept;
        let mut ids: Vec<u32> = (turn..turn + kept).collect();
        for _ in 0..missing {
            ids.push(hot + *cold % (experts - hot));
            *cold = (*cold + 1) % (experts - hot);
        }
        ids
    };
    (0..tokens)
        .map(|token| shapes.iter().zip(&mut *cold).map(|both| layer(token, both)).collect())
        .collect()
}

#[cfg(test)]
mod tests {
    use tierstream_pool::{Config, LayerSpec, Lookup, Policy, Pool, Record};

    use super::routing;

    /// Faults of each layer, token by token.
    fn faults(pool: &mut Pool, routing: &[Vec<Vec<u32>>]) -> Vec<Vec<u32>> {
        let mut step = |layer: usize, experts: &[u32]| {
            pool.begin_step();
            let record = |expert| Record { layer: layer as u32, expert };
            let mut pinned = Vec::new();
            let missing: Vec<u32> = experts
                .iter()
                .copied()
                .filter(|&expert| match pool.request(record(expert)) {
                    Lookup::Absent => true,
                    Lookup::Resident(slot) | Lookup::Loading(slot) => {
                        pinned.push(slot);
                        false
                    }
                })
                .collect();
            for &expert in &missing {
                let slot = pool.reserve(record(expert)).unwrap().slot;
                pool.commit(slot);
                pinned.push(slot);
            }
            pinned.into_iter().for_each(|slot| pool.unpin(slot));
            missing.len() as u32
        };
        let token = |layers: &Vec<Vec<u32>>| {
            layers.iter().enumerate().map(|(layer, experts)| step(layer, experts)).collect()
        };
        routing.iter().map(token).collect()
    }

    #[test]
    fn as_many_are_missing_as_wanted() {
        for (experts, used, cycles) in [(64, 8, 4), (128, 6, 4), (8, 2, 3), (40, 8, 4), (9, 8, 1)] {
            let most = used.min(experts - used * cycles);
            let shapes = [(experts, used); 3];
            let slots = used * cycles;
            let spec = LayerSpec { class: 0, experts, floor: slots, record_bytes: 1 };
            let mut pool = Pool::new(Config {
                layers: vec![spec; 3],
                slots: vec![3 * slots],
                policy: Policy::Lru,
                seed: 0,
            })
            .unwrap();
            let mut cold = vec![0; 3];
            for missing in [most, 0, 1, most.div_ceil(2), most, 0, most, 1] {
                let routing = routing(&shapes, cycles, missing, cycles + 1 + 9, &mut cold);
                let all = faults(&mut pool, &routing);
                let measured = &all[cycles as usize + 1..];
                assert!(
                    measured.iter().flatten().all(|&had| had == missing),
                    "{experts} {used}: {missing} wanted, {measured:?}"
                );
                for ids in routing.iter().flatten() {
                    let distinct: std::collections::BTreeSet<_> = ids.iter().collect();
                    assert!(distinct.len() == used as usize && ids.iter().all(|&e| e < experts));
                }
            }
        }
    }
}

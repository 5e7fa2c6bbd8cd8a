//! Replaying a trace with the runtime's own pool.

use std::ops::Range;

use tierstream_pool::{Config, LayerSpec, Lookup, Policy, Pool, Record, Slot};

use super::predict::{Following, followings};
use super::steps::Batch;
use super::{Eviction, PoolKind, Predictor, Setup, Steps, Tier};
use crate::error::{Error, Result};
use crate::header::Layer;
use crate::random::Random;
use crate::trace::Trace;

/// What happened to the counted tokens.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Outcome {
    /// Counted tokens.
    pub tokens: u64,
    /// Records asked for: one for each batch, layer and distinct expert.
    pub requests: u64,
    /// Of those, resident; layer by layer.
    pub hits: Vec<u64>,
    /// Of the faults, those that took a slot in which nothing had been.
    pub fills: u64,
    /// Records that no pool of any size had: first uses among all replayed tokens.
    pub first_uses: u64,
    /// Bytes of the faults, 0 if sizes are not known.
    pub bytes: u64,
    /// The most faults of a batch.
    pub faults_max: u64,
    /// Faults of the counted batches after the first one.
    pub faults_steady: u64,
    /// Batches that were counted.
    pub batches: u64,
    /// The most records resident at once, layer by layer.
    pub resident_max: Vec<u32>,
    /// With [`Setup::ahead`]: what was read ahead.
    pub ahead: Ahead,
    /// With [`Setup::below`]: what the pool below had.
    pub below: Below,
}

/// Records that were read before they were asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Ahead {
    /// Reads.
    pub reads: u64,
    /// Of those, asked for in the step that they were read for.
    pub used: u64,
}

/// What a second pool was asked for: the faults of the first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Below {
    /// Requests.
    pub requests: u64,
    /// Of those, resident there.
    pub hits: u64,
}

impl Outcome {
    /// Hits of all layers.
    #[must_use]
    pub fn hits_total(&self) -> u64 {
        self.hits.iter().sum()
    }
}

/// Replays a trace with so many slots for each layer, in a pool of an online policy.
///
/// # Errors
///
/// If the policy is no online one, or the pool cannot be made: the floors need more than there is.
///
/// # Panics
///
/// If there is not one number of slots for each layer.
pub fn replay(trace: &Trace, setup: &Setup, slots: &[u32]) -> Result<Outcome> {
    let Eviction::Online(policy) = setup.eviction else {
        return Err(Error::file(format!("{} is no policy of a pool", setup.eviction)));
    };
    let steps = Steps::of(trace, setup);
    let mut run = Run::new(trace, setup, policy, slots)?;
    for batch in steps.batches() {
        run.batch(&steps, batch);
    }
    Ok(run.finish(steps.counted()))
}

/// Steps of some tokens by their faults, which are read together.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StepFaults {
    /// The tokens.
    pub tokens: u64,
    /// Records that they asked for.
    pub requests: u64,
    /// By number of faults, from 0 on: steps.
    pub steps: Vec<u64>,
    /// Of the faults, those that [`Setup::below`] had.
    pub below_hits: u64,
}

impl StepFaults {
    /// Faults of all steps.
    #[must_use]
    pub fn faults(&self) -> u64 {
        (0..).zip(&self.steps).map(|(faults, &steps): (u64, &u64)| faults * steps).sum()
    }

    /// Adds the tokens of another one.
    pub fn add(&mut self, other: &Self) {
        self.tokens += other.tokens;
        self.requests += other.requests;
        self.below_hits += other.below_hits;
        self.steps.resize(self.steps.len().max(other.steps.len()), 0);
        self.steps.iter_mut().zip(&other.steps).for_each(|(sum, &steps)| *sum += steps);
    }
}

/// [`replay`]s a trace, after its end from the start on again, and tells the faults of the steps of
/// those of the counted batches that are in `these` (from 0 on): for each prompt, and of one for
/// each `run` batches.
///
/// # Errors
///
/// As [`replay`].
///
/// # Panics
///
/// As [`replay`].
pub fn step_faults(
    trace: &Trace,
    setup: &Setup,
    slots: &[u32],
    these: Range<usize>,
    run: usize,
) -> Result<Vec<StepFaults>> {
    let Eviction::Online(policy) = setup.eviction else {
        return Err(Error::file(format!("{} is no policy of a pool", setup.eviction)));
    };
    let steps = Steps::of(trace, setup);
    let mut pool = Run::new(trace, setup, policy, slots)?;
    let (mut runs, mut number, mut last) = (Vec::<StepFaults>::new(), 0, None);
    let batches = steps.batches();
    let any = batches.iter().any(|batch| batch.counted > 0);
    for batch in batches.iter().cycle().take_while(|_| any) {
        if number >= these.end {
            break;
        }
        let before = (pool.outcome.requests, pool.outcome.below.hits);
        pool.batch(&steps, batch);
        if batch.counted == 0 {
            continue;
        }
        number += 1;
        let Some(at) = (number - 1).checked_sub(these.start) else { continue };
        let at = (steps.prompt(batch), at / run.max(1));
        if last.replace(at) != Some(at) {
            runs.push(StepFaults::default());
        }
        let sum = runs.last_mut().expect("just pushed");
        sum.tokens += u64::from(batch.counted);
        sum.requests += pool.outcome.requests - before.0;
        sum.below_hits += pool.outcome.below.hits - before.1;
        for &faults in &pool.faults {
            let faults = faults as usize;
            sum.steps.resize(sum.steps.len().max(faults + 1), 0);
            sum.steps[faults] += 1;
        }
    }
    Ok(runs)
}

struct Run<'a> {
    trace: &'a Trace,
    pool: Pool,
    /// Slots that nothing has been in, class by class.
    empty: Vec<u32>,
    class_of: Vec<usize>,
    below: Option<Pool>,
    reader: Option<Reader>,
    outcome: Outcome,
    touched: Vec<Vec<bool>>,
    /// Of the last batch, layer by layer.
    faults: Vec<u64>,
    experts: Vec<u16>,
    missing: Vec<u16>,
    pinned: Vec<Slot>,
}

/// Reads ahead.
struct Reader {
    predictor: Predictor,
    budget: u32,
    following: Vec<Following>,
    /// What each layer used last.
    last: Vec<Vec<u16>>,
    guesses: Vec<u16>,
    random: Random,
    /// Read for the step to come: the record and its slot.
    held: Vec<(u16, Slot)>,
    /// Guessed, and there already: what is read must not take their place.
    kept: Vec<Slot>,
}

fn config(trace: &Trace, pool: PoolKind, slots: &[u32], policy: Policy, seed: u64) -> Config {
    let layers = &trace.header().layers;
    assert_eq!(slots.len(), layers.len(), "slots for every layer");
    let total = slots.iter().copied().fold(0, u32::saturating_add);
    let (classes, one) = (slots.to_vec(), vec![total]);
    let spec = |(index, layer): (usize, &Layer)| {
        let (class, floor) = match pool {
            PoolKind::PerLayer => (index as u32, 0),
            PoolKind::Shares => (0, slots[index]),
            PoolKind::Global => (0, 0),
            PoolKind::Floor(floor) => (0, floor),
        };
        LayerSpec { class, experts: layer.experts, floor, record_bytes: layer.record_bytes }
    };
    let specs = layers.iter().enumerate().map(spec);
    let slots = if pool == PoolKind::PerLayer { classes } else { one };
    Config { layers: specs.collect(), slots, policy, seed }
}

impl<'a> Run<'a> {
    fn new(trace: &'a Trace, setup: &Setup, policy: Policy, slots: &[u32]) -> Result<Self> {
        let refused = |error: tierstream_pool::Error| Error::file(format!("no such pool: {error}"));
        let config = config(trace, setup.pool, slots, policy, setup.seed);
        let layers = &trace.header().layers;
        let below = setup.below.map(|Tier { slots_per_layer, policy }| {
            let slots = vec![slots_per_layer; layers.len()];
            Pool::new(self::config(trace, PoolKind::Global, &slots, policy, setup.seed))
        });
        let reader = setup.ahead.map(|(predictor, budget)| Reader {
            predictor,
            budget,
            following: match predictor {
                Predictor::Following => followings(trace.header()),
                _ => Vec::new(),
            },
            last: vec![Vec::new(); layers.len()],
            guesses: Vec::new(),
            random: Random::new(setup.seed),
            held: Vec::new(),
            kept: Vec::new(),
        });
        Ok(Self {
            trace,
            empty: config.slots.clone(),
            class_of: config.layers.iter().map(|spec| spec.class as usize).collect(),
            pool: Pool::new(config).map_err(refused)?,
            below: below.transpose().map_err(refused)?,
            reader,
            outcome: Outcome {
                hits: vec![0; layers.len()],
                resident_max: vec![0; layers.len()],
                ..Outcome::default()
            },
            touched: layers.iter().map(|layer| vec![false; layer.experts as usize]).collect(),
            faults: vec![0; layers.len()],
            experts: Vec::new(),
            missing: Vec::new(),
            pinned: Vec::new(),
        })
    }

    fn batch(&mut self, steps: &Steps<'_>, batch: &Batch) {
        let counted = batch.counted > 0;
        for layer in 0..self.trace.header().layers.len() {
            let mut experts = std::mem::take(&mut self.experts);
            steps.by_last_row(batch, layer, &mut experts);
            self.faults[layer] = self.step(layer, &experts, counted);
            self.look_ahead(steps, batch, layer, &experts);
            self.experts = experts;
        }
        let faults = self.faults.iter().sum();
        if counted {
            self.outcome.faults_max = self.outcome.faults_max.max(faults);
            self.outcome.faults_steady += if self.outcome.batches > 0 { faults } else { 0 };
            self.outcome.batches += 1;
        }
    }

    /// Asks for the experts of a step and brings those that are missing. Returns how many these are.
    fn step(&mut self, layer: usize, experts: &[u16], counted: bool) -> u64 {
        self.pool.begin_step();
        let record = |expert: u16| Record { layer: layer as u32, expert: expert.into() };
        let held = self.reader.as_mut().map(|r| std::mem::take(&mut r.held)).unwrap_or_default();
        self.missing.clear();
        let (mut hits, mut first) = (0, 0);
        for &expert in experts {
            match self.pool.request(record(expert)) {
                Lookup::Resident(slot) | Lookup::Loading(slot) => {
                    self.pinned.push(slot);
                    hits += 1;
                }
                Lookup::Absent => self.missing.push(expert),
            }
            first +=
                u64::from(!std::mem::replace(&mut self.touched[layer][usize::from(expert)], true));
        }
        // What does not fit stays where it is read to, and the records wanted last stay in slots.
        let missing = std::mem::take(&mut self.missing);
        let room = (self.pool.reservable(layer as u32) as usize).min(missing.len());
        let mut fills = 0;
        for &expert in &missing[missing.len() - room..] {
            let reserved = self.pool.reserve(record(expert)).expect("`reservable` counted it");
            fills += self.filled(layer, reserved.evicted.is_none());
            self.pool.commit(reserved.slot);
            self.pinned.push(reserved.slot);
        }
        missing[..missing.len() - room].iter().for_each(|&e| self.pool.stream(record(e)));
        self.pinned.drain(..).for_each(|slot| self.pool.unpin(slot));
        held.iter().for_each(|&(_, slot)| self.pool.unpin(slot));
        if let Some(reader) = &mut self.reader {
            reader.kept.drain(..).for_each(|slot| self.pool.unpin(slot));
        }
        let below = self.ask_below(layer, &missing);
        if counted {
            let used = held.iter().filter(|(expert, _)| experts.contains(expert)).count();
            let outcome = &mut self.outcome;
            outcome.requests += experts.len() as u64;
            outcome.hits[layer] += hits;
            outcome.fills += fills;
            outcome.first_uses += first;
            let bytes = self.trace.header().layers[layer].record_bytes;
            outcome.bytes += bytes * missing.len() as u64;
            outcome.ahead.reads += held.len() as u64;
            outcome.ahead.used += used as u64;
            outcome.below.requests += below.requests;
            outcome.below.hits += below.hits;
        }
        let resident = self.pool.resident(layer as u32);
        let most = &mut self.outcome.resident_max[layer];
        *most = (*most).max(resident);
        let faults = missing.len() as u64;
        self.missing = missing;
        faults
    }

    /// Whether a slot that was taken without evicting anybody is one in which nothing was before.
    fn filled(&mut self, layer: usize, free: bool) -> u64 {
        let empty = &mut self.empty[self.class_of[layer]];
        if free && *empty > 0 {
            *empty -= 1;
            return 1;
        }
        0
    }

    fn ask_below(&mut self, layer: usize, missing: &[u16]) -> Below {
        let Some(pool) = &mut self.below else { return Below::default() };
        pool.begin_step();
        let record = |expert: u16| Record { layer: layer as u32, expert: expert.into() };
        let mut absent = Vec::new();
        for &expert in missing {
            match pool.request(record(expert)) {
                Lookup::Resident(slot) | Lookup::Loading(slot) => self.pinned.push(slot),
                Lookup::Absent => absent.push(expert),
            }
        }
        let hits = self.pinned.len() as u64;
        for &expert in &absent {
            match pool.reserve(record(expert)) {
                Some(reserved) => {
                    pool.commit(reserved.slot);
                    self.pinned.push(reserved.slot);
                }
                None => pool.stream(record(expert)),
            }
        }
        self.pinned.drain(..).for_each(|slot| pool.unpin(slot));
        Below { requests: missing.len() as u64, hits }
    }

    /// Reads what the next layer is guessed to need, after a step of this one.
    fn look_ahead(&mut self, steps: &Steps<'_>, batch: &Batch, layer: usize, experts: &[u16]) {
        let Some(reader) = &mut self.reader else { return };
        let next = layer + 1;
        if let Some(following) = layer.checked_sub(1).and_then(|b| reader.following.get_mut(b)) {
            following.note(&reader.last[layer - 1], experts);
        }
        reader.last[layer].clear();
        reader.last[layer].extend_from_slice(experts);
        if next == self.trace.header().layers.len() {
            return;
        }
        let count = self.trace.header().layers[next].experts;
        match reader.predictor {
            Predictor::Previous => reader.guesses.clone_from(&reader.last[next]),
            Predictor::Following => {
                let used = self.trace.header().layers[next].used as usize;
                reader.following[layer].guess(experts, used, &mut reader.guesses);
            }
            Predictor::Oracle { recall } => {
                steps.by_last_row(batch, next, &mut reader.guesses);
                for guess in &mut reader.guesses {
                    if reader.random.unit() >= recall {
                        *guess = reader.random.below(count as usize) as u16;
                    }
                }
                let mut seen = Vec::new();
                reader.guesses.retain(|&guess| {
                    let new = !seen.contains(&guess);
                    seen.push(guess);
                    new
                });
            }
        }
        let record = |expert: u16| Record { layer: next as u32, expert: expert.into() };
        let guesses = reader.guesses.iter();
        reader.kept.extend(guesses.filter_map(|&expert| self.pool.hold(record(expert))));
        for &expert in &reader.guesses {
            if reader.held.len() as u32 == reader.budget {
                break;
            }
            if self.pool.peek(record(expert)) != Lookup::Absent {
                continue;
            }
            let Some(reserved) = self.pool.reserve(record(expert)) else { break };
            let empty = &mut self.empty[self.class_of[next]];
            *empty = empty.saturating_sub(u32::from(reserved.evicted.is_none()));
            self.pool.commit(reserved.slot);
            reader.held.push((expert, reserved.slot));
        }
    }

    fn finish(mut self, tokens: u64) -> Outcome {
        self.outcome.tokens = tokens;
        self.outcome
    }
}

//! What a GPU would do: its costs, and predictions for pools in its memory.

use std::path::Path;

use serde::Serialize;
use tierstream::costs::{self, Below};
use tierstream::gguf::Experts;
use tierstream::{Options, memory};
use tierstream_eval::plan::{Costs, Mix, Place, Placement, Prediction, Range, predict};

use super::{Faults, Model, at_most, faults, no_gain, pools};
use crate::cli::args::Plan;
use crate::cli::{open, output};

/// Share of the GPU's free memory that a run takes without a budget, and of the available host memory.
const VRAM_SHARE: f64 = 0.9;
const RAM_SHARE: f64 = 0.5;

/// What was measured with a GPU.
#[derive(Debug, Serialize)]
pub(super) struct OnGpu {
    hit_s: Range,
    /// Missing records that are read.
    faults: Vec<Faults>,
    /// Missing records that are copied from host memory.
    copies: Vec<Faults>,
    bus_gbps: f64,
    load_s: f64,
    #[serde(skip)]
    pub(super) vram_bytes: u64,
    #[serde(skip)]
    memory: Memory,
}

/// Bytes of the GPU's memory, and of the pool in host memory.
#[derive(Debug, Clone, Copy)]
struct Memory {
    /// All but the pool.
    fixed: u64,
    least: u64,
    whole: u64,
    least_below: u64,
    whole_below: u64,
}

/// Loads the model twice with a small pool: over the drive, and over host memory.
pub(super) fn measure(
    path: &Path,
    experts: &Experts,
    options: impl Fn() -> anyhow::Result<Options>,
) -> anyhow::Result<OnGpu> {
    let given = options()?;
    let gpu = given.placement.gpu().cloned().expect("a GPU was asked for");
    let free = gpu.free_bytes().map_err(tierstream::Error::from)?;
    let vram_bytes = given.vram_bytes.unwrap_or((free as f64 * VRAM_SHARE) as u64);
    output::stderr("measuring the GPU");
    let mut engine = open::quiet_engine(path, costs::options(given, experts, Below::Drive))?;
    let drive = costs::measure(&mut engine, Below::Drive)?;
    let model = engine.model();
    let (least_below, whole_below) = model.below_bytes();
    let memory = Memory {
        fixed: engine.vram_budget().map_or(0, |budget| budget.bytes() - model.pool_bytes().0),
        least: model.least_pool_bytes(),
        whole: model.whole_pool_bytes(),
        least_below,
        whole_below,
    };
    let load_s = engine.load_time().as_secs_f64();
    drop(engine);
    let mut engine = open::quiet_engine(path, costs::options(options()?, experts, Below::Ram))?;
    let ram = costs::measure(&mut engine, Below::Ram)?;
    let bus = gpu.copy_rate().map_err(tierstream::Error::from)?;
    let record = experts.record_bytes(0).unwrap_or(0) as f64;
    let copied = |(records, added): &(f64, Vec<f64>)| Faults {
        faults: *records,
        added_s: no_gain(added),
        read_s: Range::exactly(records * record / bus),
    };
    Ok(OnGpu {
        hit_s: Range::of(&[&drive.hit_s[..], &ram.hit_s].concat()),
        faults: faults(&drive),
        copies: ram.faults_s.iter().map(copied).collect(),
        bus_gbps: bus / 1e9,
        load_s,
        vram_bytes,
        memory,
    })
}

impl OnGpu {
    /// Pools in the GPU's memory, the smallest first, over what host memory has room for; that of which
    /// there is room for over the drive, too; and all of it.
    pub(super) fn predictions(
        &self,
        model: &Model<'_>,
        args: &Plan,
    ) -> anyhow::Result<Vec<Prediction>> {
        let Memory { fixed, least, whole, least_below, whole_below } = self.memory;
        let left = self.vram_bytes.saturating_sub(fixed).min(whole);
        let ram = args
            .model
            .engine
            .ram
            .map_or_else(|| (memory::available_bytes() as f64 * RAM_SHARE) as u64, |ram| ram.0);
        let below = match ram {
            ram if ram >= whole_below => (Placement::PoolVramOverRam, whole_below),
            ram if ram >= least_below => (Placement::PoolVramOverPoolRam, ram),
            _ => (Placement::PoolVramOverDrive, 0),
        };
        let drive = (Placement::PoolVramOverDrive, 0);
        let mut predictions = Vec::new();
        for pool in pools(&args.experts, least, whole, left) {
            let places = match pool {
                pool if pool >= whole => vec![(Placement::ResidentVram, 0)],
                pool if pool == left && below != drive => vec![drive, below],
                _ => vec![below],
            };
            for (placement, ram_bytes) in places {
                let place = Place {
                    placement,
                    ram_bytes,
                    vram_bytes: fixed + pool,
                    pool_bytes: pool,
                    fits: fixed + pool <= self.vram_bytes,
                    first_token_s: Some(self.load_s + model.prompt_s(pool >= whole, self.hit_s)),
                };
                let slots = model.slots(pool, whole);
                let below = model.slots(ram_bytes, whole_below);
                let expected = model.expected(slots, below, args)?;
                let costs = self.costs(placement, &expected.mix);
                predictions.push(predict(place, model.requests(), &expected, &costs));
            }
        }
        Ok(predictions)
    }

    fn costs(&self, placement: Placement, mix: &Mix) -> Costs {
        // Of what is missing above, the share that is missing below, too.
        let read = match placement {
            Placement::PoolVramOverRam => 0.0,
            Placement::PoolVramOverPoolRam => 1.0 - mix.below,
            _ => 1.0,
        };
        let at = |a: f64, b: f64| a + (b - a) * read;
        let range = |a: Range, b: Range| Range {
            mid: at(a.mid, b.mid),
            low: at(a.low, b.low),
            high: at(a.high, b.high),
        };
        let both = || self.copies.iter().zip(&self.faults);
        Costs {
            hit_s: match placement {
                Placement::ResidentVram => at_most(self.hit_s),
                _ => self.hit_s,
            },
            faults_s: both().map(|(a, b)| (b.faults, range(a.added_s, b.added_s))).collect(),
            // A faster drive is no faster bus.
            bursts_s: both()
                .map(|(_, b)| (b.faults, range(Range::exactly(0.0), b.read_s)))
                .collect(),
        }
    }
}

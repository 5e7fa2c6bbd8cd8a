//! What a model takes of a GPU's memory, and what a budget leaves for its experts: when it is loaded,
//! and when the budget changes.
//!
//! What llama.cpp puts there (dense weights, KV cache, compute buffers) is what is free less after
//! it than before. The pool gets what is left, but for the area in which whole layers are computed
//! and an allowance.

use std::fmt;

use tierstream_ggml::{Context, ContextOptions, Gpu, Miss, Model, PoolSize};

use crate::budget::check_available;
use crate::engine::Options;
use crate::error::{Error, Result};
use crate::memory;
use crate::size::{Bytes, PoolShare};

/// Share of the free memory that is used when no budget is given.
const DEFAULT_SHARE: f64 = 0.9;

/// Share of the available host memory that is used for experts when no budget is given.
const DEFAULT_RAM_SHARE: f64 = 0.5;

/// A second layer gets room if that is no more than this part of the budget: one in so many.
const SECOND_LAYER_SHARE: u64 = 16;

/// Sizes of batches that are tried, before the default.
const LARGE_BATCHES: [u32; 2] = [2048, 1024];

/// What is allocated for computing batches may be no more than this part of the budget: one in so
/// many. What it takes, the experts lack.
const COMPUTE_SHARE: u64 = 8;

/// What computing takes beyond what is allocated when the pool is made: ggml's buffers for
/// intermediate results, its captured graphs, cuBLAS. Bytes; about 510 MiB were seen on an H100, with
/// batches of 512 tokens.
const GROWTH_BYTES: u64 = 640 << 20;

/// The budget of a model that is not loaded yet.
pub(crate) struct Vram {
    gpu: Gpu,
    budget_bytes: u64,
    free_before: u64,
    /// For experts, in host memory.
    ram_bytes: Option<u64>,
}

impl Vram {
    /// None without a GPU. Lets the GPU be started, so that what that takes does not count.
    ///
    /// # Errors
    /// [`Error::Engine`] if it cannot be.
    pub(crate) fn before(options: &Options) -> Result<Option<Self>> {
        let Some(gpu) = options.placement.gpu().cloned() else { return Ok(None) };
        gpu.warm_up()?;
        let free_before = gpu.free_bytes()?;
        let default = (free_before as f64 * DEFAULT_SHARE) as u64;
        let budget_bytes = options.vram_bytes.unwrap_or(default);
        Ok(Some(Self { gpu, budget_bytes, free_before, ram_bytes: options.ram_bytes }))
    }

    /// A context for prompts in batches as large as pays: with each, the experts that are not in the
    /// GPU's memory are brought once.
    ///
    /// # Errors
    /// Those of [`Context::new`] as `options` say.
    pub(crate) fn context(&self, model: &Model, options: &ContextOptions) -> Result<Context> {
        for n_batch in LARGE_BATCHES.into_iter().filter(|&n_batch| n_batch <= options.n_ctx) {
            // Without memory for it, a smaller one is made.
            let larger = ContextOptions { n_batch, ..*options };
            if let Ok(context) = Context::new(model.clone(), &larger) {
                let is_cheap = context.compute_bytes() * COMPUTE_SHARE <= self.budget_bytes;
                let least = self.fixed_bytes(model, 1)? + model.least_pool_bytes();
                if is_cheap && least <= self.budget_bytes {
                    return Ok(context);
                }
            }
        }
        Ok(Context::new(model.clone(), options)?)
    }

    /// Size of the pool of a model that is loaded, and has its context; and what the budget can be
    /// changed by.
    ///
    /// # Errors
    /// [`Error::Vram`] if the budget is too small.
    pub(crate) fn pool_size(
        &self,
        model: &Model,
        asked: Option<PoolShare>,
    ) -> Result<(PoolSize, VramBudget)> {
        let fixed_bytes = self.fixed_bytes(model, self.layers_staged(model)?)?;
        let budget = VramBudget { model: model.clone(), asked, fixed_bytes };
        Ok((budget.pool_size(self.budget_bytes)?, budget))
    }

    /// How many whole layers get room: a second one, which lets prompts run faster, only if it costs
    /// the experts little.
    ///
    /// # Errors
    /// What the driver says.
    pub(crate) fn layers_staged(&self, model: &Model) -> Result<usize> {
        let is_cheap = model.area_bytes() * SECOND_LAYER_SHARE <= self.budget_bytes;
        let least = self.fixed_bytes(model, 2)? + model.least_pool_bytes();
        Ok(if is_cheap && least <= self.budget_bytes { 2 } else { 1 })
    }

    /// All but the slots of the pool, with room for so many layers.
    fn fixed_bytes(&self, model: &Model, staged: usize) -> Result<u64> {
        let beside = staged as u64 * model.area_bytes() + model.rounding_bytes()? + GROWTH_BYTES;
        Ok(self.taken_bytes()? + beside)
    }

    /// Size of the pool in host memory below, if there is to be one. Misses that are to be computed
    /// are computed from it.
    ///
    /// # Errors
    /// [`Error::RamBelow`] if the budget is too small, [`Error::NotAvailable`] if it is too large;
    /// [`Error::NothingToCompute`] if there is none and has to be.
    pub(crate) fn below_size(
        &self,
        model: &Model,
        miss: Miss,
        notes: &mut Vec<String>,
    ) -> Result<Option<PoolSize>> {
        match self.below_size_of(model, notes)? {
            None if miss == Miss::Compute => Err(Error::NothingToCompute),
            size => Ok(size),
        }
    }

    fn below_size_of(&self, model: &Model, notes: &mut Vec<String>) -> Result<Option<PoolSize>> {
        let (least, whole) = model.below_bytes();
        let available = memory::available_bytes();
        match self.ram_bytes {
            Some(0) => Ok(None),
            Some(ram) if ram < least => Err(Error::RamBelow { ram_bytes: ram, least_bytes: least }),
            Some(ram) => {
                check_available(ram.min(whole))?;
                Ok(Some(PoolSize::Bytes(ram)))
            }
            None => {
                let spare = (available as f64 * DEFAULT_RAM_SHARE) as u64;
                if spare < least {
                    let what = "there is no memory for experts below the GPU's: all are read";
                    notes.push(what.to_owned());
                    return Ok(None);
                }
                if spare < whole {
                    notes.push(format!(
                        "no --ram given: {} of host memory are pinned for experts",
                        Bytes(spare)
                    ));
                }
                Ok(Some(PoolSize::Bytes(spare)))
            }
        }
    }

    /// Refuses a model without a pool that has taken more than the budget.
    ///
    /// # Errors
    /// [`Error::Vram`].
    pub(crate) fn check(&self) -> Result<()> {
        let taken = self.taken_bytes()?;
        if taken > self.budget_bytes { Err(too_small(self.budget_bytes, taken)) } else { Ok(()) }
    }

    fn taken_bytes(&self) -> Result<u64> {
        Ok(self.free_before.saturating_sub(self.gpu.free_bytes()?))
    }
}

/// What a model may take of a GPU's memory, to be changed while it is used: from any thread, also
/// while another one generates. Clones are the same budget, and keep the model.
#[derive(Clone)]
pub struct VramBudget {
    model: Model,
    asked: Option<PoolShare>,
    /// All but the slots of the pool.
    fixed_bytes: u64,
}

impl VramBudget {
    /// Changes the budget to `vram_bytes`, as [`Options::vram_bytes`]. A smaller one takes slots from
    /// the pool, whichever these are, and gives their memory back; what is being computed with is
    /// waited for, half a minute at most. A larger one is taken as the pool fills, and so far as
    /// there is memory.
    ///
    /// Returns what the model may take now, bytes: `vram_bytes`, or less if all experts have a slot,
    /// or as many as [`Options::experts`] says. It is more if slots that were to go are still
    /// computed with after all; their memory is given back soon after. Contexts that were made
    /// beside the [engine](crate::Engine)'s do not count.
    ///
    /// # Errors
    /// [`Error::Vram`] with the least that works; nothing has changed then.
    pub fn set(&self, vram_bytes: u64) -> Result<u64> {
        let reached = self.model.resize_pool(self.pool_size(vram_bytes)?)?;
        Ok(self.fixed_bytes + reached)
    }

    /// What the model may take now, bytes. The pool takes its part as it fills.
    pub fn bytes(&self) -> u64 {
        self.fixed_bytes + self.model.pool_bytes().0
    }

    /// What `vram_bytes` leave for the pool, if it is to be that large.
    fn pool_size(&self, vram_bytes: u64) -> Result<PoolSize> {
        let (model, least) = (&self.model, self.model.least_pool_bytes());
        let left = vram_bytes.checked_sub(self.fixed_bytes).filter(|&left| left >= least);
        let left = left.ok_or_else(|| too_small(vram_bytes, self.fixed_bytes + least))?;
        let (size, bytes) = match self.asked {
            Some(PoolShare::Bytes(bytes)) => (PoolSize::Bytes(bytes.0), bytes.0),
            Some(PoolShare::Share(share)) => {
                let size = PoolSize::Share(share);
                (size, model.pool_bytes_of(size)?)
            }
            None => (PoolSize::Share(1.0), model.whole_pool_bytes()),
        };
        Ok(if bytes <= left { size } else { PoolSize::Bytes(left) })
    }
}

impl fmt::Debug for VramBudget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VramBudget").field("fixed_bytes", &self.fixed_bytes).finish_non_exhaustive()
    }
}

fn too_small(vram_bytes: u64, needed: u64) -> Error {
    Error::Vram { vram_bytes, least_bytes: needed.next_multiple_of(1 << 20) }
}

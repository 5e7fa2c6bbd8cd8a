//! What a model takes of a GPU's memory, and what a budget leaves for its experts.
//!
//! What llama.cpp puts there (dense weights, KV cache, compute buffers) is what is free less after
//! it than before. The pool gets what is left, but for the area in which whole layers are computed
//! and an allowance.

use tierstream_ggml::{Gpu, Model, PoolSize};

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

/// What computing takes beyond what is allocated when the pool is made: ggml's buffers for
/// intermediate results, its captured graphs, cuBLAS, and up to a granule of the pool that is used
/// in part. Bytes; about 510 MiB were seen on an H100, with batches of 512 tokens.
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

    /// Size of the pool of a model that is loaded, and has its context.
    ///
    /// # Errors
    /// [`Error::Vram`] if the budget is too small.
    pub(crate) fn pool_size(&self, model: &Model, asked: Option<PoolShare>) -> Result<PoolSize> {
        let area_bytes = self.layers_staged(model) as u64 * model.area_bytes();
        let fixed = self.taken_bytes()? + area_bytes + GROWTH_BYTES;
        let least = model.least_pool_bytes();
        let Some(left) = self.budget_bytes.checked_sub(fixed).filter(|&left| left >= least) else {
            return Err(self.too_small(fixed + least));
        };
        let (size, bytes) = match asked {
            Some(PoolShare::Bytes(bytes)) => (PoolSize::Bytes(bytes.0), bytes.0),
            Some(PoolShare::Share(share)) => {
                let size = PoolSize::Share(share);
                (size, model.pool_bytes_of(size)?)
            }
            None => (PoolSize::Share(1.0), model.whole_pool_bytes()),
        };
        Ok(if bytes <= left { size } else { PoolSize::Bytes(left) })
    }

    /// How many whole layers get room: a second one, which lets prompts run faster, only if it costs
    /// the experts little.
    pub(crate) fn layers_staged(&self, model: &Model) -> usize {
        if model.area_bytes() * SECOND_LAYER_SHARE <= self.budget_bytes { 2 } else { 1 }
    }

    /// Size of the pool in host memory below, if there is to be one.
    ///
    /// # Errors
    /// [`Error::RamBelow`] if the budget is too small, [`Error::NotAvailable`] if it is too large.
    pub(crate) fn below_size(
        &self,
        model: &Model,
        notes: &mut Vec<String>,
    ) -> Result<Option<PoolSize>> {
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
        if taken > self.budget_bytes { Err(self.too_small(taken)) } else { Ok(()) }
    }

    fn taken_bytes(&self) -> Result<u64> {
        Ok(self.free_before.saturating_sub(self.gpu.free_bytes()?))
    }

    fn too_small(&self, needed: u64) -> Error {
        let least_bytes = needed.next_multiple_of(1 << 20);
        Error::Vram { vram_bytes: self.budget_bytes, least_bytes }
    }
}

//! What a model takes of a GPU's memory, and what a budget leaves for its experts.
//!
//! What llama.cpp puts there (dense weights, KV cache, compute buffers) is what is free less after
//! it than before. The pool gets what is left, but for the area in which whole layers are computed
//! and an allowance.

use tierstream_ggml::{Gpu, Model, PoolSize};

use crate::engine::Options;
use crate::error::{Error, Result};
use crate::size::PoolShare;

/// Share of the free memory that is used when no budget is given.
const DEFAULT_SHARE: f64 = 0.9;

/// What computing takes beyond what is allocated when the pool is made: ggml's buffers for
/// intermediate results, and up to a granule of the pool that is used in part. Bytes.
const GROWTH_BYTES: u64 = 128 << 20;

/// The budget of a model that is not loaded yet.
pub(crate) struct Vram {
    gpu: Gpu,
    budget_bytes: u64,
    free_before: u64,
}

impl Vram {
    /// None without a GPU. Lets the GPU be started, so that what that takes does not count.
    ///
    /// # Errors
    /// [`Error::Engine`] if it cannot be; [`Error::Request`] for flags that do not go with one.
    pub(crate) fn before(options: &Options) -> Result<Option<Self>> {
        let Some(gpu) = options.placement.gpu().cloned() else { return Ok(None) };
        if options.ram_bytes.is_some() {
            let what = "--ram does not go with --gpu yet: experts lie in the GPU's memory alone";
            return Err(Error::Request(what.to_owned()));
        }
        gpu.warm_up()?;
        let free_before = gpu.free_bytes()?;
        let default = (free_before as f64 * DEFAULT_SHARE) as u64;
        let budget_bytes = options.vram_bytes.unwrap_or(default);
        Ok(Some(Self { gpu, budget_bytes, free_before }))
    }

    /// Size of the pool of a model that is loaded, and has its context.
    ///
    /// # Errors
    /// [`Error::Vram`] if the budget is too small.
    pub(crate) fn pool_size(&self, model: &Model, asked: Option<PoolShare>) -> Result<PoolSize> {
        let fixed = self.taken_bytes()? + model.area_bytes() + GROWTH_BYTES;
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

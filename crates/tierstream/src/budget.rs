//! What a model takes of memory, and what a budget leaves for its experts.
//!
//! `--ram` bounds what the process ever has resident. The pool gets what is left of it when all
//! else is taken or counted:
//!
//! | counted | from |
//! |---|---|
//! | the program, its libraries, the vocabulary, llama.cpp's books, the ring of the reader | resident when the context is made |
//! | dense weights | the same: they are read at load |
//! | KV cache and other state | the same: llama.cpp clears it when it makes the context |
//! | compute buffers | allocated with the context for its largest graph, untouched; llama.cpp tells the size |
//! | gathered rows, ggml's work buffer | allocated with the context, untouched; sized by the shapes of that graph (`workspace.rs` in the crate `ggml`) |
//! | rows of logits after the first | counted for a whole batch where all are kept |
//! | what is copied of mapped weights at a time | whether some are mapped or not |
//! | sampler, the pool's books, batches, pages of the program that are used later | an allowance: `growth_bytes` |
//!
//! A [`Rehearsal`] tells the same without loading: what it does not take is added.

use std::sync::Arc;

use tierstream_ggml::{Context, ContextOptions, Model, PoolSize, Rehearsal};
use tierstream_gguf::Experts;
use tierstream_io::Reader;
use tierstream_io::mapped::COPIED_BYTES;

use crate::engine::{Options, context_options};
use crate::error::{Error, Result};
use crate::memory::{self, Usage};
use crate::size::{Bytes, PoolShare};

/// Share of the available memory that is used when no budget is given.
const DEFAULT_SHARE: f64 = 0.8;

/// What a run takes beyond what is allocated when the pool is made: pages of the program that are
/// used for the first time, batches, graphs, text. Bytes.
const GROWTH_BYTES: u64 = 8 << 20;

/// For each entry of the vocabulary, while the next token is drawn: candidates and their sorting.
const GROWTH_PER_ENTRY_BYTES: u64 = 48;

/// The pool's books, for each record.
const GROWTH_PER_RECORD_BYTES: u64 = 128;

/// By how much one run may differ from the next: an error names a budget that works next time.
const SPREAD_BYTES: u64 = 8 << 20;

/// A budget that is larger than what is surely needed by this is not rehearsed. KV cache and
/// compute buffers are usually smaller.
const SURELY_ENOUGH_BYTES: u64 = 1 << 30;

/// More than the program, its vocabulary and its books take.
const PROGRAM_BYTES: u64 = 512 << 20;

/// What a model needs of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Requirement {
    /// All but the expert pool, bytes.
    pub fixed_bytes: u64,
    /// The smallest pool that works, bytes; 0 for models that do not stream.
    pub least_pool_bytes: u64,
    /// A pool of all experts, bytes.
    pub whole_pool_bytes: u64,
    /// Of the fixed bytes, what the model keeps of its tokens (KV cache); 0 where that is not told.
    pub state_bytes: u64,
}

impl Requirement {
    /// Of a loaded model that has no pool yet, in this process.
    pub(crate) fn measured(model: &Model, context: &Context, experts: &Experts) -> Self {
        let resident = resident_bytes();
        Self {
            fixed_bytes: resident + context.compute_bytes() + growth_bytes(model, experts),
            least_pool_bytes: model.least_pool_bytes(),
            whole_pool_bytes: model.whole_pool_bytes(),
            state_bytes: context.state_bytes(),
        }
    }

    /// What a run of the program would measure, in a process that has only rehearsed.
    fn rehearsed(rehearsal: &Rehearsal, experts: &Experts) -> Self {
        let (model, resident) = (rehearsal.model(), resident_bytes());
        Self {
            fixed_bytes: resident + rehearsal.rest_bytes() + growth_bytes(model, experts),
            least_pool_bytes: model.least_pool_bytes(),
            whole_pool_bytes: model.whole_pool_bytes(),
            state_bytes: rehearsal.state_bytes(),
        }
    }

    /// Whether no expert has to give way.
    fn fits(&self, ram_bytes: u64) -> bool {
        ram_bytes >= self.fixed_bytes + self.whole_pool_bytes + SPREAD_BYTES
    }

    /// What `ram_bytes` leave for the pool.
    ///
    /// # Errors
    /// [`Error::Ram`] if that is too little.
    pub fn left_of(&self, ram_bytes: u64) -> Result<u64> {
        match ram_bytes.checked_sub(self.fixed_bytes) {
            Some(left) if left >= self.least_pool_bytes => Ok(left),
            _ => Err(Error::Ram {
                ram_bytes,
                least_bytes: self.least_bytes(),
                pool_bytes: self.least_pool_bytes,
            }),
        }
    }

    /// The least budget that surely works, in whole MiB: bytes.
    pub fn least_bytes(&self) -> u64 {
        self.bytes_for(self.least_pool_bytes)
    }

    /// The same for a pool of so many bytes.
    pub fn bytes_for(&self, pool_bytes: u64) -> u64 {
        (self.fixed_bytes + pool_bytes + SPREAD_BYTES).next_multiple_of(1 << 20)
    }
}

/// Of this process, without what a load has freed.
fn resident_bytes() -> u64 {
    tierstream_ggml::give_back_freed_memory();
    Usage::now().rss_bytes
}

/// What a run takes beyond what is allocated when its pool is made.
fn growth_bytes(model: &Model, experts: &Experts) -> u64 {
    let entries = u64::from(model.vocab().len());
    let records: u64 = experts.layers().iter().map(|l| u64::from(l.experts)).sum();
    let books = entries * GROWTH_PER_ENTRY_BYTES + records * GROWTH_PER_RECORD_BYTES;
    GROWTH_BYTES + COPIED_BYTES as u64 + books
}

/// What the model in a file would take, by its header.
#[derive(Debug)]
pub struct Forecast {
    requirement: Requirement,
    rehearsal: Rehearsal,
}

impl Forecast {
    /// Rehearses `file` as `options` would run it. What this process has taken counts, so it should
    /// have loaded no model.
    ///
    /// # Errors
    /// As [`Engine::load`](crate::Engine::load).
    pub fn new(file: &tierstream_gguf::Model, options: Options) -> Result<Self> {
        let trained = file.arch_u32("context_length")?.unwrap_or(0);
        let context = context_options(&options, trained);
        let reader = Arc::new(Reader::new(options.io)?);
        Self::rehearse(file, &Experts::group(file)?, &reader, &context)
    }

    fn rehearse(
        file: &tierstream_gguf::Model,
        experts: &Experts,
        reader: &Arc<Reader>,
        context: &ContextOptions,
    ) -> Result<Self> {
        let rehearsal = Rehearsal::new(file, reader, context)?;
        let requirement = Requirement::rehearsed(&rehearsal, experts);
        Ok(Self { requirement, rehearsal })
    }

    /// What it needs.
    pub fn requirement(&self) -> &Requirement {
        &self.requirement
    }

    /// Whether all of it fits a budget; without one, the memory that a run would take.
    pub fn fits(&self, ram_bytes: Option<u64>) -> bool {
        self.requirement.fits(ram_bytes.unwrap_or_else(default_ram))
    }

    /// Whether it can be run at all within a budget; without one, within the memory that a run would take.
    /// `freed_bytes`: of what is resident now, what will be free by then.
    ///
    /// # Errors
    /// [`Error::Ram`] if it cannot.
    pub fn check(&self, ram_bytes: Option<u64>, freed_bytes: u64) -> Result<()> {
        let fixed_bytes = self.requirement.fixed_bytes.saturating_sub(freed_bytes);
        let needed = Requirement { fixed_bytes, ..self.requirement };
        needed.left_of(ram_bytes.unwrap_or_else(default_ram)).map(|_| ())
    }

    /// A budget, or without one the memory that a run would take, bytes.
    pub fn ram_bytes(&self, asked: Option<u64>) -> u64 {
        asked.unwrap_or_else(default_ram)
    }

    /// The model, of which there is only the header. It cannot be computed with.
    pub fn model(&self) -> &Model {
        self.rehearsal.model()
    }
}

/// The limits that a user sets.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Budget {
    pub(crate) ram: Option<u64>,
    pub(crate) experts: Option<PoolShare>,
}

impl Budget {
    /// Whether all of a model with experts fits, so that it needs no pool. Refuses a model that cannot fit
    /// before its weights are read; where the budget is far above what is surely needed, that is left to
    /// [`Budget::pool_size`].
    pub(crate) fn holds_all(
        &self,
        file: &tierstream_gguf::Model,
        experts: &Experts,
        reader: &Arc<Reader>,
        context: &ContextOptions,
    ) -> Result<bool> {
        let available = Usage::now().rss_bytes + memory::available_bytes();
        let ram = self.ram.map_or_else(default_ram, |ram| ram.min(available));
        if self.experts.is_some() || experts.is_empty() || ram < file.tensor_bytes() {
            self.check_file(file, experts, reader, context)?;
            return Ok(false);
        }
        if most_beside(file, context).is_some_and(|rest| ram >= file.tensor_bytes() + rest) {
            return Ok(true);
        }
        let forecast = Forecast::rehearse(file, experts, reader, context)?;
        let needed = forecast.requirement();
        if let Some(ram) = self.ram {
            needed.left_of(ram)?;
        }
        Ok(needed.fits(ram))
    }

    fn check_file(
        &self,
        file: &tierstream_gguf::Model,
        experts: &Experts,
        reader: &Arc<Reader>,
        context: &ContextOptions,
    ) -> Result<()> {
        let Some(ram) = self.ram else { return Ok(()) };
        let token_cycle: u64 = experts.token_cycle_bytes();
        let surely = file.tensor_bytes() - experts.expert_bytes() + token_cycle;
        if !experts.is_empty() && ram >= surely.saturating_add(SURELY_ENOUGH_BYTES) {
            return Ok(());
        }
        let forecast = Forecast::rehearse(file, experts, reader, context)?;
        forecast.requirement().left_of(ram).map(|_| ())
    }

    /// Size of the pool. Called when everything else is allocated.
    pub(crate) fn pool_size(
        &self,
        requirement: &Requirement,
        notes: &mut Vec<String>,
    ) -> Result<PoolSize> {
        let all = requirement.whole_pool_bytes;
        let asked = match self.experts {
            Some(PoolShare::Share(share)) => PoolSize::Share(share),
            Some(PoolShare::Bytes(bytes)) => PoolSize::Bytes(bytes.0),
            None => PoolSize::Share(1.0),
        };
        let asked_bytes = match asked {
            PoolSize::Bytes(bytes) => bytes.min(all),
            PoolSize::Share(share) => (all as f64 * share) as u64,
        };
        let ram = match (self.ram, self.experts) {
            (Some(ram), _) => ram,
            (None, Some(_)) => return check_available(asked_bytes).map(|()| asked),
            (None, None) => {
                let ram = default_ram();
                if ram < requirement.fixed_bytes + requirement.whole_pool_bytes {
                    let spare = Bytes(ram.saturating_sub(Usage::now().rss_bytes));
                    let text = "of the memory that is available now";
                    notes.push(format!("no --ram given: using {spare} {text}"));
                }
                ram
            }
        };
        let left = requirement.left_of(ram)?;
        check_available(asked_bytes.min(left))?;
        if asked_bytes > left && self.experts.is_some() {
            let (left, all) = (Bytes(left), Bytes(asked_bytes));
            notes.push(format!("--ram leaves {left} for the experts, not the {all} of --experts"));
        }
        // A share is exact in records; bytes round down.
        Ok(if asked_bytes <= left { asked } else { PoolSize::Bytes(left) })
    }
}

/// Refuses a pool that the machine has no memory for. It would fill slot by slot, until something is
/// killed.
pub(crate) fn check_available(pool_bytes: u64) -> Result<()> {
    let available_bytes = memory::available_bytes();
    if pool_bytes > available_bytes {
        return Err(Error::NotAvailable { pool_bytes, available_bytes });
    }
    Ok(())
}

/// The budget when none is given: what is resident, and most of what is available.
fn default_ram() -> u64 {
    Usage::now().rss_bytes + (memory::available_bytes() as f64 * DEFAULT_SHARE) as u64
}

/// More than what a model takes beside its weights, by its header: if that says enough of its attention.
fn most_beside(file: &tierstream_gguf::Model, context: &ContextOptions) -> Option<u64> {
    let key = |name: &str| file.arch_u32(name).ok().flatten().map(u64::from);
    let (layers, heads) = (key("block_count")?, key("attention.head_count")?);
    let width = key("embedding_length")? / heads.max(1);
    let keys = key("attention.key_length").unwrap_or(width);
    let values = key("attention.value_length").unwrap_or(width);
    let (ctx, batch) = (u64::from(context.n_ctx), u64::from(context.n_batch));
    // Of each sequence, rounded up as llama.cpp does.
    let cells = u64::from(context.n_seq) * ctx.next_multiple_of(256);
    let kv = layers * heads * (keys + values) * cells * 2;
    // Scores of all heads, logits, and some rows of the widest operation.
    let vocab = file.tensors().iter().map(|t| t.dims.iter().copied().max().unwrap_or(0)).max()?;
    let compute = batch * 4 * (heads * ctx + 4 * vocab);
    Some(kv + compute + PROGRAM_BYTES)
}

//! Load a model within a budget and generate with it: what the CLI, and programs that embed
//! tierstream, call.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tierstream_ggml::{
    Cancel, Context, ContextOptions, CufilePlaces, Execution, ExpertCounters, Keep, Miss, Model,
    Placement, PoolOptions, Prefetch, Sampler, Sampling, Source, Token, Weights,
};
use tierstream_gguf::Experts;
use tierstream_io::Reader;
use tierstream_pool::Policy;

use crate::budget::{Budget, Requirement};
use crate::drive::{GpuReads, GpuWay, Io};
use crate::error::{Error, Result};
use crate::progress::{LoadProgress, LoadRate, LoadStage, Watch};
use crate::reading::{Drive, hold_records, io_config};
use crate::size::PoolShare;
use crate::vram::{Vram, VramBudget};
use crate::weights::WeightSums;

/// Context length when none is asked for, tokens; less if the model was trained with less.
pub const DEFAULT_CTX: u32 = 4096;

/// Tokens of a prompt that are computed at once, if nobody says otherwise.
const DEFAULT_BATCH: u32 = 512;

/// What a model may take and how it is run.
#[derive(Debug)]
pub struct Options {
    /// All host memory of this process, bytes: dense weights, KV cache, compute, experts. With a GPU:
    /// the pinned memory for experts that do not fit the GPU's; none of it if 0.
    pub ram_bytes: Option<u64>,
    /// The expert pool alone. Wins over what `ram_bytes` leaves for it, if it is smaller.
    pub experts: Option<PoolShare>,
    /// Which record gives way.
    pub policy: Policy,
    /// Whether records are read before they are asked for.
    pub prefetch: Prefetch,
    /// With a GPU: what is done with experts that a token needs, and that are in host memory only.
    pub miss: Miss,
    /// With a GPU: how single tokens are computed.
    pub execution: Execution,
    /// Compute threads; default: one less than the processors, so that reads find one free, but
    /// at least two where there are two; one with a GPU, which leaves them next to nothing to do,
    /// unless they compute its [misses](Options::miss).
    pub threads: Option<u32>,
    /// Tokens of context, of each sequence; default: [`DEFAULT_CTX`].
    pub ctx: Option<u32>,
    /// Sequences of [`Engine::context`]. [`Engine::generate`] uses the first one alone.
    pub sequences: u32,
    /// Tokens of a prompt computed at once; default: 512, and with a GPU up to 2048 where they take
    /// little of its memory: each expert is brought once for all of them.
    pub batch: Option<u32>,
    /// The rows of logits that decodes of [`Engine::context`] may keep. Generating needs the last.
    pub keep: Keep,
    /// Seed of the `random` policy.
    pub seed: u64,
    /// How weights are loaded. What is to be streamed is loaded as [`Weights::Resident`] if all of it fits, to
    /// the same bits, unless `experts` sizes the pool, or there is a GPU, or nothing is to be preloaded, or
    /// all is to be `pooled`.
    pub weights: Weights,
    /// Where the model computes.
    pub placement: Placement,
    /// With a GPU: all of its memory that may be taken, bytes, the driver's context apart.
    pub vram_bytes: Option<u64>,
    /// Read all experts at load when they fit.
    pub preload: bool,
    /// Experts go to a pool even if all of them fit, so that their routing can be recorded
    /// ([`Context::record_routing`]).
    pub pooled: bool,
    /// What all weights are compared with as they are read, if they are.
    pub weight_sums: Option<Arc<WeightSums>>,
    /// How files are read. Where the engine is left open, so is whether reads go past the page cache,
    /// unless `io_direct` says so: see [`drive::Way`](crate::drive::Way).
    pub io: tierstream_io::Config,
    /// Reads go past the page cache wherever the filesystem lets them.
    pub io_direct: bool,
    /// With a GPU: how the weights that are loaded reach its memory.
    pub gpu_reads: GpuReads,
    /// Where libcufile is looked for, by which they may.
    pub cufile: CufilePlaces,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            ram_bytes: None,
            experts: None,
            policy: Policy::default(),
            prefetch: Prefetch::default(),
            miss: Miss::default(),
            execution: Execution::default(),
            threads: None,
            ctx: None,
            sequences: 1,
            batch: None,
            keep: Keep::Last,
            seed: 0,
            weights: Weights::Streamed,
            placement: Placement::Cpu,
            vram_bytes: None,
            preload: true,
            pooled: false,
            weight_sums: None,
            io: io_config(Io::Auto),
            io_direct: false,
            gpu_reads: GpuReads::default(),
            cufile: CufilePlaces::here(),
        }
    }
}

/// A loaded model with one context.
pub struct Engine {
    file: tierstream_gguf::Model,
    experts: Experts,
    model: Model,
    context: Context,
    load_time: Duration,
    gpu_start_time: Option<Duration>,
    load_rate: Option<LoadRate>,
    gpu_way: Option<GpuWay>,
    notes: Vec<String>,
    /// Counters after the load, which are not the requests'.
    loaded: ExpertCounters,
    requirement: Requirement,
    vram: Option<VramBudget>,
    weight_sums: Option<Arc<WeightSums>>,
}

/// How tokens are generated.
#[derive(Debug, Clone)]
pub struct Generate {
    /// Most tokens to generate.
    pub max_tokens: u32,
    /// How they are drawn.
    pub sampling: Sampling,
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Stop {
    /// The model said so.
    End,
    /// As many tokens as asked for.
    Length,
    /// A text came that the caller stops at.
    StopText,
    /// The context is full.
    ContextFull,
    /// The caller, or the cancel handle.
    Cancelled,
}

/// What a generation did.
#[derive(Debug, Clone)]
pub struct Generation {
    /// The tokens generated.
    pub tokens: Vec<Token>,
    /// Why it ended.
    pub stop: Stop,
    /// Tokens of the prompt that were computed.
    pub prompt_tokens: usize,
    /// Time for the prompt.
    pub prompt_time: Duration,
    /// Time for the tokens after the first.
    pub eval_time: Duration,
    /// Time that computing waited for experts.
    pub stall: Duration,
    /// What the pool did.
    pub experts: ExpertCounters,
}

impl Generation {
    /// Generated tokens per second, the first (which the prompt yields) apart.
    pub fn tok_s(&self) -> f64 {
        rate(self.tokens.len().saturating_sub(1), self.eval_time)
    }

    /// Prompt tokens per second.
    pub fn prompt_tok_s(&self) -> f64 {
        rate(self.prompt_tokens, self.prompt_time)
    }
}

fn rate(n: usize, time: Duration) -> f64 {
    if time.is_zero() { 0.0 } else { n as f64 / time.as_secs_f64() }
}

impl Engine {
    /// Loads the GGUF at `path` (the first file of a split model), or a packed model.
    ///
    /// # Errors
    /// [`Error::Gguf`] and [`Error::Pack`] for files that are none or damaged, [`Error::Ram`] and
    /// [`Error::Engine`] when it does not fit the budget or llama.cpp refuses it, or when weights do
    /// not have their checksums.
    pub fn load(path: &Path, mut options: Options, progress: LoadProgress<'_>) -> Result<Engine> {
        let start = Instant::now();
        let file = tierstream_pack::open(path)?;
        let experts = Experts::group(&file)?;
        let mut drive = Drive::of(&file, &mut options)?;
        let starting = Instant::now();
        let vram = Vram::before(&options)?;
        if vram.is_some() && options.ram_bytes == Some(0) {
            hold_records(&mut options.io, &file, &experts);
        }
        let gpu_start_time = vram.is_some().then(|| starting.elapsed());
        let (gds, gpu_way) = drive.way_to_gpu(&file, &options)?.unzip();
        let reader = Arc::new(Reader::new(std::mem::take(&mut options.io))?);
        let limit = drive.limit_bytes_per_s();
        let loaded = Watch::over(&reader, limit, progress, |watch| {
            let source = Source { gds: gds.flatten(), ..Source::of(reader.clone()) };
            Self::load_watched(file, experts, &options, vram, source, watch)
        });
        let (engine, peak) = loaded.ok_or(tierstream_ggml::Error::Cancelled)?;
        let mut engine = engine?;
        engine.gpu_start_time = gpu_start_time;
        engine.load_time = start.elapsed();
        let reading = engine.load_time - gpu_start_time.unwrap_or_default();
        let past_host = engine.model.gds_read().map_or(0, |read| read.bytes);
        let read = (past_host, engine.model.from_cache());
        engine.load_rate = drive.load_rate(&reader, read, reading, peak);
        engine.gpu_way = gpu_way;
        Ok(engine)
    }

    fn load_watched(
        file: tierstream_gguf::Model,
        experts: Experts,
        options: &Options,
        vram: Option<Vram>,
        mut source: Source,
        watch: &Watch,
    ) -> Result<Engine> {
        let reader = source.reader.clone();
        let mut heard = |share| watch.heard(share);
        let trained = file.arch_u32("context_length")?.unwrap_or(0);
        let context = context_options(options, trained);
        let budget = Budget { ram: options.ram_bytes, experts: options.experts };
        let weights = match options.weights {
            Weights::Streamed if vram.is_none() => {
                let fits = budget.holds_all(&file, &experts, &reader, &context)?;
                let pools = options.pooled || !options.preload;
                if fits && !pools { Weights::Resident } else { Weights::Streamed }
            }
            weights => weights,
        };
        source.checksums = match &options.weight_sums {
            Some(sums) => Some(sums.checksums(&file)?),
            None => WeightSums::of_other_files(&file)?,
        };
        let streamed = match weights {
            Weights::Streamed => experts.expert_bytes(),
            Weights::Resident | Weights::Stock { .. } => 0,
        };
        watch.begin(LoadStage::Weights, file.tensor_bytes().saturating_sub(streamed), &reader);
        let placement = &options.placement;
        let model = Model::load_from(&file, weights, placement, source, &mut heard)?;
        let context = match &vram {
            Some(vram) if model.is_streamed() && options.batch.is_none() => {
                vram.context(&model, &context)?
            }
            _ => Context::new(model.clone(), &context)?,
        };
        let requirement = Requirement::measured(&model, &context, &experts);
        let mut notes = notes(&model, weights, &file, &experts);
        for (block, why) in context.unguessed_blocks() {
            notes.push(format!("--prefetch: nothing is read ahead for block {block}: {why}"));
        }
        let mut vram_budget = None;
        if model.is_streamed() {
            let pool = PoolOptions {
                size: match &vram {
                    Some(vram) => {
                        let (size, budget) = vram.pool_size(&model, options.experts)?;
                        vram_budget = Some(budget);
                        size
                    }
                    None => budget.pool_size(&requirement, &mut notes)?,
                },
                policy: options.policy,
                seed: options.seed,
                preload: options.preload,
                below: match &vram {
                    Some(vram) => vram.below_size(&model, options.miss, &mut notes)?,
                    None => None,
                },
                staged: match &vram {
                    Some(vram) => vram.layers_staged(&model)?,
                    None => 1,
                },
            };
            watch.begin(LoadStage::Experts, model.expert_bytes(), &reader);
            model.attach_pool(&pool, &mut heard)?;
        } else if let Some(vram) = &vram {
            vram.check()?;
        } else if let Some(ram) = options.ram_bytes {
            requirement.left_of(ram)?;
        }
        if vram.is_some() {
            notes.extend(miss_note(options.miss, &context));
            notes.extend(execution_note(&context));
        }
        notes.extend(model.cache_remark());
        let loaded = model.expert_counters();
        Ok(Engine {
            file,
            experts,
            model,
            context,
            load_time: Duration::ZERO,
            gpu_start_time: None,
            load_rate: None,
            gpu_way: None,
            notes,
            loaded,
            requirement,
            vram: vram_budget,
            weight_sums: options.weight_sums.clone(),
        })
    }

    /// Appends `prompt` to the context and generates. `on_token` gets each token and its bytes
    /// (not always whole characters) as it comes, and may stop the generation.
    ///
    /// # Errors
    /// [`Error::ContextTooSmall`], [`Error::Engine`]; the context then holds what was decoded before the failure, and the
    /// next call is independent of this one after [`Engine::clear`].
    pub fn generate(
        &mut self,
        prompt: &[Token],
        options: &Generate,
        mut on_token: impl FnMut(Token, &[u8]) -> ControlFlow<()>,
    ) -> Result<Generation> {
        self.check_room(prompt.len())?;
        let before = self.model.expert_counters();
        let stalled = self.context.stall();
        let mut sampler = Sampler::new(options.sampling);
        sampler.accept(prompt);
        let mut made = Generation {
            tokens: Vec::new(),
            stop: Stop::Length,
            prompt_tokens: prompt.len(),
            prompt_time: Duration::ZERO,
            eval_time: Duration::ZERO,
            stall: Duration::ZERO,
            experts: ExpertCounters::default(),
        };
        let start = Instant::now();
        let mut result = self.context.decode(prompt, Keep::Last, |_, _| {});
        made.prompt_time = start.elapsed();
        let start = Instant::now();
        while result.is_ok() && made.tokens.len() < options.max_tokens as usize {
            let token = sampler.sample(&mut self.context)?;
            if self.model.vocab().is_end(token) {
                made.stop = Stop::End;
                break;
            }
            made.tokens.push(token);
            if on_token(token, &self.model.vocab().piece(token)).is_break() {
                made.stop = Stop::Cancelled;
                break;
            }
            if made.tokens.len() == options.max_tokens as usize {
                break;
            }
            if self.context.position() == self.context.options().n_ctx {
                made.stop = Stop::ContextFull;
                break;
            }
            result = self.context.decode(&[token], Keep::Last, |_, _| {});
        }
        made.eval_time = start.elapsed();
        made.stall = self.context.stall() - stalled;
        made.experts = self.model.expert_counters().since(&before);
        match result {
            Ok(()) => Ok(made),
            Err(tierstream_ggml::Error::Cancelled) => {
                made.stop = Stop::Cancelled;
                Ok(made)
            }
            Err(e) => Err(e.into()),
        }
    }

    /// An error if the context has no room for `tokens` more.
    pub(crate) fn check_room(&self, tokens: usize) -> Result<()> {
        let n_ctx = self.context.options().n_ctx;
        let room = n_ctx.saturating_sub(self.context.position()) as usize;
        if tokens > room {
            return Err(Error::ContextTooSmall { tokens, room, n_ctx });
        }
        Ok(())
    }

    /// Forgets the conversation. The pool keeps its records.
    pub fn clear(&mut self) {
        self.context.clear();
    }

    /// Stops a generation from another thread, or from a signal's.
    pub fn cancel_handle(&self) -> Cancel {
        self.context.cancel_handle()
    }

    /// Tokens that the GPU has computed as a whole: [`Options::execution`].
    pub fn whole_tokens(&self) -> u64 {
        self.context.whole_tokens()
    }

    /// What is done with experts that are in host memory only, where a GPU computes.
    pub fn miss(&self) -> Miss {
        self.context.options().miss
    }

    /// What may be taken of the GPU's memory, to change that from any thread: none where no experts
    /// are streamed to a GPU.
    pub fn vram_budget(&self) -> Option<VramBudget> {
        self.vram.clone()
    }

    /// The model's header.
    pub fn file(&self) -> &tierstream_gguf::Model {
        &self.file
    }

    /// The model's experts, as the file has them.
    pub fn experts(&self) -> &Experts {
        &self.experts
    }

    /// The loaded model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The context.
    pub fn context(&mut self) -> &mut Context {
        &mut self.context
    }

    /// What the weights are compared with, if they are; [`Model::checksums`] tells how many were.
    pub fn weight_sums(&self) -> Option<&WeightSums> {
        self.weight_sums.as_deref()
    }

    /// What the model was found to need of memory when it was loaded.
    pub fn requirement(&self) -> &Requirement {
        &self.requirement
    }

    /// Time that [`Engine::load`] took.
    pub fn load_time(&self) -> Duration {
        self.load_time
    }

    /// Of [`Engine::load_time`], what the GPU took to start: the driver's context and ggml's own,
    /// which a model of any size waits for. None without a GPU.
    pub fn gpu_start_time(&self) -> Option<Duration> {
        self.gpu_start_time
    }

    /// What the load has read from the drive, and how fast; none if it has read nothing.
    pub fn load_rate(&self) -> Option<LoadRate> {
        self.load_rate
    }

    /// How the weights were to reach the GPU, and why; none without one, or where llama.cpp has read
    /// them. [`Model::gds_read`] tells what really came past host memory.
    pub fn gpu_way(&self) -> Option<&GpuWay> {
        self.gpu_way.as_ref()
    }

    /// What the pool has done since the load.
    pub fn expert_counters(&self) -> ExpertCounters {
        self.model.expert_counters().since(&self.loaded)
    }

    /// Lines that a user should see once: what does not stream and why, which path reads take.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }
}

/// Compute threads: all processors but one, which is left for reads, and no less than two where
/// there are two, because a waiting compute thread leaves its processor too.
pub fn default_threads() -> u32 {
    let processors = std::thread::available_parallelism().map_or(1, |n| n.get());
    u32::try_from((processors - 1).max(processors.min(2))).unwrap_or(1)
}

/// The context that `options` ask for, of a model that was trained with `trained` tokens, or 0 if
/// it does not say.
pub(crate) fn context_options(options: &Options, trained: u32) -> ContextOptions {
    let default = if trained == 0 { DEFAULT_CTX } else { DEFAULT_CTX.min(trained) };
    ContextOptions {
        n_ctx: options.ctx.unwrap_or(default),
        n_seq: options.sequences,
        n_batch: options.batch.unwrap_or(DEFAULT_BATCH),
        n_threads: options.threads.unwrap_or_else(|| match options.placement {
            Placement::Gpu(_) if options.miss == Miss::Copy => 1,
            Placement::Cpu | Placement::Gpu(_) => default_threads(),
        }),
        keep: options.keep,
        prefetch: options.prefetch,
        miss: options.miss,
        execution: options.execution,
    }
}

/// Why no token can be computed as a whole, where it could be.
fn execution_note(context: &Context) -> Option<String> {
    let (model, options) = (context.model(), context.options());
    let is_whole = model.pool_share().is_none_or(|share| share >= 1.0);
    if is_whole || !options.may_compute_as_a_whole() || model.gpu()?.has_gates() {
        return None;
    }
    Some(
        "single tokens are computed layer by layer, which takes longer: this GPU is older than compute \
         capability 7.0, or CUDA_MODULE_LOADING has kernels loaded lazily"
            .to_owned(),
    )
}

/// What a user should know of the output, and of what is done in place of what was asked for.
fn miss_note(miss: Miss, context: &Context) -> Option<String> {
    let model = context.model();
    if miss == Miss::Copy || model.pool_share().is_none_or(|share| share >= 1.0) {
        return None;
    }
    if model.pool_below_bytes().is_none() {
        return Some(format!("--miss {miss}: no experts are in host memory, so all are read"));
    }
    if let Some((block, why)) = context.only_on_gpu() {
        return Some(format!("--miss {miss}: all is copied, because of block {block}: {why}"));
    }
    Some(format!(
        "--miss {miss}: experts that the GPU's memory lacks are computed on the CPU, whose kernels \
         round differently: the output is not, bit for bit, that of the resident model"
    ))
}

fn notes(
    model: &Model,
    weights: Weights,
    file: &tierstream_gguf::Model,
    experts: &Experts,
) -> Vec<String> {
    let mut notes = Vec::new();
    if experts.is_empty() {
        notes.push("this model is dense: nothing to stream, it is resident as a whole".to_owned());
    }
    if weights == Weights::Resident && file.originals().is_some() {
        notes.push(
            "all of this packed model fits into memory: the GGUF that it was made of loads faster"
                .to_owned(),
        );
    }
    let streams = weights == Weights::Streamed;
    for (block, why) in model.resident_blocks().iter().filter(|_| streams) {
        notes.push(format!("the experts of block {block} stay resident: {why}"));
    }
    notes.extend(model.read_status().and_then(|status| status.reason));
    if let Some(failed) = model.gds_read().and_then(|read| read.failed.as_ref()) {
        notes.push(format!(
            "cuFile did not read all that goes to the GPU, the rest came through host memory: {failed}"
        ));
    }
    notes
}

//! What the server has models run with: the library.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tierstream::machine::Filesystem;
use tierstream::memory::Usage;
use tierstream::size::{Bytes, PoolShare};
use tierstream::{Context, Error, Forecast, Model, Options, Placement, Sampler, drive, ggml, gguf};
use tierstream_server::PromptCache;
use tierstream_server::engine::{
    Compute, Counters, Engine, EngineError, Entry, LayerCounters, Limits, LoadOptions, Loaded,
    Rates, Sample, Sampling, Text, Token, WAIT_BOUNDS,
};

use super::super::args::{EngineArgs, Serve, ram_with_prompts};
use super::super::open;
use super::super::output;
use super::super::preset;
use super::traces::Traces;

/// What a few hundred connections and their answers take.
const SERVER_BYTES: u64 = 24 << 20;

/// Loads models as the flags say.
pub(super) struct Models {
    args: EngineArgs,
    experts: Option<PoolShare>,
    sequences: u32,
    /// Bytes that the program has by itself.
    own_bytes: u64,
    /// Bytes that are left to the server: kept prompts, connections, answers.
    server_bytes: u64,
    /// What prompts may take, if the flags say so.
    prompt_cache: Option<Bytes>,
    /// Where routing is recorded, if it is.
    traces: Option<PathBuf>,
    stops: AtomicBool,
}

impl Models {
    pub(super) fn new(args: &Serve, prompts: &PromptCache) -> Self {
        let mut engine = args.engine.clone();
        engine.ctx = args.ctx();
        let own_bytes = Usage::now().rss_bytes;
        let stops = AtomicBool::new(false);
        Self {
            args: engine,
            experts: args.experts,
            sequences: args.parallel,
            own_bytes,
            server_bytes: prompts.ram_bytes + SERVER_BYTES,
            prompt_cache: args.prompt_cache,
            traces: args.trace.clone(),
            stops,
        }
    }

    /// Ends what is being loaded.
    pub(super) fn stop(&self) {
        self.stops.store(true, Ordering::Release);
    }

    /// The flags' options for a model beside others that have `taken_bytes`.
    fn options(&self, asked: &LoadOptions) -> anyhow::Result<Options> {
        let mut options = open::options(&self.args, self.experts)?;
        options.sequences = self.sequences;
        options.pooled = self.traces.is_some();
        options.ctx = asked.ctx.or(options.ctx);
        // A budget of host memory counts what the process has, of which the others' pools may lack some yet. With a
        // GPU it is pinned memory for experts alone.
        let not_ours = match on_gpu(&options) {
            false => asked.taken_bytes.saturating_sub(self.others_now()) + self.server_bytes,
            true => asked.taken_bytes,
        };
        options.ram_bytes = options.ram_bytes.map(|bytes| bytes.saturating_sub(not_ours));
        let vram = |bytes: u64| bytes.saturating_sub(asked.taken_vram_bytes);
        options.vram_bytes = options.vram_bytes.map(vram);
        Ok(options)
    }

    /// Bytes that loaded models have resident in host memory.
    fn others_now(&self) -> u64 {
        Usage::now().rss_bytes.saturating_sub(self.own_bytes)
    }

    /// Whether all of a model fits beside those that are loaded. Below half of a model in memory is slow: others
    /// go before that.
    fn fits_beside(&self, file: &gguf::Model, asked: &LoadOptions) -> anyhow::Result<bool> {
        let options = self.options(asked)?;
        match options.placement.gpu() {
            Some(gpu) => {
                let free = gpu.free_bytes()?;
                Ok(file.tensor_bytes() <= options.vram_bytes.map_or(free, |vram| vram.min(free)))
            }
            None => {
                let ram_bytes = options.ram_bytes;
                Ok(Forecast::new(file, options)?.fits(ram_bytes))
            }
        }
    }

    /// A budget that is too small is told as the user gave it, with what the server has of it.
    fn with_server(&self, error: Error) -> Error {
        match error {
            Error::Ram { ram_bytes, least_bytes, pool_bytes } => Error::Ram {
                ram_bytes: self.args.ram.map_or(ram_bytes, |ram| ram.0),
                least_bytes: ram_with_prompts(self.prompt_cache, least_bytes + SERVER_BYTES),
                pool_bytes,
            },
            other => other,
        }
    }

    /// Loads a model with options that `change` has the last word about.
    pub(super) fn load_with(
        &self,
        path: &Path,
        asked: &LoadOptions,
        is_wanted: &(dyn Fn() -> bool + Sync),
        change: impl FnOnce(&mut Options),
    ) -> Result<Loaded, EngineError> {
        let failed = |error: anyhow::Error| EngineError::Failed(format!("{error:#}"));
        let mut options = self.options(asked).map_err(failed)?;
        let file = tierstream::pack::open(path).map_err(|error| of(error.into()))?;
        let is_first = asked.taken_bytes == 0 && asked.taken_vram_bytes == 0;
        if !is_first && !self.fits_beside(&file, asked).map_err(failed)? {
            let why = "there is no room for all of this model beside those that are loaded";
            return Err(EngineError::NoRoom(why.into()));
        }
        options.weight_sums = open::weight_sums(&self.args, path).map_err(failed)?;
        change(&mut options);
        open::backends();
        let gpu = options.placement.gpu().cloned();
        let free = || gpu.as_ref().and_then(|gpu| gpu.free_bytes().ok()).unwrap_or(0);
        let free_before = free();
        // All that changes the bits.
        let device = format!("{:?} {:?}", options.placement, options.miss);
        let mut engine = tierstream::Engine::load(path, options, &mut |_| {
            is_wanted() && !self.stops.load(Ordering::Acquire)
        })
        .map_err(|error| of(self.with_server(error)))?;
        let notes = engine.notes().to_vec();
        let model = engine.model().clone();
        let requirement = *engine.requirement();
        // Not what the process has more than before, which hangs on what that has given back.
        let streamed = if model.is_streamed() { model.expert_bytes() } else { 0 };
        let dense = file.tensor_bytes() - streamed;
        let compute = engine.context().compute_bytes();
        // A pool takes its memory as it fills.
        let (ram_bytes, vram_bytes) = match (&gpu, engine.vram_budget()) {
            (None, _) => (dense + requirement.state_bytes + compute + model.pool_bytes().0, 0),
            (Some(_), None) => (0, free_before.saturating_sub(free())),
            (Some(_), Some(vram)) => {
                (model.pool_below_bytes().map_or(0, |(bytes, _)| bytes), vram.bytes())
            }
        };
        let took = engine.load_time();
        tell(&asked.name, (ram_bytes, vram_bytes), took, &notes);
        let traces = match &self.traces {
            Some(folder) if engine.model().pool_share().is_some() => {
                Some(Traces::begin(folder, &asked.name, &mut engine).map_err(of)?)
            }
            _ => None,
        };
        let context = engine.context();
        let stalls = context.stalls();
        let limits = Limits {
            ctx: context.options().n_ctx as usize,
            sequences: self.sequences as usize,
            batch: context.batch_size(),
            is_encoder: context.is_encoder(),
            // Several tokens there have whole layers brought.
            together: if gpu.is_some() && model.is_streamed() {
                1
            } else {
                self.sequences as usize
            },
        };
        Ok(Loaded {
            identity: identity(&file, &device, limits.ctx),
            text: Arc::new(Tokenizer(model.clone())),
            vram_bytes,
            layers: {
                let model = model.clone();
                Arc::new(move || model.layer_uses().into_iter().map(of_layer).collect())
            },
            rates: Rates {
                // After the load, which may have measured it.
                drive: drive::limit_gbps(path, Filesystem::of(path).as_ref())
                    .map(|gbps| gbps * 1e9),
                gpu: model.gpu().and_then(|gpu| gpu.link_rate()),
            },
            counters: Arc::new(move || counters(&model, stalls.as_deref())),
            compute: Box::new(Computing { engine, limits, traces }),
            ram_bytes,
            notes,
        })
    }
}

impl Engine for Models {
    fn load(
        &self,
        path: &Path,
        asked: &LoadOptions,
        is_wanted: &(dyn Fn() -> bool + Sync),
    ) -> Result<Loaded, EngineError> {
        self.load_with(path, asked, is_wanted, |_| ())
    }

    fn check(&self, path: &Path, ctx: Option<u32>) -> Result<(), EngineError> {
        let failed = |error: anyhow::Error| EngineError::Failed(format!("{error:#}"));
        let file = tierstream::pack::open(path).map_err(|error| of(error.into()))?;
        let alone = LoadOptions { ctx, ..LoadOptions::default() };
        let options = self.options(&alone).map_err(failed)?;
        if on_gpu(&options) {
            return fits_gpu(&file, options.vram_bytes);
        }
        let ram_bytes = options.ram_bytes;
        let forecast = Forecast::new(&file, options).map_err(of)?;
        // What others have is resident, and will be free.
        forecast.check(ram_bytes, self.others_now()).map_err(|error| of(self.with_server(error)))
    }
}

/// Of what a sequence's state depends on.
fn identity(files: &gguf::Model, device: &str, ctx: usize) -> String {
    let file =
        |file: &gguf::FileInfo| format!("{} {} {:?}", file.path.display(), file.len, file.identity);
    let files: Vec<String> = files.files().iter().map(file).collect();
    format!(
        "{} {} {device} {ctx} {}",
        env!("CARGO_PKG_VERSION"),
        ggml::ggml_version(),
        files.join(" ")
    )
}

/// Whether a budget of a GPU's memory holds what of a model has to be there. How much more it takes is known when it
/// is loaded.
fn fits_gpu(file: &gguf::Model, vram_bytes: Option<u64>) -> Result<(), EngineError> {
    let experts = gguf::Experts::group(file).map_err(|error| of(error.into()))?;
    let dense_bytes = file.tensor_bytes() - experts.expert_bytes();
    match vram_bytes {
        Some(vram_bytes) if vram_bytes < dense_bytes => {
            Err(of(Error::Vram { vram_bytes, least_bytes: dense_bytes.next_multiple_of(1 << 20) }))
        }
        _ => Ok(()),
    }
}

fn on_gpu(options: &Options) -> bool {
    !matches!(options.placement, Placement::Cpu)
}

fn tell(name: &str, (ram_bytes, vram_bytes): (u64, u64), took: Duration, notes: &[String]) {
    let memory = match (Bytes(ram_bytes), Bytes(vram_bytes)) {
        (ram, Bytes(0)) => format!("{ram} of memory"),
        (Bytes(0), vram) => format!("{vram} of the GPU's memory"),
        (ram, vram) => format!("{vram} of the GPU's memory, {ram} below it"),
    };
    output::note(format!("loaded {name} in {:.1} s: {memory}", took.as_secs_f64()));
    notes.iter().for_each(output::note);
}

/// With the hint, which a client's user needs as much.
fn of(error: Error) -> EngineError {
    let text = match error.hint() {
        Some(hint) => format!("{error} (hint: {hint})"),
        None => error.to_string(),
    };
    match error {
        Error::Ram { .. }
        | Error::RamBelow { .. }
        | Error::Vram { .. }
        | Error::VramTaken { .. } => EngineError::NoRoom(text),
        Error::Engine(ggml::Error::Cancelled) => EngineError::Cancelled,
        _ => EngineError::Failed(text),
    }
}

fn counters(model: &Model, stalls: Option<&ggml::Stalls>) -> Counters {
    let experts = model.expert_counters();
    let (pool, filled) = model.pool_bytes();
    let (below, below_filled) = model.pool_below_bytes().unwrap_or_default();
    let on_gpu = model.gpu().is_some();
    let reads = model.reader().map(|reader| reader.stats()).unwrap_or_default();
    let read = experts.faults.saturating_sub(experts.ram_hits);
    Counters {
        from_vram: if on_gpu { experts.hits } else { 0 },
        from_ram: if on_gpu { experts.ram_hits } else { experts.hits },
        from_drive: read,
        evictions: experts.evictions,
        bytes_read: experts.bytes_read,
        drive_bytes: reads.bytes_read,
        gpu_bytes: if on_gpu { experts.bytes_brought } else { 0 },
        vram_pool_bytes: if on_gpu { pool } else { 0 },
        ram_pool_bytes: if on_gpu { below } else { pool },
        vram_filled_bytes: if on_gpu { filled } else { 0 },
        ram_filled_bytes: if on_gpu { below_filled } else { filled },
        expert_bytes: model.expert_bytes(),
        reads_in_flight: reads.in_flight as u64,
        reads: reads.reads,
        waits: stalls.map(ggml::Stalls::counts).unwrap_or_default(),
        waited_seconds: stalls.map_or(0.0, |stalls| stalls.total().as_secs_f64()),
        read_seconds: (reads.latency.p50.as_secs_f64(), reads.latency.p99.as_secs_f64()),
    }
}

fn of_layer(layer: ggml::LayerUse) -> LayerCounters {
    let ggml::LayerUse { block, from_vram, from_ram, from_drive, uses } = layer;
    LayerCounters { block, from_vram, from_ram, from_drive, uses }
}

struct Tokenizer(Model);

impl Text for Tokenizer {
    fn tokenize(&self, text: &str, begin: bool, markup: bool) -> Result<Vec<Token>, EngineError> {
        self.0
            .vocab()
            .tokenize(text, begin, markup)
            .map_err(|error| EngineError::Refused(error.to_string()))
    }

    fn piece(&self, token: Token, markup: bool) -> Vec<u8> {
        let vocab = self.0.vocab();
        if markup { vocab.name(token) } else { vocab.piece(token) }
    }

    fn is_end(&self, token: Token) -> bool {
        self.0.vocab().is_end(token)
    }

    fn bos_eos(&self) -> (String, String) {
        let vocab = self.0.vocab();
        let name = |token: Option<Token>| {
            let bytes = token.map(|token| vocab.name(token)).unwrap_or_default();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        (name(vocab.bos()), name(vocab.eos()))
    }

    fn len(&self) -> usize {
        self.0.vocab().len() as usize
    }
}

struct Computing {
    engine: tierstream::Engine,
    limits: Limits,
    traces: Option<Traces>,
}

impl Computing {
    fn context(&mut self) -> &mut Context {
        self.engine.context()
    }

    /// A sequence has other tokens now than what was computed of it.
    fn other_tokens(&mut self, at: usize) {
        if let Some(traces) = &mut self.traces {
            traces.other_tokens(at);
        }
    }
}

fn sequence(sequence: usize) -> u32 {
    u32::try_from(sequence).expect("as few as the flags allow")
}

impl Compute for Computing {
    fn limits(&self) -> Limits {
        self.limits
    }

    fn step(&mut self, entries: &[Entry]) -> Result<(), EngineError> {
        let entry = |e: &Entry| ggml::Entry {
            token: e.token,
            sequence: sequence(e.sequence),
            keep: e.keep,
        };
        let entries: Vec<_> = entries.iter().map(entry).collect();
        self.context().step(&entries).map_err(|error| of(error.into()))?;
        let routing = self.context().take_routing();
        if let Some(traces) = &mut self.traces
            && !traces.add(&entries, routing)
        {
            self.traces = None;
            let _ = self.context().record_routing(false);
        }
        Ok(())
    }

    fn embed(&mut self, at: usize, tokens: &[Token]) -> Result<Vec<f32>, EngineError> {
        let row = self.context().embed(sequence(at), tokens).map_err(|error| of(error.into()));
        // Texts that are embedded are not what a model is traced for.
        let _ = self.context().take_routing();
        row
    }

    fn logits(&mut self, row: usize) -> &[f32] {
        self.context().logits(row)
    }

    fn len(&mut self, at: usize) -> usize {
        self.context().len(sequence(at)) as usize
    }

    fn cut(&mut self, at: usize, len: usize) -> bool {
        self.other_tokens(at);
        self.context().cut(sequence(at), u32::try_from(len).unwrap_or(u32::MAX))
    }

    fn saved_bytes(&mut self, at: usize) -> usize {
        self.context().saved_bytes(sequence(at))
    }

    fn save(&mut self, at: usize) -> Option<Vec<u8>> {
        self.context().save(sequence(at))
    }

    fn restore(&mut self, at: usize, state: &[u8], len: usize) -> bool {
        self.other_tokens(at);
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        self.context().restore(sequence(at), state, len).is_ok()
    }

    fn rest(&mut self) {
        self.context().rest();
    }

    fn sampler(&self, sampling: &Sampling) -> Box<dyn Sample> {
        Box::new(Drawing(Sampler::new(preset::sampling(sampling))))
    }

    fn stopper(&self) -> Arc<dyn Fn(bool) + Send + Sync> {
        let cancel = self.engine.cancel_handle();
        Arc::new(move |on| if on { cancel.cancel() } else { cancel.reset() })
    }
}

struct Drawing(Sampler);

impl Sample for Drawing {
    fn accept(&mut self, tokens: &[Token]) {
        self.0.accept(tokens);
    }

    fn sample(&mut self, logits: &[f32]) -> Option<Token> {
        self.0.sample_row(logits)
    }
}

// The buckets of the one are those of the other.
const _: () = {
    let (ours, theirs) = (ggml::STALL_BOUNDS, WAIT_BOUNDS);
    assert!(ours.len() == theirs.len());
    let mut at = 0;
    while at < ours.len() {
        assert!(ours[at].as_nanos() as f64 == theirs[at] * 1e9);
        at += 1;
    }
};

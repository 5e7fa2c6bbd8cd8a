//! Conversations with a model: KV cache, compute buffers, threads.

use std::ffi::c_void;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::abi::*;
use crate::cancel::Cancel;
use crate::control::Manner;
use crate::embedding::Embeds;
use crate::error::{Error, Result};
use crate::gpu::{Execution, Miss, disturbing};
use crate::log;
use crate::memory::give_back_freed_memory;
use crate::model::Model;
use crate::prefetch::Prefetch;
use crate::proxy::proc_of;
use crate::recorder::{BatchRouting, Recorder, TokenAt};
use crate::replay::Replay;
use crate::stalls::Stalls;
use crate::vocab::Token;
use crate::workspace::Needs;

/// Sizes and threads of a context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ContextOptions {
    /// Tokens of each sequence that the KV cache holds.
    pub n_ctx: u32,
    /// Sequences: conversations that know nothing of each other, and can be computed together.
    pub n_seq: u32,
    /// Tokens of a batch that is computed at once; longer ones are cut.
    pub n_batch: u32,
    /// Compute threads.
    pub n_threads: u32,
    /// The rows of logits that a decode may keep. Those of every token take compute buffers for
    /// as many rows of the vocabulary as a batch has tokens.
    pub keep: Keep,
    /// Whether records of streamed models are read before they are asked for.
    pub prefetch: Prefetch,
    /// What is done with experts that are in the pool in host memory and not in the GPU's. Without
    /// that pool, and without a GPU, they are brought to where it computes.
    pub miss: Miss,
    /// How single tokens are computed on a GPU.
    pub execution: Execution,
}

impl ContextOptions {
    /// Whether single tokens may be computed as a whole: by [`Execution::Auto`], if nothing is read ahead
    /// and all misses are copied.
    pub fn may_compute_as_a_whole(&self) -> bool {
        let (prefetch, miss) = (self.prefetch, self.miss);
        self.execution == Execution::Auto && prefetch == Prefetch::Off && miss == Miss::Copy
    }
}

impl Default for ContextOptions {
    fn default() -> Self {
        Self {
            n_ctx: 4096,
            n_seq: 1,
            n_batch: 512,
            n_threads: 1,
            keep: Keep::All,
            prefetch: Prefetch::default(),
            miss: Miss::default(),
            execution: Execution::default(),
        }
    }
}

/// Largest context, tokens: above any trained one, and far below what overflows llama.cpp's 32-bit
/// positions. Its books alone take some 44 bytes a token, before it asks for the KV cache.
const N_CTX_MAX: u32 = 1 << 24;

/// `LLAMA_MAX_SEQ` (llama-cparams.h).
const N_SEQ_MAX: u32 = 256;

/// `GGML_MAX_N_THREADS` (ggml.h).
const N_THREADS_MAX: u32 = 512;

/// A token that is appended to a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// The token.
    pub token: Token,
    /// Which sequence, from 0 on.
    pub sequence: u32,
    /// Whether its row of logits is kept.
    pub keep: bool,
}

/// Which rows of logits a decode keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// Of the last token.
    Last,
    /// Of every token.
    All,
}

/// A context of a [`Model`]. One thread at a time uses it; several contexts of one model may
/// decode at the same time and share its pool.
pub struct Context {
    llama: *mut llama_context,
    threadpool: ggml_threadpool_t,
    cancel: Cancel,
    n_vocab: usize,
    rows: usize,
    /// Tokens of each sequence.
    positions: Vec<u32>,
    options: ContextOptions,
    pub(crate) embeds: Embeds,
    /// Of the graphs that llama.cpp reserved; none without our device.
    needs: Needs,
    /// Of llama.cpp's compute buffer.
    compute_bytes: u64,
    /// Of what was computed since it was taken, if it is recorded.
    routing: Result<Vec<BatchRouting>>,
    model: Model,
}

// SAFETY: llama.cpp's contexts have no ties to a thread; `&mut self` keeps it to one at a time.
unsafe impl Send for Context {}

impl std::fmt::Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Context")
            .field("options", &self.options)
            .field("positions", &self.positions)
            .finish_non_exhaustive()
    }
}

impl Context {
    /// Allocates a KV cache and compute buffers. Where a GPU's memory does not suffice, the expert
    /// pool of the model gives way to them; it grows again, as far as it can, when the context is
    /// gone and others compute.
    ///
    /// # Errors
    /// [`Error::Context`] with llama.cpp's reason, [`Error::SelfCheck`]; [`Error::OnlyOnGpu`] of a
    /// model whose experts the processor cannot compute, with [`Miss::Compute`].
    pub fn new(model: Model, options: &ContextOptions) -> Result<Context> {
        let failed = |reason| Error::Context { n_ctx: options.n_ctx, reason };
        let sizes = [options.n_ctx, options.n_seq, options.n_batch, options.n_threads];
        if sizes.contains(&0) {
            return Err(failed("context, sequences, batch and threads must be at least 1".into()));
        }
        let threads = i32::try_from(options.n_threads).unwrap_or(i32::MAX);
        let n_ctx = n_ctx_in_all(options);
        if n_ctx > N_CTX_MAX || options.n_seq > N_SEQ_MAX || options.n_threads > N_THREADS_MAX {
            return Err(failed(format!(
                "the most are {N_CTX_MAX} tokens in {N_SEQ_MAX} sequences, and {N_THREADS_MAX} threads"
            )));
        }
        let cancel = Cancel::default();
        let embeds = Embeds::of(&model);
        let options = &match embeds {
            // A text is read at once.
            Embeds::Whole => ContextOptions { n_batch: options.n_ctx, keep: Keep::All, ..*options },
            Embeds::Last => *options,
        };
        // SAFETY: a plain struct of defaults.
        let mut params = unsafe { llama_context_default_params() };
        params.n_ctx = n_ctx;
        params.n_batch = options.n_batch.min(options.n_ctx).max(options.n_seq);
        params.n_ubatch = params.n_batch;
        params.n_threads = threads;
        params.n_threads_batch = threads;
        params.n_seq_max = options.n_seq;
        // Each sequence has cells of its own: what is computed of one does not depend on the others.
        params.kv_unified = false;
        params.n_outputs_max = match options.keep {
            Keep::Last => options.n_seq,
            Keep::All => params.n_batch,
        };
        params.embeddings = embeds == Embeds::Whole;
        params.op_offload = false;
        params.no_perf = true;
        params.abort_callback = Some(abort);
        params.abort_callback_data = Arc::as_ptr(&cancel.flag).cast_mut().cast();
        // Buffers that are touched in part only would keep what was freed before them resident.
        give_back_freed_memory();
        let make = || {
            log::clear();
            log::take_compute_bytes();
            let ContextOptions { prefetch, miss, .. } = *options;
            let as_a_whole = options.may_compute_as_a_whole();
            let manner = Manner { threads, prefetch, miss, as_a_whole };
            let birth = model.device().map(|device| device.birth(manner));
            // SAFETY: the model is live; the flag lives as long as the context.
            let llama = disturbing(|| unsafe { llama_init_from_model(model.raw(), params) });
            let newborn = model.device().map(|d| d.take_newborn());
            drop(birth);
            (!llama.is_null()).then_some((llama, newborn))
        };
        let Some((llama, newborn)) = model.with_room(make)? else {
            return Err(failed(log::complaints()));
        };
        let mut context = Context {
            llama,
            threadpool: ptr::null_mut(),
            cancel,
            n_vocab: model.vocab().len() as usize,
            rows: 0,
            positions: vec![0; options.n_seq as usize],
            options: *options,
            embeds,
            needs: Needs::default(),
            compute_bytes: log::take_compute_bytes(),
            routing: Ok(Vec::new()),
            model,
        };
        if let Some(mut newborn) = newborn {
            match (newborn.pop(), newborn.is_empty()) {
                (Some(control), true) => context.cancel.control = Some(control),
                _ => {
                    return Err(Error::SelfCheck("a context has one backend on our device".into()));
                }
            }
        }
        context.attach_threads(threads)?;
        if let Some(control) = &context.cancel.control {
            let needs = control.take_needs();
            if context.compute_bytes == 0 {
                return Err(Error::SelfCheck(
                    "llama.cpp tells no size of its compute buffer".into(),
                ));
            }
            let on_host = context.model.device().is_some_and(|d| !d.on_gpu());
            if on_host && !context.model.is_rehearsal() {
                control.reserve(&needs.workspace)?;
            }
            context.needs = needs;
        }
        match context.only_on_gpu() {
            Some((layer, reason)) if options.miss == Miss::Compute => {
                Err(Error::OnlyOnGpu { layer, reason })
            }
            _ => Ok(context),
        }
    }

    /// Gives the CPU backend one pool of threads for good. Without it, ggml starts a new set for
    /// every graph, and so for every segment of ours.
    fn attach_threads(&mut self, threads: i32) -> Result<()> {
        // SAFETY: plain parameters; ggml returns null or a pool that we free.
        unsafe {
            let mut params = ggml_threadpool_params_default(threads);
            self.threadpool = ggml_threadpool_new(&raw mut params);
        }
        if self.threadpool.is_null() {
            return Err(Error::OutOfMemory { bytes: 0, what: "compute threads" });
        }
        // SAFETY: both are live; the pool outlives the context (see `drop`).
        unsafe { llama_attach_threadpool(self.llama, self.threadpool, self.threadpool) };
        let Some(control) = &self.cancel.control else { return Ok(()) };
        control.set_threadpool(self.threadpool);
        let inner = control.inner();
        if let Some(f) = proc_of(inner, c"ggml_backend_cpu_set_threadpool") {
            type Set = extern "C" fn(ggml_backend_t, ggml_threadpool_t);
            // SAFETY: ggml-cpu gives this name this type.
            let set: Set = unsafe { std::mem::transmute(f) };
            set(inner, self.threadpool);
        }
        Ok(())
    }

    /// Appends `tokens` to sequence 0 and computes them, in batches of [`ContextOptions::n_batch`].
    /// `row` is called with (index in `tokens`, logits) for every row that is kept.
    ///
    /// # Errors
    /// As [`Context::step`]. After an error the sequence holds the batches before the failed one, or
    /// nothing where the model's memory cannot be cut; [`Context::position`] tells.
    pub fn decode(
        &mut self,
        tokens: &[Token],
        keep: Keep,
        mut row: impl FnMut(usize, &[f32]),
    ) -> Result<()> {
        let last = tokens.len().saturating_sub(1);
        let entry = |(index, &token)| {
            let keep = keep == Keep::All || index == last;
            Entry { token, sequence: 0, keep }
        };
        let entries: Vec<Entry> = tokens.iter().enumerate().map(entry).collect();
        self.check_writes()?;
        self.check(&entries)?;
        let mut done = 0;
        for batch in entries.chunks(self.batch_size()) {
            self.compute(batch)?;
            let first = match keep {
                Keep::All => done,
                Keep::Last => last,
            };
            for index in 0..self.rows {
                row(first + index, self.logits(index));
            }
            done += batch.len();
        }
        self.model.copy_weights();
        Ok(())
    }

    /// Appends tokens to sequences and computes them at once, at most [`Context::batch_size`]. The rows
    /// that are kept are in the order of the entries.
    ///
    /// # Errors
    /// [`Error::Batch`] when a sequence is full, or there is none of this number, a token is none of the
    /// model's, or more rows are to be kept than [`ContextOptions::keep`] says (one for each sequence);
    /// [`Error::Rehearsal`] of a model without weights;
    /// [`Error::Io`] when records could not be read, or weights have changed, [`Error::Cancelled`], [`Error::Decode`],
    /// [`Error::NotANumber`] when a kept row holds a NaN or no finite value at all.
    /// After an error the sequences are as they were before, or empty where the model's memory cannot be
    /// cut; [`Context::len`] tells.
    pub fn step(&mut self, entries: &[Entry]) -> Result<()> {
        self.check_writes()?;
        self.check(entries)?;
        if entries.len() > self.batch_size() {
            let (n, most) = (entries.len(), self.batch_size());
            return Err(Error::Batch(format!("{n} tokens are more than a batch of {most}")));
        }
        self.compute(entries)?;
        self.model.copy_weights();
        Ok(())
    }

    /// Most tokens of a [`Context::step`].
    pub fn batch_size(&self) -> usize {
        self.options.n_batch.min(self.options.n_ctx).max(self.options.n_seq) as usize
    }

    fn check_writes(&self) -> Result<()> {
        match self.is_encoder() {
            true => {
                Err(Error::Batch("this model reads texts, for embeddings, and writes none".into()))
            }
            false => Ok(()),
        }
    }

    pub(crate) fn check(&self, entries: &[Entry]) -> Result<()> {
        if self.model.is_rehearsal() {
            return Err(Error::Rehearsal);
        }
        if entries.is_empty() {
            return Err(Error::Batch("no tokens to decode".into()));
        }
        let mut added = vec![0usize; self.positions.len()];
        let mut kept = added.clone();
        for entry in entries {
            let (token, sequence) = (entry.token, entry.sequence as usize);
            if usize::try_from(token).map_or(true, |t| t >= self.n_vocab) {
                let n = self.n_vocab;
                return Err(Error::Batch(format!("token {token} is none of the model's {n}")));
            }
            let Some(added) = added.get_mut(sequence) else {
                let n = self.positions.len();
                return Err(Error::Batch(format!("sequence {sequence} is none of the {n}")));
            };
            *added += 1;
            kept[sequence] += usize::from(entry.keep);
        }
        let n_ctx = self.options.n_ctx;
        for (added, position) in added.iter().zip(&self.positions) {
            let room = n_ctx.saturating_sub(*position);
            if *added > room as usize {
                return Err(Error::Batch(format!(
                    "{added} tokens do not fit the {room} free ones of a context of {n_ctx}"
                )));
            }
        }
        if self.options.keep == Keep::Last && kept.iter().any(|&kept| kept > 1) {
            return Err(Error::Batch("this context keeps the last row of logits only".into()));
        }
        Ok(())
    }

    /// Computes a batch that was checked.
    pub(crate) fn compute(&mut self, entries: &[Entry]) -> Result<()> {
        // Before, so that what is lost is not computed with; and after, so that nobody gets what was.
        self.model.check_weights()?;
        let before = self.positions.clone();
        match self.decode_batch(entries) {
            // The executor computes layer by layer from now on.
            Err(Error::GateGivenUp { .. }) if self.positions == before => {
                self.decode_batch(entries)?;
            }
            computed => computed?,
        }
        self.model.check_weights()
    }

    fn decode_batch(&mut self, entries: &[Entry]) -> Result<()> {
        let n = i32::try_from(entries.len()).expect("a batch is smaller than a context");
        let mut next = self.positions.clone();
        let mut position_of = |entry: &Entry| {
            let position = &mut next[entry.sequence as usize];
            *position += 1;
            i32::try_from(*position - 1).expect("a context is smaller than i32")
        };
        let mut ids: Vec<llama_token> = entries.iter().map(|entry| entry.token).collect();
        let mut positions: Vec<llama_pos> = entries.iter().map(&mut position_of).collect();
        let mut counts = vec![1i32; entries.len()];
        let mut sequence_ids: Vec<llama_seq_id> =
            (0..self.options.n_seq).map(|id| id.cast_signed()).collect();
        let mut sequences: Vec<*mut llama_seq_id> =
            entries.iter().map(|entry| &raw mut sequence_ids[entry.sequence as usize]).collect();
        let mut kept: Vec<i8> = entries.iter().map(|entry| i8::from(entry.keep)).collect();
        self.rows = kept.iter().filter(|&&k| k != 0).count();
        let batch = llama_batch {
            n_tokens: n,
            token: ids.as_mut_ptr(),
            embd: ptr::null_mut(),
            pos: positions.as_mut_ptr(),
            n_seq_id: counts.as_mut_ptr(),
            seq_id: sequences.as_mut_ptr(),
            logits: kept.as_mut_ptr(),
        };
        log::clear();
        self.recorder().inspect(|recorder| recorder.forget());
        // SAFETY: a live context; the batch's arrays have `n` entries and outlive the call.
        let status = unsafe { llama_decode(self.llama, batch) };
        let error = self.cancel.control.as_ref().and_then(|c| c.take_error());
        let mut broken = false;
        if status == 0 && error.is_none() {
            broken = !(0..self.rows).all(|index| is_numbers(self.logits(index)));
            if !broken {
                self.keep_routing(entries, &positions);
                self.positions = next;
                return Ok(());
            }
        }
        self.rows = 0;
        for entry in entries {
            // Part of the batch may be in a state that cannot be taken back.
            let was = self.positions[entry.sequence as usize];
            if !self.cut(entry.sequence, was) {
                self.cut(entry.sequence, 0);
            }
        }
        Err(match (error, status) {
            (Some(error), _) => error,
            (None, _) if broken => Error::NotANumber { path: self.model.path().to_owned() },
            (None, 2) => Error::Cancelled,
            (None, 1) => Error::Batch("the KV cache has no room for this batch".into()),
            (None, status) => Error::Decode { status, reason: log::complaints() },
        })
    }

    /// Adds the routing of a batch that was computed, if it is recorded. What goes wrong with it is told to
    /// who takes it.
    fn keep_routing(&mut self, entries: &[Entry], positions: &[llama_pos]) {
        let Some(recorder) = self.recorder() else { return };
        let at = |(&entry, &position): (&Entry, &llama_pos)| TokenAt {
            entry,
            position: position.cast_unsigned(),
        };
        let tokens: Vec<TokenAt> = entries.iter().zip(positions).map(at).collect();
        match (recorder.take(&tokens, self.batch_size()), &mut self.routing) {
            (Ok(batches), Ok(routing)) => routing.extend(batches),
            (Ok(_), Err(_)) => {}
            (Err(error), routing) => *routing = Err(error),
        }
    }

    /// What records routing, if it does.
    fn recorder(&self) -> Option<&Recorder> {
        let recorder = &self.cancel.control.as_ref()?.recorder;
        recorder.is_on().then_some(recorder)
    }

    /// Has the routing of all tokens recorded from now on, or not any more, and forgets what was.
    ///
    /// # Errors
    /// [`Error::NoPool`] of a model whose experts are not in a pool, so that nobody looks where tokens are
    /// routed to.
    pub fn record_routing(&mut self, on: bool) -> Result<()> {
        self.routing = Ok(Vec::new());
        if on && self.model.pool_share().is_none() {
            return Err(Error::NoPool);
        }
        if let Some(control) = &self.cancel.control {
            control.recorder.turn(on);
        }
        Ok(())
    }

    /// The routing of all batches since it was taken, or recorded, first. It takes memory until then.
    ///
    /// # Errors
    /// [`Error::SelfCheck`] if it could not be told of which tokens something was: llama.cpp cuts batches
    /// otherwise than expected. What was computed is right all the same.
    pub fn take_routing(&mut self) -> Result<Vec<BatchRouting>> {
        std::mem::replace(&mut self.routing, Ok(Vec::new()))
    }

    /// Row `index` of the kept logits of the last batch, one value per token id.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn logits(&self, index: usize) -> &[f32] {
        assert!(index < self.rows, "row {index} of {}", self.rows);
        // SAFETY: llama.cpp holds `rows` rows of `n_vocab` floats until the next decode, which
        // needs `&mut self`.
        unsafe {
            let all = llama_get_logits(self.llama);
            std::slice::from_raw_parts(all.add(index * self.n_vocab), self.n_vocab)
        }
    }

    /// Whether the last decode left logits to sample from.
    pub fn has_logits(&self) -> bool {
        self.rows > 0
    }

    /// Tokens of sequence 0.
    pub fn position(&self) -> u32 {
        self.positions[0]
    }

    /// Tokens of a sequence.
    ///
    /// # Panics
    /// If there is no such sequence.
    pub fn len(&self, sequence: u32) -> u32 {
        self.positions[sequence as usize]
    }

    /// Forgets all tokens of all sequences.
    pub fn clear(&mut self) {
        // SAFETY: a live context.
        unsafe { llama_memory_clear(llama_get_memory(self.llama), true) };
        self.positions.fill(0);
        self.rows = 0;
    }

    /// Forgets the tokens of sequence 0 from `position` on: see [`Context::cut`].
    pub fn forget_from(&mut self, position: u32) -> bool {
        self.cut(0, position)
    }

    /// Forgets the tokens of a sequence from `position` on. Returns false, and forgets nothing, where the
    /// model's memory cannot be cut there (recurrent models, anywhere but at 0).
    ///
    /// # Panics
    /// If there is no such sequence.
    pub fn cut(&mut self, sequence: u32, position: u32) -> bool {
        let from = i32::try_from(position).unwrap_or(i32::MAX);
        let held = &mut self.positions[sequence as usize];
        // SAFETY: a live context, one of its sequences; -1 is "to the end".
        let cut = unsafe {
            llama_memory_seq_rm(llama_get_memory(self.llama), sequence.cast_signed(), from, -1)
        };
        if cut {
            *held = (*held).min(position);
            self.rows = 0;
        }
        cut
    }

    /// A sequence has other tokens now, so many.
    pub(crate) fn restored(&mut self, sequence: u32, len: u32) {
        self.positions[sequence as usize] = len;
        self.rows = 0;
    }

    /// A handle that stops this context from another thread.
    pub fn cancel_handle(&self) -> Cancel {
        self.cancel.clone()
    }

    /// Time that computing has waited for expert records, since the context was made.
    pub fn stall(&self) -> Duration {
        self.stalls().map_or(Duration::ZERO, |stalls| stalls.total())
    }

    /// The same, wait by wait, for other threads to look at; none without our device.
    pub fn stalls(&self) -> Option<Arc<Stalls>> {
        Some(self.cancel.control.as_ref()?.stalls.clone())
    }

    /// Tokens that the GPU has computed as a whole, without anybody waiting for their routing.
    pub fn whole_tokens(&self) -> u64 {
        let control = self.cancel.control.as_ref();
        control.map_or(0, |control| control.whole_tokens.load(Ordering::Relaxed))
    }

    /// The first block whose experts only the GPU can compute, and why; with [`Miss::Auto`] they are
    /// copied there. Not known with [`Miss::Copy`].
    pub fn only_on_gpu(&self) -> Option<(u32, String)> {
        let (layer, why) = self.cancel.control.as_ref()?.only_on_gpu()?;
        Some((self.model.block_of(layer), why))
    }

    /// Gives single tokens the routing of `replay` from now on, the first one first, or the router's
    /// own again. Only where experts are streamed, and not all resident in order; on a GPU. No router
    /// is asked what comes next meanwhile.
    pub fn replay(&mut self, replay: Option<Replay>) {
        if let Some(control) = &self.cancel.control {
            control.set_replay(replay.map(Arc::new));
        }
    }

    /// Blocks for which nothing is read ahead by [`Prefetch::Lookahead`] or [`Prefetch::Auto`], because
    /// their router cannot be asked, and why.
    pub fn unguessed_blocks(&self) -> Vec<(u32, &'static str)> {
        let Some(control) = &self.cancel.control else { return Vec::new() };
        let block = |layer| self.model.block(layer).unwrap_or(u32::MAX);
        control.unguessed().into_iter().map(|(layer, why)| (block(layer), why)).collect()
    }

    /// Puts the compute threads to sleep until the next decode. They spin for a while otherwise,
    /// which takes processors from another context that works in turns with this one.
    pub fn rest(&mut self) {
        // SAFETY: a live pool; ggml resumes it when it computes again.
        unsafe { ggml_threadpool_pause(self.threadpool) };
    }

    /// Bytes that this context has for computing, none of which are resident before it does:
    /// compute buffers, gathered rows, ggml's work buffer, and the rows of logits after the first.
    /// (Of a model that is not streamed, only what llama.cpp tells of.) KV cache and the like are
    /// resident from the start.
    pub fn compute_bytes(&self) -> u64 {
        let rows = match self.options.keep {
            Keep::Last => u64::from(self.options.n_seq - 1),
            Keep::All => self.batch_size() as u64,
        };
        let logits = rows * self.n_vocab as u64 * size_of::<f32>() as u64;
        self.compute_bytes + self.needs.workspace.bytes() as u64 + logits
    }

    /// What the model keeps of its tokens (KV cache), bytes; 0 for models that are not streamed,
    /// whose graphs nobody shows us.
    pub fn state_bytes(&self) -> u64 {
        self.needs.state_bytes() as u64
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Sizes and threads.
    pub fn options(&self) -> &ContextOptions {
        &self.options
    }

    pub(crate) fn raw(&self) -> *mut llama_context {
        self.llama
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: ours, freed once; the backends use the thread pool until they are gone.
        unsafe {
            disturbing(|| llama_free(self.llama));
            if !self.threadpool.is_null() {
                ggml_threadpool_free(self.threadpool);
            }
        }
    }
}

/// Tokens of all sequences, as llama.cpp makes room for them: it rounds what each has.
fn n_ctx_in_all(options: &ContextOptions) -> u32 {
    match options.n_seq {
        1 => options.n_ctx,
        n => (options.n_ctx.saturating_add(255) / 256 * 256).saturating_mul(n),
    }
}

/// Whether something can be sampled from a row: no NaN, and not infinite everywhere.
fn is_numbers(row: &[f32]) -> bool {
    // Without branches, so that it is compiled to vector instructions.
    let (nan, finite) = row.iter().fold((0u32, 0u32), |(nan, finite), x| {
        (nan | u32::from(x.is_nan()), finite | u32::from(x.is_finite()))
    });
    nan == 0 && (finite != 0 || row.is_empty())
}

unsafe extern "C" fn abort(flag: *mut c_void) -> bool {
    // SAFETY: the context's own flag, which it keeps alive.
    contain(true, || unsafe { (*flag.cast::<AtomicBool>()).load(Ordering::Acquire) })
}

#[cfg(test)]
mod tests {
    use super::is_numbers;

    #[test]
    fn rows_that_cannot_be_sampled_from() {
        let (inf, nan) = (f32::INFINITY, f32::NAN);
        assert!(is_numbers(&[]) && is_numbers(&[0.0, -1e30]) && is_numbers(&[-inf, 3.0, inf]));
        assert!(!is_numbers(&[-inf, inf]) && !is_numbers(&[-nan]));
        for at in [0, 1, 77, 1000] {
            let mut row = vec![1.0; 1001];
            assert!(is_numbers(&row));
            row[at] = nan;
            assert!(!is_numbers(&row), "{at}");
        }
    }
}

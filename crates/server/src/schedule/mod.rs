//! Several requests on one model: a thread that owns it, sequences that they take, a queue for the others, in which
//! peers take turns.
//!
//! A step is either a part of one prompt, or a token for each of the sequences that generate. The two take
//! turns, so that a long prompt does not hold up those that generate for longer than a batch takes.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use crate::active::{Active, Then};
use crate::engine::{Compute, EngineError, Entry, Text, Token};
use crate::error::{ApiError, ApiResult};
use crate::job::{Event, Job};
use crate::metrics::Metrics;
use crate::peers::Peer;
use crate::prompts::PromptsOf;

mod place;
mod turns;

use self::turns::Turns;

/// The way to a model's thread.
pub(crate) struct Scheduler {
    shared: Arc<Shared>,
    prompts: PromptsOf,
    thread: Mutex<Option<std::thread::JoinHandle<()>>>,
}

struct Shared {
    queue: Mutex<Queue>,
    arrived: Condvar,
    sequences: usize,
    most_queued: usize,
    /// Whether each of the requests that the running step computes is still wanted.
    running: Mutex<Vec<Arc<AtomicBool>>>,
    prompt_tokens: AtomicU64,
    written_tokens: AtomicU64,
    stop: Arc<dyn Fn(bool) + Send + Sync>,
}

#[derive(Default)]
struct Queue {
    jobs: Turns<Job>,
    /// Requests that have a sequence.
    active: usize,
    is_closed: bool,
    has_ended: bool,
}

/// What comes of a request. Who drops it ends the request, and the reads that are made for it alone.
pub(crate) struct Answer {
    events: mpsc::UnboundedReceiver<Event>,
    computing: mpsc::WeakUnboundedSender<Event>,
    wanted: Arc<AtomicBool>,
    shared: Arc<Shared>,
}

impl Answer {
    /// What comes next; none after the last event.
    pub(crate) async fn next(&mut self) -> Option<Event> {
        self.events.recv().await
    }

    /// Nobody has it any more when all is computed.
    pub(crate) fn computing(&self) -> mpsc::WeakUnboundedSender<Event> {
        self.computing.clone()
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.wanted.store(false, Ordering::Release);
        let running = lock(&self.shared.running);
        if running.iter().any(|wanted| Arc::ptr_eq(wanted, &self.wanted))
            && running.iter().all(|wanted| !wanted.load(Ordering::Acquire))
        {
            (self.shared.stop)(true);
        }
    }
}

impl Scheduler {
    pub(crate) fn new(
        compute: Box<dyn Compute>,
        text: Arc<dyn Text>,
        metrics: Arc<Metrics>,
        prompts: PromptsOf,
        most_queued: usize,
    ) -> Self {
        let shared = Arc::new(Shared {
            queue: Mutex::default(),
            arrived: Condvar::new(),
            sequences: compute.limits().sequences,
            most_queued,
            running: Mutex::default(),
            prompt_tokens: AtomicU64::new(0),
            written_tokens: AtomicU64::new(0),
            stop: compute.stopper(),
        });
        let slots = (0..compute.limits().sequences).map(|_| Slot::default()).collect();
        let shared_too = shared.clone();
        let worker = Worker {
            _ends: Ends(shared.clone()),
            compute,
            text,
            metrics,
            prompts: prompts.clone(),
            slots,
            shared: shared_too,
            turn: 0,
            clock: 0,
        };
        let thread = std::thread::Builder::new().name("model".into()).spawn(|| worker.run());
        Self { shared, prompts, thread: Mutex::new(thread.ok()) }
    }

    /// Has memory hold what files have of a prompt that is about to be submitted. Reads them.
    pub(crate) fn bring(&self, prompt: &[Token]) {
        self.prompts.bring(prompt);
    }

    /// Has a request of a peer computed.
    ///
    /// # Errors
    /// The queue is full, half of it is the peer's already, or the model has ended; no request is made then.
    pub(crate) fn submit(
        &self,
        peer: Peer,
        make: impl FnOnce(mpsc::UnboundedSender<Event>) -> Job,
    ) -> ApiResult<Answer> {
        let mut queue = lock(&self.shared.queue);
        queue.jobs.retain(Job::is_wanted);
        let Shared { sequences, most_queued, .. } = *self.shared;
        let free = sequences.saturating_sub(queue.active);
        let is_full = queue.active + queue.jobs.len() >= sequences + most_queued
            || queue.jobs.len_of(peer) >= free + most_queued.div_ceil(2);
        if queue.is_closed {
            return Err(ApiError::stopped());
        }
        if is_full {
            return Err(ApiError::busy());
        }
        let (sender, events) = mpsc::unbounded_channel();
        let computing = sender.downgrade();
        let job = make(sender);
        let wanted = job.wanted.clone();
        queue.jobs.push(peer, job);
        self.shared.arrived.notify_one();
        Ok(Answer { events, computing, wanted, shared: self.shared.clone() })
    }

    /// Requests that have a sequence, and those that wait for one.
    pub(crate) fn requests(&self) -> (usize, usize) {
        let queue = lock(&self.shared.queue);
        (queue.active, queue.jobs.iter().filter(|job| job.is_wanted()).count())
    }

    /// Tokens of prompts that were computed, and tokens that were written.
    pub(crate) fn tokens(&self) -> (u64, u64) {
        let Shared { prompt_tokens, written_tokens, .. } = &*self.shared;
        (prompt_tokens.load(Ordering::Relaxed), written_tokens.load(Ordering::Relaxed))
    }

    /// Whether its thread is gone, and takes no request any more.
    pub(crate) fn has_ended(&self) -> bool {
        lock(&self.shared.queue).has_ended
    }

    /// Ends what runs, and the thread; the model's memory is free afterwards.
    pub(crate) fn close(&self) {
        {
            // With the lock, so that a step that ends now does not take it back.
            let _running = lock(&self.shared.running);
            lock(&self.shared.queue).is_closed = true;
            (self.shared.stop)(true);
        }
        self.shared.arrived.notify_one();
        if let Some(thread) = lock(&self.thread).take() {
            drop(thread.join());
        }
    }
}

impl Drop for Scheduler {
    fn drop(&mut self) {
        self.close();
    }
}

/// Says so when the thread ends, by a panic too: then those who wait hear of it, and the model is loaded again for
/// the next one.
struct Ends(Arc<Shared>);

impl Drop for Ends {
    fn drop(&mut self) {
        let mut queue = lock(&self.0.queue);
        queue.is_closed = true;
        queue.has_ended = true;
        queue.active = 0;
        queue.jobs = Turns::default();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A sequence, with what it holds, also after its request has ended: the next one may begin the same.
#[derive(Default)]
struct Slot {
    held: Vec<Token>,
    active: Option<Active>,
    used: u64,
    /// Its last request was for text.
    writes: bool,
}

struct Worker {
    /// Before all else goes, so that nobody who hears of the end asks this thread again.
    _ends: Ends,
    compute: Box<dyn Compute>,
    text: Arc<dyn Text>,
    metrics: Arc<Metrics>,
    prompts: PromptsOf,
    slots: Vec<Slot>,
    shared: Arc<Shared>,
    /// The slot whose prompt is looked at first.
    turn: usize,
    clock: u64,
}

impl Worker {
    fn run(mut self) {
        while self.admit() {
            self.read_prompt();
            self.generate();
        }
        for slot in &mut self.slots {
            if let Some(active) = slot.active.take() {
                active.fail(&EngineError::Stopping);
            }
        }
        for job in std::mem::take(&mut lock(&self.shared.queue).jobs).iter() {
            job.tell(Event::Failed(EngineError::Stopping));
        }
        self.keep_all();
    }

    /// Gives sequences to requests, and waits while there are none; false when the model is to go.
    fn admit(&mut self) -> bool {
        for slot in &mut self.slots {
            slot.active.take_if(|active| !active.is_wanted());
        }
        loop {
            let free = self.slots.iter().any(|slot| slot.active.is_none());
            let active = self.slots.iter().filter(|slot| slot.active.is_some()).count();
            let mut queue = lock(&self.shared.queue);
            queue.active = active;
            queue.jobs.retain(Job::is_wanted);
            if queue.is_closed {
                return false;
            }
            match free.then(|| queue.jobs.pop()).flatten() {
                Some(job) => {
                    queue.active += 1;
                    drop(queue);
                    self.begin(job);
                }
                None if active > 0 => return true,
                None => {
                    self.compute.rest();
                    drop(self.shared.arrived.wait(queue).unwrap_or_else(PoisonError::into_inner));
                }
            }
        }
    }

    /// A part of the prompt of one request.
    fn read_prompt(&mut self) {
        let n = self.slots.len();
        let order = (0..n).map(|i| (self.turn + i) % n);
        let reads = |at: &usize| self.slots[*at].active.as_ref().is_some_and(Active::has_prompt);
        let Some(at) = order.into_iter().find(reads) else { return };
        self.turn = at + 1;
        let limits = self.compute.limits();
        let active = self.slots[at].active.as_ref().expect("found with it");
        let part = active.part(limits.batch, limits.is_encoder);
        if part.then == Then::Embed {
            return self.embed(at, &part.tokens);
        }
        let last = part.tokens.len() - 1;
        let entry = |(i, &token)| Entry {
            token,
            sequence: at,
            keep: part.then == Then::Write && i == last,
        };
        let entries: Vec<Entry> = part.tokens.iter().enumerate().map(entry).collect();
        self.step(&[at], &entries);
    }

    /// A token for each request that generates.
    fn generate(&mut self) {
        let next = |(sequence, slot): (usize, &Slot)| {
            let token = slot.active.as_ref()?.next_token()?;
            Some(Entry { token, sequence, keep: true })
        };
        let all: Vec<Entry> = self.slots.iter().enumerate().filter_map(next).collect();
        for entries in all.chunks(self.compute.limits().together.max(1)) {
            let slots: Vec<usize> = entries.iter().map(|entry| entry.sequence).collect();
            if self.step(&slots, entries) {
                continue;
            }
            // Whose fault it was shows when each is computed alone.
            for entry in entries {
                let active = self.slots[entry.sequence].active.as_ref();
                // What the engine has lost of it is read again first.
                if active.and_then(Active::next_token).is_some() {
                    self.step(&[entry.sequence], &[*entry]);
                }
            }
        }
    }

    /// Computes; false where that failed for several, of which none has got an answer then.
    fn step(&mut self, slots: &[usize], entries: &[Entry]) -> bool {
        let Some((result, took)) = self.compute_for(slots, |compute| compute.step(entries)) else {
            return true;
        };
        let Err(error) = result else {
            let mut row = 0;
            for &at in slots {
                let tokens = entries.iter().filter(|entry| entry.sequence == at);
                self.slots[at].held.extend(tokens.clone().map(|entry| entry.token));
                let kept = tokens.clone().any(|entry| entry.keep);
                self.computed(at, tokens.count(), kept.then_some(row), took);
                row += usize::from(kept);
            }
            return true;
        };
        self.failed(slots, &error)
    }

    /// Computes the rest of a prompt, and what the model makes of all of it.
    fn embed(&mut self, at: usize, tokens: &[Token]) {
        let Some((result, took)) = self.compute_for(&[at], |compute| compute.embed(at, tokens))
        else {
            return;
        };
        match result {
            Ok(embedding) => {
                let slot = &mut self.slots[at];
                if !self.compute.limits().is_encoder {
                    slot.held.extend(tokens);
                }
                if let Some(active) = self.release(at) {
                    active.embedded(embedding, took);
                }
            }
            Err(error) => {
                self.failed(&[at], &error);
            }
        }
    }

    /// Runs a computation for these slots, which ends when none of their requests is wanted any more. None if
    /// that is so already.
    fn compute_for<T>(
        &mut self,
        slots: &[usize],
        compute: impl FnOnce(&mut dyn Compute) -> Result<T, EngineError>,
    ) -> Option<(Result<T, EngineError>, Duration)> {
        let wanted: Vec<_> =
            slots.iter().filter_map(|&at| Some(self.slots[at].active.as_ref()?.wanted())).collect();
        {
            // With the lock: who leaves now is seen here, or sees what runs.
            let mut running = lock(&self.shared.running);
            if wanted.len() < slots.len() || wanted.iter().all(|w| !w.load(Ordering::Acquire)) {
                return None; // `admit` takes them away
            }
            *running = wanted;
        }
        let start = Instant::now();
        let result = compute(&mut *self.compute);
        let took = start.elapsed();
        self.metrics.stepped(slots.len());
        let mut running = lock(&self.shared.running);
        running.clear();
        if !lock(&self.shared.queue).is_closed {
            (self.shared.stop)(false);
        }
        Some((result, took))
    }

    /// False where nobody was told, because it may be the fault of one of several.
    fn failed(&mut self, slots: &[usize], error: &EngineError) -> bool {
        slots.iter().for_each(|&at| self.lost(at));
        if matches!(error, EngineError::Cancelled) {
            return true;
        }
        let [at] = *slots else { return false };
        if let Some(active) = self.release(at) {
            active.fail(error);
        }
        true
    }

    /// Takes a request out of its sequence. Its end is told after that: who hears of it may ask again at once, and has
    /// its place.
    fn release(&mut self, at: usize) -> Option<Active> {
        let active = self.slots[at].active.take()?;
        lock(&self.shared.queue).active -= 1;
        Some(active)
    }

    fn computed(&mut self, at: usize, tokens: usize, row: Option<usize>, took: Duration) {
        let slot = &mut self.slots[at];
        let Some(active) = &mut slot.active else { return };
        let room = self.compute.limits().ctx - slot.held.len();
        let row = row.map(|row| self.compute.logits(row));
        let Shared { prompt_tokens, written_tokens, .. } = &*self.shared;
        let count = if active.has_prompt() { prompt_tokens } else { written_tokens };
        count.fetch_add(tokens as u64, Ordering::Relaxed);
        let end = active.computed(tokens, row, room, took, &*self.text);
        if let Some(end) = end
            && let Some(active) = self.release(at)
        {
            active.tell(end);
        }
    }

    /// After a failure the engine may hold less than it did: that is computed again.
    fn lost(&mut self, at: usize) {
        let slot = &mut self.slots[at];
        let len = self.compute.len(at).min(slot.held.len());
        let lost = slot.held.split_off(len);
        if let Some(active) = &mut slot.active {
            active.again(lost);
        }
    }
}

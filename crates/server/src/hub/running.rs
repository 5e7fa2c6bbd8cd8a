//! A model that is loaded: who uses it, until when it stays.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::{Notify, watch};

use crate::catalog::{Found, Header};
use crate::engine::{Compute, Counters, LayerCounters, Limits, Loaded, Rates, Text, Token};
use crate::error::{ApiError, ApiResult};
use crate::grammar::Grammars;
use crate::job::{Event, Job};
use crate::peers::Peer;
use crate::preset::Preset;
use crate::schedule::{Answer, Scheduler};

/// A loaded model.
pub(crate) struct Running {
    pub(crate) found: Found,
    pub(crate) header: Arc<Header>,
    /// What its names make of it.
    presets: Mutex<Vec<Arc<Preset>>>,
    pub(crate) text: Arc<dyn Text>,
    pub(crate) limits: Limits,
    pub(crate) load_time: Duration,
    pub(crate) ram_bytes: u64,
    pub(crate) vram_bytes: u64,
    pub(crate) notes: Vec<String>,
    pub(crate) rates: Rates,
    /// Names this load of it.
    pub(crate) load: u64,
    asked_ctx: Option<u32>,
    counters: Arc<dyn Fn() -> Counters + Send + Sync>,
    layers: Arc<dyn Fn() -> Vec<LayerCounters> + Send + Sync>,
    scheduler: Scheduler,
    holds: AtomicUsize,
    /// Whether it is to go, and takes no more requests.
    retires: watch::Sender<bool>,
    last_use: AtomicU64,
    expiry: Mutex<Expiry>,
    /// Told when it is in no use any more.
    changed: Arc<Notify>,
    /// Last: given up when all else is.
    _place: Place,
}

/// A model's place in memory.
pub(super) struct Place {
    /// How many there are.
    taken: Arc<AtomicUsize>,
    changed: Arc<Notify>,
}

impl Place {
    pub(super) fn new(taken: Arc<AtomicUsize>, changed: Arc<Notify>) -> Self {
        taken.fetch_add(1, Ordering::AcqRel);
        Self { taken, changed }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.taken.fetch_sub(1, Ordering::AcqRel);
        self.changed.notify_waiters();
    }
}

#[derive(Debug, Clone, Copy)]
struct Expiry {
    keep_alive: KeepAlive,
    /// When it was used last, or the time from which that counts.
    since: Instant,
}

/// How a model came to be loaded.
pub(super) struct Load {
    /// Names it among all loads.
    pub(super) id: u64,
    pub(super) time: Duration,
    /// Tokens of context that were asked for, if they were.
    pub(super) asked_ctx: Option<u32>,
}

/// How long a model stays loaded after its last request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeepAlive {
    /// So long.
    For(Duration),
    /// Until another one needs its place.
    Ever,
}

/// A use of a model, which does not go meanwhile.
pub(crate) struct Hold(Arc<Running>);

impl Hold {
    /// How long it stays after that, if the request says so.
    pub(super) fn keep(&self, keep_alive: Option<KeepAlive>) {
        if let Some(keep_alive) = keep_alive {
            self.0.expiry().keep_alive = keep_alive;
        }
    }

    /// The model by one of its names. Blocks: what belongs to a name may have to be read.
    pub(super) fn lease(self, found: &Found, load_time: Duration) -> ApiResult<Lease> {
        let preset = self.0.preset(found)?;
        Ok(Lease { hold: self, preset, load_time })
    }
}

impl Clone for Hold {
    fn clone(&self) -> Self {
        self.0.holds.fetch_add(1, Ordering::AcqRel);
        Self(self.0.clone())
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.0.expiry().since = Instant::now();
        if self.0.holds.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.changed.notify_waiters();
        }
    }
}

/// A model that is in use by one of its names.
#[derive(Clone)]
pub(crate) struct Lease {
    hold: Hold,
    /// By the name that was asked for.
    pub(crate) preset: Arc<Preset>,
    /// Time that loading took, if it was loaded for this.
    pub(crate) load_time: Duration,
}

impl std::ops::Deref for Lease {
    type Target = Running;

    fn deref(&self) -> &Running {
        &self.hold.0
    }
}

/// A model that takes no more requests, until this is dropped.
pub(super) struct Retiring(Arc<Running>);

impl Drop for Retiring {
    fn drop(&mut self) {
        self.0.retires.send_replace(false);
    }
}

impl Lease {
    /// Has a request of a peer computed.
    pub(crate) fn submit(
        &self,
        peer: Peer,
        make: impl FnOnce(UnboundedSender<Event>, Arc<[Token]>) -> Job,
    ) -> ApiResult<Answer> {
        let marks = self.preset.marks.clone();
        self.scheduler.submit(peer, |events| make(events, marks))
    }

    /// Has what was kept of a prompt at hand. Reads files.
    pub(crate) fn bring(&self, prompt: &[Token]) {
        self.scheduler.bring(prompt);
    }

    /// What makes guides for its vocabulary.
    pub(crate) fn grammars(&self) -> ApiResult<&Grammars> {
        self.preset.grammars(&*self.text)
    }
}

/// Names that are remembered of a model.
const PRESETS_MAX: usize = 32;

impl Running {
    /// A model that was just loaded, as `found` and `header` tell of it.
    pub(super) fn new(
        found: Found,
        header: Arc<Header>,
        load: Load,
        loaded: Loaded,
        place: Place,
        keep_alive: KeepAlive,
        schedule: impl FnOnce(Box<dyn Compute>) -> Scheduler,
    ) -> Self {
        Self {
            found,
            header,
            presets: Mutex::default(),
            text: loaded.text,
            limits: loaded.compute.limits(),
            load_time: load.time,
            ram_bytes: loaded.ram_bytes,
            vram_bytes: loaded.vram_bytes,
            notes: loaded.notes,
            rates: loaded.rates,
            load: load.id,
            asked_ctx: load.asked_ctx,
            counters: loaded.counters,
            layers: loaded.layers,
            scheduler: schedule(loaded.compute),
            holds: AtomicUsize::new(0),
            retires: watch::Sender::default(),
            last_use: AtomicU64::new(0),
            expiry: Mutex::new(Expiry { keep_alive, since: Instant::now() }),
            changed: place.changed.clone(),
            _place: place,
        }
    }

    /// Takes it into use. `turn` is larger with each use of any model.
    pub(super) fn hold(self: &Arc<Self>, turn: u64) -> Hold {
        self.holds.fetch_add(1, Ordering::AcqRel);
        self.last_use.store(turn, Ordering::Relaxed);
        Hold(self.clone())
    }

    /// It takes no more requests.
    pub(super) fn retire(self: &Arc<Self>) -> Retiring {
        self.retires.send_replace(true);
        Retiring(self.clone())
    }

    pub(super) fn retires(&self) -> bool {
        *self.retires.borrow()
    }

    /// Tells when it is to go.
    pub(crate) fn retirement(&self) -> watch::Receiver<bool> {
        self.retires.subscribe()
    }

    /// Whether requests with such a wish for tokens of context are computed by it as it is: what they say
    /// nothing of is the usual context.
    pub(super) fn has_ctx(&self, wanted: Option<u32>) -> bool {
        wanted == self.asked_ctx || wanted.is_some_and(|ctx| ctx as usize == self.limits.ctx)
    }

    /// It goes as soon as nobody uses it.
    pub(super) fn expire(&self) {
        self.expiry().keep_alive = KeepAlive::For(Duration::ZERO);
    }

    /// Ends what it computes, and gives its memory back, whoever still looks at its counters.
    pub(super) fn close(&self) {
        // Who still takes an answer of it is in the way.
        self.retires.send_replace(true);
        self.scheduler.close();
    }

    pub(super) fn last_use(&self) -> u64 {
        self.last_use.load(Ordering::Relaxed)
    }

    /// What a name makes of it. Blocks.
    fn preset(&self, found: &Found) -> ApiResult<Arc<Preset>> {
        if let Some(preset) = self.known_preset(found) {
            return Ok(preset);
        }
        // Without the lock: others know theirs already.
        let preset = Arc::new(Preset::new(found.clone(), &self.header, &*self.text)?);
        let mut presets = self.presets();
        if presets.len() == PRESETS_MAX {
            presets.remove(0);
        }
        presets.push(preset.clone());
        Ok(preset)
    }

    fn known_preset(&self, found: &Found) -> Option<Arc<Preset>> {
        let mut presets = self.presets();
        let at = presets.iter().position(|preset| preset.is_of(found))?;
        // The one that was asked for least lately is the first.
        let preset = presets.remove(at);
        presets.push(preset.clone());
        Some(preset)
    }

    fn presets(&self) -> MutexGuard<'_, Vec<Arc<Preset>>> {
        self.presets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The text of its chat template, by the name that it was loaded by. Blocks.
    pub(crate) fn template_source(&self) -> ApiResult<String> {
        Ok(self.preset(&self.found)?.template.source().to_owned())
    }

    fn expiry(&self) -> std::sync::MutexGuard<'_, Expiry> {
        self.expiry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_used(&self) -> bool {
        self.holds.load(Ordering::Acquire) > 0
    }

    /// When it will be unloaded if nobody asks for it; far away if never.
    pub(crate) fn expires(&self) -> SystemTime {
        const FOR_EVER: Duration = Duration::from_secs(100 * 365 * 86_400);
        let expiry = *self.expiry();
        let after = match expiry.keep_alive {
            KeepAlive::For(time) => time.min(FOR_EVER),
            KeepAlive::Ever => FOR_EVER,
        };
        let used = if self.is_used() { Duration::ZERO } else { expiry.since.elapsed() };
        SystemTime::now() + after.saturating_sub(used)
    }

    pub(super) fn is_over(&self) -> bool {
        let Expiry { keep_alive, since } = *self.expiry();
        match keep_alive {
            KeepAlive::For(time) => !self.is_used() && since.elapsed() >= time,
            KeepAlive::Ever => false,
        }
    }

    /// Whether it computes nothing any more: something in it has failed for good.
    pub(crate) fn has_ended(&self) -> bool {
        self.scheduler.has_ended()
    }

    /// Tokens of a client's, if all of them are the model's.
    pub(crate) fn checked(&self, tokens: Vec<Token>) -> ApiResult<Vec<Token>> {
        let known = |token: &Token| usize::try_from(*token).is_ok_and(|id| id < self.text.len());
        match tokens.iter().find(|token| !known(token)) {
            Some(token) => Err(ApiError::bad(format!("the model has no token {token}"))),
            None => Ok(tokens),
        }
    }

    pub(crate) fn counters(&self) -> Counters {
        (self.counters)()
    }

    /// Of its layers with experts.
    pub(crate) fn layer_counters(&self) -> Vec<LayerCounters> {
        (self.layers)()
    }

    /// Tokens of prompts that were computed, and tokens that were written.
    pub(crate) fn tokens(&self) -> (u64, u64) {
        self.scheduler.tokens()
    }

    /// When it will be unloaded if nobody asks for it; none if never.
    pub(crate) fn rests_for(&self) -> Option<Duration> {
        let Expiry { keep_alive, since } = *self.expiry();
        let KeepAlive::For(time) = keep_alive else { return None };
        Some(if self.is_used() { time } else { time.saturating_sub(since.elapsed()) })
    }

    /// Requests that are computed, and those that wait.
    pub(crate) fn requests(&self) -> (usize, usize) {
        self.scheduler.requests()
    }
}

//! The models that are loaded: which, for how long, and which one has to go for another.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use axum::http::StatusCode;
use tokio::sync::Semaphore;
use tokio::sync::mpsc::UnboundedSender;

use crate::ask;
use crate::body::Bodies;
use crate::catalog::{Catalog, Found, Header};
use crate::engine::{
    Counters, Engine, EngineError, LayerCounters, Limits, LoadOptions, Loaded, Rates, Text, Token,
};
use crate::error::{ApiError, ApiResult};
use crate::face::Face;
use crate::grammar::Grammars;
use crate::job::{Event, Job};
use crate::metrics::Metrics;
use crate::prompts::Prompts;
use crate::schedule::{Answer, Scheduler};
use crate::settings::Settings;

/// Models that are fetched at the same time: each has connections and threads of its own.
const PULLS_MAX: usize = 4;

/// The loaded models.
pub(crate) struct Hub {
    pub(crate) catalog: Catalog,
    pub(crate) settings: Settings,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) prompts: Arc<Prompts>,
    engine: Arc<dyn Engine>,
    models: Mutex<Vec<Arc<Running>>>,
    /// Held while one is loaded: one at a time.
    loading: tokio::sync::Mutex<()>,
    /// Models that may be fetched at the same time.
    pub(crate) pulls: Arc<Semaphore>,
    /// Memory for requests that are read.
    pub(crate) bodies: Bodies,
    uses: AtomicU64,
    began: Instant,
    /// Names this run of the server.
    pub(crate) run: u64,
}

/// A loaded model.
pub(crate) struct Running {
    pub(crate) found: Found,
    pub(crate) header: Header,
    /// What its names make of it.
    faces: Mutex<Vec<Arc<Face>>>,
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
    leases: AtomicUsize,
    last_use: AtomicU64,
    expiry: Mutex<Expiry>,
}

#[derive(Debug, Clone, Copy)]
struct Expiry {
    keep_alive: KeepAlive,
    /// When it was used last, or the time from which that counts.
    since: Instant,
}

/// How long a model stays loaded after its last request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeepAlive {
    /// So long.
    For(Duration),
    /// Until another one needs its place.
    Ever,
}

/// A model that is in use, and does not go meanwhile.
pub(crate) struct Lease {
    model: Arc<Running>,
    /// By the name that was asked for.
    pub(crate) face: Arc<Face>,
    /// Time that loading took, if it was loaded for this.
    pub(crate) load_time: Duration,
}

impl std::ops::Deref for Lease {
    type Target = Running;

    fn deref(&self) -> &Running {
        &self.model
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.model.expiry().since = Instant::now();
        self.model.leases.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Lease {
    /// Has a request computed.
    pub(crate) fn submit(
        &self,
        make: impl FnOnce(UnboundedSender<Event>, Arc<[Token]>) -> Job,
    ) -> ApiResult<Answer> {
        let marks = self.face.marks.clone();
        self.scheduler.submit(|events| make(events, marks)).ok_or_else(ApiError::busy)
    }

    /// What makes guides for its vocabulary.
    pub(crate) fn grammars(&self) -> ApiResult<&Grammars> {
        self.face.grammars(&*self.text)
    }
}

/// Names that are remembered of a model.
const FACES_MAX: usize = 32;

impl Running {
    /// What a name makes of it.
    fn face(&self, found: &Found) -> ApiResult<Arc<Face>> {
        let mut faces = self.faces.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(face) = faces.iter().find(|face| face.is_of(found)) {
            return Ok(face.clone());
        }
        let face = Arc::new(Face::new(found.clone(), &self.header, &*self.text)?);
        if faces.len() == FACES_MAX {
            faces.remove(0);
        }
        faces.push(face.clone());
        Ok(face)
    }

    /// The text of its chat template, by the name that it was loaded by.
    pub(crate) fn template_source(&self) -> ApiResult<String> {
        Ok(self.face(&self.found)?.template.source().to_owned())
    }

    fn expiry(&self) -> std::sync::MutexGuard<'_, Expiry> {
        self.expiry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_used(&self) -> bool {
        self.leases.load(Ordering::Acquire) > 0
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

    fn is_over(&self) -> bool {
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

impl Hub {
    pub(crate) fn new(catalog: Catalog, engine: Arc<dyn Engine>, settings: Settings) -> Self {
        Self {
            catalog,
            prompts: Arc::new(Prompts::new(&settings.prompts)),
            bodies: Bodies::new(settings.bodies_bytes_max),
            settings,
            metrics: Arc::default(),
            engine,
            models: Mutex::default(),
            loading: tokio::sync::Mutex::default(),
            pulls: Arc::new(Semaphore::new(PULLS_MAX)),
            uses: AtomicU64::new(0),
            began: Instant::now(),
            run: milliseconds(SystemTime::now()),
        }
    }

    /// How long the server is there.
    pub(crate) fn age(&self) -> Duration {
        self.began.elapsed()
    }

    /// What is loaded.
    pub(crate) fn loaded(&self) -> Vec<Arc<Running>> {
        self.models().clone()
    }

    /// The loaded model of that name, without one that which was used last.
    pub(crate) fn loaded_as(&self, name: Option<&str>) -> ApiResult<Arc<Running>> {
        let models = self.loaded();
        let named = |model: &&Arc<Running>| name.is_none_or(|name| model.found.name == name);
        let last = |model: &&Arc<Running>| model.last_use.load(Ordering::Relaxed);
        let model = models.iter().filter(named).max_by_key(last);
        model.cloned().ok_or_else(|| ApiError::no_model("no such model is loaded"))
    }

    fn models(&self) -> std::sync::MutexGuard<'_, Vec<Arc<Running>>> {
        self.models.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The model of that name, loaded if it is not. `ctx`: tokens of context that the client wants.
    pub(crate) async fn acquire(
        self: &Arc<Self>,
        name: &str,
        ctx: Option<u32>,
        keep_alive: Option<KeepAlive>,
    ) -> ApiResult<Lease> {
        let (hub, name) = (self.clone(), name.to_owned());
        let (found, own) = blocking(move || {
            let found = hub.catalog.find(&name)?;
            let own = ask::own_wishes(&found).ctx()?;
            Ok::<_, ApiError>((found, own))
        })
        .await??;
        let ctx = ctx.or(own);
        if let Some(lease) = self.lease_loaded(&found, ctx, keep_alive) {
            return lease;
        }
        // In a task of its own: a client that leaves leaves no load behind that nobody knows of.
        let hub = self.clone();
        let loading = tokio::spawn(async move { hub.load_for(found, ctx, keep_alive).await });
        loading.await.map_err(thread_failed)?
    }

    async fn load_for(
        &self,
        found: Found,
        ctx: Option<u32>,
        keep_alive: Option<KeepAlive>,
    ) -> ApiResult<Lease> {
        let _one_at_a_time = self.loading.lock().await;
        if let Some(lease) = self.lease_loaded(&found, ctx, keep_alive) {
            return lease;
        }
        let start = Instant::now();
        self.unload_where(|model| model.found.path == found.path).await;
        while self.models().len() >= self.settings.models_max {
            self.make_room().await?;
        }
        let running = Arc::new(self.load(found.clone(), ctx).await?);
        // In use before anybody can find it, and unload it.
        match self.lease(&running, &found, keep_alive) {
            Ok(mut lease) => {
                self.models().push(running);
                lease.load_time = start.elapsed();
                Ok(lease)
            }
            Err(error) => {
                blocking(move || drop(running)).await?;
                Err(error)
            }
        }
    }

    /// Takes the loaded model of that file into use, if its context fits.
    fn lease_loaded(
        &self,
        found: &Found,
        ctx: Option<u32>,
        keep_alive: Option<KeepAlive>,
    ) -> Option<ApiResult<Lease>> {
        let models = self.models();
        let is_it = |model: &&Arc<Running>| model.found.path == found.path && !model.has_ended();
        let model = models.iter().find(is_it)?;
        // A model that is in use keeps its context.
        let fits = ctx.is_none_or(|ctx| {
            model.asked_ctx == Some(ctx) || ctx as usize == model.limits.ctx || model.is_used()
        });
        fits.then(|| self.lease(model, found, keep_alive))
    }

    /// Takes a model into use, which nobody may unload meanwhile.
    fn lease(
        &self,
        model: &Arc<Running>,
        found: &Found,
        keep_alive: Option<KeepAlive>,
    ) -> ApiResult<Lease> {
        let face = model.face(found)?;
        model.leases.fetch_add(1, Ordering::AcqRel);
        model.last_use.store(self.uses.fetch_add(1, Ordering::Relaxed), Ordering::Relaxed);
        // A request that says nothing has the usual time, as with Ollama.
        model.expiry().keep_alive = keep_alive.unwrap_or(self.settings.keep_alive);
        Ok(Lease { model: model.clone(), face, load_time: Duration::ZERO })
    }

    async fn load(&self, found: Found, ctx: Option<u32>) -> ApiResult<Running> {
        loop {
            let taken_bytes = self.models().iter().map(|model| model.ram_bytes).sum();
            let (engine, path) = (self.engine.clone(), found.path.clone());
            let options = LoadOptions { name: found.name.clone(), ctx, taken_bytes };
            let start = Instant::now();
            match blocking(move || engine.load(&path, &options)).await? {
                Ok(loaded) => {
                    self.metrics.loaded(start.elapsed());
                    return self.running(found, ctx, loaded, start.elapsed());
                }
                // Without the others there may be.
                Err(EngineError::NoRoom(why)) => {
                    if self.models().is_empty() || self.make_room().await.is_err() {
                        return Err(EngineError::NoRoom(why).into());
                    }
                }
                // Nothing else ends a load.
                Err(EngineError::Cancelled) => return Err(EngineError::Stopping.into()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn running(
        &self,
        found: Found,
        asked_ctx: Option<u32>,
        loaded: Loaded,
        load_time: Duration,
    ) -> ApiResult<Running> {
        let header = self.catalog.header(&found.path)?;
        let limits = loaded.compute.limits();
        let keep_alive = self.settings.keep_alive;
        Ok(Running {
            found,
            header,
            faces: Mutex::default(),
            limits,
            load_time,
            ram_bytes: loaded.ram_bytes,
            vram_bytes: loaded.vram_bytes,
            asked_ctx,
            notes: loaded.notes,
            rates: loaded.rates,
            load: self.uses.fetch_add(1, Ordering::Relaxed),
            counters: loaded.counters,
            layers: loaded.layers,
            scheduler: Scheduler::new(
                loaded.compute,
                loaded.text.clone(),
                self.metrics.clone(),
                self.prompts.of(&loaded.identity),
                self.settings.queue_max,
            ),
            text: loaded.text,
            leases: AtomicUsize::new(0),
            last_use: AtomicU64::new(0),
            expiry: Mutex::new(Expiry { keep_alive, since: Instant::now() }),
        })
    }

    /// Unloads the model that was used least lately and is not in use.
    async fn make_room(&self) -> ApiResult<()> {
        let idle = {
            let mut models = self.models();
            let idle = models.iter().enumerate().filter(|(_, model)| !model.is_used());
            let oldest = idle.min_by_key(|(_, model)| model.last_use.load(Ordering::Relaxed));
            oldest.map(|(at, _)| at).map(|at| models.remove(at))
        };
        let all_used =
            || ApiError::unavailable("the models that are loaded are all in use; try again later");
        let model = idle.ok_or_else(all_used)?;
        // Its memory is free then, whoever still looks at its counters.
        blocking(move || model.scheduler.close()).await
    }

    /// Unloads what nobody has asked for in time.
    pub(crate) async fn unload_expired(&self) {
        self.unload_where(|model| model.is_over() || model.has_ended()).await;
    }

    /// Ends a model's time; it goes when its requests are done. False if it is not loaded.
    pub(crate) async fn unload(self: &Arc<Self>, name: &str) -> ApiResult<bool> {
        let (hub, name) = (self.clone(), name.to_owned());
        let path = blocking(move || hub.catalog.find(&name)).await??.path;
        let found = self.models().iter().find(|model| model.found.path == path).cloned();
        let Some(model) = found else { return Ok(false) };
        model.expiry().keep_alive = KeepAlive::For(Duration::ZERO);
        drop(model);
        self.unload_expired().await;
        Ok(true)
    }

    /// Unloads all, also what is in use.
    pub(crate) async fn close(&self) {
        let all = std::mem::take(&mut *self.models());
        for model in all {
            drop(blocking(move || model.scheduler.close()).await);
        }
    }

    async fn unload_where(&self, goes: impl Fn(&Running) -> bool) {
        let gone: Vec<_> = {
            let mut models = self.models();
            let gone =
                |model: &mut Arc<Running>| (!model.is_used() || model.has_ended()) && goes(model);
            models.extract_if(.., gone).collect()
        };
        if !gone.is_empty() {
            let close = move || gone.iter().for_each(|model| model.scheduler.close());
            drop(blocking(close).await);
        }
    }
}

/// Since 1970: few enough that scripts keep the number exactly.
fn milliseconds(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or_default()
}

/// Runs what blocks on a thread for that.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> ApiResult<T> {
    tokio::task::spawn_blocking(work).await.map_err(thread_failed)
}

fn thread_failed(_: tokio::task::JoinError) -> ApiError {
    ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "a thread of the server failed")
}

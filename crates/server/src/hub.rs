//! The models that are loaded: which, for how long, and which one has to go for another.

mod running;

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use axum::http::StatusCode;
use tokio::sync::{Semaphore, oneshot};

pub use self::running::KeepAlive;
use self::running::{Hold, Load};
pub(crate) use self::running::{Lease, Running};
use crate::ask;
use crate::body::Bodies;
use crate::catalog::{Catalog, Found};
use crate::engine::{Engine, EngineError, LoadOptions, Loaded};
use crate::error::{ApiError, ApiResult};
use crate::metrics::Metrics;
use crate::prompts::Prompts;
use crate::schedule::Scheduler;
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
        let plain = |name: &str| name.strip_suffix(":latest").unwrap_or(name).to_owned();
        let named =
            |model: &&Arc<Running>| name.is_none_or(|name| plain(&model.found.name) == plain(name));
        let last = |model: &&Arc<Running>| model.last_use();
        let model = models.iter().filter(named).max_by_key(last);
        model.cloned().ok_or_else(|| ApiError::no_model("no such model is loaded"))
    }

    fn models(&self) -> std::sync::MutexGuard<'_, Vec<Arc<Running>>> {
        self.models.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The model of that name, loaded if it is not. `ctx`: tokens of context that the client wants; no more
    /// than the model was trained with are given.
    pub(crate) async fn acquire(
        self: &Arc<Self>,
        name: &str,
        ctx: Option<u32>,
        keep_alive: Option<KeepAlive>,
    ) -> ApiResult<Lease> {
        let (hub, name) = (self.clone(), name.to_owned());
        let wanted = blocking(move || hub.wanted(&name, ctx)).await??;
        self.hold(wanted, keep_alive).await
    }

    /// The model of that name with whatever context it has, loaded if it is not.
    pub(crate) async fn acquire_any(self: &Arc<Self>, name: &str) -> ApiResult<Lease> {
        let (hub, name) = (self.clone(), name.to_owned());
        let wanted = blocking(move || hub.wanted(&name, None)).await??;
        self.hold(Wanted { takes_any_ctx: true, ..wanted }, None).await
    }

    fn wanted(&self, name: &str, ctx: Option<u32>) -> ApiResult<Wanted> {
        let found = self.catalog.find(name)?;
        if !found.layers.adapters.is_empty() {
            let why = "the model has a LoRA beside its weights, which is not supported";
            return Err(ApiError::new(StatusCode::NOT_IMPLEMENTED, why));
        }
        let ctx = match ctx {
            Some(ctx) => Some(ctx),
            None => ask::own_wishes(&found)?.ctx()?,
        };
        // The header tells, if it can be read; if not, loading says why.
        let trained = self.catalog.header(&found.path).ok().and_then(|h| h.context_length);
        let trained = trained.unwrap_or(u32::MAX);
        let enough_ctx = ctx.unwrap_or(self.settings.ctx).min(trained) as usize;
        Ok(Wanted { found, ctx: ctx.map(|ctx| ctx.min(trained)), enough_ctx, takes_any_ctx: false })
    }

    async fn hold(
        self: &Arc<Self>,
        wanted: Wanted,
        keep_alive: Option<KeepAlive>,
    ) -> ApiResult<Lease> {
        let found = wanted.found.clone();
        let (hold, load_time) = match self.hold_loaded(&wanted) {
            Some(hold) => (hold, Duration::ZERO),
            None => self.hold_after_load(wanted).await?,
        };
        hold.keep(keep_alive);
        // What the name makes of the model may have to be read.
        blocking(move || hold.lease(&found, load_time)).await?
    }

    /// In a task of its own: what was begun for a client that leaves comes to an end in order.
    async fn hold_after_load(self: &Arc<Self>, wanted: Wanted) -> ApiResult<(Hold, Duration)> {
        let (told, loaded) = oneshot::channel();
        let hub = self.clone();
        tokio::spawn(async move {
            let mut client = Client(told);
            let _waits = hub.metrics.waits_for_model();
            let loaded = hub.load_for(&wanted, &mut client).await;
            // Nobody holds it then, if the client has left meanwhile.
            drop(client.0.send(loaded));
        });
        loaded.await.map_err(|_| ApiError::internal(THREAD_FAILED))?
    }

    async fn load_for(&self, wanted: &Wanted, client: &mut Client) -> ApiResult<(Hold, Duration)> {
        // One is loaded at a time.
        let _turn = client.unless_gone(self.loading.lock()).await?;
        if let Some(hold) = self.hold_loaded(wanted) {
            return Ok((hold, Duration::ZERO));
        }
        let start = Instant::now();
        if !self.models().is_empty() {
            // No model goes for one that cannot be loaded without it either.
            let (engine, path, ctx) = (self.engine.clone(), wanted.found.path.clone(), wanted.ctx);
            blocking(move || engine.check(&path, ctx)).await??;
        }
        let same = |model: &&Arc<Running>| model.found.path == wanted.found.path;
        let same = self.loaded().iter().find(same).cloned();
        if let Some(model) = same {
            self.retire(&model, client).await?;
        }
        while self.models().len() >= self.settings.models_max {
            self.make_room(client).await?;
        }
        let running = Arc::new(self.load(wanted, client).await?);
        // In use before anybody can find it, and unload it.
        let hold = running.hold(self.next());
        self.models().push(running);
        Ok((hold, start.elapsed()))
    }

    /// Takes the loaded model of that file into use, if its context fits.
    fn hold_loaded(&self, wanted: &Wanted) -> Option<Hold> {
        let models = self.models();
        let is_it = |model: &&Arc<Running>| {
            model.found.path == wanted.found.path && !model.has_ended() && !model.retires()
        };
        let model = models.iter().find(is_it)?;
        let fits = wanted.takes_any_ctx
            || model.has_ctx(wanted.ctx)
            // Nobody waits for less.
            || (model.is_used() && model.limits.ctx >= wanted.enough_ctx);
        fits.then(|| model.hold(self.next()))
    }

    /// A number that is larger than all before.
    fn next(&self) -> u64 {
        self.uses.fetch_add(1, Ordering::Relaxed)
    }

    async fn load(&self, wanted: &Wanted, client: &mut Client) -> ApiResult<Running> {
        let Wanted { found, ctx, .. } = wanted;
        loop {
            let others = self.loaded();
            let options = LoadOptions {
                name: found.name.clone(),
                ctx: *ctx,
                taken_bytes: others.iter().map(|model| model.ram_bytes).sum(),
                taken_vram_bytes: others.iter().map(|model| model.vram_bytes).sum(),
            };
            drop(others);
            let start = Instant::now();
            match client.load(&self.engine, &found.path, options).await? {
                Ok(loaded) => {
                    let load = Load { id: self.next(), time: start.elapsed(), asked_ctx: *ctx };
                    self.metrics.loaded(load.time);
                    return self.running(found.clone(), load, loaded);
                }
                // Without the others there may be.
                Err(EngineError::NoRoom(_)) if !self.models().is_empty() => {
                    self.make_room(client).await?;
                }
                // Nothing else ends a load that somebody waits for.
                Err(EngineError::Cancelled) => return Err(EngineError::Stopping.into()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn running(&self, found: Found, load: Load, loaded: Loaded) -> ApiResult<Running> {
        let header = self.catalog.header(&found.path)?;
        let prompts = self.prompts.of(&loaded.identity);
        let (text, metrics) = (loaded.text.clone(), self.metrics.clone());
        Ok(Running::new(found, header, load, loaded, self.settings.keep_alive, |compute| {
            Scheduler::new(compute, text, metrics, prompts, self.settings.queue_max)
        }))
    }

    /// Unloads the model that was used least lately, rather one that is not in use.
    async fn make_room(&self, client: &mut Client) -> ApiResult<()> {
        let models = self.loaded();
        let oldest = models.iter().min_by_key(|model| (model.is_used(), model.last_use()));
        match oldest {
            Some(model) => self.retire(model, client).await,
            None => Ok(()),
        }
    }

    /// Unloads a model as soon as the requests that it has are done. Others wait until it is loaded again.
    async fn retire(&self, model: &Arc<Running>, client: &mut Client) -> ApiResult<()> {
        let retiring = {
            // With the lock, so that nobody takes it into use unseen.
            let _models = self.models();
            model.retire()
        };
        client.unless_gone(model.idle()).await?;
        self.models().retain(|other| !Arc::ptr_eq(other, model));
        drop(retiring);
        let model = model.clone();
        blocking(move || model.close()).await
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
        model.expire();
        drop(model);
        self.unload_expired().await;
        Ok(true)
    }

    /// Unloads all, also what is in use.
    pub(crate) async fn close(&self) {
        let all = std::mem::take(&mut *self.models());
        for model in all {
            drop(blocking(move || model.close()).await);
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
            let close = move || gone.iter().for_each(|model| model.close());
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
    tokio::task::spawn_blocking(work).await.map_err(|_| ApiError::internal(THREAD_FAILED))
}

const THREAD_FAILED: &str = "a thread of the server failed";

/// A model that a client asks for.
#[derive(Debug)]
struct Wanted {
    found: Found,
    /// Tokens of context, if the client or the model's parameters say how many.
    ctx: Option<u32>,
    /// As many as are said or usual.
    enough_ctx: usize,
    takes_any_ctx: bool,
}

/// Who waits for a model to be loaded.
struct Client(oneshot::Sender<ApiResult<(Hold, Duration)>>);

impl Client {
    /// What comes of `work`; an error, which nobody reads, if the client leaves before.
    async fn unless_gone<T>(&mut self, work: impl Future<Output = T>) -> ApiResult<T> {
        tokio::select! {
            done = work => Ok(done),
            () = self.0.closed() => Err(ApiError::unavailable("the client has left")),
        }
    }

    /// Loads a model, and stops that if the client leaves.
    async fn load(
        &mut self,
        engine: &Arc<dyn Engine>,
        path: &Path,
        options: LoadOptions,
    ) -> ApiResult<Result<Loaded, EngineError>> {
        let (engine, path) = (engine.clone(), path.to_owned());
        let is_wanted = Arc::new(AtomicBool::new(true));
        let wanted = is_wanted.clone();
        let loading =
            blocking(move || engine.load(&path, &options, &|| wanted.load(Ordering::Acquire)));
        let mut loading = std::pin::pin!(loading);
        tokio::select! {
            loaded = &mut loading => loaded,
            () = self.0.closed() => {
                is_wanted.store(false, Ordering::Release);
                // Its memory counts until it has ended.
                loading.await
            }
        }
    }
}

//! The models that are loaded: which, for how long, and which one has to go for another.

mod running;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use axum::http::StatusCode;
use tokio::sync::Semaphore;

pub use self::running::KeepAlive;
use self::running::Load;
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
        let (found, ctx) = blocking(move || {
            let found = hub.catalog.find(&name)?;
            let ctx = match ctx {
                Some(ctx) => Some(ctx),
                None => ask::own_wishes(&found)?.ctx()?,
            };
            // The header tells, if it can be read; if not, loading says why.
            let trained = hub.catalog.header(&found.path).ok().and_then(|h| h.context_length);
            Ok::<_, ApiError>((found, ctx.map(|ctx| ctx.min(trained.unwrap_or(u32::MAX)))))
        })
        .await??;
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
        if !self.models().is_empty() {
            // No model goes for one that cannot be loaded without it either.
            let (engine, path) = (self.engine.clone(), found.path.clone());
            blocking(move || engine.check(&path, ctx)).await??;
        }
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
        let fits = model.is_used() || model.has_ctx(ctx);
        fits.then(|| self.lease(model, found, keep_alive))
    }

    /// Takes a model into use, which nobody may unload meanwhile.
    fn lease(
        &self,
        model: &Arc<Running>,
        found: &Found,
        keep_alive: Option<KeepAlive>,
    ) -> ApiResult<Lease> {
        // A request that says nothing has the usual time, as with Ollama.
        model.lease(found, self.next(), keep_alive.unwrap_or(self.settings.keep_alive))
    }

    /// A number that is larger than all before.
    fn next(&self) -> u64 {
        self.uses.fetch_add(1, Ordering::Relaxed)
    }

    async fn load(&self, found: Found, ctx: Option<u32>) -> ApiResult<Running> {
        loop {
            let others = self.loaded();
            let options = LoadOptions {
                name: found.name.clone(),
                ctx,
                taken_bytes: others.iter().map(|model| model.ram_bytes).sum(),
                taken_vram_bytes: others.iter().map(|model| model.vram_bytes).sum(),
            };
            drop(others);
            let (engine, path) = (self.engine.clone(), found.path.clone());
            let start = Instant::now();
            match blocking(move || engine.load(&path, &options)).await? {
                Ok(loaded) => {
                    let load = Load { id: self.next(), time: start.elapsed(), asked_ctx: ctx };
                    self.metrics.loaded(load.time);
                    return self.running(found, load, loaded);
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

    fn running(&self, found: Found, load: Load, loaded: Loaded) -> ApiResult<Running> {
        let header = self.catalog.header(&found.path)?;
        let prompts = self.prompts.of(&loaded.identity);
        let (text, metrics) = (loaded.text.clone(), self.metrics.clone());
        Ok(Running::new(found, header, load, loaded, |compute| {
            Scheduler::new(compute, text, metrics, prompts, self.settings.queue_max)
        }))
    }

    /// Unloads the model that was used least lately and is not in use.
    async fn make_room(&self) -> ApiResult<()> {
        let idle = {
            let mut models = self.models();
            let idle = models.iter().enumerate().filter(|(_, model)| !model.is_used());
            let oldest = idle.min_by_key(|(_, model)| model.last_use());
            oldest.map(|(at, _)| at).map(|at| models.remove(at))
        };
        let all_used =
            || ApiError::unavailable("the models that are loaded are all in use; try again later");
        let model = idle.ok_or_else(all_used)?;
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
    tokio::task::spawn_blocking(work).await.map_err(thread_failed)
}

fn thread_failed(_: tokio::task::JoinError) -> ApiError {
    ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "a thread of the server failed")
}

//! The models that are loaded: which, for how long, and which one has to go for another.

mod loading;
mod running;

use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use axum::http::StatusCode;
use tokio::sync::{Notify, Semaphore};

use self::loading::{Waiting, Wanted};
pub use self::running::KeepAlive;
pub(crate) use self::running::{Lease, Running};
use crate::ask;
use crate::body::Bodies;
use crate::catalog::Catalog;
use crate::engine::Engine;
use crate::error::{ApiError, ApiResult};
use crate::metrics::Metrics;
use crate::prompts::Prompts;
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
    /// Models whose memory is taken: those, and those that are going.
    alive: Arc<AtomicUsize>,
    /// Held while one is loaded: one at a time.
    loading: tokio::sync::Mutex<()>,
    /// Told when a model is in no use any more, or has gone, and when a client has left that waits.
    changed: Arc<Notify>,
    waiting: Arc<Waiting>,
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
            alive: Arc::default(),
            loading: tokio::sync::Mutex::default(),
            changed: Arc::default(),
            waiting: Arc::default(),
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
            None => ask::own_params(&found)?.ctx()?,
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
        let (hold, load_time) = self.take(wanted).await?;
        hold.keep(keep_alive);
        blocking(move || hold.lease(&found, load_time)).await?
    }

    /// Unloads what nobody has asked for in time.
    pub(crate) async fn unload_expired(&self) {
        self.unload_where(|model| model.is_over() || model.has_ended()).await;
    }

    /// Ends a model's time, if it is loaded; it goes when its requests are done.
    pub(crate) async fn unload(self: &Arc<Self>, name: &str) -> ApiResult<()> {
        let (hub, name) = (self.clone(), name.to_owned());
        let path = blocking(move || hub.catalog.find(&name)).await??.path;
        let found = self.models().iter().find(|model| model.found.path == path).cloned();
        if let Some(model) = found {
            model.expire();
            drop(model);
            self.unload_expired().await;
        }
        Ok(())
    }

    /// Unloads all, also what is in use.
    pub(crate) async fn close(&self) {
        let all = std::mem::take(&mut *self.models());
        drop(blocking(move || close(all)).await);
    }

    async fn unload_where(&self, goes: impl Fn(&Running) -> bool) {
        let gone: Vec<_> = {
            let mut models = self.models();
            let gone =
                |model: &mut Arc<Running>| (!model.is_used() || model.has_ended()) && goes(model);
            models.extract_if(.., gone).collect()
        };
        if !gone.is_empty() {
            drop(blocking(move || close(gone)).await);
        }
    }
}

/// Ends what these models compute, and gives up their memory.
fn close(models: Vec<Arc<Running>>) {
    models.iter().for_each(|model| model.close());
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

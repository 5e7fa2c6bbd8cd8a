//! How a model comes to be loaded: who waits for it, and which others go for it.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, oneshot};

use super::running::{Hold, Load, Place, Running};
use super::{Hub, THREAD_FAILED, blocking, close};
use crate::catalog::Found;
use crate::engine::{EngineError, LoadOptions, Loaded};
use crate::error::{ApiError, ApiResult};
use crate::schedule::Scheduler;

/// A model that a client asks for.
#[derive(Debug)]
pub(super) struct Wanted {
    pub(super) found: Found,
    /// Tokens of context, if the client or the model's parameters say how many.
    pub(super) ctx: Option<u32>,
    /// As many as are said or usual.
    pub(super) enough_ctx: usize,
    pub(super) takes_any_ctx: bool,
}

/// A model in use, and the time that loading it took, if it was loaded for this.
type Taken = (Hold, Duration);

/// Why no model is loaded.
enum Not {
    /// Nobody waits for it any more.
    Wanted,
    Loaded(ApiError),
}

impl<E: Into<ApiError>> From<E> for Not {
    fn from(error: E) -> Self {
        Self::Loaded(error.into())
    }
}

impl Hub {
    /// What is wanted, loaded if it is not.
    pub(super) async fn take(self: &Arc<Self>, wanted: Wanted) -> ApiResult<Taken> {
        if let Some(hold) = self.hold_loaded(&wanted) {
            return Ok((hold, Duration::ZERO));
        }
        let wanted = Arc::new(wanted);
        let (_waits, taken) = self.waiting.wait(&wanted, &self.changed);
        let _counts = self.metrics.waits_for_model();
        let hub = self.clone();
        // In a task of its own: what was begun for a client that leaves comes to an end in order.
        tokio::spawn(async move {
            // One is loaded at a time.
            let _turn = hub.loading.lock().await;
            let _ends = Ends(&hub.waiting, &wanted);
            hub.hand_out(None);
            match hub.load_for(&wanted).await {
                Ok(taken) => hub.hand_out(Some((&wanted, taken))),
                Err(Not::Wanted) => {}
                Err(Not::Loaded(error)) => hub.waiting.fail(&wanted, &error),
            }
        });
        taken.await.map_err(|_| ApiError::internal(THREAD_FAILED))?
    }

    /// Gives those that wait what they wait for, if it is there, and what was loaded for one of them to that one.
    fn hand_out(&self, mut loaded: Option<(&Arc<Wanted>, Taken)>) {
        self.waiting.give(|wanted| match loaded.take_if(|(by, _)| Arc::ptr_eq(by, wanted)) {
            Some((_, taken)) => Some(taken),
            None => Some((self.hold_loaded(wanted)?, Duration::ZERO)),
        });
    }

    /// Loads a model, if somebody waits for it.
    async fn load_for(&self, wanted: &Wanted) -> Result<Taken, Not> {
        self.check_waiting(wanted)?;
        let start = Instant::now();
        if !self.models().is_empty() {
            // No model goes for one that cannot be loaded without it either.
            let (engine, path, ctx) = (self.engine.clone(), wanted.found.path.clone(), wanted.ctx);
            blocking(move || engine.check(&path, ctx)).await??;
        }
        // Of this one, with another context.
        self.unload_one(wanted, |model| model.found.path == wanted.found.path).await?;
        while self.models().len() >= self.settings.models_max {
            self.unload_one(wanted, |_| true).await?;
        }
        let running = Arc::new(self.load(wanted).await?);
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

    fn check_waiting(&self, wanted: &Wanted) -> Result<(), Not> {
        match self.waiting.has(&wanted.found.path, wanted.ctx) {
            true => Ok(()),
            false => Err(Not::Wanted),
        }
    }

    async fn load(&self, wanted: &Wanted) -> Result<Running, Not> {
        let Wanted { found, ctx, .. } = wanted;
        loop {
            let others = self.settled(wanted).await?;
            let options = LoadOptions {
                name: found.name.clone(),
                ctx: *ctx,
                taken_bytes: others.iter().map(|model| model.ram_bytes).sum(),
                taken_vram_bytes: others.iter().map(|model| model.vram_bytes).sum(),
            };
            let is_alone = others.is_empty();
            drop(others);
            let start = Instant::now();
            let place = Place::new(self.alive.clone(), self.changed.clone());
            let is_unwanted = Arc::new(AtomicBool::new(false));
            let loaded = {
                let (engine, path, ctx) = (self.engine.clone(), found.path.clone(), *ctx);
                let (waiting, is_unwanted) = (self.waiting.clone(), is_unwanted.clone());
                let is_wanted = move || {
                    let is_wanted = waiting.has(&path, ctx);
                    // Who comes later has it loaded again.
                    is_unwanted.fetch_or(!is_wanted, Ordering::AcqRel);
                    is_wanted
                };
                let path = found.path.clone();
                blocking(move || engine.load(&path, &options, &is_wanted)).await?
            };
            match loaded {
                Ok(loaded) => {
                    let load = Load { id: self.next(), time: start.elapsed(), asked_ctx: *ctx };
                    self.metrics.loaded(load.time);
                    return Ok(self.running(found.clone(), load, loaded, place)?);
                }
                // Without the others there may be, if they are not gone already.
                Err(EngineError::NoRoom(_)) if !is_alone => {
                    drop(place);
                    self.unload_one(wanted, |_| true).await?;
                }
                Err(EngineError::Cancelled) if is_unwanted.load(Ordering::Acquire) => {
                    return Err(Not::Wanted);
                }
                // Nothing else ends a load that somebody waits for.
                Err(EngineError::Cancelled) => return Err(EngineError::Stopping.into()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn running(
        &self,
        found: Found,
        load: Load,
        loaded: Loaded,
        place: Place,
    ) -> ApiResult<Running> {
        let header = self.catalog.header(&found.path)?;
        let prompts = self.prompts.of(&loaded.identity);
        let (text, metrics) = (loaded.text.clone(), self.metrics.clone());
        Ok(Running::new(found, header, load, loaded, place, self.settings.keep_alive, |compute| {
            Scheduler::new(compute, text, metrics, prompts, self.settings.queue_max)
        }))
    }

    /// The models that are loaded, when what was unloaded is gone.
    async fn settled(&self, wanted: &Wanted) -> Result<Vec<Arc<Running>>, Not> {
        self.wait_until(wanted, || {
            let models = self.loaded();
            (self.alive.load(Ordering::Acquire) <= models.len()).then_some(models)
        })
        .await
    }

    /// Unloads the model that was used least lately, of those that may go, as soon as the requests that it has are
    /// done; or one that is in no use before. Others wait until it is loaded again.
    async fn unload_one(
        &self,
        wanted: &Wanted,
        may_go: impl Fn(&Running) -> bool,
    ) -> Result<(), Not> {
        let least_lately = |model: &&Arc<Running>| (model.is_used(), model.last_use());
        let retiring = {
            // With the lock, so that nobody takes it into use unseen.
            let models = self.models();
            let Some(model) = models.iter().filter(|model| may_go(model)).min_by_key(least_lately)
            else {
                return Ok(());
            };
            model.retire()
        };
        let take = || {
            let mut models = self.models();
            let goes =
                |model: &&Arc<Running>| may_go(model) && (!model.is_used() || model.has_ended());
            let model = models.iter().filter(goes).min_by_key(least_lately)?.clone();
            models.retain(|other| !Arc::ptr_eq(other, &model));
            Some(model)
        };
        let is_gone = || !self.models().iter().any(|model| may_go(model));
        let found = self.wait_until(wanted, || match take() {
            Some(model) => Some(Some(model)),
            None => is_gone().then_some(None),
        });
        let gone = found.await?;
        // If it was another one, this one stays.
        drop(retiring);
        self.hand_out(None);
        blocking(move || close(gone.into_iter().collect())).await?;
        Ok(())
    }

    /// What comes of `look`, which is done again whenever something has changed, as long as anybody waits for it.
    async fn wait_until<T>(
        &self,
        wanted: &Wanted,
        mut look: impl FnMut() -> Option<T>,
    ) -> Result<T, Not> {
        loop {
            let changed = self.changed.notified();
            if let Some(found) = look() {
                return Ok(found);
            }
            self.check_waiting(wanted)?;
            changed.await;
        }
    }
}

/// What clients wait for to be loaded.
#[derive(Default)]
pub(super) struct Waiting(Mutex<Vec<Entry>>);

struct Entry {
    wanted: Arc<Wanted>,
    taken: oneshot::Sender<ApiResult<Taken>>,
}

impl Entry {
    /// Whether a load of that file with such a context is for this one.
    fn is_for(&self, path: &Path, ctx: Option<u32>) -> bool {
        self.wanted.found.path == path && self.wanted.ctx == ctx
    }
}

impl Waiting {
    /// A client waits, until it is given something or leaves.
    fn wait(
        self: &Arc<Self>,
        wanted: &Arc<Wanted>,
        changed: &Arc<Notify>,
    ) -> (Waits, oneshot::Receiver<ApiResult<Taken>>) {
        let (taken, receiver) = oneshot::channel();
        self.lock().push(Entry { wanted: wanted.clone(), taken });
        let (all, wanted, changed) = (self.clone(), wanted.clone(), changed.clone());
        (Waits { all, wanted, changed }, receiver)
    }

    fn has(&self, path: &Path, ctx: Option<u32>) -> bool {
        self.lock().iter().any(|entry| entry.is_for(path, ctx))
    }

    fn give(&self, mut take: impl FnMut(&Arc<Wanted>) -> Option<Taken>) {
        let mut all = self.lock();
        let mut at = 0;
        while let Some(entry) = all.get(at) {
            match take(&entry.wanted) {
                // Who has left meanwhile holds nothing.
                Some(taken) => drop(all.remove(at).taken.send(Ok(taken))),
                None => at += 1,
            }
        }
    }

    fn remove(&self, wanted: &Arc<Wanted>) {
        self.lock().retain(|entry| !Arc::ptr_eq(&entry.wanted, wanted));
    }

    /// Tells those that wait for such a model why there is none.
    fn fail(&self, wanted: &Wanted, error: &ApiError) {
        let is_for = |entry: &mut Entry| entry.is_for(&wanted.found.path, wanted.ctx);
        for entry in self.lock().extract_if(.., is_for) {
            drop(entry.taken.send(Err(error.clone())));
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// At the end of what was done for a client, it waits no longer, whatever came of that.
struct Ends<'a>(&'a Waiting, &'a Arc<Wanted>);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.remove(self.1);
    }
}

/// A client that waits.
struct Waits {
    all: Arc<Waiting>,
    wanted: Arc<Wanted>,
    changed: Arc<Notify>,
}

impl Drop for Waits {
    fn drop(&mut self) {
        self.all.remove(&self.wanted);
        self.changed.notify_waiters();
    }
}

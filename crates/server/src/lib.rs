//! Models over HTTP, in the dialects of Ollama, OpenAI and Anthropic.
//!
//! What runs models is an [`engine::Engine`]; this crate knows none of them. A request's way:
//!
//! ```text
//! listen.rs       connections, with bounds on their number (peers.rs: of each peer) and time
//! guard.rs        host, origin, key
//! body.rs         its body, within the memory that there is for all of them, and for its peer
//! ollama/, openai/, anthropic/, misc.rs   a dialect's JSON to an Ask
//! generation.rs   Generation::begin
//!   hub.rs        the model: which are loaded; hub/loading.rs: which one goes for another
//!     catalog.rs  by its name, in all stores
//!   ask.rs        the prompt's tokens, by the model's template; how tokens are drawn
//!   grammar.rs    the form that the answer has to have
//!   schedule/     a queue, in which peers take turns, and a thread for each model, that computes several requests at once
//!     active.rs   one of them: its prompt, then token by token
//!       write.rs  from logits to text
//! generation.rs   Generation::next: thinking, content, calls
//! ollama/, openai/, anthropic/            to the dialect's lines or events; overdue.rs: as long as they are taken
//! ```
//!
//! `ui.rs` has a page to look at while that happens.

#![forbid(unsafe_code)]

mod active;
mod anthropic;
mod ask;
mod blocks;
mod body;
mod catalog;
mod content;
mod embed;
pub mod engine;
mod error;
mod events;
mod generation;
mod grammar;
mod guard;
mod hub;
mod ids;
mod job;
mod listen;
mod logprobs;
mod metrics;
mod misc;
mod ollama;
mod openai;
mod openapi;
mod overdue;
mod peers;
mod preset;
mod prompts;
mod schedule;
mod settings;
mod texts;
mod ui;
mod write;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::{StatusCode, Uri};
use axum::middleware::from_fn_with_state;
use tierstream_store::Store;
use tokio::net::TcpListener;

pub use ask::Params;
pub use error::ApiError;
pub use hub::KeepAlive;
pub use prompts::PromptCache;
pub use settings::{Settings, keep_alive};

use crate::catalog::Catalog;
use crate::engine::{Engine, Extra};
use crate::error::respond;
use crate::hub::Hub;
use crate::listen::Bounds;

/// How often is looked for models whose time is over.
const EXPIRY_INTERVAL: Duration = Duration::from_millis(250);

/// A server.
pub struct Server {
    hub: Arc<Hub>,
}

impl Server {
    /// A server of the models in `store`, and of `extras` beside them.
    pub fn new(
        engine: Arc<dyn Engine>,
        store: Store,
        extras: Vec<Extra>,
        settings: Settings,
    ) -> Self {
        Self { hub: Arc::new(Hub::new(Catalog::new(store, extras), engine, settings)) }
    }

    /// All routes.
    pub fn router(&self) -> Router {
        let hub = &self.hub;
        Router::new()
            .merge(ollama::routes())
            .merge(openai::routes())
            .merge(anthropic::routes())
            .merge(misc::routes())
            .merge(ui::routes())
            .merge(openapi::routes())
            .fallback(|uri: Uri| async move {
                respond(uri.path(), ApiError::new(StatusCode::NOT_FOUND, "there is no such route"))
            })
            .method_not_allowed_fallback(|uri: Uri| async move {
                let why = "the route takes another method";
                respond(uri.path(), ApiError::new(StatusCode::METHOD_NOT_ALLOWED, why))
            })
            .layer(from_fn_with_state(hub.clone(), guard::guard))
            // Outside, so that pages that may ask are told why they were refused.
            .layer(guard::cors(hub))
            .with_state(hub.clone())
    }

    /// Answers requests until `stop`; then those that run have some time to end, and models are unloaded.
    ///
    /// # Errors
    /// Those of the listener.
    pub async fn run(
        self,
        listener: TcpListener,
        stop: impl Future<Output = ()>,
    ) -> io::Result<()> {
        let hub = self.hub.clone();
        let expiry = tokio::spawn(async move {
            let mut interval = tokio::time::interval(EXPIRY_INTERVAL);
            loop {
                interval.tick().await;
                hub.unload_expired().await;
            }
        });
        let (bounds, grace, end) = (Bounds::default(), self.hub.settings.grace, self.hub.close());
        let served = listen::listen(listener, self.router(), bounds, grace, stop, end).await;
        expiry.abort();
        self.hub.close().await;
        served
    }
}

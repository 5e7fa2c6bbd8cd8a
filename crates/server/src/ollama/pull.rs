//! `/api/pull`: models of the Hugging Face hub, fetched into its cache. Ollama's registry is not asked.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Value, json};
use tierstream_pull::{Cancel, Error, Event, FileState, Observer};
use tierstream_store::HubName;
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::{Receiver, Sender, channel};

use crate::body::{self, Received, read};
use crate::error::{ApiError, ApiResult, Ollama};
use crate::hub::{Hub, blocking};

/// Lines that a client may be behind; of how far it is, it then misses some.
const LINES_MAX: usize = 64;

#[derive(Deserialize, JsonSchema)]
#[schemars(rename = "OllamaPull")]
pub(super) struct Body {
    model: Option<String>,
    /// What it was called before.
    name: Option<String>,
    stream: Option<bool>,
}

/// What a client is told: a line, and at last an error or nothing more.
type Line = Result<Value, ApiError>;

/// A pull, which ends when nobody wants to know of it any more.
struct Pulling {
    lines: Receiver<Line>,
    cancel: Cancel,
}

impl Pulling {
    /// One of a model that is there.
    fn done() -> Self {
        let (sender, lines) = channel(1);
        sender.try_send(Ok(success())).expect("there is room for one");
        Self { lines, cancel: Cancel::new() }
    }
}

impl Drop for Pulling {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

pub(super) async fn pull(State(hub): State<Arc<Hub>>, body: Received) -> Result<Response, Ollama> {
    let (body, _): (Body, _) = read(body)?;
    let name = body.model.or(body.name).unwrap_or_default();
    let mut pulling = match begin(&hub, &name) {
        Err(error) if error.status != StatusCode::SERVICE_UNAVAILABLE => {
            // Clients that have models pulled before they ask them want to hear that one is there.
            let catalog = hub.clone();
            let found = blocking(move || catalog.catalog.find(&name)).await?;
            found.map(|_| Pulling::done()).map_err(|_| error)?
        }
        begun => begun?,
    };
    if body.stream.unwrap_or(true) {
        return Ok(body::lines(stream::unfold(pulling, |mut pulling| async move {
            let line = pulling.lines.recv().await?;
            Some((Ok::<_, Infallible>(line.unwrap_or_else(|error| error.ollama())), pulling))
        })));
    }
    let mut last = Value::Null;
    while let Some(line) = pulling.lines.recv().await {
        last = line?;
    }
    Ok(Json(last).into_response())
}

fn begin(hub: &Hub, name: &str) -> ApiResult<Pulling> {
    if name.is_empty() {
        return Err(ApiError::of("model", "model is required"));
    }
    let name = HubName::parse(name).map_err(|error| {
        let hint = error.hint().unwrap_or_default();
        ApiError::of("model", format!("{error}; {hint}"))
    })?;
    let Some(puller) = hub.settings.puller.clone() else {
        let why = "this server has no cache to fetch models into";
        return Err(ApiError::new(StatusCode::NOT_IMPLEMENTED, why));
    };
    let permit = hub.pulls.clone().try_acquire_owned().map_err(|_| ApiError::busy())?;
    let (sender, lines) = channel(LINES_MAX);
    let cancel = Cancel::new();
    let of_client = cancel.clone();
    tokio::task::spawn_blocking(move || {
        let _permit: OwnedSemaphorePermit = permit;
        let told = Told { lines: &sender, is_checked: AtomicBool::new(false) };
        let last = match puller.pull(&name, &told, &of_client) {
            Ok(_) => Ok(success()),
            Err(error) => Err(failed(&error)),
        };
        let _ = sender.blocking_send(last);
    });
    Ok(Pulling { lines, cancel })
}

/// Tells of a pull in Ollama's words.
struct Told<'a> {
    lines: &'a Sender<Line>,
    is_checked: AtomicBool,
}

impl Told<'_> {
    /// A client that has gone cancels the pull itself.
    fn status(&self, status: impl Into<Value>) {
        let _ = self.lines.blocking_send(Ok(json!({ "status": status.into() })));
    }
}

impl Observer for Told<'_> {
    fn report(&self, event: Event<'_>) {
        match event {
            Event::Asking => self.status("pulling manifest"),
            Event::Waiting(path) => self.status(format!("waiting for another pull of {path}")),
            Event::Retrying { why, wait } => {
                self.status(format!("{why}; trying again in {} s", wait.as_secs()));
            }
            Event::Fetching(files) => {
                for file in files.iter().filter(|file| file.done_bytes > 0) {
                    let _ = self.lines.try_send(Ok(progress(file)));
                }
            }
            Event::Checking(file) => {
                // The last word of each, which no client misses.
                let _ = self.lines.blocking_send(Ok(progress(file)));
                if !self.is_checked.swap(true, Ordering::Relaxed) {
                    self.status("verifying sha256 digest");
                }
            }
            Event::Linking => self.status("writing manifest"),
            _ => {}
        }
    }
}

fn success() -> Value {
    json!({ "status": "success" })
}

fn progress(file: &FileState) -> Value {
    json!({
        "status": format!("pulling {}", &file.sha256[..12]),
        "digest": format!("sha256:{}", file.sha256),
        "total": file.bytes,
        "completed": file.done_bytes,
    })
}

fn failed(error: &Error) -> ApiError {
    let status = match error {
        Error::Store(error) => match error {
            tierstream_store::Error::NotInRepository { .. } => StatusCode::NOT_FOUND,
            _ => StatusCode::BAD_REQUEST,
        },
        Error::NoRepository(_) => StatusCode::NOT_FOUND,
        Error::Gated(_) | Error::Refused(_) => StatusCode::FORBIDDEN,
        Error::Unreachable { .. } | Error::Answer { .. } | Error::Hash { .. } => {
            StatusCode::BAD_GATEWAY
        }
        Error::NoSpace { .. } => StatusCode::INSUFFICIENT_STORAGE,
        Error::Offline(_) => StatusCode::SERVICE_UNAVAILABLE,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    };
    let hint = error.hint().map_or(String::new(), |hint| format!("; {hint}"));
    ApiError::new(status, format!("{error}{hint}"))
}

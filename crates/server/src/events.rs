//! Events that a server sends.

use axum::http::{HeaderName, HeaderValue};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::{Stream, StreamExt, stream};
use serde_json::Value;

use crate::generation::Generation;
use crate::hub::Hub;
use crate::overdue::Overdue;

/// What makes an answer's events, in turn.
pub(crate) trait Chunks: Send + 'static {
    /// JSON, or its text.
    type Chunk: Send + 'static;

    /// What they are of.
    fn generation(&self) -> &Generation;

    /// The next ones; none at the end.
    fn next(&mut self) -> impl Future<Output = Option<Vec<Self::Chunk>>> + Send;
}

/// An answer of events; `[DONE]` is the last.
pub(crate) fn events(hub: &Hub, chunks: impl Chunks<Chunk = String>) -> Response {
    let overdue = chunks.generation().overdue();
    let texts =
        stream::unfold(chunks, |mut chunks| async move { Some((chunks.next().await?, chunks)) });
    let all = texts.flat_map(stream::iter).chain(stream::once(async { "[DONE]".to_owned() }));
    respond(hub, overdue, all.map(|data| Event::default().data(data)))
}

/// An answer of events whose names are their types.
pub(crate) fn named_events(hub: &Hub, chunks: impl Chunks<Chunk = Value>) -> Response {
    let overdue = chunks.generation().overdue();
    let values =
        stream::unfold(chunks, |mut chunks| async move { Some((chunks.next().await?, chunks)) });
    respond(
        hub,
        overdue,
        values.flat_map(stream::iter).map(|value| {
            // The name first, as clients that read line by line expect it.
            let event = match value["type"].as_str() {
                Some(name) => Event::default().event(name),
                None => Event::default(),
            };
            event.data(value.to_string())
        }),
    )
}

fn respond(
    hub: &Hub,
    overdue: Overdue,
    events: impl Stream<Item = Event> + Send + 'static,
) -> Response {
    let ping = KeepAlive::new().interval(hub.settings.ping).text("ping");
    let mut response = Sse::new(overdue.cut(events)).keep_alive(ping).into_response();
    // Or nginx collects the events.
    let unbuffered = HeaderName::from_static("x-accel-buffering");
    response.headers_mut().insert(unbuffered, HeaderValue::from_static("no"));
    response
}

//! Bodies of requests and of answers. What all requests take until they are tokens is bounded, and so is the time
//! in which a body comes.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, HttpBody};
use axum::extract::{FromRequest, Request};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_util::{Stream, StreamExt};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout, timeout_at};

use crate::error::{ApiError, ApiResult};
use crate::hub::Hub;

/// Time in which a body comes, all of it: what of it is there holds memory that others may want.
const BODY_TIME_MAX: Duration = Duration::from_secs(60);

/// How often the text of a body is in memory at most: as it grows, and then as JSON, as prompt and as tokens.
const COPIES: usize = 4;

/// Bytes that `serde_json` takes for a value beside its text, with what the list that it is in has grown ahead.
const VALUE_BYTES: usize = 96;

/// Bytes that it takes for a list or an object with a single value in it.
const COLLECTION_BYTES: usize = 480;

/// Bytes that are given out as one.
const UNIT_BYTES: usize = 1 << 10;

/// Memory for requests until they are tokens.
#[derive(Debug)]
pub(crate) struct Bodies {
    free: Arc<Semaphore>,
    units: usize,
}

/// A part of this memory, given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Room(OwnedSemaphorePermit);

impl Bodies {
    pub(crate) fn new(bytes: usize) -> Self {
        let units = (bytes / UNIT_BYTES).min(Semaphore::MAX_PERMITS);
        Self { free: Arc::new(Semaphore::new(units)), units }
    }

    /// Room for so many bytes. Nobody waits for it: those who had some already could wait for each other.
    fn room(&self, bytes: usize) -> ApiResult<Room> {
        let units = bytes.div_ceil(UNIT_BYTES);
        if units > self.units {
            let why = "the body is too large: it has too many values";
            return Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, why));
        }
        let units = u32::try_from(units).unwrap_or(u32::MAX);
        match self.free.clone().try_acquire_many_owned(units) {
            Ok(permit) => Ok(Room(permit)),
            Err(_) => Err(ApiError::unavailable(
                "the requests that are being read take all memory there is for them; try again later",
            )),
        }
    }

    /// Has a room grow to so many bytes.
    fn grow(&self, room: &mut Room, bytes: usize) -> ApiResult<()> {
        let missing = bytes.saturating_sub(room.0.num_permits() * UNIT_BYTES);
        room.0.merge(self.room(missing)?.0);
        Ok(())
    }

    /// Room for JSON that is kept of a request.
    pub(crate) fn room_of(&self, json: &Map<String, Value>) -> ApiResult<Room> {
        let json = serde_json::to_vec(json).expect("a map with texts as keys is JSON");
        self.room(weight(&json))
    }
}

/// Bytes of memory that a body of JSON takes at most until it is tokens.
fn weight(body: &[u8]) -> usize {
    let (mut values, mut collections, mut in_text) = (0, 0, false);
    let mut bytes = body.iter();
    while let Some(byte) = bytes.next() {
        match byte {
            b'"' => in_text = !in_text,
            b'\\' if in_text => {
                bytes.next();
            }
            b',' if !in_text => values += 1,
            b'[' | b'{' if !in_text => collections += 1,
            _ => {}
        }
    }
    COPIES * body.len() + VALUE_BYTES * values + COLLECTION_BYTES * collections
}

/// The body of a request, as far as it came.
pub(crate) struct Received(ApiResult<(Vec<u8>, Admission)>);

/// What a request has of the server: memory until it is tokens and this is dropped, and time.
#[derive(Debug, Clone)]
pub(crate) struct Admission {
    _room: Arc<Room>,
    /// When it is to be answered by.
    pub(crate) deadline: Instant,
}

impl Admission {
    /// What comes of this, if it does in the request's time.
    pub(crate) async fn within<T>(&self, work: impl Future<Output = ApiResult<T>>) -> ApiResult<T> {
        timeout_at(self.deadline, work).await.map_err(|_| ApiError::late())?
    }
}

impl FromRequest<Arc<Hub>> for Received {
    type Rejection = Infallible;

    async fn from_request(request: Request, hub: &Arc<Hub>) -> Result<Self, Infallible> {
        let deadline = Instant::now() + hub.settings.deadline;
        let received = receive(hub, request.into_body());
        let received = timeout(BODY_TIME_MAX, received).await.unwrap_or_else(|_| {
            let why = format!("the body has not come within {} s", BODY_TIME_MAX.as_secs());
            Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, why))
        });
        Ok(Self(received.map(|(body, room)| {
            let room = Arc::new(room);
            (body, Admission { _room: room, deadline })
        })))
    }
}

async fn receive(hub: &Hub, body: Body) -> ApiResult<(Vec<u8>, Room)> {
    let most = hub.settings.body_bytes_max;
    let check = |bytes: u64| match usize::try_from(bytes) {
        Ok(bytes) if bytes <= most => Ok(()),
        _ => {
            let why = format!("the body is too large: it may have {most} bytes");
            Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, why))
        }
    };
    check(body.size_hint().lower())?;
    let mut room = hub.bodies.room(0)?;
    let mut bytes = Vec::new();
    let mut pieces = body.into_data_stream();
    while let Some(piece) = pieces.next().await {
        let piece =
            piece.map_err(|error| ApiError::bad(format!("the body has not come: {error}")))?;
        check((bytes.len() + piece.len()) as u64)?;
        // Not all that it is going to have: who only says that much would come has nothing of it.
        hub.bodies.grow(&mut room, COPIES * (bytes.len() + piece.len()))?;
        bytes.extend_from_slice(&piece);
    }
    hub.bodies.grow(&mut room, weight(&bytes))?;
    Ok((bytes, room))
}

/// Reads JSON, whatever the request says that its body is: curl says that it is a form. An empty body is
/// an empty object.
pub(crate) fn read<T: DeserializeOwned>(received: Received) -> ApiResult<(T, Admission)> {
    let (body, admission) = received.0?;
    let body = if body.is_empty() { b"{}" } else { &body[..] };
    match serde_json::from_slice(body) {
        Ok(read) => Ok((read, admission)),
        Err(error) => Err(ApiError::bad(format!("the body is not as it should be: {error}"))),
    }
}

/// An answer of lines of JSON.
pub(crate) fn lines(values: impl Stream<Item = Value> + Send + 'static) -> Response {
    let lines = values.map(|value| Ok::<_, Infallible>(format!("{value}\n")));
    ([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_weigh_more_than_text() {
        assert_eq!(weight(br#""a,[{\",[{""#), 11 * COPIES);
        assert_eq!(weight(b"[1,2]"), 5 * COPIES + VALUE_BYTES + COLLECTION_BYTES);
        assert_eq!(weight(br#"{"a":{}}"#), 8 * COPIES + 2 * COLLECTION_BYTES);
    }

    #[test]
    fn rooms_are_given_back() {
        let bodies = Bodies::new(4 * UNIT_BYTES);
        let mut room = bodies.room(UNIT_BYTES).expect("there is room");
        bodies.grow(&mut room, 4 * UNIT_BYTES).expect("there is room");
        let status = |bytes| bodies.room(bytes).expect_err("there is none").status;
        assert_eq!(status(1), StatusCode::SERVICE_UNAVAILABLE);
        // Nor will there ever be.
        assert_eq!(status(5 * UNIT_BYTES), StatusCode::PAYLOAD_TOO_LARGE);
        drop(room);
        bodies.room(4 * UNIT_BYTES).expect("there is room");
    }
}

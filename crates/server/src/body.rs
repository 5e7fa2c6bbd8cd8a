//! Bodies of requests and of answers. What all requests take until they are tokens is bounded, so is what those of one
//! peer take of it, and the time in which a body comes.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::BoxError;
use axum::body::{Body, HttpBody};
use axum::extract::{FromRequest, Request};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_util::{Stream, StreamExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use tokio::time::{Instant, timeout, timeout_at};

use crate::error::{ApiError, ApiResult};
use crate::hub::Hub;
use crate::peers::Peer;

/// Time in which a body comes, all of it: what of it is there holds memory that others may want.
const BODY_TIME_MAX: Duration = Duration::from_secs(60);

/// How often the text of a body is in memory at most: as it grows, and then as JSON, as prompt and as tokens.
const COPIES: usize = 4;

/// Bytes that `serde_json` takes for a value beside its text, with what the list that it is in has grown ahead.
const VALUE_BYTES: usize = 96;

/// Bytes that it takes for a list or an object with a single value in it.
const COLLECTION_BYTES: usize = 480;

/// Of the memory for all requests, what one peer may have: the largest body with its values, and not all.
const SHARE: (usize, usize) = (5, 8);

/// Memory for requests until they are tokens.
#[derive(Debug)]
pub(crate) struct Bodies {
    bytes: usize,
    taken: Arc<Mutex<Taken>>,
}

/// Bytes that are given out.
#[derive(Debug, Default)]
struct Taken {
    all: usize,
    by_peer: HashMap<Peer, usize>,
}

/// A part of this memory, given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Room {
    taken: Arc<Mutex<Taken>>,
    peer: Peer,
    bytes: AtomicUsize,
}

impl Bodies {
    pub(crate) fn new(bytes: usize) -> Self {
        Self { bytes, taken: Arc::default() }
    }

    /// Room for so many bytes. Nobody waits for it: those who had some already could wait for each other.
    fn room(&self, peer: Peer, bytes: usize) -> ApiResult<Room> {
        let room = Room { taken: self.taken.clone(), peer, bytes: AtomicUsize::new(0) };
        self.grow(&room, bytes)?;
        Ok(room)
    }

    /// What one peer may have.
    fn share(&self) -> usize {
        self.bytes / SHARE.1 * SHARE.0
    }

    /// Has a room grow to so many bytes.
    fn grow(&self, room: &Room, bytes: usize) -> ApiResult<()> {
        let share = self.share();
        if bytes > share {
            let why = "the body is too large: it has too many values";
            return Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, why));
        }
        let mut taken = lock(&self.taken);
        let missing = bytes.saturating_sub(room.bytes.load(Ordering::Relaxed));
        let of_peer = taken.by_peer.get(&room.peer).copied().unwrap_or(0);
        if taken.all + missing > self.bytes || of_peer + missing > share {
            return Err(ApiError::unavailable(
                "the requests that are being read take all memory there is for them; try again later",
            ));
        }
        if missing > 0 {
            taken.all += missing;
            taken.by_peer.insert(room.peer, of_peer + missing);
            room.bytes.fetch_add(missing, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Room for JSON that is kept of a request, which has its own until it is tokens.
    pub(crate) fn room_beside(
        &self,
        request: &Admission,
        json: &Map<String, Value>,
    ) -> ApiResult<Room> {
        let json = serde_json::to_vec(json).expect("a map with texts as keys is JSON");
        let bytes = weight(&json);
        if request.room.bytes.load(Ordering::Relaxed) + bytes > self.share() {
            let why = "the body is too large: there is no room for what the answer repeats of it \
                       (instructions, tools, metadata)";
            return Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, why));
        }
        self.room(request.room.peer, bytes)
    }
}

impl Room {
    /// Gives back what is above so many bytes.
    fn shrink(&self, bytes: usize) {
        let mut taken = lock(&self.taken);
        let had = self.bytes.fetch_min(bytes, Ordering::Relaxed);
        let less = had.saturating_sub(bytes);
        taken.all -= less;
        if let Some(of_peer) = taken.by_peer.get_mut(&self.peer) {
            *of_peer -= less;
            if *of_peer == 0 {
                taken.by_peer.remove(&self.peer);
            }
        }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.shrink(0);
    }
}

fn lock(taken: &Mutex<Taken>) -> MutexGuard<'_, Taken> {
    taken.lock().unwrap_or_else(PoisonError::into_inner)
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

/// What a request has of the server: memory until it is tokens and this is dropped, a turn, and time.
#[derive(Debug, Clone)]
pub(crate) struct Admission {
    room: Arc<Room>,
    pub(crate) asked: std::time::Instant,
    /// When it is to be answered by.
    pub(crate) deadline: Instant,
}

impl Admission {
    /// Whose turn it is computed in.
    pub(crate) fn peer(&self) -> Peer {
        self.room.peer
    }

    /// All that is left of the request in memory is so many bytes.
    pub(crate) fn shrink(&self, bytes: usize) {
        self.room.shrink(bytes);
    }

    /// What comes of this, if it does in the request's time.
    pub(crate) async fn within<T>(&self, work: impl Future<Output = ApiResult<T>>) -> ApiResult<T> {
        timeout_at(self.deadline, work).await.map_err(|_| ApiError::late())?
    }
}

impl FromRequest<Arc<Hub>> for Received {
    type Rejection = Infallible;

    async fn from_request(request: Request, hub: &Arc<Hub>) -> Result<Self, Infallible> {
        let asked = Instant::now();
        let deadline = asked + hub.settings.deadline;
        let peer = Peer::of(&request, !hub.settings.api_keys.is_empty());
        let received = receive(hub, peer, request.into_body());
        let received = timeout(BODY_TIME_MAX, received).await.unwrap_or_else(|_| {
            let why = format!("the body has not come within {} s", BODY_TIME_MAX.as_secs());
            Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, why))
        });
        Ok(Self(received.map(|(body, room)| {
            let room = Arc::new(room);
            (body, Admission { room, asked: asked.into_std(), deadline })
        })))
    }
}

async fn receive(hub: &Hub, peer: Peer, body: Body) -> ApiResult<(Vec<u8>, Room)> {
    let most = hub.settings.body_bytes_max;
    let check = |bytes: u64| match usize::try_from(bytes) {
        Ok(bytes) if bytes <= most => Ok(()),
        _ => {
            let why = format!("the body is too large: it may have {most} bytes");
            Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, why))
        }
    };
    check(body.size_hint().lower())?;
    let room = hub.bodies.room(peer, 0)?;
    let mut bytes = Vec::new();
    let mut pieces = body.into_data_stream();
    while let Some(piece) = pieces.next().await {
        let piece =
            piece.map_err(|error| ApiError::bad(format!("the body has not come: {error}")))?;
        check((bytes.len() + piece.len()) as u64)?;
        // Not all that it is going to have: who only says that much would come has nothing of it.
        hub.bodies.grow(&room, COPIES * (bytes.len() + piece.len()))?;
        bytes.extend_from_slice(&piece);
    }
    hub.bodies.grow(&room, weight(&bytes))?;
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

/// A value as JSON.
pub(crate) fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("answers have texts as keys, and cannot fail")
}

/// An answer of lines of JSON.
pub(crate) fn lines<T: Serialize, E: Into<BoxError> + 'static>(
    values: impl Stream<Item = Result<T, E>> + Send + 'static,
) -> Response {
    let lines = values.map(|value| value.map(|value| json(&value) + "\n"));
    ([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response()
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use super::*;

    #[test]
    fn values_weigh_more_than_text() {
        assert_eq!(weight(br#""a,[{\",[{""#), 11 * COPIES);
        assert_eq!(weight(b"[1,2]"), 5 * COPIES + VALUE_BYTES + COLLECTION_BYTES);
        assert_eq!(weight(br#"{"a":{}}"#), 8 * COPIES + 2 * COLLECTION_BYTES);
    }

    #[test]
    fn rooms_are_given_back() {
        let bodies = Bodies::new(8000);
        let [one, other] = [1, 2].map(|n| Peer::Address(IpAddr::V4(Ipv4Addr::new(10, 0, 0, n))));
        let room = bodies.room(one, 1000).expect("there is room");
        bodies.grow(&room, 5000).expect("there is room");
        let status = |peer, bytes| bodies.room(peer, bytes).expect_err("there is none").status;
        // The peer has its share, and others have the rest.
        assert_eq!(status(one, 1), StatusCode::SERVICE_UNAVAILABLE);
        let rest = bodies.room(other, 3000).expect("there is room");
        assert_eq!(status(other, 1), StatusCode::SERVICE_UNAVAILABLE);
        // Nor will there ever be.
        assert_eq!(status(other, 5001), StatusCode::PAYLOAD_TOO_LARGE);
        room.shrink(2000);
        bodies.room(one, 3000).expect("there is room");
        room.shrink(4000);
        bodies.room(one, 3000).expect("it has not grown");
        drop((room, rest));
        bodies.room(other, 5000).expect("there is room");
        let taken = lock(&bodies.taken);
        assert!(taken.all == 0 && taken.by_peer.is_empty());
    }

    /// The largest body has its memory, with some values.
    #[test]
    fn the_largest_body_fits() {
        let settings = crate::settings::Settings::default();
        let bodies = Bodies::new(settings.bodies_bytes_max);
        let bytes = COPIES * settings.body_bytes_max + 10_000 * VALUE_BYTES;
        bodies.room(Peer::Address(Ipv4Addr::LOCALHOST.into()), bytes).expect("there is room");
    }
}

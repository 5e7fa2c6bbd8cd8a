//! Bodies of requests and of answers.

use std::convert::Infallible;

use axum::body::{Body, Bytes};
use axum::extract::rejection::BytesRejection;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use futures_util::{Stream, StreamExt};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::error::{ApiError, ApiResult};

/// The body of a request, as far as it came.
pub(crate) type Received = Result<Bytes, BytesRejection>;

/// Reads JSON, whatever the request says that its body is: curl says that it is a form. An empty body is
/// an empty object.
pub(crate) fn read<T: DeserializeOwned>(body: Received) -> ApiResult<T> {
    let body = body.map_err(|refused| ApiError::new(refused.status(), refused.body_text()))?;
    let body = if body.is_empty() { Bytes::from_static(b"{}") } else { body };
    serde_json::from_slice(&body)
        .map_err(|error| ApiError::bad(format!("the body is not as it should be: {error}")))
}

/// An answer of lines of JSON.
pub(crate) fn lines(values: impl Stream<Item = Value> + Send + 'static) -> Response {
    let lines = values.map(|value| Ok::<_, Infallible>(format!("{value}\n")));
    ([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response()
}

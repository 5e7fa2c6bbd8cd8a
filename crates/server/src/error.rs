//! Why a request failed, in the shape of each dialect.

use std::error::Error as _;

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use tierstream_store::{Error as StoreError, Readers};

use crate::engine::EngineError;

/// A request that failed, or a wish that cannot be met.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    pub(crate) status: StatusCode,
    pub(crate) message: String,
    /// OpenAI's `param`.
    pub(crate) param: Option<&'static str>,
    /// OpenAI's `code`.
    pub(crate) code: Option<&'static str>,
}

/// The `code` of prompts that do not fit the context, by which clients know that they have to shorten them.
const TOO_LONG: &str = "context_length_exceeded";

pub(crate) type ApiResult<T> = Result<T, ApiError>;

/// Seconds after which a client that found the queue full may try again.
const RETRY_AFTER: &str = "2";

impl ApiError {
    pub(crate) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None, code: None }
    }

    pub(crate) fn bad(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    pub(crate) fn of(param: &'static str, message: impl Into<String>) -> Self {
        Self { param: Some(param), ..Self::bad(message) }
    }

    pub(crate) fn no_model(message: impl Into<String>) -> Self {
        Self { code: Some("model_not_found"), ..Self::new(StatusCode::NOT_FOUND, message) }
    }

    /// The prompt does not fit the context.
    pub(crate) fn too_long(message: impl Into<String>) -> Self {
        Self { code: Some(TOO_LONG), ..Self::bad(message) }
    }

    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    }

    /// There may be room for it later.
    pub(crate) fn unavailable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, message)
    }

    pub(crate) fn busy() -> Self {
        Self::unavailable("too many requests wait already; try again later")
    }

    /// The model's thread has ended.
    pub(crate) fn stopped() -> Self {
        Self::unavailable("the model has stopped; try again")
    }

    /// The request's time is over.
    pub(crate) fn late() -> Self {
        Self::new(StatusCode::GATEWAY_TIMEOUT, "that took longer than the server allows")
    }

    /// An answer that breaks off.
    pub(crate) fn endless() -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "the answer has no end")
    }

    pub(crate) fn openai(&self) -> Value {
        let kind = match self.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::NOT_IMPLEMENTED => "not_supported_error",
            StatusCode::SERVICE_UNAVAILABLE => "unavailable_error",
            status if status.is_client_error() => "invalid_request_error",
            _ => "server_error",
        };
        json!({"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}})
    }

    pub(crate) fn ollama(&self) -> Value {
        json!({ "error": self.message })
    }

    pub(crate) fn anthropic(&self) -> Value {
        let kind = match self.status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            413 => "request_too_large",
            504 => "timeout_error",
            503 => "overloaded_error",
            400..500 => "invalid_request_error",
            _ => "api_error",
        };
        // Clients know by these words that they have to shorten it.
        let begins = if self.code == Some(TOO_LONG) { "prompt is too long: " } else { "" };
        let message = format!("{begins}{}", self.message);
        json!({"type": "error", "error": {"type": kind, "message": message}})
    }

    /// With this body.
    pub(crate) fn respond(&self, body: &Value) -> Response {
        let mut response = (self.status, axum::Json(body)).into_response();
        if self.status == StatusCode::SERVICE_UNAVAILABLE {
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, HeaderValue::from_static(RETRY_AFTER));
        }
        if matches!(self.status.as_u16(), 408 | 413 | 503) {
            // There may be more of the body, which nobody reads, so that no other request can follow it.
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}

impl From<EngineError> for ApiError {
    fn from(error: EngineError) -> Self {
        let status = match error {
            EngineError::Refused(_) => StatusCode::BAD_REQUEST,
            EngineError::Stopping => StatusCode::SERVICE_UNAVAILABLE,
            EngineError::NoRoom(_) | EngineError::Cancelled | EngineError::Failed(_) => {
                StatusCode::INTERNAL_SERVER_ERROR
            }
        };
        Self::new(status, error.to_string())
    }
}

impl From<tierstream_chat::Error> for ApiError {
    fn from(error: tierstream_chat::Error) -> Self {
        Self::bad(error.to_string())
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        match &error {
            // Its own words are about files, too, and about folders, which are nobody's business here.
            StoreError::NotFound { name, nearest, unreadable, .. } => {
                let nearest = match nearest.is_empty() {
                    true => String::new(),
                    false => format!("; there is {}", nearest.join(", ")),
                };
                let unsearched = unreadable.as_deref().map_or(String::new(), |error| {
                    let hint = hint(error).unwrap_or_else(|| IN_ITS_NOTES.into());
                    format!("; a store could not be searched (hint: {hint})")
                });
                Self::no_model(format!("there is no model {name:?}{nearest}{unsearched}"))
            }
            _ => {
                let cause = error.source().map_or(String::new(), |cause| format!(": {cause}"));
                let hint = hint(&error).map_or(String::new(), |hint| format!(" (hint: {hint})"));
                Self::bad(format!("{error}{cause}{hint}"))
            }
        }
    }
}

/// What tells of folders.
const IN_ITS_NOTES: &str = "the server's notes, when it starts, say which and why";

/// What the server's user can do about it, without a folder's name.
fn hint(error: &StoreError) -> Option<String> {
    match error {
        StoreError::Unreadable { readers: Readers::Owner, .. } => {
            Some(format!("its owner keeps it to itself; {IN_ITS_NOTES}"))
        }
        _ => error.hint(),
    }
}

/// In the shape of the dialect that the path is of.
pub(crate) fn respond(path: &str, error: ApiError) -> Response {
    match path {
        path if path.starts_with("/v1/messages") => Anthropic(error).into_response(),
        path if path.starts_with("/api/") => Ollama(error).into_response(),
        _ => OpenAi(error).into_response(),
    }
}

/// In Ollama's shape.
#[derive(Debug)]
pub(crate) struct Ollama(pub(crate) ApiError);

/// In OpenAI's shape.
#[derive(Debug)]
pub(crate) struct OpenAi(pub(crate) ApiError);

/// In Anthropic's shape.
#[derive(Debug)]
pub(crate) struct Anthropic(pub(crate) ApiError);

impl<E: Into<ApiError>> From<E> for Anthropic {
    fn from(error: E) -> Self {
        Self(error.into())
    }
}

impl IntoResponse for Anthropic {
    fn into_response(self) -> Response {
        self.0.respond(&self.0.anthropic())
    }
}

impl<E: Into<ApiError>> From<E> for Ollama {
    fn from(error: E) -> Self {
        Self(error.into())
    }
}

impl<E: Into<ApiError>> From<E> for OpenAi {
    fn from(error: E) -> Self {
        Self(error.into())
    }
}

impl IntoResponse for Ollama {
    fn into_response(self) -> Response {
        self.0.respond(&self.0.ollama())
    }
}

impl IntoResponse for OpenAi {
    fn into_response(self) -> Response {
        self.0.respond(&self.0.openai())
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    fn unreadable(readers: Readers) -> StoreError {
        let source = io::ErrorKind::PermissionDenied.into();
        StoreError::Unreadable { path: "/secret/models".into(), readers, source }
    }

    #[test]
    fn a_store_that_was_not_searched_is_told() {
        let told = |unreadable: Option<StoreError>| {
            let unreadable = unreadable.map(Box::new);
            let error = StoreError::NotFound { name: "a".into(), nearest: Vec::new(), unreadable };
            let error = ApiError::from(error);
            assert_eq!(
                (error.status, error.code),
                (StatusCode::NOT_FOUND, Some("model_not_found"))
            );
            assert!(!error.message.contains("/secret"), "{}", error.message);
            error.message
        };
        assert_eq!(told(None), "there is no model \"a\"");
        let group = told(Some(unreadable(Readers::Group("ollama".into()))));
        assert!(group.contains("a store could not be searched (hint: join the group"), "{group}");
        assert!(group.contains("usermod -aG ollama"), "{group}");
        let owner = told(Some(unreadable(Readers::Owner)));
        assert!(owner.contains("its owner keeps it to itself; the server's notes"), "{owner}");
        let unknown = told(Some(unreadable(Readers::Unknown)));
        assert!(unknown.contains("a store could not be searched (hint: the server's"), "{unknown}");
    }

    #[test]
    fn errors_of_stores_keep_their_hints() {
        let (name, path) = (String::from("a"), std::path::PathBuf::from("/m"));
        for (error, expected) in [
            (
                StoreError::Partial {
                    name: name.clone(),
                    path: path.clone(),
                    what: "short".into(),
                },
                "not complete: short (hint: fetch the model again",
            ),
            (StoreError::Split { name, path }, "(hint: fetch it from where it is from"),
            (
                unreadable(Readers::Group("ollama".into())),
                "cannot be read: permission denied (hint: join the group",
            ),
        ] {
            let message = ApiError::from(error).message;
            assert!(message.contains(expected), "{message}");
        }
    }
}

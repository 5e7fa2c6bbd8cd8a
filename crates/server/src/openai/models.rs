//! `/v1/models`.

use std::sync::Arc;
use std::time::UNIX_EPOCH;

use axum::Json;
use axum::extract::{Path, State};
use serde_json::{Value, json};

use crate::catalog::{Found, Header};
use crate::error::{ApiError, OpenAi};
use crate::hub::{Hub, blocking};

pub(super) async fn list(State(hub): State<Arc<Hub>>) -> Result<Json<Value>, OpenAi> {
    let models = blocking(move || {
        let readable = |found: Found| Some((hub.catalog.header(&found.path).ok()?, found));
        let all = hub.catalog.list().into_iter().filter_map(readable);
        all.map(|(header, found)| model(&found, &header)).collect::<Vec<_>>()
    });
    Ok(Json(json!({"object": "list", "data": models.await?})))
}

pub(super) async fn one(
    State(hub): State<Arc<Hub>>,
    Path(id): Path<String>,
) -> Result<Json<Value>, OpenAi> {
    let found = blocking(move || {
        let found = hub.catalog.find(&id)?;
        let header = hub.catalog.header(&found.path)?;
        Ok::<_, ApiError>(model(&found, &header))
    });
    Ok(Json(found.await??))
}

fn model(found: &Found, header: &Header) -> Value {
    let created = header.modified.duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    json!({
        "id": found.name,
        "object": "model",
        "created": created,
        "owned_by": found.tool.map_or("tierstream", tierstream_store::Tool::id),
        "meta": {
            "n_ctx_train": header.context_length,
            "n_params": header.parameters,
            "size": found.bytes,
        },
    })
}

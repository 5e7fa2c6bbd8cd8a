//! What models there are, and which are loaded.

use std::sync::Arc;
use std::time::SystemTime;

use axum::Json;
use axum::extract::State;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::body::{Received, read};
use crate::catalog::{self, Found, Header};
use crate::error::{ApiError, Ollama};
use crate::hub::{Hub, blocking};

pub(super) async fn tags(State(hub): State<Arc<Hub>>) -> Result<Json<Value>, Ollama> {
    let models = blocking(move || {
        let readable = |found: Found| Some((hub.catalog.header(&found.path).ok()?, found));
        let all = hub.catalog.list().into_iter().filter_map(readable);
        all.map(|(header, found)| tag(&found, &header)).collect::<Vec<_>>()
    });
    Ok(Json(json!({ "models": models.await? })))
}

fn tag(found: &Found, header: &Header) -> Value {
    json!({
        "name": found.name,
        "model": found.name,
        "modified_at": time(header.modified),
        "size": found.bytes,
        "digest": digest(found, header),
        "details": details(header),
    })
}

/// Names what a name leads to: weights, and what the name has beside them.
fn digest(found: &Found, header: &Header) -> String {
    let named = format!("{}\0{:?}", header.digest, found.layers);
    Sha256::digest(named.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn details(header: &Header) -> Value {
    json!({
        "parent_model": "",
        "format": "gguf",
        "family": header.architecture,
        "families": [header.architecture],
        "parameter_size": catalog::parameter_size(header.parameters),
        "quantization_level": header.quant,
    })
}

fn time(time: SystemTime) -> String {
    humantime::format_rfc3339_micros(time).to_string()
}

pub(super) async fn ps(State(hub): State<Arc<Hub>>) -> Json<Value> {
    let loaded = hub.loaded();
    let models = loaded.iter().map(|model| {
        let mut value = tag(&model.found, &model.header);
        value["size"] = (model.ram_bytes + model.vram_bytes).into();
        value["size_vram"] = model.vram_bytes.into();
        value["expires_at"] = time(model.expires()).into();
        value["context_length"] = model.limits.ctx.into();
        value
    });
    Json(json!({ "models": models.collect::<Vec<_>>() }))
}

#[derive(Deserialize, JsonSchema)]
#[schemars(rename = "OllamaShow")]
pub(super) struct Show {
    model: Option<String>,
    /// What it was called before.
    name: Option<String>,
}

pub(super) async fn show(
    State(hub): State<Arc<Hub>>,
    body: Received,
) -> Result<Json<Value>, Ollama> {
    let (body, _): (Show, _) = read(body)?;
    let name = body.model.or(body.name).unwrap_or_default();
    let shown = blocking(move || {
        let found = hub.catalog.find(&name)?;
        let header = hub.catalog.header(&found.path)?;
        let template = catalog::template(&found, &header, ("", ""))?;
        let capabilities = catalog::capabilities(&header, template.capabilities());
        let mut info = header.keys.clone();
        info.insert("general.parameter_count".into(), header.parameters.into());
        let layer = |path: &Option<std::path::PathBuf>| {
            path.as_deref().map(catalog::small_file).transpose()
        };
        let params = layer(&found.layers.params)?;
        let mut shown = json!({
            "modelfile": format!("FROM {}\n", found.name),
            "parameters": params.map(|text| parameters(&text)).unwrap_or_default(),
            "template": template.source(),
            "details": details(&header),
            "model_info": info,
            "capabilities": capabilities,
            "modified_at": time(header.modified),
        });
        if let Some(system) = layer(&found.layers.system)? {
            shown["system"] = system.into();
        }
        Ok::<_, ApiError>(shown)
    });
    Ok(Json(shown.await??))
}

/// A line for each, as in a model file: `stop "<|im_end|>"`.
fn parameters(json: &str) -> String {
    let Ok(Value::Object(all)) = serde_json::from_str(json) else { return String::new() };
    let lines = all.iter().flat_map(|(key, value)| match value {
        Value::Array(values) => values.iter().map(|value| (key, value)).collect(),
        value => vec![(key, value)],
    });
    lines.map(|(key, value)| format!("{key:<30} {value}")).collect::<Vec<_>>().join("\n")
}

//! The page at `/ui`, and the state that it asks for once a second.
//!
//! All figures of what happened only grow, so that any number of pages can look, each at its own pace, and take
//! differences; `run` and `load` tell when they begin anew.

use std::sync::Arc;

use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Redirect, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde::Serialize;

use crate::catalog;
use crate::engine::LayerCounters;
use crate::error::Ollama;
use crate::hub::{Hub, Running, blocking};

/// Nothing but what the server itself has, and no script or style in the page's text.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; \
                      connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

const SCRIPT: &str = "text/javascript; charset=utf-8";

/// What the page is made of: path, type, content.
const FILES: [(&str, &str, &str); 7] = [
    ("/ui", "text/html; charset=utf-8", include_str!("ui/index.html")),
    ("/ui/style.css", "text/css; charset=utf-8", include_str!("ui/style.css")),
    ("/ui/app.js", SCRIPT, include_str!("ui/app.js")),
    ("/ui/chat.js", SCRIPT, include_str!("ui/chat.js")),
    ("/ui/experts.js", SCRIPT, include_str!("ui/experts.js")),
    ("/ui/common.js", SCRIPT, include_str!("ui/common.js")),
    ("/ui/icon.svg", "image/svg+xml", include_str!("ui/icon.svg")),
];

pub(crate) fn routes() -> Router<Arc<Hub>> {
    let router = Router::new()
        // Relative, for servers behind a proxy that adds to the path.
        .route("/ui/", get(|| async { Redirect::permanent("../ui") }))
        .route("/ui/state", get(state));
    FILES.iter().fold(router, |router, &(path, kind, content)| {
        router.route(path, get(move || async move { file(kind, content) }))
    })
}

/// Whether a path is a part of the page itself, which tells nothing of the server.
pub(crate) fn is_page(path: &str) -> bool {
    path == "/ui/" || FILES.iter().any(|file| file.0 == path)
}

fn file(kind: &'static str, content: &'static str) -> Response {
    let headers = [
        (header::CONTENT_TYPE, kind),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        // Another version of the program may listen here tomorrow.
        (header::CACHE_CONTROL, "no-cache"),
    ];
    (headers, content).into_response()
}

#[derive(Serialize)]
struct Shown {
    version: &'static str,
    /// Names this run of the server.
    run: u64,
    /// Seconds since it began.
    time: f64,
    models: Vec<Model>,
}

#[derive(Serialize)]
struct Model {
    name: String,
    /// Names this load of it.
    load: u64,
    architecture: String,
    parameters: String,
    quantization: String,
    context_tokens: usize,
    load_seconds: f64,
    /// Until it is unloaded if nobody asks for it; none if it stays.
    rests_seconds: Option<f64>,
    ram_bytes: u64,
    vram_bytes: u64,
    sequences: Sequences,
    tokens: Tokens,
    /// Bytes of experts that stream; 0 where none do.
    expert_bytes: u64,
    pools: Vec<Pool>,
    drive: Rate,
    /// None without a GPU.
    gpu: Option<Rate>,
    evictions: u64,
    layers: Vec<Layer>,
    notes: Vec<String>,
}

#[derive(Serialize)]
struct Sequences {
    all: usize,
    busy: usize,
    waiting: usize,
}

#[derive(Serialize)]
struct Tokens {
    prompt: u64,
    written: u64,
}

/// Slots for experts in one kind of memory.
#[derive(Serialize)]
struct Pool {
    tier: &'static str,
    bytes: u64,
    filled_bytes: u64,
}

/// What came over a way, and what it can do at most, if that is known.
#[derive(Serialize)]
struct Rate {
    bytes: u64,
    limit_bytes_per_second: Option<f64>,
}

#[derive(Serialize)]
struct Layer {
    block: u32,
    vram: u64,
    ram: u64,
    drive: u64,
    /// By expert, modulo 2^32; empty where nobody looks at the routing.
    uses: Vec<u32>,
}

impl From<LayerCounters> for Layer {
    fn from(layer: LayerCounters) -> Self {
        let LayerCounters { block, from_vram, from_ram, from_drive, uses } = layer;
        Self { block, vram: from_vram, ram: from_ram, drive: from_drive, uses }
    }
}

impl From<&Running> for Model {
    fn from(model: &Running) -> Self {
        let counters = model.counters();
        let (busy, waiting) = model.requests();
        let (prompt, written) = model.tokens();
        let pool = |tier, bytes, filled_bytes| Pool { tier, bytes, filled_bytes };
        let pools = [
            pool("vram", counters.vram_pool_bytes, counters.vram_filled_bytes),
            pool("ram", counters.ram_pool_bytes, counters.ram_filled_bytes),
        ];
        let is_on_gpu = model.vram_bytes > 0;
        Self {
            name: model.found.name.clone(),
            load: model.load,
            architecture: model.header.architecture.clone(),
            parameters: catalog::parameter_size(model.header.parameters),
            quantization: model.header.quant.clone(),
            context_tokens: model.limits.ctx,
            load_seconds: model.load_time.as_secs_f64(),
            rests_seconds: model.rests_for().map(|time| time.as_secs_f64()),
            ram_bytes: model.ram_bytes,
            vram_bytes: model.vram_bytes,
            sequences: Sequences { all: model.limits.sequences, busy, waiting },
            tokens: Tokens { prompt, written },
            expert_bytes: counters.expert_bytes,
            pools: pools.into_iter().filter(|pool| pool.bytes > 0).collect(),
            drive: Rate { bytes: counters.drive_bytes, limit_bytes_per_second: model.rates.drive },
            gpu: is_on_gpu.then_some(Rate {
                bytes: counters.gpu_bytes,
                limit_bytes_per_second: model.rates.gpu,
            }),
            evictions: counters.evictions,
            layers: model.layer_counters().into_iter().map(Layer::from).collect(),
            notes: model.notes.clone(),
        }
    }
}

async fn state(State(hub): State<Arc<Hub>>) -> Result<Response, Ollama> {
    // A model that computes may let its counters wait.
    let shown = blocking(move || Shown {
        version: env!("CARGO_PKG_VERSION"),
        run: hub.run,
        time: hub.age().as_secs_f64(),
        models: hub.loaded().iter().map(|model| Model::from(&**model)).collect(),
    });
    Ok(([(header::CACHE_CONTROL, "no-store")], Json(shown.await?)).into_response())
}

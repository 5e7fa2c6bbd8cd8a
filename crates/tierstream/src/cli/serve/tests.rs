//! The server with the real engine and a drive that has bad places.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::body::{Body, to_bytes};
use axum::http::{Request, StatusCode};
use clap::Parser;
use serde_json::{Value, json};
use tierstream::gguf::Experts;
use tierstream::io::engine::Engine as IoEngine;
use tierstream::io::wrap::{Action, Fault, Rule};
use tierstream_server::engine::{Engine, EngineError, Extra, LoadOptions, Loaded};
use tierstream_server::{Server, Settings};
use tierstream_store::{Environment, Store};
use tower::ServiceExt;

use super::Models;
use crate::cli::args::{Cli, Command};

const EIO: i32 = 5;

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/novelist-moe-31m-q4_0.gguf")
}

/// Some bytes of its drive cannot be read.
struct Damaged {
    models: Models,
    bytes: std::ops::Range<u64>,
}

impl Engine for Damaged {
    fn load(
        &self,
        path: &Path,
        asked: &LoadOptions,
        is_wanted: &(dyn Fn() -> bool + Sync),
    ) -> Result<Loaded, EngineError> {
        let rules = vec![Rule::all(Action::Errno(EIO)).bytes(self.bytes.clone())];
        let wrap: tierstream::io::Wrap =
            Box::new(|inner| -> Box<dyn IoEngine> { Box::new(Fault::new(inner, rules).unwrap()) });
        self.models.load_with(path, asked, is_wanted, |options| options.io.wrap = Some(wrap))
    }

    fn check(&self, path: &Path, ctx: Option<u32>) -> Result<(), EngineError> {
        self.models.check(path, ctx)
    }
}

fn server(sequences: u32, bytes: std::ops::Range<u64>) -> axum::Router {
    let sequences = sequences.to_string();
    let args = ["tierstream", "serve", "--experts", "25%", "-t", "1", "--parallel", &sequences];
    let Command::Serve(args) = Cli::parse_from(args).command else { panic!("it is serve") };
    let engine = Damaged { models: Models::new(&args, &args.prompts()), bytes };
    let extra = Extra { name: "demo".into(), path: demo() };
    let store = Store::new(&Environment::default());
    Server::new(Arc::new(engine), store, vec![extra], Settings::default()).router()
}

/// Short ones and long ones, so that not each of them needs every expert.
const PROMPTS: [(&str, u32); 6] = [
    ("I", 1),
    ("The sea was", 2),
    ("It was a cold evening in November, and the old gentleman sat by the fire,", 24),
    ("Yes", 1),
    ("Sir, said the captain, I have the honour to inform you that the ship", 40),
    ("And", 2),
];

async fn ask(router: axum::Router, prompt: &str, tokens: u32) -> (StatusCode, Value) {
    let body = json!({"model": "demo", "prompt": prompt, "raw": true, "stream": false,
        "options": {"temperature": 0, "num_predict": tokens}});
    let request = Request::post("/api/generate").header("host", "localhost");
    let request = request.body(Body::from(body.to_string())).unwrap();
    let response = router.oneshot(request).await.unwrap();
    let status = response.status();
    let body = to_bytes(response.into_body(), 1 << 20).await.unwrap();
    (status, serde_json::from_slice(&body).unwrap())
}

/// Of each prompt the text, or none where it failed because of the bad place.
fn told((status, answer): (StatusCode, Value)) -> Option<String> {
    if status == StatusCode::OK {
        return Some(answer["response"].as_str().unwrap().to_owned());
    }
    let error = answer["error"].as_str().unwrap();
    assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR, "{error}");
    assert!(error.contains(demo().to_str().unwrap()) && error.contains("offset"), "{error}");
    None
}

/// A bad place of the drive fails the requests that need what is there, whoever is computed with them, and
/// the others have the text that they have alone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_place_fails_those_that_need_it() {
    let file = tierstream::pack::open(&demo()).unwrap();
    let experts = Experts::group(&file).unwrap();
    let layer = &experts.layers()[2];
    let mut mixed = 0;
    for expert in 0..layer.experts {
        let extent = layer.parts[0].expert(expert);
        let bytes = extent.offset..extent.offset + extent.len;
        let (alone, together) = (server(1, bytes.clone()), server(6, bytes));
        let mut expected = Vec::new();
        for (prompt, tokens) in PROMPTS {
            expected.push(told(ask(alone.clone(), prompt, tokens).await));
        }
        let all = PROMPTS.map(|(prompt, tokens)| ask(together.clone(), prompt, tokens));
        let got: Vec<_> = futures_util::future::join_all(all).await.into_iter().map(told).collect();
        assert_eq!(got, expected, "expert {expert}");
        let failed = got.iter().filter(|text| text.is_none()).count();
        mixed += usize::from(failed > 0 && failed < got.len());
    }
    assert!(mixed > 0, "no expert that some of them need, and some do not");
}

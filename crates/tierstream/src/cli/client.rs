//! `tierstream ps` and `tierstream stop`: what a running server has loaded.

use std::io::ErrorKind;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tierstream::size::Bytes;
use ureq::Agent;
use ureq::tls::{RootCerts, TlsConfig};

use super::args::{Cli, Ps, ServerArgs, Stop};
use super::keys;
use super::output::{self, Failure};

/// Time for a connection.
const CONNECT_TIME: Duration = Duration::from_secs(5);

/// Time for an answer: to unload a model takes some.
const ANSWER_TIME: Duration = Duration::from_secs(120);

/// Bytes of an answer.
const ANSWER_BYTES_MAX: u64 = 16 << 20;

/// A time that is further away is no time.
const FOR_EVER: Duration = Duration::from_secs(10 * 365 * 86_400);

/// A server.
struct Server {
    agent: Agent,
    /// `HOST:PORT`.
    host: String,
    /// With its scheme.
    url: String,
    key: Option<String>,
}

/// What it has loaded: Ollama's answer to `/api/ps`.
#[derive(Debug, Deserialize)]
struct Loaded {
    models: Vec<Model>,
}

#[derive(Debug, Deserialize)]
struct Model {
    name: String,
    #[serde(default)]
    size: u64,
    #[serde(default)]
    size_vram: u64,
    context_length: Option<u64>,
    expires_at: Option<String>,
}

/// The answer of `ps`; `docs/json.md` tells what the fields are.
#[derive(Debug, Serialize)]
struct Answer {
    url: String,
    models: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    name: String,
    memory_bytes: u64,
    gpu_bytes: u64,
    ctx: Option<u64>,
    expires_at: Option<String>,
    /// Seconds until then; none if it stays.
    expires_s: Option<f64>,
}

pub(crate) fn ps(cli: &Cli, args: &Ps) -> anyhow::Result<ExitCode> {
    let server = Server::of(&args.server)?;
    let models = server.loaded()?.into_iter().map(Row::of).collect();
    let answer = Answer { url: server.url, models };
    if cli.json {
        output::json(&answer)?;
    } else if answer.models.is_empty() {
        output::note("no model is loaded");
    } else {
        output::print(&table(&answer.models))?;
    }
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn stop(cli: &Cli, args: &Stop) -> anyhow::Result<ExitCode> {
    let server = Server::of(&args.server)?;
    let before = server.loaded()?;
    server.ask("/api/generate", Some(&json!({ "model": args.model, "keep_alive": 0 })))?;
    let after = server.loaded()?;
    let is_left = |model: &&Model| !after.iter().any(|left| left.name == model.name);
    let stopped: Vec<&str> =
        before.iter().filter(is_left).map(|model| model.name.as_str()).collect();
    if cli.json {
        output::json(&json!({ "model": args.model, "stopped": stopped }))?;
        return Ok(ExitCode::SUCCESS);
    }
    let is_it = |model: &Model| model.name.eq_ignore_ascii_case(&args.model);
    if stopped.is_empty() {
        output::note(match after.iter().any(is_it) {
            true => "it goes when its requests are done",
            false => "it was not loaded",
        });
    }
    for name in stopped {
        output::print(&format!("stopped {}\n", output::printable(name)))?;
    }
    Ok(ExitCode::SUCCESS)
}

impl Server {
    fn of(args: &ServerArgs) -> anyhow::Result<Self> {
        let keys = args.api_keys.as_deref().map(keys::read).transpose()?;
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            // A proxy for the network is none for this machine, nor for one beside it.
            .proxy(None)
            .timeout_connect(Some(CONNECT_TIME))
            .timeout_global(Some(ANSWER_TIME));
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = TlsConfig::builder()
            .unversioned_rustls_crypto_provider(provider)
            .root_certs(RootCerts::PlatformVerifier);
        let agent = config.tls_config(tls.build()).build().new_agent();
        let host = reachable(&args.host.host);
        let scheme = if args.host.is_https { "https" } else { "http" };
        Ok(Self {
            agent,
            url: format!("{scheme}://{host}"),
            host,
            key: keys.and_then(|keys| keys.into_iter().next()),
        })
    }

    fn loaded(&self) -> anyhow::Result<Vec<Model>> {
        let answer = self.ask("/api/ps", None)?;
        let loaded: Loaded = serde_json::from_value(answer).map_err(|_| self.is_other())?;
        Ok(loaded.models)
    }

    /// What it answers: to GET, or with a body to POST.
    fn ask(&self, path: &str, body: Option<&Value>) -> anyhow::Result<Value> {
        let url = format!("{}{path}", self.url);
        let key = self.key.as_ref().map(|key| format!("Bearer {key}"));
        let sent = match body {
            None => {
                let request = self.agent.get(&url);
                key.into_iter().fold(request, |r, key| r.header("Authorization", key)).call()
            }
            Some(body) => {
                let request = self.agent.post(&url).header("Content-Type", "application/json");
                let request =
                    key.into_iter().fold(request, |r, key| r.header("Authorization", key));
                request.send(body.to_string())
            }
        };
        let mut response = sent.map_err(|error| self.is_not_there(&error))?;
        let status = response.status();
        let body = response.body_mut().with_config().limit(ANSWER_BYTES_MAX);
        let bytes = body.read_to_vec().map_err(|error| self.is_not_there(&error))?;
        let answer: Value = serde_json::from_slice(&bytes).map_err(|_| self.is_other())?;
        if status.is_success() {
            return Ok(answer);
        }
        // Keys are refused in the dialect of OpenAI.
        let error = &answer["error"];
        let said = error.as_str().or_else(|| error["message"].as_str());
        let hint = match status.as_u16() {
            401 => "--api-keys has the keys that the server was started with",
            _ => "`tierstream ps` tells which models are loaded",
        };
        Err(Failure::error(said.ok_or_else(|| self.is_other())?, hint))
    }

    fn is_not_there(&self, error: &ureq::Error) -> anyhow::Error {
        let hint =
            "`tierstream serve` starts a server; --host and OLLAMA_HOST say where one listens";
        match error {
            ureq::Error::Io(error) if error.kind() == ErrorKind::ConnectionRefused => {
                Failure::error(format!("nothing listens on {}", self.host), hint)
            }
            error => {
                Failure::error(format!("cannot ask the server at {}: {error}", self.host), hint)
            }
        }
    }

    fn is_other(&self) -> anyhow::Error {
        let hint = "--host and OLLAMA_HOST say where `tierstream serve` listens";
        Failure::error(format!("what listens on {} is no such server", self.host), hint)
    }
}

impl Row {
    fn of(model: Model) -> Self {
        let at = model.expires_at.as_deref();
        let at = at.and_then(|at| humantime::parse_rfc3339_weak(at).ok());
        let left = at.map(|at| at.duration_since(SystemTime::now()).unwrap_or_default());
        Self {
            name: model.name,
            memory_bytes: model.size,
            gpu_bytes: model.size_vram,
            ctx: model.context_length,
            expires_s: left.filter(|left| *left < FOR_EVER).map(|left| left.as_secs_f64()),
            expires_at: model.expires_at,
        }
    }
}

/// Where a server is reached that listens on all addresses of its machine.
fn reachable(address: &str) -> String {
    match address.rsplit_once(':') {
        Some(("0.0.0.0", port)) => format!("127.0.0.1:{port}"),
        Some(("[::]", port)) => format!("[::1]:{port}"),
        _ => address.to_owned(),
    }
}

fn table(rows: &[Row]) -> String {
    let cells = |row: &Row| {
        [
            row.name.clone(),
            Bytes(row.memory_bytes).to_string(),
            if row.gpu_bytes == 0 { "-".to_owned() } else { Bytes(row.gpu_bytes).to_string() },
            row.ctx.map_or("-".to_owned(), |ctx| ctx.to_string()),
            row.expires_s.map_or("stays".to_owned(), output::rough),
        ]
    };
    let titles = ["NAME", "MEMORY", "ON GPU", "CONTEXT", "GOES IN"].map(str::to_owned);
    output::table([titles].into_iter().chain(rows.iter().map(cells)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_addresses_are_reached_through_one() {
        for (listens, reached) in [
            ("0.0.0.0:11434", "127.0.0.1:11434"),
            ("[::]:1", "[::1]:1"),
            ("10.0.0.1:1", "10.0.0.1:1"),
            ("box:1", "box:1"),
        ] {
            assert_eq!(reachable(listens), reached);
        }
    }

    #[test]
    fn models_that_stay_go_at_no_time() {
        let goes = |at: &str| {
            let (name, expires_at) = ("m".to_owned(), Some(at.to_owned()));
            let model = Model { name, size: 1, size_vram: 0, context_length: None, expires_at };
            Row::of(model).expires_s
        };
        assert_eq!(goes("2020-01-01T00:00:00Z"), Some(0.0));
        assert_eq!(goes("9999-01-01T00:00:00Z"), None);
        assert_eq!(goes("soon"), None);
    }
}

//! What the server is told when it starts.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tierstream_pull::Puller;

use crate::hub::KeepAlive;
use crate::prompts::PromptCache;

/// Settings that hold for all requests.
#[derive(Debug, Clone)]
pub struct Settings {
    /// How long a model stays loaded when its requests say nothing.
    pub keep_alive: KeepAlive,
    /// Tokens of context where neither request nor model says a number; less if the model was trained with less.
    pub ctx: u32,
    /// Models that are loaded at the same time.
    pub models_max: usize,
    /// Requests of a model that wait for a sequence; more are refused.
    pub queue_max: usize,
    /// Bytes of a request's body.
    pub body_bytes_max: usize,
    /// Bytes of memory for all requests that are read at the same time, each until it is tokens.
    pub bodies_bytes_max: usize,
    /// Time that a request may take.
    pub deadline: Duration,
    /// Time that answers have to end when the server stops.
    pub grace: Duration,
    /// Where prompts are kept whose sequence goes to others.
    pub prompts: PromptCache,
    /// Time without an event after which clients, and proxies between, are told that an answer is still on its
    /// way.
    pub ping: Duration,
    /// Keys, of which a request needs one if there are any.
    pub api_keys: Vec<String>,
    /// Origins beside the local ones that browsers may call from, and whose hosts a request may name; `*`: all.
    pub origins: Vec<String>,
    /// What fetches models when a client asks for it; none: they are refused.
    pub puller: Option<Arc<Puller>>,
    /// The address that is listened on: on a local one, and without keys on any, a request has to name a local
    /// host, or that of an origin.
    pub listens: SocketAddr,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            keep_alive: KeepAlive::For(Duration::from_secs(300)),
            ctx: 4096,
            models_max: 1,
            queue_max: 512,
            // A million tokens of text, and as much again for JSON around it.
            body_bytes_max: 8 << 20,
            bodies_bytes_max: 64 << 20,
            deadline: Duration::from_secs(3600),
            grace: Duration::from_secs(3),
            prompts: PromptCache::default(),
            ping: Duration::from_secs(10),
            api_keys: Vec::new(),
            origins: Vec::new(),
            puller: None,
            listens: SocketAddr::from(([127, 0, 0, 1], 11434)),
        }
    }
}

/// Reads a time as Ollama does: `5m`, a number of seconds, or something below 0 for ever.
///
/// # Errors
/// What is wrong with it.
pub fn keep_alive(text: &str) -> Result<KeepAlive, String> {
    let text = text.trim();
    let wrong = || format!("{text:?} is no time: it is 300, 5m, 24h, 0, or -1 for ever");
    if let Ok(seconds) = text.parse::<f64>() {
        return of_seconds(seconds).ok_or_else(wrong);
    }
    match text.strip_prefix('-') {
        Some(rest) if humantime::parse_duration(rest).is_ok() => Ok(KeepAlive::Ever),
        Some(_) => Err(wrong()),
        None => humantime::parse_duration(text).map(KeepAlive::For).map_err(|_| wrong()),
    }
}

pub(crate) fn of_seconds(seconds: f64) -> Option<KeepAlive> {
    if seconds < 0.0 {
        return Some(KeepAlive::Ever);
    }
    Duration::try_from_secs_f64(seconds).ok().map(KeepAlive::For)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        let seconds = |n| Ok(KeepAlive::For(Duration::from_secs(n)));
        assert_eq!(keep_alive("5m"), seconds(300));
        assert_eq!(keep_alive("1h30m"), seconds(5400));
        assert_eq!(keep_alive("0"), seconds(0));
        assert_eq!(keep_alive("-1"), Ok(KeepAlive::Ever));
        assert_eq!(keep_alive("-1m"), Ok(KeepAlive::Ever));
        assert_eq!(keep_alive("5"), seconds(5));
        assert!(
            ["", "x", "NaN", "inf", "1e300", "-x"].iter().all(|text| keep_alive(text).is_err())
        );
    }
}

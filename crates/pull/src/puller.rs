//! A pull, from the name to the model.

use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use tierstream_store::{Environment, HubName, Secret, Store};
use ureq::http::Uri;

use crate::cache::Repo;
use crate::cancel::Cancel;
use crate::client::Client;
use crate::error::{Error, Result};
use crate::event::{Event, Observer};
use crate::fetch::{Fetch, Job};
use crate::hub::{self, Remote};
use crate::partial::Partial;
use crate::ranges::Ranges;
use crate::tries::{Failure, Tries};

/// Where the hub is.
const ENDPOINT: &str = "https://huggingface.co";

/// How models are fetched.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Options {
    /// Connections at a time.
    pub connections: usize,
    /// Bytes that one request asks for.
    pub piece_bytes: u64,
    /// Bytes of a file after which what has come is recorded, so that it is not fetched again.
    pub record_bytes: u64,
    /// Requests that fail in a row, without a byte, before it is given up.
    pub tries: u32,
    /// Time before the second try; each further one waits twice as long.
    pub first_wait: Duration,
    /// Time without a byte after which a connection counts as cut.
    pub idle: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            connections: 8,
            piece_bytes: 32 << 20,
            record_bytes: 128 << 20,
            tries: 8,
            first_wait: Duration::from_secs(1),
            idle: Duration::from_secs(30),
        }
    }
}

/// A model that is there as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Pulled {
    /// A name that finds it.
    pub name: String,
    /// Its file, in a snapshot of the cache; of a split model the first one.
    pub path: PathBuf,
    /// Bytes of all its files.
    pub bytes: u64,
    /// Those that were fetched now.
    pub fetched_bytes: u64,
}

/// Fetches models into the cache of the Hugging Face hub.
#[derive(Debug)]
pub struct Puller {
    cache: PathBuf,
    endpoint: Uri,
    token: Option<Secret>,
    is_offline: bool,
    options: Options,
}

impl Puller {
    /// By what the environment says of the cache, the hub and the token.
    ///
    /// # Errors
    /// [`Error::NoCache`], [`Error::Endpoint`], [`Error::Token`], and [`Error::Store`] if the token's file
    /// cannot be read.
    pub fn new(environment: &Environment, options: Options) -> Result<Self> {
        let cache = environment.hub_cache().ok_or(Error::NoCache)?;
        let endpoint = environment.hf_endpoint.as_deref().unwrap_or(ENDPOINT);
        let wrong = || Error::Endpoint(endpoint.to_owned());
        let uri: Uri = endpoint.parse().map_err(|_| wrong())?;
        let is_http = matches!(uri.scheme_str(), Some("https" | "http"));
        // A user in the address would be sent, and shown.
        let is_plain = uri.query().is_none() && !endpoint.contains('@');
        if !is_http || !is_plain || uri.host().is_none_or(str::is_empty) {
            return Err(wrong());
        }
        let token = environment.hub_token()?;
        let is_sent = |token: &Secret| token.reveal().bytes().all(|b| b.is_ascii_graphic());
        if token.as_ref().is_some_and(|token| !is_sent(token)) {
            return Err(Error::Token);
        }
        let is_offline = environment.hf_hub_offline;
        Ok(Self { cache, endpoint: uri, token, is_offline, options })
    }

    /// Fetches what is not there of the model that a name means. `observer` is told on this thread;
    /// `cancel` stops it from another one.
    ///
    /// # Errors
    /// All of [`Error`]. What has come stays, and the next pull goes on from there, but for
    /// [`Error::Hash`].
    pub fn pull(&self, name: &HubName, observer: &dyn Observer, cancel: &Cancel) -> Result<Pulled> {
        if self.is_offline {
            return self.found(&name.to_string(), 0).map_err(|_| Error::Offline(name.to_string()));
        }
        let client = Client::new(self.endpoint.clone(), self.token.clone(), self.options.idle);
        let _watched = cancel.watch(&client.agent);
        let stopped = |error| if cancel.is_cancelled() { Error::Cancelled } else { error };
        self.pull_with(&client, name, observer, cancel).map_err(stopped)
    }

    fn pull_with(
        &self,
        client: &Client,
        name: &HubName,
        observer: &dyn Observer,
        cancel: &Cancel,
    ) -> Result<Pulled> {
        observer.report(Event::Asking);
        let retried = |why: &str, wait| observer.report(Event::Retrying { why, wait });
        let listing = self.again(cancel, &retried, || hub::listing(client, name))?;
        let commit = &listing.commit;
        let chosen = name.choose(&listing.files)?;
        let remotes = self.remotes(client, name, commit, &chosen, cancel)?;
        let repo = Repo::create(&self.cache, name)?;
        let mut jobs = self.jobs(&repo, &remotes, observer, cancel)?;
        let lacks = |(job, done): &(Job, Ranges)| job.remote.bytes - done.bytes();
        let needed_bytes = jobs.iter().map(lacks).sum();
        check_room(&repo, needed_bytes)?;
        // As they were chosen, whatever the order of the locks.
        jobs.sort_by_key(|(job, _)| chosen.iter().position(|path| *path == job.remote.path));
        let repo_name = format!("{}/{}", name.owner(), name.repo());
        Fetch::new(client, &self.options, cancel, &repo_name, jobs).run(observer)?;
        observer.report(Event::Linking);
        for remote in &remotes {
            repo.link(commit, &remote.path, &remote.sha256)?;
        }
        repo.refer(commit)?;
        self.found(&format!("{repo_name}/{}", chosen[0]), needed_bytes)
    }

    /// What the hub tells of files; several are asked for at a time.
    fn remotes(
        &self,
        client: &Client,
        name: &HubName,
        commit: &str,
        paths: &[String],
        cancel: &Cancel,
    ) -> Result<Vec<Remote>> {
        let (next, found) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
        let ask = || {
            while let Some(path) = paths.get(next.fetch_add(1, Ordering::Relaxed)) {
                let remote = || hub::remote(client, name, commit, path);
                let remote = self.again(cancel, &|_, _| {}, remote);
                let is_last = remote.is_err();
                found.lock().unwrap_or_else(|e| e.into_inner()).push(remote);
                if is_last {
                    return;
                }
            }
        };
        thread::scope(|scope| {
            for _ in 0..self.options.connections.clamp(1, paths.len()) {
                scope.spawn(ask);
            }
        });
        let found = found.into_inner().unwrap_or_else(|e| e.into_inner());
        let mut remotes = found.into_iter().collect::<Result<Vec<Remote>>>()?;
        remotes.sort_by_key(|remote| paths.iter().position(|path| *path == remote.path));
        Ok(remotes)
    }

    /// The files that are not whole, each with the lock on it.
    fn jobs(
        &self,
        repo: &Repo,
        remotes: &[Remote],
        observer: &dyn Observer,
        cancel: &Cancel,
    ) -> Result<Vec<(Job, Ranges)>> {
        let mut missing: Vec<&Remote> = remotes.iter().collect();
        // Who locks several does so in the same order, so that two never wait for each other.
        missing.sort_by(|a, b| a.sha256.cmp(&b.sha256));
        missing.dedup_by(|a, b| a.sha256 == b.sha256);
        for whole in missing.extract_if(.., |remote| repo.has(&remote.sha256, remote.bytes)) {
            Partial::clear(repo, &whole.sha256).map_err(Error::io(&repo.blob(&whole.sha256)))?;
        }
        let mut jobs = Vec::new();
        for remote in missing {
            let waiting = || observer.report(Event::Waiting(&remote.path));
            let lock = repo.lock(&remote.sha256, cancel, &waiting)?;
            // Whoever had the lock may have fetched it.
            if !repo.has(&remote.sha256, remote.bytes) {
                let (partial, done) = Partial::open(repo, remote)?;
                jobs.push((Job::new(remote.clone(), partial, lock), done));
            }
        }
        Ok(jobs)
    }

    /// Makes a request until it succeeds, or is given up.
    fn again<T>(
        &self,
        cancel: &Cancel,
        retried: &dyn Fn(&str, Duration),
        request: impl Fn() -> Result<T, Failure>,
    ) -> Result<T> {
        let mut tries = Tries::new(self.options.tries.min(TRIES_TO_ASK), self.options.first_wait);
        loop {
            let failure = match request() {
                Ok(answer) => return Ok(answer),
                Err(_) if cancel.is_cancelled() => return Err(Error::Cancelled),
                Err(failure) => failure,
            };
            let (wait, error) = tries.next(failure)?;
            retried(&error.to_string(), wait);
            if cancel.wait(wait) {
                return Err(Error::Cancelled);
            }
        }
    }

    /// The model of that name in the cache, as others find it.
    fn found(&self, name: &str, fetched_bytes: u64) -> Result<Pulled> {
        let environment =
            Environment { hf_hub_cache: Some(self.cache.clone()), ..Environment::default() };
        let model = Store::new(&environment).find(name)?;
        let (name, path, bytes) = (model.name, model.path, model.bytes);
        Ok(Pulled { name, path, bytes, fetched_bytes })
    }
}

/// Requests before anything has come that are made in vain: somebody waits for the first sign.
const TRIES_TO_ASK: u32 = 4;

fn check_room(repo: &Repo, needed_bytes: u64) -> Result<()> {
    let path = &repo.folder;
    let told = rustix::fs::statvfs(path).map_err(|error| Error::io(path)(error.into()))?;
    let free_bytes = told.f_bavail.saturating_mul(told.f_frsize);
    match needed_bytes > free_bytes {
        true => Err(Error::NoSpace { path: path.clone(), needed_bytes, free_bytes }),
        false => Ok(()),
    }
}

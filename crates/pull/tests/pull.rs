//! Pulls from a hub on this machine.

mod support;

use std::cell::RefCell;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use support::{Act, COMMIT, Host, Hub, Random, model, sha256};
use tierstream_pull::{Cancel, Error, Event, Observer, Options, Pulled, Puller, Quiet};
use tierstream_store::{Environment, HubName, Secret, Store};

/// A hub, and a cache.
struct Site {
    hub: Hub,
    dir: tempfile::TempDir,
}

impl Site {
    fn new(files: &[(&str, Vec<u8>)]) -> Self {
        Self { hub: Hub::start(files), dir: tempfile::tempdir().unwrap() }
    }

    fn environment(&self) -> Environment {
        Environment {
            hf_hub_cache: Some(self.dir.path().to_owned()),
            hf_endpoint: Some(self.hub.url.clone()),
            hf_token: Some(Secret::new("hf_secret")),
            ..Environment::default()
        }
    }

    fn puller(&self, environment: &Environment) -> Puller {
        let mut options = Options::default();
        options.connections = 4;
        options.piece_bytes = PIECE;
        options.record_bytes = PIECE;
        options.tries = 20;
        options.first_wait = Duration::ZERO;
        Puller::new(environment, options).unwrap()
    }

    fn pull(&self, name: &str) -> Result<Pulled, Error> {
        self.pull_as(name, &Quiet, &Cancel::new())
    }

    fn pull_as(
        &self,
        name: &str,
        observer: &dyn Observer,
        cancel: &Cancel,
    ) -> Result<Pulled, Error> {
        let name = HubName::parse(name).unwrap();
        self.puller(&self.environment()).pull(&name, observer, cancel)
    }

    fn repo(&self) -> PathBuf {
        self.dir.path().join("models--o--r-GGUF")
    }

    /// Names of blobs.
    fn blobs(&self) -> Vec<String> {
        let mut all: Vec<String> = fs::read_dir(self.repo().join("blobs"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        all.sort();
        all
    }
}

const PIECE: u64 = 10_000;

/// What was asked of the host that has the bytes.
fn ranges(site: &Site) -> Vec<(u64, u64)> {
    let seen = site.hub.seen().into_iter();
    seen.filter(|request| request.host == Host::Store).filter_map(|request| request.range).collect()
}

#[test]
fn a_model_lies_in_the_cache_as_every_program_expects() {
    let bytes = model(95_000, 1);
    let site = Site::new(&[("m Q8_0.gguf", model(5, 2)), ("d/m-Q4_K_M.gguf", bytes.clone())]);
    let pulled = site.pull("hf.co/o/r-GGUF").unwrap();
    let etag = sha256(&bytes);
    let path = site.repo().join("snapshots").join(COMMIT).join("d/m-Q4_K_M.gguf");
    assert_eq!((&pulled.path, pulled.bytes, pulled.fetched_bytes), (&path, 95_000, 95_000));
    assert_eq!(pulled.name, "o/r-GGUF:Q4_K_M");
    let link = fs::read_link(&path).unwrap();
    assert_eq!(link, Path::new("../../../blobs").join(&etag));
    assert_eq!(fs::read(&path).unwrap(), bytes);
    assert_eq!(fs::read_to_string(site.repo().join("refs/main")).unwrap(), COMMIT);
    assert_eq!(site.blobs(), std::slice::from_ref(&etag));
    let lock = format!(".locks/models--o--r-GGUF/{etag}.lock");
    assert!(site.dir.path().join(lock).is_file());
    let found = Store::new(&site.environment()).find("o/r-GGUF").unwrap();
    assert_eq!((found.path, found.name), (path, pulled.name));
    assert_eq!(site.hub.sent_bytes(), 95_000);
    assert!(ranges(&site).iter().all(|(from, to)| to - from < PIECE));

    // What is there is not fetched again; and a name with a space is one.
    assert_eq!(site.pull("o/r-GGUF:q4_k_m").unwrap().fetched_bytes, 0);
    assert_eq!(site.hub.sent_bytes(), 0);
    assert_eq!(site.pull("o/r-GGUF:m Q8_0.gguf").unwrap().fetched_bytes, 5);
}

#[test]
fn a_split_model_has_all_its_files() {
    let names: Vec<String> =
        (1..=3).map(|n| format!("Q8_0/m-Q8_0-0000{n}-of-00003.gguf")).collect();
    let files: Vec<(&str, Vec<u8>)> =
        names.iter().zip(1..).map(|(name, n)| (name.as_str(), model(25_000, n))).collect();
    let site = Site::new(&files);
    let states = RefCell::new(Vec::new());
    struct Last<'a>(&'a RefCell<Vec<(String, u64, u64)>>);
    impl Observer for Last<'_> {
        fn report(&self, event: Event<'_>) {
            if let Event::Fetching(files) = event {
                let all = files.iter().map(|f| (f.path.clone(), f.bytes, f.done_bytes));
                *self.0.borrow_mut() = all.collect();
            }
        }
    }
    let pulled = site.pull_as("o/r-GGUF:Q8_0", &Last(&states), &Cancel::new()).unwrap();
    assert_eq!((pulled.bytes, pulled.fetched_bytes), (75_000, 75_000));
    assert!(pulled.path.ends_with(&names[0]));
    for (name, bytes) in &files {
        let path = site.repo().join("snapshots").join(COMMIT).join(name);
        assert_eq!(&fs::read(path).unwrap(), bytes);
    }
    let expected: Vec<_> = names.iter().map(|name| (name.clone(), 25_000, 25_000)).collect();
    assert_eq!(states.into_inner(), expected);
}

#[test]
fn cut_connections_go_on_where_they_ended() {
    let bytes = model(200_000, 3);
    for seed in 0..12 {
        let site = Site::new(&[("m-Q4_K_M.gguf", bytes.clone())]);
        let mut random = Random(seed);
        site.hub.rule(move |request| match (request.host, random.below(4)) {
            (Host::Store, 0) => Act::Serve,
            (Host::Store, _) => Act::Cut(1 + random.below(PIECE) as usize),
            (Host::Hub, 0) if request.range.is_some() => Act::Status(503, String::new()),
            (Host::Hub, _) => Act::Serve,
        });
        let pulled = site.pull("o/r-GGUF").unwrap();
        assert_eq!(fs::read(pulled.path).unwrap(), bytes);
        // No byte came twice.
        assert_eq!(site.hub.sent_bytes(), 200_000);
    }
}

#[test]
fn a_server_that_sends_nothing_is_given_up_and_gone_on_with_later() {
    let bytes = model(50_000, 4);
    let site = Site::new(&[("m-Q4_K_M.gguf", bytes.clone())]);
    site.hub.rule(|request| match request.range {
        Some((from, _)) if request.host == Host::Store && from >= 20_000 => Act::Cut(0),
        _ => Act::Serve,
    });
    let error = site.pull("o/r-GGUF").unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
    assert!(error.hint().unwrap().contains("goes on from there"));
    assert_eq!(site.blobs().len(), 2);
    let came = site.hub.sent_bytes();
    assert_eq!(came, 20_000);
    let listed = Store::new(&site.environment()).find("o/r-GGUF");
    assert!(matches!(listed, Err(tierstream_store::Error::Partial { .. })));
    site.hub.rule(|_| Act::Serve);
    let pulled = site.pull("o/r-GGUF").unwrap();
    assert_eq!((pulled.fetched_bytes, site.hub.sent_bytes()), (30_000, 30_000));
    assert_eq!(fs::read(pulled.path).unwrap(), bytes);
    assert_eq!(site.blobs(), [sha256(&bytes)]);
}

#[test]
fn a_server_without_ranges_sends_all_of_it() {
    let bytes = model(60_000, 5);
    let site = Site::new(&[("m-Q4_K_M.gguf", bytes.clone())]);
    // It is cut, further each time.
    let len = AtomicUsize::new(0);
    site.hub.rule(move |request| match request.host {
        Host::Store => Act::All(len.fetch_add(9_000, Ordering::SeqCst) + 9_000),
        Host::Hub => Act::Serve,
    });
    let pulled = site.pull("o/r-GGUF").unwrap();
    assert_eq!(fs::read(pulled.path).unwrap(), bytes);
}

#[test]
fn other_bytes_are_deleted() {
    let bytes = model(30_000, 6);
    let site = Site::new(&[("m-Q4_K_M.gguf", bytes.clone())]);
    site.hub.rule(|request| match (request.host, request.range) {
        (Host::Store, Some((10_000, _))) => Act::Corrupt,
        _ => Act::Serve,
    });
    let error = site.pull("o/r-GGUF").unwrap_err();
    assert!(
        matches!(&error, Error::Hash { expected, .. } if *expected == sha256(&bytes)),
        "{error}"
    );
    assert_eq!(site.blobs(), [""; 0]);
    assert!(!site.repo().join("refs/main").exists());
    site.hub.rule(|_| Act::Serve);
    assert_eq!(fs::read(site.pull("o/r-GGUF").unwrap().path).unwrap(), bytes);
}

#[test]
fn another_length_is_refused() {
    let site = Site::new(&[("m-Q4_K_M.gguf", model(30_000, 7))]);
    for told in [29_999, 30_001] {
        site.hub.rule(move |request| match request.host {
            Host::Store => Act::Length(told),
            Host::Hub => Act::Serve,
        });
        let error = site.pull("o/r-GGUF").unwrap_err();
        assert!(
            matches!(&error, Error::Answer { what, .. } if what.contains(&told.to_string())),
            "{error}"
        );
    }
    for told in [0, u64::MAX] {
        site.hub.rule(move |request| match request.host {
            Host::Hub if request.method == "HEAD" => Act::Length(told),
            _ => Act::Serve,
        });
        let error = site.pull("o/r-GGUF").unwrap_err();
        assert!(matches!(&error, Error::Answer { what, .. } if what.contains("size")), "{error}");
    }
}

#[test]
fn what_does_not_fit_is_not_begun() {
    let site = Site::new(&[("m-Q4_K_M.gguf", model(30_000, 8))]);
    site.hub.rule(|request| match request.method.as_str() {
        "HEAD" => Act::Length(1 << 43),
        _ => Act::Serve,
    });
    let error = site.pull("o/r-GGUF").unwrap_err();
    assert!(
        matches!(error, Error::NoSpace { needed_bytes, .. } if needed_bytes == 1 << 43),
        "{error}"
    );
    assert_eq!(site.hub.sent_bytes(), 0);
}

#[test]
fn the_token_goes_to_the_hub_alone() {
    let site = Site::new(&[("m-Q4_K_M.gguf", model(30_000, 9))]);
    site.pull("o/r-GGUF").unwrap();
    let seen = site.hub.seen();
    assert!(seen.iter().any(|request| request.host == Host::Store));
    for request in seen {
        let expected = (request.host == Host::Hub).then(|| "Bearer hf_secret".to_owned());
        assert_eq!(request.token, expected, "{request:?}");
    }
    // One that is no token is not sent at all.
    let mut environment = site.environment();
    environment.hf_token = Some(Secret::new("hf secret"));
    assert!(matches!(Puller::new(&environment, Options::default()), Err(Error::Token)));
}

#[test]
fn refusals_say_what_they_are() {
    let site = Site::new(&[("m-Q4_K_M.gguf", model(30_000, 10))]);
    let refused = |status: u16, code: &str| {
        let headers = match code {
            "" => String::new(),
            code => format!("X-Error-Code: {code}\r\n"),
        };
        site.hub.rule(move |_| Act::Status(status, headers.clone()));
        site.pull("o/r-GGUF").unwrap_err()
    };
    assert!(
        matches!(refused(401, "RepoNotFound"), Error::NoRepository(repo) if repo == "o/r-GGUF")
    );
    assert!(matches!(refused(404, ""), Error::NoRepository(_)));
    assert!(matches!(refused(403, "GatedRepo"), Error::Gated(_)));
    assert!(matches!(refused(401, ""), Error::Refused(_)));
    assert!(matches!(refused(410, ""), Error::Answer { .. }));
    assert!(matches!(refused(500, ""), Error::Unreachable { .. }));
    for (status, code) in [(401, "RepoNotFound"), (403, "GatedRepo"), (401, ""), (404, "")] {
        assert!(refused(status, code).hint().is_some());
    }
}

#[test]
fn a_busy_hub_is_asked_again() {
    let bytes = model(30_000, 11);
    let site = Site::new(&[("m-Q4_K_M.gguf", bytes.clone())]);
    let mut asked = Vec::new();
    site.hub.rule(move |request| match asked.contains(request) {
        true => Act::Serve,
        false => {
            asked.push(request.clone());
            Act::Status(429, "Retry-After: 0\r\n".to_owned())
        }
    });
    let pulled = site.pull("o/r-GGUF").unwrap();
    assert_eq!(fs::read(pulled.path).unwrap(), bytes);
}

#[test]
fn signed_addresses_that_have_expired_are_asked_for_again() {
    let bytes = model(50_000, 12);
    let site = Site::new(&[("m-Q4_K_M.gguf", bytes.clone())]);
    let mut sent = 0;
    site.hub.rule(move |request| {
        sent += usize::from(request.host == Host::Store);
        match request.host {
            Host::Store if sent % 2 == 0 => Act::Status(403, String::new()),
            _ => Act::Serve,
        }
    });
    assert_eq!(fs::read(site.pull("o/r-GGUF").unwrap().path).unwrap(), bytes);
}

#[test]
fn hostile_answers_are_refused() {
    let site = Site::new(&[("m-Q4_K_M.gguf", model(30_000, 13))]);
    let listed = |path: &str| {
        let file = serde_json::json!({ "rfilename": path });
        serde_json::json!({ "sha": COMMIT, "siblings": [file] }).to_string().into_bytes()
    };
    let long = vec![b' '; usize::try_from(tierstream_pull::limits::MAX_LISTING_BYTES).unwrap() + 1];
    for body in [listed("../../m-Q4_K_M.gguf"), b"[]".to_vec(), b"<html>".to_vec(), long] {
        site.hub.rule(move |request| match request.path.starts_with("/api") {
            true => Act::Body(body.clone()),
            false => Act::Serve,
        });
        let error = site.pull("o/r-GGUF").unwrap_err();
        assert!(matches!(error, Error::Answer { .. }), "{error}");
    }
    for to in ["file:///etc/passwd", "nowhere", "/round"] {
        site.hub.rule(move |_| Act::Redirect(to.to_owned()));
        let error = site.pull("o/r-GGUF").unwrap_err();
        assert!(matches!(error, Error::Answer { .. }), "{to}: {error}");
    }
    assert!(!site.repo().exists());
}

#[test]
fn what_is_not_there_is_told_with_what_is() {
    let site = Site::new(&[("m-Q8_0.gguf", model(9, 14)), ("m-Q6_K.gguf", model(9, 15))]);
    let error = site.pull("o/r-GGUF:Q4_0").unwrap_err();
    let expected = "the repository o/r-GGUF has no Q4_0; it has o/r-GGUF:Q6_K, o/r-GGUF:Q8_0";
    assert_eq!(error.to_string(), expected);
    assert!(matches!(site.pull("o/other").unwrap_err(), Error::NoRepository(_)));
}

#[test]
fn nothing_is_fetched_offline() {
    let site = Site::new(&[("m-Q4_K_M.gguf", model(30_000, 16))]);
    let environment = Environment { hf_hub_offline: true, ..site.environment() };
    let name = HubName::parse("o/r-GGUF").unwrap();
    let pull = || site.puller(&environment).pull(&name, &Quiet, &Cancel::new());
    assert!(matches!(pull(), Err(Error::Offline(_))));
    assert_eq!(site.hub.seen(), []);
    let path = site.pull("o/r-GGUF").unwrap().path;
    assert_eq!(pull().unwrap().path, path);
}

#[test]
fn two_at_once_fetch_once() {
    let bytes = model(300_000, 17);
    let site = Site::new(&[("m-Q4_K_M.gguf", bytes.clone())]);
    let pulled: Vec<Pulled> = thread::scope(|scope| {
        let both = [(); 2].map(|()| scope.spawn(|| site.pull("o/r-GGUF").unwrap()));
        both.map(|one| one.join().unwrap()).into()
    });
    assert_eq!(site.hub.sent_bytes(), 300_000);
    assert_eq!(pulled[0].path, pulled[1].path);
    assert_eq!(pulled.iter().map(|p| p.fetched_bytes).sum::<u64>(), 300_000);
    assert_eq!(fs::read(&pulled[0].path).unwrap(), bytes);
}

/// Cancels when it is told of this.
struct StopAt(fn(&Event<'_>) -> bool, Cancel);

impl Observer for StopAt {
    fn report(&self, event: Event<'_>) {
        if (self.0)(&event) {
            self.1.cancel();
        }
    }
}

#[test]
fn a_pull_is_stopped_while_it_waits_and_goes_on_later() {
    let bytes = model(100_000, 18);
    let site = Site::new(&[("m-Q4_K_M.gguf", bytes.clone())]);
    site.hub.rule(|request| match (request.host, request.range) {
        (Host::Store, Some((from, _))) if from >= 50_000 => Act::Hold(100),
        _ => Act::Serve,
    });
    let is_half =
        |event: &Event<'_>| matches!(event, Event::Fetching([file]) if file.done_bytes >= 50_000);
    let cancel = Cancel::new();
    let error = site.pull_as("o/r-GGUF", &StopAt(is_half, cancel.clone()), &cancel).unwrap_err();
    assert!(matches!(error, Error::Cancelled), "{error}");
    let first = site.hub.sent_bytes();
    assert!((50_000..100_000).contains(&first));
    site.hub.rule(|_| Act::Serve);
    let pulled = site.pull("o/r-GGUF").unwrap();
    assert_eq!(fs::read(&pulled.path).unwrap(), bytes);
    assert!(pulled.fetched_bytes <= 50_000);

    // One that was stopped before begins nothing.
    site.hub.seen();
    assert!(matches!(site.pull_as("o/r-GGUF", &Quiet, &cancel), Err(Error::Cancelled)));
    assert_eq!(site.hub.seen(), []);
}

#[test]
fn a_pull_is_stopped_while_the_hub_says_nothing() {
    let site = Site::new(&[("m-Q4_K_M.gguf", model(30_000, 19))]);
    let cancel = Cancel::new();
    let of_rule = cancel.clone();
    site.hub.rule(move |_| {
        of_rule.cancel();
        Act::Status(503, "Retry-After: 300\r\n".to_owned())
    });
    assert!(matches!(site.pull_as("o/r-GGUF", &Quiet, &cancel), Err(Error::Cancelled)));
}

#[test]
fn a_killed_pull_goes_on_with_what_it_recorded() {
    let bytes = model(100_000, 20);
    let site = Site::new(&[("m-Q4_K_M.gguf", bytes.clone())]);
    site.hub.rule(|request| match (request.host, request.range) {
        (Host::Store, Some((from, _))) if from >= 50_000 => Act::Hold(0),
        _ => Act::Serve,
    });
    // Cargo builds examples beside the tests.
    let tests = std::env::current_exe().unwrap();
    let program = tests.parent().unwrap().with_file_name("examples").join("pull");
    let mut child = Command::new(&program)
        .args(["o/r-GGUF", &PIECE.to_string()])
        .env("HF_ENDPOINT", &site.hub.url)
        .env("HF_HUB_CACHE", site.dir.path())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{}: {error}", program.display()));
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    // The second time that it is told, it was recorded after the first.
    let is_half = |line: &String| line.contains("done_bytes: 50000");
    assert!(lines.by_ref().map(Result::unwrap).filter(is_half).nth(1).is_some());
    child.kill().unwrap();
    child.wait().unwrap();
    site.hub.rule(|_| Act::Serve);
    site.hub.sent_bytes();
    site.hub.seen();
    let pulled = site.pull("o/r-GGUF").unwrap();
    assert_eq!(fs::read(&pulled.path).unwrap(), bytes);
    assert_eq!((pulled.fetched_bytes, site.hub.sent_bytes()), (50_000, 50_000));
    assert!(ranges(&site).iter().all(|(from, _)| *from >= 50_000));
}

#[test]
fn an_older_version_stays_when_a_newer_one_comes() {
    let bytes = model(30_000, 21);
    let site = Site::new(&[("m-Q4_K_M.gguf", bytes.clone())]);
    let old = site.repo().join("snapshots").join("a".repeat(40));
    fs::create_dir_all(&old).unwrap();
    fs::write(old.join("m-Q4_K_M.gguf"), "GGUF old").unwrap();
    fs::create_dir_all(site.repo().join("refs")).unwrap();
    fs::write(site.repo().join("refs/main"), "a".repeat(40)).unwrap();
    let pulled = site.pull("o/r-GGUF").unwrap();
    assert_eq!(fs::read(&pulled.path).unwrap(), bytes);
    assert!(old.join("m-Q4_K_M.gguf").exists());
    // A blob that was cut short by somebody is not taken for one.
    let blob = site.repo().join("blobs").join(sha256(&bytes));
    fs::write(&blob, "GGUF").unwrap();
    assert_eq!(site.pull("o/r-GGUF").unwrap().fetched_bytes, 30_000);
    assert_eq!(fs::read(&blob).unwrap(), bytes);
}

#[test]
fn what_another_program_finished_leaves_nothing_behind() {
    let bytes = model(30_000, 23);
    let site = Site::new(&[("m-Q4_K_M.gguf", bytes.clone())]);
    site.hub.rule(|request| match request.range {
        Some((from, _)) if request.host == Host::Store && from > 0 => Act::Cut(0),
        _ => Act::Serve,
    });
    assert!(matches!(site.pull("o/r-GGUF"), Err(Error::Unreachable { .. })));
    let etag = sha256(&bytes);
    assert_eq!(site.blobs().len(), 2);
    fs::write(site.repo().join("blobs").join(&etag), &bytes).unwrap();
    assert_eq!(site.pull("o/r-GGUF").unwrap().fetched_bytes, 0);
    assert_eq!(site.blobs(), [etag]);
}

#[test]
fn shared_content_is_fetched_once() {
    let bytes = model(30_000, 22);
    let names = ["m-Q8_0-00001-of-00002.gguf", "m-Q8_0-00002-of-00002.gguf"];
    let site = Arc::new(Site::new(&names.map(|name| (name, bytes.clone()))));
    let pulled = site.pull("o/r-GGUF").unwrap();
    assert_eq!((pulled.bytes, pulled.fetched_bytes), (60_000, 30_000));
}

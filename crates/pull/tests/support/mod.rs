//! A hub of one repository, and the host that it redirects to, which do what a test wants of them.

#![allow(dead_code, reason = "not every test needs all of it")]

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;

use sha2::{Digest, Sha256};

pub(crate) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// Which of the two a request went to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Host {
    Hub,
    /// Where the bytes are.
    Store,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) host: Host,
    pub(crate) method: String,
    pub(crate) path: String,
    /// First and last byte.
    pub(crate) range: Option<(u64, u64)>,
    pub(crate) token: Option<String>,
}

/// What is done with a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Act {
    Serve,
    /// The connection ends after so many bytes of the body.
    Cut(usize),
    /// So many bytes come, and then none, until the other side goes.
    Hold(usize),
    /// All of the file, whatever was asked for.
    All(usize),
    /// Other bytes.
    Corrupt,
    /// The file is told to have another size.
    Length(u64),
    /// A status, with headers.
    Status(u16, String),
    /// A redirect to there.
    Redirect(String),
    /// This body.
    Body(Vec<u8>),
}

type Rule = Box<dyn FnMut(&Request) -> Act + Send>;

struct Inner {
    files: Vec<File>,
    seen: Mutex<Vec<Request>>,
    has_seen: Condvar,
    /// Connections that were held, and that the other side has left.
    left: Mutex<usize>,
    has_left: Condvar,
    sent_bytes: Mutex<u64>,
    rule: Mutex<Rule>,
    store_url: String,
}

struct File {
    path: String,
    bytes: Vec<u8>,
    sha256: String,
    /// What the hub says of its size.
    size: u64,
}

pub(crate) struct Hub {
    pub(crate) url: String,
    inner: Arc<Inner>,
}

impl Hub {
    /// One with the repository `o/r-GGUF` of these files, which does as it should.
    pub(crate) fn start(files: &[(&str, Vec<u8>)]) -> Self {
        let listen = || TcpListener::bind("127.0.0.1:0").unwrap();
        let (hub, store) = (listen(), listen());
        let url = |of: &TcpListener| format!("http://{}", of.local_addr().unwrap());
        let file = |(path, bytes): &(&str, Vec<u8>)| File {
            path: (*path).to_owned(),
            sha256: sha256(bytes),
            size: bytes.len() as u64,
            bytes: bytes.clone(),
        };
        let inner = Arc::new(Inner {
            files: files.iter().map(file).collect(),
            seen: Mutex::default(),
            has_seen: Condvar::new(),
            left: Mutex::default(),
            has_left: Condvar::new(),
            sent_bytes: Mutex::default(),
            rule: Mutex::new(Box::new(|_| Act::Serve)),
            store_url: url(&store),
        });
        let this = Self { url: url(&hub), inner: inner.clone() };
        for (listener, host) in [(hub, Host::Hub), (store, Host::Store)] {
            let inner = inner.clone();
            // Threads end with the process: a test's server has no more to do.
            thread::spawn(move || {
                for stream in listener.incoming().map_while(Result::ok) {
                    let inner = inner.clone();
                    // What ends with an error is a connection that the other side left.
                    thread::spawn(move || drop(inner.converse(stream, host)));
                }
            });
        }
        this
    }

    /// From here on, this decides what is done with requests.
    pub(crate) fn rule(&self, rule: impl FnMut(&Request) -> Act + Send + 'static) {
        *self.inner.rule.lock().unwrap() = Box::new(rule);
    }

    /// Requests since it was asked last.
    pub(crate) fn seen(&self) -> Vec<Request> {
        std::mem::take(&mut self.inner.seen.lock().unwrap())
    }

    /// Waits until it is asked for a file's bytes.
    pub(crate) fn wait_for_bytes(&self) {
        let is_asked = |all: &mut Vec<Request>| all.iter().any(|r| r.host == Host::Store);
        let seen = self.inner.seen.lock().unwrap();
        drop(self.inner.has_seen.wait_while(seen, |all| !is_asked(all)).unwrap());
    }

    /// Waits until the other side has left a connection that was held.
    pub(crate) fn wait_until_left(&self) {
        let left = self.inner.left.lock().unwrap();
        let mut left = self.inner.has_left.wait_while(left, |left| *left == 0).unwrap();
        *left -= 1;
    }

    /// Bytes of files that were sent since it was asked last.
    pub(crate) fn sent_bytes(&self) -> u64 {
        std::mem::take(&mut self.inner.sent_bytes.lock().unwrap())
    }
}

impl Inner {
    fn converse(&self, stream: TcpStream, host: Host) -> std::io::Result<()> {
        let mut reader = BufReader::new(stream.try_clone()?);
        while let Some(request) = read(&mut reader, host)? {
            self.seen.lock().unwrap().push(request.clone());
            self.has_seen.notify_all();
            let act = (self.rule.lock().unwrap())(&request);
            if !self.answer(&stream, &mut reader, &request, act)? {
                break;
            }
        }
        Ok(())
    }

    /// Whether the connection goes on.
    fn answer(
        &self,
        mut stream: &TcpStream,
        reader: &mut BufReader<TcpStream>,
        request: &Request,
        act: Act,
    ) -> std::io::Result<bool> {
        let head = |mut stream: &TcpStream, status: u16, headers: &str, len: usize| {
            let text = format!("HTTP/1.1 {status} X\r\n{headers}Content-Length: {len}\r\n\r\n");
            stream.write_all(text.as_bytes())
        };
        match &act {
            Act::Status(status, headers) => {
                head(stream, *status, headers, 0)?;
                return Ok(true);
            }
            Act::Redirect(to) => {
                head(stream, 302, &format!("Location: {to}\r\n"), 0)?;
                return Ok(true);
            }
            Act::Body(bytes) => {
                head(stream, 200, "", bytes.len())?;
                stream.write_all(bytes)?;
                return Ok(true);
            }
            _ => {}
        }
        if request.host == Host::Hub {
            self.answer_as_hub(stream, request, &act, head)?;
            return Ok(true);
        }
        let name = request.path.trim_start_matches('/').split('?').next().unwrap_or_default();
        let file = self.files.iter().find(|file| file.sha256 == name);
        let Some(file) = file else { return head(stream, 404, "", 0).map(|()| true) };
        let size = file.bytes.len();
        let is_all = matches!(act, Act::All(_)) || request.range.is_none();
        let (from, to) = request.range.filter(|_| !is_all).unwrap_or((0, size as u64 - 1));
        let mut body = file.bytes[from as usize..=to as usize].to_vec();
        if act == Act::Corrupt {
            body[0] ^= 1;
        }
        let told = if let Act::Length(told) = act { told } else { size as u64 };
        match is_all {
            true => {
                let len = if let Act::Length(told) = act { told as usize } else { body.len() };
                head(stream, 200, "", len)?
            }
            false => {
                let range = format!("Content-Range: bytes {from}-{to}/{told}\r\n");
                head(stream, 206, &range, body.len())?
            }
        }
        let sent = match act {
            Act::Cut(len) | Act::Hold(len) | Act::All(len) => len.min(body.len()),
            _ => body.len(),
        };
        let written = stream.write_all(&body[..sent]);
        if written.is_ok() {
            *self.sent_bytes.lock().unwrap() += sent as u64;
        }
        if let Act::Hold(_) = act {
            // Nothing more comes from the other side than its end, which may have come before.
            let _ = written.is_ok() && reader.read(&mut [0]).is_ok();
            *self.left.lock().unwrap() += 1;
            self.has_left.notify_all();
        }
        written?;
        Ok(sent == body.len())
    }

    fn answer_as_hub(
        &self,
        mut stream: &TcpStream,
        request: &Request,
        act: &Act,
        head: impl Fn(&TcpStream, u16, &str, usize) -> std::io::Result<()>,
    ) -> std::io::Result<()> {
        let path = request.path.as_str();
        if path == "/api/models/o/r-GGUF/revision/main" {
            let files: Vec<_> = self.files.iter().map(|f| &f.path).collect();
            let files: Vec<_> =
                files.iter().map(|path| serde_json::json!({ "rfilename": path })).collect();
            let text = serde_json::json!({ "sha": COMMIT, "siblings": files }).to_string();
            head(stream, 200, "", text.len())?;
            return stream.write_all(text.as_bytes());
        }
        let prefix = format!("/o/r-GGUF/resolve/{COMMIT}/");
        let file = path.strip_prefix(&prefix).map(|path| path.replace("%20", " "));
        let file = file.and_then(|path| self.files.iter().find(|file| file.path == path));
        let Some(file) = file else {
            return head(stream, 404, "X-Error-Code: RepoNotFound\r\n", 0);
        };
        let size = if let Act::Length(told) = act { *told } else { file.size };
        let (sha256, url) = (&file.sha256, &self.store_url);
        let headers = format!(
            "Location: {url}/{sha256}?signed\r\nX-Repo-Commit: {COMMIT}\r\nX-Linked-Size: {size}\r\n\
             X-Linked-Etag: \"{sha256}\"\r\nETag: \"{}\"\r\n",
            "0".repeat(40)
        );
        head(stream, 302, &headers, 0)
    }
}

fn read(reader: &mut impl BufRead, host: Host) -> std::io::Result<Option<Request>> {
    let mut lines = VecDeque::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        match line.trim_end() {
            "" => break,
            line => lines.push_back(line.to_owned()),
        }
    }
    let first = lines.pop_front().unwrap_or_default();
    let mut words = first.split(' ').map(str::to_owned);
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let header = |name: &str| {
        let line = lines.iter().find(|line| line.to_ascii_lowercase().starts_with(name));
        line.and_then(|line| line.split_once(": ")).map(|(_, value)| value.to_owned())
    };
    let range = header("range:").and_then(|value| {
        let (from, to) = value.strip_prefix("bytes=")?.split_once('-')?;
        Some((from.parse().ok()?, to.parse().ok()?))
    });
    Ok(Some(Request { host, method, path, range, token: header("authorization:") }))
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Bytes that begin as a GGUF, of which no two parts are the same.
pub(crate) fn model(len: usize, seed: u64) -> Vec<u8> {
    let mut random = Random(seed);
    let rest = (4..len).map(|_| random.below(256) as u8);
    b"GGUF".iter().copied().chain(rest).collect()
}

pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        // Numbers from "Numerical Recipes"; the upper bits are the better ones.
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (self.0 >> 24) % end
    }
}

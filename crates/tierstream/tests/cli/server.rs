//! A `tierstream serve` that runs.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Output, Stdio};

use rustix::process::Signal;
use serde_json::Value;

use crate::support::{signal, stdout, tierstream};

/// A server of the demo model. It ends with the test.
pub(crate) struct Server {
    pub(crate) child: Child,
    /// Its address.
    pub(crate) host: String,
    pub(crate) home: tempfile::TempDir,
}

impl Server {
    pub(crate) fn start(args: &[&str]) -> Self {
        Self::start_with(args, |_| ())
    }

    /// With what `prepare` does to its command.
    pub(crate) fn start_with(args: &[&str], prepare: impl FnOnce(&mut Command)) -> Self {
        Self::start_as(&[&["--ctx", "512"], args].concat(), prepare)
    }

    /// With the usual context.
    pub(crate) fn start_as(args: &[&str], prepare: impl FnOnce(&mut Command)) -> Self {
        let home = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let mut command = tierstream();
        command
            .args(["serve", "--host", "127.0.0.1:0", "--json", "-t", "1"])
            .args(args)
            .env("HOME", home.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        prepare(&mut command);
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stdout.as_mut().unwrap()).lines();
        let mut text = String::new();
        for line in lines {
            text.push_str(&line.unwrap());
            if text.ends_with('}') {
                break;
            }
        }
        let told: Value = serde_json::from_str(&text).unwrap();
        let host = told["url"].as_str().unwrap().strip_prefix("http://").unwrap().to_owned();
        Self { child, host, home }
    }

    /// What a command of ours says that is its client.
    pub(crate) fn client(&self, args: &[&str]) -> Output {
        let mut command = tierstream();
        command.args(args).env("OLLAMA_HOST", format!("http://{}/", self.host));
        command.env("HOME", self.home.path()).output().unwrap()
    }

    pub(crate) fn json(&self, args: &[&str]) -> Value {
        let output = self.client(&[args, &["--json"]].concat());
        assert!(output.status.success(), "{output:?}");
        serde_json::from_str(stdout(&output)).unwrap()
    }

    /// The answer to a request, with its head.
    pub(crate) fn post(&self, path: &str, body: &Value) -> String {
        self.post_with(path, body, "")
    }

    /// With more lines in its head.
    pub(crate) fn post_with(&self, path: &str, body: &Value, more: &str) -> String {
        let mut answer = String::new();
        self.send(path, body, more).read_to_string(&mut answer).unwrap();
        answer
    }

    /// Sends a request, of whose answer as much can be read as there is.
    pub(crate) fn begin(&self, path: &str, body: &Value) -> TcpStream {
        self.send(path, body, "")
    }

    fn send(&self, path: &str, body: &Value, more: &str) -> TcpStream {
        let mut stream = TcpStream::connect(&self.host).unwrap();
        let body = body.to_string();
        let length = body.len();
        let head = format!("POST {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n", self.host);
        let head =
            format!("{head}{more}Content-Type: application/json\r\nContent-Length: {length}\r\n");
        stream.write_all(format!("{head}\r\n{body}").as_bytes()).unwrap();
        stream
    }
}

impl Server {
    /// Ends it, and gives what it has said on stderr, which `prepare` has piped.
    pub(crate) fn told(mut self) -> String {
        signal(&self.child, Signal::INT);
        assert!(self.child.wait().unwrap().success());
        let mut told = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut told).unwrap();
        told
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

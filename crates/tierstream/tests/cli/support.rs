//! Running the program, with a pipe or a terminal, and models for it.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, kill_process, set_parent_process_death_signal};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use serde_json::Value;
use tierstream::gguf::{Model, write};

/// A test that waits longer than this has failed.
const PATIENCE: Duration = Duration::from_secs(120);

pub(crate) const PROMPT: &str = "It was a cold evening in November,";

pub(crate) fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/novelist-moe-31m-q4_0.gguf")
}

/// The program, with a cache folder of the tests and without a prompt on standard input. It ends with
/// the test that has started it.
pub(crate) fn tierstream() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tierstream"));
    // SAFETY: between fork and exec, one system call, which allocates nothing.
    unsafe {
        command.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::KILL))?));
    }
    command
        .env("TIERSTREAM_CACHE", Path::new(env!("CARGO_TARGET_TMPDIR")).join("cache"))
        .env("NO_COLOR", "1")
        .stdin(Stdio::null());
    command
}

pub(crate) fn output<A: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = A>) -> Output {
    tierstream().args(args).output().unwrap()
}

/// With `input` on standard input.
pub(crate) fn fed(args: &[&str], input: &[u8]) -> Output {
    let mut child = tierstream()
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // It may refuse its input and close it.
    let _ = child.stdin.take().unwrap().write_all(input);
    child.wait_with_output().unwrap()
}

pub(crate) fn stdout(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).expect("stdout is UTF-8")
}

pub(crate) fn stderr(output: &Output) -> &str {
    std::str::from_utf8(&output.stderr).expect("stderr is UTF-8")
}

/// The one object that `args` print with `--json`.
pub(crate) fn json(args: &[&str]) -> Value {
    let output = output(args.iter().chain(&["--json"]));
    assert!(output.status.success(), "{args:?}: {}", stderr(&output));
    sorted(serde_json::from_str(stdout(&output)).expect("one JSON value and nothing else"))
}

/// With its fields in the order of their names, which they have in snapshots: a feature of serde_json, that
/// another crate may switch on, keeps the order of the text.
pub(crate) fn sorted(mut value: Value) -> Value {
    value.sort_all_objects();
    value
}

pub(crate) fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

/// A run that does not end by itself.
pub(crate) const ENDLESS: [&str; 11] = [
    "run",
    concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/novelist-moe-31m-q4_0.gguf"),
    PROMPT,
    "-n",
    "1000000",
    "--ctx",
    "200000",
    "--temp",
    "0",
    "-t",
    "1",
];

pub(crate) fn endless(args: &[&str]) -> Child {
    tierstream()
        .args(ENDLESS)
        .args(args)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

pub(crate) fn first_byte(child: &mut Child) {
    child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
}

/// A copy of the demo model with another value in its metadata.
pub(crate) fn demo_with(dir: &Path, key: &str, value: &str) -> PathBuf {
    let source = demo();
    let model = Model::open(&source).unwrap();
    let mut metadata = model.metadata().clone();
    metadata.insert(key, value.to_owned());
    let specs: Vec<_> = model
        .tensors()
        .iter()
        .map(|t| write::TensorSpec::new(&t.name, t.ty, t.dims.to_vec()))
        .collect();
    let (mut bytes, header) = write::encode(&metadata, &specs).unwrap();
    let all = fs::read(&source).unwrap();
    bytes.resize(usize::try_from(header.file_len()).unwrap(), 0);
    for (from, to) in model.tensors().iter().zip(header.tensors()) {
        let (from, to, len) = (from.offset as usize, to.offset as usize, from.len as usize);
        bytes[to..to + len].copy_from_slice(&all[from..from + len]);
    }
    let path = dir.join("copy.gguf");
    fs::write(&path, bytes).unwrap();
    path
}

/// Where in an escape sequence (ECMA-48, 5.4) the output is.
#[derive(Clone, Copy)]
enum Escape {
    None,
    Begun,
    Parameters,
}

/// The program on a terminal of its own.
pub(crate) struct Terminal {
    master: fs::File,
    pub(crate) child: Child,
    escape: Escape,
    /// All that was shown so far, without escape sequences and carriage returns.
    shown: String,
    /// What was not yet waited for begins here.
    at: usize,
}

impl Terminal {
    pub(crate) fn new<A: AsRef<std::ffi::OsStr>>(
        cache: &Path,
        args: impl IntoIterator<Item = A>,
    ) -> Self {
        Self::of_columns(200, cache, args)
    }

    pub(crate) fn of_columns<A: AsRef<std::ffi::OsStr>>(
        columns: u16,
        cache: &Path,
        args: impl IntoIterator<Item = A>,
    ) -> Self {
        let master =
            openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let slave = fs::OpenOptions::new().read(true).write(true).open(name.to_str().unwrap());
        let slave: OwnedFd = slave.unwrap().into();
        let (ws_row, ws_col) = (50, columns);
        let size = rustix::termios::Winsize { ws_row, ws_col, ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(&master, size).unwrap();
        let child = tierstream()
            .args(args)
            .env("TERM", "xterm")
            .env("TIERSTREAM_CACHE", cache)
            .stdin(slave.try_clone().unwrap())
            .stdout(slave.try_clone().unwrap())
            .stderr(slave)
            .spawn()
            .unwrap();
        let (escape, shown) = (Escape::None, String::new());
        Self { master: master.into(), child, escape, shown, at: 0 }
    }

    pub(crate) fn send(&mut self, keys: &str) {
        self.master.write_all(keys.as_bytes()).unwrap();
    }

    /// Sends a line and waits until it is answered: until the prompt is there again.
    pub(crate) fn ask(&mut self, line: &str) -> String {
        self.send(&format!("{line}\r"));
        // The editor leaves the line, and only then anything else is shown.
        self.wait_for("\n");
        self.wait_for("\n>>> ")
    }

    /// What is shown up to and with the next `text`.
    pub(crate) fn wait_for(&mut self, text: &str) -> String {
        self.wait_until(|shown| shown.find(text).map(|at| at + text.len()))
    }

    /// What is shown up to where `done` says, from where the last wait ended.
    pub(crate) fn wait_until(&mut self, done: impl Fn(&str) -> Option<usize>) -> String {
        let start = Instant::now();
        loop {
            if let Some(len) = done(&self.shown[self.at..]) {
                let from = self.at;
                self.at += len;
                return self.shown[from..self.at].to_owned();
            }
            assert!(start.elapsed() < PATIENCE && self.read(), "not shown:\n{}", self.shown);
        }
    }

    /// Reads on; false at the end.
    fn read(&mut self) -> bool {
        let second = Timespec { tv_sec: 1, tv_nsec: 0 };
        let mut fds = [PollFd::new(&self.master, PollFlags::IN)];
        if poll(&mut fds, Some(&second)).unwrap() == 0 {
            return true;
        }
        let mut bytes = [0; 4096];
        // EIO when the program has closed its side.
        let n = self.master.read(&mut bytes).unwrap_or(0);
        for &byte in &bytes[..n] {
            self.escape = match (self.escape, byte) {
                (Escape::None, 0x1b) => Escape::Begun,
                (Escape::Begun, b'[') => Escape::Parameters,
                (Escape::Parameters, b' '..=b'?') => Escape::Parameters,
                (Escape::Begun | Escape::Parameters, _) => Escape::None,
                (Escape::None, b'\r') => Escape::None,
                (Escape::None, _) => {
                    // The model's and the program's texts are ASCII here.
                    self.shown.push(char::from(byte));
                    Escape::None
                }
            };
        }
        n > 0
    }

    pub(crate) fn exit(mut self) -> ExitStatus {
        let start = Instant::now();
        while self.read() {
            assert!(start.elapsed() < PATIENCE, "does not end:\n{}", self.shown);
        }
        self.child.wait().unwrap()
    }
}

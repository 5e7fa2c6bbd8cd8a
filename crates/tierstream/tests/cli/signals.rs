//! Asked to stop, the program does: cleanly, and with the exit code that says so.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};

use rustix::process::Signal;
use serde_json::Value;

use crate::support::{ENDLESS, demo, endless, first_byte, signal, stderr, stdout, tierstream};

const SIGNALS: [(Signal, i32); 3] = [(Signal::INT, 130), (Signal::TERM, 143), (Signal::HUP, 129)];

#[test]
fn a_generation_ends_cleanly() {
    for (asked, code) in SIGNALS {
        let mut child = endless(&[]);
        first_byte(&mut child);
        signal(&child, asked);
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        assert!(stderr(&output).trim_end().ends_with(", stopped"), "{output:?}");
        assert!(output.stdout.ends_with(b"\n"));
    }
}

#[test]
fn what_is_ignored_stays_ignored() {
    // As `nohup` does it.
    let mut child = Command::new("sh")
        .args(["-c", "trap '' HUP; exec \"$@\"", "sh"])
        .arg(tierstream().get_program())
        .args(ENDLESS)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    first_byte(&mut child);
    signal(&child, Signal::HUP);
    signal(&child, Signal::TERM);
    let output = child.wait_with_output().unwrap();
    // A second request would have ended it at once.
    assert_eq!(output.status.code(), Some(143), "{output:?}");
    assert!(stderr(&output).trim_end().ends_with(", stopped"), "{output:?}");
}

#[test]
fn json_stays_whole() {
    for (asked, code) in SIGNALS {
        let mut child = endless(&["--json"]);
        let mut told = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        while !line.contains("trained with a context of") {
            line.clear();
            // Said when all is loaded.
            assert!(told.read_line(&mut line).unwrap() > 0, "it ended by itself");
        }
        signal(&child, asked);
        std::io::copy(&mut told, &mut std::io::sink()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        let object: Value = serde_json::from_str(stdout(&output)).expect("one whole object");
        assert_eq!(object["stop"], "cancelled", "{object}");
    }
}

#[test]
fn a_second_signal_ends_at_once_what_cannot_stop() {
    // The first one cannot be answered: nobody reads, and not one byte more has room.
    let (reader, writer) = std::io::pipe().unwrap();
    rustix::io::ioctl_fionbio(&writer, true).unwrap();
    while (&writer).write(&[0; 4096]).is_ok() {}
    rustix::io::ioctl_fionbio(&writer, false).unwrap();
    let mut child =
        tierstream().args(ENDLESS).stdout(writer).stderr(Stdio::piped()).spawn().unwrap();
    let mut told = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("trained with a context of") {
        line.clear();
        // Said when all is loaded.
        assert!(told.read_line(&mut line).unwrap() > 0, "it ended by itself");
    }
    signal(&child, Signal::INT);
    signal(&child, Signal::TERM);
    // Of signals that come at one time, either may be the second.
    let code = child.wait().unwrap().code();
    assert!(matches!(code, Some(130 | 143)), "{code:?}");
    drop(reader);
}

#[test]
fn a_measurement_leaves_nothing_behind() {
    for asked in [Signal::INT, Signal::TERM] {
        let temporary = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let mut child = tierstream()
            .args(["bench", "decode"])
            .arg(demo())
            .args(["--repeats", "1000", "-n", "1000", "-t", "1"])
            .env("TMPDIR", temporary.path())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stderr.take().unwrap()).read_line(&mut line).unwrap();
        assert!(line.starts_with("turn 1 of 1000"), "{line}");
        signal(&child, asked);
        assert_eq!(child.wait().unwrap().signal(), Some(asked.as_raw()));
        assert_eq!(fs::read_dir(temporary.path()).unwrap().count(), 0);
    }
}

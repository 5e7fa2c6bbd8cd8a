//! Any bytes as a trace, in any format. What is taken can be written and read again.
//!
//! `cargo +nightly fuzz run trace fuzz/corpus/trace fuzz/seeds/trace`

#![no_main]

use std::fs::{self, File};
use std::panic;
use std::path::PathBuf;
use std::sync::Once;

use libfuzzer_sys::fuzz_target;
use tierstream_eval::{Assume, Error, Trace, Writer, read, write_jsonl};

fuzz_target!(|bytes: &[u8]| {
    HOOK.call_once(pass_over_parquet);
    let path = file("in");
    fs::write(&path, bytes).expect("the folder for temporary files takes it");
    match read(&path, Assume::default()) {
        Ok(trace) => check(&trace),
        Err(error) => check_message(&error),
    }
});

static HOOK: Once = Once::new();

/// The `parquet` crate panics at some damaged pages, which is caught and told as damage: no finding.
fn pass_over_parquet() {
    let before = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        let at = info.location().map(|location| location.file()).unwrap_or_default();
        if !at.contains("/parquet-") && !at.contains("/bytes-") {
            before(info);
        }
    }));
}

fn file(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("trace-fuzz-{}_00.{name}", std::process::id()))
}

fn check(trace: &Trace) {
    for token in 0..trace.len() {
        for (index, layer) in trace.header().layers.iter().enumerate() {
            let experts = trace.experts(token, index);
            assert!(experts.len() <= layer.used as usize);
            assert!(experts.iter().all(|&expert| u32::from(expert) < layer.experts));
        }
    }
    let parquet = file("parquet");
    let out = File::create(&parquet).expect("the folder for temporary files takes it");
    let mut writer = Writer::new(out, trace.header().clone()).expect("it has been checked");
    for name in trace.domains().names() {
        writer.domain(name).expect("they were numbered before");
    }
    for (index, token) in trace.tokens().iter().enumerate() {
        let (row, weights) = (trace.row(index), trace.weight_row(index));
        writer.push(token, row, weights).expect("it has been checked");
    }
    writer.finish().expect("the folder for temporary files takes it");
    same(trace, &read(&parquet, Assume::default()).expect("what is written is read"));
    if trace.len() < 1000 {
        let lines = file("jsonl");
        let out = File::create(&lines).expect("the folder for temporary files takes it");
        write_jsonl(trace, out).expect("the folder for temporary files takes it");
        same(trace, &read(&lines, Assume::default()).expect("what is written is read"));
    }
}

fn same(a: &Trace, b: &Trace) {
    assert_eq!(a.header().layers, b.header().layers);
    assert_eq!(a.len(), b.len());
    for token in 0..a.len() {
        assert_eq!(a.row(token), b.row(token));
        let (a, b) = (&a.tokens()[token], &b.tokens()[token]);
        assert_eq!((a.prompt, a.position, a.batch, a.id), (b.prompt, b.position, b.batch, b.id));
    }
}

fn check_message(error: &Error) {
    // Messages are made from the file's own text.
    let text = error.to_string();
    assert!(!text.contains('\x1b') && !text.contains('\n'), "{text:?}");
    let _ = error.hint();
}

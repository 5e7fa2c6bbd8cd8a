//! The public traces.

use std::path::Path;

use tierstream_eval::{Assume, Trace, read};

/// In the order of the published tables.
pub(crate) const NAMES: [&str; 4] = ["olmoe", "qwen", "gemma", "gptoss"];

pub(crate) fn load(name: &str) -> Trace {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    read(&folder.join(format!("{name}.parquet")), Assume::default()).unwrap()
}

pub(crate) fn percent(share: f64) -> f64 {
    100.0 * share
}

/// Whether all of `ours` are within so much of what was published.
#[track_caller]
pub(crate) fn assert_close(name: &str, ours: &[f64], published: &[f64], within: f64) {
    let far = ours.iter().zip(published).any(|(a, b)| (a - b).abs() > within);
    assert!(!far && ours.len() == published.len(), "{name}: {ours:.2?} is not {published:?}");
}

//! Any bytes as a manifest of Ollama's, or as a model's name: what is taken leads to blobs of the store, and
//! to nothing else.
//!
//! `cargo +nightly fuzz run manifest fuzz/corpus/manifest fuzz/seeds/manifest`

#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use tierstream_store::{Environment, Store, blob_paths};

fuzz_target!(|bytes: &[u8]| {
    let root = Path::new("/store");
    for path in blob_paths(bytes, root).unwrap_or_default() {
        assert_eq!(path.parent(), Some(root.join("blobs").as_path()));
        let name = path.file_name().and_then(|name| name.to_str()).expect("a digest is text");
        let digits = name.strip_prefix("sha256-").expect("a digest");
        assert!(digits.len() == 64 && digits.bytes().all(|b| b.is_ascii_hexdigit()));
    }
    // There are no stores, so that no name leads anywhere.
    if let Ok(name) = std::str::from_utf8(bytes) {
        let error = Store::new(&Environment::default()).find(name).expect_err("there is no store");
        let _ = (error.to_string(), error.hint());
    }
});

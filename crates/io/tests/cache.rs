//! What the page cache has of files on a real drive.

use std::fs::File;
use std::path::Path;

use tierstream_io::cache::{cached_bytes, evict};
use tierstream_io::{File as Opened, PAGE};

#[path = "support/skip.rs"]
mod skip;

#[test]
fn what_is_written_is_cached_until_it_is_evicted() {
    let dir = tempfile::tempdir_in(Path::new(env!("CARGO_TARGET_TMPDIR"))).unwrap();
    let path = dir.path().join("f");
    let bytes = 3 * PAGE + 5;
    std::fs::write(&path, vec![1; bytes]).unwrap();
    let file = File::open(&path).unwrap();
    assert_eq!(cached_bytes(&file).unwrap(), bytes as u64);
    if let Some(why) = &Opened::open(&path).unwrap().direct_state().reason {
        return skip::skip(why);
    }
    evict(&file).unwrap();
    assert_eq!(cached_bytes(&file).unwrap(), 0);
    std::fs::read(&path).unwrap();
    assert_eq!(cached_bytes(&file).unwrap(), bytes as u64);
}

#[test]
fn nothing_of_an_empty_file_is_cached() {
    assert_eq!(cached_bytes(&tempfile::tempfile().unwrap()).unwrap(), 0);
}

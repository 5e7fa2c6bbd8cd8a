//! Where the program keeps what it can make again.

use std::path::PathBuf;

/// `$TIERSTREAM_CACHE`, `$XDG_CACHE_HOME/tierstream`, `~/.cache/tierstream`, or the temp folder.
pub fn dir() -> PathBuf {
    let var = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    var("TIERSTREAM_CACHE")
        .or_else(|| var("XDG_CACHE_HOME").map(|d| d.join("tierstream")))
        .or_else(|| var("HOME").map(|d| d.join(".cache/tierstream")))
        .unwrap_or_else(|| std::env::temp_dir().join("tierstream"))
}

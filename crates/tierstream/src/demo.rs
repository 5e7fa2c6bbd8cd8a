//! The demo model, built into the program: a real trained mixture of experts of 20 MB.

use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use crate::cache;

/// What the model is, its data and licences: `models/README.md`.
static BYTES: &[u8] = include_bytes!("../../../models/novelist-moe-31m-q4_0.gguf");

/// Part of the file name, so that a newer program does not take an older model.
const VERSION: &str = "novelist-moe-31m-q4_0-64af0e92";

/// A text in the style of the model's training data.
pub const PROMPT: &str =
    "It was a cold evening in November, and the old gentleman sat by the fire,";

/// The demo model as a file: the engine reads models from files.
#[derive(Debug)]
pub struct DemoFile {
    /// Where it is.
    pub path: PathBuf,
    /// Why it is not in the cache folder but among the temporary files, if so.
    pub refused: Option<io::Error>,
}

/// The demo model's file, written on first use to the cache folder ([`cache::dir`]), or to the
/// temporary files where that is not possible and `$TIERSTREAM_CACHE` does not insist on it.
///
/// # Errors
/// When no folder can be written; the error names the last one.
pub fn file() -> io::Result<DemoFile> {
    let refused = match cache::dir().map(|dir| file_in(&dir)) {
        Some(Ok(path)) => return Ok(DemoFile { path, refused: None }),
        Some(Err(error)) if cache::is_named() => return Err(error),
        Some(Err(error)) => Some(error),
        None => None,
    };
    Ok(DemoFile { path: file_in(&cache::temporary()?)?, refused })
}

/// Errors name the file.
fn file_in(dir: &Path) -> io::Result<PathBuf> {
    let path = dir.join(format!("{VERSION}.gguf"));
    if is_complete(&path) {
        return Ok(path);
    }
    write(dir, &path).map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", path.display())))?;
    Ok(path)
}

/// Whether the file holds the model, byte for byte.
fn is_complete(path: &Path) -> bool {
    let same = || -> io::Result<bool> {
        let mut file = fs::File::open(path)?;
        let mut buffer = vec![0; 1 << 16];
        for expected in BYTES.chunks(1 << 16) {
            file.read_exact(&mut buffer[..expected.len()])?;
            if buffer[..expected.len()] != *expected {
                return Ok(false);
            }
        }
        Ok(file.read(&mut buffer)? == 0)
    };
    same().unwrap_or(false)
}

/// Never leaves a half-written file under the final name.
fn write(dir: &Path, path: &Path) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    let partial = dir.join(format!("{VERSION}.{}.partial", std::process::id()));
    let written = fs::File::create(&partial).and_then(|mut file| {
        file.write_all(BYTES)?;
        file.sync_all()?;
        fs::rename(&partial, path)
    });
    if written.is_err() {
        let _ = fs::remove_file(&partial);
    }
    written
}

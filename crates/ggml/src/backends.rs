//! ggml backends that are found when the program starts: shared libraries beside it.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use crate::abi::*;
use crate::error::{Error, Result};
use crate::log;

/// Names folders with backends, or single libraries, separated by colons.
const VARIABLE: &str = "TIERSTREAM_BACKENDS";

/// What has been loaded, by its real path: the backend's name. ggml cannot unload.
static LOADED: Mutex<BTreeMap<PathBuf, String>> = Mutex::new(BTreeMap::new());

/// Loads the ggml backends (`libggml-*.so`) that lie in `dir`, by default beside the program, and
/// those that the environment variable `TIERSTREAM_BACKENDS` names: folders or libraries, separated
/// by colons. [`devices`](crate::devices) lists their devices from then on. A library that is
/// loaded already stays as it is.
///
/// Loading a library runs its code: `dir` must be as trustworthy as the program itself.
///
/// One result per library that was found, in the order of their names: the backend's name, or an
/// [`Error::Backend`] that says why it was not taken.
pub fn load_backends(dir: Option<&Path>) -> Vec<Result<String, Error>> {
    log::init();
    let beside = || Some(std::env::current_exe().ok()?.parent()?.to_owned());
    let mut places: Vec<PathBuf> = dir.map(Path::to_owned).or_else(beside).into_iter().collect();
    if let Some(named) = std::env::var_os(VARIABLE) {
        places.extend(std::env::split_paths(&named).filter(|p| !p.as_os_str().is_empty()));
    }
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    let mut seen = Vec::new();
    let mut results = Vec::new();
    for library in places.iter().flat_map(|place| libraries(place)) {
        let real = library.canonicalize().unwrap_or_else(|_| library.clone());
        if seen.contains(&real) {
            continue;
        }
        let result = match loaded.get(&real) {
            Some(name) => Ok(name.clone()),
            None => load(&library),
        };
        if let Ok(name) = &result {
            loaded.insert(real.clone(), name.clone());
        }
        seen.push(real);
        results.push(result);
    }
    results
}

/// The backends in a folder, sorted; a path that is no folder stands for itself. Libraries that
/// this program is linked with (`libggml-base`, the CPU backend) are none.
fn libraries(place: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(place) else {
        return if place.is_dir() { Vec::new() } else { vec![place.to_owned()] };
    };
    let is_backend = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let kind = name.strip_prefix("libggml-").and_then(|name| name.strip_suffix(".so"));
        kind.is_some_and(|kind| kind != "base" && kind != "cpu" && !kind.starts_with("cpu-"))
    };
    let mut found: Vec<PathBuf> = entries.flatten().map(|e| e.path()).filter(is_backend).collect();
    found.sort();
    found
}

fn load(library: &Path) -> Result<String> {
    let refused = |reason: &str| {
        Error::Backend(format!("{}: not a usable backend: {reason}", library.display()))
    };
    let path = CString::new(library.as_os_str().as_bytes())
        .map_err(|_| refused("its path holds a NUL"))?;
    log::clear();
    // SAFETY: a NUL-terminated path. What the library does is its own affair (see above); ggml
    // checks `GGML_BACKEND_API_VERSION` before it calls anything but `ggml_backend_init`.
    let reg = unsafe { ggml_backend_load(path.as_ptr()) };
    if reg.is_null() {
        return Err(refused(&match log::complaints() {
            // ggml says so only at a level that is not kept.
            none if none == log::NO_REASON => "it does not support this machine".to_owned(),
            reason => reason,
        }));
    }
    // SAFETY: a registered backend and its name live for ever.
    let name = unsafe { CStr::from_ptr(ggml_backend_reg_name(reg)) };
    Ok(name.to_string_lossy().into_owned())
}

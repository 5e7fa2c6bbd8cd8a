//! What llama.cpp opens of a model: its files. Of a packed one, files in memory that have the headers
//! which the packed file keeps, and nothing behind them: of the weights, none are llama.cpp's to read.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::ffi::OsStrExt;

use tierstream_gguf::{Model, Original};

use crate::abi::*;
use crate::gpu::disturbing;

/// The files, by the paths that llama.cpp gets.
pub(super) struct Shown {
    /// Of one in several files that lie beside each other, the first.
    paths: Vec<CString>,
    /// Those in memory, which are gone when this is.
    _headers: Vec<File>,
}

impl Shown {
    /// # Errors
    /// What the system says; [`io::ErrorKind::InvalidInput`] for a path with a NUL.
    pub(super) fn of(model: &Model) -> io::Result<Self> {
        let path = |bytes: &[u8]| {
            let nul = |_| io::Error::new(io::ErrorKind::InvalidInput, "the path holds a NUL");
            CString::new(bytes).map_err(nul)
        };
        let Some(originals) = model.originals() else {
            let first = path(model.files()[0].path.as_os_str().as_bytes())?;
            return Ok(Self { paths: vec![first], _headers: Vec::new() });
        };
        let headers = originals.iter().map(in_memory).collect::<io::Result<Vec<File>>>()?;
        let paths =
            headers.iter().map(|f| path(format!("/proc/self/fd/{}", f.as_raw_fd()).as_bytes()));
        Ok(Self { paths: paths.collect::<io::Result<_>>()?, _headers: headers })
    }

    /// Has llama.cpp load them; null if it does not.
    ///
    /// # Safety
    /// What `params` points to lives.
    pub(super) unsafe fn load(&self, params: llama_model_params) -> *mut llama_model {
        if let [path] = &self.paths[..] {
            // SAFETY: a string; the rest as the caller says.
            return disturbing(|| unsafe { llama_model_load_from_file(path.as_ptr(), params) });
        }
        let mut paths: Vec<_> = self.paths.iter().map(|path| path.as_ptr()).collect();
        let count = paths.len();
        // SAFETY: as many strings; the rest as the caller says.
        disturbing(|| unsafe { llama_model_load_from_splits(paths.as_mut_ptr(), count, params) })
    }
}

/// A file that begins with the header of `original`, and is as long as that, since llama.cpp looks
/// whether tensors lie in their file.
fn in_memory(original: &Original) -> io::Result<File> {
    // SAFETY: a name, and a flag that it knows.
    let fd = unsafe { libc::memfd_create(c"header".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just opened, and nobody else's.
    let mut file = unsafe { File::from_raw_fd(fd) };
    file.write_all(&original.header)?;
    file.set_len(original.len)?;
    Ok(file)
}

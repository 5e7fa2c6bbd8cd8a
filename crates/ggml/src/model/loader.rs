//! llama.cpp's loader: calling it, and holding it to what it may read.

use std::any::Any;
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr;
use std::sync::Arc;

use tierstream_gguf::FileIdentity;
use tierstream_io::{FileId, Reader};

use super::Progress;
use super::shown::Shown;
use crate::abi::*;
use crate::error::{Error, Result};
use crate::log;

/// Reads that llama.cpp makes beyond the weights that are its to read: headers that it reads again
/// through stdio, the aligned head and tail of each tensor, and what a GPU's driver may read on the
/// same thread. Bytes.
const LOAD_SLACK_BYTES: u64 = 256 << 10;
const LOAD_SLACK_PER_TENSOR_BYTES: u64 = 8 << 10;

/// Calls llama.cpp's loader.
pub(super) fn call_loader(
    file: &tierstream_gguf::Model,
    mut params: llama_model_params,
    progress: Progress<'_>,
) -> Result<*mut llama_model> {
    let path = &file.files()[0].path;
    let failed = |reason: String| Error::Load { path: path.clone(), reason };
    let shown = Shown::of(file).map_err(|error| failed(error.to_string()))?;
    let mut call = LoadCall { progress, stopped: false, panic: None };
    params.progress_callback = Some(on_progress);
    params.progress_callback_user_data = ptr::from_mut(&mut call).cast();
    log::clear();
    // SAFETY: everything in `params` outlives the call.
    let llama = unsafe { shown.load(params) };
    if !llama.is_null() {
        return Ok(llama);
    }
    if let Some(panic) = call.panic {
        resume_unwind(panic);
    }
    Err(if call.stopped { Error::Cancelled } else { failed(log::complaints()) })
}

struct LoadCall<'a> {
    progress: Progress<'a>,
    stopped: bool,
    /// Of `progress`, carried past llama.cpp to our caller.
    panic: Option<Box<dyn Any + Send>>,
}

unsafe extern "C" fn on_progress(done: f32, call: *mut c_void) -> bool {
    // SAFETY: `call_loader` passes its own live `LoadCall`, on this thread.
    let call = unsafe { &mut *call.cast::<LoadCall<'_>>() };
    match catch_unwind(AssertUnwindSafe(|| (call.progress)(done))) {
        Ok(go_on) => {
            call.stopped |= !go_on;
            go_on
        }
        Err(panic) => {
            call.panic = Some(panic);
            false
        }
    }
}

/// Opens a file of a model whose header has been read.
pub(super) fn open(reader: &Reader, file: &tierstream_gguf::FileInfo) -> Result<FileId> {
    let id = reader.open(&file.path)?;
    let opened = reader.file(id)?;
    let (device, inode) = opened.device_inode();
    let identity = FileIdentity { device, inode, modified: opened.modified() };
    check_identity(file, opened.size(), Some(identity))?;
    Ok(id)
}

/// The paths still lead to the files whose headers have been read: llama.cpp has opened them by
/// their names, too.
pub(super) fn check_identities(model: &tierstream_gguf::Model) -> Result<()> {
    for file in model.files() {
        let now = std::fs::metadata(&file.path).map_err(|source| tierstream_io::Error::Open {
            path: file.path.as_path().into(),
            source: Arc::new(source),
        })?;
        check_identity(file, now.len(), FileIdentity::of(&now))?;
    }
    Ok(())
}

pub(super) fn check_identity(
    file: &tierstream_gguf::FileInfo,
    bytes: u64,
    identity: Option<FileIdentity>,
) -> Result<()> {
    let what = if bytes != file.len {
        format!("it had {} bytes when its header was read", file.len)
    } else if file.identity.is_some() && identity != file.identity {
        "it was exchanged or written to since its header was read".to_owned()
    } else {
        return Ok(());
    };
    let path = file.path.as_path().into();
    Err(tierstream_io::Error::Changed { path, what: what.into() }.into())
}

/// A packed model's weights are all read by us, since llama.cpp would find zeros.
pub(super) fn check_all_taken(
    file: &tierstream_gguf::Model,
    is_taken: impl Fn(&str) -> bool,
) -> Result<()> {
    let stray = first_not_taken(file, is_taken)?;
    stray.map_or(Ok(()), |tensor| {
        let what = format!("llama.cpp reads the tensor {tensor} itself, which is packed");
        Err(Error::SelfCheck(what))
    })
}

/// A tensor that is none of ours to read. llama.cpp skips the layers that predict further tokens.
pub(super) fn first_not_taken(
    file: &tierstream_gguf::Model,
    is_taken: impl Fn(&str) -> bool,
) -> Result<Option<String>> {
    let layers = file.block_count()?.unwrap_or(0);
    let further = file.arch_u32("nextn_predict_layers")?.unwrap_or(0);
    let is_further = |name: &str| {
        let number =
            name.strip_prefix("blk.").and_then(|rest| rest.split('.').next()?.parse().ok());
        number.is_some_and(|layer: u32| layer >= layers.saturating_sub(further))
    };
    let stray = file.tensors().iter().find(|t| !is_taken(&t.name) && !is_further(&t.name));
    Ok(stray.map(|tensor| tensor.name.clone()))
}

/// The most bytes that loading may read, by a model's bytes that are llama.cpp's to read, those of its
/// headers among them, and its tensors. llama.cpp reads headers up to three times.
pub(super) fn most_read_bytes(rest: u64, headers: u64, tensors: usize) -> u64 {
    rest + 3 * headers + LOAD_SLACK_BYTES + tensors as u64 * LOAD_SLACK_PER_TENSOR_BYTES
}

/// Bytes that this thread has read with `read` and its kin, where the kernel tells.
pub(super) fn thread_read_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/thread-self/io").ok()?;
    text.lines().find_map(|l| l.strip_prefix("rchar: "))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_packed_is_not_left_to_llama() {
        let dir = tempfile::tempdir().unwrap();
        let spec = tierstream_synth::Spec::new(tierstream_synth::Arch::Olmoe);
        let written = spec.write(dir.path().join("model.gguf")).unwrap();
        let file = tierstream_gguf::Model::open(&written.files[0]).unwrap();
        assert!(check_all_taken(&file, |_| true).is_ok());
        let error = check_all_taken(&file, |name| name != "blk.1.ffn_norm.weight").unwrap_err();
        assert!(matches!(&error, Error::SelfCheck(what) if what.contains("blk.1.ffn_norm.weight")));
    }

    #[test]
    fn reading_the_weights_twice_is_too_much() {
        let rest = 1 << 30;
        let most = most_read_bytes(rest, 6 << 20, 500);
        assert!(most > rest + (18 << 20) && most < rest + (40 << 20), "{most}");
    }
}

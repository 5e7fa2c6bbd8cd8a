//! The weights of a GGUF once more, as safetensors, for loaders that read nothing else: tensors of the
//! same names and sizes, as bytes, in the same order.

use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde_json::{Map, json};
use tierstream::drive::Scratch;
use tierstream::gguf::{Model, Tensor};
use tierstream::{Error, gguf};

use crate::cli::output::{self, Failure, Progress};

/// What the data of the `safetensors` package's files begins at a multiple of.
const ALIGN: usize = 8;

/// Writes the copy to a file without a name in `folder`, which is gone with the program.
pub(super) fn write(model: &Path, folder: &Path) -> anyhow::Result<Scratch> {
    let device = |path: &Path| fs::metadata(path).map(|found| found.dev()).ok();
    if device(model) != device(folder) {
        let (model, folder) = (model.display(), folder.display());
        output::note(format!(
            "{folder} is not on the drive of {model}: the packages of Python read from another one"
        ));
    }
    let file = gguf::Model::open(model).map_err(Error::from)?;
    written(&file, folder).map_err(|error| {
        let (name, folder) = (model.display(), folder.display());
        let message = format!("cannot write a copy of {name} to {folder}: {error}");
        Failure::error(message, "--temp names another folder, best one on the same drive")
    })
}

fn written(model: &Model, folder: &Path) -> io::Result<Scratch> {
    let progress = Progress::start("copying as safetensors");
    let mut scratch = Scratch::empty(folder)?;
    let mut out = BufWriter::new(scratch.file());
    out.write_all(&header(model.tensors()))?;
    let mut from: Option<(usize, File)> = None;
    let mut done = 0;
    for tensor in in_file_order(model.tensors()) {
        let mut file = match from.take() {
            Some((index, file)) if index == tensor.file => file,
            _ => File::open(&model.files()[tensor.file].path)?,
        };
        file.seek(SeekFrom::Start(tensor.offset))?;
        let copied = io::copy(&mut (&file).take(tensor.len), &mut out)?;
        if copied < tensor.len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        from = Some((tensor.file, file));
        done += copied;
        progress.set(done as f32 / model.tensor_bytes() as f32);
    }
    out.flush()?;
    drop(out);
    scratch.file().sync_data()?;
    Ok(scratch)
}

fn in_file_order(tensors: &[Tensor]) -> Vec<&Tensor> {
    let mut all: Vec<&Tensor> = tensors.iter().collect();
    all.sort_by_key(|tensor| (tensor.file, tensor.offset));
    all
}

/// Length and JSON, as the format has them (see `crates/safetensors`).
fn header(tensors: &[Tensor]) -> Vec<u8> {
    let mut entries = Map::new();
    let mut end = 0;
    for tensor in in_file_order(tensors) {
        let begin = end;
        end += tensor.len;
        let entry = json!({"dtype": "U8", "shape": [tensor.len], "data_offsets": [begin, end]});
        entries.insert(tensor.name.clone(), entry);
    }
    let mut text = serde_json::Value::Object(entries).to_string();
    let padding = text.len().next_multiple_of(ALIGN) - text.len();
    text.extend(std::iter::repeat_n(' ', padding));
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use tierstream_safetensors::Checkpoint;

    use super::*;

    #[test]
    fn the_copy_has_every_tensor_with_its_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let spec = tierstream_synth::Spec::new(tierstream_synth::Arch::Llama);
        let path = spec.write(dir.path().join("model.gguf")).unwrap().files.remove(0);
        let model = Model::open(&path).unwrap();
        let scratch = write(&path, dir.path()).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        let checkpoint = Checkpoint::open(scratch.path()).unwrap();
        assert_eq!(checkpoint.tensor_bytes(), model.tensor_bytes());
        let (ours, copied) = (fs::read(&path).unwrap(), fs::read(scratch.path()).unwrap());
        for tensor in model.tensors() {
            let found = checkpoint.tensor(&tensor.name).unwrap();
            let bytes = |all: &[u8], offset: u64, len: u64| {
                all[offset as usize..(offset + len) as usize].to_vec()
            };
            assert!(
                bytes(&ours, tensor.offset, tensor.len) == bytes(&copied, found.offset, found.len),
                "{}",
                tensor.name
            );
        }
    }

    #[test]
    fn a_folder_that_takes_none_is_told() {
        let path = crate::cli::open::named(Path::new("demo")).unwrap();
        let error = write(&path, Path::new("/no/such/folder")).unwrap_err();
        assert!(error.to_string().contains("to /no/such/folder: No such file"), "{error}");
    }
}

//! Writes the files of a model in one pass, with one buffer.

use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::blocks::Filler;
use crate::error::{Error, Result};
use crate::gguf::{DEFAULT_ALIGNMENT, Metadata, Value, align_up, header};
use crate::plan::{Plan, Tensor};
use crate::rng::Rng;
use crate::spec::Spec;

/// Largest piece of tensor data held in memory.
const BUFFER_BYTES: usize = 1 << 20;

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Written {
    /// The files in order; llama.cpp is given the first.
    pub files: Vec<PathBuf>,
    /// Bytes of all files.
    pub bytes: u64,
    /// Bytes of all routed experts, in all layers.
    pub expert_bytes: u64,
}

pub(crate) fn write(spec: &Spec, path: &Path) -> Result<Written> {
    let plan = spec.plan();
    let shards = shards(spec, &plan);
    let mut files = Vec::with_capacity(shards.len());
    let mut bytes = 0;
    let mut buffer = Vec::new();
    let count = u16::try_from(shards.len()).map_err(|_| Error::Spec {
        field: "split_bytes",
        value: spec.split_bytes.unwrap_or(0),
        why: format!("{} files are more than split.count can say", shards.len()),
    })?;
    for (no, range) in (0..count).zip(shards) {
        let file = match spec.split_bytes {
            Some(_) => split_path(path, no, count),
            None => path.to_owned(),
        };
        let metadata = metadata(spec, no, count, plan.tensors.len());
        bytes += write_file(&file, spec, &metadata, &plan.tensors[range], &mut buffer)
            .map_err(|source| Error::Io { path: file.clone(), source })?;
        files.push(file);
    }
    Ok(Written { files, bytes, expert_bytes: plan.expert_bytes() })
}

/// Which tensors go to which file: in order, a new file where the next tensor would exceed the
/// limit, as llama.cpp's `gguf-split --split-max-size` does it.
fn shards(spec: &Spec, plan: &Plan) -> Vec<Range<usize>> {
    let limit = spec.split_bytes.unwrap_or(u64::MAX);
    let mut shards = Vec::new();
    if spec.split_bytes.is_some() && spec.split_empty_first {
        shards.push(0..0);
    }
    let (mut start, mut size) = (0, 0);
    for (i, tensor) in plan.tensors.iter().enumerate() {
        let bytes = align_up(tensor.bytes(), spec.alignment);
        if size > 0 && size + bytes > limit {
            shards.push(start..i);
            (start, size) = (i, 0);
        }
        size += bytes;
    }
    shards.push(start..plan.tensors.len());
    shards
}

/// `NAME-00001-of-0000N.gguf` (`llama_split_path`).
fn split_path(path: &Path, no: u16, count: u16) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let stem = name.strip_suffix(".gguf").unwrap_or(&name);
    path.with_file_name(format!("{stem}-{:05}-of-{count:05}.gguf", no + 1))
}

/// Metadata of file `no`: everything in the first, only the split in the others.
fn metadata(spec: &Spec, no: u16, count: u16, n_tensors: usize) -> Metadata {
    let mut m = Metadata::default();
    if no == 0 {
        m.push("general.architecture", Value::Str(spec.arch.gguf_name().into()));
        m.push("general.type", Value::Str("model".into()));
        let name = format!("random {} of seed {}", spec.arch, spec.seed);
        m.push("general.name", Value::Str(name));
        m.push("general.file_type", Value::U32(spec.gate_type.file_type()));
        m.push("general.quantization_version", Value::U32(2));
    }
    if spec.alignment != DEFAULT_ALIGNMENT {
        // A reader takes it from each file.
        m.push("general.alignment", Value::U32(spec.alignment));
    }
    if no == 0 {
        m.extend(spec.metadata().all);
        m.push("tokenizer.ggml.model", Value::Str("no_vocab".into()));
    }
    if spec.split_bytes.is_some() {
        m.push("split.no", Value::U16(no));
        m.push("split.count", Value::U16(count));
        m.push("split.tensors.count", Value::I32(n_tensors as i32));
    }
    m
}

/// Writes one file and returns its length.
fn write_file(
    path: &Path,
    spec: &Spec,
    metadata: &Metadata,
    tensors: &[Tensor],
    buffer: &mut Vec<u8>,
) -> io::Result<u64> {
    let mut file = File::create(path)?;
    let head = header(metadata, tensors, spec.alignment);
    file.write_all(&head)?;
    let mut written = head.len() as u64;
    for tensor in tensors {
        written += write_tensor(&mut file, spec, tensor, buffer)?;
    }
    Ok(written)
}

/// Writes one tensor with its padding and returns the bytes.
fn write_tensor(
    file: &mut File,
    spec: &Spec,
    tensor: &Tensor,
    buffer: &mut Vec<u8>,
) -> io::Result<u64> {
    let rng = Rng::for_name(spec.seed, &tensor.name);
    let mut filler = Filler::new(tensor.ty, tensor.mean, tensor.std, rng);
    // Whole blocks, and whole words for the types that draw several values from one.
    let unit = 8 * tensor.ty.block_bytes() as usize;
    let piece = BUFFER_BYTES / unit * unit;
    let bytes = tensor.bytes();
    let mut left = bytes;
    while left > 0 {
        let now = left.min(piece as u64) as usize;
        buffer.resize(now, 0);
        filler.fill(buffer);
        left -= now as u64;
        if left == 0 {
            let padding = align_up(bytes, spec.alignment) - bytes;
            buffer.resize(now + padding as usize, 0);
        }
        file.write_all(buffer)?;
    }
    Ok(align_up(bytes, spec.alignment))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_split_files() {
        let path = |p: &str| split_path(Path::new(p), 1, 12);
        assert_eq!(path("d/m.gguf"), Path::new("d/m-00002-of-00012.gguf"));
        assert_eq!(path("m"), Path::new("m-00002-of-00012.gguf"));
        assert_eq!(path("m.v1.gguf"), Path::new("m.v1-00002-of-00012.gguf"));
    }
}

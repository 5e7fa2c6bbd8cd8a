//! What tells a model from others without reading all of it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use tierstream_gguf::Model;

use crate::Sum;

/// Bytes of each tensor that count.
const BEGINNING_BYTES: u64 = 4096;

/// A digest of the tensors' names, types and shapes, in the order of their names, and of the first 4 KiB
/// of each. A packed or split copy has the same; another training of the same shape has another one.
///
/// # Errors
/// If a file cannot be read.
pub fn identity(model: &Model) -> io::Result<u64> {
    let files: Vec<File> =
        model.files().iter().map(|file| File::open(&file.path)).collect::<Result<_, _>>()?;
    let mut tensors: Vec<_> = model.tensors().iter().collect();
    tensors.sort_unstable_by_key(|tensor| &tensor.name);
    let mut sum = Sum::new();
    let mut bytes = vec![0; BEGINNING_BYTES as usize];
    for tensor in tensors {
        // Nothing in one field can pass for another: all have a length, or have one.
        sum.update(&(tensor.name.len() as u64).to_le_bytes());
        sum.update(tensor.name.as_bytes());
        sum.update(&tensor.ty.id().to_le_bytes());
        sum.update(&(tensor.dims.len() as u64).to_le_bytes());
        tensor.dims.iter().for_each(|n| sum.update(&n.to_le_bytes()));
        // Of a packed model, experts are apart.
        let mut left = BEGINNING_BYTES;
        for extent in tensor.extents() {
            let part = &mut bytes[..extent.len.min(left) as usize];
            files[extent.file].read_exact_at(part, extent.offset)?;
            sum.update(part);
            left -= part.len() as u64;
            if left == 0 {
                break;
            }
        }
    }
    Ok(sum.finish())
}

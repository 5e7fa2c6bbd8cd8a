//! A tensor of a checkpoint: name, type, shape, and where its bytes lie.

use crate::dtype::Dtype;
use crate::error::ErrorKind;

/// A tensor in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// Unique in the checkpoint. Any UTF-8.
    pub name: String,
    /// How its elements are stored.
    pub dtype: Dtype,
    /// Outermost dimension first, elements in row-major order. A scalar has none; one of length 0
    /// makes the tensor empty.
    pub shape: Vec<u64>,
    /// Index into [`Checkpoint::files`](crate::Checkpoint::files); 0 in a
    /// [`Header`](crate::Header).
    pub file: usize,
    /// First byte, from the start of the file (not of the data, as in the header).
    pub offset: u64,
    /// Bytes. `offset + len` lies within the file.
    pub len: u64,
}

impl Tensor {
    /// One past its last byte, from the start of the file.
    pub fn end(&self) -> u64 {
        // Within the file, so it cannot overflow; see `header`.
        self.offset + self.len
    }

    /// How many elements it has.
    pub fn elements(&self) -> u64 {
        // Checked in `bytes_of`.
        self.shape.iter().product()
    }
}

/// Bytes of a tensor of this shape.
pub(crate) fn bytes_of(dtype: Dtype, shape: &[u64]) -> Result<u64, ErrorKind> {
    let overflow = || ErrorKind::ShapeOverflow { shape: shape.to_vec() };
    let elements = shape.iter().try_fold(1u64, |product, dim| product.checked_mul(*dim));
    let bits = elements.and_then(|n| n.checked_mul(dtype.bits())).ok_or_else(overflow)?;
    if !bits.is_multiple_of(8) {
        return Err(ErrorKind::PartialByte { dtype, shape: shape.to_vec() });
    }
    Ok(bits / 8)
}

/// Indices of `tensors` sorted by name, or the index of the second of two tensors of one name.
pub(crate) fn index_by_name(tensors: &[Tensor]) -> Result<Vec<u32>, usize> {
    let name = |index: u32| tensors[index as usize].name.as_str();
    let mut by_name: Vec<u32> = (0..tensors.len() as u32).collect();
    by_name.sort_by(|a, b| name(*a).cmp(name(*b)));
    match by_name.windows(2).find(|pair| name(pair[0]) == name(pair[1])) {
        Some(pair) => Err(pair[1] as usize),
        None => Ok(by_name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_follow_the_shape() {
        for (dtype, shape, bytes) in [
            (Dtype::F32, &[2, 3][..], 24),
            (Dtype::F64, &[], 8),
            (Dtype::U8, &[5, 0, 7], 0),
            (Dtype::F4, &[2, 3], 3),
            (Dtype::F6_E2M3, &[4], 3),
        ] {
            assert_eq!(bytes_of(dtype, shape).unwrap(), bytes, "{dtype} {shape:?}");
        }
        for (dtype, shape) in [(Dtype::F4, [3, 1]), (Dtype::F6_E3M2, [2, 1])] {
            let error = bytes_of(dtype, &shape).unwrap_err();
            assert!(matches!(error, ErrorKind::PartialByte { .. }), "{error}");
        }
        // The last is empty, but on the way to that its product overflows, as in the package.
        for shape in [&[1 << 62][..], &[u64::MAX, u64::MAX], &[u64::MAX, 2, 0]] {
            let error = bytes_of(Dtype::F32, shape).unwrap_err();
            assert!(matches!(error, ErrorKind::ShapeOverflow { .. }), "{error}");
        }
    }
}

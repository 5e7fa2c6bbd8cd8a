//! A tensor of a file: name, type, shape, and where its bytes lie.

use std::fmt;
use std::ops::Deref;

use crate::Result;
use crate::error::ErrorKind;
use crate::limits::MAX_DIMS;
use crate::tensor_type::TensorType;

/// The extent of a tensor, innermost dimension first (`ne` in ggml); 0 to 4 dimensions, none of
/// them zero.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Dims {
    ne: [u64; MAX_DIMS as usize],
    count: u8,
}

impl Dims {
    /// Takes up to four dimensions, innermost first.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Limit`] for more than four, [`ErrorKind::ZeroDimension`], and
    /// [`ErrorKind::ShapeOverflow`] for more than 2^63-1 elements, which ggml refuses too.
    pub fn new(dims: &[u64]) -> Result<Self> {
        if dims.len() > MAX_DIMS as usize {
            return Err(ErrorKind::Limit {
                what: "the number of dimensions",
                value: dims.len() as u64,
                limit: MAX_DIMS.into(),
            }
            .into());
        }
        if let Some(dim) = dims.iter().position(|dim| *dim == 0) {
            return Err(ErrorKind::ZeroDimension { dim }.into());
        }
        let mut ne = [1; MAX_DIMS as usize];
        ne[..dims.len()].copy_from_slice(dims);
        let elements = dims.iter().try_fold(1u64, |product, dim| product.checked_mul(*dim));
        if elements.is_none_or(|elements| i64::try_from(elements).is_err()) {
            return Err(ErrorKind::ShapeOverflow { dims: dims.to_vec() }.into());
        }
        Ok(Self { ne, count: dims.len() as u8 })
    }

    /// Elements in the tensor.
    pub fn elements(&self) -> u64 {
        self.ne.iter().product()
    }

    /// The length of dimension `dim`; 1 for a dimension that the tensor does not have, as in ggml.
    pub fn ne(&self, dim: usize) -> u64 {
        self.ne.get(dim).copied().unwrap_or(1)
    }

    /// Bytes of a tensor of this shape, without padding.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::PartialBlock`] if a row is no whole number of blocks,
    /// [`ErrorKind::ShapeOverflow`].
    pub fn bytes(&self, ty: TensorType) -> Result<u64> {
        if !self.ne[0].is_multiple_of(ty.block_elems()) {
            let (ne0, block_elems) = (self.ne[0], ty.block_elems());
            return Err(ErrorKind::PartialBlock { ne0, block_elems, ty: ty.name() }.into());
        }
        (self.elements() / ty.block_elems())
            .checked_mul(ty.block_bytes())
            .filter(|bytes| i64::try_from(*bytes).is_ok())
            .ok_or_else(|| ErrorKind::ShapeOverflow { dims: self.to_vec() }.into())
    }
}

impl Deref for Dims {
    type Target = [u64];

    fn deref(&self) -> &[u64] {
        &self.ne[..usize::from(self.count)]
    }
}

impl fmt::Debug for Dims {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

/// A byte range in one of a model's files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Extent {
    /// Index into [`Model::files`](crate::Model::files).
    pub file: usize,
    /// First byte, from the start of the file.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// A tensor in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// At most 63 bytes of UTF-8 without NUL, unique in the model.
    pub name: String,
    /// How its elements are stored.
    pub ty: TensorType,
    /// Innermost dimension first.
    pub dims: Dims,
    /// Index into [`Model::files`](crate::Model::files); 0 in a [`Header`](crate::Header).
    pub file: usize,
    /// First byte of its data, from the start of the file (not of the data section, as in the file
    /// itself).
    pub offset: u64,
    /// Bytes of its data, without padding.
    pub len: u64,
    /// Bytes from the start of one expert's share of the data to the next's, where these do not
    /// follow each other: in the records of a packed file. `None`: the data are one range.
    pub stride: Option<u64>,
}

impl Tensor {
    /// The ranges that its bytes lie in, in order, and together [`len`](Self::len): one, or one for
    /// each expert.
    pub fn extents(&self) -> impl ExactSizeIterator<Item = Extent> + use<> {
        let (file, offset, count) = (self.file, self.offset, self.count());
        let (len, stride) = (self.len / u64::from(count), self.stride.unwrap_or(0));
        (0..count).map(move |n| Extent { file, offset: offset + u64::from(n) * stride, len })
    }

    /// One past its last byte, from the start of the file. All of it lies within the file.
    pub fn end(&self) -> u64 {
        let count = u64::from(self.count());
        // It cannot overflow; see `header` and `Model::relocated`.
        self.offset + (count - 1) * self.stride.unwrap_or(0) + self.len / count
    }

    /// How many ranges there are.
    fn count(&self) -> u32 {
        let experts = self.dims.last().copied().filter(|_| self.stride.is_some());
        // Relocation has checked that they are no more than this.
        experts.and_then(|experts| u32::try_from(experts).ok()).unwrap_or(1)
    }
}

/// Indices of `tensors` sorted by name, or the index of the second of two tensors of one name.
pub(crate) fn index_by_name(tensors: &[Tensor]) -> std::result::Result<Vec<u32>, usize> {
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
    fn shapes_are_checked() {
        assert!(matches!(
            Dims::new(&[4, 0]).unwrap_err().kind(),
            ErrorKind::ZeroDimension { dim: 1 }
        ));
        assert!(matches!(
            Dims::new(&[1; 5]).unwrap_err().kind(),
            ErrorKind::Limit { value: 5, .. }
        ));
        assert!(Dims::new(&[1 << 32, 1 << 31]).is_err());
        assert!(Dims::new(&[u64::MAX, u64::MAX, 2, 2]).is_err());
        let scalar = Dims::new(&[]).unwrap();
        assert_eq!((scalar.elements(), scalar.len(), scalar.ne(2)), (1, 0, 1));
    }

    #[test]
    fn bytes_follow_the_blocks() {
        let dims = Dims::new(&[256, 96, 64]).unwrap();
        assert_eq!(dims.bytes(TensorType::Q4_0).unwrap(), 884_736);
        assert_eq!(dims.bytes(TensorType::F32).unwrap(), 256 * 96 * 64 * 4);
        let odd = Dims::new(&[33]).unwrap();
        assert!(matches!(
            odd.bytes(TensorType::Q4_0).unwrap_err().kind(),
            ErrorKind::PartialBlock { ne0: 33, block_elems: 32, ty: "Q4_0" }
        ));
        let huge = Dims::new(&[1 << 62]).unwrap();
        assert!(matches!(
            huge.bytes(TensorType::F64).unwrap_err().kind(),
            ErrorKind::ShapeOverflow { .. }
        ));
    }
}

//! The tensor types of ggml: how many elements a block has and how many bytes it takes.

use std::fmt;

use crate::error::{Error, ErrorKind};

/// A ggml tensor type (`enum ggml_type`) that tensors in a file can have.
///
/// Values are stored in blocks: [`block_elems`](Self::block_elems) consecutive elements of a row
/// take [`block_bytes`](Self::block_bytes) bytes. Types outside the table cannot be constructed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TensorType {
    /// Index into `TYPES`.
    index: u8,
}

struct Row {
    id: u32,
    name: &'static str,
    block_elems: u32,
    block_bytes: u32,
}

macro_rules! tensor_types {
    ($($ident:ident = $id:literal: $elems:literal x $bytes:literal;)*) => {
        /// `type_traits` of ggml 0.26 (`ggml/src/ggml.c`), block sizes from
        /// `ggml/src/ggml-common.h`.
        const TYPES: &[Row] = &[
            $(Row { id: $id, name: stringify!($ident), block_elems: $elems, block_bytes: $bytes },)*
        ];

        #[allow(non_camel_case_types, reason = "named as the constants")]
        enum Index { $($ident,)* }

        impl TensorType {
            $(
                #[doc = concat!("ggml type ", $id, ": ", $elems, " elements, ", $bytes, " bytes.")]
                #[allow(non_upper_case_globals, reason = "ggml's own spelling, as in IQ4_NL")]
                pub const $ident: Self = Self { index: Index::$ident as u8 };
            )*
        }
    };
}

tensor_types! {
    F32 = 0: 1 x 4;
    F16 = 1: 1 x 2;
    Q4_0 = 2: 32 x 18;
    Q4_1 = 3: 32 x 20;
    Q5_0 = 6: 32 x 22;
    Q5_1 = 7: 32 x 24;
    Q8_0 = 8: 32 x 34;
    Q8_1 = 9: 32 x 36;
    Q2_K = 10: 256 x 84;
    Q3_K = 11: 256 x 110;
    Q4_K = 12: 256 x 144;
    Q5_K = 13: 256 x 176;
    Q6_K = 14: 256 x 210;
    Q8_K = 15: 256 x 292;
    IQ2_XXS = 16: 256 x 66;
    IQ2_XS = 17: 256 x 74;
    IQ3_XXS = 18: 256 x 98;
    IQ1_S = 19: 256 x 50;
    IQ4_NL = 20: 32 x 18;
    IQ3_S = 21: 256 x 110;
    IQ2_S = 22: 256 x 82;
    IQ4_XS = 23: 256 x 136;
    I8 = 24: 1 x 1;
    I16 = 25: 1 x 2;
    I32 = 26: 1 x 4;
    I64 = 27: 1 x 8;
    F64 = 28: 1 x 8;
    IQ1_M = 29: 256 x 56;
    BF16 = 30: 1 x 2;
    TQ1_0 = 34: 256 x 54;
    TQ2_0 = 35: 256 x 66;
    MXFP4 = 39: 32 x 17;
    NVFP4 = 40: 64 x 36;
    Q1_0 = 41: 128 x 18;
    Q2_0 = 42: 64 x 18;
}

/// Types that files once had and ggml no longer reads.
const REMOVED: &[(u32, &str)] = &[
    (4, "Q4_2"),
    (5, "Q4_3"),
    (31, "Q4_0_4_4"),
    (32, "Q4_0_4_8"),
    (33, "Q4_0_8_8"),
    (36, "IQ4_NL_4_4"),
    (37, "IQ4_NL_4_8"),
    (38, "IQ4_NL_8_8"),
];

impl TensorType {
    /// The type with this `ggml_type` number, as it stands in a GGUF tensor table.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::RemovedTensorType`] for a type that ggml no longer supports,
    /// [`ErrorKind::UnknownTensorType`] for a number it never gave out.
    pub fn from_id(id: u32) -> Result<Self, Error> {
        if let Some(found) = Self::all().find(|ty| ty.id() == id) {
            return Ok(found);
        }
        Err(match REMOVED.iter().find(|(removed, _)| *removed == id) {
            Some(&(id, name)) => ErrorKind::RemovedTensorType { id, name },
            None => ErrorKind::UnknownTensorType { id },
        }
        .into())
    }

    /// Every type, in the order of its number.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..TYPES.len() as u8).map(|index| Self { index })
    }

    fn row(self) -> &'static Row {
        &TYPES[usize::from(self.index)]
    }

    /// The number of this type in `enum ggml_type` and in files.
    pub fn id(self) -> u32 {
        self.row().id
    }

    /// ggml's name without its prefix, such as `Q4_K` or `F32`.
    pub fn name(self) -> &'static str {
        self.row().name
    }

    /// Elements in one block; 1 for types that are not quantised.
    pub fn block_elems(self) -> u64 {
        u64::from(self.row().block_elems)
    }

    /// Bytes of one block.
    pub fn block_bytes(self) -> u64 {
        u64::from(self.row().block_bytes)
    }

    /// True for types with more than one element per block.
    pub fn is_quantized(self) -> bool {
        self.block_elems() > 1
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl fmt::Debug for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_unique_and_ascending() {
        let ids: Vec<u32> = TensorType::all().map(TensorType::id).collect();
        assert!(ids.windows(2).all(|pair| pair[0] < pair[1]));
        assert!(REMOVED.iter().all(|(id, _)| !ids.contains(id)));
        // GGML_TYPE_COUNT of ggml 0.26 is 43: every number below it is a type or a removed one.
        assert_eq!(ids.len() + REMOVED.len(), 43);
    }

    #[test]
    fn constants_name_their_own_row() {
        assert_eq!(TensorType::F32.id(), 0);
        assert_eq!(TensorType::Q4_0.name(), "Q4_0");
        assert_eq!(TensorType::MXFP4.id(), 39);
        assert_eq!(TensorType::Q2_0.id(), 42);
    }

    #[test]
    fn removed_and_unknown_types_are_told_apart() {
        let removed = TensorType::from_id(31).unwrap_err();
        assert!(matches!(
            removed.kind(),
            ErrorKind::RemovedTensorType { id: 31, name: "Q4_0_4_4" }
        ));
        assert!(matches!(
            TensorType::from_id(43).unwrap_err().kind(),
            ErrorKind::UnknownTensorType { id: 43 }
        ));
        assert!(TensorType::from_id(u32::MAX).is_err());
    }
}

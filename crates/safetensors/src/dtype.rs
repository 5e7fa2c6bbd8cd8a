//! How the elements of a tensor are stored.

use std::fmt;

/// The type of a tensor's elements, little-endian. The types that version 0.8 of the `safetensors`
/// package has (`Dtype`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[allow(missing_docs)] // their names are what they are
#[allow(non_camel_case_types)]
pub enum Dtype {
    /// One byte, 0 or 1.
    Bool,
    /// Two elements in a byte.
    F4,
    /// Four elements in three bytes.
    F6_E2M3,
    /// Four elements in three bytes.
    F6_E3M2,
    U8,
    I8,
    F8_E5M2,
    F8_E4M3,
    F8_E8M0,
    F8_E4M3FNUZ,
    F8_E5M2FNUZ,
    I16,
    U16,
    F16,
    BF16,
    I32,
    U32,
    F32,
    /// Complex of two `F32`.
    C64,
    F64,
    I64,
    U64,
}

impl Dtype {
    const ALL: [(Self, &str, u64); 22] = [
        (Self::Bool, "BOOL", 8),
        (Self::F4, "F4", 4),
        (Self::F6_E2M3, "F6_E2M3", 6),
        (Self::F6_E3M2, "F6_E3M2", 6),
        (Self::U8, "U8", 8),
        (Self::I8, "I8", 8),
        (Self::F8_E5M2, "F8_E5M2", 8),
        (Self::F8_E4M3, "F8_E4M3", 8),
        (Self::F8_E8M0, "F8_E8M0", 8),
        (Self::F8_E4M3FNUZ, "F8_E4M3FNUZ", 8),
        (Self::F8_E5M2FNUZ, "F8_E5M2FNUZ", 8),
        (Self::I16, "I16", 16),
        (Self::U16, "U16", 16),
        (Self::F16, "F16", 16),
        (Self::BF16, "BF16", 16),
        (Self::I32, "I32", 32),
        (Self::U32, "U32", 32),
        (Self::F32, "F32", 32),
        (Self::C64, "C64", 64),
        (Self::F64, "F64", 64),
        (Self::I64, "I64", 64),
        (Self::U64, "U64", 64),
    ];

    /// All of them.
    pub fn all() -> impl Iterator<Item = Self> {
        Self::ALL.iter().map(|(dtype, ..)| *dtype)
    }

    /// The one that is called so in a header.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, known, _)| *known == name).map(|(dtype, ..)| *dtype)
    }

    /// Its name in a header: `BF16`.
    pub fn name(self) -> &'static str {
        Self::ALL[self as usize].1
    }

    /// Size of an element, in bits.
    pub fn bits(self) -> u64 {
        Self::ALL[self as usize].2
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_order_and_agrees_with_the_package() {
        for (index, dtype) in Dtype::all().enumerate() {
            assert_eq!(dtype as usize, index);
            assert_eq!(Dtype::from_name(dtype.name()), Some(dtype));
            let quoted = format!("\"{dtype}\"");
            let theirs: safetensors::Dtype = serde_json::from_str(&quoted).unwrap();
            assert_eq!(theirs.bitsize() as u64, dtype.bits(), "{dtype}");
        }
        assert_eq!(Dtype::from_name("f32"), None);
        assert_eq!(Dtype::from_name(""), None);
    }
}

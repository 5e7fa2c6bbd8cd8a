//! Tensor types: names, ids and block sizes as ggml defines them.

use std::fmt;
use std::str::FromStr;

/// Storage type of a tensor. Ids and block sizes: `ggml/include/ggml.h` (`ggml_type`) and
/// `ggml/src/ggml-common.h` of llama.cpp.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[allow(non_camel_case_types, reason = "the names that the format itself uses")]
pub enum TensorType {
    /// 32-bit float.
    F32,
    /// IEEE 16-bit float.
    F16,
    /// bfloat16.
    BF16,
    /// 8 bits, one scale per 32 values.
    Q8_0,
    /// 4 bits, one scale per 32 values.
    Q4_0,
    /// 5 bits, one scale per 32 values.
    Q5_0,
    /// 4 bits, super-blocks of 256 values.
    Q4_K,
    /// 5 bits, super-blocks of 256 values.
    Q5_K,
    /// 6 bits, super-blocks of 256 values.
    Q6_K,
    /// 4-bit floats, one power-of-two scale per 32 values.
    MXFP4,
}

impl TensorType {
    /// Every type that the generator writes.
    pub const ALL: [Self; 10] = [
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::Q8_0,
        Self::Q4_0,
        Self::Q5_0,
        Self::Q4_K,
        Self::Q5_K,
        Self::Q6_K,
        Self::MXFP4,
    ];

    /// The `ggml_type` number in a GGUF header.
    #[must_use]
    pub fn id(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q5_0 => 6,
            Self::Q8_0 => 8,
            Self::Q4_K => 12,
            Self::Q5_K => 13,
            Self::Q6_K => 14,
            Self::BF16 => 30,
            Self::MXFP4 => 39,
        }
    }

    /// Values per block; a row's length must be a multiple of it.
    #[must_use]
    pub fn block_len(self) -> u64 {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q8_0 | Self::Q4_0 | Self::Q5_0 | Self::MXFP4 => 32,
            Self::Q4_K | Self::Q5_K | Self::Q6_K => 256,
        }
    }

    /// Bytes per block.
    #[must_use]
    pub fn block_bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q8_0 => 2 + 32,
            Self::Q4_0 => 2 + 16,
            Self::Q5_0 => 2 + 4 + 16,
            Self::MXFP4 => 1 + 16,
            Self::Q4_K => 4 + 12 + 128,
            Self::Q5_K => 4 + 12 + 32 + 128,
            Self::Q6_K => 128 + 64 + 16 + 2,
        }
    }

    /// Bytes of `n` values, where `n` is a multiple of [`TensorType::block_len`].
    #[must_use]
    pub fn bytes(self, n: u64) -> u64 {
        n / self.block_len() * self.block_bytes()
    }

    /// `general.file_type` for a model that is mostly of this type (`llama_ftype` in `llama.h`).
    pub(crate) fn file_type(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q8_0 => 7,
            Self::Q5_0 => 8,
            Self::Q4_K => 15,
            Self::Q5_K => 17,
            Self::Q6_K => 18,
            Self::BF16 => 32,
            Self::MXFP4 => 38,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::Q8_0 => "q8_0",
            Self::Q4_0 => "q4_0",
            Self::Q5_0 => "q5_0",
            Self::Q4_K => "q4_k",
            Self::Q5_K => "q5_k",
            Self::Q6_K => "q6_k",
            Self::MXFP4 => "mxfp4",
        }
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for TensorType {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|t| t.name().eq_ignore_ascii_case(s))
            .ok_or_else(|| format!("unknown tensor type `{s}`"))
    }
}

/// How the routed experts of a model are quantised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[allow(non_camel_case_types, reason = "the names that the format itself uses")]
pub enum Quant {
    /// One type for gate, up and down.
    Uniform(TensorType),
    /// Q4_K, with `down` in Q6_K in some layers, as llama.cpp's Q4_K_M does it.
    Q4_K_M,
}

impl FromStr for Quant {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        if s.eq_ignore_ascii_case("q4_k_m") {
            return Ok(Self::Q4_K_M);
        }
        s.parse().map(Self::Uniform)
    }
}

impl From<TensorType> for Quant {
    fn from(t: TensorType) -> Self {
        Self::Uniform(t)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_back() {
        for t in TensorType::ALL {
            assert_eq!(t.to_string().parse(), Ok(t));
            assert_eq!(t.to_string().to_uppercase().parse(), Ok(Quant::Uniform(t)));
        }
        assert_eq!("Q4_K_M".parse(), Ok(Quant::Q4_K_M));
        assert!("q3_k".parse::<Quant>().is_err());
    }
}

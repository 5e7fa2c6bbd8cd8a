//! What is done with experts that are in host memory and not in the GPU's.

use std::fmt;
use std::str::FromStr;

/// What is done when a single token needs an expert that is not in the GPU's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Miss {
    /// It is copied there. The output is that of the resident model, bit for bit.
    #[default]
    Copy,
    /// The processor computes it from the pool in host memory, beside the GPU, which computes the
    /// others. The processor's kernels round otherwise, so the bits are others.
    Compute,
    /// What turns out to be faster. The bits are others as soon as something is computed.
    Auto,
}

impl Miss {
    const NAMES: [(&str, Miss); 3] =
        [("copy", Miss::Copy), ("compute", Miss::Compute), ("auto", Miss::Auto)];
}

impl fmt::Display for Miss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let named = Self::NAMES.iter().find(|(_, miss)| miss == self);
        f.write_str(named.map_or("", |(name, _)| name))
    }
}

impl FromStr for Miss {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let named = Self::NAMES.iter().find(|(name, _)| *name == text);
        named.map(|&(_, miss)| miss).ok_or_else(|| format!("none of copy, compute, auto: {text}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for (name, miss) in Miss::NAMES {
            assert_eq!(name.parse(), Ok(miss));
            assert_eq!(miss.to_string(), name);
        }
        assert!("move".parse::<Miss>().unwrap_err().contains("compute"));
    }
}

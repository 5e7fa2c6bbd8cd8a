//! Who waits for the routing of a single token.

use std::fmt;
use std::str::FromStr;

/// How a single token is computed on a GPU whose memory does not hold all experts. The output is the
/// same, bit for bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Execution {
    /// As a whole, where that can be done: the GPU looks by itself whether a layer's experts are in its
    /// memory, and waits only for those that are not. Layer by layer otherwise.
    #[default]
    Auto,
    /// Layer by layer: each one's routing is read back to the host.
    Host,
}

impl Execution {
    const NAMES: [(&str, Execution); 2] = [("auto", Execution::Auto), ("host", Execution::Host)];
}

impl fmt::Display for Execution {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let named = Self::NAMES.iter().find(|(_, execution)| execution == self);
        f.write_str(named.map_or("", |(name, _)| name))
    }
}

impl FromStr for Execution {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let named = Self::NAMES.iter().find(|(name, _)| *name == text);
        named.map(|&(_, execution)| execution).ok_or_else(|| format!("none of auto, host: {text}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for (name, execution) in Execution::NAMES {
            assert_eq!(name.parse(), Ok(execution));
            assert_eq!(execution.to_string(), name);
        }
        assert!("whole".parse::<Execution>().unwrap_err().contains("host"));
    }
}

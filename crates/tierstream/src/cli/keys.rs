//! Files of API keys, of the server and its clients.

use std::path::Path;

use anyhow::Context as _;

/// The keys of a file: one a line, without those that are commented out. At least one.
pub(crate) fn read(path: &Path) -> anyhow::Result<Vec<String>> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let is_key = |line: &&str| !line.is_empty() && !line.starts_with('#');
    let keys: Vec<String> = text.lines().map(str::trim).filter(is_key).map(str::to_owned).collect();
    anyhow::ensure!(!keys.is_empty(), "{} has no key", path.display());
    Ok(keys)
}

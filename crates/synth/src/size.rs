//! Sizes as people write them.

/// Bytes from `4096`, `200MB`, `1GiB`, `1.5 GiB`: KB, MB, GB count in thousands, KiB, MiB, GiB
/// in 1024s.
///
/// # Errors
///
/// A line that says what was expected.
pub fn parse_size(s: &str) -> Result<u64, String> {
    let s = s.trim();
    let split = s.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(s.len());
    let (number, unit) = s.split_at(split);
    let unit: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        other => return Err(format!("unknown unit `{other}`; use MB, GB, MiB or GiB")),
    };
    let number: f64 = number.parse().map_err(|_| format!("`{s}` is no size such as 1GiB"))?;
    let bytes = number * unit as f64;
    if bytes < 1.0 || bytes > 2f64.powi(50) {
        return Err(format!("`{s}` is out of range"));
    }
    Ok(bytes as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_size("200MB"), Ok(200_000_000));
        assert_eq!(parse_size("1GiB"), Ok(1 << 30));
        assert_eq!(parse_size("1.5 g"), Ok(3 << 29));
        for bad in ["", "GiB", "1 parsec", "0", "-1", "1.2.3k", "99999999GiB"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }
}

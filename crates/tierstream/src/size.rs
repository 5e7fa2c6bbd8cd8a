//! Sizes as people write them: `8GiB`, `800MB`, `25%`.

use std::fmt;
use std::str::FromStr;

/// A number of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(pub u64);

/// A text that is no size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NotASize {
    /// It has no number or no unit of ours, is negative or too large.
    #[error("`{0}` is not a size; write for example 8GiB or 800MB")]
    Unreadable(String),
    /// So few bytes are surely not meant.
    #[error("`{0}` has no unit and would be {0} bytes; write {0}GiB, or {0}B for bytes")]
    NoUnit(String),
    /// The same where a share could be meant.
    #[error("`{0}` has no unit and would be {0} bytes; write {0}% or {0}GiB, or {0}B for bytes")]
    NoUnitNorPercent(String),
    /// A share of all experts that is none.
    #[error("`{0}` is not a share of all experts; those are 0% to 100%")]
    Share(String),
}

/// From here on a number without a unit is taken for bytes.
const BARE_BYTES_MIN: u64 = 1 << 20;

/// Suffixes, longest first within a letter: powers of 1024 with an `i` or alone, of 1000 with `B`.
const UNITS: &[(&str, u64)] = &[
    ("kib", 1 << 10),
    ("mib", 1 << 20),
    ("gib", 1 << 30),
    ("tib", 1 << 40),
    ("kb", 1_000),
    ("mb", 1_000_000),
    ("gb", 1_000_000_000),
    ("tb", 1_000_000_000_000),
    ("k", 1 << 10),
    ("m", 1 << 20),
    ("g", 1 << 30),
    ("t", 1 << 40),
    ("b", 1),
    ("", 1),
];

impl FromStr for Bytes {
    type Err = NotASize;

    fn from_str(text: &str) -> Result<Self, NotASize> {
        let bad = || NotASize::Unreadable(text.to_owned());
        let lower = text.trim().to_ascii_lowercase();
        let digits = lower.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let unit = &lower[digits.len()..];
        let (_, factor) = UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(bad)?;
        let number: f64 = digits.trim().parse().map_err(|_| bad())?;
        let bytes = number * *factor as f64;
        if !(bytes.is_finite() && (0.0..1e18).contains(&bytes)) {
            return Err(bad());
        }
        // Nothing is nothing in every unit.
        if unit.is_empty() && bytes > 0.0 && bytes < BARE_BYTES_MIN as f64 {
            return Err(NotASize::NoUnit(lower));
        }
        Ok(Bytes(bytes.round() as u64))
    }
}

impl Bytes {
    /// The least size from this one on that is written as it is: what is printed is enough.
    #[must_use]
    pub fn rounded_up(self) -> Bytes {
        let step = match self.0 {
            n if n < 1 << 10 => 1.0,
            n if n < 1 << 20 => f64::from(1 << 10) / 10.0,
            n if n < 1 << 30 => f64::from(1 << 20) / 10.0,
            n if n < 1 << 40 => f64::from(1 << 30) / 100.0,
            _ => (1u64 << 40) as f64 / 100.0,
        };
        Bytes(((self.0 as f64 / step).ceil() * step).round() as u64)
    }
}

impl fmt::Display for Bytes {
    /// Binary units: `40.5 KiB`, `1.25 GiB`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self.0 {
            n if n < 1 << 10 => format!("{n} B"),
            n if n < 1 << 20 => format!("{:.1} KiB", n as f64 / f64::from(1 << 10)),
            n if n < 1 << 30 => format!("{:.1} MiB", n as f64 / f64::from(1 << 20)),
            n if n < 1 << 40 => format!("{:.2} GiB", n as f64 / (1u64 << 30) as f64),
            n => format!("{:.2} TiB", n as f64 / (1u64 << 40) as f64),
        };
        f.pad(&text)
    }
}

/// Size of an expert pool: bytes, or a share of all experts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum PoolShare {
    /// `8GiB`.
    Bytes(Bytes),
    /// `25%`, as a number from 0 to 1.
    Share(f64),
}

impl FromStr for PoolShare {
    type Err = NotASize;

    fn from_str(text: &str) -> Result<Self, NotASize> {
        let Some(percent) = text.trim().strip_suffix('%') else {
            return text.parse().map(PoolShare::Bytes).map_err(|error| match error {
                NotASize::NoUnit(text) => NotASize::NoUnitNorPercent(text),
                other => other,
            });
        };
        match percent.trim().parse::<f64>() {
            Ok(p) if (0.0..=100.0).contains(&p) => Ok(PoolShare::Share(p / 100.0)),
            _ => Err(NotASize::Share(text.to_owned())),
        }
    }
}

impl fmt::Display for PoolShare {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PoolShare::Bytes(bytes) => bytes.fmt(f),
            PoolShare::Share(share) => f.pad(&percent_of(*share)),
        }
    }
}

/// The shortest text that is read as this share: `share * 100.0` alone makes 28.999999999999996 of
/// 29 %.
fn percent_of(share: f64) -> String {
    (0..=f64::DIGITS as usize)
        .map(|digits| format!("{:.digits$}%", share * 100.0))
        .find(|text| text.parse() == Ok(PoolShare::Share(share)))
        .unwrap_or_else(|| format!("{}%", share * 100.0))
}

#[cfg(test)]
mod tests {
    use super::{Bytes, NotASize, PoolShare};

    #[test]
    fn reads_what_people_write() {
        for (text, bytes) in [
            ("8GiB", 8 << 30),
            ("8g", 8 << 30),
            ("800MB", 800_000_000),
            ("1.5 kib", 1536),
            ("4096B", 4096),
            ("1048576", 1 << 20),
            ("0", 0),
        ] {
            assert_eq!(text.parse(), Ok(Bytes(bytes)), "{text}");
        }
        for text in ["", "GiB", "-1GB", "8 GiB x", "1e400", "nan", "8%"] {
            assert!(text.parse::<Bytes>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_few_bytes_are_not_meant() {
        for text in ["8", "8.5", "4096", "1048575"] {
            let told = NotASize::NoUnit(text.to_owned());
            assert_eq!(text.parse::<Bytes>(), Err(told.clone()));
            assert!(told.to_string().contains(&format!("write {text}GiB")), "{told}");
            let told = NotASize::NoUnitNorPercent(text.to_owned());
            assert_eq!(text.parse::<PoolShare>(), Err(told.clone()));
            assert!(told.to_string().contains(&format!("write {text}% or")), "{told}");
        }
    }

    #[test]
    fn reads_shares() {
        assert_eq!("25%".parse(), Ok(PoolShare::Share(0.25)));
        assert_eq!("1MiB".parse(), Ok(PoolShare::Bytes(Bytes(1 << 20))));
        for text in ["101%", "-1%", "%", "x%"] {
            assert_eq!(text.parse::<PoolShare>(), Err(NotASize::Share(text.to_owned())));
        }
    }

    #[test]
    fn prints_shares_as_they_were_written() {
        let fine = ["0.1%", "33.3%", "99.99%", "12.3456789012345%"];
        let all = (0..=100).map(|n| format!("{n}%")).chain(fine.map(str::to_owned));
        for text in all {
            let share: PoolShare = text.parse().unwrap();
            assert_eq!(share.to_string(), text);
        }
        // As near as it gets to what nobody can write.
        assert!(PoolShare::Share(1.0 / 3.0).to_string().starts_with("33.333333333333"));
    }

    #[test]
    fn what_is_rounded_up_is_enough_as_it_is_printed() {
        for bytes in [0, 5, 1025, 209_715, 542_000_001, (1 << 30) - 1, 1_352_000_000, 9 << 41] {
            let up = Bytes(bytes).rounded_up();
            assert!(up.0 >= bytes && up.0 <= bytes + bytes / 10 + 1, "{bytes}: {up:?}");
            assert_eq!(up.to_string().parse(), Ok(up));
        }
    }

    #[test]
    fn prints_binary_units() {
        assert_eq!(Bytes(512).to_string(), "512 B");
        assert_eq!(Bytes(41_472).to_string(), "40.5 KiB");
        assert_eq!(Bytes(20_000_000_000).to_string(), "18.63 GiB");
        assert_eq!(Bytes(9999 << 40).to_string(), "9999.00 TiB");
    }
}

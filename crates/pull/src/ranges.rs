//! Which bytes of a file there are.

use std::ops::Range;

/// Ranges of bytes that neither overlap nor touch, in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Ranges(Vec<Range<u64>>);

impl Ranges {
    /// Of pairs as they are recorded; none if they are not such ranges of a file of `size` bytes.
    pub(crate) fn of_pairs(pairs: &[[u64; 2]], size: u64) -> Option<Self> {
        let mut end = None;
        for &[from, to] in pairs {
            if from >= to || to > size || end.is_some_and(|end| from <= end) {
                return None;
            }
            end = Some(to);
        }
        Some(Self(pairs.iter().map(|&[from, to]| from..to).collect()))
    }

    pub(crate) fn pairs(&self) -> Vec<[u64; 2]> {
        self.0.iter().map(|range| [range.start, range.end]).collect()
    }

    /// Adds a range, of which some may be there.
    pub(crate) fn insert(&mut self, new: Range<u64>) {
        if new.is_empty() {
            return;
        }
        let first = self.0.partition_point(|range| range.end < new.start);
        let behind = self.0.partition_point(|range| range.start <= new.end);
        let mut all = new;
        if first < behind {
            all.start = all.start.min(self.0[first].start);
            all.end = all.end.max(self.0[behind - 1].end);
        }
        self.0.splice(first..behind, [all]);
    }

    /// Number of bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.0.iter().map(|range| range.end - range.start).sum()
    }

    /// Bytes from the beginning without a gap.
    pub(crate) fn prefix(&self) -> u64 {
        self.0.first().filter(|range| range.start == 0).map_or(0, |range| range.end)
    }

    /// What lacks of a file of `size` bytes, in ranges of no more than `piece` bytes.
    pub(crate) fn missing(&self, size: u64, piece: u64) -> Vec<Range<u64>> {
        let mut pieces = Vec::new();
        let mut at = 0;
        for there in self.0.iter().chain(std::iter::once(&(size..size))) {
            while at < there.start {
                let end = there.start.min(at.saturating_add(piece));
                pieces.push(at..end);
                at = end;
            }
            at = there.end;
        }
        pieces
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn ranges_are_sets_of_bytes(
            inserted in prop::collection::vec((0u64..200, 0u64..40), 0..30),
            piece in 1u64..50,
        ) {
            const SIZE: u64 = 240;
            let (mut ranges, mut bytes) = (Ranges::default(), [false; SIZE as usize]);
            for (from, len) in inserted {
                ranges.insert(from..from + len);
                bytes[from as usize..(from + len) as usize].fill(true);
            }
            prop_assert_eq!(ranges.bytes(), bytes.iter().filter(|&&b| b).count() as u64);
            let prefix = bytes.iter().position(|b| !b).unwrap_or(bytes.len());
            prop_assert_eq!(ranges.prefix(), prefix as u64);
            // Recorded and read again, they are the same: in order, apart, within the file.
            prop_assert_eq!(Ranges::of_pairs(&ranges.pairs(), SIZE), Some(ranges.clone()));
            for range in ranges.missing(SIZE, piece) {
                prop_assert!(!range.is_empty() && range.end - range.start <= piece);
                for at in range.clone() {
                    prop_assert!(!std::mem::replace(&mut bytes[at as usize], true));
                }
                ranges.insert(range);
            }
            prop_assert!(bytes.iter().all(|&b| b));
            prop_assert_eq!(ranges.prefix(), SIZE);
        }

        #[test]
        fn no_pairs_lead_beyond_the_file(pairs in prop::collection::vec([0u64..12, 0u64..12], 0..4)) {
            if let Some(ranges) = Ranges::of_pairs(&pairs, 10) {
                prop_assert!(ranges.0.iter().all(|range| range.start < range.end && range.end <= 10));
                prop_assert!(ranges.0.windows(2).all(|w| w[0].end < w[1].start));
            }
        }
    }
}
